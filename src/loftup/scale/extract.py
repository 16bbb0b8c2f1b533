"""Features of many pictures, by one process or a cluster."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import LoftUpError, translate
from ..files import alone_in
from ..progress import readable, tell, track
from ..weights.names import resolve
from . import storage
from .compute import Extractor
from .engines import Cluster, Done, Job, Part, run_here, run_on_ray
from .estimate import bytes_of_picture
from .folder import Folder
from .settings import Settings
from .sources import list_pictures

__all__ = ["Summary", "extract"]

MOST_PART, MOST_SHARD = 256, 256 * 2**20


@dataclass(frozen=True)
class Summary:
    """How an extraction ended.

    Attributes:
        pictures: that are planned in all.
        written: whose features are in the folder.
        failed: that are in the folder's table of errors.
        seconds: that this start took.
        parts: of this start, each with its number, pictures, errors, bytes and the (begin, end) of its steps in
            seconds since 1970.
    """

    pictures: int
    written: int
    failed: int
    seconds: float
    parts: tuple[Done, ...]


def extract(
    dataset: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    output: "str | os.PathLike[str]",
    settings: Settings | None = None,
    *,
    engine: str = "local",
    cluster: Cluster | None = None,
    device: str | None = None,
    column: str | None = None,
    retry_errors: bool = False,
    most: float | None = None,
    **options: Any,
) -> Summary:
    """Extract features of pictures into shards; a second start goes on.

    Every picture is written once, in the shard of its part, or named in the table of errors. The plan of parts is made
    by the first start and kept; pictures that are new at a later start get parts of their own. Equal settings give
    equal shards, whatever the engine and the number of workers, where one thread computes on one kind of CPU.

    Args:
        dataset: folders, WebDataset ``.tar`` files, ``.parquet`` files or pictures, one or several, local or URLs that
            fsspec knows (``s3://``, ``gs://``, ``https://``).
        output: folder, local or a URL.
        settings: what is extracted and how; None takes the ``options``.
        engine: "local" for this process, "ray" for a cluster.
        cluster: the share of a Ray cluster to take.
        device: of the engine "local"; None takes a GPU where there is one.
        column: of Parquet files, see :func:`loftup.scale.sources.list_pictures`.
        retry_errors: try the pictures again that failed.
        most: bytes of output, as estimated, beyond which nothing is begun; None sets no limit.
        options: fields of :class:`Settings`.

    Returns:
        A :class:`Summary`.

    Raises:
        LoftUpError: see :class:`Settings`, :class:`~loftup.scale.folder.Folder` and the engines; no pictures.
        OSError: a source is missing, or the output cannot be written.
        TypeError: both settings and options, or an option of another name.
        ValueError: a value is out of its range.

    Examples:
        >>> from loftup.scale import extract
        >>> extract("photos/", "features/", backbone="tiny", save=("features", "pooled"))  # doctest: +SKIP
    """
    if settings is not None and options:
        raise TypeError(f"give settings or options, got both: {', '.join(options)}")
    settings = settings or Settings(**options)
    if engine not in ("local", "ray"):
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    several = [dataset] if isinstance(dataset, str | os.PathLike) else dataset
    sources = [storage.absolute(os.fspath(each)) for each in several]
    target, start = storage.absolute(os.fspath(output)), time.time()
    with _alone(target):
        job, extractor, pictures = _prepare(sources, target, _everywhere(settings), engine, device, column)
        folder = job.folder()
        finished = folder.finished()
        again = folder.with_errors() & finished if retry_errors else set()
        job, finished = replace(job, again=frozenset(again)), finished - again
        waiting = [(number, plan, count) for number, plan, count in folder.parts() if number not in finished]
        parts: list[Part] = [(number, plan) for number, plan, _ in waiting]
        total = sum(count for *_, count in waiting)
        if total < pictures:
            tell(f"{pictures - total} of {pictures} pictures are finished already")
        need = total * bytes_of_picture(extractor)
        text = f"{total} pictures: about {readable(need)}"
        if most is not None and need > most:
            raise LoftUpError(f"{text}, more than the {readable(most)} that are agreed to; save less, or allow more")
        if total:
            tell(text)
        if engine == "ray":
            del extractor  # frees its memory for the workers
            results = run_on_ray(job, parts, cluster or Cluster()) if parts else iter(())
        else:
            results = run_here(job, parts, extractor, _threads(extractor))
        tracked = track(results, settings.backbone, total, unit="pictures", size=lambda done: int(done["pictures"]))
        done = list(tracked)
        return _finish(folder, job, pictures, time.time() - start, done)


def _prepare(
    sources: Sequence[str], output: str, settings: Settings, engine: str, device: str | None, column: str | None
) -> tuple[Job, Extractor, int]:
    """Load the networks, claim the folder and complete its plan; the job, the networks, and the number of pictures."""
    with translate(ImportError, 'shards need pyarrow: pip install "loftup[scale]"'):
        import pyarrow  # noqa: F401
    extractor = Extractor(settings, "cpu" if engine == "ray" else _device(device))
    if settings.part is None:
        each = bytes_of_picture(extractor)
        settings = replace(settings, part=max(1, min(MOST_PART, int(MOST_SHARD / max(1.0, each)))))
    assert settings.part is not None
    folder = Folder(output, settings)
    folder.claim(extractor.networks)
    tell("listing the pictures")
    pictures = folder.plan(list_pictures(sources, column, output), settings.part)
    return Job(output, settings, extractor.networks), extractor, pictures


def _everywhere(settings: Settings) -> Settings:
    """Settings whose files are named so that every process finds them."""
    names = ("backbone_weights", "head", "masks")
    given: dict[str, Any] = {
        name: storage.absolute(value) for name in names if (value := getattr(settings, name)) is not None
    }
    if settings.weights is not None and (path := resolve(settings.weights, settings.strict).path) is not None:
        given["weights"] = str(path.absolute())
    return replace(settings, **given)


def _threads(extractor: Extractor) -> int:
    """Threads that decode beside a GPU; on a CPU one, as the networks have the others."""
    return min(8, os.cpu_count() or 1) if extractor.device.type == "cuda" else 1


def _alone(output: str) -> AbstractContextManager[None]:
    """The lock on a local folder; object storage has none."""
    return nullcontext() if storage.is_remote(output) else alone_in(storage.local(output), ("data", "errors", "plan"))


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _finish(folder: Folder, job: Job, pictures: int, seconds: float, done: Sequence[Done]) -> Summary:
    """Count what the folder holds, and write its manifest."""
    finished = folder.finished()
    parts = {number: count for number, _, count in folder.parts()}
    failures = folder.errors()
    planned = sum(count for number, count in parts.items() if number in finished)
    counts = {
        "pictures": pictures,
        "written": planned - len(failures),
        "failed": len(failures),
        "parts": len(parts),
        "finished_parts": len(finished),
    }
    folder.write_manifest(job.networks, counts)
    return Summary(pictures, planned - len(failures), len(failures), seconds, tuple(done))
