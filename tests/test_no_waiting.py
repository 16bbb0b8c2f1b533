"""Calls that never wait for a GPU: no value is read on the way, so that a CUDA graph can hold them."""

import contextlib

import pytest
import torch
from material import FARSIGHTED, inputs, randomised, universal

from loftup import LoftUpConfig

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MAKERS = pytest.mark.parametrize(
    "make",
    [lambda: randomised(LoftUpConfig(24)), lambda: universal(heads=3, radius=3, **FARSIGHTED)],
    ids=["loftup", "any"],
)


@pytest.fixture
def meta(monkeypatch):
    """Tensors without values: what reads one fails. PyTorch knows no autocast for them."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *arguments: False)
    return torch.device("meta")


@MAKERS
@pytest.mark.parametrize("size", [None, (40, 57)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read(make, size, dtype, meta):
    up = make().requires_grad_(False).to(meta)
    features, image = (x.to(meta) for x in inputs(2))
    with torch.inference_mode():
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            up(features.to(dtype), image, size)
        up.check_values = False
        for _ in range(2):  # weights are folded at the first call
            assert up(features.to(dtype), image, size).shape == (2, 24, *(size or (33, 46)))


def test_without_the_check_values_that_are_not_finite_go_through():
    up, (features, image) = universal(), inputs()
    features[0, 0, 0, 0] = torch.nan
    up.check_values = False
    with torch.inference_mode():
        assert up(features, image).isnan().any()


def test_without_the_check_counted_changes_of_weights_are_seen():
    up, (features, image) = randomised(LoftUpConfig(24)).requires_grad_(False), inputs()
    up.check_values = False
    first = up(features, image)
    assert torch.equal(up(features, image), first)
    next(up.upsampler.first_conv.parameters()).mul_(1.5)
    assert not torch.equal(up(features, image), first)


class TestOnAGpu:
    pytestmark = ON_GPU

    @MAKERS
    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_a_call_does_not_wait(self, make, backend):
        up = make().requires_grad_(False).cuda()
        up.check_values = False
        features, image = (x.cuda() for x in inputs(2))
        with torch.inference_mode():
            expected = up(features, image, backend=backend)  # prepares weights and kernels
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                result = up(features, image, backend=backend)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(result, expected)

    @MAKERS
    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_a_cuda_graph(self, make, backend):
        up = make().requires_grad_(False).cuda()
        first, second = ([x.cuda() for x in inputs()] for _ in range(2))
        with torch.inference_mode():
            expected = up(*second, backend=backend)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = up(*first, backend=backend)
            for held, new in zip(first, second, strict=True):
                held.copy_(new)
            graph.replay()
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
