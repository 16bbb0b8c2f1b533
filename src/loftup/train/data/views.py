"""Batches to train on: random views of pictures with masks, the same however many workers and processes make them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import LoftUpError
from ...networks.layers import Box
from ..config import TrainConfig
from .cache import FeatureCache
from .generators import seeded
from .plan import Grids, Plan, View, check_geometry, draw_view, grids_of, make_plan
from .regions import Region
from .sources import LabelMap, Masks, Picture, Source, UnreadableError

__all__ = ["Batch", "Crop", "Place", "Sample", "TrainingViews", "collate"]

Place = tuple[int, int]  # step and slot
ATTEMPTS = 10


@dataclass
class Crop:
    """A crop for the teacher."""

    image: Tensor  # (B, 3, S, S) float32 in [0, 1]
    masks: list[Tensor]  # B tensors (M, S, S) bool
    box: Box  # where it lies in the student's output, in pixels


@dataclass
class Batch:
    """Views of B pictures, as far as the objective's terms need them."""

    step: int  # of the optimizer
    names: list[str]  # of the pictures
    image: Tensor  # (B, 3, S, S) float32 in [0, 1], the student's
    # (B, 3, O, O) float32 in [0, 1], the same view at the output's size; or (B, 3 k^2, O, O), see resize_guidance
    guidance: Tensor
    masks: list[Tensor]  # B tensors (M, O, O) bool; M is 0 where the objective takes no masks
    backbone: int = 0  # number of the one that is to see them, of several
    window: Box | None = None  # output pixels that the loss sees; None means all
    crops: list[Crop] = field(default_factory=list)  # the teacher's
    factor: int = 0  # k of the high-resolution consistency, 0 without it
    large: Tensor | None = None  # (B, 3, kS, kS), the view enlarged k times; or (B, 3, S, S), a part of it
    region: Box | None = None  # what large shows, in k-ths of feature cells
    # The backbone's of image, (C, h, w) each, where the cache has them; empty without a cache.
    features: list[Tensor | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # of the pictures in the cache; empty without one
    sources: list[int] = field(default_factory=list)  # numbers of the pictures' sources, of several
    # Classes (O, O) int64 of the pictures, -1 where unknown; None for a picture of a source without any.
    labels: list[Tensor | None] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # why pictures had to be replaced by others
    empty: int = 0  # pictures of which no view shows a mask, although the objective takes masks

    @property
    def skipped(self) -> int:
        """Number of pictures that had to be replaced."""
        return len(self.unreadable)

    def to(self, device: "torch.device | str") -> "Batch":
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        image = move(self.image)
        return replace(
            self,
            image=image,
            guidance=image if self.guidance is self.image else move(self.guidance),
            masks=list(map(move, self.masks)),
            crops=[replace(c, image=move(c.image), masks=list(map(move, c.masks))) for c in self.crops],
            large=None if self.large is None else move(self.large),
            features=[None if f is None else move(f) for f in self.features],
            labels=[None if labels is None else move(labels) for labels in self.labels],
        )


@dataclass
class Sample:
    """One picture's part of a :class:`Batch`; tensors have no batch dimension."""

    step: int
    plan: Plan
    name: str
    image: Tensor
    guidance: Tensor
    masks: Tensor
    crops: list[tuple[Tensor, Tensor]]
    large: Tensor | None
    features: Tensor | None
    key: str | None
    unreadable: list[str]
    empty: bool
    source: int
    labels: Tensor | None


class TrainingViews(Dataset[Sample]):
    """Samples by step and slot, the number of the picture in the step's global batch.

    Args:
        source: of pictures with masks.
        config: of the run.
        grids: of the backbone, or of each of several.
        world: number of processes.
        caches: of the backbones' features, one for each; empty for none.

    Raises:
        LoftUpError: sizes, ratios and window do not fit the cells, see
            :func:`loftup.train.data.plan.check_geometry`.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        grids: Grids,
        world: int = 1,
        caches: Sequence[FeatureCache] = (),
    ) -> None:
        check_geometry(config, grids)
        self.source = source
        self.config = config
        self.grids = grids_of(grids)
        self.caches = caches
        self._batch = config.batch * config.accumulate * world
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # the epoch and its permutation of the pictures

    def __getitem__(self, place: Place) -> Sample:
        """Make the sample of (step, slot).

        Raises:
            LoftUpError: ten pictures in a row cannot be read.
        """
        step, slot = place
        generator = seeded(self.config.seed, "slot", step, slot)
        plan = make_plan(self.config, self.grids, step)
        index, picture, unreadable = self._read(step, slot, generator)
        height, width = picture.image.shape[1:]
        view = draw_view(self.config, height, width, self._view_generator(index, generator))
        objective = self.config.objective
        distillation = objective.self_distillation
        cut = _Cropper(picture, view)

        whole, size, output = (0, 0, plan.output, plan.output), plan.size, plan.output
        image = cut.image(whole, output, size)
        # As loftup.inputs.resize_guidance does, but cut out of the picture itself.
        finer = max(1, min(self.config.model.oversampling, size // output))
        guidance = image if output * finer == size else cut.image(whole, output, output * finer)
        guidance = F.pixel_unshuffle(guidance, finer) if finer > 1 else guidance
        masks = torch.zeros(0, output, output, dtype=torch.bool)
        limits = [term.masks for term in (objective.mask_bicubic, objective.segments) if term.weight]
        if limits:
            masks = cut.masks(whole, output, output, max(limits), generator)
        crops = []
        for box in plan.crops:
            crop_masks = torch.zeros(0, size, size, dtype=torch.bool)
            if distillation.refine:
                crop_masks = cut.masks(box, output, size, distillation.masks, generator)
            crops.append((cut.image(box, output, size), crop_masks))
        takes_masks = limits or (distillation.weight and distillation.refine)
        visible = len(masks) + sum(len(crop_masks) for _, crop_masks in crops)
        large = None
        if plan.region is not None:
            grid = self.grids[plan.backbone]
            cells = plan.factor * grid.along(size)
            large = cut.image(plan.region, cells, int((plan.region[2] - plan.region[0]) * grid.stride))
        cache = self.caches[plan.backbone] if self.caches else None
        key = cache.key(image) if cache else None
        features = cache.read(key) if cache and key else None
        empty = bool(takes_masks) and not visible
        name = picture.name
        labels = None
        if objective.classes.weight and (count := self.config.data.classes[picture.source]):
            labels = cut.classes(whole, output, output, count)
        source = picture.source
        return Sample(
            step, plan, name, image, guidance, masks, crops, large, features, key, unreadable, empty, source, labels
        )

    def __getitems__(self, places: Sequence[Place]) -> list[Sample] | LoftUpError:
        """Make the samples of a batch for a loader, or say why there are none, as a value.

        A worker's exception would reach the main process with the worker's traceback as its text.
        """
        try:
            return [self[place] for place in places]
        except LoftUpError as error:
            return error

    def _read(self, step: int, slot: int, generator: torch.Generator) -> tuple[int, Picture, list[str]]:
        epoch, position = divmod(step * self._batch + slot, len(self.source))
        if self._order[0] != epoch:
            permutation = torch.randperm(len(self.source), generator=seeded(self.config.seed, "epoch", epoch))
            self._order = (epoch, permutation)
        index = int(self._order[1][position])
        reasons: list[str] = []
        while len(reasons) < ATTEMPTS:
            try:
                return index, self.source.read(index, generator), reasons
            except UnreadableError as error:
                reasons.append(str(error))
                index = int(torch.randint(len(self.source), (), generator=generator))
        raise LoftUpError(f"{ATTEMPTS} pictures in a row cannot be read; the last: {reasons[-1]}. Check data.path")

    def _view_generator(self, index: int, generator: torch.Generator) -> torch.Generator:
        if not self.config.data.views:
            return generator
        number = int(torch.randint(self.config.data.views, (), generator=generator))
        return seeded(self.config.seed, "view", index, number)


class _Cropper:
    """Cuts parts of a view out of a picture at any size, each from the picture itself."""

    def __init__(self, picture: Picture, view: View) -> None:
        from PIL import Image

        self.picture = Image.fromarray(picture.image.permute(1, 2, 0).contiguous().numpy())
        self.all_masks: Masks = picture.masks
        self.view = view

    def image(self, box: Region, whole: int, size: int) -> Tensor:
        """The box of the view, whose side is ``whole``, as (3, size, size) float32 in [0, 1]; antialiased."""
        from PIL import Image

        top, left, bottom, right = self._region(box, whole)
        pixels = self.picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        image = torch.from_numpy(np.array(pixels)).movedim(-1, 0).float() / 255
        return image.flip(-1) if self.view.mirrored else image

    def masks(self, box: Region, whole: int, size: int, limit: int, generator: torch.Generator) -> Tensor:
        """The masks in that box as (M, size, size) bool; of more than ``limit`` a random choice, in their order."""
        masks = self.all_masks.crop(self._region(box, whole), (size, size))
        if len(masks) > limit:
            masks = masks[torch.randperm(len(masks), generator=generator)[:limit].sort().values]
        return masks.flip(-1) if self.view.mirrored else masks

    def classes(self, box: Region, whole: int, size: int, count: int) -> Tensor | None:
        """The classes in that box as (size, size) int64, -1 where unknown; None where masks have none."""
        if not isinstance(self.all_masks, LabelMap):
            return None
        labels = self.all_masks.classes(self._region(box, whole), (size, size), count)
        return labels.flip(-1) if self.view.mirrored else labels

    def _region(self, box: Region, whole: int) -> Region:
        top, left, bottom, right = self.view.region(box, whole)
        # Rounding may lead a hair's breadth out of the picture.
        return max(top, 0.0), max(left, 0.0), min(bottom, self.picture.height), min(right, self.picture.width)


def collate(samples: Sequence[Sample]) -> Batch:
    """Put the samples of one step together."""
    first = samples[0]
    crops = []
    for index, box in enumerate(first.plan.crops):
        images, masks = zip(*(sample.crops[index] for sample in samples), strict=True)
        crops.append(Crop(torch.stack(images), list(masks), box))
    image = torch.stack([sample.image for sample in samples])
    same = first.plan.output == first.plan.size
    large = [sample.large for sample in samples if sample.large is not None]
    keys = [sample.key for sample in samples if sample.key is not None]
    return Batch(
        step=first.step,
        names=[sample.name for sample in samples],
        image=image,
        guidance=image if same else torch.stack([sample.guidance for sample in samples]),
        masks=[sample.masks for sample in samples],
        backbone=first.plan.backbone,
        window=first.plan.window,
        crops=crops,
        factor=first.plan.factor,
        large=torch.stack(large) if large else None,
        region=first.plan.region,
        features=[sample.features for sample in samples] if keys else [],
        keys=keys,
        sources=[sample.source for sample in samples],
        labels=[sample.labels for sample in samples],
        unreadable=[reason for sample in samples for reason in sample.unreadable],
        empty=sum(sample.empty for sample in samples),
    )
