"""The scores and the loss against scikit-learn and plain torch."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch.nn.functional import binary_cross_entropy

import train_pvs


@pytest.mark.parametrize("density", [0.002, 0.1, 0.9])
def test_scores_agree_with_scikit_learn(density):
    rng = np.random.default_rng(1)
    label = rng.random((12, 13, 14)) < density
    pred = np.where(rng.random(label.shape) < 0.3, rng.random(label.shape) < density, label)
    pair = label.ravel(), pred.ravel()
    assert train_pvs.calculate_metrics(pred, label) == pytest.approx(
        {
            "dice": f1_score(*pair),
            "iou": jaccard_score(*pair),
            "precision": precision_score(*pair),
            "recall": recall_score(*pair),
        }
    )


@pytest.mark.parametrize(
    ("pred", "label", "expected"),
    [
        # 1 hit, 3 found, 2 true: 2*1/(3+2), 1/(3+2-1), 1/3, 1/2
        ([1, 1, 1, 0], [1, 0, 0, 1], (2 / 5, 1 / 4, 1 / 3, 1 / 2)),
        # 2 hits, 2 found, 3 true: 2*2/(2+3), 2/(2+3-2), 2/2, 2/3
        ([0, 1, 1, 0], [0, 1, 1, 1], (4 / 5, 2 / 3, 1, 2 / 3)),
        ([1, 0, 1, 0], [1, 0, 1, 0], (1, 1, 1, 1)),
        ([1, 0, 0, 0], [0, 1, 0, 0], (0, 0, 0, 0)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (1, 1, 1, 1)),  # nothing there, nothing found
        ([0, 0, 0, 0], [0, 1, 0, 0], (0, 0, 0, 0)),  # missed
        ([0, 1, 0, 0], [0, 0, 0, 0], (0, 0, 0, 0)),  # invented
    ],
)
def test_scores_of_hand_worked_masks(pred, label, expected):
    scores = train_pvs.calculate_metrics(np.array(pred), np.array(label))
    assert scores == pytest.approx(
        dict(zip(("dice", "iou", "precision", "recall"), expected, strict=True))
    )


def test_scores_are_the_same_for_arrays_and_tensors():
    pred, label = np.array([1, 1, 1, 0], np.uint8), np.array([True, False, False, True])
    scores = train_pvs.calculate_metrics(pred, label)
    assert scores == train_pvs.calculate_metrics(torch.from_numpy(pred), torch.from_numpy(label))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5])
def test_loss_is_half_bce_and_half_dice_loss_over_the_whole_batch(density):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 1, 6, 7, 8, generator=generator)
    label = (torch.rand(logits.shape, generator=generator) < density).float()
    label[0] = 0  # a patch without PVS: a Dice for each patch would differ from one for the batch
    probability = torch.sigmoid(logits)
    overlap = 2 * (probability * label).sum() + 1
    dice_loss = 1 - overlap / (probability.sum() + label.sum() + 1)
    expected = 0.5 * binary_cross_entropy(probability, label) + 0.5 * dice_loss
    torch.testing.assert_close(train_pvs.loss_function(logits, label), expected)
