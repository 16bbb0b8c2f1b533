"""Feature maps found by looking, in models of no known family."""

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
    with pytest.raises(LoftUpError, match="checkpoint_path is not taken: timm may run what a pickle holds"):
        load_backbone("resnet10t", weights=False, checkpoint_path=str(tmp_path / "evil.pth"))
    pytest.importorskip("open_clip")
    with pytest.raises(LoftUpError, match=r"open_clip's 'ViT-B-32' has no tag for the weights; give one of ViT-B-32/"):
        load_backbone("ViT-B-32")
    with pytest.raises(LoftUpError, match=r"open_clip's 'ViT-B-32' has no tag 'mine'"):
        load_backbone("ViT-B-32/mine")
