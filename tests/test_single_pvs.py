"""The tables of single PVS, the rating of the busiest section, the scores of tubes."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sklearn.metrics import average_precision_score

import train_pvs

TURN = Rotation.from_euler("xyz", (20, -10, 30), degrees=True).as_matrix()
GRIDS = {"RAS": np.diag([0.5, 0.7, 1, 1]), "LAS": np.diag([-0.5, 0.7, 1, 1])}  # mm
GRIDS["oblique"] = nib.affines.from_matvec(TURN @ GRIDS["RAS"][:3, :3], (7, 8, 9))


def measure(mask, affine):
    return train_pvs.measure_components(train_pvs.number_components(mask), affine)


@pytest.mark.parametrize("grid", GRIDS)
def test_rod_has_its_length_width_and_direction_in_any_grid(grid):
    direction = np.array([np.sin(np.pi / 6), 0, np.cos(np.pi / 6)])  # 30 degrees from upwards
    # All voxels with their centres in a rod of 14 x 2.5 mm about the middle of the volume.
    indices = np.indices((50, 50, 50)).reshape(3, -1).T
    places = nib.affines.apply_affine(GRIDS[grid], indices - 24.5) - GRIDS[grid][:3, 3]
    along = places @ direction
    away = np.linalg.norm(places - along[:, None] * direction, axis=1)
    rod = ((abs(along) <= 14 / 2) & (away <= 2.5 / 2)).reshape(50, 50, 50)
    (row,) = measure(rod, GRIDS[grid])
    assert (row["length_mm"], row["width_mm"]) == pytest.approx((14, 2.5), rel=0.1)
    assert row["volume_mm3"] == pytest.approx(rod.sum() * 0.35, rel=1e-4)
    found = [row[f"orientation_{axis}"] for axis in "xyz"]
    assert np.dot(found, direction) > np.cos(np.radians(3))
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-4)
    # A rod of length L and diameter D has the variances L^2 / 12 and D^2 / 16.
    assert row["linearity"] == pytest.approx(1 - 12 * 2.5**2 / (16 * 14**2), abs=0.01)
    centre = nib.affines.apply_affine(GRIDS[grid], np.argwhere(rod)).mean(0)
    assert [row[f"{axis}_mm"] for axis in "xyz"] == pytest.approx(centre, rel=1e-4)


def test_pvs_of_a_voxel_a_line_a_plane_and_a_ball_have_defined_values():
    cube, affine = np.zeros((9, 9, 9), bool), np.diag([0.8, 0.8, 0.8, 1])
    shapes = {name: cube.copy() for name in ("voxel", "line", "plane", "ball")}
    shapes["voxel"][4, 4, 4] = shapes["line"][1:8, 4, 4] = shapes["plane"][1:8, 1:8, 4] = True
    shapes["ball"] = ((np.indices(cube.shape) - 4) ** 2).sum(0) <= 16
    rows = {name: measure(mask, affine)[0] for name, mask in shapes.items()}
    # A ball of diameter D has the variance D^2 / 20. Boxes of n voxels have the length 0.8 n; the
    # cylinder of a voxel is 2 * 0.8 / sqrt(pi) wide.
    lengths = {"voxel": 0.8, "line": 5.6, "plane": 5.6, "ball": 4.9}
    assert {n: row["length_mm"] for n, row in rows.items()} == pytest.approx(lengths, abs=0.06)
    assert rows["voxel"]["width_mm"] == pytest.approx(1.6 / np.pi**0.5, rel=1e-4)
    flat = {name: row["linearity"] for name, row in rows.items()}
    assert flat == {"voxel": 0, "line": pytest.approx(1 - 1 / 49, abs=1e-4), "plane": 0, "ball": 0}
    assert [row["orientation_x"] for row in rows.values()] == [None, 1, None, None]
    assert measure(cube, affine) == []
    assert measure(shapes["voxel"], np.diag([0.9, 0.9, 3, 1]))[0]["orientation_z"] is None


def test_pvs_are_numbered_by_size_and_matched_by_their_best_counterpart():
    label, pred = np.zeros((2, 10, 6, 6), bool)
    label[1:7, 1, 1] = label[1, 4, 4] = True  # 6 voxels and 1
    pred[0:3, 1, 1] = pred[4:6, 1, 1] = pred[8, 4, 4] = pred[9, 5, 5] = True  # 3, 2 and 2
    true, found = map(train_pvs.number_components, (label, pred))
    sizes = [np.bincount(numbers.ravel())[1:].tolist() for numbers in (true, found)]
    assert sizes == [[6, 1], [3, 2, 2]]
    assert found.dtype == np.uint16
    prob = np.where(np.indices(label.shape)[0] == 0, 0.9, 0.6)
    rows = train_pvs.measure_components(found, np.eye(4), prob, true)
    # 2 of 3 voxels lie in the first one: 2 / (3 + 6 - 2); then 2 / 6.
    assert [row["iou"] for row in rows] == pytest.approx([2 / 7, 1 / 3, 0], abs=1e-5)
    assert [row["matched"] for row in rows] == [True, True, False]
    assert rows[0]["mean_probability"] == pytest.approx(0.7)
    rows = train_pvs.measure_components(true, np.eye(4), other=found)
    assert [row["iou"] for row in rows] == pytest.approx([1 / 3, 0], abs=1e-5)
    assert [row["mean_probability"] for row in rows] == [None, None]


def test_busiest_section_is_of_one_hemisphere_and_sides_change_names_only():
    mask = np.zeros((20, 30, 8), bool)
    mask[2:18:2, 5, 3] = True  # 4 on either side of the middle, x = 9.5
    mask[2:9:2, 9, 3] = mask[3, 9:25:3, 6] = True  # 4 more on the left; a section of 6
    mask[1, 10, 3] = True  # touches one of them at a corner
    affine = np.diag([0.8, 0.8, 2, 1])
    middle = nib.affines.apply_affine(affine, (9.5, 0, 0))
    assert train_pvs.rate_busiest_section(mask, affine, middle) == (8, 1, "left", 6.0)
    assert train_pvs.rate_busiest_section(mask[::-1], affine, middle) == (8, 1, "right", 6.0)
    turned = nib.affines.from_matvec(np.diag([-0.8, 0.8, 2]), (0.8 * 19, 0, 0))
    assert train_pvs.rate_busiest_section(mask[::-1], turned, middle) == (8, 1, "left", 6.0)
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):  # of each way to store it
            turn = np.stack([axes, flips], 1)
            stored = nib.apply_orientation(mask, turn)
            own = affine @ nib.orientations.inv_ornt_aff(turn, mask.shape)
            assert train_pvs.rate_busiest_section(stored, own, middle) == (8, 1, "left", 6.0)
    odd, halfway = np.zeros((21, 5, 5), bool), nib.affines.apply_affine(affine, (10, 0, 0))
    odd[10, 2, 2] = True  # on the midline
    assert train_pvs.rate_busiest_section(odd, affine, halfway)[2] == "left"
    assert train_pvs.rate_busiest_section(0 * mask, affine, middle) == (0, 0, "n/a", None)
    for count, grade in {1: 1, 10: 1, 11: 2, 20: 2, 21: 3, 40: 3, 41: 4}.items():
        many = np.zeros((20, 100, 3), bool)
        many[2, : 2 * count : 2, 1] = True
        assert train_pvs.rate_busiest_section(many, affine, middle)[:2] == (count, grade)


def test_average_precision_is_scikit_learns_and_counts_ties_at_once():
    rng = np.random.default_rng(0)
    label = rng.random((20, 21, 22)) < 0.05
    prob = (rng.random(label.shape) * 0.5 + 0.3 * label).round(2).astype(np.float32)
    prob[:5] = 0  # beyond the working grid
    expected = average_precision_score(label.ravel(), prob.ravel())
    assert train_pvs.calculate_average_precision(prob, label) == pytest.approx(expected, abs=1e-9)
    assert train_pvs.calculate_average_precision(prob, label & False) is None
    assert train_pvs.calculate_average_precision(0 * prob, label) == pytest.approx(label.mean())


def test_centreline_dice_of_equal_disjoint_and_broken_tubes():
    tube = np.zeros((40, 12, 12), bool)
    tube[5:35, 5:8, 5:8] = True
    pairs = (tube, tube), (tube, np.roll(tube, 5, 1)), (tube, tube & False), 2 * [tube & False]
    assert [train_pvs.calculate_cldice(*pair) for pair in pairs] == [1, 0, 0, 1]
    wide = np.zeros((40, 40, 40), bool)
    wide[5:35, 5:35, 5:35] = True  # has no skeleton
    pairs = (wide, wide), (wide, np.roll(wide, 1)), (wide, wide & (np.arange(40) % 9 == 0))
    assert [train_pvs.calculate_cldice(*pair) for pair in pairs] == [1, 0, 0]
    broken = tube & ((np.arange(40) < 15) | (np.arange(40) >= 25))[:, None, None]
    # All of the broken one's centreline lies in the tube, 2/3 of the tube's in the broken one.
    expected = pytest.approx(2 * 2 / 3 / (1 + 2 / 3), abs=0.03)
    assert train_pvs.calculate_cldice(broken, tube) == expected


def test_participants_are_joined_by_id_and_session(tmp_path):
    (tmp_path / "participants.tsv").write_bytes(b"participant_id\tage\tname\r\nsub-1\t61\t\xe9\r\n")
    rows = [{"participant_id": f"sub-{n}", "name": "own"} for n in (1, 2)]
    joined = train_pvs.join_participants(rows, 2 * [str(tmp_path)])
    assert [[*row.values()][2:] for row in joined] == [["61", "\ufffd"], [None, None]]
    assert train_pvs.join_participants(rows, 2 * ["/nowhere"]) == rows
    # By session, where there are rows of sessions; of two rows that fit none is chosen.
    lines = ["participant_id\tsession_id\tage", "sub-1\tses-1\t50", "1\t2\t55", "B-2\t\t60"]
    lines += ["sub-3\t\t70", "sub-3\t\t71", "4\tn/a\t80"]
    (tmp_path / "participants.tsv").write_text("\n".join(lines))
    names = ("sub-4_ses-1", "sub-1_ses-1", "sub-1_ses-2", "sub-1", "sub-B2_ses-1", "sub-3")
    rows = [{"participant_id": name.split("_")[0], "name": name} for name in names]
    joined = train_pvs.join_participants(rows, 6 * [str(tmp_path)])
    assert [row["age"] for row in joined] == ["80", "50", "55", None, "60", None]
