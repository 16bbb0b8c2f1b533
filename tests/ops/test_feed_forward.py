"""LayerNorm, two linear layers, exact GELU and residual as one operation."""

import itertools
from collections.abc import Callable

import pytest
import torch
from flat import feed_forward
from torch import Tensor

Check = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# (model width, batch, pixels, dtype); the hidden layer is 20 narrower, as in the model.
CASES = [
    *((44, 2, n, dtype) for n, dtype in itertools.product((1, 63, 1000), DTYPES)),
    *((model, 1, n, dtype) for model, n, dtype in itertools.product((404, 532, 788), (1, 63), DTYPES)),
    (404, 1, 1000, torch.float16),
]


def make(model: int, batch: int, pixels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(model + pixels)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(device, dtype)

    hidden = model - 20
    return [
        normal(batch, pixels, model, std=2.0, mean=3.0),
        normal(model, std=0.1, mean=1.0),
        normal(model, std=0.1),
        normal(hidden, model, std=model**-0.5),
        normal(hidden),
        normal(model, hidden, std=hidden**-0.5),
        normal(model),
    ]


def plain_and_truth(tensors: list[Tensor], eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    plain, truth = (
        feed_forward(*each, eps=eps, backend="reference") for each in (tensors, [t.double() for t in tensors])
    )
    return plain, truth


@pytest.mark.parametrize(("model", "batch", "pixels", "dtype"), CASES)
def test_triton_errs_at_most_twice_as_much_as_pytorch(
    model: int, batch: int, pixels: int, dtype: torch.dtype, device: str, check: Check
) -> None:
    tensors = make(model, batch, pixels, dtype, device)
    x = tensors[0].clone()
    check(feed_forward(*tensors, backend="triton"), *plain_and_truth(tensors))
    assert torch.equal(x, tensors[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [44, 404, 532, 788, 1044])
def test_every_combination_on_the_gpu(model: int, dtype: torch.dtype, check: Check) -> None:
    for pixels in (1, 63, 1000):
        tensors = make(model, 2, pixels, dtype, "cuda")
        check(feed_forward(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_reference_is_the_modules_in_a_row() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.LayerNorm(44), torch.nn.Linear(44, 24), torch.nn.GELU(), torch.nn.Linear(24, 44)
    ).double()
    x = torch.randn(2, 63, 44, dtype=torch.float64)
    parameters = [parameter.detach() for parameter in layers.parameters()]
    torch.testing.assert_close(feed_forward(x, *parameters, backend="reference"), x + layers(x).detach())


def test_gelu_is_the_exact_one(device: str) -> None:
    # One hidden unit that passes a known value: tanh's approximation is off by up to 5e-4, the exact one is not.
    value = torch.linspace(-4, 4, 63, dtype=torch.float64)
    x = torch.zeros(63, 1, 2, device=device)
    x[:, 0, 0], x[:, 0, 1] = 1.0, -1.0  # whose LayerNorm is itself
    bias_1 = torch.zeros(1, device=device)
    zeros = torch.zeros(2, device=device)
    out = torch.cat(
        [
            feed_forward(
                x[i : i + 1], torch.ones(2, device=device), zeros, torch.tensor([[v, 0.0]], device=device), bias_1,
                torch.tensor([[1.0], [0.0]], device=device), zeros, eps=1e-12, backend="triton",
            )
            for i, v in enumerate(value.tolist())
        ]
    )  # fmt: skip
    expected = torch.nn.functional.gelu(value) + 1
    torch.testing.assert_close(out[:, 0, 0].double().cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(dtype: torch.dtype, device: str, check: Check) -> None:
    x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2 = make(44, 2, 63, dtype, device)
    tensors = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        norm_weight,
        norm_bias.repeat_interleave(2)[::2],
        weight_1.t().contiguous().t(),
        bias_1,
        torch.cat([weight_2, weight_2], dim=1)[:, 24:],
        bias_2.repeat_interleave(2)[::2],
    ]
    check(feed_forward(*tensors, backend="triton"), *plain_and_truth(tensors))
    # Rows of a padded stream.
    tensors[0] = torch.cat([x, x], dim=2)[..., :44]
    check(feed_forward(*tensors, backend="triton"), *plain_and_truth(tensors))


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    stride = 2**31 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(stride + 44, dtype=torch.float16, device=device)
    x = buffer.as_strided((1, 2, 44), (2 * stride, stride, 1))
    dense, *parameters = make(44, 1, 2, torch.float16, device)
    x.copy_(dense)
    expected = feed_forward(dense, *parameters, backend="triton")
    assert torch.equal(feed_forward(x, *parameters, backend="triton"), expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("batch", "pixels"), [(0, 5), (2, 0)])
def test_empty(batch: int, pixels: int, backend: str, device: str) -> None:
    assert feed_forward(*make(44, batch, pixels, torch.float32, device), backend=backend).shape == (batch, pixels, 44)
