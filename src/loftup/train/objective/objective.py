"""The weighted sum of objectives that a run is trained on, with the networks that it takes besides the student."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import LoftUpError
from ...model import LoftUp
from ...networks.layers import Box
from ..config import TrainConfig, backbone_list
from ..data.cache import open_caches
from ..data.views import Batch
from .distances import (
    crop_border,
    distance,
    mask_refine,
    membership_loss,
    pool_to,
    read_membership,
    total_variation,
)
from .multi_view import AttentionDownsampler, draw_motions
from .standardise import draw_channels, standardisation
from .start import freeze_batch_norm
from .window import upsample_window

__all__ = ["Objective"]

See = Callable[[Tensor], Tensor]  # an image in [0, 1] to the features of the step's backbone, on the terms' scale


class Objective(nn.Module):
    """From a batch to the loss. The state dict holds student, teacher and downsampler, not the backbone.

    The teacher is a copy of the student as it is handed over, whose weights and statistics must therefore be set
    before; :meth:`after_step` alone changes it.

    Terms compare in the space that the student's channel norm makes. Where it has none, with values="features", its
    output is in the backbone's own space, and moves with every shift and scaling of a channel: there each picture's
    features are standardised per channel over its cells (:mod:`loftup.train.objective.standardise`), and what the
    backbone says of the enlarged picture, of the teacher's crops and of moved views is mapped by the same means and
    deviations, so that it stays comparable. ``model.channel_dropout`` leaves channels out of all of these alike.

    Args:
        config: of the run, whose values :func:`loftup.train.config.check` has accepted; terms of weight 0 cost nothing.
        up: the student, float32; its channel norm is not trained, because the targets live in the space it makes.
        backbone: in evaluation mode, on the student's device; several where the config has several.

    Attributes:
        backbones: as a list.
        up: the student.
        teacher: its moving average, frozen and in evaluation mode; None without self-distillation.
        downsampler: of the multi-view consistency; None without it.

    Raises:
        LoftUpError: the multi-view consistency is to work on a window, on outputs of several ratios, for several
            backbones or on a part of the channels.
        ValueError: there are not as many backbones as in the config, or one is in training mode or has another number
            of channels than the student.
    """

    def __init__(self, config: TrainConfig, up: LoftUp, backbone: Backbone | Sequence[Backbone]) -> None:
        super().__init__()
        _check_multi_view(config)
        # In a list nn.Module does not see them: it would move, save and train them, and put them into training mode.
        self.backbones = backbone_list(config, backbone)
        for each in self.backbones:
            if each.training:
                raise ValueError("the backbone is in training mode, which changes its features; call backbone.eval()")
            if up.config.channels not in (None, each.channels):
                raise ValueError(f"the backbone gives {each.channels} channels, the student takes {up.config.channels}")
        self.config = config
        self.caches = open_caches(config, self.backbones)
        self.up = up
        up.channelnorm.requires_grad_(False)
        self.teacher: LoftUp | None = None
        if config.objective.self_distillation.weight:
            self.teacher = copy.deepcopy(up).requires_grad_(False)
        self.downsampler: AttentionDownsampler | None = None
        if config.objective.multi_view.weight:
            (only,) = self.backbones
            cell = round(only.patch_size * config.data.ratios[0])
            self.downsampler = AttentionDownsampler(only.channels, cell).to(up.device, up.dtype)
        self.train()

    def train(self, mode: bool = True) -> "Objective":
        """Set the student's mode; the teacher stays in evaluation mode, and frozen batch norms stay frozen."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.config.model.batch_norm == "frozen":
            freeze_batch_norm(self.up)
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            batch: on the student's device.

        Returns:
            The weighted sum, a scalar, and the terms without their weights, detached. With "mask_bicubic" comes
            "bicubic": what plain bicubic interpolation would get there.
        """
        objective, model = self.config.objective, self.config.model
        features = self._features(batch)
        scale = self._scale(features, batch.step)

        def see(image: Tensor) -> Tensor:
            return scale(self._extract(image, batch.backbone))

        normalised = self._normalise(scale(features))
        whole = model.architecture == "loftup" and model.values == "projected" and model.batch_norm == "batch"
        guesses = self._guesses(normalised, batch) if objective.segments.weight else None
        output = _Output(self.up, normalised, batch, whole=whole, beside=guesses)
        terms: dict[str, Tensor] = {}
        compared: dict[str, Tensor] = {}
        if objective.mask_bicubic.weight:
            terms["mask_bicubic"], compared["bicubic"] = self._mask_bicubic(output.dense, normalised, batch)
        if objective.high_resolution.weight:
            terms["high_resolution"] = self._high_resolution(output.dense, batch, see)
        if objective.segments.weight:
            terms["segments"] = self._segments(output.beside, batch)
        if objective.multi_view.weight:
            terms["multi_view"] = self._multi_view(output.dense, batch, see)
        if objective.total_variation.weight:
            terms["total_variation"] = total_variation(output.dense)
        if objective.self_distillation.weight:
            terms["self_distillation"] = self._self_distillation(output, batch, see)
        weighted = [getattr(objective, name).weight * term for name, term in terms.items()]
        return torch.stack(weighted).sum(), {name: term.detach() for name, term in (terms | compared).items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, if it is due; to be called after every step of the optimizer."""
        settings = self.config.objective.self_distillation
        if self.teacher is None or (step + 1) % settings.every:
            return
        # The running statistics belong to the weights and move with them.
        for theirs, ours in zip(self.teacher.state_dict().values(), self.up.state_dict().values(), strict=True):
            if theirs.is_floating_point():
                theirs.lerp_(ours, 1 - settings.decay)
            else:
                theirs.copy_(ours)

    def _features(self, batch: Batch) -> Tensor:
        if not self.caches or not batch.keys:
            return self._extract(batch.image, batch.backbone)
        features = list(batch.features)
        for index, (key, known) in enumerate(zip(batch.keys, features, strict=True)):
            if known is None:
                # One at a time: what is kept must not depend on the batch-mates, not even in its last bit.
                made = self._extract(batch.image[index : index + 1], batch.backbone)[0]
                self.caches[batch.backbone].write(key, made)
                features[index] = made
        return torch.stack(cast(list[Tensor], features))

    @torch.no_grad()
    def _extract(self, image: Tensor, number: int) -> Tensor:
        backbone = self.backbones[number]
        return cast(Tensor, backbone(backbone.normalise(image))).to(self.up.dtype)

    def _scale(self, features: Tensor, step: int) -> Callable[[Tensor], Tensor]:
        """What brings the features of the pictures, and of other views of them, to the scale of the terms."""
        model = self.config.model
        if model.values == "projected":
            return lambda seen: seen  # the channel norm does it
        kept = draw_channels(features.shape[1], model.channel_dropout, self.config.seed, step)
        if kept is None:
            return standardisation(features)
        chosen = kept.to(features.device)
        standardise = standardisation(features[:, chosen])
        return lambda seen: standardise(seen[:, chosen])

    @torch.no_grad()
    def _normalise(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.up.channelnorm(features))

    def _mask_bicubic(self, dense: Tensor, normalised: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        settings = self.config.objective.mask_bicubic
        with torch.no_grad():
            bicubic = F.interpolate(normalised, batch.guidance.shape[-2:], mode="bicubic", align_corners=False)
            masks = [_some(of_picture, settings.masks) for of_picture in batch.masks]
            target = _cut(mask_refine(bicubic, masks, settings.alpha, settings.masks), batch.window)
            baseline = F.mse_loss(_cut(bicubic, batch.window), target)
        return F.mse_loss(dense, target), baseline

    def _self_distillation(self, output: "_Output", batch: Batch, see: See) -> Tensor:
        settings = self.config.objective.self_distillation
        assert self.teacher is not None
        losses = []
        for crop in batch.crops:
            top, left, bottom, right = crop.box
            with torch.no_grad():
                target = self.teacher(see(crop.image), crop.image)
                if settings.refine:
                    target = mask_refine(target, crop.masks, settings.alpha, settings.masks)
                target = pool_to(target, (bottom - top, right - left))
            student = output.at(crop.box)
            student, target = (crop_border(x, settings.border) for x in (student, target))
            losses.append(distance(student, target, settings.distance))
        return torch.stack(losses).mean()

    def _high_resolution(self, dense: Tensor, batch: Batch, see: See) -> Tensor:
        """Compare what both the window and the enlarged region show, in whole cells of the student's features."""
        assert batch.large is not None
        assert batch.region is not None
        factor, cells = batch.factor, batch.image.shape[-1] // self.backbones[batch.backbone].patch_size
        pixels = batch.guidance.shape[-1] // cells  # of the output in a cell
        target = self._normalise(see(batch.large))
        window = batch.window or (0, 0, cells * pixels, cells * pixels)
        rows, columns = (
            (
                max(window[edge] // pixels, -(-batch.region[edge] // factor)),
                min(window[edge + 2] // pixels, batch.region[edge + 2] // factor),
            )
            for edge in (0, 1)
        )
        student = _cut(
            dense,
            (
                rows[0] * pixels - window[0],
                columns[0] * pixels - window[1],
                rows[1] * pixels - window[0],
                columns[1] * pixels - window[1],
            ),
        )
        target = _cut(
            target,
            (
                rows[0] * factor - batch.region[0],
                columns[0] * factor - batch.region[1],
                rows[1] * factor - batch.region[0],
                columns[1] * factor - batch.region[1],
            ),
        )
        pooled = pool_to(student, (target.shape[-2], target.shape[-1]))
        return distance(pooled, target, self.config.objective.high_resolution.distance)

    def _segment_masks(self, batch: Batch) -> list[Tensor]:
        return [_some(of_picture, self.config.objective.segments.masks) for of_picture in batch.masks]

    def _guesses(self, normalised: Tensor, batch: Batch) -> Tensor:
        """What a probe of the masks reads off the cells: (B, M, h, w), zeros for a picture that has fewer masks."""
        settings, masks = self.config.objective.segments, self._segment_masks(batch)
        most = max(map(len, masks))
        h, w = normalised.shape[-2:]
        values = normalised.new_zeros(len(masks), max(1, most), h, w)
        for index, of_picture in enumerate(masks):
            if len(of_picture):
                values[index, : len(of_picture)] = read_membership(normalised[index], of_picture, settings.ridge)
        return values

    def _segments(self, read: Tensor, batch: Batch) -> Tensor:
        """The guesses as the student's attention averages them, against the masks' pixels."""
        losses = [
            membership_loss(own[: len(of_picture)], _cut(of_picture, batch.window))
            for own, of_picture in zip(read, self._segment_masks(batch), strict=True)
        ]
        return torch.stack(losses).mean()

    def _multi_view(self, dense: Tensor, batch: Batch, see: See) -> Tensor:
        assert self.downsampler is not None
        losses = []
        for motion in draw_motions(self.config.objective.multi_view, self.config.seed, batch.step):
            target = self._normalise(see(motion(batch.image)))
            losses.append(F.mse_loss(self.downsampler(motion(dense)), target))
        return torch.stack(losses).mean()


class _Output:
    """The student's output for a batch, computed where it is asked for.

    With ``whole`` everything is cut out of the whole map: batch statistics of a part would be others. ``beside``, with
    values="features", is averaged in the same pass.
    """

    def __init__(
        self, up: LoftUp, normalised: Tensor, batch: Batch, *, whole: bool, beside: Tensor | None = None
    ) -> None:
        self.up, self.normalised, self.batch, self.whole, self._given = up, normalised, batch, whole, beside

    @functools.cached_property
    def _both(self) -> Tensor:
        values = None if self._given is None else torch.cat([self.normalised, self._given], 1)
        return self._window(self.batch.window, values)

    @functools.cached_property
    def dense(self) -> Tensor:
        """The batch's window, in the dtype of the targets."""
        return self._both[:, : self.normalised.shape[1]]

    @functools.cached_property
    def beside(self) -> Tensor:
        """The same window of ``beside``."""
        return self._both[:, self.normalised.shape[1] :]

    def at(self, box: Box) -> Tensor:
        """Any box, given in pixels of the whole output."""
        if self.batch.window is None and (self.whole or "dense" in self.__dict__):
            return _cut(self.dense, box)
        return self._window(box)

    def _window(self, box: Box | None, values: Tensor | None = None) -> Tensor:
        # Autocast may have made it half precision.
        return upsample_window(self.up, self.normalised, self.batch.guidance, box, values).to(self.normalised.dtype)


def _some(masks: Tensor, most: int) -> Tensor:
    """At most so many masks, evenly spaced: those of a picture are a random choice for the term that takes most."""
    if len(masks) <= most:
        return masks
    return masks[torch.arange(most, device=masks.device) * len(masks) // most]


def _cut(x: Tensor, box: Box | None) -> Tensor:
    return x if box is None else x[..., box[0] : box[2], box[1] : box[3]]


def _check_multi_view(config: TrainConfig) -> None:
    if not config.objective.multi_view.weight:
        return
    if config.window is not None:
        raise LoftUpError(
            f"objective.multi_view moves and downsamples the whole output, but window={config.window} leaves a part of "
            "it; set window to null"
        )
    if len(set(config.data.ratios)) > 1:
        raise LoftUpError(
            f"objective.multi_view learns a downsampler for one ratio of output to input, data.ratios holds "
            f"{', '.join(f'{ratio:g}' for ratio in config.data.ratios)}; give one"
        )
    if (count := len(config.backbones)) > 1 or config.model.channel_dropout:
        what = f"there are {count} backbones" if count > 1 else f"channel_dropout={config.model.channel_dropout:g}"
        raise LoftUpError(
            f"objective.multi_view learns a downsampler for all channels of one backbone, {what}; set "
            "objective.multi_view.weight=0, or give one backbone and model.channel_dropout=0"
        )
