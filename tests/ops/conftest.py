"""Triton kernels run compiled on a CUDA device, else in Triton's interpreter, which tests/conftest.py turns on."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()


def _why_no_interpreter() -> str | None:
    try:
        from loftup.ops.triton_common import INTERPRETED
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None if INTERPRETED.value else "triton was imported before tests/conftest.py could turn its interpreter on"


INTERPRETER_REASON = _why_no_interpreter()


ON_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(INTERPRETER_REASON is not None, reason=str(INTERPRETER_REASON)), id="interpreter"
)
ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")


@pytest.fixture(params=[ON_CUDA if CUDA else ON_CPU])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test of the Triton kernels runs: compiled on the GPU, or on CPU tensors in the interpreter."""
    return str(request.param)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: a pixel that no kernel wrote, or padding that one read, then shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32, whatever a test before this one asked for."""
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def check() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Assert that a result errs at most twice as much as plain PyTorch in the same dtype, both against float64.

    Where plain PyTorch is exact by luck (one token, one pixel), one rounding of the largest value is allowed.
    """

    def check(result: Tensor, plain: Tensor, truth: Tensor) -> None:
        assert truth.dtype == torch.float64
        assert result.shape == plain.shape == truth.shape
        assert result.dtype == plain.dtype
        error, plain_error = ((tensor.double() - truth).abs().max().item() for tensor in (result, plain))
        rounding = torch.finfo(plain.dtype).eps / 2 * truth.abs().max().item()
        # Written so that a NaN fails.
        assert error <= max(2 * plain_error, rounding), f"error {error:.3g}, plain PyTorch {plain_error:.3g}"

    return check
