"""Compile the launches of the Triton kernels for Hopper on a machine without a GPU; run by test_triton_compiles.py.

Prints one JSON line a kernel: its name, what ptxas says of it and what its PTX holds. Launches are redirected to
Triton's warm-up, which compiles and does not run, under a driver that names the target.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITY = 90


class Driver:
    """The part of a driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def describe(name: str, compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        ptxas = triton.knobs.nvidia.ptxas.path
        log = subprocess.run(
            [ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{CAPABILITY}a", source, "-o", f"{source}.o"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return {
        "kernel": name,
        "shared": compiled.metadata.shared,
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", log)), default=0),
        "wgmma": ptx.count("wgmma.mma_async"),
        "copies of 16 bytes": len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10\b", ptx)),
        "approximate sine": bool(re.search(r"(sin|cos)\.approx", ptx)),
        "fused": compiled.metadata.enable_fp_fusion,
    }


def main(widths: list[int], dtype: torch.dtype) -> None:
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps(describe(self.fn.__name__, compiled)), flush=True)
        return compiled

    JITFunction.run = compile_only
    from flat import attention_block, feed_forward, guidance, head_norm
    from test_window_kernels import make

    from loftup.ops import triton_windows

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for d in widths:
        model, hidden = 4 * d, 4 * d - 20
        x, k, vector = zeros(1, 512, model), zeros(1, 250, 4, d).transpose(1, 2), zeros(model)
        square = zeros(model, model)
        attention_block(x, vector, vector, square, vector, k, k, square, vector)
        feed_forward(x, vector, vector, zeros(hidden, model), zeros(hidden), zeros(model, hidden), vector)
        head_norm(zeros(1, 512, hidden), zeros(hidden), zeros(hidden), zeros(1, hidden, 16, 32))
    floats = [torch.zeros(shape) for shape in ((1, 3, 16, 32), (16,), (32,), (20,), (2, 5, 20))]
    guidance(*floats, zeros(203), zeros(203), dtype=dtype)
    size, exact = (112, 140), dtype == torch.float32
    codes, shares, cells = make(3, 3, 8, 384, (8, 10), size)
    triton_windows.windows(codes, shares, cells, (0, 0, *size), size, zeros(384, *size), exact)
    triton_windows.pool(codes, (0, 0, *size), size, *torch.zeros(2, 8, 10, 32))
    triton_windows.likeness(cells.directions[None], 3)


if __name__ == "__main__":
    main([int(width) for width in sys.argv[2:]], getattr(torch, sys.argv[1]))
