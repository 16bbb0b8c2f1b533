"""Table of the models that loftup can wrap: one of each family of timm, transformers, open_clip and others.

    python benchmarks/backbones.py [timm transformers open_clip others] [--only NAME ...] [--out FOLDER]

Every family is represented by its smallest model, with random weights, made shallow where its options allow it. The
result is a table, backbones.csv, in FOLDER, by default benchmarks/results; then its summary also goes into
docs/backbones.md. A run that was cut off goes on. For all of its rows it needs transformers, open_clip_torch,
torchvision and peft.

A model is "any size" if it takes pictures of any size, "own size" if loftup resizes them to the model's own, "refused"
if wrap says why not, and "wrong" if the features are not where the picture is, depend on the batch, have another shape
than promised, or are not those of the library's own call where it has one.
"""

import argparse
import csv
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftup import Backbone, LoftUpError, wrap
from loftup.errors import one_line

Build = Callable[[], Any]
Reference = Callable[[Any, Backbone, Tensor], Tensor | None]
SECONDS, GIB = 150, 8
RESULTS, PAGE = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "backbones.md"
COLUMNS = ("library", "family", "model", "status", "channels", "stride", "size", "difference", "seconds", "note")


# Families


def timm_cases() -> Iterator[tuple[str, str, Build, Reference | None]]:
    """A family is a module of timm.models."""
    import timm
    from timm.models import _registry

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_registry._model_to_module[name], []).append(name)
    for family, names in families.items():
        name = smallest(names)
        yield family, name, lambda name=name: shallow_timm(name), timm_reference


def smallest(names: list[str]) -> str:
    """The model with the fewest parameters among the likely ones, by its name."""
    import timm

    words = ("test", "zepto", "atto", "femto", "pico", "nano", "micro", "xxs", "xs", "tiny", "_t", "small", "_s", "0")
    likely = sorted(names, key=lambda name: next((n for n, word in enumerate(words) if word in name), 99))[:5]
    sizes = {}
    for name in likely:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except (RuntimeError, NotImplementedError):
                sizes[name] = 10**12  # cannot be built on the meta device
    return min(sizes, key=lambda name: sizes[name])


def shallow_timm(name: str) -> nn.Module:
    """A timm model of a few blocks where it can be built so, for pictures of any size where timm can."""
    import timm

    for depth in ({"depth": 2}, {}):
        for size in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
            try:
                return timm.create_model(name, **depth, **size).eval()
            except (TypeError, ValueError, AssertionError):
                continue
    raise AssertionError(name)


def timm_reference(model: Any, backbone: Backbone, image: Tensor) -> Tensor | None:
    """The last map of forward_intermediates."""
    if not hasattr(model, "forward_intermediates"):
        return None
    info = model.feature_info
    norm = len({stage["reduction"] for stage in info[-2:]}) == 1
    maps = model.forward_intermediates(image, indices=1, norm=norm, output_fmt="NCHW", intermediates_only=True)
    last: Tensor = maps[-1]
    if norm and isinstance(getattr(model, "norm", None), nn.Identity) and hasattr(backbone.features, "layout"):
        last = model.fc_norm(last.movedim(1, -1)).movedim(-1, 1)  # the final norm of a plain ViT that averages
    return last


def transformers_cases() -> Iterator[tuple[str, str, Build, Reference | None]]:
    """Every class of AutoModel, AutoBackbone and the classifiers' that takes pixel values and builds small."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_MAPPING_NAMES)
    names: list[str] = []
    for mapping in mappings:
        for value in mapping.values():
            names += [value] if isinstance(value, str) else list(value)
    for name in dict.fromkeys(names):
        cls = getattr(transformers, name, None)
        try:
            if getattr(cls, "config_class", None) is None or cls.main_input_name != "pixel_values":
                continue
        except ImportError:  # it wants a library that is not here
            continue
        kind = "backbone" if "Backbone" in name else "model"
        yield kind, name, lambda cls=cls: small_transformers(cls), transformers_reference


SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "encoder_layers": 2,
    "decoder_layers": 1, "vocab_size": 99, "num_key_value_heads": 4, "depth": 2,
}  # fmt: skip


def small_transformers(cls: Any) -> nn.Module:
    """A model of a class by a configuration that is as small as its fields allow."""
    config = cls.config_class()
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        # Numbers of stages, and the stages that a backbone gives, depend on each other.
        staged = part is None or any(hasattr(part, name) for name in ("depths", "hidden_sizes", "out_features"))
        for key, value in SMALL.items():
            if not staged and isinstance(getattr(part, key, None), int):
                setattr(part, key, value)
    try:
        return cls(config).eval()  # type: ignore[no-any-return]
    except Exception:  # fields that depend on each other
        config = cls.config_class()
        if isinstance(getattr(config, "num_hidden_layers", None), int):
            config.num_hidden_layers = 2
        return cls(config).eval()  # type: ignore[no-any-return]


def transformers_reference(model: Any, backbone: Backbone, image: Tensor) -> Tensor | None:
    """The model's own last hidden state or feature map, where it is a map already."""
    try:
        output = model(pixel_values=image)
    except Exception:  # it wants a text beside it, or pictures of its own size
        return None
    maps = getattr(output, "feature_maps", None)
    last = maps[-1] if maps else getattr(output, "last_hidden_state", None)
    kind = model.config.model_type
    # The value path and the official positions are other features on purpose.
    if last is None or hasattr(output, "encoder_last_hidden_state") or "clip" in kind or "dinov2" in kind:
        return None
    if last.ndim == 4 and last.shape[1] != backbone.channels:
        last = last.movedim(-1, 1)
    if last.ndim == 3 and last.shape[2] == backbone.channels and not maps:
        h, w = (side // backbone.patch_size for side in image.shape[2:])
        others = last.shape[1] - h * w
        if others < 0:
            return None
        last = last[:, -h * w :] if others < 17 else last[:, 1 : 1 + h * w]
        last = last.mT.unflatten(2, (h, w))
    return last if last.ndim == 4 else None


def open_clip_cases() -> Iterator[tuple[str, str, Build, Reference | None]]:
    """One model of each kind of image tower."""
    import open_clip

    kinds: dict[str, str] = {}
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        trunk = str(vision.get("timm_model_name", "")).split("_")[0]
        kind = trunk or ("ModifiedResNet" if isinstance(vision.get("layers"), list) else "")
        kind = kind or (
            "coca" if "coca" in name else "pooled" if vision.get("attentional_pool") else "VisionTransformer"
        )
        sizes = {"B": 0, "S": -2, "M": -1, "T": -3}
        best = kinds.get(kind)
        if best is None or (sizes.get(name.split("-")[1][:1] if "-" in name else "", 5), len(name)) < (
            sizes.get(best.split("-")[1][:1] if "-" in best else "", 5),
            len(best),
        ):
            kinds[kind] = name
    for kind, name in sorted(kinds.items()):
        yield kind, name, lambda name=name: open_clip_tower(name), None


def open_clip_tower(name: str) -> nn.Module:
    """The image tower of an open_clip model, of two blocks where its configuration says how many."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision = dict(config["vision_cfg"])
    if isinstance(vision.get("layers"), int):
        vision["layers"] = 2
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    vision.pop("hf_model_name", None)
    tower = open_clip.model._build_vision_tower(
        config["embed_dim"], open_clip.CLIPVisionCfg(**vision), config.get("quick_gelu", False)
    )
    return tower.eval()  # type: ignore[no-any-return]


def other_cases() -> Iterator[tuple[str, str, Build, Reference | None]]:
    """torchvision, modules that hold a model, wrappers, and modules of one's own."""
    import timm
    import torchvision

    names = (
        "resnet18", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_32", "maxvit_t", "efficientnet_b0", "densenet121",
        "mobilenet_v3_small", "vgg11", "googlenet", "inception_v3", "squeezenet1_0", "regnet_y_400mf",
        "shufflenet_v2_x0_5", "alexnet", "mnasnet0_5",
    )  # fmt: skip
    for name in names:
        yield "torchvision", name, lambda name=name: getattr(torchvision.models, name)(weights=None).eval(), None

    def inner() -> nn.Module:
        return timm.create_model("resnet10t").eval()

    def of_inner(model: Any, backbone: Backbone, image: Tensor) -> Tensor:
        return wrap(backbone.model, check=False)(image)  # type: ignore[no-any-return]

    yield "wrapper", "DataParallel", lambda: nn.DataParallel(inner()), of_inner
    yield "wrapper", "torch.compile", lambda: torch.compile(inner()), of_inner
    yield "wrapper", "AveragedModel", lambda: torch.optim.swa_utils.AveragedModel(inner()), of_inner
    yield "wrapper", "ModelEmaV3", lambda: __import__("timm.utils").utils.ModelEmaV3(inner()), of_inner
    yield "wrapper", "PEFT", lora, of_inner
    yield (
        "own",
        "nn.Sequential",
        lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 2, 2)),
        None,
    )
    yield "own", "holds a timm ViT", lambda: Holder(timm.create_model("vit_tiny_patch16_224", depth=2)), None
    yield "own", "SAM's encoder (transformers)", sam, None


def lora() -> nn.Module:
    """A ViT with LoRA layers inside."""
    import timm
    from peft import LoraConfig, get_peft_model

    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    return get_peft_model(model, LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()


def sam() -> nn.Module:
    """SAM's image encoder, of two blocks, at its own size of 1024 pixels."""
    from transformers import SamVisionConfig, SamVisionModel

    # By default weights are drawn so small that nothing comes through.
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_dim": 128,
        "initializer_range": 0.02,
    }
    return SamVisionModel(SamVisionConfig(**sizes, global_attn_indexes=[1])).eval()


class Holder(nn.Module):
    """A classifier that keeps a timm model under a name of its own and returns logits."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.classifier = net, nn.Linear(net.num_features, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.net.forward_features(image)[:, 0])


CASES = {
    "timm": timm_cases,
    "transformers": transformers_cases,
    "open_clip": open_clip_cases,
    "others": other_cases,
}


# Judgement


def judge(build: Build, reference: Reference | None) -> dict[str, Any]:
    """Build a model, wrap it, and look at what comes out."""
    torch.manual_seed(0)
    try:
        model = build()
    except Exception as error:  # libraries fail in their own ways
        return {"status": "not built", "note": f"{type(error).__name__}: {one_line(error)[:160]}"}
    enliven(model)
    try:
        backbone = wrap(model)
    except LoftUpError as error:
        return {"status": "refused", "note": one_line(error)[:300]}
    size = backbone.fixed_size or tuple((7 + 2 * axis) * backbone.multiple for axis in (0, 1))
    row = {
        "status": "own size" if backbone.fixed_size else "any size",
        "channels": backbone.channels,
        "stride": backbone.patch_size,
        "size": "x".join(map(str, size)) if backbone.fixed_size else f"multiples of {backbone.multiple}",
        "note": "; ".join(note for note in backbone.notes if not note.startswith(("checked", "takes")))[:200],
    }
    with torch.no_grad():
        if wrong := faults(backbone, size):
            return {**row, "status": "wrong", "note": wrong}
        if reference is not None:
            image = torch.randn(1, 3, *size)
            other = reference(model, backbone, image)
            if other is not None and other.shape == (ours := backbone(image)).shape:
                row["difference"] = f"{float((ours - other).abs().max() / other.std()):.2g}"
                if float(row["difference"]) > 1e-4:
                    return {**row, "status": "wrong", "note": "other features than the library's own"}
    return row


def enliven(model: nn.Module) -> None:
    """Give values to parameters that start at zero or one, so that positions, biases and branches count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            if not parameter.is_floating_point() or not flat.numel():
                continue
            if not flat.isfinite().all() or flat.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif parameter.ndim == 1 and (flat == 1).all():
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def faults(backbone: Backbone, size: tuple[int, int]) -> str:
    """Tell what is wrong with the features; "" if nothing is."""
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randn(2, 3, *size, generator=generator) * 0.5
    features = backbone(pictures)
    if not features.isfinite().all() or features.std() == 0:
        return "not finite, or constant"
    alone = backbone(pictures[1:])
    if (alone - features[1:]).abs().max() > 0.01 * features.std():
        return "one picture's features depend on another's"
    h, w = features.shape[2:]
    telling = not any(
        note.startswith("not checked") for note in backbone.notes
    )  # random weights may let nothing through
    for row, column in ((1, w - 2), (h - 2, 1)) if telling else ():
        other = pictures[:1].clone()
        top, left = row * size[0] // h, column * size[1] // w
        part = other[..., top : top + size[0] // h, left : left + size[1] // w]
        part.copy_(torch.randn(part.shape, generator=generator) * 2)
        change = (backbone(other) - features[:1]).norm(dim=1)[0]
        place = divmod(int(change.argmax()), w)
        if max(abs(place[0] - row), abs(place[1] - column)) > 2 and change.max() > 1.5 * change.median():
            return f"a change in cell {(row, column)} of {h}x{w} showed in {place}"
    if backbone.fixed_size is None:
        odd = (size[0] + backbone.multiple // 3, size[1] - backbone.multiple // 3)
        if backbone(torch.randn(1, 3, *odd)).shape != (1, backbone.channels, h, w):
            return f"an image of {odd[0]}x{odd[1]} does not have the grid of {size[0]}x{size[1]}"
    return ""


def apart(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a job in a process of its own, with limits of time and memory."""
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_DATA, (GIB << 30, GIB << 30))
        signal.alarm(SECONDS)
        warnings.simplefilter("ignore")
        try:
            row = job()
        except BaseException as error:  # nothing may escape from the child
            row = {"status": "wrong", "note": f"{type(error).__name__}: {one_line(error)[:200]}"}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    row = json.loads(answer) if answer else {"status": "not built", "note": f"took over {SECONDS} s or {GIB} GiB"}
    return {**row, "seconds": f"{time.monotonic() - start:.1f}"}


# Tables


def summary(rows: list[dict[str, str]]) -> str:
    """Counts by library, and everything that is not usable."""
    lines = ["| library | models | any size | own size | refused | wrong | usable |", "|---|---|---|---|---|---|---|"]
    for library in CASES:
        own = [row for row in rows if row["library"] == library and row["status"] != "not built"]
        if own:
            count = {s: sum(row["status"] == s for row in own) for s in ("any size", "own size", "refused", "wrong")}
            usable = 100 * (count["any size"] + count["own size"]) / len(own)
            lines.append(f"| {library} | {len(own)} | " + " | ".join(map(str, count.values())) + f" | {usable:.0f} % |")
    lines += ["", "| library | family | model | status | size | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["status"] not in ("any size", "not built"):
            note = row["note"].replace("|", "/")
            cells = (row["library"], row["family"], row["model"], row["status"], row["size"], note)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the families asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("libraries", nargs="*", default=list(CASES), help="timm, transformers, open_clip, others")
    parser.add_argument("--only", nargs="*", help="families or models to run again, whatever is in the table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if unknown := set(given.libraries) - set(CASES):
        parser.error(f"unknown libraries: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    table = given.out / "backbones.csv"
    rows = list(csv.DictReader(table.open(newline=""))) if table.exists() else []
    for library in given.libraries:
        for family, name, build, reference in CASES[library]():
            known = [r for r in rows if (r["library"], r["model"], r["family"]) == (library, name, family)]
            if given.only is not None and not {family, name} & set(given.only):
                continue
            if known and given.only is None:
                continue
            row = apart(lambda build=build, reference=reference: judge(build, reference))
            row |= {"library": library, "family": family, "model": name}
            rows = [r for r in rows if r not in known] + [{key: str(row.get(key, "")) for key in COLUMNS}]
            print(
                f"{library} {family} {name}: {row['status']} {row.get('size', '')} {row.get('note', '')}"[:300],
                flush=True,
            )
            with table.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    if given.out == RESULTS:
        text, mark, _ = PAGE.read_text("utf-8").partition("<!-- made by benchmarks/backbones.py -->\n")
        PAGE.write_text(f"{text}{mark}\n{summary(rows)}", "utf-8")
    print(summary(rows))
    sys.exit(any(row["status"] == "wrong" for row in rows))


if __name__ == "__main__":
    main()
