"""Means of upsampled features within regions, summed on the way: the dense map never exists."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Size, output_size
from ..networks.layers import Box
from .canvas import Canvas

__all__ = ["VOID", "Regions", "read_masks"]

AT_ONCE = 2**22  # weights of regions on pixels that are made at once
VOID = 255  # a label of 8 bits that belongs to no region


class Regions(Canvas):
    """A canvas that keeps sums over regions in place of the map.

    Sums are float64, so that they do not depend on the order in which threads add to them.

    Args:
        features: (B, C, h, w), straight from the backbone; the means have their dtype and device.
        masks: as :func:`read_masks` gives them.
        count: the number of regions N.
    """

    apart = True

    def __init__(self, features: Tensor, masks: Tensor, count: int) -> None:
        self.features, self.masks, self.count = features, masks, count
        self.size = masks.shape[-2], masks.shape[-1]
        self.channels, self.head, self.out, self.result = features.shape[1], None, None, None
        self.dtype = torch.promote_types(features.dtype, torch.float32)
        exact = torch.float32 if features.device.type == "mps" else torch.float64
        with torch.inference_mode(False):
            self.sums = features.new_zeros(len(features), count, self.channels, dtype=exact)
            self.totals = self.sums.new_zeros(len(features), count)
        self.lock = threading.Lock()

    def values(self) -> Tensor:
        """The features: there is no head."""
        return self.features

    def paint(
        self,
        index: int,
        box: Box,
        write: Callable[[Tensor], None],
        arithmetic: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Add a box of one image to the sums; see :meth:`Canvas.paint`. A box without regions is not computed."""
        top, left, bottom, right = box
        part = self.masks[index if len(self.masks) > 1 else 0, ..., top:bottom, left:right]
        with arithmetic():
            regions = self._regions_of(part)
            if not len(regions):
                return
            # Channels innermost, as a matrix product reads them.
            band = part.new_empty(bottom - top, right - left, self.channels, dtype=self.dtype)
            write(band.movedim(-1, 0))
            pixels = band.flatten(0, 1)
            for some in regions.split(max(1, AT_ONCE // len(pixels))):
                chosen = part == some[:, None, None] if self.labelled else part.index_select(0, some)
                weights = chosen.flatten(1).to(self.dtype)
                sums, totals = (weights @ pixels).to(self.sums), weights.sum(1, dtype=self.sums.dtype)
                with self.lock:
                    self.sums[index].index_add_(0, some, sums)
                    self.totals[index].index_add_(0, some, totals)

    @property
    def labelled(self) -> bool:
        """Tell whether masks are a map of labels."""
        return self.masks.ndim == 3

    def _regions_of(self, part: Tensor) -> Tensor:
        """Indices of the regions to add; on a CPU those with pixels in the part alone: a GPU would be waited for."""
        if part.device.type != "cpu":
            return torch.arange(self.count, device=part.device)
        if not self.labelled:
            return part.flatten(1).any(1).nonzero()[:, 0]
        labels: Tensor = part.unique().long()
        return labels[labels >= 0]

    def finish(self) -> Tensor:
        """The means (B, N, C), when all is painted; NaN where a region is empty."""
        with torch.inference_mode(False), torch.no_grad():
            return (self.sums / self.totals[..., None]).to(self.features.dtype)


def read_masks(
    masks: Tensor, features: Tensor, size: Size = None, count: int | None = None, values: bool = True
) -> tuple[Tensor, int]:
    """Bring masks or labels to the form that :class:`Regions` takes.

    Args:
        masks: as for :meth:`loftup.LoftUp.regions`.
        features: (B, C, h, w).
        size: to bring them to; None leaves their own.
        count: regions of a map of labels; None means up to its largest label.
        values: whether to look at the values.

    Returns:
        Bool or float weights (B or 1, N, H, W), or labels (B or 1, H, W) of a signed type in which a negative one
        belongs to no region; and N.

    Raises:
        TypeError: no tensor, or no bool, float or integer one.
        ValueError: another shape or device; a weight that is negative or not finite; a label beyond ``count``; or a
            gradient is wanted.
    """
    if not isinstance(masks, Tensor):
        raise TypeError(
            f"masks must be a tensor, got {type(masks).__name__}; for an array: torch.from_numpy(masks), for a list of "
            "masks: torch.stack(masks)"
        )
    if masks.is_complex():
        raise TypeError(f"masks must be bool, float weights or integer labels, got {masks.dtype}")
    if masks.device != features.device:
        raise ValueError(f"masks are on {masks.device}, the features on {features.device}; move them with .to()")
    if masks.requires_grad and torch.is_grad_enabled():
        raise ValueError("masks require a gradient, which up.regions does not give; pass masks.detach()")
    labelled = not masks.is_floating_point() and masks.dtype != torch.bool
    dimensions, batch = (3 if labelled else 4), len(features)
    whole = masks[None] if masks.ndim == dimensions - 1 else masks
    if whole.ndim != dimensions or len(whole) not in (1, batch) or 0 in whole.shape[-2:]:
        expected = "labels (B, H, W) or (H, W)" if labelled else "masks (B, N, H, W) or (N, H, W)"
        remedy = "; for a single mask: masks[None]" if masks.ndim == 2 else ""
        remedy = "; for masks of 0 and 1: masks.bool()" if labelled else remedy
        raise ValueError(f"expected {expected} with B = {batch}, got {masks.dtype} of {tuple(masks.shape)}{remedy}")
    size = (whole.shape[-2], whole.shape[-1]) if size is None else output_size(size, features)
    return _read_labels(whole, size, count, values) if labelled else _read_weights(whole, size, count, values)


def _read_weights(masks: Tensor, size: tuple[int, int], count: int | None, values: bool) -> tuple[Tensor, int]:
    if count is not None:
        raise ValueError(f"count={count} is for a map of labels, but there are {masks.shape[1]} masks; leave it out")
    if values and masks.dtype != torch.bool and masks.numel() and not bool(((masks >= 0) & masks.isfinite()).all()):
        raise ValueError(
            "masks hold weights that are negative or not finite; for logits: masks > 0, or masks.sigmoid()"
        )
    if tuple(masks.shape[-2:]) != size:
        masks = F.interpolate(masks.float(), size, mode="area")
    return masks, masks.shape[1]


def _read_labels(labels: Tensor, size: tuple[int, int], count: int | None, values: bool) -> tuple[Tensor, int]:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"count must be a number of labels, got {count!r}")
    if labels.dtype == torch.uint8:
        labels = labels.to(torch.int16).masked_fill(labels == VOID, -1)
    elif labels.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        labels = labels.to(torch.int64)
    if count is None or values:
        present = int(labels.max()) + 1 if labels.numel() else 0
        if count is not None and present > count:
            raise ValueError(f"labels reach {present - 1}, expected less than count={count}; negative ones are ignored")
        count = max(0, present) if count is None else count
    if tuple(labels.shape[-2:]) != size:
        rows, columns = (
            ((torch.arange(new, device=labels.device) + 0.5) * (old / new)).long()
            for new, old in zip(size, labels.shape[-2:], strict=True)
        )
        labels = labels.index_select(1, rows).index_select(2, columns)
    return labels, count
