"""Cross-attention: each backend against the float64 reference, at the published models' widths and at ugly sizes."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loftup.errors import LoftUpError
from loftup.ops import cross_attention, reference

Check = Callable[[Tensor, Tensor, Tensor], None]
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)

# (head width, heads, batch, pixels, tokens, dtype). The narrow heads take every combination; the wide ones, slow in the
# interpreter, see each value of each axis, and 133 alone goes through the kernel's second, narrower block of columns.
CASES = [
    *((11, 2, 2, n, t, dtype) for n, t, dtype in itertools.product((1, 63), (1, 7, 196, 256, 1369), DTYPES)),
    *((11, 1, 1, 1000, t, dtype) for t, dtype in ((1, torch.float32), (256, torch.bfloat16), (1369, torch.float16))),
    *((101, 2, 1, 63, t, torch.bfloat16) for t in (1, 7, 196, 256)),
    (101, 1, 1, 1000, 196, torch.float16),
    (101, 1, 1, 1, 1369, torch.float32),
    (101, 4, 2, 63, 7, torch.float32),
    *((133, 2, 1, 63, t, torch.float16) for t in (1, 7, 196, 256)),
    (133, 1, 1, 1000, 7, torch.bfloat16),
    (133, 1, 1, 63, 1369, torch.bfloat16),
    (133, 4, 2, 1, 196, torch.float32),
    (197, 1, 1, 63, 256, torch.bfloat16),
    (197, 1, 1, 1000, 7, torch.float16),
    (197, 1, 1, 1, 1369, torch.bfloat16),
    (197, 4, 2, 63, 1, torch.float32),
    (300, 1, 1, 63, 196, torch.bfloat16),
    (300, 1, 1, 63, 7, torch.float32),
]


def make(d: int, heads: int, batch: int, pixels: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v as a model has them: (B, N, heads, d) in memory."""
    generator = torch.Generator().manual_seed(d + pixels + tokens)
    shapes = [(batch, rows, heads, d) for rows in (pixels, tokens, tokens)]
    return [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]


def plain_and_truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return reference.cross_attention(q, k, v, scale), reference.cross_attention(
        q.double(), k.double(), v.double(), scale
    )


@pytest.mark.parametrize(("d", "heads", "batch", "pixels", "tokens", "dtype"), CASES)
def test_triton_errs_at_most_twice_as_much_as_pytorch(
    d: int, heads: int, batch: int, pixels: int, tokens: int, dtype: torch.dtype, device: str, check: Check
) -> None:
    q, k, v = make(d, heads, batch, pixels, tokens, dtype, device)
    check(cross_attention(q, k, v, backend="triton"), *plain_and_truth(q, k, v, d**-0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [11, 101, 133, 197, 261, 512])
def test_every_combination_on_the_gpu(d: int, dtype: torch.dtype, check: Check) -> None:
    for pixels, tokens in itertools.product((1, 63, 1000), (1, 7, 196, 256, 1369)):
        q, k, v = make(d, 4, 2, pixels, tokens, dtype, "cuda")
        check(cross_attention(q, k, v, backend="triton"), *plain_and_truth(q, k, v, d**-0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [11, 101, 133])
def test_torch_backend_errs_at_most_twice_as_much_as_the_reference(d: int, dtype: torch.dtype, check: Check) -> None:
    q, k, v = make(d, 4, 2, 63, 196, dtype, "cpu")
    check(cross_attention(q, k, v, backend="torch"), *plain_and_truth(q, k, v, d**-0.5))


def test_reference_by_hand() -> None:
    # Scores 0 and ln 3 give the weights 1/4 and 3/4.
    q = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[0.0, 5.0], [math.log(3), 5.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[4.0, 0.0], [8.0, 4.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[7.0, 3.0]]]], dtype=torch.float64)
    torch.testing.assert_close(cross_attention(q, k, v, scale=1, backend="reference"), expected)


@pytest.mark.parametrize("layout", ["heads first", "pixels last", "every other", "expanded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(layout: str, dtype: torch.dtype, device: str, check: Check) -> None:
    q, k, v = make(12, 2, 2, 63, 70, dtype, device)
    if layout == "heads first":
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    elif layout == "pixels last":
        q, k, v = (tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (q, k, v))
    elif layout == "every other":
        q, k, v = (tensor[:, :, ::2, 1::2] for tensor in (q, k, v))
    else:
        q, k, v = q[:1, :, :, :1].expand(3, 2, 63, 12), k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    scale = 0.3
    check(cross_attention(q, k, v, scale=scale, backend="triton"), *plain_and_truth(q, k, v, scale))


def test_offsets_beyond_2_to_the_31(device: str) -> None:
    # Two pixels 2**31 elements apart in a buffer of which only the touched pages exist.
    stride = 2**31 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(stride + 11, dtype=torch.float16, device=device)
    q = buffer.as_strided((1, 1, 2, 11), (stride, stride, stride, 1))
    dense, k, v = make(11, 1, 1, 2, 7, torch.float16, device)
    q.copy_(dense)
    expected = cross_attention(dense, k, v, backend="triton")
    assert torch.equal(cross_attention(q, k, v, backend="triton"), expected)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale: float, device: str, check: Check) -> None:
    q, k, v = make(11, 2, 1, 63, 100, torch.float32, device)
    check(cross_attention(q, k, v, scale=scale, backend="triton"), *plain_and_truth(q, k, v, scale))


def test_large_scores_neither_overflow_nor_vanish(device: str, check: Check) -> None:
    # The largest score comes last: the running maximum must rescale what was summed before.
    q, k, v = make(16, 1, 1, 5, 200, torch.float32, device)
    k = k * torch.linspace(0, 400, 200, device=device)[:, None]
    check(cross_attention(q, k, v, backend="triton"), *plain_and_truth(q, k, v, 0.25))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("batch", "pixels"), [(0, 5), (2, 0), (0, 0)])
def test_empty(batch: int, pixels: int, backend: str, device: str) -> None:
    q, k, v = make(11, 2, batch, pixels, 7, torch.float32, device)
    out = cross_attention(q, k, v, backend=backend)
    assert out.shape == (batch, 2, pixels, 11)
    assert out.dtype == torch.float32


def test_a_pixel_depends_on_nothing_but_itself(device: str) -> None:
    q, k, v = make(11, 2, 2, 130, 70, torch.bfloat16, device)
    whole = cross_attention(q, k, v, backend="triton")
    assert torch.equal(cross_attention(q[1:, :, 100:117], k[1:], v[1:], backend="triton"), whole[1:, :, 100:117])


def test_the_heads_join_without_a_copy(device: str) -> None:
    out = cross_attention(*make(11, 2, 2, 63, 7, torch.float32, device), backend="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_tf32_only_where_allowed(device: str) -> None:
    kernels = pytest.importorskip("loftup.ops.triton_common")
    assert kernels.dot_precision(torch.float32) == "ieee"
    assert kernels.dot_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert kernels.dot_precision(torch.float32) == "tf32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q has shape \(2, 63, 11\), expected \(B, heads, rows, head width\)"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), r"k has shape \(2, 2, 0, 11\), no tokens to attend to"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"k has shape \(2, 2, 7, 11\), v has \(2, 2, 6, 11\)"),
        (lambda q, k, v: (q, k[:1], v[:1]), r"q has shape \(2, 2, 63, 11\), k has \(1, 2, 7, 11\): batch, heads"),
        (lambda q, k, v: (q[:, :, :7], *(t.transpose(1, 2) for t in (k, v))), "head width must agree, only the rows"),
    ],
)
def test_wrong_shapes(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_attention(*change(*make(11, 2, 2, 63, 7, torch.float32, "cpu")))


def test_swapped_axes_are_named() -> None:
    q, k, v = torch.zeros(2, 4, 63, 11), torch.zeros(2, 5, 7, 11), torch.zeros(2, 5, 7, 11)
    with pytest.raises(ValueError, match=r"only the rows may differ$"):
        cross_attention(q, k, v)
    q, k, v = torch.zeros(2, 63, 4, 11), torch.zeros(2, 7, 4, 11), torch.zeros(2, 7, 4, 11)
    with pytest.raises(ValueError, match=r"laid out \(B, rows, heads, d\)\? Then pass .transpose\(1, 2\)"):
        cross_attention(q, k, v)


def test_wrong_dtypes() -> None:
    q, k, v = make(11, 2, 2, 63, 7, torch.float32, "cpu")
    with pytest.raises(TypeError, match="k is float16, q is float32: convert one of them"):
        cross_attention(q, k.half(), v)
    with pytest.raises(TypeError, match="q is int64, expected float16, bfloat16, float32 or float64"):
        cross_attention(q.long(), k.long(), v.long())


def test_wrong_devices() -> None:
    q, k, v = make(11, 2, 2, 63, 7, torch.float32, "cpu")
    with pytest.raises(ValueError, match="k is on meta, q is on cpu: move one of them"):
        cross_attention(q, k.to("meta"), v)


def test_the_kernel_refuses_to_train(device: str) -> None:
    q, k, v = make(11, 2, 2, 63, 7, torch.float32, device)
    v = v.detach().requires_grad_()
    with pytest.raises(LoftUpError, match="compute no gradients and an argument requires one: use backend='torch'"):
        cross_attention(q, k, v, backend="triton")
    with pytest.raises(LoftUpError, match="compute no gradients"):
        torch.ops.loftup.cross_attention(q, k, v, 1.0)
    with torch.no_grad():
        frozen = cross_attention(q, k, v, backend="triton")
    trained = cross_attention(q, k, v)
    trained.sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(frozen, trained)
