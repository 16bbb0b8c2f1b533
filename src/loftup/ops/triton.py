"""Backend "triton": the kernels by name, as the dispatcher asks for them.

Each is also an operator of its own, ``torch.ops.loftup.<name>``, opaque to torch.compile and torch.export. They have no
gradients and say so in the forward pass, where the remedy still helps.
"""

from __future__ import annotations

from typing import Any

from ..errors import LoftUpError
from .arguments import NO_GRADIENTS
from .triton_attention import attention_block, cross_attention
from .triton_common import INTERPRETED as _INTERPRETED
from .triton_linear import feed_forward
from .triton_pixels import guidance, head_norm

__all__ = [
    "INTERPRETED",
    "attention_block",
    "cross_attention",
    "feed_forward",
    "guidance",
    "head_norm",
]

INTERPRETED: bool = _INTERPRETED.value


def _refuse(*_: Any, **__: Any) -> None:
    raise LoftUpError(NO_GRADIENTS)


for _operator in (attention_block, cross_attention, feed_forward, guidance):
    _operator.register_autograd(_refuse, setup_context=_refuse)
