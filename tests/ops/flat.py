"""The kernels and their references with all tensors in a row, as the tests make them."""

import torch
from torch import Tensor

from loftup.ops import reference


def _module(backend: str, name: str):
    if backend == "reference":
        return reference
    import importlib

    return importlib.import_module(f"loftup.ops.{name}")


def attention_block(x, norm_weight, norm_bias, q_weight, q_bias, k, v, out_weight, out_bias, *, eps=1e-5, scale=None,
                    backend="triton") -> Tensor:  # fmt: skip
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    function = _module(backend, "triton_attention").attention_block
    return function(x, (norm_weight, norm_bias), (q_weight, q_bias), k, v, (out_weight, out_bias), eps, scale)


def feed_forward(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, *, eps=1e-5, backend="triton"):
    function = _module(backend, "triton_linear").feed_forward
    return function(x, (norm_weight, norm_bias), (weight_1, bias_1), (weight_2, bias_2), eps)


def guidance(image, rows, columns, frequencies, phases, weight, bias, *, dtype: torch.dtype, eps=1e-5, channels=203,
             backend="triton") -> Tensor:  # fmt: skip
    function = _module(backend, "triton_pixels").guidance
    return function(image, rows, columns, (frequencies, phases), (weight, bias), eps, dtype, channels)


def head_norm(features, weight, bias, out, *, eps=1e-6, backend="triton") -> Tensor:
    _module(backend, "triton_pixels").head_norm(features, (weight, bias), out, eps)
    return out
