"""Which errors a command reports in one line instead of a traceback."""

__all__ = ["FAILURES", "one_line"]

# What a user's files, names and machine can cause: LoftUpError is a ValueError, torch's out-of-memory a RuntimeError.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def one_line(error: BaseException) -> str:
    """The error's text on a single line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
