"""Which backend runs, and the reasons given where one cannot."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loftup.errors import LoftUpError
from loftup.ops import BACKENDS, can_run_cpu, can_run_torch, can_run_triton, cross_attention, dispatch, explain


def make(dtype: torch.dtype = torch.float32, d: int = 11, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros(1, 2, rows, d, dtype=dtype, device=device) for rows in (5, 7, 7))
    return q, k, v


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the dispatcher see a GPU of a given compute capability."""

    def see(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))

    return see


def test_every_backend_has_every_operation(device: str) -> None:
    for backend in BACKENDS.values():
        for operation in ("cross_attention", "attention_block", "feed_forward", "guidance", "head_norm"):
            assert callable(getattr(backend.load(), operation))


def test_the_choice_on_the_cpu() -> None:
    assert can_run_torch(*make()) is None
    assert can_run_cpu(*make()) is None
    assert explain("cross_attention", *make()).startswith("cross_attention on cpu in float32 runs on 'cpu'\n")
    assert explain("cross_attention", *make(torch.float16)).splitlines()[2:] == [
        "  cpu: it computes in float32 and bfloat16, not float16",
        "  torch: chosen",
        "  reference: only if named",
    ]
    q, k, v = (tensor.requires_grad_() for tensor in make())
    with pytest.raises(LoftUpError, match="cannot run on backend='cpu': it computes no gradients: use backend='torch'"):
        cross_attention(q, k, v, backend="cpu")


def test_triton_runs_on_a_gpu_if_named(fake_gpu: Callable[..., None], device: str) -> None:
    fake_gpu(9, 0)
    with FakeTensorMode():
        tensors = make(torch.bfloat16, device="cuda")
        assert explain("cross_attention", *tensors).splitlines() == [
            "cross_attention on cuda:0 in bfloat16 runs on 'torch'",
            "  triton: only if named",
            "  cpu: the tensors are on cuda:0",
            "  torch: chosen",
            "  reference: only if named",
        ]
        assert explain("cross_attention", *tensors, backend="triton").splitlines()[:2] == [
            "cross_attention on cuda:0 in bfloat16 runs on 'triton'",
            "  triton: chosen",
        ]


def test_what_the_kernels_cannot_do_falls_to_torch_and_is_explained(fake_gpu: Callable[..., None], device: str) -> None:
    fake_gpu(7, 5)
    with FakeTensorMode():
        lines = explain("cross_attention", *make(torch.float16, device="cuda")).splitlines()
    assert lines[:3] == [
        "cross_attention on cuda:0 in float16 runs on 'torch'",
        "  triton: this GPU has compute capability 7.5, the Triton kernels need 8.0 (Ampere) or newer",
        "  cpu: the tensors are on cuda:0",
    ]


def test_the_interpreter_runs_only_if_named(device: str) -> None:
    if device != "cpu":
        pytest.skip("the kernels are compiled here")
    assert can_run_triton(*make()) is None
    assert "triton: only if named" in explain("cross_attention", *make())
    assert explain("cross_attention", *make(), backend="triton").startswith(
        "cross_attention on cpu in float32 runs on 't"
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (make(torch.float64), "the Triton kernels take float16, bfloat16 and float32, not float64"),
        (make(d=513), "heads are 513 wide, the Triton kernels hold at most 512"),
        (make(device="meta"), "Triton kernels need CUDA tensors, these are on meta"),
    ],
)
def test_a_named_backend_is_refused_with_the_reason(tensors: tuple[Tensor, ...], message: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("CPU tensors are refused for being on the CPU")
    with pytest.raises(LoftUpError, match=f"cross_attention cannot run on backend='triton': {message}"):
        cross_attention(*tensors, backend="triton")
    with pytest.raises(LoftUpError, match=message):
        explain("cross_attention", *tensors, backend="triton")


def test_the_head_width_of_a_block_is_that_of_its_keys(device: str) -> None:
    stream, keys = torch.zeros(1, 5, 600, device=device), torch.zeros(1, 1, 7, 600, device=device)
    vector, square = torch.zeros(600, device=device), torch.zeros(600, 600, device=device)
    tensors = (stream, vector, vector, square, vector, keys, keys, square, vector)
    with pytest.raises(LoftUpError, match="heads are 600 wide"):
        explain("attention_block", *tensors, backend="triton")
    # A stream as wide as that is no obstacle in itself.
    assert can_run_triton(stream) is None


def test_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        LoftUpError, match=r"need CUDA tensors, these are on cpu \(set TRITON_INTERPRET=1 to test on a CPU\)"
    ):
        cross_attention(*make(), backend="triton")


def test_the_interpreter_turned_on_too_late(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    assert can_run_triton(*make()) == "TRITON_INTERPRET was set after triton was imported: set it before Python starts"


def test_triton_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def fail(error: ImportError) -> Callable[[], None]:
        def load() -> None:
            raise error

        return load

    monkeypatch.setattr(dispatch, "_load_triton", fail(ModuleNotFoundError("no", name="triton.language")))
    assert can_run_triton(*make()) == "triton is not installed"
    monkeypatch.setattr(dispatch, "_load_triton", fail(ImportError("libcuda is of another age")))
    assert can_run_triton(*make()) == "triton cannot be imported: libcuda is of another age"
    # A module of ours that is missing is a fault to see, not a reason to run elsewhere.
    monkeypatch.setattr(dispatch, "_load_triton", fail(ModuleNotFoundError("no", name="loftup.ops.triton_linear")))
    with pytest.raises(ModuleNotFoundError):
        can_run_triton(*make())


def test_other_makers_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch._why_not_this_gpu(0) == "the Triton kernels are written for NVIDIA GPUs"


def test_unknown_backend() -> None:
    with pytest.raises(
        LoftUpError, match=r"backend is 'cutlass', expected one of 'triton', .*'torch', 'reference' or None"
    ):
        cross_attention(*make(), backend="cutlass")


def test_the_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="backend is 'cutlass'"):
        explain("cross_attention", *make(), backend="cutlass")


def loads_triton(*lines: str) -> bool:
    program = "\n".join(["import sys", *lines, "print('triton' in sys.modules)"])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1] == "True"


USE = (
    "import torch, loftup.ops",
    "q = torch.ones(1, 1, 2, 3)",
    "assert loftup.ops.cross_attention(q, q, q).shape == q.shape",
)


def test_the_import_and_a_call_on_the_cpu_leave_triton_alone() -> None:
    assert not loads_triton(*USE)


def test_the_test_above_can_fail() -> None:
    pytest.importorskip("triton")
    assert loads_triton(*USE, "import loftup.ops.triton")


def test_all_works_where_triton_is_not_installed() -> None:
    # None in sys.modules makes every import of triton fail.
    absent = (
        "sys.modules['triton'] = None",
        "import os; os.environ['TRITON_INTERPRET'] = '1'",
        *USE,
        "assert 'triton: triton is not installed' in loftup.ops.explain('cross_attention', q, q, q)",
    )
    assert loads_triton(*absent)  # the None
