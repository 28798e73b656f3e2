"""What the pictures show, and how they are stored."""

import json

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import train_pvs

SCORES = {"dice": 0.4, "iou": 0.25, "precision": 1 / 3, "recall": 0.5}


@pytest.fixture(autouse=True)
def all_figures_closed():
    """Fail where a figure stays open: hundreds of test cases would fill the memory."""
    yield
    assert plt.get_fignums() == []


@pytest.fixture
def cfg(tiny_config, tmp_path):
    description = {"Name": "Simulated heads of a test"}
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    return tiny_config(DATA_DIR=str(tmp_path))


def make_row(name="sub-007", **scores):
    native = {f"native_{key}": value for key, value in SCORES.items()}
    burden = {"count_label": 31, "count_pred": 27, "volume_ml_label": 1.5, "volume_ml_pred": 2.25}
    row = {"name": name, "subject": name, "dice": 0.6, "roundtrip_dice": 0.7}
    return row | native | burden | scores


def make_volumes(shape=(24, 24, 8)):
    """Return a grey image, with a box in its middle as the label, its corner as the prediction."""
    label, pred = np.zeros((2, *shape), bool)
    label[6:18, 6:18, 2:6] = True
    pred[6:10, 6:10, 2:4] = True
    return np.full(shape, 0.5, np.float32), {"ground truth": label, "prediction": pred}


def coloured(path):
    """Return where the pixels of a picture are red, and where they are green."""
    red, green, blue = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    return (red > 150) & (green < 120) & (blue < 120), (green > 150) & (red < 120) & (blue < 120)


def columns(mask):
    """Return the first and the last column of a picture with such a pixel, as fractions."""
    places = np.flatnonzero(mask.any(0))
    return places[0] / mask.shape[1], places[-1] / mask.shape[1]


@pytest.mark.parametrize(
    ("plane", "marker", "expected"),
    [
        # A RAS volume of 5 x 6 x 7 voxels. The marker is at its right, front or top end, else in
        # the middle; expected is (row, column) with row 0 at the bottom of the picture.
        ("axial", (4, 3, 3), (3, 0)),  # right: at the left of 5 columns
        ("axial", (2, 5, 3), (5, 2)),  # front: the highest of 6 rows
        ("coronal", (4, 3, 3), (3, 0)),
        ("coronal", (2, 3, 6), (6, 2)),  # top: the highest of 7 rows
        ("sagittal", (2, 5, 3), (3, 0)),  # front: at the left of 6 columns
        ("sagittal", (2, 3, 6), (6, 2)),
    ],
)
def test_slices_are_shown_as_radiologists_look_at_them(plane, marker, expected):
    volume, axis = np.zeros((5, 6, 7)), train_pvs.PLANES[plane]
    volume[marker] = 1
    shown = train_pvs.display_slice(volume, axis, marker[axis])
    assert np.argwhere(shown).tolist() == [list(expected)]


@pytest.mark.parametrize(
    ("plane", "sides"), [("axial", ["R", "L"]), ("coronal", ["R", "L"]), ("sagittal", ["A", "P"])]
)
def test_panels_name_the_sides_and_have_row_0_at_the_bottom(plane, sides):
    figure, axes = plt.subplots(1, 2)
    masks = {"prediction": np.zeros((4, 5), bool)}
    train_pvs.draw_row(axes, np.zeros((4, 5)), masks, ("scan", "found"), plane, (1, 1, 1))
    for ax, title in zip(axes, ("scan", "found"), strict=True):
        texts = sorted(ax.texts, key=lambda text: text.get_position()[0])
        assert [text.get_text() for text in texts] == sides
        assert ax.get_ylim() == (-0.5, 3.5)
        assert ax.get_title() == title
    plt.close(figure)


def test_slice_shown_has_most_labelled_voxels_else_most_predicted_else_is_the_middle():
    label, pred = np.zeros((2, 5, 6, 7), bool)
    assert train_pvs.busiest_slice([label, pred], 2) == 3
    assert train_pvs.busiest_slice([pred], 0) == 2
    pred[1, 2:5, 6] = True
    assert train_pvs.busiest_slice([label, pred], 2) == 6
    label[4, 4, 1] = label[:2, 3, 5] = True  # one voxel in slice 1, two in slice 5
    assert train_pvs.busiest_slice([label, pred], 2) == 5
    assert train_pvs.busiest_slice([label, pred], 1) == 3


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPL"])
def test_scans_are_turned_to_ras_and_their_contrast_fits_the_eye(axes):
    # Marked at the right end of the subject, in the middle of the other axes.
    ras = np.random.default_rng(0).normal(300, 50, (10, 12, 14))
    ras[9, 6, 7] = 2000
    affine = np.diag([1.0, 2, 3, 1])
    orient = nib.orientations.axcodes2ornt(axes)
    there = nib.orientations.ornt_transform(nib.io_orientation(affine), orient)
    scan = nib.Nifti1Image(ras, affine).as_reoriented(there)
    assert nib.aff2axcodes(scan.affine) == tuple(axes)
    shown = train_pvs.display_image(scan.get_fdata(), scan.affine)
    assert shown.shape == ras.shape
    assert (shown.min(), shown.max()) == (0, 1)
    assert shown[9, 6, 7] == 1
    assert np.corrcoef(shown[:9].ravel(), ras[:9].ravel())[0, 1] > 0.95
    assert train_pvs.ras_spacing(scan.affine) == [1, 2, 3]


def test_multi_plane_figure_has_300_dpi_and_its_colours_in_their_panels(tmp_path, cfg):
    path = tmp_path / "multi_plane" / "sub-007.png"
    train_pvs.draw_multi_plane(path, *make_volumes(), (1, 1, 1), "title")
    picture = Image.open(path)
    assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.01)  # PNG counts per metre
    assert picture.size == (2700, 3000)  # 9 x 10 inches
    assert picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)  # not transparent
    red, green = coloured(path)
    assert 1 / 3 < columns(red)[0] < columns(red)[1] < 2 / 3
    assert columns(green)[0] > 2 / 3


def test_voxels_that_are_not_cubes_are_drawn_in_their_true_proportions(tmp_path, cfg):
    # The label is 12 x 12 x 4 voxels of 1 x 1 x 3 mm, a cube: a square in all three planes.
    train_pvs.draw_multi_plane(tmp_path / "a.png", *make_volumes(), (1, 1, 3), "title")
    components, _ = ndimage.label(coloured(tmp_path / "a.png")[0])
    boxes = [[s.stop - s.start for s in box] for box in ndimage.find_objects(components)]
    boxes = [(high, wide) for high, wide in boxes if high > 100]
    assert len(boxes) == 3
    for high, wide in boxes:
        assert high == pytest.approx(wide, rel=0.02)


def test_figure_of_a_prediction_alone_has_two_columns(tmp_path):
    image, masks = make_volumes()
    path = tmp_path / "a.png"
    train_pvs.draw_multi_plane(path, image, {"prediction": masks["prediction"]}, (1, 1, 1), "title")
    assert Image.open(path).size == (1800, 3000)
    red, green = coloured(path)
    assert not red.any()
    assert columns(green)[0] > 1 / 2


def test_title_of_a_test_case_holds_subject_scores_burden_grids_and_origin(cfg):
    title = train_pvs.describe_scores(make_row(), np.diag([0.5, 0.5, 2, 1]), cfg)
    for words in (
        "sub-007",
        "Dice 0.400   IoU 0.250   precision 0.333   recall 0.500\nnative grid, 0.5 x 0.5 x 2 mm",
        "working grid and back: Dice 0.700",
        "Dice 0.600 on the working grid, RAS, 1 x 1 x 1 mm",
        "31 PVS, 1.50 ml in the ground truth; 27 PVS, 2.25 ml predicted",
        "Simulated heads of a test",
    ):
        assert words in title


def test_long_titles_are_broken_to_the_width_of_the_figure_and_no_mathtext(tmp_path):
    figure, ax = plt.subplots(figsize=(4, 3), layout="constrained")
    ax.set_axis_off()
    title = "native grid, 0.8 x 0.8 x 0.8 mm; predicted on the working grid\ncosts $\\frac$"
    train_pvs.write_figure(tmp_path / "figure.png", figure, title)
    lines = figure.get_suptitle().split("\n")
    assert max(map(len, lines)) <= 48
    assert " ".join(lines) == title.replace("\n", " ")
    ink = np.asarray(Image.open(tmp_path / "figure.png").convert("L")) < 128
    assert ink.any()
    assert not ink[:, :20].any()
    assert not ink[:, -20:].any()


def axial_slices():
    image, masks = make_volumes()
    return image[..., 2], {name: mask[..., 2] for name, mask in masks.items()}, (1, 1, 1), "slice 3"


def test_grid_of_one_test_case_has_300_dpi_and_its_colours_in_their_panels(tmp_path, cfg):
    path = tmp_path / "grid.jpg"
    train_pvs.draw_test_grid(path, [make_row()], [axial_slices()], cfg)
    picture = Image.open(path)
    assert (picture.format, picture.mode, picture.info["dpi"]) == ("JPEG", "RGB", (300, 300))
    assert picture.size[0] == 2700
    red, green = coloured(path)
    assert 1 / 3 < columns(red)[0] < columns(red)[1] < 2 / 3
    assert columns(green)[0] > 2 / 3


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [0, 1, 2]),
        (10, range(10)),
        # 10 places from 0 to 11, 11/9 = 1.22 apart: 0, 1.22, 2.44, 3.67, 4.89, 6.11, ...
        (12, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]),
    ],
)
def test_grid_shows_up_to_ten_cases_spread_from_worst_to_best_dice(
    count, expected, monkeypatch, cfg
):
    drawn, titles = [], []

    def write_figure(path, figure, title):
        titles.append((title, len(figure.axes)))
        plt.close(figure)

    monkeypatch.setattr(train_pvs, "draw_row", lambda *args: drawn.append(args[3]))
    monkeypatch.setattr(train_pvs, "write_figure", write_figure)
    ranks = np.random.default_rng(0).permutation(count).tolist()
    rows = [make_row(f"sub-{rank}", native_dice=rank / 20) for rank in ranks]
    train_pvs.draw_test_grid("grid.jpg", rows, count * [axial_slices()], cfg)
    assert [words[0] for words in drawn] == [f"sub-{rank}, slice 3" for rank in expected]
    assert [words[2] for words in drawn] == [
        f"prediction, Dice {rank / 20:.3f}" for rank in expected
    ]
    assert titles[0][1] == 3 * len(expected)
    assert f"{len(expected)} of {count} test cases" in titles[0][0]
    assert "Simulated heads of a test" in titles[0][0]


def make_history():
    keys = ("epoch", "train_loss", "train_dice", "val_loss", "val_dice", "lr")
    rows = (
        (1, 0.8, 0.0, 0.7, 0.1, 1e-3),
        (2, 0.6, 0.3, None, None, 1e-3),
        (3, 0.5, 0.4, 0.6, 0.2, 5e-4),
    )
    return [dict(zip(keys, row, strict=True)) for row in rows]


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_curves_are_a_300_dpi_picture(epochs, tmp_path, cfg):
    train_pvs.draw_training_curves(tmp_path / "curves.jpg", make_history()[:epochs], cfg)
    picture = Image.open(tmp_path / "curves.jpg")
    assert (picture.format, picture.mode, picture.info["dpi"]) == ("JPEG", "RGB", (300, 300))
    picture.load()  # whole


def test_training_curves_leave_out_epochs_without_validation(monkeypatch, cfg):
    lines = []

    def write_figure(path, figure, title):
        lines.extend(line.get_xydata().tolist() for ax in figure.axes for line in ax.lines)
        plt.close(figure)

    monkeypatch.setattr(train_pvs, "write_figure", write_figure)
    train_pvs.draw_training_curves("curves.jpg", make_history(), cfg)
    assert lines == [
        [[1, 0.8], [2, 0.6], [3, 0.5]],
        [[1, 0.7], [3, 0.6]],
        [[1, 0.0], [2, 0.3], [3, 0.4]],
        [[1, 0.1], [3, 0.2]],
        [[1, 1e-3], [2, 1e-3], [3, 5e-4]],
    ]


def test_learning_rates_are_labelled_in_plain_numbers(monkeypatch, cfg):
    """Dollars are not drawn as math text, since names may hold them."""
    labels = []

    def write_figure(path, figure, title):
        figure.canvas.draw()
        for minor in (False, True):
            labels.extend(text.get_text() for text in figure.axes[2].get_yticklabels(minor=minor))
        plt.close(figure)

    monkeypatch.setattr(train_pvs, "write_figure", write_figure)
    for history in (
        make_history(),
        make_history()[:1],
        [*make_history(), make_history()[-1] | {"lr": 1e-6}],
    ):
        train_pvs.draw_training_curves("curves.jpg", history, cfg)
        shown = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels if label]
        assert shown
        assert min(shown) > 0
        labels.clear()
