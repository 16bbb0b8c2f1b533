"""Files: written whole or not at all, told from others of their name and from a user's own; folders for one run."""

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import LoftUpError
from .version import __version__

__all__ = [
    "MADE_BY",
    "alone_in",
    "check_regular",
    "content_of",
    "expect_file",
    "made_here",
    "refuse_others",
    "stamp",
    "sweep",
    "write_atomically",
]

MADE_BY = f"Made by loftup {__version__}"  # in pictures, as EXIF's Software, and in texts
# The first or last 4096 bytes of all that loftup writes under a name that a user chose hold one of these.
MARKS = re.compile(
    rb"Made by loftup \d"
    rb'|"made_by": ?"loftup \d'  # masks
    rb'|"loftup_(version|config)":|"library_name": ?"loftup"'  # features, weights and their config
    rb'|"environment": \{\s*"loftup": "'  # results
    rb"|\A---\nlibrary_name: loftup\n"  # model cards
    rb"|\Atask,dataset,backbone,layer,upsampler,metric,"
    rb"|\Aquery,rank,image,score,left,"
    rb"|\Asource_x,source_y,target_x,target_y,similarity,mutual\r?\n"  # matches
)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of network file systems that have none
PREFIX = ".loftup."  # of temporary files, the lock and its owner: short, as a name may have 255 bytes


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent: to a temporary name beside it, synced, then renamed.

    A missing folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}")
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


def sweep(folder: Path, older: float = 0.0) -> None:
    """Remove what killed runs left half-written in a folder; only files ``older`` seconds old, for others may write."""
    for path in folder.glob(PREFIX + "[0-9a-f]" * 16):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


@contextlib.contextmanager
def alone_in(folder: Path, inside: Iterable[str] = ()) -> Iterator[None]:
    """Hold a folder, made where it is missing, for this process alone, and sweep it and the folders ``inside``.

    The system gives the lock back when its process dies. A folder that was made and stays empty is removed. Where the
    file system has no locks, a warning says so.

    Raises:
        LoftUpError: another process holds it; the text names the process and its host.
        OSError: the folder cannot be made or written to.
    """
    import filelock

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file, owner = folder / f"{PREFIX}lock", folder / f"{PREFIX}owner"
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        who = "another process"
        with contextlib.suppress(OSError):
            who = owner.read_text("utf-8") or who
        remedy = "wait until it ends, or write to another folder"
        raise LoftUpError(f"{who} is writing to the folder {folder}, expected this one alone; {remedy}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = f"the file system of {folder} has no locks ({error.strerror})"
        warnings.warn(f"{reason}; see to it that no other process writes there", stacklevel=3)
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        for each in (folder, *(folder / name for name in inside)):
            sweep(each)
        yield
    finally:
        for each in (owner, file):
            with contextlib.suppress(OSError):
                each.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            if made:
                folder.rmdir()


def made_here(path: Path) -> bool:
    """Tell whether a file holds the mark of what loftup writes."""
    try:
        check_regular(path)
        with path.open("rb") as stream:
            head = stream.read(4096)
            stream.seek(max(0, path.stat().st_size - 4096))
            return bool(MARKS.search(head) or MARKS.search(stream.read(4096)))
    except OSError:
        return False


def refuse_others(paths: Iterable[Path]) -> None:
    """Raise LoftUpError if one of these exists and was not made by loftup: what is the user's stays."""
    for path in paths:
        if os.path.lexists(path) and not made_here(path):
            raise LoftUpError(
                f"{path} exists and was not made by loftup, which replaces only its own files; move it away, or write "
                "to another place"
            )


def check_regular(path: "str | os.PathLike[str]") -> None:
    """Raise OSError unless the file is there and a plain one; reading a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.fspath(path)} is no regular file but a folder, pipe or device")


def stamp(file: Path) -> str:
    """Size and time of a file, which change with its content."""
    status = file.stat()
    return f"{status.st_size}@{status.st_mtime_ns}"


def expect_file(file: Path, content: str) -> Path:
    """The file, or LoftUpError if there is none."""
    if not file.is_file():
        raise LoftUpError(f"expected {content} at {file}, found {content_of(file)}")
    return file


def content_of(path: Path) -> str:
    """Say what a path holds in place of what was expected there."""
    if path.exists():
        return "a file" if path.is_file() else "a folder"
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    inside = sorted(child.name for child in parent.iterdir())[:6]
    return f"nothing; {parent} holds {', '.join(inside) or 'nothing'}"
