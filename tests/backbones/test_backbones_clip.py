"""CLIP's dense value path in timm, open_clip and OpenAI's layout, and SigLIP in open_clip."""

import copy
import warnings

import pytest
import timm
import torch
from material import shared
from safetensors.torch import load_file
from small_backbones import CLIP, LayerNorm, assert_golden
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from loftup import LoftUpError
from loftup.backbones import identify, load_backbone, wrap

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 1}
QUICK = "vit_base_patch16_clip_quickgelu_224.openai"


def openai_half(model):
    """What OpenAI's package does on GPUs: weights of products in half precision, norms and tables in float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            module.half()
    model.visual.proj.data = model.visual.proj.data.half()
    return model


def open_clip_tower(**options):
    transformer = pytest.importorskip("open_clip.transformer")
    settings = {"image_size": 224, "patch_size": 16, "width": 64, "layers": 3, "heads": 1, "mlp_ratio": 4.0}
    return transformer.VisionTransformer(
        **{**settings, "output_dim": 32, "act_layer": transformer.QuickGELU, **options}
    ).eval()


def timm_clip(name=QUICK, **options):
    model = timm.create_model(name, **{**SMALL, "num_classes": 32, **options}).eval()
    model.pretrained_cfg["num_classes"] = 32  # the width of this small CLIP's text space
    return model


def same_clips():
    """The same random weights in OpenAI's layout, in timm and in open_clip."""
    openai = CLIP().eval()
    state = openai.state_dict()
    in_timm, in_open_clip = timm_clip(), open_clip_tower()
    in_timm.load_state_dict(checkpoint_filter_fn(dict(state), in_timm))
    in_open_clip.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    return openai, in_timm, in_open_clip


@pytest.mark.parametrize("package", ["timm", "open_clip", "openai"])
def test_agrees_with_maskclip(package):
    folder = shared("golden/maskclip_vit_d64")
    state = load_file(folder / "openai_state_dict.safetensors")
    if package == "timm":
        model = timm_clip()
        model.load_state_dict(checkpoint_filter_fn(state, model))
    elif package == "open_clip":
        model = open_clip_tower()
        model.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    else:
        model = CLIP().eval()
        model.load_state_dict(state)
    assert_golden(wrap(model), folder)


def test_a_local_file_in_openais_layout_loads_by_name():
    folder = shared("golden/maskclip_vit_d64")
    with pytest.raises(
        LoftUpError, match=r"does not hold weights for 'vit_base_patch16_clip_quickgelu_224.openai': .*Missing key"
    ):
        load_backbone("clip_vitb16", weights=folder / "openai_state_dict.safetensors")
    backbone = load_backbone(QUICK, weights=folder / "openai_state_dict.safetensors", **SMALL, num_classes=32)
    # timm takes a head of another width for a new classifier, which has no weights yet.
    assert backbone.channels == 64


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (240, 300)])
def test_packages_agree(size):
    openai, in_timm, in_open_clip = same_clips()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = wrap(openai)(image)
        assert expected.shape[1] == 32
        for model in (openai.visual, in_timm, in_open_clip):
            torch.testing.assert_close(wrap(model)(image), expected)


def test_value_path_written_out():
    tower = CLIP().eval().visual
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        x = tower.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.expand(1, 1, -1), x], 1) + tower.positional_embedding
        x = tower.ln_pre(x).transpose(0, 1)
        for block in tower.transformer.resblocks[:-1]:
            x = block(x)
        x = x.transpose(0, 1)[:, 1:]
        last = tower.transformer.resblocks[-1]
        values = last.ln_1(x) @ last.attn.in_proj_weight[128:].T + last.attn.in_proj_bias[128:]
        expected = tower.ln_post(last.attn.out_proj(values)) @ tower.proj
        torch.testing.assert_close(wrap(tower)(image).flatten(2).transpose(1, 2), expected)


def test_tokens_first_and_batch_first_agree():
    transformer = pytest.importorskip("open_clip.transformer")
    model = open_clip_tower()
    other = copy.deepcopy(model)
    other.transformer = transformer.Transformer(64, 3, 1, act_layer=transformer.QuickGELU, batch_first=False)
    other.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 80, 112)
    for layer in (None, 1):
        torch.testing.assert_close(wrap(other, layer=layer)(image), wrap(model, layer=layer)(image))


@pytest.mark.parametrize("layer", [0, -1])
def test_layer_gives_plain_tokens(layer):
    model = open_clip_tower()
    image = torch.randn(2, 3, 224, 224)
    expected = model.forward_intermediates(image, indices=[layer % 3], normalize_intermediates=True)
    backbone = wrap(model, layer=layer)
    assert backbone.channels == 64
    torch.testing.assert_close(backbone(image), expected["image_intermediates"][0])
    in_timm = timm_clip()
    expected = in_timm.forward_intermediates(image, indices=[layer % 3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(wrap(in_timm, layer=layer)(image), expected)
    with pytest.raises(LoftUpError, match="layer 3 is out of range: this CLIP has 3 layers, so -3 to 2"):
        wrap(model, layer=3)


def test_without_projection_features_keep_their_width():
    model, headless = timm_clip(), timm_clip(num_classes=0)
    headless.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("head.")})
    image = torch.randn(1, 3, 64, 64)
    wide = wrap(headless)(image)
    assert wide.shape == (1, 64, 4, 4)
    torch.testing.assert_close(model.head(wide.transpose(1, 3)).transpose(1, 3), wrap(model)(image))
    tower = open_clip_tower()
    tower.proj = None
    assert wrap(tower).channels == 64
    assert identify(headless) is None


def test_other_heads_are_no_projection():
    assert wrap(timm_clip(num_classes=10)).channels == 64


def test_fine_tuned_clips_give_plain_tokens():
    model = timm_clip("vit_base_patch16_clip_224.openai_ft_in1k")
    image = torch.randn(1, 3, 224, 224)
    tokens = model.forward_features(image)[:, 1:].transpose(1, 2).reshape(1, 64, 14, 14)
    torch.testing.assert_close(wrap(model)(image), tokens)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.metaclip_400m"])
def test_plain_gelu_under_quickgelu_weights_is_warned_of(name):
    model = timm_clip(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrap(model)(torch.rand(1, 3, 32, 32))
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(f"{name}: these weights were trained with QuickGELU")
    assert f"Build '{name.replace('_clip', '_clip_quickgelu', 1)}' instead" in text


@pytest.mark.parametrize(
    "name", [QUICK, "vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_224.openai_ft_in1k"]
)
def test_other_clips_are_not_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(timm_clip(name))


@pytest.mark.parametrize("half", [openai_half, nn.Module.half, nn.Module.bfloat16])
def test_low_precision(half):
    model = CLIP().eval()
    image = torch.randn(1, 3, 64, 80)
    expected = wrap(model)(image)
    model = half(model)
    if half is not openai_half:
        for module in model.modules():  # this package's norms stay in float32
            if isinstance(module, LayerNorm):
                module.float()
    features = wrap(model)(image)
    assert features.dtype == model.visual.proj.dtype
    torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wrap(open_clip_tower())(image).shape, torch.Size((1, 32, 4, 5)))


def test_scaling_is_openais_unless_open_clip_notes_another():
    model = CLIP()
    assert wrap(model).mean == (0.48145466, 0.4578275, 0.40821073)
    model.visual.image_mean, model.visual.image_std = [0.5] * 3, [0.25] * 3
    assert (wrap(model).mean, wrap(model).std) == ((0.5,) * 3, (0.25,) * 3)
    assert wrap(timm_clip()).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_identify():
    base = {"width": 768, "layers": 12, "output": 512}
    with torch.device("meta"):
        assert identify(CLIP(**base)) == "ViT-B/16"
        assert identify(wrap(CLIP(**base), layer=-1)) is None
        assert identify(CLIP(**base, patch=32)) is None
    assert identify(open_clip_tower()) is None
    assert identify(timm_clip()) == QUICK
    assert identify(wrap(timm_clip(), layer=-1)) is None


def test_towers_of_another_make_give_the_last_map_inside():
    for options in ({"attentional_pool": True, "attn_pooler_heads": 1}, {"scale_attn": True}):
        backbone = wrap(open_clip_tower(**options))
        assert "found by looking" in backbone.explain()
        assert backbone(torch.rand(1, 3, 64, 64)).shape[1:] == (backbone.channels, 14, 14)
    empty = nn.Module()
    empty.visual = nn.Module()
    with pytest.raises(LoftUpError, match="found no feature map"):
        wrap(empty)


def open_clip_siglip():
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.model.CLIPVisionCfg(
        timm_model_name="vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none", image_size=224
    )
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=1, layers=1)
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timm, "create_model", lambda name, **options: create(name, embed_dim=48, depth=2, num_heads=2, **options)
        )
        return open_clip.model.CustomTextCLIP(48, vision, text).eval()


def test_open_clip_siglip_is_its_timm_trunk():
    model = open_clip_siglip()
    image = torch.randn(1, 3, 64, 96)
    trunk = wrap(model.visual.trunk)
    for outer in (model, model.visual):
        torch.testing.assert_close(wrap(outer)(image), trunk(image))
        assert wrap(outer).mean == trunk.mean == (0.5, 0.5, 0.5)
        assert identify(outer) is None
    torch.testing.assert_close(wrap(model, layer=0)(image), wrap(model.visual.trunk, layer=0)(image))
    model.visual.image_mean = (0.1, 0.1, 0.1)
    assert wrap(model).mean == (0.1, 0.1, 0.1)


def test_open_clip_with_an_unknown_trunk_is_refused():
    model = open_clip_siglip()
    model.visual.trunk = nn.Linear(2, 2)
    with pytest.raises(LoftUpError, match="found no feature map"):
        wrap(model)


def test_scripted_towers_agree_and_traced_ones_are_refused():
    tower, image = open_clip_tower().eval(), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(wrap(torch.jit.script(tower))(image), wrap(tower)(image))
    with pytest.raises(LoftUpError, match=r"torch\.jit shows nothing but the result: wrap the module before"):
        wrap(torch.jit.trace(tower, image, check_trace=False))
