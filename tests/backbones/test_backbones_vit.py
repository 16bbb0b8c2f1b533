"""Plain ViTs of timm and torch.hub."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from material import shared
from safetensors.torch import load_file
from small_backbones import assert_golden, grid, vit
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from loftup import LoftUpError
from loftup.backbones import identify, wrap
from loftup.backbones.vit import ANTIALIASED, WITH_OFFSET, resample_positions


@pytest.mark.parametrize(
    ("folder", "tag", "registers"),
    [
        ("dinov2_vit_d48", "vit_small_patch14_dinov2.lvd142m", 0),
        ("dinov2_reg_vit_d48", "vit_small_patch14_reg4_dinov2.lvd142m", 4),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_timm_dinov2_agrees_with_the_official_code(folder, tag, registers, dynamic):
    folder = shared(f"golden/{folder}")
    model = vit(
        tag, img_size=518, patch_size=14, init_values=1.0, reg_tokens=registers, no_embed_class=registers > 0,
        dynamic_img_size=dynamic,
    )  # fmt: skip
    model.load_state_dict(checkpoint_filter_fn(load_file(folder / "official_state_dict.safetensors"), model))
    assert_golden(wrap(model), folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "reg_tokens": 2, "no_embed_class": True, "global_pool": ""},
        {"img_size": (32, 64), "pre_norm": True},
        {"embed_norm_layer": "layernorm", "init_values": 0.5},
        {"pos_embed": "none"},
        {"class_token": False, "global_pool": "map"},
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (32, 64), (48, 112), (16, 16)])
def test_other_vits_agree_with_timm_at_any_size(options, size):
    if options.get("pos_embed") == "none":
        model = VisionTransformer(64, 16, embed_dim=48, depth=3, num_heads=2, dynamic_img_size=True, **options).eval()
    else:
        model = vit(dynamic_img_size=True, **options)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(image)[:, model.num_prefix_tokens :])
        torch.testing.assert_close(wrap(model)(image), grid(tokens, size[0] // 16, size[1] // 16))


def test_a_vit_of_fixed_size_takes_other_sizes_and_is_left_alone():
    model, flexible = vit(), vit(dynamic_img_size=True)
    flexible.load_state_dict(model.state_dict())
    image, native = torch.randn(1, 3, 80, 48), torch.randn(1, 3, 64, 64)
    before, state = model(native), copy.deepcopy(model.state_dict())
    backbone = wrap(model)
    torch.testing.assert_close(backbone(image), grid(flexible.forward_features(image)[:, 1:], 5, 3))
    assert torch.equal(model(native), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(AssertionError):
        model(image)


def test_table_is_read_after_timm_changes_it():
    model = vit()
    backbone = wrap(model)
    model.set_input_size((32, 96))
    image = torch.randn(1, 3, 32, 96)
    torch.testing.assert_close(backbone(image), grid(model.forward_features(image)[:, 1:], 2, 6))


def test_subclasses_that_embed_in_their_own_way_run_as_timm_runs_them():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=2, embed_dim=48, num_heads=2, num_classes=0, dynamic_img_size=True
    ).eval()
    assert model.num_prefix_tokens == 2
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(wrap(model)(image), grid(model.forward_features(image)[:, 2:], 4, 6))


@pytest.mark.parametrize("layer", [0, 1, -1, -3])
def test_layer_takes_a_block_and_the_final_norm(layer):
    model = vit()
    nn.init.normal_(model.norm.weight)
    image = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(image, indices=[layer % 3], norm=True, intermediates_only=True)[0]
    backbone = wrap(model, layer=layer)
    torch.testing.assert_close(backbone(image), expected)
    assert backbone.layer == layer % 3


def test_layer_errors():
    with pytest.raises(LoftUpError, match=r"layer 3 is out of range: test_vit.r160_in1k has 3 layers, so -3 to 2"):
        wrap(vit(), layer=3)
    with pytest.raises(LoftUpError, match=r"layer -4 is out of range"):
        wrap(vit(), layer=-4)
    for layer in (1.0, True):
        with pytest.raises(TypeError, match=f"layer must be an integer, or a list of them, got {layer}"):
            wrap(vit(), layer=layer)


def test_resampling_positions():
    table = torch.randn(1, 6, 5)
    assert resample_positions(table, (2, 3), (2, 3), WITH_OFFSET) is table
    cells = table.reshape(1, 2, 3, 5).permute(0, 3, 1, 2)
    for how, options in (
        (ANTIALIASED, {"size": (4, 7), "antialias": True}),
        (WITH_OFFSET, {"scale_factor": (4.1 / 2, 7.1 / 3)}),
    ):
        expected = F.interpolate(cells, mode="bicubic", **options).flatten(2).transpose(1, 2)
        torch.testing.assert_close(resample_positions(table, (2, 3), (4, 7), how), expected)
        half = resample_positions(table.half(), (2, 3), (4, 7), how)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), expected, atol=5e-3, rtol=5e-3)
    for side in range(1, 100):  # the offset never rounds to another size
        assert resample_positions(torch.zeros(1, 37 * 37, 1), (37, 37), (side, 1), WITH_OFFSET).shape[1] == side


def test_a_table_that_fits_no_grid_is_refused():
    model = vit()
    model.pos_embed = nn.Parameter(torch.zeros(1, 8, 48))
    with pytest.raises(LoftUpError, match="table of this VisionTransformer has 7 entries, which form no known grid"):
        wrap(model)(torch.rand(1, 3, 64, 64))


def test_blocks_that_drop_tokens_are_refused():
    class Dropping(nn.Module):
        def forward(self, x):
            return x[:, 2:]

    model = vit()
    model.blocks[1] = Dropping()
    with pytest.raises(LoftUpError, match=r"gave \d+ tokens, expected \d+ x \d+ patches \+ 1 prefix tokens"):
        wrap(model)(torch.rand(1, 3, 64, 64))


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(LoftUpError, match=r"has patches of \(16, 8\), only square ones"):
        wrap(vit(patch_size=(16, 8)))


def test_training_mode_keeps_every_patch():
    model = vit(patch_drop_rate=0.5, pos_drop_rate=0.5)
    backbone, image = wrap(model), torch.randn(1, 3, 64, 64)
    assert not backbone.training
    expected = backbone(image)
    torch.testing.assert_close(backbone.train()(image), expected)
    assert wrap(model.train()).training


class DinoVisionTransformer(nn.Module):
    """The interface of torch.hub's DINOv2 and DINOv3: dictionaries, nested blocks, a norm, registers in between."""

    __module__ = "dinov2.models.vision_transformer"

    def __init__(self, width=384, depth=12, patch_size=14, registers=0):
        super().__init__()
        self.embed_dim, self.patch_size, self.num_register_tokens, self.n_blocks = width, patch_size, registers, depth
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Identity()])])
        self.norm = nn.LayerNorm(width)
        self.key = "x_norm_patchtokens"

    def forward_features(self, x, masks=None):
        return {"x_norm_clstoken": None, self.key: self.norm(self.patch_embed(x).flatten(2).transpose(1, 2))}

    def get_intermediate_layers(self, x, *, n=1, reshape=False, norm=True):
        assert reshape
        assert norm
        return tuple(self.patch_embed(x) * (index + 1) for index in n)


def test_hub_dino_is_used_by_its_own_methods():
    model = DinoVisionTransformer(registers=4).eval()
    image = torch.rand(2, 3, 30, 56)
    resized = F.interpolate(image, (28, 56), mode="bilinear")
    backbone = wrap(model)
    assert (backbone.name, backbone.channels, backbone.patch_size) == ("dinov2_vits14_reg", 384, 14)
    torch.testing.assert_close(
        backbone(image), grid(model.forward_features(resized)["x_norm_patchtokens"], 2, 4), rtol=0, atol=0
    )
    torch.testing.assert_close(wrap(model, layer=-3)(image), model.patch_embed(resized) * 10)
    assert wrap(model.half())(image).dtype == torch.float16


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({}, "dinov2_vits14"),
        ({"width": 768, "registers": 4}, "dinov2_vitb14_reg"),
        ({"width": 1024, "depth": 24}, "dinov2_vitl14"),
        ({"width": 64}, None),
        ({"patch_size": 16, "registers": 4}, None),
    ],
)
def test_hub_dino_is_identified_by_its_sizes(sizes, name):
    assert identify(DinoVisionTransformer(**sizes)) == name
    assert identify(wrap(DinoVisionTransformer(**sizes), layer=3)) is None
    assert identify(wrap(DinoVisionTransformer(**sizes), layer=-1)) == name


def test_hub_dino_that_answers_otherwise_is_refused():
    model = DinoVisionTransformer()
    model.key = "something"
    with pytest.raises(LoftUpError, match=r"DinoVisionTransformer gave no 'x_norm_patchtokens'"):
        wrap(model)(torch.rand(1, 3, 28, 28))
    model = DinoVisionTransformer()
    model.patch_embed = nn.Conv2d(3, 384, 14, 7)
    with pytest.raises(LoftUpError, match=r"gave \d+ patch tokens, expected \d+ x \d+"):
        wrap(model)(torch.rand(1, 3, 28, 28))
