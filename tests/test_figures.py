"""What the pictures show, and how they are stored."""

import json
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from monai.data import MetaTensor
from PIL import Image

import train_pvs
from conftest import TINY, edited_copy, save_subject
from running import call
from test_evaluation import write_constant_network

# Stored with axes to the left, back and top, voxels of 1 x 1 x 2 mm.
AFFINE = np.diag([-1.0, -1, 2, 1])


def describe(figure):
    """Return a figure's title, and of each panel title, texts, legend, axes' names and points."""
    panels = []
    for ax in figure.axes:
        panel = {"title": ax.get_title(), "texts": [text.get_text() for text in ax.texts]}
        panel["legend"] = [t.get_text() for t in ax.get_legend().texts] if ax.get_legend() else []
        panel["axes"] = ax.get_xlabel(), ax.get_ylabel()
        panel["lines"] = [line.get_xydata() for line in ax.lines]
        panel["picture"] = ax.images[0].get_array() if ax.images else None
        assert all(image.origin == "lower" for image in ax.images)  # rows go up, as outlines do
        panel["extent"] = ax.images[0].get_extent() if ax.images else None
        panel["window"] = *ax.get_xlim(), *ax.get_ylim()
        panel["outlines"] = {to_hex(c.get_color()[0]): c.get_segments() for c in ax.collections}
        panels.append(SimpleNamespace(**panel))
    return SimpleNamespace(title=figure.get_suptitle(), panels=panels)


# Widths of the ground truth by name: worst to best is another order than that of the names.
WIDTHS = {f"sub-{5 * width % 13:02d}": width for width in range(1, 13)}
NAME = "heads of R&D, $x_$ and $"  # is no TeX
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
    description = folder / "heads" / "dataset_description.json"
    description.write_text(json.dumps({"Name": NAME}))
    split = {"train": ["sub-20"], "val": ["sub-21"], "test": list(WIDTHS)}
    (folder / "split.json").write_text(json.dumps(split))
    network = [*TINY, *"--pix-dim 1 1 2 --no-head-bias-log-odds".split()]
    write_constant_network(folder / "constant.pth", -5.0, network)
    argv = f"--data-dir {folder / 'heads'} --output-dir {folder / 'out'} --epochs 3 --val-every 3 "
    argv += f"--init-from {folder / 'constant.pth'} --split {folder / 'split.json'} --lr 1e-9 "
    argv += "--crops-per-volume 1 --threshold 0.001"

    def savefig(figure, *args, **settings):
        figures.append(describe(figure))
        if figures[-1].title.startswith((CUBE, NAME)) and len(figure.axes) < 30:
            save(figure, *args, **settings)

    plt.switch_backend("svg")  # a notebook's; neither import nor run change it, or the style
    before = plt.get_fignums(), {**plt.rcParams}
    edited_copy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        status, *_ = call(*network, *argv.split())
    assert (plt.get_fignums(), {**plt.rcParams}) == before  # a notebook's, and none that stay open
    return SimpleNamespace(status=status, out=folder / "out", figures=figures)


def test_run_that_learned_nothing_is_drawn_all_the_same_and_ends_with_1(drawn):
    assert drawn.status == 1
    unwritten = {drawn.out / "multi_plane" / f"{name}.png" for name in WIDTHS if name != CUBE}
    unwritten.add(drawn.out / "test_set_visualization_grid_300dpi.jpg")
    # Four panels of 3.2 inches, which the head's 24 mm fill; its height is 28 mm. Rows have 0.3
    # inches more for their titles, the figure 0.9.
    height = 3.2 * (24 + 28 + 28) / 24 + 3 * 0.3 + 0.9
    sizes = {drawn.out / "multi_plane" / f"{CUBE}.png": (12.8, height)}
    sizes |= {drawn.out / "agreement.jpg": (10, 9), drawn.out / "training_curves.jpg": (13, 4)}
    assert {*drawn.out.rglob("*.png"), *drawn.out.glob("*.jpg")} == {*sizes, *unwritten}
    for path, inches in sizes.items():
        picture = Image.open(path)
        assert picture.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.01)  # PNG counts per metre
        assert picture.size == pytest.approx([300 * side for side in inches], abs=1)
    assert len(drawn.figures) == 12 + 3


def bounds(segments):
    """Return left, right, bottom and top of outlines."""
    (left, bottom), (right, top) = np.min(segments, (0, 1)), np.max(segments, (0, 1))
    return left, right, bottom, top


def test_outlines_lie_at_the_voxels_borders_in_mm_at_the_right_place_and_side(drawn):
    (case,) = (figure for figure in drawn.figures if figure.title.startswith(CUBE))
    truth, prediction = "#d55e00", "#f0e442"
    for plain, outlined, kinds, magnified in zip(*[iter(case.panels)] * 4, strict=True):
        # The box of the head, two voxels wider on all sides: 24 x 24 mm, 28 mm high.
        _, width, _, height = plain.extent
        assert width == 24
        assert height in (24, 28)
        assert plain.outlines == kinds.outlines == {}
        assert bounds(outlined.outlines[prediction]) == (*plain.extent,)  # it is found everywhere
        # 6 mm wide, 2 + 2 mm from the right, front and top, which are at the left and the top.
        top = height - (2 if height == 24 else 4) - 2
        assert bounds(outlined.outlines[truth]) == (4, 10, top - 6, top)
        assert magnified.window[1] - magnified.window[0] == 40
        assert magnified.outlines.keys() == outlined.outlines.keys()
        found = np.array(to_rgb(train_pvs.KINDS["found"]))
        assert (kinds.picture == found).all()  # one PVS, which touches the true one


def test_found_missed_and_invented_pvs_are_told_apart_whole():
    true, pred = np.zeros((2, 9, 1, 1), np.uint8)
    true[:3, 0, 0], true[5, 0, 0] = 1, 2
    pred[2, 0, 0], pred[7:, 0, 0] = 2, 1
    kinds = train_pvs.sort_pvs(true, pred)[:, 0, 0]
    np.testing.assert_array_equal(kinds, [1, 1, 1, 0, 0, 2, 0, 3, 3])


@pytest.mark.parametrize("found", [True, False])
def test_scan_without_ground_truth_shows_pvs_or_says_there_are_none(tmp_path, monkeypatch, found):
    # Oblique, stored from front to back, left to right and top to bottom; 2 x 1 x 3 mm.
    affine = np.array([[0, 1, 0, 5.0], [-2, 0, 0.2, 7], [0, 0, -3, 400], [0, 0, 0, 1]])
    image, pred = np.zeros((2, 60, 100, 50), np.float32)
    image[2:-2, 2:-2, 2:-2] = 1
    pred[10:12, 20, 30] = found
    volumes = {"image": MetaTensor(image[None], torch.tensor(affine))}
    entry = train_pvs.to_working_grid(volumes, train_pvs.Config(PIX_DIM=(1, 1, 3)))
    figures, pvs = [], {"prediction": train_pvs.number_components(pred > 0)}
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    sections = train_pvs.cut_sections(image, affine, pvs, entry)
    train_pvs.draw_sections(tmp_path / "figure.png", sections, "title")
    panels = describe(figures[0]).panels
    told = "prediction: 1 PVS" if found else "prediction: no PVS"
    assert [panel.title for panel in panels[1::3]] == 3 * [told]
    # Of 50 sections from the top, 30 is 49 - 30 = 19 from below, its z 400 - 3 * 30 = 310 mm.
    # Without PVS: the head's top is section 2, or 47 from below; its box ends there or a
    # section higher, and 55 mm are 18.3 sections.
    places = re.fullmatch(r"axial (\d+) of 50, z = (\d+) mm", panels[0].title).groups()
    place, z = map(int, places)
    assert z == 400 - 3 * (50 - place)
    assert place == 20 if found else 47 - 19 <= place <= 49 - 17
    assert [p.texts[1:] for p in panels[::3]] == [[*"RLPA"], [*"RLIS"], [*"APIS"]]


def test_figures_name_sides_slices_scores_and_grids_and_show_worst_to_best(drawn):
    (case,) = (figure for figure in drawn.figures if figure.title.startswith(CUBE))
    # 6 x 6 x 3 voxels of 2 mm3 are 108; the box of the head, two voxels wider on all sides, has
    # 24 x 24 x 14 = 8064. Dice 216 / 8172, IoU and precision 108 / 8064; 0.216 and 16.128 ml.
    first, second = case.title.split("\n")
    told = "1 PVS, 0.216 ml in the ground truth; 1 PVS, 16.128 ml predicted"
    assert first == f"sub-04, {NAME}: {told}"
    assert second.startswith("Dice 0.026, IoU 0.013, precision 0.013, recall 1.000 on the native")
    assert second.endswith("grid, 1 x 1 x 2 mm; Dice 0.026 on the working grid, RAS, 1 x 1 x 2 mm")
    titles = [panel.title for panel in case.panels]
    # Slices from 1 on: the lowest of slices 10 to 12 of three equal ones wins by being first, 10.
    assert titles[:2] == ["axial 11 of 18, z = 20 mm", "ground truth: 1 PVS, prediction: 1 PVS"]
    assert titles[2:4] == ["1 found, 0 missed, 0 invented", "magnified"]
    assert [panel.texts[0] for panel in case.panels[:4]] == 3 * ["30 mm"] + ["10 mm"]
    bars = [np.ptp(panel.lines[0][:, 0]) for panel in case.panels[:4]]
    assert bars == pytest.approx([30, 30, 30, 10])
    # The ten of the overview, 11/9 = 1.22 places apart: 0, 1.22, 2.44, 3.67, 4.89, 6.11, 7.33, ..
    name_of, overview = {width: name for name, width in WIDTHS.items()}, drawn.figures[-3]
    widths = [1 + place for place in (0, 1, 2, 4, 5, 6, 7, 9, 10, 11)]
    dices = [2 * 18 * width / (18 * width + 8064) for width in widths]
    firsts = [f"{name_of[w]}, Dice {d:.3f}" for w, d in zip(widths, dices, strict=True)]
    assert [panel.title.split("\n")[0] for panel in overview.panels[::4]] == firsts
    told = "10 of 12 test cases, worst to best Dice of the native grid"
    assert overview.title == f"{NAME}\n{told}"


def test_agreement_figure_shows_points_identity_bias_and_limits(drawn):
    figure = drawn.figures[-2]
    assert figure.title == f"{NAME}\n12 test cases, native grid"
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
    assert "bias 15.894, limits of agreement 15.640 to 16.148" in ", ".join(bland.legend)


def test_training_curves_leave_out_epochs_without_validation(drawn):
    losses, dices, rates = drawn.figures[-1].panels
    history = json.loads(train_pvs.Run(drawn.out).history.read_text())
    assert [row["val_dice"] is not None for row in history] == [True, False, True]
    for panel, keys in ((losses, ("train_loss", "val_loss")), (dices, ("train_dice", "val_dice"))):
        for line, key in zip(panel.lines, keys, strict=False):
            known = [[row["epoch"], row[key]] for row in history if row[key] is not None]
            np.testing.assert_allclose(line, known)
        assert panel.legend[:2] == ["training patches", "validation volumes"]
    np.testing.assert_allclose(rates.lines[0], [[n, 1e-9] for n in (1, 2, 3)])
    best = max(history, key=lambda row: row["val_dice"] or 0)["epoch"]
    assert {panel.lines[-1][0, 0] for panel in (losses, dices, rates)} == {best}
