"""The attention of ``any`` in Triton against its plain definition, and that against the network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loftup.ops import reference
from loftup.ops.reference import Cells

Check = Callable[[Tensor, Tensor, Tensor], None]
# Heads, radius, depth, channels, (h, w), (H, W).
CASES = [
    (3, 3, 8, 40, (3, 4), (20, 31)),  # the packaged network's shape, sizes that nothing divides
    (3, 3, 8, 70, (1, 1), (1, 1)),
    (3, 3, 8, 5, (1, 1), (9, 13)),
    (3, 3, 8, 1, (5, 7), (3, 4)),  # cells without pixels
    (3, 3, 8, 3, (2, 9), (40, 4)),
    (1, 1, 3, 65, (2, 3), (24, 36)),
    (4, 2, 17, 64, (3, 2), (6, 30)),
]


@pytest.fixture
def kernels():
    return pytest.importorskip("loftup.ops.triton_windows")


def make(heads: int, radius: int, depth: int, channels: int, grid, size, device: str = "cpu", values: int = 0):
    generator = torch.Generator().manual_seed(heads + channels + size[0])

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device)

    def padded(table: Tensor, value: float = 0.0) -> Tensor:
        return torch.nn.functional.pad(table, (0, 0, *[radius] * 4), value=value)

    (h, w), rounds = grid, 1 + heads
    directions = torch.nn.functional.normalize(normal(h, w, channels), dim=-1)
    cells = Cells(
        padded(normal(h, w, rounds * depth)),
        padded(-normal(h, w, rounds).exp(), -1e9),
        normal(h, w, rounds).exp(),
        normal(h, w, heads).exp(),
        padded(directions),
        padded(normal(h, w, values or channels, std=3.0)),
    )
    return normal(*size, rounds * depth), normal(*size, heads).softmax(-1), cells


def double(cells: Cells) -> Cells:
    return Cells(*(table.double() for table in cells))


def part(x: Tensor, box) -> Tensor:
    top, left, bottom, right = box
    return x[top:bottom, left:right]


def by_reference(codes: Tensor, shares: Tensor, cells: Cells, size) -> tuple[Tensor, Tensor]:
    """Plain PyTorch's result in float32, and the truth."""
    results = []
    for c, s, each in ((codes, shares, cells), (codes.double(), shares.double(), double(cells))):
        out = c.new_empty(each.values.shape[-1], *size)
        reference.windows(c, s, each, (0, 0, *size), size, out)
        results.append(out)
    return results[0], results[1]


@pytest.mark.parametrize(("heads", "radius", "depth", "channels", "grid", "size"), CASES)
def test_windows_err_at_most_twice_as_much_as_pytorch(
    kernels, heads, radius, depth, channels, grid, size, device: str, check: Check
) -> None:
    codes, shares, cells = make(heads, radius, depth, channels, grid, size, device)
    out = torch.empty(channels, *size, device=device)
    kernels.windows(codes, shares, cells, (0, 0, *size), size, out)
    check(out, *by_reference(codes, shares, cells, size))


@pytest.mark.parametrize("box", [(0, 0, 20, 31), (0, 0, 1, 31), (5, 7, 6, 8), (3, 2, 17, 30), (19, 30, 20, 31)])
def test_a_box_is_a_part_of_the_whole(kernels, box, device: str) -> None:
    size = (20, 31)
    codes, shares, cells = make(3, 3, 8, 40, (3, 4), size, device, values=9)
    whole, out = torch.empty(9, *size, device=device), torch.empty(9, *part(codes, box).shape[:2], device=device)
    kernels.windows(codes, shares, cells, (0, 0, *size), size, whole)
    kernels.windows(part(codes, box), part(shares, box), cells, box, size, out)
    torch.testing.assert_close(out, whole[:, box[0] : box[2], box[1] : box[3]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_strides_and_dtypes_of_the_result(kernels, dtype, exact, device: str) -> None:
    size = (12, 11)
    codes, shares, cells = make(3, 3, 8, 20, (2, 3), size, device)
    _, truth = by_reference(codes, shares, cells, size)
    codes = codes.movedim(-1, 0).contiguous().movedim(0, -1)  # channels first in memory
    cells = cells._replace(values=cells.values.mT.contiguous().mT, keys=cells.keys.repeat_interleave(2, 0)[::2])
    out = torch.full((12, 11, 2 * 20), torch.nan, dtype=dtype, device=device)
    kernels.windows(codes, shares, cells, (0, 0, *size), size, out[..., ::2].permute(2, 0, 1))
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    assert (out[..., ::2].permute(2, 0, 1).double() - truth).abs().max() <= max(rounding, 1e-5 if exact else 1e-2)
    assert out[..., 1::2].isnan().all()


def test_nothing_to_do(kernels, device: str) -> None:
    codes, shares, cells = make(3, 3, 8, 4, (2, 3), (8, 9), device)
    kernels.windows(codes[:0], shares[:0], cells, (2, 0, 2, 9), (8, 9), torch.empty(4, 0, 9, device=device))
    mean = torch.zeros(2, 3, 32, device=device)
    kernels.pool(codes[:0], (2, 0, 2, 9), (8, 9), mean, mean)
    assert not mean.any()


def test_offsets_beyond_2_to_the_31(kernels, device: str) -> None:
    """Channels of the result and rows of codes whose strides fit 32 bits, but not five of them; few pages exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    size, stride = (5, 3), 2**29 + 16
    codes, shares, cells = make(1, 1, 3, 5, (1, 2), size, device)
    expected = torch.empty(5, *size, device=device)
    kernels.windows(codes, shares, cells, (0, 0, *size), size, expected)
    buffer = torch.empty(4 * stride + 64, dtype=torch.float16, device=device)
    out = buffer.as_strided((5, *size), (stride, 3, 1))
    kernels.windows(codes, shares, cells, (0, 0, *size), size, out)
    assert torch.equal(out, expected.half())
    far = torch.empty(4 * stride + 64, device=device).as_strided(codes.shape, (stride, 6, 1))
    far.copy_(codes)
    again, means = torch.empty_like(expected), torch.zeros(2, 2, 1, 2, 6, device=device)
    kernels.windows(far, shares, cells, (0, 0, *size), size, again)
    assert torch.equal(again, expected)
    for each, (mean, square) in zip((codes, far), means, strict=True):
        kernels.pool(each, (0, 0, *size), size, mean, square)
    assert torch.equal(means[0], means[1])


@pytest.mark.parametrize(("heads", "radius", "depth", "channels", "grid", "size"), CASES)
def test_pool_in_parts(kernels, heads, radius, depth, channels, grid, size, device: str, check: Check) -> None:
    codes = make(heads, radius, depth, channels, grid, size, device)[0]
    sums = [
        torch.zeros(2, *grid, codes.shape[-1], dtype=dtype, device=device) for dtype in (codes.dtype, torch.float64)
    ]
    plain = torch.zeros_like(sums[0])
    reference.pool(codes, (0, 0, *size), size, *plain)
    reference.pool(codes.double(), (0, 0, *size), size, *sums[1])
    half = size[0] // 2, size[1] // 3
    for top, bottom in ((0, half[0]), (half[0], size[0])):
        for left, right in ((0, half[1]), (half[1], size[1])):
            box = top, left, bottom, right
            kernels.pool(part(codes, box), box, size, *sums[0])
    check(sums[0], plain, sums[1])


@pytest.mark.parametrize(("heads", "radius", "depth", "channels", "grid", "size"), CASES)
def test_likeness(kernels, heads, radius, depth, channels, grid, size, device: str) -> None:
    directions = make(heads, radius, depth, channels, grid, size, device)[2].directions
    both = torch.stack([directions, 0.5 * directions])
    torch.testing.assert_close(kernels.likeness(both, radius), reference.likeness(both, radius), atol=1e-6, rtol=0)
