"""Exported graphs against eager PyTorch: files, sizes and largest differences, as a Markdown table.

    python benchmarks/export_parity.py [--loftup FOLDER] [-o export_parity.md]

Every module is exported for any size and run by ONNX Runtime on the CPU at five sizes of several aspects. A difference
counts beside the largest value of eager PyTorch's result. ``--loftup`` takes trained weights for 384 channels; without
it LoftUp's row has random ones. ResNet and DINOv2 have random weights: their graphs are those of trained ones.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

from loftup import LoftUp, Upsampled, load_backbone, wrap

GRIDS = ((1, 16, 16), (2, 8, 9), (1, 14, 20), (3, 2, 5), (1, 27, 6))  # batch, rows, columns


def upsampler_inputs(channels: int, batch: int, h: int, w: int) -> dict[str, torch.Tensor]:
    """Features and an image of 13 pixels a cell and some more."""
    return {"features": torch.randn(batch, channels, h, w), "image": torch.rand(batch, 3, 13 * h + 5, 13 * w + 2)}


def modules(given: str | None) -> dict[str, tuple[Any, Callable[[int, int, int], dict[str, torch.Tensor]]]]:
    """Names, modules and inputs for a batch of a grid."""
    dinov2 = wrap(timm.create_model("vit_small_patch14_dinov2", img_size=224))
    resnet = wrap(timm.create_model("resnet50"), layer=3)
    tiny, up = load_backbone("tiny"), LoftUp.from_pretrained("any")
    loftup = LoftUp.from_pretrained(given) if given else LoftUp(384).eval().requires_grad_(False)

    def image(step: int) -> Callable[[int, int, int], dict[str, torch.Tensor]]:
        return lambda batch, h, w: {"image": torch.randn(batch, 3, h * step, w * step)}

    return {
        "`any`": (up, lambda *grid: upsampler_inputs(192, *grid)),
        "LoftUp, 384 channels": (loftup, lambda *grid: upsampler_inputs(384, *grid)),
        "`tiny`": (tiny, image(16)),
        "DINOv2 ViT-S/14": (dinov2, image(14)),
        "ResNet-50, stage 3": (resnet, image(16)),
        "`tiny` and `any` in one": (Upsampled(tiny, up), image(16)),
    }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loftup", metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("export_parity.md"))
    given = parser.parse_args()
    torch.manual_seed(0)
    lines = ["| module | file, MB | largest value | largest difference |", "|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, (module, inputs)) in enumerate(modules(given.loftup).items()):
            path = module.export(Path(folder) / f"{index}.onnx")
            session = onnxruntime.InferenceSession(str(path))
            largest = difference = 0.0
            for grid in GRIDS:
                tensors = inputs(*grid)
                with torch.inference_mode():
                    expected = module(*tensors.values())
                (found,) = session.run(None, {key: value.numpy() for key, value in tensors.items()})
                largest = max(largest, float(expected.abs().max()))
                difference = max(difference, float((torch.from_numpy(found) - expected).abs().max()))
            lines.append(f"| {name} | {path.stat().st_size / 1e6:.1f} | {largest:.1f} | {difference:.1e} |")
            print(lines[-1], flush=True)
    given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
