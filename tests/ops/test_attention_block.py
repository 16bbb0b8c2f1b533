"""LayerNorm, query projection, attention, output projection and residual as one operation."""

import itertools
from collections.abc import Callable

import pytest
import torch
from flat import attention_block
from torch import Tensor

Check = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# (model width, batch, pixels, tokens, dtype), four heads.
CASES = [
    *((44, 2, n, t, dtype) for n, t, dtype in itertools.product((1, 63), (1, 7, 196, 256), DTYPES)),
    *((44, 1, 1000, t, dtype) for t, dtype in ((7, torch.bfloat16), (196, torch.float16), (1, torch.float32))),
    (44, 1, 63, 1369, torch.float32),
    (404, 1, 63, 256, torch.bfloat16),
    (404, 1, 1, 7, torch.float16),
    (404, 1, 130, 1, torch.bfloat16),
    (404, 1, 63, 196, torch.float32),
    (532, 1, 1, 256, torch.float16),
    (532, 1, 63, 7, torch.bfloat16),
    (532, 1, 1, 1369, torch.float16),
    (532, 1, 33, 7, torch.float32),
    (788, 1, 63, 196, torch.bfloat16),
    (788, 1, 1, 7, torch.float16),
    (788, 1, 17, 7, torch.float32),
]


def make(model: int, batch: int, pixels: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(model + pixels + tokens)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(device, dtype)

    k, v = (normal(batch, tokens, 4, model // 4).transpose(1, 2) for _ in range(2))
    weights = [normal(model, model, std=model**-0.5) for _ in range(2)]
    biases = [normal(model) for _ in range(2)]
    norm = [normal(model, std=0.1, mean=1.0), normal(model, std=0.1)]
    # A mean that is large beside the deviation: LayerNorm must subtract before it multiplies.
    return [normal(batch, pixels, model, std=2.0, mean=3.0), *norm, weights[0], biases[0], k, v, weights[1], biases[1]]


def plain_and_truth(tensors: list[Tensor], eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    plain, truth = (
        attention_block(*each, eps=eps, backend="reference") for each in (tensors, [t.double() for t in tensors])
    )
    return plain, truth


@pytest.mark.parametrize(("model", "batch", "pixels", "tokens", "dtype"), CASES)
def test_triton_errs_at_most_twice_as_much_as_pytorch(
    model: int, batch: int, pixels: int, tokens: int, dtype: torch.dtype, device: str, check: Check
) -> None:
    tensors = make(model, batch, pixels, tokens, dtype, device)
    x = tensors[0].clone()
    check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))
    assert torch.equal(x, tensors[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [44, 404, 532, 788, 1044])
def test_every_combination_on_the_gpu(model: int, dtype: torch.dtype, check: Check) -> None:
    for pixels, tokens in itertools.product((1, 63, 1000), (1, 7, 196, 256, 1369)):
        tensors = make(model, 2, pixels, tokens, dtype, "cuda")
        check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_reference_is_the_module_of_the_published_code() -> None:
    # The checkpoints hold the weights of nn.MultiheadAttention, keys and values projected by its middle and last third.
    torch.manual_seed(0)
    norm, attention = torch.nn.LayerNorm(44).double(), torch.nn.MultiheadAttention(44, 4, batch_first=True).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    torch.nn.init.normal_(attention.out_proj.bias)
    x, tokens = torch.randn(2, 63, 44, dtype=torch.float64), torch.randn(2, 7, 44, dtype=torch.float64)
    expected = x + attention(norm(x), tokens, tokens, need_weights=False)[0]
    q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
    k, v = (
        torch.nn.functional.linear(tokens, weight, bias).view(2, 7, 4, 11).transpose(1, 2)
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    out = attention.out_proj
    result = attention_block(
        x, norm.weight, norm.bias, q_weight, q_bias, k, v, out.weight, out.bias, backend="reference"
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(dtype: torch.dtype, device: str, check: Check) -> None:
    # A channel-first stream, a third of a joint projection, transposed and strided parameters, shared keys.
    x, norm_weight, norm_bias, q_weight, q_bias, k, v, out_weight, out_bias = make(44, 2, 63, 7, dtype, device)
    tensors = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        norm_weight.repeat_interleave(2)[::2],
        norm_bias,
        torch.cat([out_weight, q_weight, out_weight])[44:88],
        q_bias.repeat_interleave(2)[::2],
        k[:1].expand(2, -1, -1, -1),
        v.flip(2),
        out_weight.t().contiguous().t(),
        out_bias,
    ]
    check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))
    tensors[3] = q_weight.t().contiguous().t()
    check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_heads_may_be_narrower_than_the_stream(device: str, check: Check) -> None:
    x, norm_weight, norm_bias, q_weight, q_bias, k, v, out_weight, out_bias = make(44, 1, 63, 7, torch.float32, device)
    tensors = [x, norm_weight, norm_bias, q_weight[:22], q_bias[:22], k[:, :2], v[:, :2], out_weight[:, :22], out_bias]
    check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_eps_and_scale_arrive(device: str, check: Check) -> None:
    tensors = make(44, 1, 63, 7, torch.float32, device)
    result = attention_block(*tensors, eps=2.0, scale=-0.4, backend="triton")
    expected = (
        attention_block(*each, eps=2.0, scale=-0.4, backend="reference")
        for each in (tensors, [t.double() for t in tensors])
    )
    check(result, *expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("batch", "pixels"), [(0, 5), (2, 0)])
def test_empty(batch: int, pixels: int, backend: str, device: str) -> None:
    out = attention_block(*make(44, batch, pixels, 7, torch.float32, device), backend=backend)
    assert out.shape == (batch, pixels, 44)


def test_large_scores_neither_overflow_nor_vanish(device: str, check: Check) -> None:
    # The largest score comes last: the running maximum must rescale what was summed before.
    tensors = make(44, 1, 5, 200, torch.float32, device)
    tensors[5] = tensors[5] * torch.linspace(0, 400, 200, device=device)[:, None]
    check(attention_block(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_a_pixel_depends_on_nothing_but_itself(device: str) -> None:
    x, *norm_and_query, k, v, weight, bias = make(44, 2, 130, 70, torch.bfloat16, device)
    whole = attention_block(x, *norm_and_query, k, v, weight, bias, backend="triton")
    part = attention_block(x[1:, 100:117], *norm_and_query, k[1:], v[1:], weight, bias, backend="triton")
    assert torch.equal(part, whole[1:, 100:117])


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    # Two pixels 2**31 elements apart in a buffer of which only the touched pages exist.
    stride = 2**31 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(stride + 44, dtype=torch.float16, device=device)
    dense, *others = make(44, 1, 2, 7, torch.float16, device)
    x = buffer.as_strided((1, 2, 44), (2 * stride, stride, 1))
    x.copy_(dense)
    expected = attention_block(dense, *others, backend="triton")
    assert torch.equal(attention_block(x, *others, backend="triton"), expected)


def test_tf32_only_where_allowed(device: str) -> None:
    kernels = pytest.importorskip("loftup.ops.triton_common")
    assert kernels.dot_precision(torch.float32) == "tf32x3"
    assert kernels.dot_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert kernels.dot_precision(torch.float32) == "tf32"
