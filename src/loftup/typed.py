"""Types of modules' calls for type checkers; torch declares them as anything."""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["as_in"]

F = TypeVar("F", bound=Callable[..., Any])


def as_in(forward: F) -> Callable[[Callable[..., Any]], F]:
    """Give a function the type of another.

    A plain ``__call__ = forward`` does for mypy, but pyright keeps to torch's declaration.
    """
    return lambda call: forward
