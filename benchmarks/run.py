"""Time and memory of loftup against the published way, scaled_dot_product_attention and bilinear interpolation.

    python benchmarks/run.py [--device cpu|cuda] [--quick] [--cases NAME...] [-o results.csv]

All contenders of a case run in one process, in turn, round after round. On the CPU, backend "cpu_direct" is "cpu"
without Winograd, and "torch" is plain PyTorch on folded weights, in bands; the CSV gives the 20th, 50th and 80th
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
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import CASES, Case
from contenders import DTYPES, Run, contender, make_inputs, make_loftup
from measure import Table, cuda_memory, describe, in_turns, percentiles, synchronise
from torch import Tensor


def contender_names(case: Case, device: str) -> list[str]:
    """Contenders of a case: published ways, then ours as ``loftup:backend:dtype``, then bilinear."""
    backends = ["cpu", "cpu_direct", "torch"] if device == "cpu" else ["torch", "triton"]
    if case.points:
        backends = [name for name in backends if name != "cpu_direct"]  # Winograd has no part in points
    ours = [f"loftup:{backend}:{dtype}" for backend in backends for dtype in ("float32", "bfloat16")]
    if case.ours_only or case.head or case.points:
        return ours
    published = ["published:float32", "published_sdpa:float32"]
    if device == "cuda":
        published.append("published_autocast:bfloat16")
    return [*published, *ours, "bilinear:float32"]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product, the best of five."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


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
        if wrong and not name.startswith("bilinear"):
            sys.exit(
                f"{case.name}: {name} differs from the published way by up to {error.max():.3g}; nothing was timed"
            )
    torch.backends.cudnn.allow_tf32 = tf32


def measure_time(case: Case, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of every contender, in turn, round after round."""
    up, (features, image) = make_loftup(case.channels, device), make_inputs(case, device)
    with torch.inference_mode():
        runs = {name: contender(name, up, case) for name in contender_names(case, device)}
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
    parser.add_argument("--rounds", type=int, help="rounds of every case; by default as many as its size allows")
    parser.add_argument(
        "-o", "--output", type=Path, help="default: results/DEVICE.csv for all cases, else ./benchmark.csv"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {case.name: case for case in CASES}
    if arguments.memory_of:
        case, name = arguments.memory_of
        print(json.dumps(measure_memory(by_name[case], name, arguments.device)))
        return
    chosen = [by_name[name] for name in arguments.cases] if arguments.cases else list(CASES)
    if arguments.quick and not arguments.cases:
        chosen = [case for case in chosen if case.quick]
    results = Path(__file__).parent / "results" / f"{arguments.device}.csv"
    output = arguments.output or (results if len(chosen) == len(CASES) else Path("benchmark.csv"))
    about = describe(arguments.device)
    table: Table | None = None
    for case in chosen:
        rates = {name: matmul_rate(arguments.device, DTYPES[name]) for name in ("float32", "bfloat16")}
        rounds = arguments.rounds or (
            50 if arguments.device == "cuda" else 3 if case.gflop > 1000 or arguments.quick else 7
        )
        for name, seconds in measure_time(case, arguments.device, rounds).items():
            memory = memory_in_own_process(case, name, arguments.device)
            low, middle, high = percentiles(seconds)
            computed = not case.points and not name.startswith("bilinear")
            rate = case.gflop / middle if computed else 0.0
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
                "of_matmul": f"{rate / rates[name.rpartition(':')[2]]:.2f}" if computed else "",
                "working_mib": f"{memory['working'] / 2**20:.0f}",
                "process_mib": f"{memory['process'] / 2**20:.0f}" if memory["process"] else "",
                **about,
            }
            table = table or Table(output, list(row))
            table.add(row)
            print(
                f"{case.name:28} {name:24} {middle:9.4f} s {row['gflop_per_s']:>6} GFLOP/s {row['working_mib']:>6} MiB"
            )
    print(f"wrote {output}")


def memory_in_own_process(case: Case, name: str, device: str) -> dict[str, int]:
    """Run :func:`measure_memory` in a fresh process."""
    command = [sys.executable, os.fspath(Path(__file__)), "--device", device, "--memory-of", case.name, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring the memory of {name} on {case.name} failed:\n{done.stderr}")
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
