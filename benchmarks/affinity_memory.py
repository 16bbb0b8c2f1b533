"""Peak memory of the affinity loss, forward and backward, above its two inputs.

    python benchmarks/affinity_memory.py

On CUDA as torch's allocator counts it, on the CPU as the growth of the process's peak resident set.
"""

import argparse
import platform
import resource

import torch

from loftup.train.objective.distances import affinity_loss

UNIT = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes


def main() -> None:
    """Print the number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=299, help="of the map in pixels")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    warm = torch.randn(1, options.channels, 8, 8, device=device, requires_grad=True)
    affinity_loss(warm, torch.randn_like(warm)).backward()
    shape = (1, options.channels, options.side, options.side)
    student, teacher = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    loss = affinity_loss(student, teacher)
    loss.backward()
    above = (peak(device) - before) / 2**20
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{options.side}x{options.side}, C={options.channels}, {where}, torch {torch.__version__}: {above:.0f} MiB "
        f"above two inputs of {student.nbytes / 2**20:.0f} MiB, the gradient among them (loss {loss.detach():.6f})"
    )


def peak(device: torch.device) -> int:
    """Bytes at the peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


if __name__ == "__main__":
    main()
