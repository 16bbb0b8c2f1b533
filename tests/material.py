"""Where the material beside the repository is, and small networks to try things on."""

from pathlib import Path

import pytest
import torch

from loftup import LoftUp, LoftUpConfig, UniversalConfig

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

SINE, LEARNABLE = LoftUpConfig(24), LoftUpConfig(24, position_code="learnable", lr_size=8)


def shared(path: str) -> Path:
    """A file of the material beside the repository, or a skip with the reason."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the shared material beside the repository")
    return SHARED / path


def randomised(config: LoftUpConfig) -> LoftUp:
    """A module whose norms and running statistics are not the identity."""
    up = LoftUp(config).eval()
    with torch.no_grad():
        for name, tensor in up.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.normal_(1.0 if name.endswith(("weight", "running_var")) else 0.0, 0.2).abs_()
    return up


FARSIGHTED = {"quarter_width": 12, "local": True}  # settings that make all parts of the universal network


def universal(seed: int = 0, **fields: int) -> LoftUp:
    """A module with ``values="features"`` whose parameters are all away from their first values."""
    torch.manual_seed(seed)
    up = LoftUp(UniversalConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in up.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return up


# torch.compile and torch.export of torch 2.4 do not see through our whole networks; 2.9 is what export asks for.
new_compiler = pytest.mark.skipif(torch.__version__ < (2, 9), reason="needs the compiler of torch 2.9")


def inputs(batch=1, grid=(5, 7), size=(33, 46), channels=24):
    """Random features and image."""
    return torch.randn(batch, channels, *grid), torch.rand(batch, 3, *size)


def drawn_scene(height: int = 336, width: int = 448):
    """A drawn landscape with sharp outlines, for trying things without a photograph."""
    from PIL import Image, ImageDraw

    scene = Image.new("RGB", (width, height), (150, 190, 235))
    draw = ImageDraw.Draw(scene)
    horizon = height * 3 // 5
    draw.rectangle((0, horizon, width, height), fill=(95, 140, 70))
    draw.polygon([(0, horizon), (width // 4, height // 4), (width // 2, horizon)], fill=(120, 110, 115))
    draw.polygon([(width // 4, horizon), (width // 2, height // 3), (width * 4 // 5, horizon)], fill=(95, 88, 98))
    draw.ellipse((width * 3 // 4, height // 10, width * 3 // 4 + height // 6, height // 10 + height // 6), fill="gold")
    draw.rectangle((width * 11 // 16, height // 2, width * 13 // 16, height * 3 // 4), fill=(180, 70, 60))
    draw.polygon(
        [(width * 21 // 32, height // 2), (width * 3 // 4, height * 3 // 8), (width * 27 // 32, height // 2)],
        fill=(110, 50, 40),
    )
    for left in range(width // 16, width // 2, width // 9):
        draw.rectangle((left - 3, height * 7 // 10, left + 3, height * 17 // 20), fill=(90, 65, 45))
        draw.ellipse((left - 18, height // 2, left + 18, height * 3 // 4), fill=(40, 95, 45))
    return scene
