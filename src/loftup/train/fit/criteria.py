"""Two errors of an upsampler that need no labels, on pictures held out of the training."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError
from ...inputs import resize_guidance
from ...model import LoftUp
from ...progress import track
from ..config import TrainConfig
from ..data.loader import open_parts
from ..objective.maps import pool_to, some
from ..objective.segments import membership_loss, read_membership
from ..objective.standardise import standardisation
from ..objective.student import upsample_window
from ..run.validation import Case, Cases, packed_masks, unpacked_masks

__all__ = ["CRITERIA", "LEAST", "Errors", "HeldOut", "enough", "gains"]

log = logging.getLogger("loftup")

# What the errors are called in tables, and in the card.
CRITERIA = {
    "views": "squared distance to the features of shifted views, on their grid",
    "masks": "cross-entropy of masks, read from the cells and used on the output",
}
# Gains that a fit must have to be trusted. Three fits at stride 32 that gained 0.3 to 0.5 % in masks, and 7 to 11 % in
# views, lost one to two points of mIoU to any on CamVid.
LEAST = {"views": 0.0, "masks": 0.01}
Errors = Mapping[str, float]  # a mean over pictures for each of CRITERIA


@dataclasses.dataclass(frozen=True)
class _Example:
    case: Case
    cells: Tensor  # (1, C, h, w), features, standardised
    finer: Tensor  # (1, C, n * h, n * w), of shifted views, on the same scale, float16
    masks: Tensor  # (M, O, O) bool
    guesses: Tensor  # (1, M, h, w), how far a probe takes each cell to lie in each mask


class HeldOut:
    """The pictures that ``data.held_out`` keeps out of a training: half to choose an upsampler by, half to report by.

    Both errors compare with what no upsampler has made. ``views`` is the mean squared distance of the output, averaged
    over the cells of a finer grid, to the backbone's features of shifted views on that grid, all standardised as
    :func:`loftup.train.objective.standardise.standardisation` has it. ``masks`` is the loss of
    :mod:`loftup.train.objective.segments`: a ridge regression reads the picture's masks off the cells, and its guesses
    are averaged as the upsampler averages features. The first falls with finer features, the second rises where the
    output is smoothed or leaves the space of the cells.

    Args:
        config: of the run; ``objective.segments`` says what masks, ``validation.size`` the side of the centre crops in
            pixels. The output has half of it, or all of it if it is odd.
        backbone: of one layer, on the device to compute on.

    Raises:
        LoftUpError: a half has no picture that can be read, or the backbone has no finer grid.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone) -> None:
        self.settings = config.objective.segments
        size = config.validation.size
        self.side = size if size % 2 else size // 2
        _, source = open_parts(config)
        config = dataclasses.replace(
            config, validation=dataclasses.replace(config.validation, images=max(1, len(source)))
        )
        finer = backbone.with_views(9 if backbone.views < 9 else 16)
        halves = []
        for name, share in (("choose", slice(0, None, 2)), ("report", slice(1, None, 2))):
            cases = Cases(source, config, backbone, lambda picture, size: packed_masks(picture, self.side), share)
            for reason in cases.unreadable:
                log.warning("a held-out picture is left out: %s", reason)
            if not cases.cases:
                first = f"; the first: {cases.unreadable[0]}" if cases.unreadable else ""
                raise LoftUpError(f"none of the held-out pictures to {name} by can be read{first}")
            pictures = track(cases.cases, f"held out, to {name} by", len(cases.cases), unit="pictures", leave=False)
            halves.append([self._example(case, finer) for case in pictures])
        self.choosing, self.reporting = halves

    @torch.no_grad()
    def _example(self, case: Case, finer: Backbone) -> _Example:
        scale = standardisation(case.features)
        cells = scale(case.features)
        views = scale(finer(finer.normalise(case.image)).float())
        masks = some(unpacked_masks(case.targets, self.side).to(case.image.device), self.settings.masks)
        guesses = cells.new_zeros(1, 0, *cells.shape[2:])
        if len(masks):
            guesses = read_membership(cells[0], masks, self.settings.ridge)[None]
        return _Example(case, cells, views.half(), masks, guesses)

    def errors(self, up: LoftUp, examples: Iterable[_Example]) -> Errors:
        """The errors of an upsampler for any backbone, in ``eval()`` mode, on one of the halves."""

        def upsample(example: _Example, values: Tensor) -> Tensor:
            guidance = resize_guidance(example.case.image, (self.side, self.side), up.config.oversampling)
            return upsample_window(up, example.cells, guidance, None, values)

        return self._errors(upsample, examples)

    def bilinear(self, examples: Iterable[_Example]) -> Errors:
        """The errors of bilinear interpolation."""
        size = (self.side, self.side)
        return self._errors(
            lambda example, values: F.interpolate(values, size, mode="bilinear", align_corners=False), examples
        )

    @torch.no_grad()
    def _errors(self, upsample: Callable[[_Example, Tensor], Tensor], examples: Iterable[_Example]) -> Errors:
        sums = {name: [0.0, 0] for name in CRITERIA}
        for example in examples:
            values = torch.cat([example.cells, example.guesses], 1)
            dense, read = upsample(example, values).split([example.cells.shape[1], example.guesses.shape[1]], 1)
            target = example.finer.to(dense.dtype)
            found = {"views": F.mse_loss(_on_grid(dense, target), target)}
            if len(example.masks):
                settings = self.settings
                found["masks"] = membership_loss(
                    read[0], example.masks, area=settings.area, edges=settings.edges, overlap=settings.overlap
                )
            for name, value in found.items():
                sums[name][0] += float(value)
                sums[name][1] += 1
        return {name: total / count for name, (total, count) in sums.items() if count}


def _on_grid(dense: Tensor, target: Tensor) -> Tensor:
    """The output on the grid of the target: averaged over its cells, or where it is coarser, interpolated."""
    height, width = target.shape[-2:]
    if dense.shape[-2] < height or dense.shape[-1] < width:
        return F.interpolate(dense, (height, width), mode="bilinear", align_corners=False)
    return pool_to(dense, (height, width))


def gains(errors: Errors, start: Errors) -> dict[str, float]:
    """Shares by which errors are below those of the start; below 0 where they are above."""
    return {name: 1 - errors[name] / max(value, 1e-12) for name, value in start.items()}


def enough(gain: Mapping[str, float]) -> bool:
    """Tell whether a fit gained what it must in every error."""
    return all(gain[name] >= least for name, least in LEAST.items())
