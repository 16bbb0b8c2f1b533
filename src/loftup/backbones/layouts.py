"""The plain ViTs of each package: where their parts are, how they are told apart, what they were trained on."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoftUpError
from .geometry import Maps
from .maps import timm_config, timm_stages
from .vit import (
    ANTIALIASED,
    IMAGENET,
    WITH_OFFSET,
    Layer,
    Layout,
    PlainViT,
    Resampling,
    Scaling,
    Source,
    part,
    pick_layers,
    plain_source,
)

__all__ = ["clip_object", "in_text_space", "open_clip_timm", "timm_vit", "transformers_vit"]

OPENAI: Scaling = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Scaling = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

TIMM = Layout(
    patch="patch_embed.proj",
    blocks="blocks",
    norm="norm",
    tokens=("cls_token", "reg_token"),
    position="pos_embed",
    patch_norm="patch_embed.norm",
    pre_norm="norm_pre",
    pooled_norm="fc_norm",
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


def timm_vit(model: Any, layer: Layer) -> Source | None:
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
        lasts=pick_layers(layer, count, name or "this VisionTransformer"),
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
            stacklevel=5,
        )


def open_clip_timm(model: Any, layer: Layer) -> Source | None:
    """A timm model inside open_clip's TimmModel, as SigLIP is kept there."""
    tower = getattr(model, "visual", model)
    trunk = getattr(tower, "trunk", None)
    if type(tower).__name__ != "TimmModel" or trunk is None:
        return None
    if (source := timm_vit(trunk, layer) or timm_stages(trunk, layer)) is None:
        return None
    # Built without timm's weights, the trunk carries the name of timm's default ones, which says nothing.
    source = replace(source, name="", scaling=open_clip_scaling(tower, source.scaling))
    if any(isinstance(module, nn.Linear) for module in tower.head.modules()):
        return replace(source, note=f"features of {type(trunk).__name__}, before the projection to the text's space")
    return source


def open_clip_scaling(tower: Any, default: Scaling) -> Scaling:
    """The mean and std that open_clip's factory notes on an image tower."""
    return getattr(tower, "image_mean", None) or default[0], getattr(tower, "image_std", None) or default[1]


def clip_object(model: Any, layer: Layer) -> Source | None:
    """An open_clip or OpenAI ``clip`` model, or its image tower; layer None is the value path."""
    tower = getattr(model, "visual", model)
    if any(part(tower, path) is None for path in (CLIP.patch, CLIP.position, CLIP.blocks, CLIP.norm)):
        return None
    blocks = list(tower.transformer.resblocks.children())
    attention = getattr(blocks[-1], "attn", None)
    if isinstance(tower, torch.jit._trace.TracedModule) or not hasattr(blocks[-1], "forward"):
        return None  # traced: its parts cannot be called
    scripted = getattr(attention, "original_name", "") == "MultiheadAttention"
    if getattr(tower, "attn_pool", None) is not None or not (scripted or isinstance(attention, nn.MultiheadAttention)):
        return None  # CoCa, and blocks of other kinds: no value path to the text's space
    official = any(type(m).__module__ == "clip.model" for m in (model, tower))
    has_projection = layer is None and getattr(tower, "proj", None) is not None
    vit = PlainViT(
        tower,
        CLIP,
        WITH_OFFSET,
        lasts=pick_layers(layer, len(blocks), "this CLIP"),
        table_tokens=1,
        value_path=layer is None,
        projection=(tower, "proj") if has_projection else None,
    )
    # open_clip's objects do not say which weights they hold; OpenAI's package only ever loads OpenAI's.
    is_b16 = official and (*vit.convolution.weight.shape[::2], len(blocks)) == (768, 16, 12)
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


def transformers_vit(model: Any, layer: Layer) -> Source | None:
    """A transformers vision model, or the vision tower of a two-tower one, by its ``config.model_type``."""
    trunk = model
    while isinstance(inner := getattr(trunk, "vision_model", None), nn.Module):
        trunk = inner
    kind = part(trunk, "config.model_type")
    if kind not in TRANSFORMERS:
        return None
    layout, resampling, scaling = TRANSFORMERS[kind]
    if part(trunk, layout.patch) is None or part(trunk, layout.norm) is None:
        return None
    if kind == "dinov3_vit" and part(trunk, layout.blocks) is None:
        layout = replace(layout, blocks="layer")  # transformers 4
    count = len(part(trunk, layout.blocks))
    maps = stage_numbers(model)
    if maps is not None:
        if not all(0 < number <= count for number in maps):
            return None  # the stem's output: as transformers gives it
        layer = [maps[index] - 1 for index in pick_layers(layer, len(maps), type(model).__name__)]
    name = str(part(model, "config._name_or_path") or "")
    # A classifier's last block is the classifier's, not CLIP's.
    clip = kind == "clip_vision_model" and part(model, "classifier") is None
    has_projection = clip and layer is None and part(model, "visual_projection") is not None
    vit = PlainViT(
        trunk,
        layout,
        resampling,
        lasts=pick_layers(layer, count, name or f"this {type(model).__name__}"),
        table_tokens=1 if layout.tokens else 0,
        value_path=clip and layer is None,
        projection=(model, "visual_projection") if has_projection else None,
        normed=part(model, "config.apply_layernorm") is not False,
    )
    return plain_source(vit, count, name, scaling, clip)


def stage_numbers(model: Any) -> list[int] | None:
    """The numbers of the blocks whose outputs a model of ``AutoBackbone`` gives, 0 for the stem; None for others."""
    names, wanted = getattr(model, "stage_names", None), getattr(model, "out_features", None)
    if names is None or wanted is None or "BackboneMixin" not in {cls.__name__ for cls in type(model).__mro__}:
        return None
    return [names.index(name) for name in wanted]


@dataclass
class Projected:
    """Maps with modules applied to each cell's vector."""

    features: Callable[[Tensor], Maps]
    modules: tuple[nn.Module, ...]

    def __call__(self, image: Tensor) -> Maps:
        maps = []
        for each in self.features(image):
            vectors = each.movedim(1, -1)
            for module in self.modules:
                vectors = module(vectors)
            maps.append(vectors.movedim(-1, 1).contiguous())
        return maps


def in_text_space(source: Source, model: Any) -> Source:
    """Project a CLIP's features to the space of its text; LoftUpError where that takes more than a projection."""
    if isinstance(source.features, PlainViT) and source.features.projection:
        return source  # the value path is there already
    tower = getattr(model, "visual", model)
    trunk = getattr(tower, "trunk", tower)
    pooled = getattr(trunk, "attn_pool", None) is not None or getattr(trunk, "global_pool", "") == "map"
    parts = [getattr(trunk, "fc_norm", None), getattr(trunk, "head", None)]
    parts += [getattr(tower, "head", None)] if tower is not trunk else []
    if isinstance(source.features, PlainViT) and isinstance(trunk.norm, nn.Identity):
        parts = parts[1:]  # its features have that norm
    kinds = (nn.Linear, nn.LayerNorm, nn.Sequential)
    modules = tuple(m for m in parts if isinstance(m, kinds) and any(True for _ in m.parameters()))
    linear = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    if pooled or not linear or source.chosen != (source.layers - 1,):
        why = "its text space is behind attention pooling" if pooled else "it has no projection, or layer= was given"
        raise LoftUpError(f"space='text' is not possible for this {type(model).__name__}: {why}")
    features = Projected(source.features, modules)
    return replace(source, features=features, channels=(linear[-1].out_features,), note="in the text's space")
