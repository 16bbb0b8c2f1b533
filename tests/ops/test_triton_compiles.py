"""What Triton makes of the kernels for Hopper: the interpreter shows that they are right, this that they fit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def compile_for_hopper(dtype: str, *widths: int, cache: Path) -> list[dict[str, Any]]:
    knobs = pytest.importorskip("triton.knobs", reason="names the ptxas that came with triton")
    if not Path(knobs.nvidia.ptxas.path).exists():
        pytest.skip("this triton came without ptxas")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).parent / "cross_compile.py"), dtype, *map(str, widths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "widths"), [("bfloat16", (101, 133, 197)), ("float32", (101,))])
def test_kernels_fit_hopper(dtype: str, widths: tuple[int, ...], tmp_path: Path) -> None:
    kernels = compile_for_hopper(dtype, *widths, cache=tmp_path)
    attention = [kernel for kernel in kernels if kernel["kernel"] == "_attention_block_kernel"]
    assert len(attention) == len(widths)
    for kernel in kernels:
        assert kernel["shared"] <= 227 * 1024, kernel
        # ptxas gives up a few bytes for occupancy where it sees fit; what hurts is hundreds.
        assert kernel["spilled"] <= 32, kernel
        assert not kernel["approximate sine"], kernel
    for kernel in attention:
        # The tokens come in by asynchronous copies of the widest kind; products by Hopper's own instruction, in float32
        # by three of TF32.
        assert kernel["copies of 16 bytes"], kernel
        assert kernel["wgmma"], kernel
    for kernel in kernels:
        if kernel["kernel"] in ("_linear_kernel", "_windows_kernel"):
            assert kernel["wgmma"], kernel
        # The angles are rounded twice, as PyTorch rounds them.
        assert kernel["fused"] == (kernel["kernel"] != "_guidance_kernel"), kernel
