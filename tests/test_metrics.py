"""Scores and loss against hand-worked numbers and independent libraries."""

from itertools import product

import numpy as np
import pytest
import surface_distance
import torch
from scipy import ndimage
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch.nn.functional import binary_cross_entropy

import train_pvs


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    for density in (0.002, 0.1, 0.9):
        label = rng.random((12, 13, 14)) < density
        pred = np.where(rng.random(label.shape) < 0.3, rng.random(label.shape) < density, label)
        functions = {"dice": f1_score, "iou": jaccard_score}
        functions |= {"precision": precision_score, "recall": recall_score}
        expected = {name: f(label.ravel(), pred.ravel()) for name, f in functions.items()}
        scores = train_pvs.calculate_metrics(pred, label)
        assert scores == pytest.approx(expected)
        tensors = torch.from_numpy(pred.astype(np.uint8)), torch.from_numpy(label)
        assert train_pvs.calculate_metrics(*tensors) == scores
    for pair, value in (((label, label & False), 0), ((label & False, label), 0)):
        assert set(train_pvs.calculate_metrics(*pair).values()) == {value}
    assert set(train_pvs.calculate_metrics(*2 * [label & False]).values()) == {1}


def test_loss_is_half_bce_and_half_dice_loss_over_the_whole_batch():
    generator = torch.Generator().manual_seed(3)
    for density in (0.0, 0.01, 0.5):
        logits = 3 * torch.randn(3, 1, 6, 7, 8, generator=generator)
        label = (torch.rand(logits.shape, generator=generator) < density).float()
        label[0] = 0  # a patch without PVS: a Dice for each patch would differ from the batch's
        prob = torch.sigmoid(logits)
        dice_loss = 1 - (2 * (prob * label).sum() + 1) / (prob.sum() + label.sum() + 1)
        expected = 0.5 * binary_cross_entropy(prob, label) + 0.5 * dice_loss
        torch.testing.assert_close(train_pvs.loss_function(logits, label), expected)


def lesion_row(counts, any_overlap, iou):
    """Return the row of scores; of a rule: matched of both sides, sensitivity, precision, F1."""
    names = "matched_label matched_pred lesion_sensitivity lesion_precision lesion_f1".split()
    rules = [f"{name}_{rule}" for rule in ("any", "iou") for name in names]
    columns = ["count_label", "count_pred", *rules]
    return dict(zip(columns, (*counts, *any_overlap, *iou), strict=True))


def test_lesion_scores_of_hand_worked_masks():
    none, one = (0, 0, 0, 0, 0), (1, 1, 1, 1, 1)
    for label, pred, counts, any_overlap, iou in (
        # One found over two true: IoU 2/5 with each, so all three are matched.
        ("11.11", "11111", (2, 1), (2, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
        # 1 of 3 true, 1 of 2 found, IoU 1/3; F1 2 * 1/3 * 1/2 / (1/3 + 1/2) = 2/5
        ("111.1..1", "1....1..", (3, 2), (1, 1, 1 / 3, 1 / 2, 2 / 5), (1, 1, 1 / 3, 1 / 2, 2 / 5)),
        # IoU 1/10 is not above 0.1, 1/9 is
        ("1111111111", ".1........", (1, 1), one, none),
        ("111111111.", ".1........", (1, 1), one, one),
        # A blob over 6 small ones, IoU 1/11 with each. They cover 6/11 of it together, but the
        # best single counterpart decides.
        ("1.1.1.1.1.1", 11 * "1", (6, 1), (6, 1, 1, 1, 1), none),
        # The found one matches the second, IoU 3/5, not the first, IoU 1/15: sensitivity 1/2,
        # precision 1, F1 2 * 1/2 * 1 / (3/2) = 2/3
        (11 * "1" + ".111", 10 * "." + "11111", (2, 1), (2, 1, 1, 1, 1), (1, 1, 1 / 2, 1, 2 / 3)),
        ("11.1", "....", (2, 0), none, none),  # missed
        ("....", "1.1.", (0, 2), none, none),  # invented
        ("....", "....", (0, 0), (0, 0, 1, 1, 1), (0, 0, 1, 1, 1)),  # nothing there or found
    ):
        masks = (np.array([[list(text)]]) == "1" for text in (pred, label))  # a run of 1s is a PVS
        row = train_pvs.calculate_lesion_metrics(*masks)
        assert row == pytest.approx(lesion_row(counts, any_overlap, iou)), (label, pred)
    # Two voxels that share a corner are one PVS, a third in the next row but one another. Half of
    # the first is found: 1 of 2 true, IoU 1/2; F1 2 * 1/2 * 1 / (3/2) = 2/3
    label, pred = np.zeros((2, 4, 5, 4), bool)
    label[0, 0, 0] = label[1, 1, 1] = label[1, 3, 1] = pred[1, 1, 1] = True
    expected = lesion_row((2, 1), *2 * [(1, 1, 1 / 2, 1, 2 / 3)])
    assert train_pvs.calculate_lesion_metrics(pred, label) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:surface_distance.*")
def test_surface_dice_agrees_with_deepminds_package():
    spacings = (1, 1, 1), (0.8, 0.8, 0.8), (0.5, 0.9, 2.2)
    for spacing, (seed, margin) in product(spacings, ((0, 3), (1, 0), (2, 0))):
        # Two alike masks of smooth blobs, so many voxels away from the volume's edge.
        noise = np.random.default_rng(seed).normal(size=(2, 20, 22, 18))
        one, other = (ndimage.gaussian_filter(volume, 1.5) for volume in noise)
        inside = np.pad(np.ones(np.subtract(one.shape, 2 * margin), bool), margin)
        pred, label = (inside & (f > 1.3 * f.std()) for f in (one, 0.6 * one + 0.4 * other))
        assert label[[0, -1]].any() == pred[..., [0, -1]].any() == (margin == 0)
        row = train_pvs.calculate_boundary_metrics(pred, label, np.array(spacing))
        assert train_pvs.calculate_boundary_metrics(label, pred, spacing) == pytest.approx(row)
        distances = surface_distance.compute_surface_distances(label, pred, spacing)
        for name, tolerance in {"nsd_voxel": max(spacing), "nsd_1mm": 1}.items():
            # A hair more, as distances of just the tolerance count, whatever their rounding.
            nsd = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance + 1e-6)
            assert 0.2 < nsd < 0.99
            assert row[name] == pytest.approx(nsd, rel=1e-5)


def test_a_shift_of_one_voxel_is_within_the_tolerance_of_one_voxel():
    # Of the 56 surface voxels 16 in the face left behind and 4 in the middle of the face ahead lie
    # one voxel beside the other surface, the others on it: more than 5 %. The last side is 1 mm as
    # a rotated affine in float32 may give it: a little more than 1.
    label = np.zeros((12, 12, 12), bool)
    label[4:8, 4:8, 4:8] = True
    for axis, side in product(range(3), (0.3, 0.7, 0.8, np.float32(0.8), 1.0, 1.0000002)):
        moved, sides = np.roll(label, 1, axis), np.full(3, side, float)
        row = train_pvs.calculate_boundary_metrics(moved, label, sides)
        assert row.pop("hd95_mm") == pytest.approx(side)
        assert row == {"nsd_voxel": 1, "nsd_1mm": 1, "one_mask_empty": False}


def test_surfaces_of_a_missed_or_an_invented_pvs_are_worse_than_of_any_found_one():
    spacing, (empty, label, pred) = np.array([0.5, 1, 2]), np.zeros((3, 12, 8, 12), bool)
    # 6 x 8 x 24 mm: the diagonal is the root of 36 + 64 + 576 = 676, 26 mm
    worst = {"nsd_voxel": 0, "nsd_1mm": 0, "hd95_mm": 26, "one_mask_empty": True}
    label[0, 0, 0] = pred[-1, -1, -1] = True
    assert train_pvs.calculate_boundary_metrics(empty, label, spacing) == pytest.approx(worst)
    assert train_pvs.calculate_boundary_metrics(pred, empty, spacing) == pytest.approx(worst)
    # From corner to corner 11 x 0.5, 7 x 1 and 11 x 2 mm: the root of 30.25 + 49 + 484
    farthest = worst | {"hd95_mm": 563.25**0.5, "one_mask_empty": False}
    assert train_pvs.calculate_boundary_metrics(pred, label, spacing) == pytest.approx(farthest)
    row = train_pvs.calculate_boundary_metrics(empty, empty, spacing)
    assert row == {"nsd_voxel": 1, "nsd_1mm": 1, "hd95_mm": 0, "one_mask_empty": False}
