"""Files by path or URL: local ones directly, those of object storage and of the web through fsspec."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import translate
from ..files import write_atomically

__all__ = ["absolute", "exists", "find", "is_remote", "join", "names", "open_binary", "read", "remove", "write"]

T = TypeVar("T")
TRIES, PAUSE = 4, 0.5  # of remote reads; seconds before the second try, doubled for each one after


def is_remote(url: str) -> bool:
    """Tell whether this is a URL such as s3://bucket/folder; file:// is local."""
    return "://" in url and not url.startswith("file://")


def local(url: str) -> Path:
    """The path of a local file."""
    return Path(url.removeprefix("file://")).expanduser()


def join(folder: str, *parts: str) -> str:
    """A file below a folder."""
    return "/".join([folder.rstrip("/"), *parts]) if is_remote(folder) else str(local(folder).joinpath(*parts))


def _remote(url: str) -> tuple[Any, str]:
    with translate(ImportError, lambda error: f'{url} needs fsspec and a client: pip install "loftup[scale]"; {error}'):
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    return system, path


def _again(action: Callable[[], T], url: str, verb: str = "read") -> T:
    """The result of an action that fails now and then; OSError when it fails for good, at once for a missing file."""
    for attempt in range(TRIES):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # clients raise errors of their own
            if attempt == TRIES - 1:
                raise OSError(f"cannot {verb} {url}: {type(error).__name__}: {error}") from error
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def read(url: str, start: int = 0, length: int = -1) -> bytes:
    """Bytes of a file, all or ``length`` of them from ``start``; OSError if they cannot be had."""
    if is_remote(url):
        system, path = _remote(url)
        stop = None if length < 0 else start + length
        content: bytes = _again(lambda: system.cat_file(path, start=start or None, end=stop), url)
    else:
        with local(url).open("rb") as stream:
            stream.seek(start)
            content = stream.read(length)
    if 0 <= length != len(content):
        raise OSError(f"{url} has {len(content)} bytes at {start}, expected {length}: it changed since it was listed")
    return content


def open_binary(url: str) -> Any:
    """A file to read and seek in."""
    if not is_remote(url):
        return local(url).open("rb")
    system, path = _remote(url)
    return _again(lambda: system.open(path, "rb"), url)


def write(url: str, content: bytes) -> None:
    """Write a file that is whole or absent: renamed into place locally, put at once on object storage."""
    if not is_remote(url):
        write_atomically(local(url), content)
        return
    system, path = _remote(url)
    with contextlib.suppress(Exception):  # object storage has no folders
        system.makedirs(os.path.dirname(path), exist_ok=True)
    _again(lambda: system.pipe_file(path, content), url, "write")


def exists(url: str) -> bool:
    """Tell whether there is a file or folder of that name."""
    if not is_remote(url):
        return local(url).exists()
    system, path = _remote(url)
    system.invalidate_cache()  # other machines write there
    return bool(_again(lambda: system.exists(path), url))


def names(folder: str) -> list[str]:
    """Names of the files in a folder, sorted; none where it is missing."""
    if not is_remote(folder):
        return sorted(os.listdir(local(folder))) if local(folder).is_dir() else []
    system, path = _remote(folder)
    system.invalidate_cache()
    try:
        found = _again(lambda: system.ls(path, detail=False), folder)
    except FileNotFoundError:
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def absolute(url: str) -> str:
    """A place that is the same in every working folder; URLs as they are."""
    return url if is_remote(url) else str(local(url).absolute())


def _below(root: Path) -> Iterator[Path]:
    """All files in a folder, through links to folders too, each folder once."""
    seen = set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in files)


def find(url: str) -> tuple[list[str], list[str]]:
    """All files at or below a place, sorted: their URLs, and their names relative to it.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if not is_remote(url):
        root = local(url)
        if root.is_dir():
            files = sorted(_below(root))
            return [str(path) for path in files], [path.relative_to(root).as_posix() for path in files]
        if not root.exists():
            raise FileNotFoundError(f"there is no {url}; expected a folder, a .tar, a .parquet or a picture")
        return [str(root)], [root.name]
    system, path = _remote(url)
    if url.startswith(("http://", "https://")):
        return [url], [url.rsplit("/", 1)[-1]]
    found = sorted(_again(lambda: system.find(path), url))
    if not found:
        raise FileNotFoundError(f"there is no {url}; expected a folder, a .tar, a .parquet or a picture")
    below = [name[len(path) :].lstrip("/") or name.rsplit("/", 1)[-1] for name in found]
    return [system.unstrip_protocol(name) for name in found], below


def remove(url: str) -> None:
    """Remove a file."""
    if not is_remote(url):
        local(url).unlink(missing_ok=True)
        return
    system, path = _remote(url)
    _again(lambda: system.rm_file(path), url, "remove")
