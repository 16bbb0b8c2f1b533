"""Attention by PyTorch's kernels, and the reference that the Triton kernels are compared with."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loftup.ops import reference
from loftup.ops.attention import cross_attention

Check = Callable[[Tensor, Tensor, Tensor], None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [11, 101, 133])
def test_it_errs_at_most_twice_as_much_as_the_reference(d: int, dtype: torch.dtype, check: Check) -> None:
    q, k, v = (torch.randn(2, rows, 4, d).to(dtype).transpose(1, 2) for rows in (63, 196, 196))
    truth = reference.cross_attention(q.double(), k.double(), v.double(), d**-0.5)
    check(cross_attention(q, k, v, d**-0.5), reference.cross_attention(q, k, v, d**-0.5), truth)


def test_reference_by_hand() -> None:
    # Scores 0 and ln 3 give the weights 1/4 and 3/4.
    q = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[0.0, 5.0], [math.log(3), 5.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[4.0, 0.0], [8.0, 4.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[7.0, 3.0]]]], dtype=torch.float64)
    torch.testing.assert_close(reference.cross_attention(q, k, v, 1.0), expected)
    torch.testing.assert_close(cross_attention(q, k, v, 1.0), expected)


@pytest.mark.parametrize(("batch", "pixels"), [(0, 5), (2, 0), (0, 0)])
def test_empty(batch: int, pixels: int) -> None:
    q, k = torch.zeros(batch, 2, pixels, 11), torch.zeros(batch, 2, 7, 11)
    assert cross_attention(q, k, k, 0.3).shape == (batch, 2, pixels, 11)
