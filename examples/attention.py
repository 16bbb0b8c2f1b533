"""Draw what three pixels of a photograph look at, with what comes in the package: python examples/attention.py out.png.

Runs as it stands, without a network. Without a path the picture goes to a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import loftup
from loftup import LoftUp, load_backbone, viz

photo = Path(loftup.__file__).parent / "bundled" / "photo" / "photo.jpg"  # by Rachel Michetti (CC0)
backbone, up = load_backbone("tiny"), LoftUp.from_pretrained("any")
image = backbone.preprocess(photo, size=448)  # (1, 3, 448, 448)
features = backbone(image)  # (1, 192, 28, 28)

points = [(134, 201), (232, 232), (358, 336)]  # (x, y): rim of the cup, its front, the table
weights = viz.attention_maps(up, features, image, points)  # (3, 28, 28), each with sum 1
for point, each in zip(points, weights, strict=True):
    print(f"pixel {point}: {int((each > 0.01).sum())} cells with more than 1 %, the heaviest {float(each.max()):.0%}")

output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "attention.png"
picture = Image.open(photo)
viz.attention(up, features, image, points, picture=picture, height=300).save(output, quality=92)
print(f"wrote {output}")
