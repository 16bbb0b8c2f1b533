"""timm's other families, and the names of published backbones."""

import pytest
import timm
import torch
import torch.nn.functional as F
from small_backbones import randomised
from torch import nn

from loftup import LoftUpError
from loftup.backbones import identify, load_backbone, wrap
from loftup.weights.catalogue import PUBLISHED

SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
SMALL_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_resnet", {}, (64, 96)),
        ("test_resnet", {"output_stride": 16}, (64, 96)),
        ("test_efficientnet", {"pad_type": "same"}, (64, 96)),
        ("test_convnext", {}, (64, 96)),
        ("test_nfnet", {}, (64, 96)),
        ("test_byobnet", {}, (64, 96)),
        ("mobilenetv3_small_050", {}, (64, 96)),
        ("swin_tiny_patch4_window7_224", SWIN, (224, 224)),
        ("swinv2_tiny_window8_256", {**SWIN, "strict_img_size": False}, (96, 64)),
    ],
)
def test_stages_are_those_of_features_only(name, options, size):
    model = randomised(timm.create_model(name, **options))
    image = torch.randn(2, 3, *size)
    features_only = timm.create_model(name, features_only=True, **options).eval()
    given = list(features_only.feature_info.out_indices)
    if hasattr(features_only, "model"):
        features_only.model.load_state_dict(model.state_dict(), strict=False)
    else:
        wanted = features_only.state_dict().keys()  # FeatureListNet joins the first two levels of some names
        state = {(joined if (joined := key.replace(".", "_", 1)) in wanted else key): value
                 for key, value in model.state_dict().items()}  # fmt: skip
        missing, _ = features_only.load_state_dict(state, strict=False)
        assert not missing
    with torch.no_grad():
        stages = features_only(image)
        for index, stage in zip(given, stages, strict=True):
            if getattr(features_only, "output_fmt", "NCHW") == "NHWC":
                stage = stage.permute(0, 3, 1, 2)
            plain, wrapped = wrap(model, layer=index), wrap(features_only, layer=index)
            assert plain.channels == wrapped.channels == stage.shape[1]
            assert plain.patch_size == wrapped.patch_size == size[0] // stage.shape[2]
            torch.testing.assert_close(plain(image), stage)
            torch.testing.assert_close(wrapped(image), stage)
        last = len(model.feature_info) - 1
        torch.testing.assert_close(wrap(model)(image), wrap(model, layer=last)(image))
        torch.testing.assert_close(wrap(features_only)(image), wrap(features_only, layer=given[-1])(image))


def test_a_cnn_covers_the_whole_picture_at_any_size():
    model = timm.create_model("test_resnet").eval()
    image = torch.randn(1, 3, 75, 20)
    backbone = wrap(model, layer=2)
    assert backbone.patch_size == 8
    expected = backbone(F.interpolate(image, (72, 24), mode="bilinear"))
    assert expected.shape[2:] == (9, 3)
    torch.testing.assert_close(backbone(image), expected)


def test_layers_of_features_only_are_numbers_of_stages():
    model = timm.create_model("test_resnet", features_only=True, out_indices=(1, -2)).eval()
    stages = model(torch.ones(1, 3, 64, 64))
    for layer, stage in ((1, stages[0]), (-2, stages[1]), (3, stages[1]), (None, stages[1])):
        torch.testing.assert_close(wrap(model, layer=layer)(torch.ones(1, 3, 64, 64)), stage)
    with pytest.raises(
        LoftUpError, match=r"layer 2 of test_resnet.r160_in1k is not among the stages it was built to give: \[1, 3\]"
    ):
        wrap(model, layer=2)
    with pytest.raises(LoftUpError, match="layer 5 is out of range: test_resnet.r160_in1k has 5 layers, so -5 to 4"):
        wrap(model, layer=5)
    assert identify(model) is None


def test_features_only_as_a_dictionary_and_of_a_vit():
    model = timm.create_model("test_resnet", features_only=True, feature_cls="dict", out_indices=(0, 2)).eval()
    image = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(wrap(model, layer=0)(image), next(iter(model(image).values())))
    vit = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), img_size=160, **SMALL_VIT
    ).eval()
    backbone = wrap(vit)
    torch.testing.assert_close(backbone(image), vit(image)[-1])
    assert identify(backbone) is None  # its maps lack the final norm
    assert backbone.fixed_size == (160, 160)


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("eva02_tiny_patch14_224", SMALL_VIT, 1),
        ("vit_small_patch16_dinov3", SMALL_VIT, 5),
        ("beit_base_patch16_224", SMALL_VIT, 1),
        ("vit_relpos_small_patch16_224", SMALL_VIT, 0),
    ],
)
def test_other_transformers_give_their_normed_tokens(name, options, prefix):
    model = randomised(timm.create_model(name, num_classes=0, **options))
    assert model.num_prefix_tokens == prefix
    image = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
    tokens = model.forward_features(image)[:, prefix:]
    backbone = wrap(model)
    features = backbone(image)
    side = image.shape[2] // backbone.patch_size
    torch.testing.assert_close(features, tokens.transpose(1, 2).reshape(1, -1, side, side))
    first = model.forward_intermediates(image, indices=[0], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(wrap(model, layer=-2)(image), first)


def test_rotary_positions_take_any_size():
    backbone = load_backbone("vit_small_patch16_dinov3", weights=False, **SMALL_VIT)
    image = torch.randn(1, 3, 48, 80)
    tokens = backbone.model.forward_features(image)[:, 5:]
    torch.testing.assert_close(backbone(image), tokens.transpose(1, 2).reshape(1, 48, 3, 5))


def test_a_neck_behind_the_norm_counts():
    backbone = load_backbone("samvit_base_patch16", weights=False, **SMALL_VIT, img_size=64)
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, backbone.channels, 4, 4)


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("eva02_tiny_patch14_224", SMALL_VIT, "dynamic_img_size=True"),
        ("swinv2_tiny_window8_256", SWIN, "strict_img_size=False"),
        ("beit_base_patch16_224", SMALL_VIT, r"img_size=\(H, W\)"),
        ("test_maxvit", {}, r"img_size=\(H, W\)"),
        ("vit_relpos_small_patch16_224", SMALL_VIT, r"img_size=\(H, W\)"),
    ],
)
def test_images_are_resized_for_models_of_fixed_size(name, options, remedy):
    model = timm.create_model(name, **options).eval()
    side = model.pretrained_cfg["input_size"][1]
    image = torch.rand(1, 3, side + 16, side - 32)
    backbone = wrap(model)
    assert backbone.fixed_size == (side, side)
    assert f"takes {side}x{side} alone" in backbone.explain()
    with pytest.warns(UserWarning, match=rf"takes {side}x{side} alone: images are resized to it; .*{remedy}\) builds"):
        features = backbone(image)
    resized = F.interpolate(image, (side, side), mode="bilinear")
    torch.testing.assert_close(features, backbone(resized))
    assert features.shape[2] == features.shape[3] == side // backbone.patch_size


def test_failures_are_told():
    model = timm.create_model("test_maxvit").eval()
    model.stem.norm1 = nn.BatchNorm2d(7)
    with pytest.raises(LoftUpError, match="failed on every picture .*running_mean should contain"):
        wrap(model)

    def out_of_memory(*args, **options):
        raise torch.cuda.OutOfMemoryError("no memory")

    model.forward_intermediates = out_of_memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        wrap(model)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "options", "channels", "patch_size"),
    [
        ("test_vit", {}, 64, 16),
        ("swin_tiny_patch4_window7_224", SWIN, 192, 32),
        ("swinv2_tiny_window8_256", SWIN, 192, 32),
        ("eva02_tiny_patch14_224", SMALL_VIT, 48, 14),
        ("test_convnext", {"layer": 1}, 32, 8),
    ],
)
def test_load_backbone_makes_models_take_any_size(name, options, channels, patch_size):
    backbone = load_backbone(name, weights=False, **options)
    assert not any(module.training for module in backbone.modules())
    assert (backbone.channels, backbone.patch_size) == (channels, patch_size)
    image = torch.rand(1, 3, 3 * patch_size, 2 * patch_size)
    assert backbone(image).shape == (1, channels, 3, 2)


def test_precision():
    backbone = load_backbone("test_resnet", weights=False)
    image = torch.randn(1, 3, 64, 64)
    expected = backbone(image)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(backbone(image).float(), expected, atol=0.2, rtol=0.1)
    features = backbone.bfloat16()(image.to(memory_format=torch.channels_last))
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, atol=0.2, rtol=0.1)


def test_loftups_names_scale_images_as_the_upsamplers_training_did():
    ours = load_backbone("siglip_vitb16", weights=False, embed_dim=48, depth=1, num_heads=2)
    assert (ours.name, ours.mean, ours.std) == ("siglip_vitb16", PUBLISHED["siglip_vitb16"].mean, (0.229, 0.224, 0.225))
    assert ours.model.pretrained_cfg["tag"] == "webli"
    alias = load_backbone("google/siglip-base-patch16-224", weights=False, embed_dim=48, depth=1, num_heads=2)
    assert (alias.name, alias.mean) == ("siglip_vitb16", ours.mean)
    timms = load_backbone("vit_base_patch16_siglip_224.webli", weights=False, embed_dim=48, depth=1, num_heads=2)
    assert (timms.name, timms.mean) == ("vit_base_patch16_siglip_224.webli", (0.5, 0.5, 0.5))
    given = load_backbone("siglip_vitb16", weights=False, depth=1, mean=(0, 0, 0), std=(1, 1, 1))
    assert (given.mean, given.std) == ((0, 0, 0), (1, 1, 1))
    assert identify(ours) == "siglip_vitb16"
    assert identify(load_backbone("siglip_vitb16", weights=False, depth=2, layer=0)) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_backbone_is_known_to_timm(name):
    checkpoint = PUBLISHED[name]
    assert checkpoint.timm in timm.list_pretrained()
    with torch.device("meta"):
        backbone = wrap(timm.create_model(checkpoint.timm))
    assert (backbone.channels, backbone.patch_size) == (checkpoint.channels, checkpoint.patch_size)
    assert identify(backbone) == checkpoint.timm


def test_a_frozen_extractor_evaluates_and_gives_the_mode_back():
    model = timm.create_model("mobilenetv2_035", pretrained=False)
    assert model.training
    model.bn1.eval()  # a mode of its own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    backbone = wrap(model, layer=3)
    image = torch.rand(2, 3, 64, 96)
    together, alone = backbone(image), backbone(image[:1])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert not together.requires_grad
    model.eval()
    torch.testing.assert_close(backbone(image), together)
    image.requires_grad_(True)
    backbone(image).sum().backward()
    assert image.grad is not None


def test_a_trainable_model_keeps_its_mode():
    model = timm.create_model("mobilenetv2_035", pretrained=False)
    backbone = wrap(model, layer=3, trainable=True)
    before = model.bn1.running_mean.clone()
    backbone(torch.rand(2, 3, 64, 96)).sum().backward()
    assert not torch.equal(model.bn1.running_mean, before)
    assert model.conv_stem.weight.grad is not None
    with pytest.raises(LoftUpError, match="trainable=False; for others wrap its .model"):
        wrap(wrap(model, layer=3), trainable=True)


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_backbones_are_frozen_unless_asked_otherwise(trainable):
    backbone = load_backbone("resnet18", weights=False, trainable=trainable)
    assert not backbone.training
    assert all(parameter.requires_grad == trainable for parameter in backbone.parameters())
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    backbone(image).sum().backward()
    assert image.grad is not None


def test_features_made_in_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        backbone = load_backbone("resnet18", weights=False)
        features = backbone(torch.rand(1, 3, 32, 32))
    assert not features.is_inference()
    assert not any(parameter.is_inference() for parameter in backbone.parameters())
    torch.nn.Conv2d(512, 2, 1)(features).sum().backward()
