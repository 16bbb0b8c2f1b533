"""Random calls: valid ones give the untiled result, others one of our errors."""

import functools
import re
import warnings

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from material import LEARNABLE, SINE, randomised, universal
from torch import nn

from loftup import LoftUp
from loftup.inputs import resize_guidance

KINDS = {"sine": lambda: randomised(SINE), "learnable": lambda: randomised(LEARNABLE), "any": universal}
few = functools.partial(settings, deadline=None, derandomize=True, database=None)


@functools.cache
def network(kind: str) -> LoftUp:
    torch.manual_seed(0)
    return KINDS[kind]().requires_grad_(False)


@functools.cache
def head(kind: str):
    torch.manual_seed(1)
    probe = nn.Linear(24, 3)
    return {
        "none": None,
        "linear": probe,
        "conv": nn.Sequential(nn.Conv2d(24, 6, 1), nn.GELU(), nn.Conv2d(6, 3, 1)),
        "function": lambda f: f[:, :2].sigmoid() * f[:, 2:4],
        "plane": lambda f: f.square().sum(1),
        "labels": lambda f: f.argmax(1),
    }[kind]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place of memory."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "part":
        wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        return wide[..., ::2].copy_(x)
    return x.contiguous()


LAYOUTS = st.sampled_from(["plain", "channels last", "transposed", "part"])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
SIDES = st.integers(1, 40)


@st.composite
def calls(draw):
    """Inputs, options, and what ``out`` is to be."""
    shape = draw(st.integers(0, 2)), 24, draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    features = laid_out(torch.randn(shape, generator=generator).to(draw(DTYPES)), draw(LAYOUTS))
    image = torch.rand(shape[0], 3, draw(SIDES), draw(SIDES), generator=generator)
    image = laid_out(image * draw(st.sampled_from([1.0, 255.0])), draw(LAYOUTS))
    size = draw(st.none() | SIDES | st.tuples(SIDES, SIDES) | SIDES.map(numpy.int64))
    memory, backend = draw(st.none() | st.integers(0, 2**24)), draw(st.sampled_from([None, "torch"]))
    kinds = st.sampled_from(["none", "linear", "conv", "function", "plane", "labels"])
    where = st.sampled_from(["none", "tensor", "double", "array"])
    return features, image, size, memory, backend, draw(kinds), draw(where)


@given(st.sampled_from(list(KINDS)), calls())
@few(max_examples=120)
@torch.no_grad()
def test_valid_calls_equal_the_untiled_result(kind, call):
    features, image, size, memory, backend, chosen, where = call
    up, probe, dtype = network(kind), head(chosen), features.dtype
    pair = (size, size) if not isinstance(size, tuple | None) else size or image.shape[-2:]
    normal = up.channelnorm(features).to(up.upsampler.dtype)
    expected = up.upsampler(normal, resize_guidance(image, tuple(map(int, pair)))).to(dtype)
    if isinstance(probe, nn.Module):
        probe = probe.to(dtype)
    if probe is not None:
        linear = isinstance(probe, nn.Linear)
        expected = probe(expected.movedim(1, -1)).movedim(-1, 1) if linear else probe(expected)
    out = None
    if where == "tensor":
        out = torch.empty_like(expected).mT.contiguous().mT
    elif where == "double" or (where == "array" and dtype == torch.bfloat16):
        out = torch.empty(expected.shape, dtype=torch.float64 if expected.is_floating_point() else expected.dtype)
    elif where == "array":
        out = numpy.empty(expected.shape, expected.numpy().dtype)
    call = functools.partial(up, features, image, size, head=probe, out=out, backend=backend)
    try:
        made = call(memory=memory)
    except ValueError as error:
        needed = re.search("do not hold the smallest .*, which takes ([0-9]+) bytes", str(error))
        if needed is None:
            raise
        made = call(memory=int(needed[1]))
    if out is not None:
        assert made is out
    made = torch.from_numpy(made) if isinstance(made, numpy.ndarray) else made
    assert made.shape == expected.shape
    if not expected.is_floating_point():
        assert (made != expected).sum() <= 0.02 * expected.numel() + 1
        return
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
    scale = 1 + (expected.abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(made.to(dtype), expected, atol=tolerance * scale, rtol=0)


JUNK = [
    *(None, True, 0, -3, 2.5, float("nan"), 10**30, "x", "", b"x", [], [1], {}, (1, 2), (1, 2, 3), (True, 2)),
    *(object(), torch.float32, torch.device("cpu"), numpy.zeros((1, 24, 3, 3)), numpy.float64(3), nn.Identity()),
    *(torch.zeros(()), torch.zeros(3), torch.zeros(1, 24, 0, 3), torch.zeros(1, 3, 5, 5), torch.zeros(1, 24, 3, 3)),
    *(torch.zeros(2, 24, 3, 3), torch.zeros(1, 3, 4), torch.full((1, 3, 5, 5), torch.nan), torch.zeros(1, 1, 2)),
    *(torch.zeros(1, 24, 3, 3).to_sparse(), torch.zeros(1, 24, 3, 3, device="meta"), torch.zeros(1, 3, 5, 5).cfloat()),
    *(torch.zeros(1, 3, 5, 5, dtype=torch.uint8), torch.zeros(1, 24, 5, 5).to(torch.float8_e4m3fn)),
    *(
        torch.tensor([[[torch.inf, 0]]]),
        torch.ones(1, 1, 2, dtype=torch.bool),
        torch.zeros(1, 24, 1, 1).expand(1, 24, 5, 5),
    ),
]
ARGUMENTS = ["features", "image", "size", "head", "out", "memory", "backend", "points"]


@given(
    st.sampled_from(list(KINDS)),
    st.dictionaries(st.sampled_from(ARGUMENTS), st.integers(0, len(JUNK) - 1), min_size=1, max_size=3),
    st.booleans(),
)
@few(max_examples=600)
def test_other_arguments_raise_our_errors_or_none(kind, wrong, gradients):
    up = network(kind)
    arguments = {"features": torch.ones(1, 24, 3, 3), "image": torch.rand(1, 3, 5, 5)}
    if "points" in wrong:
        arguments["points"] = torch.zeros(1, 1, 2)
        wrong = {name: index for name, index in wrong.items() if name not in ("head", "out", "memory")}
    if gradients:
        arguments["features"].requires_grad_()
    arguments |= {name: JUNK[index] for name, index in wrong.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = (up.at if "points" in wrong else up)(**arguments)
        except (TypeError, ValueError) as error:
            made = error
    ours = re.compile("(the )?(features|image|size|head|out|memory|backend|points|unknown backend|[0-9]+ points|up.at)")
    assert isinstance(made, torch.Tensor | numpy.ndarray) or ours.match(str(made)), made
