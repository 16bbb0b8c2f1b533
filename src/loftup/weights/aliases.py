"""Other packages' names of backbones."""

import importlib.util
import os

__all__ = ["TIMM_NAMES", "is_open_clip"]


def _names() -> dict[str, str]:
    names = {}
    sizes = {"s": ("small", "small"), "b": ("base", "base"), "l": ("large", "large"), "g": ("giant", "giant")}
    for letter, (size, long) in sizes.items():
        for hub, timm, huggingface in (("", "", "dinov2"), ("_reg", "_reg4", "dinov2-with-registers")):
            target = f"vit_{size}_patch14{timm}_dinov2.lvd142m"
            names[f"dinov2_vit{letter}14{hub}"] = names[f"facebook/{huggingface}-{long}"] = target
    sizes3 = {
        "vits16": "vit_small_patch16", "vits16plus": "vit_small_plus_patch16", "vitb16": "vit_base_patch16",
        "vitl16": "vit_large_patch16", "vith16plus": "vit_huge_plus_patch16", "vit7b16": "vit_7b_patch16",
    }  # fmt: skip
    for name, timm in sizes3.items():
        target = f"{timm}_dinov3.lvd1689m"
        names[f"dinov3_{name}"] = names[f"facebook/dinov3-{name}-pretrain-lvd1689m"] = target
    for size in ("tiny", "small", "base", "large"):
        target = f"convnext_{size}.dinov3_lvd1689m"
        names[f"dinov3_convnext_{size}"] = names[f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m"] = target
    for letter, size in (("s", "small"), ("b", "base")):
        for patch in (8, 16):
            target = f"vit_{size}_patch{patch}_224.dino"
            names[f"dino_vit{letter}{patch}"] = names[f"facebook/dino-vit{letter}{patch}"] = target
    return names


# torch.hub's and Hugging Face's names to timm's.
TIMM_NAMES = _names()


def is_open_clip(name: str) -> bool:
    """Tell whether a name is open_clip's, with or without the tag of its weights ("ViT-B-16/openai").

    Without importing it: its configurations are files of the models' names.
    """
    spec = importlib.util.find_spec("open_clip")
    kind = name.partition("/")[0]
    folders = (spec.submodule_search_locations if spec else None) or ()
    # os.path answers also for names that are too long.
    return bool(kind) and any(os.path.isfile(f"{folder}/model_configs/{kind}.json") for folder in folders)
