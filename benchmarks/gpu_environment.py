"""First stage of benchmarks/gpu.sh: install what is missing, and write down what is there.

    python benchmarks/gpu_environment.py FOLDER [--no-install]

Writes environment.json in FOLDER. torch, torchvision, triton and numpy stay as they are.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import commit, processor

# Distributions that tests and stages use, those that more depends on first.
PACKAGES = (
    "timm",
    "safetensors",
    "einops",
    "huggingface_hub",
    "pytest",
    "omegaconf",
    "pydantic",
    "tensorboard",
    "pillow",
    "accelerate",
    "webdataset",
    "pycocotools",
    "scikit-image",
    "transformers",
    "open_clip_torch",
    "torchmetrics",
    "scipy",
)
KEPT = ("torch", "torchvision", "triton", "numpy")  # never replaced by what is installed
PIP_SECONDS = 15  # after which no further package is tried


def environment(failures: dict[str, str]) -> dict[str, Any]:
    """The machine, versions and settings, with the reasons why packages could not be installed."""
    cuda = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "nvidia-smi": first_line(query),
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "memory_mib": torch.cuda.get_device_properties(0).total_memory // 2**20 if cuda else None,
        "cpu": f"{processor()}, {os.cpu_count()} cores",
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
        "allow_tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32,
        },
        "commit": commit(),
        "packages": {name: version(name) for name in PACKAGES},
        "not_installed": failures,
    }


def install_missing() -> dict[str, str]:
    """Install missing packages by pip, one by one; returns the reasons of those that failed.

    They come from the folder WHEELS where that variable is set, else from pip's index.
    """
    failures: dict[str, str] = {}
    missing = [name for name in PACKAGES if version(name) is None]
    wheels = os.environ.get("WHEELS")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.writelines(f"{name}=={number}\n" for name in KEPT if (number := version(name)))
        kept.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--retries", "0", "--timeout", "3", "--constraint", kept.name]
        command += ["--no-index", "--find-links", wheels] if wheels else []
        end = time.monotonic() + PIP_SECONDS
        for name in missing:
            if time.monotonic() > end:
                failures[name] = "no time was left"
                continue
            try:
                done = subprocess.run([*command, name], capture_output=True, text=True, timeout=20, check=False)
            except subprocess.TimeoutExpired:
                failures[name] = "took more than 20 s"
                continue
            if done.returncode:
                failures[name] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return failures


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(command: list[str]) -> str | None:
    """The first line that a command prints, or None."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def write(folder: Path, failures: dict[str, str]) -> dict[str, Any]:
    """Write environment.json and return what it says."""
    about = environment(failures)
    (folder / "environment.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def main() -> None:
    """Install and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-install", action="store_true", help="leave missing packages missing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    about = write(given.folder, {})  # before pip, which may take longer than it is given
    if not given.no_install:
        about = write(given.folder, install_missing())
    missing = [name for name, number in about["packages"].items() if number is None]
    print(f"{about['gpu'] or 'no GPU'}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    main()
