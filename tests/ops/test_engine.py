"""The CUDA engine, in Triton's interpreter or on a GPU, against the untiled computation."""

import copy

import pytest
import torch
from material import LEARNABLE, SINE, inputs, randomised
from torch import nn

from loftup.inference.choose import explain


@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_the_untiled_one(config, dtype, device):
    up = randomised(config).to(device)
    features, image = (tensor.to(device) for tensor in inputs(batch=2, size=(11, 14)))
    half = copy.deepcopy(up).to(dtype)
    with torch.no_grad():
        wide = copy.deepcopy(half).double()
        exact = wide.upsampler(wide.channelnorm(features.to(dtype).double()), image)
        naive = half.upsampler(half.channelnorm(features.to(dtype)).to(dtype), image)
        ours = half(features.to(dtype), image, backend="triton")
    assert ours.dtype == dtype
    error, allowed = (ours.double() - exact).abs(), (naive.double() - exact).abs()
    assert error.mean() <= 2 * allowed.mean() + 1e-6
    assert error.max() <= 2 * allowed.max() + 1e-5


def test_heads_points_and_other_outputs(device):
    up = randomised(SINE).to(device)
    features, image = (tensor.to(device) for tensor in inputs(size=(9, 10)))
    head = nn.Conv2d(24, 3, 1).to(device)
    points = torch.tensor([[[0.0, 0.0], [9.0, 8.0], [4.0, 3.0]]], device=device)
    with torch.inference_mode():
        dense = up(features, image, backend="triton")
        torch.testing.assert_close(up(features, image, head=head, backend="triton"), head(dense), atol=1e-4, rtol=1e-4)
        wide = torch.empty(dense.shape, dtype=torch.float64)
        torch.testing.assert_close(
            up(features, image, out=wide, backend="triton"), dense.double().cpu(), atol=1e-5, rtol=0
        )
        at = up.at(features, image, points, backend="triton")
    expected = torch.stack([dense[0, :, 0, 0], dense[0, :, 8, 9], dense[0, :, 3, 4]])[None]
    torch.testing.assert_close(at, expected, atol=1e-4, rtol=1e-4)


def test_it_runs_only_if_named(device):
    up = randomised(SINE).to(device)
    assert explain(up).backend != "triton"
    assert explain(up, backend="triton").backend == "triton"
