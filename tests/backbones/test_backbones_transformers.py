"""Backbones of transformers: agreement with official code and timm, layouts of both major versions, refusals."""

import pytest
import torch
import torch.nn.functional as F
from material import shared
from safetensors.torch import load_file
from small_backbones import CLIP, assert_golden, vit
from torch import nn

from loftup import LoftUpError
from loftup.backbones import identify, wrap

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_TOWER = {**TINY, "intermediate_size": 96, "image_size": 64, "patch_size": 16}
# Names of the attention's parts in version 5 and version 4.
DINO_ATTENTION = {
    "q": ("q_proj", "attention.query"),
    "k": ("k_proj", "attention.key"),
    "v": ("v_proj", "attention.value"),
    "proj": ("o_proj", "output.dense"),
}


def dinov2(registers=0, **options):
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {**TINY, "image_size": 518, "patch_size": 14, **options}
    if registers:
        options["num_register_tokens"] = registers
    return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**options)).eval()


def load_official(model, official):
    """Put a DINOv2 state dict of the official layout into a transformers model of either version."""
    state = model.state_dict()
    placed = set()

    def put(value, *names):
        name = next(name for name in names if name in state)
        state[name].copy_(value.reshape(state[name].shape))
        placed.add(name)

    embeddings = {"cls_token": "cls_token", "mask_token": "mask_token", "register_tokens": "register_tokens"}
    embeddings |= {"pos_embed": "position_embeddings"}
    for key, value in official.items():
        if key in embeddings:
            put(value, f"embeddings.{embeddings[key]}")
        elif key.startswith("patch_embed.proj"):
            put(value, key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection"))
        elif key.startswith("norm."):
            put(value, f"layer{key}")
        else:
            _, index, name = key.split(".", 2)
            layer, kind = f"encoder.layer.{index}", name.rsplit(".", 1)[1]
            if name.startswith("attn.qkv"):
                for one, part in zip("qkv", value.chunk(3), strict=True):
                    new, old = DINO_ATTENTION[one]
                    put(part, f"{layer}.attention.{new}.{kind}", f"{layer}.attention.{old}.{kind}")
            elif name.startswith("attn.proj"):
                new, old = DINO_ATTENTION["proj"]
                put(value, f"{layer}.attention.{new}.{kind}", f"{layer}.attention.{old}.{kind}")
            elif name.startswith("ls"):
                put(value, f"{layer}.layer_scale{name[2]}.lambda1")
            else:
                put(value, f"{layer}.{name}")
    assert placed == state.keys()


@pytest.mark.parametrize(("folder", "registers"), [("dinov2_vit_d48", 0), ("dinov2_reg_vit_d48", 4)])
def test_dinov2_agrees_with_the_official_code(folder, registers):
    folder = shared(f"golden/{folder}")
    model = dinov2(registers)
    load_official(model, load_file(folder / "official_state_dict.safetensors"))
    assert_golden(wrap(model), folder)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_at_its_own_size_is_the_models_output(registers):
    model = dinov2(registers, image_size=70)
    image = torch.randn(2, 3, 70, 70)
    states = model(image, output_hidden_states=True)
    tokens = states.last_hidden_state[:, 1 + registers :].transpose(1, 2).reshape(2, 48, 5, 5)
    backbone = wrap(model)
    assert (backbone.channels, backbone.patch_size, backbone.mean) == (48, 14, (0.485, 0.456, 0.406))
    torch.testing.assert_close(backbone(image), tokens)
    first = model.layernorm(states.hidden_states[1])[:, 1 + registers :].transpose(1, 2).reshape(2, 48, 5, 5)
    torch.testing.assert_close(wrap(model, layer=0)(image), first)
    torch.testing.assert_close(model(image).last_hidden_state, states.last_hidden_state)


def test_a_table_that_is_not_square():
    model = dinov2(image_size=(28, 84))
    backbone = wrap(model)
    image = torch.randn(1, 3, 28, 84)
    expected = model.embeddings.patch_embeddings(image) + model.embeddings.position_embeddings[:, 1:]
    torch.testing.assert_close(backbone.features.embed(image)[0][:, 1:], expected)


def dinov3():
    config = transformers.DINOv3ViTConfig(**TINY, intermediate_size=96, image_size=64, num_register_tokens=4)
    model = transformers.DINOv3ViTModel(config).eval()
    nn.init.normal_(model.embeddings.register_tokens)
    return model


@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_dinov3_is_the_models_output(size):
    model = dinov3()
    image = torch.randn(2, 3, *size)
    states = model(image, output_hidden_states=True)
    h, w = size[0] // 16, size[1] // 16
    tokens = states.last_hidden_state[:, 5:].transpose(1, 2).reshape(2, 48, h, w)
    torch.testing.assert_close(wrap(model)(image), tokens)
    second = model.norm(states.hidden_states[2])[:, 5:].transpose(1, 2).reshape(2, 48, h, w)
    torch.testing.assert_close(wrap(model, layer=1)(image), second)
    torch.testing.assert_close(wrap(model.bfloat16())(image).float(), tokens, atol=0.1, rtol=0.1)


def hf_clip(kind="CLIPModel", width=64, output=32, side=224):
    """A CLIP whose image tower has the sizes of the small OpenAI one."""
    tower = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 1,
        "image_size": side, "patch_size": 16, "projection_dim": output,
    }  # fmt: skip
    vision = transformers.CLIPVisionConfig(**tower, hidden_act="quick_gelu")
    if kind != "CLIPModel":
        return getattr(transformers, kind)(vision).eval()
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=output)
    return transformers.CLIPModel(config).eval()


def load_openai(model, openai):
    """Put OpenAI's image tower into a transformers CLIP of either version."""
    tower = model
    while hasattr(tower, "vision_model"):
        tower = tower.vision_model
    new = {
        "embeddings.class_embedding": openai["visual.class_embedding"],
        "embeddings.patch_embedding.weight": openai["visual.conv1.weight"],
        "embeddings.position_embedding.weight": openai["visual.positional_embedding"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"attn.out_proj": "self_attn.out_proj"}
    for key, value in openai.items():
        kind = key.rsplit(".", 1)[-1]
        if ".resblocks." in key:
            index, name = key.split(".resblocks.")[1].split(".", 1)
            layer = f"encoder.layers.{index}"
            if "in_proj" in name:
                for one, part in zip("qkv", value.chunk(3), strict=True):
                    new[f"{layer}.self_attn.{one}_proj.{name.removeprefix('attn.in_proj_')}"] = part
            else:
                new[f"{layer}.{names[name.rsplit('.', 1)[0]]}.{kind}"] = value
        elif "ln_pre" in key:
            new[f"pre_layrnorm.{kind}"] = value
        elif "ln_post" in key:
            new[f"post_layernorm.{kind}"] = value
    missing, unexpected = tower.load_state_dict(new, strict=False)
    assert not unexpected
    assert all("position_ids" in key for key in missing)
    if hasattr(model, "visual_projection"):
        model.visual_projection.weight.data.copy_(openai["visual.proj"].T)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection"])
def test_clip_agrees_with_maskclip(kind):
    folder = shared("golden/maskclip_vit_d64")
    model = hf_clip(kind)
    load_openai(model, load_file(folder / "openai_state_dict.safetensors"))
    assert_golden(wrap(model), folder)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_clip_agrees_with_openais_layout(kind):
    openai, model = CLIP().eval(), hf_clip(kind)
    load_openai(model, openai.state_dict())
    if kind == "CLIPVisionModel":
        openai.visual.proj = None
    ours, theirs = wrap(model), wrap(openai)
    image = torch.randn(2, 3, 80, 140)
    assert ours.channels == theirs.channels == (64 if kind == "CLIPVisionModel" else 32)
    assert ours.mean == theirs.mean
    torch.testing.assert_close(ours(image), theirs(image))
    torch.testing.assert_close(wrap(model, layer=1)(image), wrap(openai, layer=1)(image))


def siglip(kind="SiglipModel"):
    vision = transformers.SiglipVisionConfig(**TINY_TOWER)
    if kind == "SiglipVisionModel":
        return transformers.SiglipVisionModel(vision).eval()
    text = {**TINY, "intermediate_size": 96, "vocab_size": 9}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=text)).eval()


@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipVisionModel"])
@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_siglip_agrees_with_timm(kind, size):
    model = siglip(kind)
    in_timm = vit(class_token=False, global_pool="", mlp_ratio=2, dynamic_img_size=True, act_layer="gelu_tanh")
    tower = model
    while hasattr(tower, "vision_model"):
        tower = tower.vision_model
    nn.init.normal_(tower.embeddings.position_embedding.weight)
    state, source = in_timm.state_dict(), tower.state_dict()
    for kind_ in ("weight", "bias"):
        state[f"patch_embed.proj.{kind_}"] = source[f"embeddings.patch_embedding.{kind_}"]
        state[f"norm.{kind_}"] = source[f"post_layernorm.{kind_}"]
        for index in range(3):
            block, layer = f"blocks.{index}", f"encoder.layers.{index}"
            parts = [source[f"{layer}.self_attn.{one}_proj.{kind_}"] for one in "qkv"]
            state[f"{block}.attn.qkv.{kind_}"] = torch.cat(parts)
            state[f"{block}.attn.proj.{kind_}"] = source[f"{layer}.self_attn.out_proj.{kind_}"]
            for number in "12":
                state[f"{block}.norm{number}.{kind_}"] = source[f"{layer}.layer_norm{number}.{kind_}"]
                state[f"{block}.mlp.fc{number}.{kind_}"] = source[f"{layer}.mlp.fc{number}.{kind_}"]
    state["pos_embed"] = source["embeddings.position_embedding.weight"][None]
    in_timm.load_state_dict(state)
    image = torch.randn(2, 3, *size)
    tokens = in_timm.forward_features(image).transpose(1, 2).reshape(2, 48, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(wrap(model)(image), tokens)
    assert wrap(model).mean == (0.5, 0.5, 0.5)


def test_naflex_siglip2_gets_its_patches():
    vision = transformers.Siglip2VisionConfig(**TINY, intermediate_size=96, patch_size=16, num_patches=16)
    model, image = transformers.Siglip2VisionModel(vision).eval(), torch.randn(2, 3, 64, 96)
    backbone = wrap(model)
    assert (backbone.channels, backbone.patch_size, backbone.fixed_size) == (48, 16, None)
    patches = image.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(2, 24, 768)
    shapes, mask = torch.tensor([[4, 6]] * 2), torch.ones(2, 24, dtype=torch.int64)
    own = model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    torch.testing.assert_close(backbone(image), own.mT.unflatten(2, (4, 6)))


class Version4Layer(nn.Module):
    """A layer as transformers 4 has it: masks without defaults, a tuple as the answer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)


class Version4ClipLayer(Version4Layer):
    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        assert attention_mask is causal_attention_mask is None
        return (self.layer(hidden_states, None),)


class Version4SiglipLayer(Version4Layer):
    def forward(self, hidden_states, attention_mask, output_attentions=False):
        return (self.layer(hidden_states, None), None)


class Version4DinoLayer(Version4Layer):
    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        return (self.layer(hidden_states),)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the real layers are of version 4")
@pytest.mark.parametrize(
    ("make", "layers", "stand_in"),
    [
        (hf_clip, "vision_model.encoder.layers", Version4ClipLayer),
        (siglip, "vision_model.encoder.layers", Version4SiglipLayer),
        (lambda: dinov2(image_size=70), "encoder.layer", Version4DinoLayer),
    ],
)
@pytest.mark.parametrize("layer", [None, 1])
def test_layers_of_version_4(make, layers, stand_in, layer):
    model, image = make(), torch.randn(1, 3, 112, 112)
    expected = wrap(model, layer=layer)(image)
    blocks = model.get_submodule(layers)
    for index, block in enumerate(list(blocks)):
        blocks[index] = stand_in(block)
    torch.testing.assert_close(wrap(model, layer=layer)(image), expected)


def test_nesting_of_version_4():
    model, image = dinov3(), torch.randn(1, 3, 64, 64)
    expected = wrap(model)(image)
    if not hasattr(model, "layer"):
        model.layer, model.model = model.model.layer, None
    torch.testing.assert_close(wrap(model)(image), expected)
    model, outer = siglip("SiglipVisionModel"), nn.Module()
    outer.config, outer.vision_model = model.config, model
    torch.testing.assert_close(wrap(outer)(image), wrap(model)(image))


def test_auto_backbone_of_a_vit():
    config = transformers.Dinov2Config(**TINY, image_size=70, patch_size=14, out_indices=[1, 3])
    model = transformers.AutoBackbone.from_config(config).eval()
    image = torch.randn(2, 3, 70, 98)
    official = transformers.Dinov2Model(config).eval()
    official.load_state_dict(model.state_dict())
    for layer, place in ((None, 1), (0, 0), (-1, 1)):
        backbone = wrap(model, layer=layer)
        assert (backbone.channels, backbone.patch_size) == (48, 14)
        torch.testing.assert_close(backbone(image[..., :70]), model(image[..., :70]).feature_maps[place])
        # At other sizes the positions are resampled as the official code does, not as transformers does.
        torch.testing.assert_close(backbone(image), wrap(official, layer=(0, 2)[place])(image))
    assert identify(model) is None
    with pytest.raises(LoftUpError, match="layer 2 is out of range: Dinov2Backbone has 2 layers, so -2 to 1"):
        wrap(model, layer=2)
    model.config.reshape_hidden_states = False
    torch.testing.assert_close(wrap(model)(image), wrap(official, layer=2)(image))


def test_auto_backbone_of_a_cnn_is_measured_without_leaving_a_trace():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage4"]
    )
    model = transformers.AutoBackbone.from_config(config).train()
    model.encoder.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    backbone = wrap(model, layer=0)
    assert (backbone.channels, backbone.patch_size) == (16, 8)
    assert wrap(model).patch_size == 32
    assert (model.training, model.encoder.training) == (True, False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    image = torch.randn(1, 3, 50, 64)
    model.eval()
    resized = F.interpolate(image, (48, 64), mode="bilinear")
    torch.testing.assert_close(wrap(model, layer=0)(image), model(resized).feature_maps[0])


def test_other_models_are_refused():
    model = transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=9, intermediate_size=9))
    with pytest.raises(LoftUpError, match=r"no feature map in .*BertModel \(model_type 'bert'\): .* wrap that part"):
        wrap(model)


def test_a_classifier_gives_its_tokens():
    config = transformers.Dinov2Config(**TINY, image_size=70, patch_size=14)
    model, image = transformers.Dinov2ForImageClassification(config).eval(), torch.randn(1, 3, 70, 70)
    tokens = model.dinov2(image).last_hidden_state[:, 1:]
    torch.testing.assert_close(wrap(model)(image), tokens.mT.unflatten(2, (5, 5)))


@pytest.mark.parametrize(
    ("stated", "sizes", "name"),
    [
        ("facebook/dinov2-small", {"hidden_size": 384}, "facebook/dinov2-small"),
        ("microsoft/rad-dino", {"hidden_size": 768}, "microsoft/rad-dino"),
        ("/models/mine", {"hidden_size": 384}, "/models/mine"),
        ("", {"hidden_size": 768}, None),
        ("someone/other", {}, "someone/other"),
    ],
)
def test_dinov2_is_identified_by_what_it_states_alone(stated, sizes, name):
    with torch.device("meta"):
        model = dinov2(**{"image_size": 56, "num_hidden_layers": 12, "num_attention_heads": 2, **sizes})
    model.config._name_or_path = stated
    assert identify(model) == name
    assert identify(wrap(model, layer=0)) is None


def test_clip_and_siglip_are_identified_by_name():
    for model, name in ((hf_clip(), "openai/clip-vit-base-patch16"), (siglip(), "google/siglip-base-patch16-224")):
        assert identify(model) is None
        model.config._name_or_path = name
        assert identify(model) == name
        assert wrap(model).name == name
    without = hf_clip("CLIPVisionModel")
    without.config._name_or_path = "openai/clip-vit-base-patch16"
    assert identify(without) is None


@pytest.mark.parametrize("make", [dinov2, hf_clip, siglip, dinov3])
def test_precision_and_gradients(make):
    model, image = make(), torch.randn(1, 3, 112, 112, requires_grad=True)
    backbone = wrap(model)
    expected = backbone(image)
    expected.sum().backward()
    assert image.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backbone(image).float(), expected, atol=0.2, rtol=0.2)
    features = backbone.bfloat16()(image)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, atol=0.2, rtol=0.2)


def test_a_masked_autoencoder_sees_all_patches():
    config = transformers.ViTMAEConfig(**TINY, intermediate_size=64, image_size=64, patch_size=16)
    model, image = transformers.ViTMAEModel(config).eval(), torch.randn(2, 3, 64, 96)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    backbone = wrap(model)
    assert model.config.mask_ratio == 0.75
    config.mask_ratio = 0.0
    noise = torch.arange(24.0).expand(2, -1)
    own = model(image, noise=noise, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    config.mask_ratio = 0.75
    torch.testing.assert_close(backbone(image), own.mT.unflatten(2, (4, 6)))
