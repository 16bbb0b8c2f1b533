"""The published LoftUp checkpoints: data, not code (paper section 4 and the authors' Hub repositories)."""

import dataclasses

__all__ = ["PUBLISHED", "Checkpoint", "find_checkpoint", "list_pretrained"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One published set of weights.

    Args:
        name: loftup's name.
        repo: Hub repository id.
        channels: C of the features it expects.
        patch_size: patch of the backbone in pixels.
        timm: full timm name of the backbone whose features it was trained on.
        backbones: the same backbone's other names in torch.hub, open_clip, transformers and timm.
        file: file of the repository that holds the channel norm too.
        mean: per-channel mean that training subtracted from images in [0, 1]. ImageNet's for all backbones, also
            where the backbone's own differs.
        std: per-channel standard deviation that training divided by.
        licence: of the weights.
        source: where they are described.
    """

    name: str
    repo: str
    channels: int
    patch_size: int
    timm: str
    backbones: tuple[str, ...]
    file: str = "pytorch_model.bin"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str = "MIT"
    source: str = "https://github.com/andrehuang/loftup"


_CHECKPOINTS = (
    Checkpoint(
        name="dinov2_vits14",
        repo="haiwen/loftup-dinov2s",
        channels=384,
        patch_size=14,
        timm="vit_small_patch14_dinov2.lvd142m",
        backbones=("vit_small_patch14_dinov2", "facebook/dinov2-small"),
    ),
    Checkpoint(
        name="dinov2_vits14_reg",
        repo="haiwen/loftup-dinov2s_reg",
        channels=384,
        patch_size=14,
        timm="vit_small_patch14_reg4_dinov2.lvd142m",
        backbones=("vit_small_patch14_reg4_dinov2", "facebook/dinov2-with-registers-small"),
    ),
    Checkpoint(
        name="dinov2_vitb14",
        repo="haiwen/loftup-dinov2b",
        channels=768,
        patch_size=14,
        timm="vit_base_patch14_dinov2.lvd142m",
        backbones=("vit_base_patch14_dinov2", "facebook/dinov2-base"),
    ),
    Checkpoint(
        name="dinov2_vitb14_reg",
        repo="haiwen/loftup-dinov2b_reg",
        channels=768,
        patch_size=14,
        timm="vit_base_patch14_reg4_dinov2.lvd142m",
        backbones=("vit_base_patch14_reg4_dinov2", "facebook/dinov2-with-registers-base"),
    ),
    Checkpoint(
        name="clip_vitb16",
        repo="haiwen/loftup-clip",
        channels=512,
        patch_size=16,
        timm="vit_base_patch16_clip_quickgelu_224.openai",
        backbones=(
            "vit_base_patch16_clip_224.openai",
            "ViT-B/16",
            "ViT-B-16/openai",
            "ViT-B-16-quickgelu/openai",
            "openai/clip-vit-base-patch16",
        ),
    ),
    Checkpoint(
        name="siglip_vitb16",
        repo="haiwen/loftup-siglip",
        channels=768,
        patch_size=16,
        timm="vit_base_patch16_siglip_224.webli",
        backbones=("ViT-B-16-SigLIP", "ViT-B-16-SigLIP/webli", "google/siglip-base-patch16-224"),
    ),
    Checkpoint(
        name="siglip2_vitb16",
        repo="haiwen/loftup-siglip2",
        channels=768,
        patch_size=16,
        timm="vit_base_patch16_siglip_224.v2_webli",
        backbones=("ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2/webli", "google/siglip2-base-patch16-224"),
    ),
)

PUBLISHED = {checkpoint.name: checkpoint for checkpoint in _CHECKPOINTS}

_BY_NAME = {
    alias: checkpoint
    for checkpoint in _CHECKPOINTS
    for alias in (checkpoint.name, checkpoint.repo, checkpoint.timm, *checkpoint.backbones)
}


def find_checkpoint(name: str) -> Checkpoint | None:
    """Look up published weights by loftup's name, the repository, or any name of the backbone; None if unknown."""
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return _BY_NAME.get(bare) or _BY_NAME.get(bare.removeprefix("timm/"))


def known_names() -> list[str]:
    """Every name that :func:`find_checkpoint` accepts, for error messages."""
    return list(_BY_NAME)


def list_pretrained() -> list[Checkpoint]:
    """All published checkpoints, each with its Hub repository, channels, patch size, scaling, licence and names.

    >>> [checkpoint.name for checkpoint in list_pretrained()][:2]
    ['dinov2_vits14', 'dinov2_vits14_reg']
    """
    return list(_CHECKPOINTS)
