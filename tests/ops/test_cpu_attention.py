"""CPU attention against its definition."""

import pytest
import torch

from loftup.ops.cpu import attend


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
