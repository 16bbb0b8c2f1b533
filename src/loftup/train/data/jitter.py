"""Colours of the guidance changed at random, so that the upsampler does not learn one camera's."""

import torch
from torch import Tensor

from .generators import seeded

__all__ = ["jitter"]

GREY, GAMMA, MIX, NOISE = 0.15, 0.5, 0.3, 0.2  # probabilities of each change


def jitter(guidance: Tensor, probability: float, seed: int, step: int) -> Tensor:
    """Change grey, gamma, the mixture of colours and noise; the same for all pictures of a step, noise included.

    Args:
        guidance: (B, 3, H, W), or (B, 3 k^2, H, W) as :func:`loftup.inputs.resize_guidance` gives it, in [0, 1].
        probability: that a step changes anything at all.
        seed: of the run.
        step: of the optimizer.

    Returns:
        Guidance of the same shape; mixing and noise may leave [0, 1].
    """
    generator = seeded(seed, "jitter", step)

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    if not chance(probability):
        return guidance
    x: Tensor = guidance.unflatten(1, (3, -1))  # (B, 3, k^2, H, W)
    if chance(GREY):
        x = x.mean(1, keepdim=True).expand_as(x)
    if chance(GAMMA):
        x = x.clamp(min=1e-3) ** float(torch.empty(()).uniform_(-0.5, 0.5, generator=generator).exp())
    if chance(MIX):
        mixture = torch.eye(3) + 0.2 * torch.randn(3, 3, generator=generator)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.einsum("ij,bjkhw->bikhw", mixture.to(x), x)
    if chance(NOISE):
        level = 0.06 * float(torch.rand((), generator=generator))
        x = x + level * torch.randn(x.shape[1:], generator=generator).to(x)
    return x.flatten(1, 2)
