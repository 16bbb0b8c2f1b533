"""Feature upsamplers behind one call, ``(features, image, size) -> (B, C, H', W')``, by name."""

from .registry import Upsampler, check_name, create, names, register

__all__ = ["Upsampler", "check_name", "create", "names", "register"]
