"""Progress bars of the tasks, on the terminal alone."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["bar"]

T = TypeVar("T")


def bar(items: Iterable[T], caption: str, total: int | None = None) -> Iterable[T]:
    """Go through items with a bar on stderr; none where stderr is no terminal."""
    return tqdm(items, caption, total, leave=False, disable=None)  # type: ignore[no-any-return]
