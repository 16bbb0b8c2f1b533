"""The weighted sum: every term against its plain form, and student and targets at the same places."""

import copy

import pytest
import torch
import torch.nn.functional as F
from material import randomised
from small_objective import (
    ALL,
    CHANNELS,
    PATCH,
    SIZE,
    backbone,
    batch,
    close,
    config,
    crops,
    cut,
    full_batch,
    motions,
    normalised,
    objective,
    whole,
)
from torch import nn

from loftup import Backbone, LoftUp, LoftUpConfig, LoftUpError
from loftup.train.data.plan import Cells
from loftup.train.data.sources import LabelMap, Picture
from loftup.train.data.views import Batch, Crop, TrainingViews, collate
from loftup.train.objective.distances import affinity_loss
from loftup.train.objective.mask_bicubic import mask_bicubic_target, mask_refine
from loftup.train.objective.objective import Objective

TERMS = ("mask_bicubic", "self_distillation", "high_resolution", "multi_view", "total_variation")


class TestMaskBicubic:
    @pytest.mark.parametrize("window", [None, (8, 4, 16, 12)])
    @pytest.mark.parametrize("output", [SIZE, 48])
    def test_equals_the_plain_loss(self, window, output):
        term = objective(config("mask_bicubic", objective__mask_bicubic__alpha=0.7, objective__mask_bicubic__masks=2))
        data = batch(output=output, window=window)
        loss, parts = term(data)
        features = normalised(term, data.image)
        target = mask_bicubic_target(features, data.masks, (output, output), 0.7, 2)
        bicubic = F.interpolate(features, (output, output), mode="bicubic")
        close(loss, (cut(whole(term, data), window) - cut(target, window)).square().mean())
        close(parts["bicubic"], (cut(bicubic, window) - cut(target, window)).square().mean(), 1e-6)
        assert parts.keys() == {"mask_bicubic", "bicubic"}

    def test_pictures_without_masks(self):
        term, data = objective(config("mask_bicubic")), batch()
        data.masks = [torch.zeros(0, SIZE, SIZE, dtype=torch.bool)] * 2
        _, parts = term(data)
        assert parts["bicubic"] == 0
        assert parts["mask_bicubic"] > 0


class TestSelfDistillation:
    @pytest.mark.parametrize("distance", ["affinity", "l2", "cosine"])
    @pytest.mark.parametrize("refine", [True, False])
    def test_equals_the_plain_loss(self, distance, refine):
        made = config("self_distillation")
        made.objective.self_distillation.distance = distance
        made.objective.self_distillation.refine = refine
        made.objective.self_distillation.alpha = 0.6
        made.objective.self_distillation.masks = 1
        term = objective(made)
        with torch.no_grad():
            for parameter in term.up.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        data = batch(crops=crops([(0, 3, 12, 15), (10, 11, 20, 21)]))
        loss, parts = term(data)
        student, expected = whole(term, data), []
        for crop in data.crops:
            with torch.no_grad():
                target = term.teacher.upsampler(normalised(term, crop.image), crop.image)
            target = mask_refine(target, crop.masks, 0.6, 1) if refine else target
            side = crop.box[2] - crop.box[0]
            target = F.interpolate(target, (side, side), mode="area")[..., 1:-1, 1:-1]
            seen = cut(student, crop.box)[..., 1:-1, 1:-1]
            if distance == "affinity":
                expected.append(affinity_loss(seen, target))
            elif distance == "l2":
                expected.append((seen - target).square().mean())
            else:
                expected.append((1 - F.cosine_similarity(seen, target)).mean())
        close(loss, torch.stack(expected).mean())
        assert parts.keys() == {"self_distillation"}
        assert not parts["self_distillation"].requires_grad

    def test_the_border_can_be_kept(self):
        made = config("self_distillation", objective__self_distillation__border=0.0)
        made.objective.self_distillation.distance = "l2"
        made.objective.self_distillation.refine = False
        term, data = objective(made), batch(crops=crops([(0, 3, 12, 15)]))
        with torch.no_grad():
            target = term.teacher.upsampler(normalised(term, data.crops[0].image), data.crops[0].image)
        target = F.avg_pool2d(target, 2)
        close(term(data)[0], (cut(whole(term, data), (0, 3, 12, 15)) - target).square().mean())


class TestHighResolution:
    @pytest.mark.parametrize("distance", ["l2", "cosine"])
    def test_of_twice_the_image_is_lifts_loss(self, distance):
        term = objective(config("high_resolution", objective__high_resolution__distance=distance))
        data = batch(factor=2, large=torch.rand(2, 3, 48, 48), region=(0, 0, 12, 12))
        target, pooled = normalised(term, data.large), F.avg_pool2d(whole(term, data), 2)
        if distance == "l2":
            expected = (pooled - target).square().mean()
        else:
            expected = (1 - (F.normalize(pooled) * F.normalize(target)).sum(1)).mean()
        close(term(data)[0], expected)

    def test_on_a_window(self):
        term, window = objective(config("high_resolution")), (8, 4, 20, 16)
        data = batch(factor=4, large=torch.rand(2, 3, 96, 96), region=(0, 0, 24, 24), window=window)
        # Cells of 4 pixels, target cells of 1.
        target = normalised(term, data.large)[..., 8:20, 4:16]
        close(term(data)[0], (cut(whole(term, data), window) - target).square().mean())

    @pytest.mark.parametrize(
        ("window", "region", "seen"),
        [
            ((8, 4, 16, 12), (3, 1, 9, 7), (8, 4, 16, 12)),  # in cells (2, 1, 4, 3): k-ths (4, 2, 8, 6), inside
            ((0, 4, 16, 20), (3, 4, 9, 10), (8, 8, 16, 20)),  # k-ths 3..9 hold the whole cells 2..4, 4..10 hold 2..5
            (None, (2, 6, 8, 12), (4, 12, 16, 24)),
            (None, (3, 5, 9, 11), (8, 12, 16, 20)),
        ],
    )
    def test_a_part_is_compared_where_both_are_seen(self, window, region, seen):
        term = objective(config("high_resolution"))
        data = batch(factor=2, large=torch.rand(2, 3, SIZE, SIZE), region=region, window=window)
        top, left, bottom, right = (edge // 2 for edge in seen)
        target = normalised(term, data.large)[
            ..., top - region[0] : bottom - region[0], left - region[1] : right - region[1]
        ]
        pooled = F.avg_pool2d(cut(whole(term, data), seen), 2)
        assert pooled.shape == target.shape
        close(term(data)[0], (pooled - target).square().mean())

    def test_cells_that_are_no_whole_pixels(self):
        term = objective(config("high_resolution"))
        data = batch(factor=3, large=torch.rand(2, 3, 72, 72), region=(0, 0, 18, 18))
        pooled = F.adaptive_avg_pool2d(whole(term, data), (18, 18))
        close(term(data)[0], (pooled - normalised(term, data.large)).square().mean())


class TestMultiView:
    @pytest.mark.parametrize("ratio", [1.0, 2.0])
    def test_equals_the_plain_loss(self, ratio):
        made = config("multi_view", data__ratios=[ratio], objective__multi_view__views=3)
        term, data = objective(made), batch(output=round(SIZE * ratio))
        losses = []
        for motion in motions(made, data.step):
            with torch.no_grad():
                moved = term.downsampler(motion(whole(term, data)))
            losses.append((moved - normalised(term, motion(data.image))).square().mean())
        loss, _ = term(data)
        assert len(losses) == 3
        assert term.downsampler.cell == PATCH * ratio
        close(loss, torch.stack(losses).mean())
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in term.downsampler.parameters() if p.ndim > 1)


def test_total_variation_is_that_of_the_window():
    term, window = objective(config("total_variation")), (4, 8, 12, 20)
    data = batch(window=window)
    dense = cut(whole(term, data), window)
    expected = dense.diff(dim=-1).abs().mean() + dense.diff(dim=-2).abs().mean()
    close(term(data)[0], expected)


class TestSum:
    def test_weights(self):
        term, data = objective(config(*TERMS)), full_batch()
        loss, parts = term(data)
        assert parts.keys() == {*TERMS, "bicubic"}
        close(loss, sum((1.0 + index) * parts[name] for index, name in enumerate(TERMS)))
        assert not any(part.requires_grad for part in parts.values())
        for name in TERMS:
            alone = objective(config(name), copy.deepcopy(term.up), term.backbones[0])
            if name == "multi_view":
                alone.downsampler = term.downsampler
            close(alone(data)[1][name], parts[name])

    def test_every_trained_parameter_gets_a_gradient(self):
        term = objective(config(*TERMS))
        term(full_batch())[0].backward()
        for name, parameter in term.named_parameters():
            trained = not name.startswith(("teacher.", "up.channelnorm."))
            assert parameter.requires_grad == trained, name
            assert (parameter.grad is not None) == trained, name

    def test_is_the_mean_over_the_pictures(self):
        term, data = objective(config(*TERMS)), full_batch()
        together = term(data)[0]
        losses = []
        for i in range(2):
            one = slice(i, i + 1)
            parts = [Crop(c.image[one], c.masks[one], c.box) for c in data.crops]
            alone = Batch(
                step=3, names=["a"], image=data.image[one], guidance=data.guidance[one], masks=data.masks[one],
                crops=parts, large=data.large[one], **ALL,
            )  # fmt: skip
            losses.append(term(alone)[0])
        close(torch.stack(losses).mean(), together)

    def test_under_autocast_the_loss_is_float32(self):
        term, data = objective(config(*TERMS)), full_batch()
        exact = term(data)[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = term(data)
        assert loss.dtype == torch.float32
        assert {part.dtype for part in parts.values()} == {torch.float32}
        assert loss.item() == pytest.approx(exact.item(), rel=0.05)
        assert loss != exact
        loss.backward()
        assert all(p.grad.isfinite().all() for p in term.parameters() if p.grad is not None)

    def test_in_float64(self):
        term = objective(config("mask_bicubic", "self_distillation"), randomised(LoftUpConfig(CHANNELS)).double())
        loss, _ = term(full_batch())
        assert loss.dtype == torch.float64


class Position(LoftUp):
    """An upsampler whose output is its guidance, that is, the place in the picture."""

    def __init__(self):
        super().__init__(LoftUpConfig(3, channel_norm="identity", heads=1))

    def forward(self, features, image, size=None):
        return image


class Slopes:
    """A small picture whose red and green rise by 4 a row and a column."""

    def __len__(self):
        return 1

    def read(self, index, generator):
        rows, columns = torch.meshgrid(torch.arange(60), torch.arange(62), indexing="ij")
        image = torch.stack([4 * rows, 4 * columns, rows + columns]).byte()
        return Picture("slopes", image, LabelMap(rows.numpy() // 20))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("several", [1, 4])
def test_student_and_targets_show_the_same_places(flip, ratio, window, part, several, monkeypatch):
    """With features that are places: misaligned by half an output pixel, the means would differ by more than 0.3."""
    monkeypatch.setattr(
        "loftup.train.objective.student.upsample_window",
        lambda up, features, guidance, box, values=None: cut(guidance, box),
    )
    pairs = []

    def record(student, target, kind):
        pairs.append((student, target))
        return torch.zeros((), requires_grad=True)

    for term in ("high_resolution", "self_distillation"):
        monkeypatch.setattr(f"loftup.train.objective.{term}.distance", record)
    made = config("self_distillation", "high_resolution", data__sizes=[128], data__ratios=[ratio], data__flip=flip)
    made.window, made.data.scale, made.objective.high_resolution.crop = window, [0.5, 0.7], part
    made.objective.self_distillation.refine = False
    made.backbone.views = several
    places = Backbone(
        nn.Identity(),
        lambda x: F.avg_pool2d(x, 16),
        channels=3,
        patch_size=16,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        views=several,
    ).eval()
    views = TrainingViews(Slopes(), made, Cells(16, 1 if several == 1 else 2))
    term = Objective(made, Position(), places)
    for step in range(3):
        pairs.clear()
        term(collate([views[step, 0], views[step, 1]]))
        assert len(pairs) == 3
        for student, target in pairs:
            assert student.shape == target.shape
            assert student.shape[-1] > 2
            # The resampling filter repeats what lies beyond the picture: compare where nothing does.
            inside = ((student[:, :2] > 30 / 255) & (student[:, :2] < 200 / 255)).all(1, keepdim=True)
            if inside.sum() < 50:
                continue
            error = 255 * ((student - target) * inside)[:, :2].sum((0, 2, 3)) / inside.sum()
            assert error.abs().max() < 0.2, (student.shape, error)


class TestBackbone:
    def test_is_no_part_of_the_module(self):
        term = objective(config("mask_bicubic", "self_distillation"))
        assert not any("backbone" in name for name in term.state_dict())
        assert not any("backbone" in name for name, _ in term.named_modules())
        term.train()
        assert not term.backbones[0].training
        term(full_batch())[0].backward()
        assert all(p.grad is None for p in term.backbones[0].parameters())

    def test_sees_normalised_images(self):
        term, data = objective(config("mask_bicubic")), batch()
        term(data)
        (seen,) = term.backbones[0].model.seen
        expected = (data.image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
            3, 1, 1
        )
        torch.testing.assert_close(seen, expected)

    def test_is_refused_in_training_mode(self):
        with pytest.raises(ValueError, match="the backbone is in training mode, .* call backbone.eval()"):
            objective(config("mask_bicubic"), model=backbone().train())

    def test_is_refused_with_other_channels(self):
        with pytest.raises(ValueError, match="the backbone gives 8 channels, the student takes 24"):
            objective(config("mask_bicubic"), up=LoftUp(24))


class TestCache:
    def data(self, term):
        data = batch()
        data.keys = [term.caches[0].key(image) for image in data.image]
        data.features = [term.caches[0].read(key) for key in data.keys]
        return data

    def test_the_backbone_runs_once_for_every_picture(self, tmp_path):
        term = objective(config("mask_bicubic", data__cache=str(tmp_path), data__views=1))
        data = self.data(term)
        assert data.features == [None, None]
        first = term(data)[0]
        assert [len(seen) for seen in term.backbones[0].model.seen] == [1, 1]
        data.features = [term.caches[0].read(key) for key in data.keys]
        assert all(features is not None for features in data.features)
        assert term(data)[0] == first
        assert len(term.backbones[0].model.seen) == 2
        torch.testing.assert_close(term.up.channelnorm(torch.stack(data.features)), normalised(term, data.image))

    def test_what_is_missing_alone_is_computed(self, tmp_path):
        term = objective(config("mask_bicubic", data__cache=str(tmp_path), data__views=1))
        data = self.data(term)
        first = term(data)[0]
        data.features = [term.caches[0].read(data.keys[0]), None]
        term.backbones[0].model.seen.clear()
        assert term(data)[0] == first
        assert [len(seen) for seen in term.backbones[0].model.seen] == [1]

    def test_without_keys_the_batch_is_computed(self, tmp_path):
        term = objective(config("mask_bicubic", data__cache=str(tmp_path), data__views=1))
        term(batch())
        assert [len(seen) for seen in term.backbones[0].model.seen] == [2]
        assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            config("multi_view", window=48),
            "objective.multi_view moves and downsamples the whole output, but window=48 leaves a part",
        ),
        (
            config("multi_view", data__ratios=[1.0, 0.5]),
            "learns a downsampler for one ratio of output to input, data.ratios holds 1, 0.5; give one",
        ),
    ],
)
def test_refuses(made, text):
    with pytest.raises(LoftUpError, match=text):
        objective(made)
