"""The operations that LoftUp spends its time in, each with several backends; nothing here knows of models.

``reference`` says what each operation computes, ``dispatch`` checks arguments and chooses the backend.
"""

from .cpu import can_run_cpu
from .dispatch import (
    BACKENDS,
    attention_block,
    can_run_torch,
    can_run_triton,
    cross_attention,
    explain,
    feed_forward,
    guidance,
    head_norm,
)

__all__ = [
    "BACKENDS",
    "attention_block",
    "can_run_cpu",
    "can_run_torch",
    "can_run_triton",
    "cross_attention",
    "explain",
    "feed_forward",
    "guidance",
    "head_norm",
]
