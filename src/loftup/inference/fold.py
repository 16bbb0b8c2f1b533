"""The published network's weights folded for inference: fewer operations, the same function.

Batch norms go into the convolutions before them, the affine part of each LayerNorm into the linear layer behind it, the
softmax scale into the query projection. All of it exact in real numbers and done in float64. Nothing here touches the
network, its state dict or its training.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..inputs import capturing
from ..networks.config import LoftUpConfig
from ..networks.loftup import LoftUpNetwork
from ..ops.reference import Code, Pair

__all__ = ["FoldedBlock", "FoldedNetwork", "cached", "fold", "hooked_everywhere", "is_plain", "why_not_folded"]


@dataclass(frozen=True)
class FoldedBlock:
    """One cross-attention block, as linear layers (weight, bias) around plain normalisation."""

    query: Pair  # (D, D), with norm_q and the softmax scale d**-0.5
    key_value: Pair  # (2D, D), with norm_kv
    out: Pair  # (D, D)
    up: Pair  # (hidden, D), with the feed-forward's norm
    down: Pair  # (D, hidden)


@dataclass(frozen=True)
class FoldedNetwork:
    """All of a network, float64 on its device or the CPU, the code on its device; engines lay it out as they need."""

    heads: int
    halo: int  # of the stem, in pixels
    code: Code  # of the guidance, float32
    code_norm: Pair  # over the 10 F + 3 channels of the code
    conv1: Pair  # (D, 10 F + 3, 3, 3), with its batch norm
    conv2: Pair  # (D, D, 3, 3), with its batch norm
    blocks: tuple[FoldedBlock, ...]
    head: Pair | None  # (C, D), with the final norm; None for the learnable variant, which has no convolution
    final_norm: Pair | None  # in place of the head, for the learnable variant
    head_norm: Pair  # over C, eps 1e-6


def why_not_folded(network: LoftUpNetwork) -> str | None:
    """None where folding computes what the network's modules would, else the first module that it does not know.

    Known are exactly the modules that the config builds, with their settings, without hooks and methods of their own.
    """
    if hooked_everywhere():
        return "there are forward hooks on all modules"
    blueprint = _blueprint(network.config)
    module: nn.Module
    for name, module in network.named_modules():
        where = f"{name or 'the network'} is a {type(module).__name__}"
        kind, settings, tensors = blueprint.get(name, (None, "", []))
        if type(module) is not kind or module.extra_repr() != settings:
            return f"{where}({module.extra_repr()})" + (f", not {kind.__name__}({settings})" if kind else "")
        if tensors != _tensors(module):
            return f"{where} whose weights are no parameters"
        if not is_plain(module):
            return f"{where} with forward hooks or methods of its own"
    missing = blueprint.keys() - {name for name, _ in network.named_modules()}
    return f"{min(missing)} is missing" if missing else None


def is_plain(module: nn.Module) -> bool:
    """Tell whether calling a module runs its class's ``forward`` and nothing else."""
    overridden = any(hasattr(type(module), name) for name, value in vars(module).items() if callable(value))
    return not (module._forward_hooks or module._forward_pre_hooks or overridden)


def hooked_everywhere() -> bool:
    """Tell whether there are forward hooks on all modules."""
    return bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)


@functools.lru_cache(maxsize=8)
def _blueprint(config: LoftUpConfig) -> dict[str, tuple[type, str, list[str]]]:
    """Type, settings and names of the tensors of every module of a network as its config builds it."""
    with torch.device("meta"):
        network = LoftUpNetwork(config)
    return {name: (type(module), module.extra_repr(), _tensors(module)) for name, module in network.named_modules()}


def _tensors(module: nn.Module) -> list[str]:
    return [name for name, tensor in [*module._parameters.items(), *module._buffers.items()] if tensor is not None]


def fold(network: LoftUpNetwork) -> FoldedNetwork:
    """Fold a network for which :func:`why_not_folded` has no reason."""
    code: Any = network.fourier_feat[1]
    stem, transformer = network.first_conv, network.ca_transformer
    head = None
    head_norm: Any = network.final_conv
    if isinstance(head_norm, nn.Sequential):
        convolution: Any = head_norm[0]
        head = _behind_norm(transformer.norm, _double(convolution.weight).flatten(1), _double(convolution.bias))
        head_norm = head_norm[1]
    assert stem.halo is not None
    return FoldedNetwork(
        heads=network.config.heads,
        halo=stem.halo,
        code=(code.frequencies, code.biases.float()),
        code_norm=_affine(stem.norm.norm),
        conv1=_with_batch_norm(stem.conv1, stem.batch_norm1),
        conv2=_with_batch_norm(stem.conv2, stem.batch_norm2),
        blocks=tuple(_fold_block(block) for block in transformer.layers),
        head=head,
        final_norm=None if head else _affine(transformer.norm),
        head_norm=_affine(head_norm),
    )


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _affine(norm: Any) -> Pair:
    return _double(norm.weight), _double(norm.bias)


def _with_batch_norm(convolution: Any, norm: Any) -> Pair:
    scale = _double(norm.weight) / (_double(norm.running_var) + norm.eps).sqrt()
    bias = (_double(convolution.bias) - _double(norm.running_mean)) * scale + _double(norm.bias)
    return _double(convolution.weight) * scale[:, None, None, None], bias


def _behind_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Pair:
    scale, shift = _affine(norm)
    return weight * scale, bias + weight @ shift


def _fold_block(block: Any) -> FoldedBlock:
    attention, feed_forward = block
    projection = attention.attention
    weight, bias = _double(projection.in_proj_weight), _double(projection.in_proj_bias)
    width = weight.shape[1]
    scale = (width // projection.heads) ** -0.5
    norm, up, _, _, down = feed_forward.net
    return FoldedBlock(
        query=_behind_norm(attention.norm_q, weight[:width] * scale, bias[:width] * scale),
        key_value=_behind_norm(attention.norm_kv, weight[width:], bias[width:]),
        out=(_double(projection.out_proj.weight), _double(projection.out_proj.bias)),
        up=_behind_norm(norm, _double(up.weight), _double(up.bias)),
        down=(_double(down.weight), _double(down.bias)),
    )


Engine = TypeVar("Engine")


@dataclass
class _Entry:
    state: list[Tensor]  # a copy of all parameters and buffers that were folded
    marks: list[tuple[int, int]]  # where they were, and how often PyTorch had counted a change
    engines: dict[object, Any]


_CACHE: "weakref.WeakKeyDictionary[LoftUpNetwork, _Entry]" = weakref.WeakKeyDictionary()


def cached(
    network: LoftUpNetwork, key: object, make: Callable[[FoldedNetwork], Engine], compare: bool = True
) -> Engine:
    """The engine that ``make`` builds from the folded weights, kept as long as the weights stay bit for bit the same.

    The weights themselves are compared at every call, not addresses or version counters: fused optimizers, ``.data``,
    views by NumPy or DLPack, other processes and ``torch.func.functional_call`` change weights past all of these. For
    the 4.3 M parameters of C = 384 that takes 3 to 5 ms on a CPU, a tenth of the smallest image's time.

    Without ``compare``, and while a CUDA graph is captured, addresses and counters must do: a GPU is not waited for.
    """
    state = [*network.parameters(), *network.buffers()]
    # Outside inference mode, so that what is kept can be used in and out of it.
    with torch.inference_mode(False), torch.no_grad():
        entry = _CACHE.get(network)
        if entry is None or not _same(entry, state, compare and not capturing(state[0].device)):
            entry = _CACHE[network] = _Entry([tensor.detach().clone() for tensor in state], _marks(state), {})
        if key not in entry.engines:
            entry.engines[key] = make(fold(network))
        return entry.engines[key]  # type: ignore[no-any-return]


def _marks(state: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in state]


def _same(entry: _Entry, now: Sequence[Tensor], compare: bool) -> bool:
    before = entry.state

    def kind(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]

    if kind(before) != kind(now):
        return False
    if not compare:
        return entry.marks == _marks(now)
    # As whole numbers, so that NaN equals itself.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    pairs = [(a.view(bits[a.itemsize]), b.detach().view(bits[b.itemsize])) for a, b in zip(before, now, strict=True)]
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    return not bool(torch.stack([a.ne(b).any() for a, b in pairs]).any())  # one wait for the device
