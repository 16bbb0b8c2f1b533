"""The weighted sum of terms that a run is trained on, with the networks that it takes besides the student."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import LoftUpError
from ...model import LoftUp
from ..config import AVERAGING, TrainConfig
from ..data.cache import FeatureCache, open_caches
from ..data.jitter import jitter
from ..data.loader import backbone_list
from ..data.views import Batch
from .classes import Classes
from .high_resolution import high_resolution
from .imitation import Imitation
from .maps import project
from .mask_bicubic import mask_bicubic
from .multi_view import AttentionDownsampler, draw_motions
from .segments import guesses, segments
from .self_distillation import follow, self_distillation
from .shifted import Teacher, make_teacher, shifted
from .standardise import draw_channels, draw_rotation, standardisation
from .start import freeze_batch_norm
from .student import Output
from .total_variation import total_variation

__all__ = ["Objective"]


class Objective(nn.Module):
    """From a batch to the loss. The state dict holds student, teacher, downsampler and probes, not the backbone.

    The teacher is a copy of the student as it is handed over, whose weights and statistics must therefore be set
    before; :meth:`after_step` alone changes it.

    Terms compare in the space that the student's channel norm makes. The universal network has none: its output is in
    the backbone's own space, and moves with every shift and scaling of a channel: there each picture's
    features are standardised per channel over its cells (:mod:`loftup.train.objective.standardise`), and what the
    backbone says of the enlarged picture, of the teacher's crops and of moved views is mapped by the same means and
    deviations, so that it stays comparable. ``model.channel_dropout`` leaves channels out of all of these alike, and
    ``model.channel_mixing`` rotates them.

    Args:
        config: of the run, whose values :func:`loftup.train.config.check` has accepted; terms of weight 0 cost nothing.
        up: the student, float32; made trainable here, all but its channel norm: the targets live in the space it makes.
        backbone: in evaluation mode, on the student's device; several where the config has several.

    Attributes:
        backbones: as a list.
        up: the student.
        teacher: its moving average, frozen and in evaluation mode; None without self-distillation.
        downsampler: of the multi-view consistency; None without it.
        classes: the probes of the classes; None without that term.

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
        self.finer: list[Backbone] = []  # the same backbones, looking at shifted views
        self.finer_caches: list[FeatureCache] = []
        if config.objective.shifted.weight:
            self.finer = [each.with_views(config.objective.shifted.views) for each in self.backbones]
            # In a list it stays out of the state dict: its weights never change.
            self._upsamplers: list[Teacher] = [make_teacher(config.objective.shifted, up.device)]
            self.finer_caches = open_caches(config, self.finer)
        self.imitation: Imitation | None = None
        if config.objective.imitation.weight:
            self.imitation = Imitation(config, self.backbones, self.caches, up.device)
        self.classes = Classes(config, self.backbones).to(up.device) if config.objective.classes.weight else None
        self.up = up
        up.requires_grad_(True).channelnorm.requires_grad_(False)
        self.teacher: LoftUp | None = None
        if config.objective.self_distillation.weight:
            self.teacher = copy.deepcopy(up).requires_grad_(False)
        self.downsampler: AttentionDownsampler | None = None
        if config.objective.multi_view.weight:
            (only,) = self.backbones
            cell = round(only.stride * config.data.ratios[0])
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
        config, model = self.config.objective, self.config.model
        features = self._features(batch)
        scale = self._scale(features, batch.step)
        shown = batch  # to the student
        if self.config.data.guidance_jitter:
            guidance = jitter(batch.guidance, self.config.data.guidance_jitter, self.config.seed, batch.step)
            shown = replace(batch, guidance=guidance)

        def see(image: Tensor) -> Tensor:
            return scale(self._extract(self.backbones[batch.backbone], image))

        normalised = self._normalise(scale(features))
        whole = model.architecture == "loftup" and model.batch_norm == "batch"
        beside: dict[str, Tensor] = {}
        if config.segments.weight:
            beside["segments"] = guesses(config.segments, normalised, batch)
        on_all_channels: dict[str, Classes | Imitation] = {}
        if self.classes is not None:
            on_all_channels["classes"] = self.classes
        if self.imitation is not None and self.imitation.applies(batch):
            on_all_channels["imitation"] = self.imitation
        if on_all_channels:
            every = standardisation(features)
        for name, term in on_all_channels.items():
            beside[name] = term.values(features, every, batch)
        dense = any(weight for name, weight in config.weights.items() if name not in AVERAGING)
        output = Output(self.up, normalised, shown, whole=whole, beside=beside, dense=dense)
        terms: dict[str, Tensor] = {}
        compared: dict[str, Tensor] = {}
        if config.mask_bicubic.weight:
            loss, compared["bicubic"] = mask_bicubic(config.mask_bicubic, output.dense, normalised, batch)
            terms["mask_bicubic"] = loss
        if config.high_resolution.weight:
            assert batch.large is not None
            target = self._normalise(see(batch.large))
            cells = int(batch.image.shape[-1] // self.backbones[batch.backbone].stride)
            terms["high_resolution"] = high_resolution(config.high_resolution, output.dense, target, batch, cells)
        if config.shifted.weight:
            views = self._normalise(scale(self._shifted(batch)))
            terms["shifted"] = shifted(config.shifted, output.dense, views, batch, self._upsamplers[0])
        if config.segments.weight:
            terms["segments"] = segments(config.segments, output.windows["segments"], batch)
        for name, term in on_all_channels.items():
            terms[name] = term.loss(output.windows[name], features, every, batch)
        if config.multi_view.weight:
            terms["multi_view"] = self._multi_view(output.dense, batch, lambda image: self._normalise(see(image)))
        if config.total_variation.weight:
            terms["total_variation"] = total_variation(output.dense)
        if self.teacher is not None:
            terms["self_distillation"] = self_distillation(config.self_distillation, self.teacher, output, batch, see)
        loss = torch.stack([config.weights[name] * value for name, value in terms.items()]).sum()
        return loss, {name: value.detach() for name, value in (terms | compared).items()}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, if it is due; to be called after every step of the optimizer."""
        settings = self.config.objective.self_distillation
        if self.teacher is not None and (step + 1) % settings.every == 0:
            follow(self.teacher, self.up, settings.decay)

    def _features(self, batch: Batch) -> Tensor:
        if not self.caches or not batch.keys:
            return self._extract(self.backbones[batch.backbone], batch.image)
        return self._kept(batch, self.caches, self.backbones, batch.features)

    def _shifted(self, batch: Batch) -> Tensor:
        if not self.finer_caches or not batch.keys:
            return self._extract(self.finer[batch.backbone], batch.image)
        cache = self.finer_caches[batch.backbone]
        found = map(cache.read, batch.keys)
        on_device = [None if features is None else features.to(batch.image.device) for features in found]
        return self._kept(batch, self.finer_caches, self.finer, on_device)

    def _kept(
        self, batch: Batch, caches: list[FeatureCache], backbones: list[Backbone], found: list[Tensor | None]
    ) -> Tensor:
        """Features of the batch's images: those found, and the others made and written to the cache."""
        features = list(found)
        for index, key in enumerate(batch.keys):
            if features[index] is None:
                # One at a time: what is kept must not depend on the batch-mates, not even in its last bit.
                entry = self._extract(backbones[batch.backbone], batch.image[index : index + 1])[0]
                caches[batch.backbone].write(key, entry)
                features[index] = entry
        return torch.stack(cast(list[Tensor], features))

    @torch.no_grad()
    def _extract(self, backbone: Backbone, image: Tensor) -> Tensor:
        return cast(Tensor, backbone(backbone.normalise(image))).to(self.up.dtype)

    def _scale(self, features: Tensor, step: int) -> Callable[[Tensor], Tensor]:
        """The map of the pictures' features, and those of other views of them, to the scale of the terms."""
        model = self.config.model
        if not model.universal:
            return lambda x: x  # the channel norm does it
        channels = draw_channels(features.shape[1], model.channel_dropout, self.config.seed, step)
        kept = slice(None) if channels is None else channels.to(features.device)
        standardise = standardisation(features[:, kept])
        rotation = draw_rotation(standardise.mean.shape[1], model.channel_mixing, self.config.seed, step)
        if rotation is None:
            return lambda x: standardise(x[:, kept])
        return lambda x: project(standardise(x[:, kept]), rotation)

    @torch.no_grad()
    def _normalise(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.up.channelnorm(features))

    def _multi_view(self, dense: Tensor, batch: Batch, target: Callable[[Tensor], Tensor]) -> Tensor:
        assert self.downsampler is not None
        term = self.config.objective.multi_view
        losses = [
            F.mse_loss(self.downsampler(motion(dense)), target(motion(batch.image)))
            for motion in draw_motions(self.config.seed, batch.step, term.views, term.zoom, term.shift, term.flip)
        ]
        return torch.stack(losses).mean()


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
    model = config.model
    if (count := len(config.backbones)) > 1 or model.channel_dropout or model.channel_mixing:
        what = f"channel_dropout={model.channel_dropout:g}" if model.channel_dropout else "channel_mixing is on"
        what = f"there are {count} backbones" if count > 1 else what
        raise LoftUpError(
            f"objective.multi_view learns a downsampler for all channels of one backbone, {what}; set "
            "objective.multi_view.weight=0, or give one backbone, model.channel_dropout=0 and model.channel_mixing=0"
        )
