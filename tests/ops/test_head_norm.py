"""The head's LayerNorm, written channel-first into a band of the result."""

import itertools
from collections.abc import Callable

import pytest
import torch
from flat import head_norm
from torch import Tensor

Check = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def make(batch: int, pixels: int, channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(pixels + channels)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(device, dtype)

    return [normal(batch, pixels, channels, std=2, mean=3), normal(channels, std=0.1, mean=1), normal(channels)]


def run(tensors: list[Tensor], out: Tensor, backend: str) -> Tensor:
    result = head_norm(*tensors, out, backend=backend)
    assert result is out
    return result


def plain_and_truth(tensors: list[Tensor], height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (tensors[0].shape[0], tensors[0].shape[2], height, width)
    plain = torch.zeros(shape, dtype=dtype, device=tensors[0].device)
    truth = torch.zeros(shape, dtype=torch.float64, device=tensors[0].device)
    head_norm(*tensors, plain, backend="reference")
    head_norm(*(tensor.double() for tensor in tensors), truth, backend="reference")
    return plain, truth


@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 7), (25, 40)])
@pytest.mark.parametrize(("channels", "dtype"), [*itertools.product((24, 384, 512, 768), DTYPES)])
def test_triton_errs_at_most_twice_as_much_as_pytorch(
    channels: int, height: int, width: int, dtype: torch.dtype, device: str, check: Check
) -> None:
    tensors = make(2, height * width, channels, dtype, device)
    out = torch.empty((2, channels, height, width), dtype=dtype, device=device)
    check(run(tensors, out, "triton"), *plain_and_truth(tensors, height, width, dtype))


def test_reference_is_the_layer_norm_of_each_pixel() -> None:
    features, weight, bias = (tensor.double() for tensor in make(1, 6, 4, torch.float32, "cpu"))
    out = torch.zeros(1, 4, 2, 3, dtype=torch.float64)
    head_norm(features, weight, bias, out, backend="reference")
    pixel = features[0, 5]
    variance = ((pixel - pixel.mean()) ** 2).mean()
    torch.testing.assert_close(out[0, :, 1, 2], (pixel - pixel.mean()) / (variance + 1e-6).sqrt() * weight + bias)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("layout", ["rows", "window", "channels last", "transposed"])
def test_only_the_band_is_written(layout: str, backend: str, device: str, check: Check) -> None:
    tensors = make(2, 63, 24, torch.bfloat16, device)
    canvas = torch.full((2, 24, 20, 20), torch.nan, device=device)
    if layout == "rows":
        canvas = canvas[..., :7].contiguous()
    elif layout == "channels last":
        canvas = canvas.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        canvas = canvas.transpose(2, 3)
    left = 0 if layout == "rows" else 5
    band = canvas[:, :, 3:12, left : left + 7]
    # float32 features from a bfloat16 module: rounded once, on the way out.
    check(run(tensors, band, backend), *plain_and_truth(tensors, 9, 7, torch.float32))
    band.fill_(torch.nan)
    assert canvas.isnan().all()


def test_strided_features(device: str, check: Check) -> None:
    features, weight, bias = make(2, 63, 24, torch.float32, device)
    tensors = [features.transpose(1, 2).contiguous().transpose(1, 2), weight.repeat_interleave(2)[::2], bias]
    out = torch.empty((2, 24, 9, 7), device=device)
    check(run(tensors, out, "triton"), *plain_and_truth(tensors, 9, 7, torch.float32))


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    # Three channels 2**30 elements apart in a buffer of which only the touched pages exist: the stride alone would fit
    # 32 bits, its product with the last channel does not.
    stride = 2**30 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(2 * stride + 63, dtype=torch.float16, device=device)
    tensors = make(1, 63, 3, torch.float16, device)
    expected = run(tensors, torch.zeros((1, 3, 9, 7), dtype=torch.float16, device=device), "triton")
    assert torch.equal(run(tensors, buffer.as_strided((1, 3, 9, 7), (3 * stride, stride, 7, 1)), "triton"), expected)


def test_eps_arrives(device: str) -> None:
    features, weight, bias = make(1, 63, 24, torch.float32, device)
    out, expected = (torch.zeros((1, 24, 9, 7), device=device) for _ in range(2))
    head_norm(features, weight, bias, out, eps=4.0, backend="triton")
    head_norm(features, weight, bias, expected, eps=4.0, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty(backend: str, device: str) -> None:
    assert run(make(0, 63, 24, torch.float32, device), torch.zeros((0, 24, 9, 7), device=device), backend).numel() == 0
    assert run(make(2, 0, 24, torch.float32, device), torch.zeros((2, 24, 0, 7), device=device), backend).numel() == 0
