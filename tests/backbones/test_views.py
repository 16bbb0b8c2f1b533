"""Shifted views: against patch averages of the reflected picture, and for CNNs and ViTs of timm."""

import copy
import math
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn.functional as F
from small_backbones import vit
from torch import nn

from loftup import Backbone, LoftUp, LoftUpError, Upsampled, load_backbone, wrap
from loftup.backbones.views import offsets, shifted, shifts_a_side


def averaging(patch=14, **options):
    """A backbone whose features are the mean colours of patches."""
    settings = {"channels": 3, "patch_size": patch, "mean": (0, 0, 0), "std": (1, 1, 1), **options}
    return Backbone(nn.Identity(), lambda image: F.avg_pool2d(image, patch), **settings)


def expected(image, patch, count):
    """Patch averages of the reflected picture, cell by cell, around where an upsampler expects each vector."""
    _, _, height, width = image.shape
    margin = patch // 2
    mirrored = F.pad(image, (margin,) * 4, mode="reflect")
    h, w = height * count // patch, width * count // patch
    result = torch.empty(len(image), 3, h, w, dtype=image.dtype)
    for row in range(h):
        for column in range(w):
            # The cell's centre less half a patch, in whole pixels to the left and above.
            top, left = (
                math.floor(Fraction(2 * at + 1, 2 * count) * patch - Fraction(patch, 2)) for at in (row, column)
            )
            part = mirrored[:, :, margin + top : margin + top + patch, margin + left : margin + left + patch]
            result[:, :, row, column] = part.mean((2, 3))
    return result


@pytest.mark.parametrize("views", [1, 4, 9, 16])
@pytest.mark.parametrize(("patch", "size"), [(14, (42, 56)), (16, (48, 32)), (15, (45, 30)), (14, (14, 14))])
def test_a_backbone_that_averages_its_patch_gives_the_averages_around_the_finer_cells(patch, size, views):
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    backbone = averaging(patch, views=views)
    torch.testing.assert_close(backbone(image), expected(image, patch, math.isqrt(views)))
    assert (backbone.patch_size, backbone.views) == (patch, views)


def test_the_shifts_of_two_a_side_are_those_that_were_measured():
    assert offsets(14, 2) == [-4, 3]
    assert offsets(16, 2) == [-4, 4]
    assert offsets(14, 3) == [-5, 0, 4]
    assert offsets(16, 4) == [-6, -2, 2, 6]
    assert offsets(14, 1) == [0]


def test_a_ramp_keeps_its_place():
    """On a ramp each vector is the position that it is centred at; off by less than a pixel."""
    ramp = torch.arange(96.0).expand(1, 3, 64, 96)
    for views in (4, 9, 16):
        count = math.isqrt(views)
        line = averaging(16, views=views)(ramp)[0, 0, 0]
        centres = (torch.arange(6 * count) + 0.5) * 16 / count - 0.5
        away = (line - centres)[count:-count]
        assert away.max() <= 0
        assert away.min() > -1


@pytest.mark.parametrize("size", [(45, 50), (30, 61), (3, 5), (1, 200)])
def test_odd_sizes_are_resized_before_they_are_shifted(size):
    backbone, image = averaging(14, views=4), torch.rand(1, 3, *size)
    resized = backbone.input_size(*size)
    larger = F.interpolate(image, resized, mode="bilinear", align_corners=False)
    torch.testing.assert_close(backbone(image), expected(larger, 14, 2))


def test_a_picture_shifted_by_whole_cells_gives_shifted_grids():
    """Away from the borders, in a network whose field of view is small."""
    backbone = wrap(timm.create_model("test_resnet").eval(), layer=1, views=4)
    assert backbone.patch_size == 4
    scene, cells = torch.randn(1, 3, 176, 176), 40
    first = backbone(scene[:, :, :160, :160])
    second = backbone(scene[:, :, 8:168, 12:172])  # 2 cells down, 3 to the right
    edge = 10
    inside = slice(2 * edge, 2 * (cells - edge))
    moved = slice(2 * (edge + 2), 2 * (cells - edge + 2)), slice(2 * (edge + 3), 2 * (cells - edge + 3))
    torch.testing.assert_close(first[:, :, moved[0], moved[1]], second[:, :, inside, inside], atol=1e-5, rtol=1e-5)
    assert first.std() > 0.01


def moved(image, down, right):
    """The picture seen through a window moved down and right, reflection outside, by PyTorch's own padding."""
    height, width = image.shape[-2:]
    larger = F.pad(image, (20,) * 4, mode="reflect")
    return larger[:, :, 20 + down : 20 + down + height, 20 + right : 20 + right + width]


MODELS = {
    "ViT of 14": (lambda: vit(patch_size=14, img_size=56), {}, [-4, 3]),
    "ViT of 16": (lambda: vit(), {}, [-4, 4]),
    "CNN of 16": (lambda: timm.create_model("test_resnet"), {"layer": 3}, [-4, 4]),
    "CNN of 32": (lambda: timm.create_model("test_efficientnet"), {}, [-8, 8]),
    "CNN of 8, dilated": (lambda: timm.create_model("test_resnet", output_stride=8), {}, [-2, 2]),
    "a module's name": (lambda: timm.create_model("test_resnet"), {"layer": "layer2"}, [-2, 2]),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_each_view_is_the_models_features_of_the_moved_picture(name):
    build, options, shifts = MODELS[name]
    backbone = wrap(build(), **options)
    image = torch.randn(2, 3, *(3 * backbone.multiple, 4 * backbone.multiple))
    finer = backbone.with_views(4)(image)
    assert finer.shape == (2, backbone.channels, *(2 * n for n in backbone(image).shape[2:]))
    for i, down in enumerate(shifts):
        for j, right in enumerate(shifts):
            own = backbone(moved(image, down, right))
            torch.testing.assert_close(finer[:, :, i::2, j::2], own, atol=1e-5, rtol=1e-5)


def test_the_middle_of_nine_views_is_the_picture_itself():
    backbone, image = wrap(vit()), torch.randn(1, 3, 64, 48)
    torch.testing.assert_close(backbone.with_views(9)(image)[:, :, 1::3, 1::3], backbone(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [2, 3, 4, 16, 100])
def test_views_at_once_are_the_views_one_after_another(at_once):
    backbone, image = wrap(vit(), views=16), torch.randn(2, 3, 48, 64)
    batches = []
    backbone.features, run = (lambda x: batches.append(len(x)) or run(x)), backbone.features
    one = backbone(image)
    assert batches == [2] * 16
    batches.clear()
    several = wrap(backbone, views_at_once=at_once)
    torch.testing.assert_close(several(image), one, atol=1e-5, rtol=1e-5)
    assert max(batches) == 2 * min(16, at_once)
    assert sum(batches) == 2 * 16


def test_gradients_reach_the_image_and_are_those_of_patch_averages():
    image = torch.randn(1, 3, 28, 28, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    (given,) = torch.autograd.grad((averaging(14, views=4)(image) * weights).sum(), image)
    (wanted,) = torch.autograd.grad((expected(image, 14, 2) * weights).sum(), image)
    torch.testing.assert_close(given, wanted)
    for views in (4, 9):
        backbone = wrap(vit(), views=views)
        leaf = torch.randn(1, 3, 48, 32, requires_grad=True)
        backbone(leaf).square().sum().backward()
        assert leaf.grad.abs().min() > 0
        assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_trainable_backbone_learns_from_every_view():
    model = vit()
    backbone, image = wrap(model, trainable=True, views=4), torch.randn(1, 3, 32, 48)
    weights = torch.randn(1, 48, 4, 6)
    (backbone(image) * weights).sum().backward()
    given = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    one = wrap(model, trainable=True)
    for i, down in enumerate((-4, 4)):
        for j, right in enumerate((-4, 4)):
            (one(moved(image, down, right)) * weights[:, :, i::2, j::2]).sum().backward()
    torch.testing.assert_close(given, model.patch_embed.proj.weight.grad, atol=1e-4, rtol=1e-4)


def test_autocast_inference_mode_half_precision_and_memory_formats():
    backbone, image = wrap(vit(), views=4), torch.randn(2, 3, 48, 80)
    expected = backbone(image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backbone(image).float(), expected, atol=0.2, rtol=0.1)
    with torch.inference_mode():
        made = backbone(torch.randn(2, 3, 48, 80).copy_(image))
        assert not made.is_inference()
        torch.testing.assert_close(made, expected)
    torch.testing.assert_close(backbone(image.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(backbone(image[:1]), expected[:1], atol=1e-5, rtol=1e-5)
    assert backbone(image).is_contiguous()
    half = copy.deepcopy(backbone).bfloat16()(image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.2, rtol=0.1)


def test_the_model_keeps_its_mode_and_its_statistics():
    model = timm.create_model("test_resnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = wrap(model, layer=2, views=4)
    backbone(torch.randn(2, 3, 64, 64))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestSeveralLayers:
    def test_of_one_stride(self):
        image = torch.randn(1, 3, 48, 64)
        maps = wrap(vit(), layer=[0, 2], views=4)
        joined = wrap(maps.model, layer=[0, 2], join=True, views=4)
        both = maps(image)
        for layer, each in zip((0, 2), both, strict=True):
            alone = wrap(maps.model, layer=layer, views=4)(image)
            torch.testing.assert_close(each, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(joined(image), torch.cat(both, 1), atol=1e-5, rtol=1e-5)
        assert (maps.patch_size, maps.stride, joined.stride) == ((16, 16), (8, 8), 8)

    def test_of_two_strides_is_refused_with_the_reason(self):
        model = timm.create_model("test_resnet").eval()
        expected = r"layers \[2, 3\] have strides of 8, 16 pixels, and views=4 shifts .* each layer by itself, or leave"
        with pytest.raises(LoftUpError, match=expected):
            wrap(model, layer=[2, 3], views=4)
        backbone = wrap(model, layer=[2, 3])
        with pytest.raises(LoftUpError, match=expected):
            backbone.with_views(4)
        assert backbone.views == 1
        assert backbone.stride == (8, 16)


def test_models_of_one_size_are_shifted_after_resizing():
    class Fixed(nn.Module):
        def forward(self, image):
            assert image.shape[2:] == (224, 224)
            return F.avg_pool2d(image, 16)

    model = Fixed()
    backbone = Backbone(model, model, channels=3, patch_size=16, views=4)
    assert backbone.fixed_size == (224, 224)
    image = torch.rand(1, 3, 50, 70)
    larger = F.interpolate(image, (224, 224), mode="bilinear", align_corners=False)
    with pytest.warns(UserWarning, match="takes 224x224 alone"):
        torch.testing.assert_close(backbone(image), expected(larger, 16, 2))


def test_cells_that_are_not_square_are_refused():
    class Wide(nn.Module):
        def forward(self, image):
            assert image.shape[2:] == (32, 128)
            return F.avg_pool2d(image, (8, 4))

    model = Wide()
    backbone = Backbone(model, model, channels=3, patch_size=8, check=False, name="wide")
    with pytest.raises(LoftUpError, match="wide gave a grid of 4 x 32 cells for 32 x 128 pixels; .*cells of 8 pixels"):
        backbone.with_views(4)(torch.rand(1, 3, 32, 128))


def test_a_border_shows_the_picture_where_there_is_some():
    """A network without padding gets its border after the shift, of the picture and not of its mirror image."""

    def features(image):
        return F.avg_pool2d(F.avg_pool2d(image, 6, 1), 8)

    backbone = Backbone(nn.Identity(), features, channels=3, patch_size=8)
    assert backbone._border > 0
    image = torch.rand(1, 3, 40, 48)
    before, after = backbone._border // 2, backbone._border - backbone._border // 2
    finer = backbone.with_views(4)(image)
    larger = F.pad(image, (16,) * 4, mode="reflect")
    for i, down in enumerate((-2, 2)):
        for j, right in enumerate((-2, 2)):
            window = larger[:, :, 16 + down - before : 56 + down + after, 16 + right - before : 64 + right + after]
            torch.testing.assert_close(finer[:, :, i::2, j::2], features(window))


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_reflection_goes_on_where_the_shift_is_larger_than_the_picture(side):
    image = torch.arange(float(side)).view(1, 1, 1, side).expand(1, 1, 2, side)
    there_and_back = [*range(side), *range(side - 2, 0, -1)]
    for right in range(-20, 21):
        line = shifted(image, 0, right, border=3)[0, 0, 0].tolist()
        assert line == [there_and_back[(place + right - 1) % len(there_and_back)] for place in range(side + 3)]


class TestSettings:
    @pytest.mark.parametrize("views", [0, 2, 5, -1, True, 4.0, "4", [4], None])
    def test_other_numbers_are_refused(self, views):
        hint = "; for 2 shifts along each side: views=4" if views == 2 else ""
        with pytest.raises(ValueError, match=r"views must be 1, 4, 9 or 16, .*got") as caught:
            shifts_a_side(views)
        assert str(caught.value).endswith(f"got {views!r}{hint}")
        for build in (averaging().with_views, lambda views: averaging(views=views)):
            with pytest.raises(ValueError, match="views must be 1, 4, 9 or 16"):
                build(views)
        if views is not None:
            for build in (lambda: wrap(vit(), views=views), lambda: Upsampled(vit(), nn.Identity(), views=views)):
                with pytest.raises(ValueError, match="views must be 1, 4, 9 or 16"):
                    build()

    @pytest.mark.parametrize("at_once", [0, -1, True, 2.0, "2"])
    def test_other_batches_of_views_are_refused(self, at_once):
        with pytest.raises(ValueError, match=r"views_at_once must be a positive integer, .*got"):
            averaging(views=4, views_at_once=at_once)
        with pytest.raises(ValueError, match=r"views_at_once must be a positive integer, .*got"):
            averaging().with_views(4, at_once=at_once)

    def test_a_stride_too_fine_for_the_shifts_is_refused(self):
        with pytest.raises(
            LoftUpError, match="views=16 needs 4 shifts of whole pixels within a cell, got a stride of 2"
        ):
            averaging(2, views=16, check=False)
        assert averaging(2, views=4, check=False)(torch.rand(1, 3, 2, 2)).shape == (1, 3, 2, 2)
        with pytest.raises(LoftUpError, match="got a stride of 3 pixels; take views=9"):
            averaging(3, views=16, check=False)

    def test_the_same_backbone_with_other_views_shares_the_model_and_nothing_else(self, monkeypatch):
        backbone, image = wrap(vit()), torch.randn(1, 3, 32, 32)
        monkeypatch.setattr(Backbone, "_measure", lambda *_: pytest.fail("checked again"))
        four = backbone.with_views(4, at_once=2)
        assert (backbone.views, backbone.views_at_once, four.views, four.views_at_once) == (1, 1, 4, 2)
        assert four.model is backbone.model
        assert four.with_views(9).views_at_once == 2
        torch.testing.assert_close(four.with_views(1)(image), backbone(image))
        calls = []
        four.register_forward_hook(lambda *_: calls.append(1))
        four.probe = nn.Linear(2, 2)
        backbone(image)
        assert calls == []
        assert not hasattr(backbone, "probe")
        four(image)
        assert calls == [1]
        nn.init.zeros_(backbone.model.norm.weight)
        nn.init.ones_(backbone.model.norm.bias)
        assert torch.equal(four(image), torch.ones(1, 48, 4, 4))
        assert list(backbone.state_dict()) == [key for key in four.state_dict() if not key.startswith("probe")]

    def test_wrapping_again(self):
        backbone = wrap(vit(), views=4)
        assert wrap(backbone) is backbone
        assert wrap(backbone, views=9).views == 9
        assert wrap(backbone, views_at_once=3).views == 4
        assert backbone.views == 4

    def test_a_copy_has_them_too(self):
        backbone, image = wrap(vit(), views=4), torch.randn(1, 3, 32, 32)
        assert torch.equal(copy.deepcopy(backbone)(image), backbone(image))

    def test_the_stride_of_the_grid(self):
        assert averaging(14).stride == 14
        assert averaging(14, views=4).stride == 7
        assert averaging(14, views=9).stride == Fraction(14, 3)
        assert isinstance(averaging(16, views=4).stride, int)

    def test_by_name(self):
        backbone = load_backbone("test_resnet", weights=False, layer=3, views=4, views_at_once=2)
        assert (backbone.views, backbone.views_at_once, backbone.stride) == (4, 2, 8)

    def test_the_limit_of_tokens_is_that_of_one_pass(self):
        backbone = wrap(vit(), views=16)
        assert backbone.input_size(2560, 2560) == (2560, 2560)
        with pytest.raises(LoftUpError, match="more than 25600"):
            backbone.input_size(2576, 2576)


def test_upsampled_looks_at_shifted_views_and_leaves_the_callers_backbone():
    backbone, up, image = wrap(vit()), LoftUp.from_pretrained("any"), torch.rand(1, 3, 48, 64)
    both = Upsampled(backbone, up, views=4)
    assert (backbone.views, both.backbone.views) == (1, 4)
    torch.testing.assert_close(both(image), up(backbone.with_views(4)(image), image))
    assert Upsampled(backbone.with_views(9), up).backbone.views == 9
    assert Upsampled(vit(), up).backbone.views == 1


def test_the_cost_is_said():
    backbone = wrap(vit(), views=4)
    line = backbone.explain().splitlines()[-1]
    assert line == (
        "4 shifted views: 4 passes a picture, one after another, 4 times the cost of one; stride of the grid 8 (an "
        "input of 2 times the side: 4 times the cells in one pass, attention 16 times as much)"
    )
    assert "views=4" in repr(backbone)
    assert "3 at once" in backbone.with_views(9, at_once=3).explain()
    assert "16 at once" in backbone.with_views(16, at_once=30).explain()
    assert "views" not in wrap(vit()).explain() + repr(wrap(vit()))
