"""Measuring and drawing on held-out pictures, while training goes on."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError, translate
from ...files import write_atomically
from ...model import LoftUp
from ...pictures import encode
from ...viz import compare
from ..config import TrainConfig
from ..data.generators import seeded
from ..data.loader import open_data
from ..data.regions import LabelMap, Picture, UnreadableError, centres
from ..data.sources import Source, open_source
from ..objective.mask_bicubic import mask_bicubic_target
from ..objective.standardise import standardisation
from .distributed import Processes
from .probe import fit_probe, score

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Case",
    "Cases",
    "LinearProbe",
    "Validation",
    "mean_losses",
    "open_validation",
    "packed_masks",
    "report",
    "save_picture",
    "unpacked_masks",
]

POINTS = 512  # pixels of every picture that a probe learns from


@dataclasses.dataclass(frozen=True)
class Case:
    """A centre crop: image (1, 3, S, S) in [0, 1], features (1, C, h, w), masks or labels as ``keep`` made them."""

    name: str
    image: Tensor
    features: Tensor
    targets: Tensor


class Cases:
    """Centre crops of evenly spread pictures of a source, or of a share of them, on the backbone's device.

    ``keep`` makes what to keep of a picture beside its crop, given the side S.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        backbone: Backbone,
        keep: Callable[[Picture, int], Tensor],
        share: slice = slice(None),
    ) -> None:
        size, patch = config.validation.size, backbone.patch_size
        if size % patch:
            near = ", ".join(str(n) for n in (size // patch * patch, (size // patch + 1) * patch) if n)
            raise LoftUpError(
                f"validation.size is {size}, expected a multiple of the backbone's patch size {patch}, such as {near}"
            )
        self.size, self._keep = size, keep
        self.unreadable: list[str] = []
        count = min(config.validation.images, len(source))
        indices = [index * len(source) // count for index in range(count)]
        self.cases = list(self._read(source, indices[share], config, backbone))

    def _read(self, source: Source, indices: Sequence[int], config: TrainConfig, backbone: Backbone) -> Iterator[Case]:
        device = next(iter(backbone.parameters())).device
        for index in indices:
            try:
                picture = source.read(index, seeded(config.seed, "validation", index))
            except UnreadableError as error:
                self.unreadable.append(str(error))
                continue
            top, left, bottom, right = _centre(picture)
            image = picture.image[None, :, top:bottom, left:right].to(device).float() / 255
            image = F.interpolate(image, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
            image = image.clamp(0, 1)
            with torch.no_grad():
                features = backbone(backbone.normalise(image)).float()
            yield Case(picture.name, image, features, self._keep(picture, self.size))


def _centre(picture: Picture) -> tuple[int, int, int, int]:
    height, width = picture.image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return top, left, top + side, left + side


def packed_masks(picture: Picture, size: int) -> Tensor:
    """(M, S, ceil(S / 8)) uint8 on the CPU, eight pixels a byte: pictures hold hundreds of masks."""
    masks = picture.masks.crop(_centre(picture), (size, size))
    return torch.from_numpy(np.packbits(masks.numpy(), axis=-1))


def unpacked_masks(packed: Tensor, size: int) -> Tensor:
    """The masks of :func:`packed_masks`: (M, S, S) bool on the CPU."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=size)).bool()


def _labels(picture: Picture, size: int) -> Tensor:
    """(S, S) int64 on the CPU."""
    assert isinstance(picture.masks, LabelMap)
    labels = picture.masks.labels
    rows, columns = centres(_centre(picture), (size, size), *labels.shape)
    return torch.from_numpy(labels[rows][:, columns].astype("int64"))


class Validation:
    """The stage-1 loss and a picture of principal components, on fixed centre crops.

    The config says which pictures, how many and how large, and how targets are refined (``mask_bicubic``). The process,
    the ``rank``-th of ``world``, measures its share of them on the backbone's device.

    Raises:
        LoftUpError: ``validation.size`` does not fit the backbone.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, rank: int = 0, world: int = 1) -> None:
        data = config.data
        source = open_data(
            config.validation.path, config.validation.kind, data.felzenszwalb, data.void, data.felzenszwalb_side
        )
        self._cases = Cases(source, config, backbone, packed_masks, slice(rank, None, world))
        self._refine = (config.objective.mask_bicubic.alpha, config.objective.mask_bicubic.masks)
        self._pictures = config.validation.pictures
        self._standardise = config.model.universal
        self.unreadable = self._cases.unreadable

    def __len__(self) -> int:
        return len(self._cases.cases)

    @torch.no_grad()
    def measure(self, up: LoftUp) -> Tensor:
        """Sum up squared distances to the mask-refined target (Eq. 1), each picture's a mean over its values.

        Args:
            up: in ``eval()`` mode.

        Returns:
            (3,) float64 on the CPU: the sum over this process's pictures of ``up``, that of bicubic interpolation,
            and the number of pictures.
        """
        total = torch.zeros(3, dtype=torch.float64)
        size = (self._cases.size, self._cases.size)
        for case in self._cases.cases:
            features = self._features(case)
            normalised = up.channelnorm(features)
            target = mask_bicubic_target(normalised, [self._masks(case)], size, *self._refine)
            bicubic = F.interpolate(normalised, size, mode="bicubic", align_corners=False)
            student = up(features, case.image)
            total += torch.tensor([float(F.mse_loss(student, target)), float(F.mse_loss(bicubic, target)), 1.0])
        return total

    def _features(self, case: Case) -> Tensor:
        """On the scale on which losses are measured, see :class:`loftup.train.objective.objective.Objective`."""
        return standardisation(case.features)(case.features) if self._standardise else case.features

    def _masks(self, case: Case) -> Tensor:
        return unpacked_masks(case.targets, self._cases.size).to(case.image.device)

    @torch.no_grad()
    def picture(self, up: LoftUp, teacher: LoftUp | None = None) -> "Image.Image | None":
        """Rows of image, features, bilinear interpolation, student and teacher, coloured by principal components.

        None if this process has no picture.
        """
        from PIL import Image

        sheets = []
        for case in self._cases.cases[: self._pictures]:
            features = self._features(case)
            normalised = up.channelnorm(features)
            maps = {
                "features": normalised,
                "bilinear": F.interpolate(normalised, case.image.shape[2:], mode="bilinear", align_corners=False),
                "student": up(features, case.image),
            }
            if teacher is not None:
                maps["teacher"] = teacher(features, case.image)
            sheets.append(compare(case.image, maps))
        if not sheets:
            return None
        grid = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
        for index, sheet in enumerate(sheets):
            grid.paste(sheet, (0, sum(above.height for above in sheets[:index])))
        return grid


def open_validation(config: TrainConfig, backbone: Backbone, processes: Processes) -> Validation:
    """The share of each process; LoftUpError in all if one fails, or none can read any picture."""
    validation = processes.together(lambda: Validation(config, backbone, processes.rank, processes.world))
    shares = processes.gather((len(validation), validation.unreadable[:1]))
    if not any(count for count, _ in shares):
        first = next(reason for _, reasons in shares for reason in reasons)
        raise LoftUpError(f"no picture of validation.path can be read; the first: {first}")
    return validation


def mean_losses(totals: Sequence[Tensor]) -> dict[str, float]:
    """The totals of :meth:`Validation.measure` for every backbone as means: ``loss``, ``bicubic`` and their ``ratio``.

    With several backbones, whose standardised features have one scale, these are means over them, and ``ratio_0`` and
    so on are the backbones' own.
    """
    losses, bicubic = (torch.stack([total[index] / total[2] for total in totals]) for index in (0, 1))
    means = {"loss": losses.mean(), "bicubic": bicubic.mean(), "ratio": losses.mean() / bicubic.mean()}
    if len(totals) > 1:
        means |= {f"ratio_{index}": ratio for index, ratio in enumerate(losses / bicubic)}
    return {name: float(value) for name, value in means.items()}


class LinearProbe:
    """A linear layer that tells classes from features, learned on half of the pictures and judged on the other.

    Args:
        config: ``validation.probe`` names a folder of pictures with label maps.
        backbone: on the device to compute on.

    Raises:
        LoftUpError: as :class:`Validation`, or there are fewer than two pictures or no labels to learn from.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone) -> None:
        assert config.validation.probe is not None
        self._cases = Cases(open_source(config.validation.probe, "labels"), config, backbone, _labels)
        self._classes, self._seed = config.validation.probe_classes, config.seed
        self.unreadable = self._cases.unreadable
        cases = self._cases.cases
        labels = [self._labels(case) for case in cases]
        points = [self._choose(label, index) for index, label in enumerate(labels)]
        self._learn = [item for item in zip(cases[::2], labels[::2], points[::2], strict=True) if len(item[2])]
        self._judge = list(zip(cases[1::2], labels[1::2], strict=True))
        if not self._learn or not self._judge:
            raise LoftUpError(
                f"{config.validation.probe} has {len(cases)} readable pictures, of which {len(self._learn)} to learn "
                f"from have labels in 0..{self._classes - 1}; expected two pictures and such labels: check "
                "validation.probe_classes"
            )

    def _labels(self, case: Case) -> Tensor:
        """(S, S) int64; -1 where the label is none of the classes."""
        labels = case.targets.to(case.image.device)
        return labels.where((labels >= 0) & (labels < self._classes), -1)

    def _choose(self, label: Tensor, index: int) -> Tensor:
        """(N, 2) positions (row, column) of labelled pixels."""
        positions = (label >= 0).nonzero()
        order = torch.randperm(len(positions), generator=seeded(self._seed, "probe", index))
        return positions[order[:POINTS].to(positions.device)]

    def measure(self, up: LoftUp) -> dict[str, float]:
        """``miou``, ``accuracy`` and ``boundary_miou`` in percent of upsampled features, ``up`` in ``eval()`` mode."""
        with torch.no_grad():
            samples = [up.at(case.features, case.image, points.flip(1)[None])[0] for case, _, points in self._learn]
        linear = self._fit(samples)
        with torch.no_grad():
            predictions = [up(case.features, case.image, head=linear).argmax(1) for case, _ in self._judge]
        return self._score(predictions)

    def bilinear(self) -> dict[str, float]:
        """The same of bilinearly interpolated features."""

        def dense(features: Tensor) -> Tensor:
            return F.interpolate(features, (self._cases.size,) * 2, mode="bilinear", align_corners=False)

        samples = [dense(case.features)[0, :, points[:, 0], points[:, 1]].mT for case, _, points in self._learn]
        linear = self._fit(samples)
        with torch.no_grad():
            # A linear layer and bilinear interpolation commute.
            logits = (linear(case.features.movedim(1, -1)).movedim(-1, 1) for case, _ in self._judge)
            return self._score([dense(values).argmax(1) for values in logits])

    def _fit(self, samples: list[Tensor]) -> torch.nn.Linear:
        labels = torch.cat([label[points[:, 0], points[:, 1]] for _, label, points in self._learn])
        return fit_probe(torch.cat(samples), labels, self._classes, seed=self._seed)

    def _score(self, predictions: list[Tensor]) -> dict[str, float]:
        scores = score(zip(predictions, (label[None] for _, label in self._judge), strict=True), self._classes)
        return {"miou": scores.miou, "accuracy": scores.accuracy, "boundary_miou": scores.boundary_miou}


def report(scores: Mapping[str, float]) -> str:
    """The numbers of :meth:`Validation.measure`, means, and of the probe, as a line of text."""
    parts = [f"{name} {scores[name]:.4g}" for name in ("loss", "bicubic", "ratio") if name in scores]
    if "miou" in scores:
        probe = [
            f"{name} {scores[key]:.1f} (bilinear {scores[f'bilinear_{key}']:.1f})"
            for name, key in (("mIoU", "miou"), ("accuracy", "accuracy"), ("boundary mIoU", "boundary_miou"))
        ]
        parts.append(f"probe {', '.join(probe)} percent")
    return ", ".join(parts)


def save_picture(picture: "Image.Image", path: Path) -> None:
    """Write a PNG, whole or not at all; LoftUpError if that fails."""
    with translate(OSError, lambda error: f"cannot write {path}: {error}"):
        write_atomically(path, encode(picture))
