"""What the pictures show, and how they are stored."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

import train_pvs
from conftest import TINY, save_subject
from running import call
from test_evaluation import write_constant_network

# Stored with axes to the left, back and top, voxels of 1 x 1 x 2 mm.
AFFINE = np.diag([-1.0, -1, 2, 1])
COLOURS = {"white": (255, 255, 255), "red": (255, 82, 71), "green": (71, 235, 92)}


def describe(figure):
    """Return a figure's title, and of each panel title, texts, legend, axes' names and points."""
    panels = []
    for ax in figure.axes:
        texts = sorted(ax.texts, key=lambda text: text.get_position()[0])
        panel = {"title": ax.get_title(), "texts": [text.get_text() for text in texts]}
        panel["legend"] = [t.get_text() for t in ax.get_legend().texts] if ax.get_legend() else []
        panel["axes"] = ax.get_xlabel(), ax.get_ylabel()
        panel["lines"] = [line.get_xydata() for line in ax.lines]
        panels.append(SimpleNamespace(**panel))
    return SimpleNamespace(title=figure.get_suptitle(), panels=panels)


# Widths of the ground truth by name: worst to best is another order than that of the names.
WIDTHS = {f"sub-{5 * width % 13:02d}": width for width in range(1, 13)}
CUBE = "sub-04"  # is 6 mm wide, as all are high and deep


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run whose network says 0.0067 everywhere, above the threshold, and its figures.

    Heads are cubes of 20 mm, the ground truth lies at their right, front and top. Of the cases'
    figures one is written, and the large overview is not, since that takes seconds.
    """
    folder, figures, save = tmp_path_factory.mktemp("figures"), [], Figure.savefig
    for number, (name, width) in enumerate([*WIDTHS.items(), ("sub-20", 5), ("sub-21", 5)]):
        image, label = np.zeros((2, 30, 32, 18), np.int16)
        image[5:25, 6:26, 4:14] = 400 + number
        label[7 : 7 + width, 8:14, 10:13] = 1
        save_subject(folder / "heads", name, image, label, AFFINE)
    split = {"train": ["sub-20"], "val": ["sub-21"], "test": list(WIDTHS)}
    (folder / "split.json").write_text(json.dumps(split))
    network = [*TINY, *"--pix-dim 1 1 2 --no-head-bias-log-odds".split()]
    write_constant_network(folder / "constant.pth", -5.0, network)
    argv = f"--data-dir {folder / 'heads'} --output-dir {folder / 'out'} --epochs 3 --val-every 3 "
    argv += f"--init-from {folder / 'constant.pth'} --split {folder / 'split.json'} --lr 1e-9 "
    argv += "--crops-per-volume 1 --threshold 0.001"

    def savefig(figure, *args, **settings):
        figures.append(describe(figure))
        if figures[-1].title.startswith((CUBE, "heads")) and len(figure.axes) < 30:
            save(figure, *args, **settings)

    before = plt.get_fignums()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        status, *_ = call(*network, *argv.split())
    assert plt.get_fignums() == before  # hundreds of open ones would fill the memory
    return SimpleNamespace(status=status, out=folder / "out", figures=figures)


def test_run_that_learned_nothing_is_drawn_all_the_same_and_ends_with_1(drawn):
    assert drawn.status == 1
    unwritten = {drawn.out / "multi_plane" / f"{name}.png" for name in WIDTHS if name != CUBE}
    unwritten.add(drawn.out / "test_set_visualization_grid_300dpi.jpg")
    sizes = {drawn.out / "multi_plane" / f"{CUBE}.png": (9, 10)}  # inches
    sizes |= {drawn.out / "agreement.jpg": (10, 9), drawn.out / "training_curves.jpg": (13, 4)}
    assert {*drawn.out.rglob("*.png"), *drawn.out.glob("*.jpg")} == {*sizes, *unwritten}
    for path, inches in sizes.items():
        picture = Image.open(path)
        assert picture.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.01)  # PNG counts per metre
        assert picture.size == pytest.approx([300 * side for side in inches], abs=1)
    assert len(drawn.figures) == 12 + 3


def find_boxes(pixels, colour):
    """Return the boxes (slices of rows and columns) that a colour fills, letters apart."""
    there = (abs(pixels.astype(int) - COLOURS[colour]) <= 1).all(-1)
    boxes = ndimage.find_objects(ndimage.label(there)[0])
    return [box for box in boxes if min(side.stop - side.start for side in box) > 50]


def test_planes_show_ground_truth_and_prediction_in_colour_place_side_and_proportion(drawn):
    # Colours: the scan's 1, mixed with 80 % of red (1, 0.15, 0.1) or green (0.1, 0.9, 0.2):
    # 0.2 + 0.8 * 0.15 = 0.32 and 0.2 + 0.8 * 0.1 = 0.28 of 255 are 82 and 71.
    pixels = np.asarray(Image.open(drawn.out / "multi_plane" / f"{CUBE}.png").convert("RGB"))
    plain, beside, over = (pixels[:, 900 * n : 900 * (n + 1)] for n in range(3))
    assert not [b for p in (plain, over) for b in find_boxes(p, "red")]
    assert not [b for p in (plain, beside) for b in find_boxes(p, "green")]
    assert len(find_boxes(plain, "white")) == len(find_boxes(over, "green")) == 3
    assert not find_boxes(over, "white")  # all of the head is predicted
    heads, labels = find_boxes(beside, "white"), find_boxes(beside, "red")
    assert len(heads) == len(labels) == 3
    for (rows, columns), (red_rows, red_columns) in zip(heads, labels, strict=True):
        mm = (columns.stop - columns.start) / 20
        assert (rows.stop - rows.start) / mm == pytest.approx(20, rel=0.02)  # cubes are squares
        for red, head in ((red_rows, rows), (red_columns, columns)):
            # 6 mm wide, 2 mm from the right, front and top, which are at the left and the top.
            assert (red.stop - red.start) / mm == pytest.approx(6, abs=0.3)
            assert (red.start - head.start) / mm == pytest.approx(2, abs=0.3)


def test_figures_name_sides_slices_scores_and_grids_and_show_worst_to_best(drawn):
    (case,) = (figure for figure in drawn.figures if figure.title.startswith(CUBE))
    # 6 x 6 x 3 voxels of 2 mm3 are 108; the box of the head, two voxels wider on all sides, has
    # 24 x 24 x 14 = 8064. Dice 216 / 8172, IoU and precision 108 / 8064; 0.216 and 16.128 ml.
    for words in (
        *("sub-04   Dice 0.026   IoU 0.013   precision 0.013   recall 1.000", "heads"),
        "native grid, 1 x 1 x 2 mm; the ground truth taken to the working grid and back: Dice 1.0",
        "Dice 0.026 on the working grid, RAS, 1 x 1 x 2 mm",
        "1 PVS, 0.22 ml in the ground truth; 1 PVS, 16.13 ml predicted",
    ):
        assert words in case.title.replace("\n", " ")
    titles = [panel.title for panel in case.panels]
    assert titles[1:3] == ["ground truth, 36 voxels", "prediction, 576 voxels"]
    # Slices from 1 on: the top of slices 10 to 12 of three equal ones wins by being first, 10.
    assert titles[0] == "axial, slice 11 of 18"
    assert [panel.texts for panel in case.panels] == 6 * [["R", "L"]] + 3 * [["A", "P"]]
    # The ten of the overview, 11/9 = 1.22 places apart: 0, 1.22, 2.44, 3.67, 4.89, 6.11, 7.33, ..
    name_of, overview = {width: name for name, width in WIDTHS.items()}, drawn.figures[-3]
    widths = [1 + place for place in (0, 1, 2, 4, 5, 6, 7, 9, 10, 11)]
    firsts = [panel.title.split(",")[0] for panel in overview.panels[::3]]
    assert firsts == [name_of[width] for width in widths]
    dices = [2 * 18 * width / (18 * width + 8064) for width in widths]
    assert [p.title for p in overview.panels[2::3]] == [f"prediction, Dice {d:.3f}" for d in dices]
    assert overview.title == "heads\n10 of 12 test cases, worst to best; native grid"


def test_agreement_figure_shows_points_identity_bias_and_limits(drawn):
    figure = drawn.figures[-2]
    assert figure.title == "heads\n12 test cases, native grid"
    # The number is always 1: neither correlation is defined.
    titles = [panel.title for panel in figure.panels[::2]]
    assert titles == ["Number of PVS", "Volume of PVS, concordance 0.000"]
    scatter, bland = figure.panels[2:]
    assert scatter.axes == ("ground truth, ml", "prediction, ml")
    assert bland.axes == ("mean of both, ml", "prediction - ground truth, ml")
    true, found = np.array([0.036 * width for _, width in sorted(WIDTHS.items())]), 16.128
    np.testing.assert_allclose(scatter.lines[0], [[0, 0], [1.05 * found, 1.05 * found]])
    np.testing.assert_allclose(scatter.lines[1], np.column_stack([true, 12 * [found]]))
    zero, points, bias, low, high = (line[:, 1] for line in bland.lines)
    np.testing.assert_allclose(points, found - true)
    # Errors from 16.128 - 0.036 to 16.128 - 0.432: mean 15.894; n equal steps have the variance
    # (n + 1) n / 12, 13, SD 3.606 * 0.036 = 0.1298; 1.96 of it are 0.254.
    reach = 1.96 * 13**0.5 * 0.036
    heights = [line[0] for line in (zero, bias, low, high)]
    assert heights == pytest.approx([0, 15.894, 15.894 - reach, 15.894 + reach])
    assert "bias 15.89, limits of agreement 15.64 to 16.15" in ", ".join(bland.legend)


def test_training_curves_leave_out_epochs_without_validation(drawn):
    losses, dices, rates = drawn.figures[-1].panels
    history = json.loads(train_pvs.Run(drawn.out).history.read_text())
    assert [row["val_dice"] is not None for row in history] == [True, False, True]
    for panel, keys in ((losses, ("train_loss", "val_loss")), (dices, ("train_dice", "val_dice"))):
        for line, key in zip(panel.lines, keys, strict=True):
            known = [[row["epoch"], row[key]] for row in history if row[key] is not None]
            np.testing.assert_allclose(line, known)
        assert panel.legend == ["training patches", "validation volumes"]
    np.testing.assert_allclose(rates.lines[0], [[n, 1e-9] for n in (1, 2, 3)])
