"""A LoftUp module's weights folded for inference: fewer operations, the same function.

Batch norms go into the convolutions before them, the affine part of each LayerNorm into the linear layer behind it, the
softmax scale into the query projection. All of it exact in real numbers and done in float64. Nothing here touches the
module, its state dict or its training.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model import LoftUp

__all__ = ["BlockWeights", "Weights", "cached", "fold", "forget"]

Pair = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True)
class BlockWeights:
    """One cross-attention block, as linear layers (weight, bias) around plain normalisation."""

    query: Pair  # (D, D), with norm_q and the softmax scale d**-0.5
    key_value: Pair  # (2D, D), with norm_kv
    out: Pair  # (D, D)
    up: Pair  # (hidden, D), with the feed-forward's norm
    down: Pair  # (D, hidden)


@dataclass(frozen=True)
class Weights:
    """All of a network, float64 on the module's device; engines lay it out as they need."""

    heads: int
    frequencies: Tensor  # (F,) float32, as the guidance code uses them
    biases: Tensor  # (2, 5, F) float32 phases as the checkpoint has them, to be read flat as (2, F, 5)
    code_norm: Pair  # over the 10 F + 3 channels of the code
    conv1: Pair  # (D, 10 F + 3, 3, 3), with its batch norm
    conv2: Pair  # (D, D, 3, 3), with its batch norm
    blocks: tuple[BlockWeights, ...]
    head: Pair | None  # (C, D), with the final norm; None for the learnable variant, which has no convolution
    final_norm: Pair | None  # in place of the head, for the learnable variant
    head_norm: Pair  # over C, eps 1e-6

    @property
    def phases(self) -> Tensor:
        """(2, 5, F) float32: by sine or cosine, value, frequency (see :class:`loftup.networks.layers.FourierCode`)."""
        return self.biases.reshape(2, -1, 5).transpose(1, 2).contiguous()

    @property
    def width(self) -> int:
        """D."""
        return self.conv2[0].shape[0]

    @property
    def channels(self) -> int:
        """C."""
        return self.head_norm[0].shape[0]

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.blocks[0].up[0].shape[0]


def fold(up: "LoftUp") -> Weights:
    """Fold a module in evaluation mode; see :class:`Weights`."""
    net = up.upsampler
    code: Any = net.fourier_feat[1]
    norm, conv1, bn1, _, conv2, bn2, _ = net.first_conv
    layers: Any = net.ca_transformer.layers
    blocks = tuple(_fold_block(attention, feed_forward) for attention, feed_forward in layers)
    final_norm: nn.LayerNorm = net.ca_transformer.norm
    head = None
    head_norm: Any = net.final_conv
    if isinstance(net.final_conv, nn.Sequential):
        convolution: Any = net.final_conv[0]
        head_norm = net.final_conv[1]
        head = _behind_norm(final_norm, convolution.weight.double().flatten(1), convolution.bias.double())
    return Weights(
        heads=up.config.heads,
        frequencies=code.frequencies,
        biases=code.biases.float(),
        code_norm=_affine(norm.norm),
        conv1=_with_batch_norm(conv1, bn1),
        conv2=_with_batch_norm(conv2, bn2),
        blocks=blocks,
        head=head,
        final_norm=None if head else _affine(final_norm),
        head_norm=_affine(head_norm),
    )


def _affine(norm: Any) -> Pair:
    return norm.weight.double(), norm.bias.double()


def _with_batch_norm(convolution: Any, norm: Any) -> Pair:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = (convolution.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    return convolution.weight.double() * scale[:, None, None, None], bias


def _behind_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Pair:
    scale, shift = _affine(norm)
    return weight * scale, bias + weight @ shift


def _fold_block(attention: Any, feed_forward: Any) -> BlockWeights:
    projection = attention.attention
    weight, bias = projection.in_proj_weight.double(), projection.in_proj_bias.double()
    width = weight.shape[1]
    scale = (width // projection.heads) ** -0.5
    norm, up, _, _, down = feed_forward.net
    return BlockWeights(
        query=_behind_norm(attention.norm_q, weight[:width] * scale, bias[:width] * scale),
        key_value=_behind_norm(attention.norm_kv, weight[width:], bias[width:]),
        out=(projection.out_proj.weight.double(), projection.out_proj.bias.double()),
        up=_behind_norm(norm, up.weight.double(), up.bias.double()),
        down=(down.weight.double(), down.bias.double()),
    )


Made = TypeVar("Made")
_CACHE: "weakref.WeakKeyDictionary[LoftUp, tuple[object, dict[object, Any]]]" = weakref.WeakKeyDictionary()


def cached(up: "LoftUp", key: object, make: Callable[[Weights], Made]) -> Made:
    """What ``make`` makes of the folded weights, kept until a parameter or buffer changes.

    Changes are seen by storage address and version counter: load_state_dict, an optimizer step, ``.to`` and every other
    in-place operation. Only writing through ``parameter.data`` escapes PyTorch's counters; call ``up.refresh()`` then.
    """
    state = (*up.parameters(), *up.buffers())
    if any(tensor.is_inference() for tensor in state):
        # Tensors made in inference mode have no version counter: nothing would tell of a change.
        with torch.no_grad():
            return make(fold(up))
    fingerprint = tuple((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in state)
    known, entries = _CACHE.get(up, (None, {}))
    if known != fingerprint:
        entries = {}
        _CACHE[up] = (fingerprint, entries)
    if key not in entries:
        # Outside inference mode, so that what is kept can be used in and out of it.
        with torch.inference_mode(False), torch.no_grad():
            entries[key] = make(fold(up))
    return entries[key]  # type: ignore[no-any-return]


def forget(up: "LoftUp") -> None:
    """Drop what is cached for a module."""
    _CACHE.pop(up, None)
