"""The processes of a run, and batch statistics over the pictures of all of them."""

import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # each process needs the gradients of all

from ...errors import LoftUpError, translate
from ...model import LoftUp

__all__ = ["Processes", "SynchronisedBatchNorm2d", "synchronise_batch_norm"]

T = TypeVar("T")


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are those of all processes' batches together.

    As ``torch.nn.SyncBatchNorm``, but on the CPU too. Needs an initialised process group, affine parameters, running
    statistics and a fixed momentum. State dicts are those of ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W), in the dtype of ``x``; statistics are float32."""
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(torch.promote_types(x.dtype, torch.float32))
            count = all_reduce(values.new_tensor(x.numel() // x.shape[1]))
            # In two passes: the mean of squares less the square of the mean would lose digits.
            mean: Tensor = all_reduce(values.sum((0, 2, 3))) / count
            centred = values - mean[:, None, None]
            variance: Tensor = all_reduce(centred.square().sum((0, 2, 3))) / count
            scale = self.weight * torch.rsqrt(variance + self.eps)
            result = centred * scale[:, None, None] + self.bias[:, None, None]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return result.to(x.dtype)


def synchronise_batch_norm(up: LoftUp) -> None:
    """Let the stem's batch norms take their statistics over all processes; parameters and buffers stay the same."""
    stem: Any = up.upsampler.first_conv
    for index, norm in enumerate(stem):
        if isinstance(norm, nn.BatchNorm2d):
            together = SynchronisedBatchNorm2d(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
            together.weight, together.bias = norm.weight, norm.bias
            for name, buffer in norm.named_buffers():
                setattr(together, name, buffer)
            stem[index] = together.train(norm.training)


class Processes:
    """The processes of a run, through accelerate: one, or as many as ``torchrun`` or ``accelerate launch`` started.

    Raises:
        LoftUpError: accelerate is missing (extra ``train``).

    Attributes:
        device: of this process.
        rank: its number.
        world: how many there are.
        main: whether it is the one that writes and speaks.
    """

    def __init__(self) -> None:
        with translate(ImportError, 'training needs accelerate: pip install "loftup[train]"'):
            from accelerate import Accelerator, DistributedDataParallelKwargs
        self._initialised = dist.is_initialized()
        gpu = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
        # Buffers are the same everywhere: statistics are frozen or taken together.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        # On the CPU accelerate has to be told, or processes started by torchrun would not know of each other.
        # The config decides about precision, not the launcher.
        self._accelerator = Accelerator(cpu=not gpu, mixed_precision="no", kwargs_handlers=[options])
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.main: bool = self._accelerator.is_main_process
        self.no_sync = self._accelerator.no_sync
        self.prepare = self._accelerator.prepare

    def seed(self, seed: int) -> None:
        """Seed Python's, numpy's and torch's global generators, alike in all processes."""
        from accelerate.utils import set_seed

        set_seed(seed)

    def say(self, text: str) -> None:
        """Print a line to standard error, past a progress bar; the main process alone."""
        if self.main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do the same in every process, first in one of each machine: what it downloads the others find."""
        with self._accelerator.local_main_process_first():
            return work()

    def from_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process alone; its result, or its LoftUpError, reaches all."""
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except LoftUpError as error:
                if self.world == 1:
                    raise
                outcome[1] = str(error)
        if self.world > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise LoftUpError(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process; a LoftUpError of one reaches all."""
        outcome, reason = None, ""
        try:
            outcome = work()
        except LoftUpError as error:
            if self.world == 1:
                raise
            reason = str(error)
        if reasons := list(filter(None, self.gather(reason))):
            raise LoftUpError(reasons[0])
        return outcome  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        from accelerate.utils import gather_object

        return gather_object([value])  # type: ignore[no-any-return]

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        if self.world == 1:
            return values.cpu()
        return self._accelerator.reduce(values.to(self.device), "sum").cpu()  # type: ignore[no-any-return]

    def clip(self, parameters: list[nn.Parameter], norm: float | None) -> Tensor:
        """Scale the gradients down to a norm; returns the norm that they had. None only measures."""
        before = self._accelerator.clip_grad_norm_(parameters, math.inf if norm is None else norm)
        return torch.as_tensor(before).detach()

    def end(self) -> None:
        """Take down what this object has set up between the processes."""
        if not self._initialised:
            self._accelerator.end_training()
