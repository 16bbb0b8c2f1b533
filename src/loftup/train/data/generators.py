"""Random generators that follow from a key alone, not from what was drawn before."""

import hashlib

import torch

__all__ = ["seeded"]


def seeded(*key: object) -> torch.Generator:
    """A generator whose state follows from ``key`` alone: the seed, what it is for, step, slot."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
