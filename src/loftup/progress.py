"""Progress of long work: a bar on a terminal, a line every half minute elsewhere, such as in a log file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["readable", "tell", "track"]

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines


def track(
    items: Iterable[T],
    caption: str,
    total: int | None = None,
    *,
    unit: str = "",
    leave: bool = True,
    size: Callable[[T], int] = lambda item: 1,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Go through items and show on stderr how far that is.

    Args:
        items: to go through.
        caption: in front of the bar, and of every line.
        total: how many there are; None where nobody knows.
        unit: what they are called.
        leave: leave the full bar on the terminal.
        size: how many units an item is, where ``total`` counts units.
        clock: gives seconds.
    """
    if sys.stderr.isatty():
        from tqdm.auto import tqdm

        with tqdm(None, caption, total, leave, unit=unit or "it") as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    start = last = clock()
    count = 0
    for item in items:
        if count and (now := clock()) - last >= EVERY:
            last, rate = now, count / (now - start)
            done = (f"{count} {unit}" if total is None else f"{count} of {total} {unit}").strip()
            left = "" if total is None else f", {(total - count) / rate / 60:.0f} min left"
            print(f"{caption}: {done}, {rate:.3g} a second{left}", file=sys.stderr, flush=True)
        yield item
        count += size(item)


def readable(count: float) -> str:
    """A number of bytes in words."""
    unit, name = next(each for each in ((1e12, "TB"), (1e9, "GB"), (0.0, "MB")) if count >= each[0])
    return f"{count / (unit or 1e6):.1f} {name}"


def tell(text: str) -> None:
    """Print a line on stderr, above the bar if there is one."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)
