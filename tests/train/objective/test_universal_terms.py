"""The objective of the universal network: terms in standardised features, and on a part of the channels."""

import pytest
import torch
import torch.nn.functional as F
from small_objective import (
    PATCH,
    SIZE,
    backbone,
    batch,
    close,
    crops,
    cut,
    features_config,
    full_batch,
    motions,
    scale,
    seen,
    upsampler,
)

from loftup import Backbone, LoftUpError
from loftup.train.config import BackboneConfig
from loftup.train.data.views import TrainingViews, collate
from loftup.train.objective.mask_bicubic import mask_bicubic_target, mask_refine
from loftup.train.objective.objective import Objective
from loftup.train.objective.standardise import draw_channels
from loftup.train.objective.student import upsample_window

TERMS = ("mask_bicubic", "self_distillation", "high_resolution", "multi_view", "total_variation")


class TestTerms:
    def test_masks(self):
        term, data = Objective(features_config("mask_bicubic"), upsampler(), backbone()), batch(window=(8, 4, 20, 16))
        low = seen(term, data.image)
        target = mask_bicubic_target(scale(low, low), data.masks, (SIZE, SIZE), 0.8, 150)
        with torch.no_grad():
            student = scale(term.up.upsampler(low, data.guidance), low)  # the network moves with its features
        loss, parts = term(data)
        close(loss, (cut(student, data.window) - cut(target, data.window)).square().mean())
        bicubic = F.interpolate(scale(low, low), (SIZE, SIZE), mode="bicubic")
        close(parts["bicubic"], (cut(bicubic, data.window) - cut(target, data.window)).square().mean())

    def test_the_enlarged_picture_is_mapped_by_the_pictures_own_numbers(self):
        term, data = Objective(features_config("high_resolution"), upsampler(), backbone()), full_batch()
        low = seen(term, data.image)
        with torch.no_grad():
            student = scale(F.avg_pool2d(term.up.upsampler(low, data.guidance), 2), low)
        close(term(data)[0], (student - scale(seen(term, data.large), low)).square().mean())

    def test_so_are_the_teachers_crops(self):
        made = features_config("self_distillation", objective__self_distillation__distance="l2")
        term, data = Objective(made, upsampler(), backbone()), batch(crops=crops([(0, 3, 12, 15)]))
        with torch.no_grad():
            for parameter in term.up.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            low, (crop,) = seen(term, data.image), data.crops
            target = scale(term.teacher.upsampler(seen(term, crop.image), crop.image), low)
            student = scale(term.up.upsampler(low, data.guidance), low)
        target = F.avg_pool2d(mask_refine(target, crop.masks), 2)[..., 1:-1, 1:-1]
        close(term(data)[0], (cut(student, crop.box)[..., 1:-1, 1:-1] - target).square().mean())

    def test_and_moved_views(self):
        made = features_config("multi_view")
        term, data = Objective(made, upsampler(), backbone()), batch()
        low, losses = seen(term, data.image), []
        with torch.no_grad():
            student = scale(term.up.upsampler(low, data.guidance), low)
            for motion in motions(made, data.step):
                target = scale(seen(term, motion(data.image)), low)
                losses.append((term.downsampler(motion(student)) - target).square().mean())
        close(term(data)[0], torch.stack(losses).mean())

    def test_the_backbones_scale_does_not_matter(self):
        """A backbone whose channels are scaled and shifted gives the same loss."""
        made = features_config(*(name for name in TERMS if name != "multi_view"))
        up, one, data = upsampler(), backbone(), full_batch()
        other = backbone()
        with torch.no_grad():
            factor = torch.rand(8) + 0.5
            other.model.convolution.weight.copy_(one.model.convolution.weight * factor.view(8, 1, 1, 1))
            other.model.convolution.bias.copy_(one.model.convolution.bias * factor + 3)
        close(Objective(made, up, other)(data)[0], Objective(made, up, one)(data)[0], 1e-3)

    def test_every_weight_of_the_network_gets_a_gradient(self):
        term = Objective(features_config(*TERMS), upsampler(), backbone())
        term(full_batch())[0].backward()
        for name, parameter in term.named_parameters():
            assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (
                not name.startswith("teacher.")
            ), name

    def test_under_autocast_the_loss_is_float32(self):
        term, data = Objective(features_config("high_resolution"), upsampler(), backbone()), full_batch()
        exact = term(data)[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = term(data)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=0.1)


class TestWindow:
    @pytest.mark.parametrize("box", [(0, 0, 24, 24), (3, 5, 17, 24), (23, 0, 24, 1)], ids=str)
    def test_equals_the_cut(self, box):
        up, low, image = upsampler(), torch.randn(2, 8, 6, 6), torch.rand(2, 3, SIZE, SIZE)
        with torch.no_grad():
            whole = upsample_window(up, low, image, None)
            torch.testing.assert_close(upsample_window(up, low, image, box), cut(whole, box), rtol=0, atol=1e-5)
            torch.testing.assert_close(whole, up.upsampler(low, image))

    def test_refuses_boxes_outside(self):
        with pytest.raises(ValueError, match=r"window \(0, 0, 25, 3\) does not lie in an image of 24x24"):
            upsample_window(upsampler(), torch.randn(1, 8, 6, 6), torch.rand(1, 3, SIZE, SIZE), (0, 0, 25, 3))


class TestChannelDropout:
    def test_student_and_target_lose_the_same_channels(self):
        made = features_config("high_resolution", model__channel_dropout=0.9)
        wide = Backbone(
            model := torch.nn.Conv2d(3, 20, PATCH, PATCH), model, channels=20, patch_size=PATCH, mean=(0, 0, 0),
            std=(1, 1, 1),
        ).eval()  # fmt: skip
        term, counts = Objective(made, upsampler(), wide), set()
        for step in range(6):
            data = full_batch()
            data.step = step
            kept = draw_channels(20, 0.9, made.seed, step)
            counts.add(len(kept))
            with torch.no_grad():
                low, fine = model(data.image)[:, kept], model(data.large)[:, kept]
                student = scale(F.avg_pool2d(term.up.upsampler(low, data.guidance), 2), low)
            close(term(data)[0], (student - scale(fine, low)).square().mean())
        assert len(counts) > 1

    def test_the_teacher_and_masks_too(self):
        made = features_config("mask_bicubic", "self_distillation", "total_variation", model__channel_dropout=0.9)
        wide = Backbone(model := torch.nn.Conv2d(3, 20, PATCH, PATCH), model, channels=20, patch_size=PATCH).eval()
        loss, parts = Objective(made, upsampler(), wide)(full_batch())
        assert loss.isfinite()
        assert parts.keys() == {"mask_bicubic", "bicubic", "self_distillation", "total_variation"}


def two(**settings):
    """A config with two backbones, and these: 8 channels of patches of 4 pixels, 5 channels of 8."""
    made = features_config(**settings)
    made.backbones = [BackboneConfig("one"), BackboneConfig("other")]
    model = torch.nn.Conv2d(3, 5, 8, 8)
    return made, [backbone(), Backbone(model, model, channels=5, patch_size=8, name="other").eval()]


class TestSeveral:
    def test_the_batch_says_whose_features_are_meant(self, monkeypatch):
        made, backbones = two(objective__high_resolution__weight=1.0)
        shapes = []
        monkeypatch.setattr(
            "loftup.train.objective.student.upsample_window",
            lambda up, low, *rest: (shapes.append(low.shape), upsample_window(up, low, *rest))[1],
        )
        term = Objective(made, upsampler(), backbones)
        assert term(full_batch())[0].isfinite()
        data = full_batch(backbone=1)
        data.region = (0, 0, 6, 6)
        assert term(data)[0].isfinite()
        assert shapes == [(2, 8, 6, 6), (2, 5, 3, 3)]
        assert not any("backbone" in name for name, _ in term.named_modules())

    def test_each_has_its_own_cache(self, tmp_path):
        made, backbones = two(objective__mask_bicubic__weight=1.0, data__cache=str(tmp_path), data__views=1)
        term = Objective(made, upsampler(), backbones)
        assert len({cache.folder for cache in term.caches}) == 2
        for number, channels in ((0, 8), (1, 5)):
            data = batch(backbone=number)
            data.keys = [term.caches[number].key(image) for image in data.image]
            data.features = [None, None]
            first = term(data)[0]
            data.features = [term.caches[number].read(key) for key in data.keys]
            assert [features.shape[0] for features in data.features] == [channels, channels]
            assert term(data)[0] == first

    def test_there_must_be_as_many_as_in_the_config(self):
        made, backbones = two(objective__mask_bicubic__weight=1.0)
        with pytest.raises(ValueError, match="got 1 backbones, the config has 2; give one for each of config.backb"):
            Objective(made, upsampler(), backbones[:1])
        with pytest.raises(ValueError, match="got 2 backbones, the config has 1"):
            Objective(features_config("mask_bicubic"), upsampler(), backbones)

    def test_the_multi_view_downsampler_is_for_one(self):
        made, backbones = two(objective__multi_view__weight=1.0)
        with pytest.raises(
            LoftUpError, match="learns a downsampler for all channels of one backbone, there are 2 back"
        ):
            Objective(made, upsampler(), backbones)
        with pytest.raises(LoftUpError, match=r"of one backbone, channel_mixing is on; set objective.multi_view"):
            Objective(features_config("multi_view", model__channel_mixing=0.5), upsampler(), backbone())
        made = features_config("multi_view", model__channel_dropout=0.5)
        with pytest.raises(
            LoftUpError, match=r"of one backbone, channel_dropout=0.5; set objective.multi_view.weight=0"
        ):
            Objective(made, upsampler(), backbone())


class Noise:
    """One picture."""

    def __len__(self):
        return 1

    def read(self, index, generator):
        from loftup.train.data.sources import LabelMap, Picture

        image = torch.randint(0, 256, (3, 80, 90), generator=torch.Generator().manual_seed(0)).byte()
        return Picture("noise", image, LabelMap(image[0].numpy() // 64))


def test_views_are_made_for_the_steps_backbone():
    made, backbones = two(objective__high_resolution__weight=1.0, data__sizes=[48], data__ratios=[0.5])
    made.objective.high_resolution.factors, made.objective.high_resolution.crop = [2], True
    views = TrainingViews(Noise(), made, [each.patch_size for each in backbones])
    term, numbers = Objective(made, upsampler(), backbones), set()
    for step in range(6):
        data = collate([views[step, 0], views[step, 1]])
        numbers.add(data.backbone)
        cells = 48 // (4, 8)[data.backbone]
        assert data.region[2] - data.region[0] == cells
        assert data.large.shape == (2, 3, 48, 48)
        assert term(data)[0].isfinite()
    assert numbers == {0, 1}
