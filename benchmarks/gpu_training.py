"""Last stages of benchmarks/gpu.sh: the first minutes of a ready config, stopped as a user would stop it.

    python benchmarks/gpu_training.py FOLDER [--any] [--seconds N] [--dry]

The config is gpu_25min, or with ``--any`` the network for any backbone with the attention in its Triton kernel. Writes
training.csv or training_any.csv in FOLDER: the run's log.csv, every row with the seconds since the start, and on NVIDIA
GPUs what nvidia-smi says of their use. Pictures and the backbone's weights come from the folder MATERIAL, or ``shared``
beside the checkout or in it; where they are not there, crops of the packaged photograph and random weights take their
place, which cost as much. ``--dry`` trains two steps of quick_cpu.
"""

import argparse
import csv
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu import material
from measure import Table

import loftup

NEEDED = ("timm", "safetensors", "omegaconf", "pydantic", "tensorboard", "accelerate", "PIL")
SKIPPED = 77
BACKBONE = "mobilenetv2_100"  # the one of gpu_25min and quick_cpu
DRY = ("steps=2", "batch=1", "window=32", "precision=float32", "data.sizes=[64]", "data.workers=0", "save_every=1")
ANY = ("model.architecture=any", "model.heads=3", "model.radius=3", "triton=true")
PHOTO = Path(loftup.__file__).parent / "bundled" / "photo" / "photo.jpg"


def weights(scratch: Path) -> list[str]:
    """Config entries for the backbone's weights, real ones if they are at hand."""
    file = material() / "weights" / f"{BACKBONE}.safetensors"
    if file.is_file():
        return [
            f"backbone.weights={file}",
            "backbone.mean=[.5,.5,.5]",
            "backbone.std=[.5,.5,.5]",
            "backbone.options.pad_type=same",
        ]
    import timm
    from safetensors.torch import save_file

    file = scratch / f"{BACKBONE}.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), file)
    return [f"backbone.weights={file}"]


def pictures(scratch: Path, dry: bool) -> list[str]:
    """Config entries for training and validation pictures."""
    data = material() / "data"
    for train, validation in ((data / "bsds500" / "train", data / "bsds500" / "val"), (data / "photos", None)):
        if train.is_dir() and not dry:
            return [f"data.path=[{train}]", f"validation.path=[{validation or ''}]"]
    folder = scratch / "pictures"
    cut_photo(folder, 4 if dry else 64)
    return [f"data.path=[{folder}]", "validation.path=[]"]


def cut_photo(folder: Path, count: int) -> None:
    """Write crops of the packaged photograph, each with a label map of its main colours."""
    from PIL import Image

    folder.mkdir()
    photo = Image.open(PHOTO).convert("RGB")
    side = min(256, *photo.size)
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    for index, (x, y) in enumerate(places.tolist()):
        left, top = int(x * (photo.width - side)), int(y * (photo.height - side))
        crop = photo.crop((left, top, left + side, top + side))
        crop.save(folder / f"{index:03d}.jpg", quality=95)
        labels = crop.resize((32, 32)).quantize(12).resize((side, side), Image.Resampling.NEAREST)
        labels.save(folder / f"{index:03d}.png")


def rows_of(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table that is being written."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def gpu_use() -> dict[str, str]:
    """Percent of the time that the GPU was busy just now and MiB in use; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        percent, mebibytes = done.stdout.splitlines()[0].split(",")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"gpu_percent": percent.strip(), "gpu_mib": mebibytes.strip()}


def follow(process: subprocess.Popen[bytes], log: Path, output: Path, seconds: float) -> int:
    """Copy the run's rows with their times; SIGTERM after so many seconds. Returns the number of rows."""
    start, table, stop = time.perf_counter(), None, False
    while True:
        ended = process.poll() is not None
        rows = rows_of(log)
        elapsed = time.perf_counter() - start
        if rows and table is None:
            table = Table(output, [*rows[0], "seconds", "gpu_percent", "gpu_mib"])
        if table is not None and len(rows) > len(table.rows):
            about = {"seconds": f"{elapsed:.2f}", **gpu_use()}
            for row in rows[len(table.rows) :]:
                table.add({**row, **about})
        if ended:
            return len(rows)
        if elapsed > seconds and not stop:
            process.send_signal(signal.SIGTERM)
            stop = True
        if elapsed > seconds + 30:
            process.kill()
        time.sleep(0.2)


def main() -> int:
    """Train; returns the exit status, 77 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--seconds", type=float, default=165, help="until SIGTERM, loading included")
    parser.add_argument("--dry", action="store_true", help="two small steps on the CPU")
    parser.add_argument("--any", action="store_true", help="train the network for any backbone")
    given = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} missing")
        return SKIPPED
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        entries = [f"output={scratch / 'run'}", *pictures(scratch, given.dry), *weights(scratch)]
        entries += [*DRY, "log_every=1"] if given.dry else ["log_every=10"]
        if given.any:
            entries += ANY
        command = [sys.executable, "-m", "loftup.cli", "train", "quick_cpu" if given.dry else "gpu_25min", *entries]
        print(" ".join(command), flush=True)
        process = subprocess.Popen(command)
        try:
            count = follow(
                process, scratch / "run" / "log.csv", given.folder / f"training{'_any' * given.any}.csv", given.seconds
            )
        finally:
            if process.poll() is None:
                process.kill()
        status = process.wait()
    stopped = status == 128 + signal.SIGTERM and not given.dry
    print(f"{count} rows, exit status {status}{', stopped by SIGTERM and saved' if stopped else ''}")
    return 0 if count and (status == 0 or stopped) else 1


if __name__ == "__main__":
    sys.exit(main())
