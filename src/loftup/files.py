"""Files: written whole or not at all, and told from others of their name."""

import os
import secrets
from pathlib import Path

__all__ = ["stamp", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent: to a temporary name beside it, synced, then renamed.

    A missing folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not mkstemp, whose 0600 would hide a shared model from colleagues. O_BINARY is Windows' own.
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def stamp(file: Path) -> str:
    """Size and time of a file, which change with its content."""
    status = file.stat()
    return f"{status.st_size}@{status.st_mtime_ns}"
