"""Upsample the features of one photograph and save a picture of them.

Run as ``python examples/upsample_photo.py photo.jpg``; the default is the photograph in the package. Fetches
DINOv2-S/14 and its LoftUp weights from the Hub at first use.
"""

import sys

import torch

from loftup import LoftUp, load_backbone
from loftup.cli.demo import PHOTO
from loftup.viz import compare

backbone = load_backbone("dinov2_vits14").eval()
up = LoftUp.from_pretrained("dinov2_vits14")

image = backbone.preprocess(sys.argv[1] if len(sys.argv) > 1 else PHOTO, size=(336, 448))  # (1, 3, 336, 448)
with torch.inference_mode():
    features = backbone(image)  # (1, 384, 24, 32)
    dense = up(features, image)  # (1, 384, 336, 448)

compare(image, {"features": features, "LoftUp": dense}).save("features.png")
print(f"{tuple(features.shape)} -> {tuple(dense.shape)}; wrote features.png")
