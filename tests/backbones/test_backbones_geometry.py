"""The check of a backbone's grid: what is measured, corrected, refused."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from loftup import Backbone, LoftUp, LoftUpError, Upsampled, wrap
from loftup.backbones.geometry import changes, in_place, pictures, spots

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 2}


def own(function, channels=3, patch_size=8, **options):
    return Backbone(nn.Identity(), function, channels=channels, patch_size=patch_size, **options)


def cells(x):
    return F.avg_pool2d(x, 8)


def test_two_small_forwards_where_all_is_as_declared():
    seen = []
    backbone = own(lambda x: seen.append(tuple(x.shape)) or cells(x))
    assert seen == [(7, 3, 56, 72), (1, 3, 56, 72)]
    assert "checked: features change where the picture does" in backbone.explain()
    assert backbone.explain().startswith("Identity: 3 channels, stride 8, multiples of 8 pixels")


@pytest.mark.parametrize(
    "scramble",
    [
        lambda x: cells(x).flip(2),
        lambda x: cells(x).flip(3),
        lambda x: cells(x).roll(4, 3),
        lambda x: cells(x).flatten(2).unflatten(2, (x.shape[3] // 8, x.shape[2] // 8)).transpose(2, 3),
        lambda x: cells(x).flatten(2)[:, :, torch.randperm(x.shape[2] * x.shape[3] // 64)].view_as(cells(x)),
    ],
)
def test_features_in_another_order_are_refused(scramble):
    torch.manual_seed(0)
    with pytest.raises(
        LoftUpError, match=r"not in the picture's order: .*cells \[\(1, 7\), .*of 7x9 showed most in \["
    ):
        own(scramble)
    assert own(scramble, check=False).notes == ("not checked",)


def test_a_transposed_grid_is_refused_by_its_shape():
    with pytest.raises(LoftUpError, match="grid of 9x7 cells for an image of 56x72, where a stride of 8 makes 7x9"):
        own(lambda x: cells(x).transpose(2, 3))


def test_an_exact_check_tells_neighbours():
    grid, size = (7, 9), (56, 72)
    change = changes(cells(pictures(size, grid, torch.device("cpu"))))
    assert in_place(change, grid, exact=True)
    assert in_place(change.roll(1, 2), grid, exact=True) is False
    assert in_place(change.roll(1, 2), grid, exact=False)
    assert in_place(torch.ones_like(change), grid, exact=True) is None
    assert len(set(spots(*grid))) == 6


def test_stride_and_channels_are_measured():
    backbone = own(lambda x: F.avg_pool2d(x, 4).repeat(1, 2, 1, 1), channels=3, patch_size=8)
    assert (backbone.channels, backbone.patch_size, backbone.multiple) == (6, 4, 4)


def test_multiples_that_the_model_wants():
    def function(x):
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise RuntimeError("multiples of 32, please")
        return cells(x)

    backbone = own(function)
    assert (backbone.patch_size, backbone.multiple) == (8, 32)
    assert backbone(torch.rand(1, 3, 168, 184)).shape == (1, 3, 20, 24)


def test_fine_maps_of_a_network_that_goes_down_far():
    def function(x):
        coarse = x
        for _ in range(5):
            coarse = F.avg_pool2d(coarse, 2)
        return x + F.interpolate(coarse, scale_factor=32)

    backbone = own(function, patch_size=1)
    assert (backbone.patch_size, backbone.multiple, backbone.fixed_size) == (1, 32, None)


def test_the_only_size_of_a_model():
    def function(x):
        assert x.shape[2:] == (224, 224), "224 alone"
        return cells(x)

    backbone = own(function)
    assert backbone.fixed_size == (224, 224)
    with pytest.warns(UserWarning, match="takes 224x224 alone: images are resized to it$"):
        assert backbone(torch.rand(1, 3, 100, 150)).shape == (1, 3, 28, 28)
    backbone(torch.rand(1, 3, 99, 99))  # said once

    def never(x):
        raise RuntimeError("only 100x100")

    with pytest.raises(LoftUpError, match="failed on every picture .*only 100x100; pass check=False if it takes"):
        own(never)


def test_a_grid_of_few_cells_is_refused():
    def function(x):
        assert x.shape[2:] == (224, 224)
        return F.avg_pool2d(x, 112)

    with pytest.raises(LoftUpError, match=r"grid of 2x2 cells at 224x224, .*at least 4x4 are needed"):
        own(function, patch_size=112)


def test_networks_without_padding_get_a_border():
    layers = [nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)]
    with torch.no_grad():
        for layer in layers:  # each passes its middle on
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:, :, 1, 1] = 1 / layer.in_channels
    backbone = own(nn.Sequential(*layers), channels=8, patch_size=16)
    # 1 + 2 + 4 + 8 = 15 pixels into the picture; in the middle of a cell of 16 it is 7.5.
    assert "a border of 15 pixels" in backbone.explain()
    image = torch.zeros(1, 3, 160, 160)
    image[..., 16 * 3 + 8, 16 * 5 + 8] = 1
    features = backbone(image)
    assert features.shape == (1, 8, 10, 10)
    torch.testing.assert_close(features[0, 0, 3, 5], torch.tensor(1.0))
    torch.testing.assert_close(features.sum(), torch.tensor(8.0))


def test_pictures_of_the_check_have_the_dtype_of_the_weights():
    layer = nn.Conv2d(3, 4, 8, 8).bfloat16()
    backbone = Backbone(layer, layer, channels=4, patch_size=8)
    assert backbone.notes == ("checked: features change where the picture does",)


def test_options_that_a_backbone_has_not_are_refused():
    backbone = wrap(nn.Sequential(nn.Conv2d(3, 8, 8, 8)), max_side=64)
    assert wrap(backbone, max_side=64) is backbone
    for options in ({"max_side": 128}, {"join": True}, {"space": "text"}):
        with pytest.raises(LoftUpError, match="a Backbone already, .*join=False, max_side=64 and .*wrap its .model"):
            wrap(backbone, **options)


def test_meta_weights_are_not_run():
    with torch.device("meta"):
        backbone = wrap(timm.create_model("resnet10t"))
    assert backbone.notes == ("not checked: the weights are on the meta device",)


def test_weights_of_zero_tell_nothing():
    layer = nn.Conv2d(3, 4, 8, 8)
    nn.init.zeros_(layer.weight)
    backbone = Backbone(layer, layer, channels=4, patch_size=8)
    assert backbone.notes == ("not checked: its features are the same for other pictures",)


def test_the_check_leaves_no_trace():
    model = timm.create_model("resnet10t", drop_path_rate=0.5).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    backbone = wrap(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert backbone.training


@pytest.mark.parametrize("name", ["crossvit_9_240", "levit_128s", "visformer_tiny", "pit_ti_224"])
def test_models_of_odd_geometry_agree_with_timm(name):
    model = timm.create_model(name).eval()
    backbone = wrap(model)
    image = torch.randn(1, 3, *backbone.fixed_size)
    norm = len({stage["reduction"] for stage in model.feature_info[-2:]}) == 1
    with torch.no_grad():
        own_map = model.forward_intermediates(image, 1, norm=norm, output_fmt="NCHW", intermediates_only=True)[-1]
    torch.testing.assert_close(backbone(image), own_map)


# Several layers


def test_several_layers_come_from_one_forward():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    image = torch.randn(2, 3, 64, 96)
    backbone = wrap(model, layer=[0, -1, 1])
    assert (backbone.channels, backbone.patch_size, backbone.layer) == ((48, 48, 48), (16, 16, 16), [0, 2, 1])
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    maps = backbone(image)
    handle.remove()
    assert len(calls) == 1
    for features, layer in zip(maps, (0, 2, 1), strict=True):
        torch.testing.assert_close(features, wrap(model, layer=layer)(image))
    joined = wrap(model, layer=[0, -1, 1], join=True)
    assert (joined.channels, joined.patch_size) == (144, 16)
    torch.testing.assert_close(joined(image), torch.cat(maps, 1))
    upsampled = Upsampled(backbone, LoftUp.from_pretrained("any"))(image, size=(32, 48))
    assert [x.shape for x in upsampled] == [(2, 48, 32, 48)] * 3


def test_stages_of_several_strides():
    model = timm.create_model("resnet10t").eval()
    image = torch.randn(1, 3, 96, 128)
    backbone = wrap(model, layer=[1, 3])
    assert backbone.patch_size == (4, 16)
    for features, layer in zip(backbone(image), (1, 3), strict=True):
        torch.testing.assert_close(features, wrap(model, layer=layer)(image))
    with pytest.raises(LoftUpError, match=r"the layers \[1, 3\] have strides of 4, 16 pixels: only maps of one"):
        wrap(model, layer=[1, 3], join=True)
    with pytest.raises(LoftUpError, match="layer is an empty list"):
        wrap(model, layer=[])


# Large images


def test_images_of_too_many_tokens_are_refused_or_made_smaller():
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 1}).eval()
    with pytest.raises(LoftUpError, match=r"3024x4032 makes 47628 tokens of .*Pass max_side=1344"):
        wrap(model)(torch.zeros(1, 3, 3024, 4032))
    backbone = wrap(model, max_side=256)
    assert backbone(torch.zeros(1, 3, 3024, 4032)).shape == (1, 48, 12, 16)
    assert backbone(torch.zeros(1, 3, 128, 160)).shape == (1, 48, 8, 10)
    assert wrap(model, max_side=5000).input_size(3024, 4032) == (3024, 4032)
    for wrong in (0, -1, 2.5, True, "1"):
        with pytest.raises(ValueError, match="max_side must be a positive integer in pixels, got"):
            wrap(model, max_side=wrong)


@pytest.mark.parametrize("closed_over", [True, False])
def test_modules_that_a_function_calls_are_evaluated_too(closed_over):
    model, other = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    if closed_over:
        backbone = Backbone(model, lambda x: other(model(x)), channels=8, patch_size=4)
    else:
        backbone = Backbone(model, functools.partial(lambda net, x: net(model(x)), other), channels=8, patch_size=4)
    image = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(backbone(image), backbone(image))
    torch.testing.assert_close(backbone(image)[:1], backbone(image[:1]))
    assert other.training
    assert other[0].num_batches_tracked == 0


def test_failures_at_a_size_are_told():
    def function(x):
        if x.shape[2] < 40:
            raise RuntimeError("window too large")
        return cells(x)

    with pytest.raises(LoftUpError, match="Identity failed on images of 32x64: window too large"):
        own(function)(torch.rand(1, 3, 32, 64))


def test_models_that_mix_pictures_are_refused():
    with pytest.raises(LoftUpError, match="depend on the pictures beside it in the batch: by up to .*pass check=False"):
        own(lambda x: cells(x - x.mean(0, keepdim=True)))
