"""The weights that loftup knows, published ones and those in the package: data, not code.

The published ones are of paper section 4 and the authors' Hub repositories.
"""

import dataclasses
from pathlib import Path

__all__ = [
    "ANY",
    "CATALOGUE",
    "IN_PACKAGE",
    "PUBLISHED",
    "TINY",
    "TINY_BACKBONES",
    "Checkpoint",
    "Checkpoints",
    "find_checkpoint",
    "fitting",
    "known_names",
    "list_pretrained",
]

ANY = "any"  # the universal upsampler, for every backbone
TINY = "tiny"  # the backbone in the package
FOLDER = Path(__file__).parent.parent / "bundled"
TINY_BACKBONES = {TINY: FOLDER / "tiny_backbone", "tiny_v1": FOLDER / "tiny_v1_backbone"}  # by loftup's names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One set of upsampler weights.

    Args:
        name: loftup's name.
        repo: Hub repository id; None for weights in the package.
        channels: C of the features it expects; None for any.
        patch_size: patch of the backbone in pixels; None for any.
        timm: full timm name of the backbone whose features it was trained on; None where timm does not have it.
        backbones: the same backbone's other names in torch.hub, open_clip, transformers and timm; of "any", the names
            of the backbones in the package, which have no upsampler of their own.
        file: file of the repository that holds the channel norm too.
        mean: per-channel mean that training subtracted from images in [0, 1]; None for the backbone's own. ImageNet's
            for all published ones, also where the backbone's own differs.
        std: per-channel standard deviation that training divided by; None for the backbone's own.
        licence: of the weights.
        source: where they are described.
        in_package: whether they come with the package and need no network.
    """

    name: str
    repo: str | None
    channels: int | None
    patch_size: int | None
    timm: str | None
    backbones: tuple[str, ...]
    file: str = "pytorch_model.bin"
    mean: tuple[float, float, float] | None = IMAGENET_MEAN
    std: tuple[float, float, float] | None = IMAGENET_STD
    licence: str = "MIT"
    source: str | None = "https://github.com/andrehuang/loftup"
    in_package: bool = False

    @property
    def folder(self) -> Path:
        """Of weights in the package."""
        assert self.in_package
        return FOLDER / self.name


# fmt: off
_PUBLISHED = (
    Checkpoint("dinov2_vits14", "haiwen/loftup-dinov2s", 384, 14, "vit_small_patch14_dinov2.lvd142m",
               ("vit_small_patch14_dinov2", "facebook/dinov2-small")),
    Checkpoint("dinov2_vits14_reg", "haiwen/loftup-dinov2s_reg", 384, 14, "vit_small_patch14_reg4_dinov2.lvd142m",
               ("vit_small_patch14_reg4_dinov2", "facebook/dinov2-with-registers-small")),
    Checkpoint("dinov2_vitb14", "haiwen/loftup-dinov2b", 768, 14, "vit_base_patch14_dinov2.lvd142m",
               ("vit_base_patch14_dinov2", "facebook/dinov2-base")),
    Checkpoint("dinov2_vitb14_reg", "haiwen/loftup-dinov2b_reg", 768, 14, "vit_base_patch14_reg4_dinov2.lvd142m",
               ("vit_base_patch14_reg4_dinov2", "facebook/dinov2-with-registers-base")),
    Checkpoint("clip_vitb16", "haiwen/loftup-clip", 512, 16, "vit_base_patch16_clip_quickgelu_224.openai",
               ("vit_base_patch16_clip_224.openai", "ViT-B/16", "ViT-B-16/openai", "ViT-B-16-quickgelu/openai",
                "openai/clip-vit-base-patch16")),
    Checkpoint("siglip_vitb16", "haiwen/loftup-siglip", 768, 16, "vit_base_patch16_siglip_224.webli",
               ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP/webli", "google/siglip-base-patch16-224")),
    Checkpoint("siglip2_vitb16", "haiwen/loftup-siglip2", 768, 16, "vit_base_patch16_siglip_224.v2_webli",
               ("ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2/webli", "google/siglip2-base-patch16-224")),
)
# The backbones in the package go with it: no warning says that it stands in for them.
_IN_PACKAGE = (
    Checkpoint(ANY, None, None, None, None, tuple(TINY_BACKBONES), "model.safetensors", None, None, "CC-BY-4.0", None,
               True),
)
# fmt: on

PUBLISHED = {checkpoint.name: checkpoint for checkpoint in _PUBLISHED}
IN_PACKAGE = {checkpoint.name: checkpoint for checkpoint in _IN_PACKAGE}
CATALOGUE = PUBLISHED | IN_PACKAGE

_OWN_NAMES = {*CATALOGUE, *TINY_BACKBONES}
_BY_NAME = {
    alias: checkpoint
    for checkpoint in CATALOGUE.values()
    for alias in (checkpoint.name, checkpoint.repo, checkpoint.timm, *checkpoint.backbones)
    if alias is not None
}


def find_checkpoint(name: str) -> Checkpoint | None:
    """Look up weights by loftup's name, the repository, or any name of the backbone; None if unknown."""
    if found := _BY_NAME.get(name):
        return found
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    found = _BY_NAME.get(bare) or _BY_NAME.get(bare.removeprefix("timm/"))
    # loftup's own names take no prefix: "timm/any" is somebody's repository.
    return None if bare.removeprefix("timm/") in _OWN_NAMES else found


def known_names() -> list[str]:
    """Every name that :func:`find_checkpoint` accepts, for error messages."""
    return list(_BY_NAME)


def fitting(channels: int) -> str:
    """The published weights for a number of channels, as the end of an error message; "" if there are none."""
    names = [repr(checkpoint.name) for checkpoint in _PUBLISHED if checkpoint.channels == channels]
    return f"; for {channels} channels: {', '.join(names)}" if names else ""


class Checkpoints(list[Checkpoint]):
    """Checkpoints, which print as a table."""

    def __repr__(self) -> str:
        rows = [("NAME", "C", "PATCH", "HUB REPOSITORY", "LICENCE", "BACKBONE (timm)")]
        for each in self:
            channels, patch_size = (str(size or "any") for size in (each.channels, each.patch_size))
            backbone = (each.timm or each.backbones[0]) if each.channels else "any"
            rows.append((each.name, channels, patch_size, each.repo or "in the package", each.licence, backbone))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def list_pretrained() -> Checkpoints:
    """All checkpoints on the Hub, each with its Hub repository, channels, patch size, scaling, licence and names.

    The list prints as a table.

    Examples:
        >>> [checkpoint.name for checkpoint in list_pretrained()][:2]
        ['dinov2_vits14', 'dinov2_vits14_reg']
    """
    return Checkpoints(_PUBLISHED)
