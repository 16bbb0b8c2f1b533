"""Feature maps found by looking, in models of no known family."""

import copy
import dataclasses
import io
import threading

import pytest
import timm
import torch
from torch import nn

from loftup import LoftUpError, load_backbone, wrap

torchvision = pytest.importorskip("torchvision")


def build(name):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(weights=None).eval()


def test_a_cnn_of_torchvision():
    model, image = build("resnet18"), torch.randn(1, 3, 96, 160)
    backbone = wrap(model)
    assert (backbone.channels, backbone.patch_size, backbone.fixed_size) == (512, 32, None)
    assert "found by looking: ResNet.layer4 as nchw" in backbone.explain()
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        stages = [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    torch.testing.assert_close(backbone(image), stages[3])
    named = wrap(model, layer="layer2")
    assert named.layer == "layer2"
    torch.testing.assert_close(named(image), stages[1])
    for features, stage in zip(wrap(model, layer=["layer3", "layer1"])(image), (stages[2], stages[0]), strict=True):
        torch.testing.assert_close(features, stage)
    with pytest.raises(LoftUpError, match=r"no layer 'layer9' in this ResNet; it has modules such as conv1"):
        wrap(model, layer="layer9")
    with pytest.raises(LoftUpError, match=r"none of 0 tensors of layer 'fc' keeps the picture's order"):
        wrap(model, layer="fc")
    with pytest.raises(TypeError, match=r"got both: \('layer1', 2\); give the names of all"):
        wrap(model, layer=["layer1", 2])


def test_tokens_behind_a_class_token():
    model, image = build("vit_b_32"), torch.randn(1, 3, 224, 224)
    backbone = wrap(model)
    assert backbone.fixed_size == (224, 224)
    assert "as bnc, 1 tokens in front" in backbone.explain()
    with torch.no_grad():
        tokens = model._process_input(image)
        tokens = model.encoder(torch.cat([model.class_token, tokens], 1))[:, 1:]
    torch.testing.assert_close(backbone(image), tokens.mT.unflatten(2, (7, 7)))


def test_channels_last():
    model, image = build("swin_t"), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        stage = model.features(image)
    backbone = wrap(model, layer="features")
    assert "as nhwc" in backbone.explain()
    torch.testing.assert_close(backbone(image), stage.permute(0, 3, 1, 2))


def test_sequences_logits_and_models_inside():
    sequence = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(wrap(sequence)(image), sequence(image).detach())

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=2, img_size=64)
            self.out = nn.Linear(48, 3)

        def forward(self, image):
            return self.out(self.net.forward_features(image)[:, 0])

    model = Classifier().eval()
    tokens = model.net.forward_features(image[..., :64]).detach()[:, 1:]
    torch.testing.assert_close(wrap(model, layer="net.norm")(image[..., :64]), tokens.mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(wrap(model)(image[..., :64]), tokens.mT.unflatten(2, (4, 4)))


def test_detection_tokens_behind_the_patches_are_left_out():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 24, 16, 16)
            self.more = nn.Parameter(torch.randn(1, 11, 24))
            self.norm = nn.LayerNorm(24)

        def forward(self, image):
            x = self.patch(image).flatten(2).mT
            return self.norm(
                torch.cat([self.more[:, :2].expand(len(x), -1, -1), x, self.more[:, 2:].expand(len(x), -1, -1)], 1)
            )

    model, image = Detector(), torch.rand(2, 3, 64, 96)
    backbone = wrap(model)
    torch.testing.assert_close(backbone(image), model(image)[:, 2:-9].mT.unflatten(2, (4, 6)).detach())
    assert "2 tokens in front" in backbone.explain()


def test_a_subclass_gives_its_own_features():
    class Adapted(timm.models.vision_transformer.VisionTransformer):
        def __init__(self, **options):
            super().__init__(**options)
            self.adapter = nn.Linear(self.embed_dim, self.embed_dim)

        def forward_features(self, x, attn_mask=None):
            return self.adapter(super().forward_features(x))

    model = Adapted(img_size=64, embed_dim=48, depth=2, num_heads=2).eval()
    image = torch.randn(1, 3, 64, 64)
    tokens = model.forward_features(image)[:, 1:].detach()
    torch.testing.assert_close(wrap(model)(image), tokens.mT.unflatten(2, (4, 4)))


def test_gradients_reach_the_image_and_a_model_that_learns():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 2, 2))
    image = torch.rand(2, 3, 32, 48, requires_grad=True)
    wrap(model)(image).sum().backward()
    assert image.grad is not None
    assert model[0].weight.grad is None
    wrap(model, trainable=True)(image.detach()).sum().backward()
    assert model[0].weight.grad is not None


def test_peft_keeps_its_adapters():
    peft = pytest.importorskip("peft")
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=2, dynamic_img_size=True).eval()
    image = torch.randn(1, 3, 96, 64)
    plain = wrap(model)(image)
    config = peft.LoraConfig(target_modules=["qkv", "patch_embed.proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    features = wrap(adapted)(image)
    assert features.shape == plain.shape
    assert not torch.allclose(features, plain)
    tokens = adapted.get_base_model().forward_features(image)[:, 1:].detach()
    torch.testing.assert_close(features, tokens.mT.unflatten(2, (6, 4)))


def test_hooks_that_do_not_run_are_told_of():
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=2).eval()
    backbone = wrap(model)
    model.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="the forward hooks of VisionTransformer do not run"):
        backbone(torch.rand(1, 3, 32, 32))


def test_trunks_of_clips_say_so_and_are_projected_when_asked():
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(
        timm_model_name="vit_tiny_patch16_224", timm_pool="avg", timm_proj="linear", image_size=224
    )
    tower = open_clip.model._build_vision_tower(24, vision).eval()
    image = torch.randn(1, 3, 224, 224)
    backbone = wrap(tower)
    assert backbone.channels == 192
    assert "before the projection to the text's space" in backbone.explain()
    projected = wrap(tower, space="text")
    assert (projected.channels, projected.notes[0]) == (24, "in the text's space")
    # The model pools what is projected here cell by cell.
    torch.testing.assert_close(projected(image).mean((2, 3)), tower(image).detach(), atol=1e-4, rtol=1e-3)
    with pytest.raises(LoftUpError, match="space='text' is not possible for this ResNet: it has no projection"):
        wrap(timm.create_model("resnet10t"), space="text")
    with pytest.raises(ValueError, match="space must be 'text' or None, got 'image'"):
        wrap(tower, space="image")


def test_names_of_other_libraries(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert load_backbone("dinov3_vits16", weights=False, depth=1).name == "vit_small_patch16_dinov3.lvd1689m"
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path / "vit")
    image = torch.randn(1, 3, 96, 64)
    backbone = load_backbone(str(tmp_path / "vit"))
    assert (backbone.channels, backbone.patch_size, backbone.fixed_size) == (48, 16, None)
    own = model(image, interpolate_pos_encoding=True).last_hidden_state[:, 1:].detach()
    torch.testing.assert_close(backbone(image), own.mT.unflatten(2, (6, 4)))
    with pytest.raises(LoftUpError, match="which takes no options of timm: depth"):
        load_backbone(str(tmp_path / "vit"), depth=2)
    with pytest.raises(LoftUpError, match="weights= takes None or False here"):
        load_backbone(str(tmp_path / "vit"), weights="file.safetensors")
    for option in ({"checkpoint_path": "evil.pth"}, {"pretrained_cfg": {"file": "evil.pth"}}):
        with pytest.raises(LoftUpError, match=f"{next(iter(option))} is not taken: timm may run what a pickle holds"):
            load_backbone("resnet10t", weights=False, **option)
    pytest.importorskip("open_clip")
    with pytest.raises(LoftUpError, match=r"open_clip's 'ViT-B-32' has no tag for the weights; give one of ViT-B-32/"):
        load_backbone("ViT-B-32")
    with pytest.raises(LoftUpError, match=r"open_clip's 'ViT-B-32' has no tag 'mine'"):
        load_backbone("ViT-B-32/mine")


class Stem(nn.Module):
    """A small network, and what becomes of its map in the end."""

    def __init__(self, after=lambda x: x):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 9, 2, 2)
        )
        self.after = after

    def forward(self, image):
        return self.after(self.body(image))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8)), lambda: build("resnet18")])
def test_a_backbone_found_by_looking_can_be_copied_and_saved_whole(make):
    backbone, image = wrap(make()), torch.randn(1, 3, 64, 64)
    features, twin = backbone(image), copy.deepcopy(backbone)
    for parameter in backbone.model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(image), features)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(image), features)


def test_threads_share_a_backbone():
    backbone, turn = wrap(build("resnet18")), threading.Barrier(2, timeout=60)
    images = [torch.randn(1, 3, side, 64) for side in (64, 96)]
    expected = [backbone(image) for image in images]
    got = [None, None]

    def work(index):
        got[index] = backbone(images[index])

    def meet(*_):
        turn.wait()  # both are inside the model

    backbone.model.conv1.register_forward_hook(meet)
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for features, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(features, wanted)


def test_what_runs_on_does_not_change_a_layer_in_place():
    model, image = Stem().eval(), torch.randn(1, 3, 32, 48)
    alone = wrap(model, layer="body.1")(image)
    assert alone.min() < 0
    torch.testing.assert_close(wrap(model, layer=["body.1", "body.3"])(image)[0], alone)


def test_a_model_that_changes_its_picture_gets_one_of_its_own():
    class Shifting(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    backbone, image = wrap(Shifting(3, 8, 8, 8)), torch.rand(1, 3, 32, 48)
    before = image.clone()
    backbone(image)
    assert torch.equal(image, before)


def test_outputs_that_are_dataclasses():
    backbone = wrap(Stem(lambda x: Output(x.mean((2, 3)), 2 * x)).eval())
    assert "Stem['map'] as nchw" in backbone.explain()
    image = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(backbone(image), backbone.model(image).map.detach())


@dataclasses.dataclass
class Output:
    pooled: torch.Tensor
    map: torch.Tensor


def test_random_numbers_are_those_of_a_run_without_wrapping():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    backbone = wrap(Stem(lambda x: nn.functional.dropout(x, 0.1, training=True)))
    assert "its features differ from call to call" in backbone.explain()
    fresh = torch.get_rng_state()
    torch.set_rng_state(state)
    Stem()
    assert torch.equal(torch.get_rng_state(), fresh)


def test_weights_on_the_meta_device_and_another_default_device():
    with torch.device("meta"):
        tokens = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=2)
        model = build("resnet18")
    assert (wrap(model).channels, wrap(model).patch_size) == (512, 32)
    assert wrap(tokens, layer="blocks.0").channels == 48
    model = Stem()
    with torch.device("meta"):
        assert "checked: features change" in wrap(model).explain()


def test_a_tower_s_layer_goes_by_its_name_in_the_whole_model():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**small, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**small, "image_size": 64, "patch_size": 16})
    model, image = transformers.CLIPModel(config).eval(), torch.randn(1, 3, 64, 64)
    name = next(n for n, _ in model.named_modules() if n.startswith("vision_model") and n.endswith("layers.0"))
    own = model.vision_model(image, output_hidden_states=True).hidden_states[1][:, 1:].detach()
    torch.testing.assert_close(wrap(model, layer=name)(image), own.mT.unflatten(2, (4, 4)))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_models_of_torch_jit_show_their_result_alone():
    image = torch.rand(1, 3, 64, 96)
    for model in (torch.jit.script(Stem().body.eval()), torch.jit.trace(Stem().eval(), image)):
        torch.testing.assert_close(wrap(model)(image), model(image).detach())
    with pytest.raises(LoftUpError, match=r"torch\.jit shows nothing but the result: wrap the module before"):
        wrap(torch.jit.trace(nn.Sequential(Stem(), nn.AdaptiveAvgPool2d(1)).eval(), image))


def test_a_map_as_fine_as_the_picture_comes_last_and_is_told_of():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Upsample(scale_factor=4))
    assert wrap(model).patch_size == 4
    backbone = wrap(model, layer="1")
    assert (backbone.patch_size, backbone.fixed_size) == (1, None)
    assert "as fine as the picture, layer= takes a coarser map" in backbone.explain()


def test_large_pictures_are_tried_one_by_one():
    sizes = []

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 64, 64)
            self.register_buffer("place", torch.zeros(256, 1, 1))

        def forward(self, image):
            sizes.append(tuple(image.shape))
            return self.patch(image).flatten(2).permute(2, 0, 1) + self.place  # tokens first

    assert wrap(Large()).fixed_size == (1024, 1024)
    assert {size[0] for size in sizes if size[2:] == (1024, 1024)} == {1}


def test_masked_autoencoders_see_every_patch():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**small, image_size=64, mask_ratio=0.75)).eval()
    image = torch.randn(1, 3, 64, 64)
    features = wrap(model)(image)
    assert model.config.mask_ratio == 0.75
    model.config.mask_ratio = 0.0
    own = model(image, noise=torch.arange(16.0)[None]).last_hidden_state[:, 1:].detach()
    torch.testing.assert_close(features, own.mT.unflatten(2, (4, 4)))


def test_a_map_of_one_channel_is_a_prediction():
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 1, 1))
    backbone = wrap(model)
    assert (backbone.channels, backbone.patch_size) == (8, 8)
    assert "Sequential.1 as nchw" in backbone.explain()


def test_what_could_not_be_told_is_said():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 24, 16, 16)
            nn.init.zeros_(self.stem.weight)

        def forward(self, image):
            assert image.shape[2:] == (224, 224)
            return self.stem(image)

    backbone = wrap(Fixed())
    assert backbone.fixed_size == (224, 224)
    assert "not checked: a change of one cell shows nowhere" in backbone.explain()
