"""CPU attention against its definition."""

import pytest
import torch

from loftup.ops.cpu import attend, linear, padded_width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1369])
@pytest.mark.parametrize("depth", [11, 101, 133])
@pytest.mark.parametrize("pixels", [1, 63, 5000])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, tokens, depth, pixels):
    heads = 2
    q = torch.randn(pixels, heads * depth).to(dtype)
    k, v = torch.randn(2, heads, tokens, depth).to(dtype)
    q = q * torch.tensor(depth**-0.5, dtype=dtype)

    def plain(q, k, v):
        split = q.unflatten(1, (heads, depth)).transpose(0, 1)
        return (torch.softmax(split @ k.mT, -1) @ v).transpose(0, 1).flatten(1)

    expected = plain(q.double(), k.double(), v.double())
    error = (attend(q, k, v).double() - expected).abs()
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
    assert padded_width(101, torch.float32) == 104
    assert padded_width(104, torch.float32) == 104
    assert padded_width(101, torch.bfloat16) == 101
