"""FeatUp's per-image upsampler on one photograph: the map it fits, beside simpler ones, and its loss.

    python examples/featup_implicit.py photo.jpg --backbone mobilenetv2_100 --layer 3 --steps 1000 -o implicit.png

Without arguments it fits a drawn scene for a few steps with random weights, so that it runs as it stands: only the
mechanics mean something then.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from loftup import load_backbone
from loftup.cli.demo import PHOTO
from loftup.eval.features import extract
from loftup.eval.upsamplers.implicit import ImplicitUpsampler
from loftup.pictures import open_picture
from loftup.viz import compare

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", nargs="?")
parser.add_argument("--backbone", default="mobilenetv2_100")
parser.add_argument("--backbone-weights", metavar="FILE", help="default: from the Hub")
parser.add_argument("--layer", type=int)
parser.add_argument("--options", type=json.loads, default={}, help="passed to timm, as JSON")
parser.add_argument("--mean", type=float, nargs=3)
parser.add_argument("--std", type=float, nargs=3)
parser.add_argument("--side", type=int, default=224, help="short side that the photograph is scaled to")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("-o", "--output", type=Path, default=Path("featup_implicit.png"))
arguments = parser.parse_args()

if arguments.photo is None:
    photo, arguments.side, arguments.steps, weights = open_picture(PHOTO), 64, 3, False
    arguments.layer = 3
else:
    photo, weights = open_picture(arguments.photo), arguments.backbone_weights
backbone = load_backbone(
    arguments.backbone,
    weights=weights,
    layer=arguments.layer,
    mean=arguments.mean,
    std=arguments.std,
    **arguments.options,
)
stride = backbone.patch_size
scale = arguments.side / min(photo.size)
width, height = (max(1, round(side * scale / stride)) * stride for side in photo.size)
image = torch.frombuffer(bytearray(photo.resize((width, height)).tobytes()), dtype=torch.uint8)
image = image.view(1, height, width, 3).movedim(-1, 1) / 255

up = ImplicitUpsampler(backbone, arguments.steps)
features = extract(backbone, image)
dense = up(features, image, (height, width))
maps = {
    f"{features.shape[2]}x{features.shape[3]}": features,
    "bilinear": F.interpolate(features, (height, width), mode="bilinear", align_corners=False),
    "FeatUp implicit": dense,
}
sheet = compare(photo.resize((width, height)), maps)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, 6), height_ratios=(sheet.height / sheet.width * 12, 2))
top.imshow(sheet)
top.axis("off")
bottom.semilogy(up.losses, linewidth=0.5, color="silver")
smooth = [
    sum(up.losses[max(0, i - 20) : i + 1]) / len(up.losses[max(0, i - 20) : i + 1]) for i in range(len(up.losses))
]
bottom.semilogy(smooth)
bottom.set(xlabel="step", ylabel="loss", title="mean squared error of the views' features, in variances")
figure.tight_layout()
if arguments.photo is not None:
    figure.savefig(arguments.output, dpi=100)
print(f"loss {up.losses[0]:.3f} at first, {smooth[-1]:.3f} at the end; features {tuple(dense.shape)}")
