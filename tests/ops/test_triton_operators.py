"""The kernels as PyTorch operators: opaque to torch.compile and torch.export, their fakes true to shape and strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loftup import ops


def _cross_attention(device: str) -> tuple[Any, ...]:
    q, k, v = (torch.randn(2, rows, 3, 11, device=device).transpose(1, 2) for rows in (17, 7, 7))
    return q, k, v, 0.3


def _attention_block(device: str) -> tuple[Any, ...]:
    x = torch.randn(2, 17, 33, device=device)
    k, v = (torch.randn(2, 3, 7, 11, device=device) for _ in range(2))
    vector, square = torch.randn(33, device=device), torch.randn(33, 33, device=device)
    return x, vector, vector.clone(), square, vector.clone(), k, v, square.clone(), vector.clone(), 1e-5, 0.3


def _feed_forward(device: str) -> tuple[Any, ...]:
    x = torch.randn(2, 33, 17, device=device).transpose(1, 2)
    shapes = ((33,), (33,), (13, 33), (13,), (33, 13), (33,))
    return x, *(torch.randn(shape, device=device) for shape in shapes), 1e-5


def _guidance(device: str) -> tuple[Any, ...]:
    shapes = ((2, 3, 5, 4), (5,), (4,), (20,), (2, 5, 20), (203,), (203,))
    return *(torch.randn(shape, device=device) for shape in shapes), 1e-5, torch.bfloat16, 208


def _head_norm(device: str) -> tuple[Any, ...]:
    shapes = ((2, 20, 24), (24,), (24,), (2, 24, 5, 4))
    return *(torch.randn(shape, device=device) for shape in shapes), 1e-6


OPERATORS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "cross_attention": _cross_attention,
    "attention_block": _attention_block,
    "feed_forward": _feed_forward,
    "guidance": _guidance,
    "head_norm": _head_norm,
}
KEYWORDS: dict[str, tuple[str, ...]] = {
    "cross_attention": ("scale",),
    "attention_block": ("eps", "scale"),
    "feed_forward": ("eps",),
    "guidance": ("eps", "dtype", "channels"),
    "head_norm": ("eps",),
}


def split(name: str, device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    values = OPERATORS[name](device)
    count = len(KEYWORDS[name])
    return values[:-count], dict(zip(KEYWORDS[name], values[-count:], strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_its_promises_to_pytorch(name: str, device: str) -> None:
    pytest.importorskip("loftup.ops.triton")
    torch.library.opcheck(getattr(torch.ops.loftup, name).default, OPERATORS[name](device))


@pytest.mark.parametrize("name", ["cross_attention", "attention_block", "feed_forward", "guidance"])
def test_fake_has_the_shape_and_strides_of_the_result(name: str, device: str) -> None:
    pytest.importorskip("loftup.ops.triton")
    operator = getattr(torch.ops.loftup, name)
    arguments = OPERATORS[name](device)
    result = operator(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)


@pytest.mark.parametrize("backend", ["triton", "torch", None])
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_as_one_graph(name: str, backend: str | None, device: str) -> None:
    tensors, keywords = split(name, device)
    function = getattr(ops, name)

    def call(*tensors: Tensor) -> Tensor:
        result: Tensor = function(*tensors, **keywords, backend=backend)
        return result * 2

    torch._dynamo.reset()
    expected = call(*(tensor.clone() for tensor in tensors))
    # The names, not the code that an inductor would make of them, are what is tested here.
    result = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)  # without a name, eager runs "cpu" here


@pytest.mark.parametrize("name", OPERATORS)
def test_exports_by_name(name: str, device: str) -> None:
    tensors, keywords = split(name, device)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            result: Tensor = getattr(ops, name)(*tensors, **keywords, backend="triton")
            return result * 2

    expected = Module()(*(tensor.clone() for tensor in tensors))
    program = torch.export.export(Module(), tensors)
    assert f"torch.ops.loftup.{name}" in program.graph_module.code
    assert torch.equal(program.module()(*tensors), expected)


def test_compiles_for_images_of_any_size(device: str) -> None:
    function = torch.compile(
        lambda q, k, v: ops.cross_attention(q, k, v, backend="triton"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for pixels, tokens in ((17, 7), (40, 30)):
        q, k, v = (torch.randn(1, 2, rows, 11, device=device) for rows in (pixels, tokens, tokens))
        assert torch.equal(function(q, k, v), ops.cross_attention(q, k, v, backend="triton"))
