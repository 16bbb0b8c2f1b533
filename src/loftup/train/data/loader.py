"""Batches of a process, in the order of the steps, however many workers make them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ...backbones import Backbone
from ...backbones.views import shifts_a_side
from ...errors import LoftUpError
from ..config import TrainConfig
from .cache import open_caches
from .plan import Cells
from .sources import ImageFolder, LabelFolder, Part, Several, Source, open_source
from .views import Batch, Place, Sample, TrainingViews, collate

__all__ = ["StepSampler", "backbone_list", "loader", "open_data", "open_parts"]


def open_data(
    path: Sequence[str], kind: str, scales: Sequence[float], void: int | None = None, side: int = 480
) -> Source:
    """Open folders or shards, one or several, as one source.

    ``scales`` are of Felzenszwalb's masks made on the fly, on pictures whose short side is reduced to ``side``, and
    ``void`` is the label that is no mask in label maps.

    Raises:
        LoftUpError: no path is given, or see :func:`loftup.train.data.sources.open_source`.
    """
    if not path:
        raise LoftUpError("no data: data.path is empty; expected a folder of pictures or shards, or several")
    sources = [open_source(folder, kind) for folder in path]
    for source in sources:
        if isinstance(source, ImageFolder):
            source.scales = list(scales)
            source.options["side"] = side
        if isinstance(source, LabelFolder):
            source.void = void
    return sources[0] if len(sources) == 1 else Several(sources)


def open_parts(config: TrainConfig) -> tuple[Source, Source]:
    """Open the pictures to train on and those that ``data.held_out`` leaves out, of which there may be none.

    Raises:
        LoftUpError: see :func:`open_data`; or no picture is left to train on.
    """
    data = config.data
    source = open_data(data.path, data.kind, data.felzenszwalb, data.void, data.felzenszwalb_side)
    count, total = data.held_out, len(source)
    if count >= total:
        raise LoftUpError(
            f"data.held_out={count} of {total} pictures leaves none to train on; hold out fewer, or give more pictures"
        )
    if not count:
        return source, Part(source, [])
    held_out = [index * total // count for index in range(count)]
    rest = sorted(set(range(total)).difference(held_out))
    return Part(source, rest), Part(source, held_out)


class StepSampler(Sampler[list[Place]]):
    """Lists of (step, slot), one for every micro-batch of a process, from the first step of a (resumed) run on."""

    def __init__(self, config: TrainConfig, first_step: int = 0, rank: int = 0, world: int = 1) -> None:
        self.config, self.first_step, self.rank, self.world = config, first_step, rank, world

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first_step) * self.config.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        batch = self.config.batch
        for step in range(self.first_step, self.config.steps):
            for micro in range(self.config.accumulate):
                start = (micro * self.world + self.rank) * batch
                yield [(step, start + index) for index in range(batch)]


def backbone_list(config: TrainConfig, backbone: Backbone | Sequence[Backbone]) -> list[Backbone]:
    """One backbone or several as a list; ValueError unless number and views are those of the config."""
    backbones = [backbone] if isinstance(backbone, Backbone) else list(backbone)
    if len(backbones) != (expected := len(config.sections)):
        raise ValueError(
            f"got {len(backbones)} backbones, the config has {expected}; give one for each of config.backbones, in "
            "their order"
        )
    for each, (name, section) in zip(backbones, config.sections.items(), strict=True):
        if each.views != section.views:
            raise ValueError(
                f"got a backbone with views={each.views}, {name}.views of the config is {section.views}; give "
                f"backbone.with_views({section.views})"
            )
    return backbones


class _Loader(DataLoader[Sample]):
    """A DataLoader whose iterator raises the LoftUpError that a dataset hands over instead of samples."""

    def __iter__(self) -> Any:
        return _Batches(super().__iter__())


class _Batches:
    """PyTorch's iterator, with all its attributes, which are needed to end its workers."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Batch:
        batch: Batch | LoftUpError = next(self._batches)
        if isinstance(batch, LoftUpError):
            raise batch
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def _collate_or_fail(samples: Sequence[Sample] | LoftUpError) -> Batch | LoftUpError:
    return samples if isinstance(samples, LoftUpError) else collate(samples)


def loader(
    config: TrainConfig, backbone: Backbone | Sequence[Backbone], first_step: int = 0, rank: int = 0, world: int = 1
) -> "DataLoader[Sample]":
    """Batches of one process, the ``rank``-th of ``world``, from a step on, each a :class:`Batch` on the CPU.

    The backbone, or each where the config has several, tells its grid, and for the cache its identity.

    Raises:
        LoftUpError: the data cannot be opened, or the geometry does not fit the backbone; while iterating, ten
            pictures in a row cannot be read.
    """
    source, _ = open_parts(config)
    backbones = backbone_list(config, backbone)
    grids = [Cells(each.patch_size, shifts_a_side(each.views)) for each in backbones]
    views = TrainingViews(source, config, grids, world, open_caches(config, backbones))
    return _Loader(
        views,
        batch_sampler=StepSampler(config, first_step, rank, world),
        collate_fn=_collate_or_fail,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        # Its own, so that making an iterator leaves the global random state alone.
        generator=torch.Generator(),
    )
