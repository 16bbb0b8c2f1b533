"""The plain ViTs of each package: where their parts are, how they are told apart, what they were trained on."""

import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import LoftUpError
from ..weights.catalogue import find_checkpoint
from .maps import dinov2_name, timm_config, timm_stages
from .vit import (
    ANTIALIASED,
    IMAGENET,
    WITH_OFFSET,
    Layout,
    PlainViT,
    Resampling,
    Scaling,
    Source,
    part,
    pick_layer,
    plain_source,
)

__all__ = ["clip_object", "open_clip_timm", "timm_vit", "transformers_vit"]

OPENAI: Scaling = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Scaling = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

TIMM = Layout(
    "patch_embed.proj", "blocks", "norm", ("cls_token", "reg_token"), "pos_embed", "patch_embed.norm", "norm_pre"
)
CLIP = Layout(
    patch="conv1",
    blocks="transformer.resblocks",
    norm="ln_post",
    tokens=("class_embedding",),
    position="positional_embedding",
    pre_norm="ln_pre",
    block_norm="ln_1",
)
HF_TOKENS, HF_POSITIONS = ("embeddings.cls_token", "embeddings.register_tokens"), "embeddings.position_embeddings"
HF_DINOV2 = Layout("embeddings.patch_embeddings.projection", "encoder.layer", "layernorm", HF_TOKENS, HF_POSITIONS)
HF_DINOV3 = Layout("embeddings.patch_embeddings", "model.layer", "norm", HF_TOKENS, rope="rope_embeddings")
HF_SIGLIP = Layout(
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    norm="post_layernorm",
    block_norm="layer_norm1",
    attention="self_attn",
)
HF_CLIP = replace(HF_SIGLIP, tokens=("embeddings.class_embedding",), pre_norm="pre_layrnorm")


def timm_vit(model: Any, layer: int | None) -> Source | None:
    """The VisionTransformer of timm, where it is the plain one (subclasses and hybrids run as timm runs them)."""
    ancestors = {f"{cls.__module__}.{cls.__name__}": cls for cls in type(model).__mro__}
    base = ancestors.get("timm.models.vision_transformer.VisionTransformer")
    if base is None or type(model.patch_embed).__name__ != "PatchEmbed":
        return None
    if any(getattr(type(model), method) is not getattr(base, method) for method in ("forward_features", "_pos_embed")):
        return None
    name, scaling, config = timm_config(model)
    count = len(model.blocks)
    # timm's fine-tuned CLIPs (tags such as openai_ft_in1k) are classifiers: their last block is theirs, not CLIP's.
    clip = "_clip_" in name and "_ft_" not in name and not isinstance(model.norm_pre, nn.Identity)
    if clip:
        warn_of_gelu(model, name)
    # Only a class token that shares the table with the patches tells the official layout without registers.
    dinov2 = "dinov2" in name and model.cls_token is not None and model.reg_token is None and not model.no_embed_class
    is_projection = isinstance(model.head, nn.Linear) and model.head.out_features == config.get("num_classes")
    vit = PlainViT(
        model,
        TIMM,
        WITH_OFFSET if clip or dinov2 else ANTIALIASED,
        last=pick_layer(layer, count, name or "this VisionTransformer"),
        table_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        value_path=clip and layer is None,
        projection=(model, "head") if clip and layer is None and is_projection else None,
    )
    return plain_source(vit, count, name, scaling, clip)


def warn_of_gelu(model: Any, name: str) -> None:
    """Say so where weights that were trained with QuickGELU sit in a model with plain GELU."""
    import timm

    quick = name.replace("_clip_", "_clip_quickgelu_")
    # Without a tag nothing is known of the weights; with one, timm's registry knows what they were trained with.
    if "." in name and isinstance(model.blocks[0].mlp.act, nn.GELU) and timm.models.is_model_pretrained(quick):
        warnings.warn(
            f"{name}: these weights were trained with QuickGELU, and this model applies plain GELU, which changes the "
            f"features. Build {quick!r} instead",
            stacklevel=4,
        )


def open_clip_timm(model: Any, layer: int | None) -> Source | None:
    """A timm model inside open_clip's TimmModel, as SigLIP is kept there."""
    tower = getattr(model, "visual", model)
    trunk = getattr(tower, "trunk", None)
    if type(tower).__name__ != "TimmModel" or trunk is None:
        return None
    if (source := timm_vit(trunk, layer) or timm_stages(trunk, layer)) is None:
        return None
    # Built without timm's weights, the trunk carries the name of timm's default ones, which says nothing.
    return replace(source, name="", scaling=open_clip_scaling(tower, source.scaling))


def open_clip_scaling(tower: Any, default: Scaling) -> Scaling:
    """The mean and std that open_clip's factory notes on an image tower."""
    return getattr(tower, "image_mean", None) or default[0], getattr(tower, "image_std", None) or default[1]


def clip_object(model: Any, layer: int | None) -> Source | None:
    """An open_clip or OpenAI ``clip`` model, or its image tower; layer None is the value path."""
    tower = getattr(model, "visual", model)
    if any(part(tower, path) is None for path in (CLIP.patch, CLIP.position, CLIP.blocks, CLIP.norm)):
        return None
    blocks = tower.transformer.resblocks
    attention = getattr(blocks[-1], "attn", None)
    if getattr(tower, "attn_pool", None) is not None or not isinstance(attention, nn.MultiheadAttention):
        raise LoftUpError(
            f"this {type(tower).__name__} has attention pooling or blocks of its own ({type(attention).__name__}); "
            "only the CLIP image tower with nn.MultiheadAttention blocks and a class token is supported"
        )
    official = any(type(m).__module__ == "clip.model" for m in (model, tower))
    has_projection = layer is None and getattr(tower, "proj", None) is not None
    vit = PlainViT(
        tower,
        CLIP,
        WITH_OFFSET,
        last=pick_layer(layer, len(blocks), "this CLIP"),
        table_tokens=1,
        value_path=layer is None,
        projection=(tower, "proj") if has_projection else None,
    )
    # open_clip's objects do not say which weights they hold; OpenAI's package only ever loads OpenAI's.
    is_b16 = official and (vit.patch.out_channels, vit.patch.stride[0], len(blocks)) == (768, 16, 12)
    name = "ViT-B/16" if is_b16 else ""
    return plain_source(vit, len(blocks), name, open_clip_scaling(tower, OPENAI), clip=True)


# By ``config.model_type``.
TRANSFORMERS: dict[Any, tuple[Layout, Resampling, Scaling]] = {
    "dinov2": (HF_DINOV2, WITH_OFFSET, IMAGENET),
    "dinov2_with_registers": (HF_DINOV2, ANTIALIASED, IMAGENET),
    "dinov3_vit": (HF_DINOV3, ANTIALIASED, IMAGENET),
    "clip_vision_model": (HF_CLIP, WITH_OFFSET, OPENAI),
    "siglip_vision_model": (HF_SIGLIP, ANTIALIASED, HALF),
}


def transformers_vit(model: Any, layer: int | None) -> Source | None:
    """A transformers vision model, or the vision tower of a two-tower one, by its ``config.model_type``."""
    trunk = model
    while isinstance(inner := getattr(trunk, "vision_model", None), nn.Module):
        trunk = inner
    kind = part(trunk, "config.model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise LoftUpError(
            f"{type(model).__name__} is a NaFlex SigLIP 2: it takes pictures cut into patches by its own processor, "
            "not images. Load a fixed-resolution SigLIP 2 (such as google/siglip2-base-patch16-224), or write the "
            "function from image (B, 3, H, W) to features (B, C, h, w) yourself"
        )
    if kind not in TRANSFORMERS:
        return None
    layout, resampling, scaling = TRANSFORMERS[kind]
    if part(trunk, layout.patch) is None:
        return None
    if kind == "dinov3_vit" and part(trunk, layout.blocks) is None:
        layout = replace(layout, blocks="layer")  # transformers 4
    count = len(part(trunk, layout.blocks))
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if kind.startswith("dinov2"):
        sizes = (trunk.config.hidden_size, count, trunk.config.patch_size)
        # The stated name may be a local path: the sizes tell a published model too.
        if not find_checkpoint(name):
            name = dinov2_name(*sizes, getattr(trunk.config, "num_register_tokens", 0)) or name
    clip = kind == "clip_vision_model"
    has_projection = clip and layer is None and part(model, "visual_projection") is not None
    vit = PlainViT(
        trunk,
        layout,
        resampling,
        last=pick_layer(layer, count, name or f"this {type(model).__name__}"),
        table_tokens=1 if layout.tokens else 0,
        value_path=clip and layer is None,
        projection=(model, "visual_projection") if has_projection else None,
    )
    return plain_source(vit, count, name, scaling, clip)
