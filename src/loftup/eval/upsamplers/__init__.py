"""Feature upsamplers behind one call, ``(features, image, size) -> (B, C, H', W')``, by name."""

from .registry import Upsampler, create, names, register

__all__ = ["Upsampler", "create", "names", "register"]
