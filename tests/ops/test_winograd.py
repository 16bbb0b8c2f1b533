"""Winograd convolution against a direct one in float64."""

import pytest
import torch
import torch.nn.functional as F

from loftup.ops.winograd import Winograd, Workspace


def direct_convolution(image, weight, bias):
    """In channels-last layout, the faster one and the one that Winograd takes the place of."""
    last = torch.channels_last
    return F.conv2d(image.contiguous(memory_format=last), weight.float().contiguous(memory_format=last), bias.float())


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (43, 44), (203, 404)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (5, 2)])
def test_equals_the_direct_convolution(inputs, outputs, rows, columns):
    weight, bias = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
    x = torch.randn(4 * rows + 2, 4 * columns + 2, inputs)
    out = torch.full((4 * rows, 4 * columns + 3, outputs), torch.nan)[:, 1:-2]
    Winograd(weight, bias)(x, out, Workspace())
    image = x.movedim(-1, 0)[None]
    expected = F.conv2d(image.double(), weight, bias)[0].movedim(0, -1)
    assert (out - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_the_float32_error_at_full_width_is_close_to_the_direct_one():
    """Over many outputs, the mean error is at most twice the direct convolution's."""
    weight = torch.randn(404, 404, 3, 3, dtype=torch.float64) / 60
    bias = torch.zeros(404, dtype=torch.float64)
    x = torch.randn(26, 26, 404).relu()
    out = torch.empty(24, 24, 404)
    Winograd(weight, bias)(x, out, Workspace())
    image = x.movedim(-1, 0)[None]
    expected = F.conv2d(image.double(), weight)[0].movedim(0, -1)
    direct = direct_convolution(image, weight, bias)[0].movedim(0, -1)
    assert (out - expected).square().mean().sqrt() <= 2 * (direct - expected).square().mean().sqrt()


def test_scratch_is_reused_and_grows():
    space = Workspace()
    first = space.take("x", 2, 3)
    assert space.take("x", 3).data_ptr() == first.data_ptr()
    assert space.take("x", 100).shape == (100,)
    assert space.take("y", 1).data_ptr() != space.take("x", 1).data_ptr()
