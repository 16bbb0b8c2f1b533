"""The Fourier code of a band of the image and its LayerNorm."""

import math
from collections.abc import Callable

import pytest
import torch
from flat import guidance
from torch import Tensor

Check = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def make(batch: int, height: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(height + width)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(device)

    image = uniform(batch, 3, height, width, low=-0.5, high=0.5)
    # Bands of longer axes, the last row at 1: with the highest frequency the angle passes 22 026.
    rows = torch.linspace(-1, 1, 2 * height + 1)[height + 1 :].to(device)
    columns = torch.linspace(-1, 1, width + 3)[1:-2].to(device)
    frequencies = torch.exp(torch.linspace(-2, 10, 20)).to(device)
    phases = uniform(2, 5, 20, low=-math.pi, high=math.pi)
    weight, bias = uniform(203, low=0.5, high=1.5), uniform(203, low=-1, high=1)
    return [image, rows, columns, frequencies, phases, weight.to(dtype), bias.to(dtype)]


def truth(tensors: list[Tensor], eps: float = 1e-5) -> Tensor:
    """The definition once more, by index: angles rounded as float32 rounds them, all else in float64."""
    image, rows, columns, frequencies, phases, weight, bias = (tensor.cpu() for tensor in tensors)
    batch, _, height, width = image.shape
    values = [rows[:, None].expand(height, width), columns[None, :].expand(height, width)]
    result = torch.empty(batch, height, width, 203, dtype=torch.float64)
    flat = phases.flatten()
    for i in range(batch):
        for channel in range(100):
            frequency, value = divmod(channel, 5)
            product = (values[value] if value < 2 else image[i, value - 2]) * frequencies[frequency]
            result[i, :, :, channel] = (product + flat[channel]).double().sin()
            result[i, :, :, 100 + channel] = (product + flat[100 + channel]).double().cos()
        result[i, :, :, 200:] = image[i].permute(1, 2, 0).double()
    mean = result.mean(-1, keepdim=True)
    variance = ((result - mean) ** 2).mean(-1, keepdim=True)
    normed = (result - mean) / (variance + eps).sqrt() * weight.double() + bias.double()
    return normed.flatten(1, 2).to(tensors[0].device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 9, 7), (1, 25, 40)])
def test_triton_errs_at_most_twice_as_much_as_pytorch(
    batch: int, height: int, width: int, dtype: torch.dtype, device: str, check: Check
) -> None:
    tensors = make(batch, height, width, dtype, device)
    plain = guidance(*tensors, dtype=dtype, backend="reference")
    check(guidance(*tensors, dtype=dtype, backend="triton"), plain, truth(tensors))


def test_the_reference_computes_the_definition() -> None:
    tensors = make(2, 9, 7, torch.float32, "cpu")
    result = guidance(*tensors, dtype=torch.float32, backend="reference")
    torch.testing.assert_close(result.double(), truth(tensors), atol=3e-6, rtol=0)


def test_high_frequencies_are_exact_to_float32(device: str) -> None:
    # A sine taken without reducing a large angle first would be noise in the last frequencies.
    tensors = make(1, 25, 40, torch.float32, device)
    result = guidance(*tensors, dtype=torch.float32, backend="triton")
    last = [*range(95, 100), *range(195, 200)]
    torch.testing.assert_close(result[..., last].double(), truth(tensors)[..., last], atol=3e-6, rtol=0)


def test_zeros_after_the_code(device: str) -> None:
    tensors = make(1, 9, 7, torch.float32, device)
    padded = guidance(*tensors, dtype=torch.bfloat16, channels=208, backend="triton")
    assert padded.shape == (1, 63, 208)
    assert torch.equal(padded[..., :203], guidance(*tensors, dtype=torch.bfloat16, backend="triton"))
    assert torch.equal(padded[..., 203:], torch.zeros(1, 63, 5, dtype=torch.bfloat16, device=device))
    assert guidance(*tensors, dtype=torch.bfloat16, channels=208, backend="reference")[..., 203:].count_nonzero() == 0


def test_a_band_is_a_slice_of_the_whole(device: str) -> None:
    image, rows, *rest = make(2, 9, 7, torch.float32, device)
    whole = guidance(image, rows, *rest, dtype=torch.float32, backend="triton").unflatten(1, (9, 7))
    band = guidance(image[:, :, 4:7], rows[4:7], *rest, dtype=torch.float32, backend="triton").unflatten(1, (3, 7))
    assert torch.equal(band, whole[:, 4:7])
    alone = guidance(image[1:], rows, *rest, dtype=torch.float32, backend="triton").unflatten(1, (9, 7))
    assert torch.equal(alone, whole[1:])


def test_strides(device: str) -> None:
    image, rows, columns, *rest = make(2, 9, 7, torch.float32, device)
    expected = guidance(image, rows, columns, *rest, dtype=torch.float32, backend="triton")
    image = image.contiguous(memory_format=torch.channels_last)
    rows, columns = (axis.repeat_interleave(2)[::2] for axis in (rows, columns))
    assert torch.equal(guidance(image, rows, columns, *rest, dtype=torch.float32, backend="triton"), expected)
    shared = image[:1].expand(2, 3, 9, 7)
    twice = guidance(shared, rows, columns, *rest, dtype=torch.float32, backend="triton")
    assert torch.equal(twice, expected[:1].expand(2, -1, -1))


def test_float64_goes_through_the_reference() -> None:
    image, *rest = (tensor.double() for tensor in make(1, 9, 7, torch.float32, "cpu"))
    result = guidance(image, *rest, dtype=torch.float64, backend="reference")
    assert result.dtype == torch.float64
    # Angles in float64 differ from float32's by half their spacing, 0.001 at the top.
    near = guidance(image.float(), *(t.float() for t in rest), dtype=torch.float32, backend="reference")
    assert 1e-5 < (result - near).abs().max() < 1e-2


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("batch", "height"), [(0, 9), (1, 0)])
def test_empty(batch: int, height: int, backend: str, device: str) -> None:
    image, rows, *rest = make(1, 9, 7, torch.float32, device)
    out = guidance(image[:batch, :, :height], rows[:height], *rest, dtype=torch.float16, backend=backend)
    assert out.shape == (batch, height * 7, 203)
    assert out.dtype == torch.float16
