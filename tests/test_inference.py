"""Sliding-window prediction of whole volumes."""

import pytest
import torch
from torch import nn

import train_pvs


class Pointwise(nn.Module):
    """A model without context, so that windows and blending must not show in its output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[2:]))
        return self.weight * image - 5


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 16, 16), (17, 23, 9), (33, 16, 20)])
def test_blended_logits_of_any_shape_are_those_of_the_model(shape, tiny_config):
    model, image = Pointwise(), torch.rand(1, *shape)
    logits = train_pvs.predict_logits(model, image, tiny_config(AMP=False))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (10 * image - 5)[None], atol=1e-4, rtol=0)
    assert set(model.seen) == {(16, 16, 16)}  # windows of the patch's size, also if it is larger


def test_prediction_of_a_cached_half_precision_volume_is_float32(tiny_config):
    image = torch.rand(1, 9, 9, 9).half()
    logits = train_pvs.predict_logits(Pointwise(), image, tiny_config(AMP=False))
    torch.testing.assert_close(logits, (10 * image.float() - 5)[None], atol=1e-4, rtol=0)


def test_prediction_puts_the_model_into_evaluation_mode(tiny_config):
    model = train_pvs.build_model(tiny_config()).train()
    image = torch.rand(1, 16, 16, 20)
    first = train_pvs.predict_logits(model, image, tiny_config())
    assert not any(module.training for module in model.modules())
    # Random dropped paths or running statistics that move would change the second one.
    assert torch.equal(first, train_pvs.predict_logits(model, image, tiny_config()))
