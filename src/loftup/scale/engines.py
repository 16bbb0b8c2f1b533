"""The steps of a part (read, compute, write), run by this process or by Ray Data on many."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LoftUpError, translate
from ..progress import tell
from .codec import shard
from .decode import Prepared, load
from .folder import Folder
from .settings import Settings

if TYPE_CHECKING:
    from .compute import Extractor

__all__ = ["Cluster", "Job", "run_here", "run_on_ray"]

Part = tuple[int, str]  # number, and the file of the plan that lists its pictures
MANY = 16  # pictures of a part that do not all fail by themselves
MOST_BLOCKS = 20_000  # that Ray Data keeps account of
STEPS = ("read", "compute", "write")
Done = dict[str, Any]  # of a part: its number, pictures, errors, bytes, and seconds of each step


@dataclass(frozen=True)
class Job:
    """The facts of an extraction that every process needs."""

    url: str  # of the output folder
    settings: Settings
    networks: dict[str, Any]  # names and fingerprints that the driver found
    again: frozenset[int] = frozenset()  # finished parts, of which what failed is tried again

    def read(self, part: Part, threads: int = 1) -> list[Prepared]:
        """Read, decode and resize the pictures of a part."""
        folder = self.folder()
        places = folder.places(*part)
        if part[0] in self.again:
            failed = {row["key"] for row in folder.errors([part[0]])}
            places = [place for place in places if place.key in failed]
        return load(places, self.settings, threads)

    def compute(self, extractor: "Extractor", part: Part, pictures: Sequence[Prepared]) -> tuple[bytes, list[Any]]:
        """The bytes of a part's shard, and its errors."""
        rows, errors = extractor.rows(pictures)
        if part[0] in self.again:
            places = self.folder().places(*part)
            there = {row["key"]: row for row in [*self.folder().rows(part[0]), *rows]}
            rows = [there[place.key] for place in places if place.key in there]
            errors = [row for row in errors if row["key"] not in there]
        elif len(pictures) >= MANY and not rows:
            raise LoftUpError(
                f"all {len(pictures)} pictures of part {part[0]} failed, the first of them: {errors[0]['error']}; is a "
                "disk or a GPU missing? Start again when it is there, or leave these pictures out"
            )
        return shard(rows, self.settings.as_json(), self.networks, part[0]), errors

    def write(self, part: Part, content: bytes, errors: Sequence[Any]) -> None:
        """Write a part."""
        self.folder().store(part[0], content, errors, part[0] in self.again)

    def folder(self) -> Folder:
        """The output folder."""
        return Folder(self.url, self.settings)


def run_here(job: Job, parts: Sequence[Part], extractor: "Extractor", threads: int = 1) -> Iterator[Done]:
    """Do parts in this process: the next is read, and the last one written, while one is computed."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reading = reader.submit(_timed, job.read, parts[0], threads) if parts else None
        writing: tuple[Done, Future[Any]] | None = None
        for index, part in enumerate(parts):
            assert reading is not None
            pictures, read = reading.result()
            reading = reader.submit(_timed, job.read, parts[index + 1], threads) if index + 1 < len(parts) else None
            (content, errors), computed = _timed(job.compute, extractor, part, pictures)
            if writing is not None:
                yield _written(*writing)
            done = _done(part, pictures, content, errors) | {"read": read, "compute": computed}
            writing = done, writer.submit(_timed, job.write, part, content, errors)
        if writing is not None:
            yield _written(*writing)


def _timed(function: Any, *arguments: Any) -> tuple[Any, tuple[float, float]]:
    """The result of a call, and when it began and ended."""
    start = time.time()
    return function(*arguments), (start, time.time())


def _written(done: Done, writing: "Future[Any]") -> Done:
    return done | {"write": writing.result()[1]}


def _done(part: Part, pictures: Sequence[Any], content: bytes, errors: Sequence[Any]) -> Done:
    return {"part": part[0], "pictures": len(pictures), "errors": len(errors), "bytes": len(content)}


@dataclass(frozen=True)
class Cluster:
    """The share of a Ray cluster that an extraction takes.

    Args:
        address: of a running cluster, "auto" for the one of this machine; None starts one here, unless the variable
            RAY_ADDRESS names one.
        workers: processes with networks; None takes as many as fit.
        cpus: threads of each.
        gpus: of each, also fractions: 0.5 puts two on a GPU; 0 computes on CPUs.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if not self.gpus >= 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"gpus must be 0, a fraction of 1, or a whole number, got {self.gpus!r}")


BLOCK = 4  # parts that a worker is given at once, at most: one is read, one computed, one written


class _Worker:
    """A process of the cluster: it loads the networks once."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        from .compute import Extractor

        torch.set_num_threads(cluster.cpus)
        self.job, self.threads = job, cluster.cpus
        self.extractor = Extractor(job.settings, "cuda" if cluster.gpus else "cpu")
        if self.extractor.networks != job.networks:
            raise LoftUpError(
                f"a worker loaded other weights than the driver: {self.extractor.networks}, expected {job.networks}; "
                "give all machines the same files and the same versions"
            )

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        parts = [(int(number), str(plan)) for number, plan in zip(block["part"], block["plan"], strict=True)]
        for done in run_here(self.job, parts, self.extractor, self.threads):
            yield {name: [value] for name, value in done.items()}


def run_on_ray(job: Job, parts: Sequence[Part], cluster: Cluster) -> Iterator[Done]:
    """Do parts by Ray Data, whose rows they are.

    What a killed worker had in hand is done again by another.

    Raises:
        LoftUpError: Ray is missing, or the cluster has too little for one worker.
    """
    ray = _ray()
    own = not ray.is_initialized()
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if own:
        tell("starting Ray" if address == "local" else f"joining the Ray cluster {address}")
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        total = ray.cluster_resources()
        workers = _most(total, cluster)
        if cluster.workers is not None:
            if cluster.workers > workers:
                raise LoftUpError(
                    f"the cluster has room for {workers} workers, got workers={cluster.workers}; ask for fewer"
                )
            workers = cluster.workers
        if total.get("GPU") and not cluster.gpus:
            tell(f"the cluster has {total['GPU']:g} GPUs, which stay idle; gpus=1 uses them")
        tell(f"{workers} workers load the networks")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"part": number, "plan": plan} for number, plan in parts]
        each, tail = max(BLOCK, len(rows) // MOST_BLOCKS), rows[-BLOCK * workers :]
        # The last ones one by one, so that all workers end at about the same time.
        data = ray.data.from_items(tail, override_num_blocks=len(tail))
        if head := rows[: -len(tail)]:
            data = ray.data.from_items(head, override_num_blocks=-(-len(head) // each)).union(data)
        done = data.map_batches(
            _Worker,
            batch_size=None,
            fn_constructor_args=(job, cluster),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus or None,
        )
        with translate(ray.exceptions.RayError, _cause):
            for row in done.iter_rows():
                yield {name: tuple(map(float, each)) if name in STEPS else int(each) for name, each in row.items()}
    finally:
        if own:
            ray.shutdown()


def _ray() -> Any:
    with translate(ImportError, 'the engine "ray" needs Ray Data: pip install "loftup[scale]"'):
        import ray
        import ray.data
    return ray


def _most(total: dict[str, float], cluster: Cluster) -> int:
    """The number of workers that a cluster has room for, at least one."""
    needs = {"CPU": float(cluster.cpus), **({"GPU": cluster.gpus} if cluster.gpus else {})}
    room = {kind: int(total.get(kind, 0.0) / need + 1e-9) for kind, need in needs.items()}
    kind = min(room, key=lambda each: room[each])
    if room[kind] < 1:
        raise LoftUpError(
            f"the cluster has {total.get(kind, 0.0):g} {kind}s, a worker asks for {needs[kind]:g}; "
            f"give fewer {kind.lower()}s"
        )
    return room[kind]


def _cause(error: Any) -> str:
    """The reason of a failed task, in a line."""
    cause = error.cause if getattr(error, "cause", None) is not None else error
    while getattr(cause, "cause", None) is not None:
        cause = cause.cause
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, LoftUpError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    return f"{type(cause).__name__}: {lines[-1]}"
