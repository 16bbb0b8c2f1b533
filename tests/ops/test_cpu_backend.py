"""The operations of backend "cpu" against float64, through the dispatcher."""

import pytest
import torch

from loftup.ops import attention_block, cpu, cross_attention, feed_forward, reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "PIXELS", 16)


def rand(*shape, dtype):
    return (torch.randn(*shape) * 0.5).to(dtype)


def norm(width, dtype):
    return torch.rand(width).add(0.5).to(dtype), rand(width, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pixels", "tokens", "depth"), [(1, 1, 11), (63, 7, 101), (40, 256, 133)])
def test_cross_attention(dtype, pixels, tokens, depth, check):
    q, k, v = (rand(2, 3, n, depth, dtype=dtype) for n in (pixels, tokens, tokens))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    truth = reference.cross_attention(q.double(), k.double(), v.double(), 0.2)
    check(cross_attention(q, k, v, scale=0.2, backend="cpu"), reference.cross_attention(q, k, v, 0.2), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pixels", "width"), [(1, 44), (63, 44), (35, 404)])
def test_attention_block_and_feed_forward(dtype, pixels, width, check):
    x = rand(2, pixels, width, dtype=dtype)
    k, v = (rand(2, 4, 9, width // 4, dtype=dtype) for _ in range(2))
    square = [rand(width, width, dtype=dtype) / width**0.5 for _ in range(2)]
    bias = [rand(width, dtype=dtype) for _ in range(2)]
    arguments = (x, *norm(width, dtype), square[0], bias[0], k, v, square[1], bias[1])
    wide = [tensor.double() for tensor in arguments]
    before = x.clone()
    check(
        attention_block(*arguments, scale=0.3, backend="cpu"),
        reference.attention_block(*arguments, 1e-5, 0.3),
        reference.attention_block(*wide, 1e-5, 0.3),
    )
    up, down = rand(width - 20, width, dtype=dtype) / 9, rand(width, width - 20, dtype=dtype) / 9
    arguments = (x, *norm(width, dtype), up, rand(width - 20, dtype=dtype), down, bias[0])
    wide = [tensor.double() for tensor in arguments]
    check(
        feed_forward(*arguments, backend="cpu"),
        reference.feed_forward(*arguments, 1e-5),
        reference.feed_forward(*wide, 1e-5),
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 2, 5, 11), (2, 2, 0, 11)])
def test_nothing_in_nothing_out(shape):
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 3, 11)
    assert cross_attention(q, k, k, backend="cpu").shape == shape
    x, vector, square = torch.zeros(shape[0], shape[2], 22), torch.ones(22), torch.eye(22)
    assert attention_block(x, vector, vector, square, vector, k, k, square, vector, backend="cpu").shape == x.shape
    assert feed_forward(x, vector, vector, square, vector, square, vector, backend="cpu").shape == x.shape


def test_autocast_changes_nothing():
    x, vector, square = torch.randn(1, 5, 22), torch.ones(22), torch.randn(22, 22)
    k = torch.randn(1, 2, 3, 11)
    arguments = (x, vector, vector, square, vector, k, k, square, vector)
    expected = attention_block(*arguments, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_block(*arguments, backend="cpu"), expected)
