"""Small backbones with random weights, and the comparison with golden features."""

from collections import OrderedDict

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def vit(tag="test_vit.r160_in1k", **options):
    """A small timm ViT whose position table matters, made to look like the named one."""
    settings = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**{**settings, **options}).eval()
    model.pretrained_cfg = dict(zip(("architecture", "tag"), tag.split("."), strict=True))
    with torch.no_grad():
        model.pos_embed.normal_()
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                token.normal_()
    return model


def randomised(model):
    """Norms that are not the identity."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.normal_(1.0 if name.endswith(("weight", "var")) else 0.0, 0.2).abs_()
    return model.eval()


def grid(tokens, h, w):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)


def assert_golden(backbone, folder):
    cases = load_file(folder / "cases.safetensors")
    count = len(cases) // 2
    assert count >= 3
    for case in range(count):
        with torch.inference_mode():
            error = (backbone(cases[f"{case}.image"]) - cases[f"{case}.features"]).abs()
        assert error.max() <= 2e-4, case
        assert error.mean() <= 1e-5, case


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """OpenAI's: float32 inside, whatever comes in."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        mlp = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """The image tower of OpenAI's package: blocks run tokens first."""

    def __init__(self, width=64, patch=16, side=224, layers=3, output=32):
        super().__init__()
        self.input_resolution, self.output_dim = side, output
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(width) for _ in range(layers)])
        self.proj = nn.Parameter(torch.randn(width, output) / width**0.5)


class CLIP(nn.Module):
    """OpenAI's model object, as far as its image side goes."""

    def __init__(self, **sizes):
        super().__init__()
        self.visual = Tower(**sizes)


Tower.__module__ = CLIP.__module__ = "clip.model"
