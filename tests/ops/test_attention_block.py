"""LayerNorm, query projection, attention, output projection and residual as one operation."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loftup.errors import LoftUpError
from loftup.ops import attention_block, reference

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
    scale = tensors[5].shape[-1] ** -0.5
    plain, truth = (reference.attention_block(*each, eps, scale) for each in (tensors, [t.double() for t in tensors]))
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend_errs_at_most_twice_as_much_as_the_reference(dtype: torch.dtype, check: Check) -> None:
    tensors = make(44, 2, 63, 196, dtype, "cpu")
    check(attention_block(*tensors, backend="torch"), *plain_and_truth(tensors))


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
    for backend in ("reference", "torch"):
        result = attention_block(
            x, norm.weight, norm.bias, q_weight, q_bias, k, v, out.weight, out.bias, backend=backend
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
    check(result, *(reference.attention_block(*each, 2.0, -0.4) for each in (tensors, [t.double() for t in tensors])))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("batch", "pixels"), [(0, 5), (2, 0)])
def test_empty(batch: int, pixels: int, backend: str, device: str) -> None:
    out = attention_block(*make(44, batch, pixels, 7, torch.float32, device), backend=backend)
    assert out.shape == (batch, pixels, 44)


NAMES = ("x", "norm_weight", "norm_bias", "q_weight", "q_bias", "k", "v", "out_weight", "out_bias")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 44, 8, 8), r"x has shape \(2, 44, 8, 8\), expected \(B, pixels, channels\); for a map: .flatten"),
        ("x", (3, 63, 44), "x is a batch of 3, k of 2: they must agree; expand k and v"),
        ("norm_weight", (43,), r"norm_weight has shape \(43,\), expected \(44,\)"),
        ("norm_bias", (1,), r"norm_bias has shape \(1,\), expected \(44,\)"),
        ("q_weight", (132, 44), r"q_weight has shape \(132, 44\), expected \(44, 44\)"),
        ("q_bias", (132,), r"q_bias has shape \(132,\), expected \(44,\)"),
        ("k", (2, 7, 44), r"k has shape \(2, 7, 44\), expected \(B, heads, tokens, head width\)"),
        ("v", (2, 4, 6, 11), r"k has shape \(2, 4, 7, 11\), v has \(2, 4, 6, 11\): they must be the same"),
        ("out_weight", (44, 45), r"out_weight has shape \(44, 45\), expected \(44, 44\)"),
        ("out_bias", (45,), r"out_bias has shape \(45,\), expected \(44,\)"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = make(44, 2, 63, 7, torch.float32, "cpu")
    tensors[NAMES.index(name)] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        attention_block(*tensors)


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 0, 11\), no tokens to attend to: expected at least one"):
        attention_block(*make(44, 2, 63, 0, torch.float32, "cpu"))


def test_weights_of_another_dtype() -> None:
    tensors = make(44, 2, 63, 7, torch.float32, "cpu")
    tensors[3] = tensors[3].bfloat16()
    with pytest.raises(TypeError, match="q_weight is bfloat16, x is float32: convert one of them"):
        attention_block(*tensors)


def test_the_kernel_refuses_to_train(device: str) -> None:
    tensors = make(44, 2, 63, 7, torch.float32, device)
    tensors[3].requires_grad_()
    with pytest.raises(LoftUpError, match="compute no gradients and an argument requires one"):
        attention_block(*tensors, backend="triton")
    with pytest.raises(LoftUpError, match="compute no gradients"):
        torch.ops.loftup.attention_block(*tensors, 1e-5, 1.0)
    attention_block(*tensors).sum().backward()
    assert tensors[3].grad is not None
