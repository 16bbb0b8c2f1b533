"""A user's script, for mypy alone: what is right passes, and each wrong line is an error that its comment expects.

``mypy`` checks it with ``warn_unused_ignores``, so that a line that is no error any more fails too.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import loftup
from loftup import Backbone, LoftUp, Upsampled, load_backbone

if TYPE_CHECKING:
    backbone: Backbone = load_backbone("tiny")
    up = LoftUp.from_pretrained("any")
    image = torch.rand(1, 3, 224, 224)
    dense: torch.Tensor = up(backbone(image), image, size=(112, 112))
    scores: torch.Tensor = up(backbone(image), image, head=torch.randn(5, 192))
    written: Path = Upsampled(backbone, up).export("both.onnx")
    colours = loftup.viz.pca_image
    later: torch.Tensor = loftup.open("features")[0].dense(112)

    up(backbone(image), image, siez=112)  # type: ignore[arg-type]
    up(backbone(image))  # type: ignore[call-arg]
    Upsampled(backbone, up)(image, views=4)  # type: ignore[arg-type]
    loftup.loadbackbone("tiny")  # type: ignore[attr-defined]
    number: int = up(backbone(image), image)  # type: ignore[assignment]
