"""Where results go: heads applied on the way."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Head", "apply_head"]

Head = Callable[[Tensor], Tensor]


def apply_head(head: Head, features: Tensor) -> Tensor:
    """Apply a pointwise head to (B, C, n, m); returns (B, K, n, m) or (B, n, m).

    Raises:
        ValueError: the head returns another shape.
    """
    if isinstance(head, nn.Linear):
        return head(features.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
    made = head(features)
    batch, _, rows, columns = features.shape
    shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
    if not isinstance(made, Tensor) or shape not in ((batch, rows, columns), (batch, *shape[1:2], rows, columns)):
        raise ValueError(
            f"head must be pointwise: given {tuple(features.shape)} it must return ({batch}, K, {rows}, {columns}) or "
            f"({batch}, {rows}, {columns}), got {shape}"
        )
    return made
