"""Linear probe on CamVid: bilinear interpolation against LoftUp weights, on features at half the frames' resolution.

    python benchmarks/camvid_probe.py DATA --backbone mobilenetv2_100 --layer 3 \
        --weights stage1=runs/stage1 --weights stage2=runs/stage2 -o probe.csv

DATA holds train/ and val/ with NAME.jpg and NAME.png (labels 0 .. 10 count, others are void). Frames are cut to 352
rows (4 off the top and the bottom of 360), features are upsampled to half of that, labels are every second pixel. A
linear classifier is trained on pixels drawn at random from every training frame and judged on all pixels of the
validation frames; every seed draws its own pixels and starts its own classifier.
"""

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from loftup import Backbone, LoftUp, load_backbone
from loftup.train.run.probe import Scores, fit_probe, score

CLASSES = 11
Frame = tuple[Tensor, Tensor]  # image (1, 3, H, W) in [0, 1], labels (1, H / 2, W / 2)


def frames(folder: Path, stride: int = 1) -> Iterator[Frame]:
    """Pictures of a split and their labels."""
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise SystemExit(f"no NAME.jpg in {folder}; expected CamVid frames with NAME.png label maps beside them")
    for file in files[::stride]:
        image = np.array(Image.open(file).convert("RGB"))
        labels = np.array(Image.open(file.with_suffix(".png")))
        top = image.shape[0] % 16 // 2
        bottom = image.shape[0] - image.shape[0] % 16 + top
        yield (
            torch.from_numpy(image[top:bottom]).movedim(-1, 0)[None] / 255,
            torch.from_numpy(labels[top:bottom:2, ::2].astype(np.int64))[None],
        )


class Bilinear:
    """Interpolation with the calls of a LoftUp."""

    def __call__(
        self, features: Tensor, image: Tensor, size: tuple[int, int], head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return head(F.interpolate(features, size, mode="bilinear", align_corners=False))

    def at(self, features: Tensor, image: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
        x, y = points[0].unbind(-1)
        return F.interpolate(features, size, mode="bilinear", align_corners=False)[:, :, y, x].mT


@torch.inference_mode()
def judge(
    backbone: Backbone, upsampler: "LoftUp | Bilinear", data: Path, seeds: int, points: int, stride: int = 1
) -> list[Scores]:
    """Scores of every seed's probe."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    generator = torch.Generator().manual_seed(7)
    features, labels = [], []
    for image, label in frames(data / "train"):
        known = (label[0] < CLASSES).flatten().nonzero()[:, 0]
        if len(known) < points * seeds:
            continue
        chosen = known[torch.randperm(len(known), generator=generator)[: points * seeds]]
        y, x = chosen // label.shape[-1], chosen % label.shape[-1]
        low = backbone((image - mean) / std)
        found = upsampler.at(low, image, torch.stack([x, y], -1)[None], tuple(label.shape[1:]))[0]
        features.append(found.unflatten(0, (seeds, points)))
        labels.append(label[0, y, x].unflatten(0, (seeds, points)))
    with torch.inference_mode(False), torch.enable_grad():
        probes = [
            fit_probe(
                torch.cat([f[s] for f in features]).clone(), torch.cat([n[s] for n in labels]).clone(), CLASSES, seed=s
            )
            for s in range(seeds)
        ]
    weight = torch.cat([probe.weight for probe in probes])[:, :, None, None]
    bias = torch.cat([probe.bias for probe in probes])
    predictions: list[list[Frame]] = [[] for _ in probes]
    for image, label in frames(data / "val", stride):
        low = backbone((image - mean) / std)
        logits = upsampler(low, image, tuple(label.shape[1:]), head=lambda x: F.conv2d(x, weight, bias))
        for seed, logit in enumerate(logits.split(CLASSES, dim=1)):
            predictions[seed].append((logit.argmax(1), label))
    return [score(pairs, CLASSES) for pairs in predictions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--backbone-weights")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help="passed to timm, as JSON")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=PATH", help="LoftUp weights, repeatable"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=500, help="pixels of every training frame and seed")
    parser.add_argument("--stride", type=int, default=1, help="judge every n-th validation frame")
    parser.add_argument("--no-baseline", action="store_true", help="leave bilinear interpolation out")
    parser.add_argument("-o", "--output", type=Path, help="CSV file to append to")
    arguments = parser.parse_args()
    backbone = load_backbone(
        arguments.backbone,
        weights=arguments.backbone_weights,
        layer=arguments.layer,
        mean=tuple(arguments.mean) if arguments.mean else None,
        std=tuple(arguments.std) if arguments.std else None,
        **arguments.options,
    ).eval()
    contenders: dict[str, LoftUp | Bilinear] = {} if arguments.no_baseline else {"bilinear": Bilinear()}
    for pair in arguments.weights:
        name, _, path = pair.partition("=")
        contenders[name] = LoftUp.from_pretrained(path)
    rows = []
    for name, upsampler in contenders.items():
        start = time.perf_counter()
        scores = judge(backbone, upsampler, arguments.data, arguments.seeds, arguments.points, arguments.stride)
        row: dict[str, object] = {
            "backbone": arguments.backbone,
            "layer": arguments.layer,
            "options": json.dumps(arguments.options),
            "upsampler": name,
        }
        for field in ("miou", "accuracy", "boundary_miou"):
            values = np.array([getattr(s, field) for s in scores])
            row[field] = f"{values.mean():.2f}"
            row[f"{field}_spread"] = f"{np.ptp(values):.2f}"
        row |= {
            "seeds": arguments.seeds,
            "points": arguments.points,
            "stride": arguments.stride,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        rows.append(row)
        print(*(f"{key}={value}" for key, value in row.items()), f"({time.perf_counter() - start:.0f} s)", flush=True)
    if arguments.output:
        new = not arguments.output.exists()
        with arguments.output.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
