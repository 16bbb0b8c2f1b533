"""CPU attention and layers against their definitions."""

import pytest
import torch

from loftup.ops.cpu import Direct, attend, linear, padded_width


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1369])
@pytest.mark.parametrize("depth", [11, 101, 133])
@pytest.mark.parametrize("pixels", [1, 63, 5000])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, fused, tokens, depth, pixels):
    heads = 2
    q = torch.randn(pixels, heads * depth).to(dtype)
    k, v = torch.randn(2, heads, tokens, depth).to(dtype)
    q = q * torch.tensor(depth**-0.5, dtype=dtype)

    def plain(q, k, v):
        split = q.unflatten(1, (heads, depth)).transpose(0, 1)
        return (torch.softmax(split @ k.mT, -1) @ v).transpose(0, 1).flatten(1)

    expected = plain(q.double(), k.double(), v.double())
    error = (attend(q, k, v, fused).double() - expected).abs()
    allowed = (plain(q, k, v).double() - expected).abs()
    assert error.mean() <= 2 * allowed.mean() + 1e-7
    assert error.max() <= 2 * allowed.max() + 1e-6


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_linear_equals_pytorchs_and_is_contiguous(rows):
    """Another layout would send attention behind it to a slow path."""
    x, weight, bias = torch.randn(rows, 404), torch.randn(416, 404), torch.randn(416)
    out = linear(x, weight, bias)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    assert out.is_contiguous()


def test_widths():
    assert padded_width(101, torch.float32, False) == 104
    assert padded_width(104, torch.float32, False) == 104
    assert padded_width(101, torch.bfloat16, False) == 101
    assert padded_width(101, torch.bfloat16, True) == 112


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_direct_convolution_of_rolling_rows(dtype):
    weight, bias = torch.randn(6, 5, 3, 3).to(dtype), torch.randn(6).to(dtype)
    x = torch.randn(6, 10, 5).to(dtype)
    y = torch.full((4, 12, 6), torch.nan, dtype=dtype)
    Direct(weight, bias)(x, y[:, 2:10], None)
    expected = torch.nn.functional.conv2d(x.double().permute(2, 0, 1), weight.double(), bias.double())
    torch.testing.assert_close(
        y[:, 2:10].double().permute(2, 0, 1), expected, atol=2e-5 if dtype == torch.float32 else 0.1, rtol=1e-2
    )
    assert y[:, :2].isnan().all()
    assert y[:, 10:].isnan().all()
