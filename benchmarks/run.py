"""Time and memory of loftup against the published way, scaled_dot_product_attention and bilinear interpolation.

    python benchmarks/run.py [--device cpu|cuda] [--quick] [--cases NAME...] [-o results.csv]
    python benchmarks/run.py --busy [CONTENDER...] [--cases NAME] [-o busy.csv]

Before anything else the machine's peaks are measured, in GFLOP/s: a matrix product, a 3x3 convolution and attention
of LoftUp's shapes, by PyTorch. The floor of a case is the sum of its three parts at these rates; "over_floor" is the
median over it. (Winograd computes less than the direct convolution and may come below.) ``--anyup WEIGHTS@FOLDER`` and
``--jafar WEIGHTS@FOLDER`` run other projects' code beside. ``--busy`` measures every contender alone, beside a process
of PyTorch's that keeps one core busy, and beside a second process of its own.

All contenders of a case run in one process, in turn, round after round. On the CPU, backend "cpu_direct" is "cpu"
without its stem (Winograd, and rows that are computed once), "cpu_winograd" is "cpu" as on a processor without a matrix
unit, and "torch" is plain PyTorch on folded weights, in bands; the CSV gives the 20th, 50th and 80th
percentile of the rounds. Before anything is timed every contender runs once; where the published way takes part, the
results are compared with its, and a difference ends the run. Memory is measured in a process of its own for each
contender: the peak above inputs, weights and prepared weights, without the result; on the CPU from the kernel's
high-water mark (Linux).
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import CASES, Case
from contenders import DTYPES, RIVALS, Run, contender, make_inputs, make_loftup
from measure import Table, cuda_memory, describe, duration, in_turns, percentiles
from torch import Tensor


def contender_names(case: Case, device: str) -> list[str]:
    """Contenders of a case: published ways, then ours as ``loftup:backend:dtype``, then bilinear."""
    backends = ["cpu", "cpu_direct", "torch"] if device == "cpu" else ["torch", "triton"]
    if case.points:
        backends = [name for name in backends if name != "cpu_direct"]  # Winograd has no part in points
    ours = [f"loftup:{backend}:{dtype}" for backend in backends for dtype in ("float32", "bfloat16")]
    if "cpu_direct" in backends:
        ours.append("loftup:cpu_winograd:bfloat16")
    if case.ours_only or case.head or case.points:
        return ours
    published = ["published:float32", "published_sdpa:float32"]
    if device == "cuda":
        published.append("published_autocast:bfloat16")
    rivals = [f"{name}:float32" for name in RIVALS]
    return [*published, *ours, "any:float32", "any:bfloat16", *rivals, "bilinear:float32"]


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of the three kinds of work, each the best of five: see :attr:`Case.parts`."""
    n, rows, tokens, heads, width = (2048, 64, 1024, 4, 101) if device == "cpu" else (8192, 448, 1024, 4, 101)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    image = torch.randn(1, 404, rows, 448, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(404, 404, 3, 3, device=device, dtype=dtype)
    query = torch.randn(1, heads, 448 * rows, width, device=device, dtype=dtype)
    keys = torch.randn(1, heads, tokens, width, device=device, dtype=dtype)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "matrix": (lambda: a @ b, 2 * n**3),
        "convolution": (lambda: F.conv2d(image, kernel, padding=1), 2 * 448 * rows * 9 * 404**2),
        "attention": (
            lambda: F.scaled_dot_product_attention(query, keys, keys),
            4 * 448 * rows * tokens * heads * width,
        ),
    }
    rates = {}
    for name, (run, flop) in work.items():
        with torch.inference_mode():
            rates[name] = flop / min(duration(run, device) for _ in range(5)) / 1e9
    return rates


def floor(case: Case, rates: dict[str, float]) -> float:
    """Seconds that the arithmetic of a case takes at the machine's peaks."""
    return sum(gflop / rates[kind] for kind, gflop in case.parts.items())


def warm_up(case: Case, runs: dict[str, Run], features: Tensor, image: Tensor) -> None:
    """Run every contender once; end the benchmark if a result differs from the published way's."""
    if "published:float32" not in runs:
        for run in runs.values():
            run(features, image[:, :, :8, :8])  # prepares weights and kernels; the case itself takes minutes
        return
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    truth = runs["published:float32"](features, image)
    for name, run in runs.items():
        error = (run(features, image) - truth).abs()
        wrong = error.max() > 2e-4 if name.endswith("float32") else error.mean() > 0.03
        if wrong and name.startswith(("published", "untiled", "loftup")):
            sys.exit(
                f"{case.name}: {name} differs from the published way by up to {error.max():.3g}; nothing was timed"
            )
    torch.backends.cudnn.allow_tf32 = tf32


def measure_time(case: Case, device: str, rounds: int, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds a call of every contender, in turn, round after round."""
    up, (features, image) = make_loftup(case.channels, device), make_inputs(case, device)
    with torch.inference_mode():
        runs = {name: contender(name, up, case) for name in names}
        warm_up(case, runs, features, image)
        calls = {name: functools.partial(run, features, image) for name, run in runs.items()}
        return in_turns(calls, device, rounds)


def status(field: str) -> int:
    """A field of this process's memory status in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure_memory(case: Case, name: str, device: str) -> dict[str, int]:
    """Peak bytes above what was there before the call, less the result; on the CPU also of the whole process."""
    up, (features, image) = make_loftup(case.channels, device), make_inputs(case, device)
    with torch.inference_mode():
        run = contender(name, up, case)
        run(features, image[:, :, :8, :8])  # libraries and prepared weights are not working memory
        if device == "cuda":
            return {"working": cuda_memory(lambda: run(features, image))[1], "process": 0}
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays in the heap would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        result = run(features, image)
        return {"working": status("VmHWM") - before - result.nbytes, "process": status("VmHWM")}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the main cases, fewer rounds")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="these alone, as the CSV names them")
    parser.add_argument("--rounds", type=int, help="rounds of every case; by default as many as its size allows")
    parser.add_argument(
        "-o", "--output", type=Path, help="default: results/DEVICE.csv for all cases, else ./benchmark.csv"
    )
    for rival in ("anyup", "jafar"):
        parser.add_argument(f"--{rival}", metavar="WEIGHTS@FOLDER", help="run that project's code beside ours")
    parser.add_argument("--busy", nargs="*", metavar="CONTENDER", help="beside other processes, on a CPU")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {case.name: case for case in CASES}
    RIVALS.update({name: place for name in ("anyup", "jafar") if (place := getattr(arguments, name))})
    if arguments.memory_of:
        case, name = arguments.memory_of
        print(json.dumps(measure_memory(by_name[case], name, arguments.device)))
        return
    if arguments.busy is not None:
        case = by_name[(arguments.cases or ["c384_448_32x32_b1"])[0]]
        busy(case, arguments.busy or BUSY, arguments.output or Path("busy.csv"))
        return
    chosen = [by_name[name] for name in arguments.cases] if arguments.cases else list(CASES)
    if arguments.quick and not arguments.cases:
        chosen = [case for case in chosen if case.quick]
    results = Path(__file__).parent / "results" / f"{arguments.device}.csv"
    complete = len(chosen) == len(CASES) and not arguments.contenders
    output = arguments.output or (results if complete else Path("benchmark.csv"))
    about = describe(arguments.device)
    table: Table | None = None
    rates = {name: peaks(arguments.device, DTYPES[name]) for name in ("float32", "bfloat16")}
    for name, each in rates.items():
        print(f"peaks in {name}: " + ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in each.items()))
    for case in chosen:
        floors = {name: floor(case, each) for name, each in rates.items()}
        print(f"{case.name}: floor " + ", ".join(f"{seconds:.3f} s in {name}" for name, seconds in floors.items()))
        rounds = arguments.rounds or (
            50 if arguments.device == "cuda" else 3 if case.gflop > 1000 or arguments.quick else 7
        )
        names = arguments.contenders or contender_names(case, arguments.device)
        for name, seconds in measure_time(case, arguments.device, rounds, names).items():
            memory = memory_in_own_process(case, name, arguments.device)
            low, middle, high = percentiles(seconds)
            computed = not case.points and name.startswith(("published", "loftup"))
            rate = case.gflop / middle if computed else 0.0
            least = floors[name.rpartition(":")[2]]
            row = {
                "case": case.name,
                "contender": name,
                "device": arguments.device,
                "rounds": rounds,
                "p20_s": f"{low:.5f}",
                "p50_s": f"{middle:.5f}",
                "p80_s": f"{high:.5f}",
                "gflop": f"{case.gflop:.0f}" if computed else "",
                "gflop_per_s": f"{rate:.0f}" if computed else "",
                "floor_s": f"{least:.5f}" if computed else "",
                "over_floor": f"{middle / least:.2f}" if computed else "",
                "working_mib": f"{memory['working'] / 2**20:.0f}",
                "process_mib": f"{memory['process'] / 2**20:.0f}" if memory["process"] else "",
                **about,
            }
            table = table or Table(output, list(row))
            table.add(row)
            print(
                f"{case.name:28} {name:24} {middle:9.4f} s {row['gflop_per_s']:>6} GFLOP/s "
                f"{row['over_floor']:>5} of the floor {row['working_mib']:>6} MiB"
            )
    print(f"wrote {output}")


FOREIGN = """
import torch
torch.set_num_threads(1)
a = torch.randn(1024, 1024)
while True:
    a @ a
"""
OWN = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import CASES
from contenders import contender, make_inputs, make_loftup
case = next(case for case in CASES if case.name == sys.argv[2])
run = contender(sys.argv[3], make_loftup(case.channels, "cpu"), case)
features, image = make_inputs(case, "cpu")
while True:
    run(features, image)
"""


BUSY = ("bilinear:float32", "any:float32", "loftup:cpu:float32", "loftup:cpu:bfloat16")


def busy(case: Case, names: Sequence[str], output: Path, rounds: int = 3) -> None:
    """Time contenders alone and beside other processes, which are stopped in between; writes a table."""
    up, (features, image) = make_loftup(case.channels, "cpu"), make_inputs(case, "cpu")
    columns = ["case", "contender", "alone_s", "beside_s", "over_alone", "two_of_its_kind_s", "two_over_alone"]
    about = describe("cpu")
    table = Table(output, [*columns, *about])
    for name in names:
        run = functools.partial(contender(name, up, case), features, image)
        here = os.fspath(Path(__file__).parent)
        others = [[sys.executable, "-c", FOREIGN], [sys.executable, "-c", OWN, here, case.name, name]]
        seconds: list[list[float]] = [[], [], []]
        running = [subprocess.Popen(command) for command in others]
        try:
            with torch.inference_mode():
                run()
                time.sleep(5)  # the others have begun
                for _ in range(rounds):
                    for place, process in enumerate([None, *running]):
                        for each in running:
                            each.send_signal(signal.SIGCONT if each is process else signal.SIGSTOP)
                        time.sleep(0.2)
                        seconds[place].append(duration(run, "cpu"))
        finally:
            for each in running:
                each.kill()
        alone, beside, two = map(statistics.median, seconds)
        row = dict(zip(columns, [case.name, name, *(f"{alone:.4f}", f"{beside:.4f}", f"{beside / alone:.2f}"),
                                 *(f"{two:.4f}", f"{two / alone:.2f}")], strict=True))  # fmt: skip
        table.add({**row, **about})
        print(f"{name:24} alone {alone:.3f} s, beside a busy core {beside / alone:.2f}, two {two / alone:.2f} times")
    print(f"wrote {output}")


def memory_in_own_process(case: Case, name: str, device: str) -> dict[str, int]:
    """Run :func:`measure_memory` in a fresh process."""
    command = [sys.executable, os.fspath(Path(__file__)), "--device", device, "--memory-of", case.name, name]
    command += [word for rival, place in RIVALS.items() for word in (f"--{rival}", place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring the memory of {name} on {case.name} failed:\n{done.stderr}")
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
