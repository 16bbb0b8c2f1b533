"""Entry points for ``torch.hub``: one line, without installing.

>>> import torch
>>> up = torch.hub.load("loftup/loftup", "any")                                 # doctest: +SKIP
>>> up = torch.hub.load("loftup/loftup", "loftup", backbone="dinov2_vits14")    # doctest: +SKIP
>>> backbone = torch.hub.load("loftup/loftup", "tiny", views=4)                 # doctest: +SKIP
"""

import sys
from pathlib import Path
from typing import Any

dependencies = ["torch", "timm", "huggingface_hub", "safetensors", "einops", "filelock"]

try:
    import loftup as _package
except ImportError:
    sys.path.insert(0, str(Path(__file__).parent / "src"))
    import loftup as _package


def loftup(backbone: str = "any", **options: Any) -> Any:
    """An upsampler, as ``loftup.LoftUp.from_pretrained(backbone, **options)`` gives it."""
    return _package.LoftUp.from_pretrained(backbone, **options)


def any(**options: Any) -> Any:
    """The upsampler for every backbone, from the package."""
    return _package.LoftUp.from_pretrained("any", **options)


def tiny(**options: Any) -> Any:
    """The small backbone in the package, as ``loftup.load_backbone("tiny", **options)`` gives it."""
    return _package.load_backbone("tiny", **options)
