"""Total variation of the output."""

from torch import Tensor

from .maps import widened

__all__ = ["total_variation"]


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours of (B, C, H, W); 0 for a 1 x 1 map."""
    x = widened(x)
    pairs = ((x[..., 1:, :], x[..., :-1, :]), (x[..., 1:], x[..., :-1]))
    return sum(((a - b).abs().mean() for a, b in pairs if a.numel()), start=x.new_zeros(()))
