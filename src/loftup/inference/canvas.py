"""Where results go: ``out=``, ``head=``, points, memory budgets. Every stream writes through it."""

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import LoftUpError, translate
from ..networks.layers import Box
from .fold import hooked_everywhere, is_plain

__all__ = ["Canvas", "Head", "apply_head", "as_head", "budget", "plain_arithmetic", "sample", "too_small"]

Head = Callable[[Tensor], Tensor]
MEMORY = {"cuda": 384 * 2**20}
MEMORY_ELSEWHERE = 96 * 2**20
HUGE = 2**24  # bytes of a result from which huge pages pay
SAMPLES = 64  # pixels that a head is tried on
ELSEWHERE = "apply it to the result: head(up(features, image))"


def budget(memory: int | None, device: torch.device) -> int:
    """The bytes of working memory: those asked for, or the default of a device."""
    return MEMORY.get(device.type, MEMORY_ELSEWHERE) if memory is None else memory


def too_small(memory: int | None, limit: int, piece: str, needed: int) -> ValueError:
    """The error of a budget of ``limit`` bytes, where ``memory`` was asked for, that a piece of work exceeds."""
    given = f"memory={memory}" if memory is not None else f"the default of {limit}"
    return ValueError(
        f"{given} bytes do not hold the smallest {piece}, which takes {needed} bytes; give a larger memory="
    )


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """The context to compute in where the dtype is settled: no gradients, no autocast.

    On CUDA the device is the current one, which Triton launches its kernels on.
    """
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


class Canvas:
    """The result of one call, painted box by box, with the head applied on the way.

    The result is an ordinary tensor also inside ``torch.inference_mode``, so that a probe can be trained on it.

    Args:
        features: (B, C, h, w), straight from the backbone; the result has their dtype and device.
        size: (H, W) of the result.
        head: pointwise function of features, or None.
        out: tensor to write into, or None for a new one.

    Raises:
        ValueError: ``out`` has another shape than the result, or a dtype that does not hold it.
    """

    def __init__(self, features: Tensor, size: tuple[int, int], head: Head | None = None, out: Tensor | None = None):
        self.features, self.size, self.head, self.out = features, size, head, out
        self.channels = features.shape[1]
        self.result: Tensor | None = None
        self.dtype = features.dtype  # of the result, which may differ from that of ``out``
        if head is None:
            self._open((self.channels,), features.dtype, features.device)

    def values(self) -> Tensor:
        """Low-resolution values (B, E, h, w) to average, for a stream whose output averages the features.

        The features; or, for a linear head, its values for them: weights have sum 1, so a linear head of an average is
        the average of the head's values, and the canvas then needs no head any more.
        """
        if self.head is None or not len(self.features) or not _commutes_with_averages(self.head):
            return self.features
        values = apply_head(self.head, self.features).detach()
        self.head, self.channels = None, values.shape[1]
        self._open((self.channels,), values.dtype, values.device)
        return values

    @property
    def apart(self) -> bool:
        """Tell whether boxes may be made apart from the result, which takes memory beside it."""
        return self.head is not None or self.out is not None

    @property
    def in_threads(self) -> bool:
        """Tell whether boxes may be painted from several threads at once: a head of the user's own is called in one."""
        return self.head is None

    def paint(
        self,
        index: int,
        box: Box,
        write: Callable[[Tensor], None],
        arithmetic: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Paint a box of one image.

        Args:
            index: of the image in the batch.
            box: (top, left, bottom, right).
            write: writes the box's features into the tensor (C, bottom - top, right - left) that it is given, of any
                strides, dtype and device.
            arithmetic: the context to call ``write`` in; the head is applied as the caller has it, with gradients.
        """
        top, left, bottom, right = box
        if self.head is None:
            assert self.result is not None
            target = self.result[index, :, top:bottom, left:right]
            with arithmetic():
                write(target)
            self._check_written(target, None)
            return
        # Channels innermost, as linear heads and channels-last convolutions read them.
        band = self.features.new_empty(1, bottom - top, right - left, self.channels).movedim(-1, 1)
        with arithmetic():
            write(band[0])
        values = apply_head(self.head, band, check=self.result is None)
        result = self._open(tuple(values.shape[1:-2]), values.dtype, values.device)
        target = result[index, ..., top:bottom, left:right]
        target.copy_(values[0])
        self._check_written(target, values[0])

    def finish(self) -> Tensor:
        """The result, when all is painted."""
        if self.result is None:  # an empty batch
            assert self.head is not None
            values = apply_head(self.head, self.features.new_empty(0, self.channels, *self.size))
            self._open(tuple(values.shape[1:-2]), values.dtype, values.device)
        assert self.result is not None
        return self.result

    def _open(self, channels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = (len(self.features), *channels, *self.size)
        if self.result is None:
            with torch.inference_mode(False):
                self.result = _new(shape, dtype, device) if self.out is None else self.out
        if tuple(self.result.shape) != shape:
            raise ValueError(f"out has shape {tuple(self.result.shape)}, the result needs {shape}")
        if not torch.can_cast(dtype, self.result.dtype):
            raise ValueError(
                f"out is {self.result.dtype}, which does not hold the result's {dtype}; give one of {dtype}"
            )
        self.dtype = dtype
        return self.result

    def _check_written(self, target: Tensor, values: Tensor | None) -> None:
        """Raise ValueError where ``out`` does not hold what was written; ``values`` where they are not the features."""
        real = self.dtype.is_floating_point
        wider = real and torch.finfo(target.dtype).max >= torch.finfo(self.dtype).max
        if self.out is None or target.dtype == self.dtype or wider:
            return
        if values is None:
            lost = ~target.isfinite()
        else:
            back = target.to(values)
            lost = back.isfinite() != values.isfinite() if real else back != values
        if bool(lost.any()):
            raise ValueError(
                f"{int(lost.sum())} values of the result or more do not fit into out's {target.dtype}; give an out of "
                f"{self.dtype}"
            )


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; a large one on the CPU in huge pages, where the system (Linux) has them.

    Making 75 000 pages of 4 kB takes a third of the time of interpolating 384 channels to 448x448.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, OverflowError):  # no such pages, or no memory, which PyTorch says better
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape).detach()


def as_head(head: Any, features: Tensor) -> Any:
    """A head as a function: of a matrix (K, C) the linear layer of its rows in the features' dtype; others as they are.

    Raises:
        ValueError: a matrix or a linear head is not for the features' channels, or a matrix is on another device.
    """
    channels = features.shape[1]
    if isinstance(head, Tensor):
        if head.ndim != 2 or head.shape[1] != channels:
            raise ValueError(
                f"head is a tensor of shape {tuple(head.shape)}, expected (K, {channels}): a row for each text or class"
            )
        if head.device != features.device:
            raise ValueError(f"head is on {head.device}, the features on {features.device}; move it with .to()")
        head = head.to(features.dtype)
        if head.requires_grad and torch.is_grad_enabled():
            return lambda features: torch.einsum("bchw,kc->bkhw", features, head)
        linear = nn.Linear(channels, len(head), bias=False, device="meta")
        linear.weight = nn.Parameter(head, requires_grad=False)
        return linear
    width = head.in_features if isinstance(head, nn.Linear) else getattr(head, "in_channels", None)
    # Pairs, not unions, in what torch.compile sees: torch 2.4's does not know them.
    if isinstance(head, (nn.Linear, nn.Conv2d)) and width not in (channels, 0):  # 0: lazy, it takes what comes
        raise ValueError(f"head takes {width} channels, the features have {channels}; give one that was made for them")
    return head


def apply_head(head: Head, features: Tensor, check: bool = True) -> Tensor:
    """Apply a pointwise head to (B, C, n, m); returns (B, K, n, m) or (B, n, m).

    Args:
        head: the head.
        features: what it is applied to.
        check: try it on some pixels in other company, to see that it is pointwise.

    Raises:
        ValueError: the head returns another shape.
        LoftUpError: the head mixes positions.
    """
    if isinstance(head, nn.Module):
        for name, module in head.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise LoftUpError(
                    f"head must be pointwise, but its batch norm {name!r} is in training mode, so that a pixel's value "
                    f"depends on all others; call head.eval(), or {ELSEWHERE}"
                )
    values = _call(head, features)
    if check and not _is_linear(head) and not torch.compiler.is_compiling() and not torch._C._get_tracing_state():
        _check_pointwise(head, features, values)
    return values


def _check_pointwise(head: Head, features: Tensor, values: Tensor) -> None:
    rows, columns = features.shape[-2:]
    count = min(SAMPLES, rows * columns // 2)
    if not len(features) or not count:
        return
    pixels = torch.arange(count, device=features.device) * (rows * columns) // count
    y, x = pixels // columns, pixels % columns
    with torch.no_grad(), _without_dropout(head) as switched:
        if switched:
            values = _call(head, features)
        alone, found = features[:1, :, y, x][:, :, None], values[:1, ..., y, x].flatten()
        with translate(
            Exception, lambda error: f"head must be pointwise, but fails on pixels alone: {error}; {ELSEWHERE}"
        ):
            again = _call(head, alone).flatten()
        half = torch.is_autocast_enabled(features.device.type) or min(features.itemsize, values.itemsize) <= 2
        tolerance = 0.05 if half or not values.is_floating_point() else 0.01  # rounding, with TF32 too
        difference = _difference(found, again)
        if difference <= tolerance:
            return
        if _difference(again, _call(head, alone).flatten()) <= tolerance:  # else it is random itself
            raise LoftUpError(
                f"head must be pointwise, but gives pixels other values ({difference:.0%} away) beside other pixels; "
                f"{ELSEWHERE}"
            )


@contextmanager
def _without_dropout(head: Head) -> Iterator[bool]:
    """The context to compare a head's values in; tells whether it has dropout that is on elsewhere."""
    modules = head.modules() if isinstance(head, nn.Module) else ()
    active = [module for module in modules if isinstance(module, _DropoutNd) and module.training]
    try:
        for module in active:
            module.training = False
        yield bool(active)
    finally:
        for module in active:
            module.training = True


def _difference(first: Tensor, second: Tensor) -> float:
    """The root mean square difference of values over that of the first; for labels the share that differ."""
    if not first.is_floating_point():
        return float((first != second).float().mean())
    first, second = (x.cpu().double().nan_to_num(0, 0, 0) for x in (first, second))
    return float((first - second).norm() / first.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _call(head: Head, features: Tensor) -> Tensor:
    if isinstance(head, nn.Linear):
        return head(features.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
    values = head(features)
    batch, _, rows, columns = features.shape
    shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or shape not in ((batch, rows, columns), (batch, *shape[1:2], rows, columns)):
        raise ValueError(
            f"head must be pointwise: given {tuple(features.shape)} it must return ({batch}, K, {rows}, {columns}) or "
            f"({batch}, {rows}, {columns}), got {shape}"
        )
    return values


def _is_linear(head: Head) -> bool:
    """Tell whether a head is a plain linear layer of single pixels."""
    if type(head) is nn.Conv2d:
        linear = head.kernel_size == head.stride == (1, 1) and head.groups == 1 and head.padding == (0, 0)
    else:
        linear = type(head) is nn.Linear
    return linear and isinstance(head, nn.Module) and is_plain(head) and not hooked_everywhere()


def _commutes_with_averages(head: Head) -> bool:
    """Tell whether a head is linear, so that it may be applied to the cells in place of the pixels."""
    if not _is_linear(head) or not isinstance(head, nn.Module):
        return False
    # Where its parameters' gradients are wanted, the map is kept for them.
    return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()))


def sample(points: Tensor, size: tuple[int, int], most: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Features at points, interpolated bilinearly between the pixels around them.

    Args:
        points: (N, 2), (x, y) in pixels, inside the grid.
        size: (H, W) of the grid.
        most: pixels to compute at once.
        compute: flat pixel indices row * W + column, (n,) int64, to their features (n, C).

    Returns:
        (N, C), N > 0, in float32 at least.
    """
    exact = points.cpu() if points.device.type == "mps" else points  # which has no float64
    pixels, shares = _corners(exact.to(torch.float64), *size)
    if exact is not points:
        pixels, shares = pixels.to(points.device), shares.float().to(points.device)
    vectors = []
    for some in torch.arange(len(points), device=points.device).split(max(1, most // 4)):
        needed, position = pixels[some].unique(return_inverse=True)
        corners = compute(needed)
        corners = corners.to(torch.promote_types(corners.dtype, torch.float32))[position]
        vectors.append((corners * shares[some][..., None].to(corners.dtype)).sum(1))
    return torch.cat(vectors)


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The 4 pixels around each point (N, 2), as flat indices (N, 4), and their bilinear weights (N, 4)."""
    limit = points.new_tensor([width - 1, height - 1])
    low = points.floor().minimum(limit)
    high = (low + 1).minimum(limit)
    fraction = points - low
    xs = torch.stack([low[:, 0], high[:, 0]], 1)
    ys = torch.stack([low[:, 1], high[:, 1]], 1)
    across = torch.stack([1 - fraction[:, 0], fraction[:, 0]], 1)
    down = torch.stack([1 - fraction[:, 1], fraction[:, 1]], 1)
    pixels = ys.long()[:, :, None] * width + xs.long()[:, None, :]
    return pixels.flatten(1), (down[:, :, None] * across[:, None, :]).flatten(1)
