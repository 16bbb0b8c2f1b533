"""The one exception class of this package, and what turns other errors into it."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["FAILURES", "LoftUpError", "one_line", "suggest", "translate"]

# What a user's files, names and machine can cause: LoftUpError is a ValueError, torch's out-of-memory a RuntimeError.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


class LoftUpError(ValueError):
    """A name, file, repository or model that loftup cannot use; the text says got, expected, remedy.

    Wrong arguments (shapes, dtypes) raise plain ``ValueError`` or ``TypeError``.
    """


@contextlib.contextmanager
def translate(
    kinds: type[Exception] | tuple[type[Exception], ...],
    text: "str | Callable[[Any], str]",
    into: type[Exception] = LoftUpError,
) -> Iterator[None]:
    """Raise a LoftUpError, or ``into``, in place of errors of these kinds; ``text`` may be a function of the error."""
    try:
        yield
    except kinds as error:
        raise into(text if isinstance(text, str) else text(error)) from error


def one_line(error: BaseException | str) -> str:
    """An error's text on a single line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def suggest(name: str, choices: Iterable[str], most: int = 4, cutoff: float = 0.6) -> str:
    """A question for the choices that are most like a name, with a space behind it; "" where none is."""
    near = difflib.get_close_matches(name, list(choices), most, cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
