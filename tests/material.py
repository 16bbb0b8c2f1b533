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


def universal(seed: int = 0, **fields: int) -> LoftUp:
    """A module with ``values="features"`` whose parameters are all away from their first values."""
    torch.manual_seed(seed)
    up = LoftUp(UniversalConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in up.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return up


def inputs(batch=1, grid=(5, 7), size=(33, 46), channels=24):
    """Random features and image."""
    return torch.randn(batch, channels, *grid), torch.rand(batch, 3, *size)
