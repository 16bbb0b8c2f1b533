"""What the operations accept, checked once for all backends; every message says got, expected, remedy."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_GRADIENTS = (
    "the Triton kernels compute no gradients and an argument requires one: "
    "use backend='torch' to train, or torch.no_grad()"
)


def check_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Of ``cross_attention``: q (B, heads, N, d); k and v (B, heads, T, d), T > 0; one dtype, one device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected (B, heads, rows, head width)")
    _check_alike(q=q, k=k, v=v)
    _check_tokens(k, v)
    if q.shape[0] != k.shape[0] or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        hint = ""
        if q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] and q.shape[3] == k.shape[3]:
            hint = "; were these laid out (B, rows, heads, d)? Then pass .transpose(1, 2)"
        raise ValueError(
            f"q has shape {_shape(q)}, k has {_shape(k)}: batch, heads and head width must agree, "
            f"only the rows may differ{hint}"
        )


def check_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k: Tensor,
    v: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> None:
    """Of ``attention_block``: x (B, N, D); k and v (B, heads, T, d); the weights as in ``reference``."""
    _check_stream(x)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected (B, heads, tokens, head width)")
    _check_alike(
        x=x, norm_weight=norm_weight, norm_bias=norm_bias, q_weight=q_weight, q_bias=q_bias, k=k, v=v,
        out_weight=out_weight, out_bias=out_bias,
    )  # fmt: skip
    _check_tokens(k, v)
    if k.shape[0] != x.shape[0]:
        raise ValueError(
            f"x is a batch of {x.shape[0]}, k of {k.shape[0]}: they must agree; expand k and v to share them"
        )
    model, inner = x.shape[2], k.shape[1] * k.shape[3]
    _check_shape("norm_weight", norm_weight, model)
    _check_shape("norm_bias", norm_bias, model)
    _check_shape("q_weight", q_weight, inner, model)
    _check_shape("q_bias", q_bias, inner)
    _check_shape("out_weight", out_weight, model, inner)
    _check_shape("out_bias", out_bias, model)


def check_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> None:
    """Of ``feed_forward``: x (B, N, D); the weights as in ``reference``."""
    _check_stream(x)
    _check_alike(
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        weight_1=weight_1,
        bias_1=bias_1,
        weight_2=weight_2,
        bias_2=bias_2,
    )
    if weight_1.ndim != 2:
        raise ValueError(f"weight_1 has shape {_shape(weight_1)}, expected (hidden, {x.shape[2]})")
    model, hidden = x.shape[2], weight_1.shape[0]
    _check_shape("norm_weight", norm_weight, model)
    _check_shape("norm_bias", norm_bias, model)
    _check_shape("weight_1", weight_1, hidden, model)
    _check_shape("bias_1", bias_1, hidden)
    _check_shape("weight_2", weight_2, model, hidden)
    _check_shape("bias_2", bias_2, model)


def check_guidance(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    frequencies: Tensor,
    phases: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    channels: int,
) -> None:
    """Of ``guidance``: shapes as in ``reference``, the Fourier code's parts in float32 or float64."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image has shape {_shape(image)}, expected (B, 3, H, W)")
    # In half precision the angles, which reach 22 026, would be off by whole turns.
    for name, tensor in (
        ("image", image),
        ("rows", rows),
        ("columns", columns),
        ("frequencies", frequencies),
        ("phases", phases),
    ):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} is {_short(tensor.dtype)}, the Fourier code is computed in float32: pass {name}.float()"
            )
    _check_alike(image=image, rows=rows, columns=columns, frequencies=frequencies, phases=phases)
    _check_alike(weight=weight, bias=bias)
    _check_devices(image=image, weight=weight)
    _check_dtype("dtype", dtype)
    if dtype == torch.float64 and image.dtype != torch.float64:
        raise TypeError(
            "dtype is float64, image is float32, whose code is computed in float32: pass image.double() and the rest"
        )
    _check_shape("rows", rows, image.shape[2])
    _check_shape("columns", columns, image.shape[3])
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies have shape {_shape(frequencies)}, expected one axis")
    code = 10 * frequencies.shape[0] + 3
    _check_shape("phases", phases, 2, 5, frequencies.shape[0])
    _check_shape("weight", weight, code)
    _check_shape("bias", bias, code)
    if channels < code:
        raise ValueError(f"channels is {channels}, the code has {code}: channels can only add zeros after them")


def check_head_norm(features: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Of ``head_norm``: features (B, N, C); weight and bias (C,); out (B, C, H, W), H * W = N, any float dtype."""
    _check_stream(features, "features")
    _check_alike(features=features, weight=weight, bias=bias)
    _check_devices(features=features, out=out)
    _check_dtype("out", out.dtype)
    batch, pixels, channels = features.shape
    if out.ndim != 4 or out.shape[0] != batch or out.shape[1] != channels or out.shape[2] * out.shape[3] != pixels:
        raise ValueError(
            f"out has shape {_shape(out)}, expected ({batch}, {channels}, H, W) with H * W = {pixels} pixels"
        )
    _check_shape("weight", weight, channels)
    _check_shape("bias", bias, channels)


def _check_tokens(k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k has shape {_shape(k)}, v has {_shape(v)}: they must be the same")
    if k.shape[2] == 0:
        raise ValueError(f"k has shape {_shape(k)}, no tokens to attend to: expected at least one")


def _check_stream(x: Tensor, name: str = "x") -> None:
    if x.ndim != 3:
        raise ValueError(
            f"{name} has shape {_shape(x)}, expected (B, pixels, channels); for a map: .flatten(2).transpose(1, 2)"
        )


def _check_alike(**tensors: Tensor) -> None:
    (first, model), *rest = tensors.items()
    _check_dtype(first, model.dtype)
    for name, tensor in rest:
        if tensor.dtype != model.dtype:
            raise TypeError(
                f"{name} is {_short(tensor.dtype)}, {first} is {_short(model.dtype)}: "
                "convert one of them, all must have one dtype"
            )
    _check_devices(**tensors)


def _check_devices(**tensors: Tensor) -> None:
    (first, model), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != model.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} is on {model.device}: move one of them")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} is {_short(dtype)}, expected float16, bfloat16, float32 or float64")


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected {tuple(shape)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
