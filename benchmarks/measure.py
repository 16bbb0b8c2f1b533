"""How the benchmarks measure: contenders in turns, memory above inputs and result, rows on disk at once."""

import csv
import functools
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loftup

SPREAD = ("rounds", "p20_ms", "p50_ms", "p80_ms")
ABOUT = ("machine", "torch", "loftup", "commit")


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def duration(run: Callable[[], object], device: str) -> float:
    """Seconds of one call: between two events of the stream on CUDA, by the clock elsewhere."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def in_turns(
    runs: Mapping[str, Callable[[], object]], device: str, rounds: int, limit: float = float("inf"), least: int = 3
) -> dict[str, list[float]]:
    """Seconds a call of every contender, in turn, round after round.

    Args:
        runs: the contenders, warm.
        device: where they run.
        rounds: at most so many.
        limit: seconds after which no further round begins.
        least: rounds that are run even past the limit.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + limit
    for turn in range(rounds):
        if turn >= least and time.perf_counter() > end:
            break
        for name, run in runs.items():
            seconds[name].append(duration(run, device))
    return seconds


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    middle = statistics.median(seconds)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [middle] * 4
    return fifths[0], middle, fifths[3]


def cuda_memory(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a call, and the peak bytes of torch's allocator above what was there before and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before - result.nbytes


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@functools.cache
def commit() -> str:
    """Commit of the checkout; the variable COMMIT stands in where it is none."""
    command = ["git", "-C", os.fspath(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        described = ""
    return described or os.environ.get("COMMIT") or "unknown"


def describe(device: str) -> dict[str, str]:
    """Machine, versions, commit."""
    cuda = device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "loftup": loftup.__version__,
        "commit": commit(),
    }


class Table:
    """A CSV file that gets every row at once: a run may be cut off.

    Args:
        path: of the file.
        columns: of the table.
        go_on: keep the rows that are there already.
    """

    def __init__(self, path: Path, columns: Sequence[str], go_on: bool = False) -> None:
        self.path, self.columns = path, list(columns)
        self.rows: list[dict[str, str]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if go_on and path.exists():
            with path.open(newline="") as stream:
                self.rows = list(csv.DictReader(stream))
        else:
            self._write("w", dict(zip(self.columns, self.columns, strict=True)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; a column that it lacks stays empty."""
        self.rows.append({name: str(row.get(name, "")) for name in self.columns})
        self._write("a", self.rows[-1])

    def _write(self, mode: str, row: Mapping[str, str]) -> None:
        with self.path.open(mode, newline="") as stream:
            csv.DictWriter(stream, self.columns, lineterminator="\n").writerow(row)


class Group:
    """Contenders that take turns: run each, then time those that ran, and write their rows.

    One that fails gets a row with the reason. Where it leaves the GPU unusable, the script starts itself again with
    ``--go-on``, which has to open the table with its rows.

    Args:
        table: for the rows; a contender with a row of the same key is left out.
        key: columns that all rows of the group share.
        device: where the contenders run.
        rounds: at most so many.
        limit: seconds for the rounds, of which three are run in any case.
    """

    def __init__(self, table: Table, key: Mapping[str, Any], device: str, rounds: int, limit: float) -> None:
        self.table, self.device, self.rounds, self.limit = table, device, rounds, limit
        self.key = {name: str(value) for name, value in key.items()}

    def measure(
        self,
        makers: Mapping[str, Callable[[], Callable[[], Tensor]]],
        judge: Callable[[Tensor], dict[str, Any]],
        extra: Callable[[float], dict[str, Any]] = lambda seconds: {},
    ) -> None:
        """Measure contenders.

        Args:
            makers: for every contender a function that prepares it.
            judge: columns that follow from a result.
            extra: columns that follow from the median in seconds.
        """
        runs, facts = {}, {}
        for name, maker in makers.items():
            if self._has(name):
                continue
            try:
                runs[name], facts[name] = self._start(maker, judge)
            except Exception as error:
                self._fail(name, error)
        try:
            with torch.inference_mode():
                times = in_turns(runs, self.device, self.rounds, self.limit)
        except Exception as error:  # whose fault it is cannot be told
            for name in runs:
                self._fail(name, error)
            return
        for name, seconds in times.items():
            low, middle, high = percentiles(seconds)
            spread = [len(seconds), *(f"{1000 * value:.4f}" for value in (low, middle, high))]
            self._add(name, {**dict(zip(SPREAD, spread, strict=True)), **facts[name], **extra(middle), "status": "ok"})

    def _start(
        self, maker: Callable[[], Callable[[], Tensor]], judge: Callable[[Tensor], dict[str, Any]]
    ) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        """Prepare a contender, warm it up, and take its memory and result."""
        with torch.inference_mode():
            run = maker()
            result = run()
            if self.device != "cuda":
                return run, judge(result)
            del result
            result, peak = cuda_memory(run)
            return run, {"working_mib": f"{peak / 2**20:.1f}", **judge(result)}

    def _fail(self, name: str, error: Exception) -> None:
        memory = isinstance(error, torch.OutOfMemoryError)
        text = "out of memory" if memory else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._add(name, {"status": text})
        error.__traceback__ = None  # or its frames hold the memory
        gc.collect()
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:  # the device is of no use to this process any more
            print("starting again, for the device does not answer", flush=True)
            os.execv(sys.executable, [sys.executable, *sys.argv, *(() if "--go-on" in sys.argv else ("--go-on",))])

    def _has(self, name: str) -> bool:
        key = {**self.key, "contender": name}
        return any(key.items() <= row.items() for row in self.table.rows)

    def _add(self, name: str, columns: Mapping[str, Any]) -> None:
        self.table.add({**self.key, "contender": name, **columns, **describe(self.device)})
        last = self.table.rows[-1]
        shown = [f"{last[SPREAD[2]]} ms" if last["status"] == "ok" else last["status"][:120]]
        shown += [
            f"{column} {last[column]}" for column in ("working_mib", "max_error", "images_per_s") if last.get(column)
        ]
        print(", ".join([*self.key.values(), name, *shown]), flush=True)
