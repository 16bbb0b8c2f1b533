"""Feature maps of models of no known family: the last tensor inside that keeps the picture's order.

The model runs once while every module's output is noted, and once more on pictures in which cells were changed. The
last output whose cells change with them is taken, with its order as it was seen: maps with channels first or last, or
tokens with others before and behind them.
"""

import inspect
import math
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import LoftUpError, one_line
from .geometry import SMALLEST, SQUARES, Maps, changes, in_place, of_one_size, parts, pictures, spots, strongest
from .maps import match_weights, stated_size, timm_config
from .vit import IMAGENET, Layer, Scaling, Source, pair, pick_layers

__all__ = ["generic"]

Call = Callable[[Tensor], Any]
# Attributes under which models keep their image towers, and wrappers their models.
TOWERS = (
    *("vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder", "vision_backbone", "image_model"),
    *("vision", "vision_embed_tokens", "image_tower", "embed_vision", "backbone", "encoder", "trunk", "model"),
    "base_model",
)
FINE = "as fine as the picture, layer= takes a coarser map"
FIRST = (224, 448)  # a size that strides of 4, 7, 8, 14, 16, 28 and 32 divide
MOST_TRIES = 16  # outputs tried, from the last
MOST_SIZES = 2  # at which a model runs, and shows nothing
MOST_STRIDES = 3  # strides tried
MOST_OTHERS = 128  # tokens beside the patches': class, registers, detection


class _Enough(BaseException):
    """Ends a forward whose wanted outputs are there; no model's own ``except`` should catch it."""


@dataclass(frozen=True)
class Order:
    """How a tensor holds a map: a layout, the stride in pixels, and tokens in front of the cells'."""

    kind: str  # "nchw", "nhwc", or the places of batch, tokens and channels: "bnc", "nbc", "bcn"
    stride: int
    prefix: int = 0
    others: int = 0  # tokens beside the cells', in front and behind
    stated: bool = False  # the stride is the patch size that the model states
    unsure: bool = False  # it was taken by its shape, as nothing could be told

    def read(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (B, C, h, w) of pictures of a size."""
        if self.kind == "nchw":
            return x
        if self.kind == "nhwc":
            return x.permute(0, 3, 1, 2)
        h, w = size[0] // self.stride, size[1] // self.stride
        x = rearrange(x, f"{' '.join(self.kind)} -> b n c")
        if x.shape[1] != h * w + self.others:
            raise LoftUpError(f"{x.shape[1]} tokens came for a picture of {size[0]}x{size[1]}, expected {h * w}")
        return rearrange(x[:, self.prefix : self.prefix + h * w], "b (h w) c -> b c h w", h=h, w=w).contiguous()

    def seen(self, x: Tensor, size: tuple[int, int]) -> "Order | None":
        """This order with the number of tokens in front as they show in the output for :func:`pictures`, or None."""
        h, w = size[0] // self.stride, size[1] // self.stride
        if x.shape[self.kind.index("n" if len(self.kind) == 4 else "b")] != 1 + len(spots(h, w)):
            return None  # windows of a picture, not pictures
        if self.kind in ("nchw", "nhwc"):
            # Where nothing can be told, as weights are zero or fields of view are wide, the shape tells channels first.
            found = in_place(changes(self.read(x, size)), (h, w), exact=False)
            told = self.kind == "nchw" and (h != w or x.shape[1] not in (h, w))
            if found is None and told:
                return replace(self, unsure=True)
            return self if found else None
        change = changes(rearrange(x, f"{' '.join(self.kind)} -> b c 1 n"))
        if change is None:
            # Weights drawn too small to show anything: a class token stands in front, by convention.
            usual = self.stated and self.kind == "bnc" and self.others <= 1 and (x.is_meta or bool(x.isfinite().all()))
            return replace(self, prefix=self.others, unsure=True) if usual else None
        ahead = [
            token - (row * w + column) for (_, token), (row, column) in zip(strongest(change), spots(h, w), strict=True)
        ]
        prefix = statistics.mode(ahead) if self.others else 0
        if not 0 <= prefix <= self.others:
            return None
        fits = in_place(change[:, :, prefix : prefix + h * w].view(-1, h, w), (h, w), exact=True)
        return replace(self, prefix=prefix) if fits else None


@dataclass(frozen=True)
class Place:
    """An output inside a model: a module, which of its calls, and the path into what it returned."""

    module: str
    call: int
    path: tuple[Any, ...]


@dataclass
class Hooked:
    """Maps taken from inside a model while it runs."""

    model: Any
    call: Call
    places: tuple[Place, ...]
    orders: tuple[Order, ...]

    def __call__(self, image: Tensor) -> Maps:
        # A picture of its own: some models change theirs in place.
        outputs = watch(self.model, self.call, match_weights(image.clone(), self.model), self.places)
        size = (image.shape[2], image.shape[3])
        missing = [place.module for place in self.places if place not in outputs]
        if missing:
            raise LoftUpError(f"{type(self.model).__name__} did not call {missing[0] or 'itself'} this time")
        return [order.read(outputs[place], size) for place, order in zip(self.places, self.orders, strict=True)]


def generic(model: Any, layer: Layer) -> Source:
    """Any module that makes a grid of features inside; ``layer`` names modules, or numbers the longest list of blocks.

    LoftUpError: there is none, with what was seen.
    """
    failures: dict[str, str] = {}  # of each module that was tried, the first
    for owner, call in callers(model):
        modules = chosen_modules(owner, layer, inside(model, owner)) if layer is not None else ()
        if modules is None:
            continue
        ran = 0
        for size, fixed in sizes(owner, model):
            device = next((p.device for p in owner.parameters()), torch.device("cpu"))
            try:
                outputs = watch(owner, call, match_weights(pictures(size, (4, 4), device)[:1], owner), None)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # each model has its own
                reason = f"{type(error).__name__}: {one_line(error)[:120]}"
                failures.setdefault(type(owner).__name__, f"at {size[0]}x{size[1]}: {reason}")
                if isinstance(error, TypeError) and "required positional" in str(error):
                    break  # it wants more than an image, whatever its size
                continue
            found = locate(owner, call, size, outputs, modules, patch_of(owner, model))
            if found:
                places, orders, maps = found
                features = Hooked(owner, call, places, orders)
                return described(model, owner, features, maps, size, fixed)
            several = sum(not modules or place.module in modules for place in outputs)
            asked = "" if layer is None else f" of layer {layer!r}"
            reason = f"at {size[0]}x{size[1]} none of {several} tensors{asked} keeps the picture's order"
            failures[type(owner).__name__] = reason
            if (ran := ran + 1) == MOST_SIZES:
                break
    if layer is not None and not failures:
        names = [name for name, _ in model.named_modules() if name]
        shown = ", ".join(names[:: max(1, len(names) // 12)])
        raise LoftUpError(f"no layer {layer!r} in this {type(model).__name__}; it has modules such as {shown}")
    seen = [f"{name} {reason}" for name, reason in failures.items()]
    raise LoftUpError("; ".join(seen[:3]) or "it takes no image")


def described(model: Any, owner: Any, features: Hooked, maps: Maps, size: tuple[int, int], fixed: bool) -> Source:
    """Turn what was found into a source."""
    name, scaling = stated(model)
    channels = tuple(each.shape[1] for each in maps)
    strides = tuple(order.stride for order in features.orders)
    where = ", ".join(
        f"{type(owner).__name__}{'.' if place.module else ''}{place.module}"
        f"{''.join(f'[{key!r}]' for key in place.path)} as {order.kind}"
        + (f", {order.prefix} tokens in front" if order.prefix else "")
        for place, order in zip(features.places, features.orders, strict=True)
    )
    unsure = any(order.unsure for order in features.orders)
    found = (
        "not checked: a change of one cell shows nowhere"
        if unsure
        else "checked: features change where the picture does"
    )
    # A model that runs no further than these places may take other sizes, whatever its head does.
    alone = fixed and any(not place.module for place in features.places)
    return Source(
        features,
        channels,
        strides,
        len(maps),
        tuple(range(len(maps))),
        name,
        scaling,
        standard=False,
        native=size if fixed else stated_size(owner),
        fixed=alone,
        exact=all(order.others for order in features.orders),
        note=f"found by looking: {where}" + (f"; {FINE}" if 1 in strides else ""),
        # Found at the only size: that was the check.
        measured=of_one_size(maps, size, (found,)) if alone else None,
    )


def stated(model: Any) -> tuple[str, Scaling]:
    """The name that a model states, and the scaling of its images."""
    if getattr(model, "pretrained_cfg", None):
        return timm_config(model)[:2]
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""), IMAGENET


def patch_of(*models: Any) -> int | None:
    """The patch size that a model states, in pixels."""
    for model in models:
        config = getattr(model, "config", None)
        for owner in (config, getattr(config, "vision_config", None), getattr(model, "patch_embed", None), model):
            size = getattr(owner, "patch_size", None)
            size = size[0] if isinstance(size, list | tuple) and size else size
            if isinstance(size, int) and size > 1:
                return size
    return None


def sizes(*models: Any) -> list[tuple[tuple[int, int], bool]]:
    """The (H, W) to try, and whether it would be the model's only one."""
    patch = patch_of(*models)
    free = FIRST if patch is None or FIRST[0] % patch == 0 else (12 * patch, 24 * patch)
    stated_ = [size for model in models if (size := stated_size(model))]
    inside = (module.img_size for model in models for module in model.modules() if getattr(module, "img_size", None))
    stated_ += [pair(size) for size in inside]
    only = list(dict.fromkeys([*stated_, *((side, side) for side in SQUARES)]))
    return [(free, False), *((size, True) for size in only)]


def callers(model: Any) -> Iterator[tuple[Any, Call]]:
    """Ways to run a model, and then its image towers, on an image."""
    todo, seen = [model], set()
    while todo:
        owner = todo.pop(0)
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        yield from ((owner, call) for call in _calls(owner))
        todo += [part for name in TOWERS if isinstance(part := getattr(owner, name, None), nn.Module)]


def inside(model: nn.Module, owner: nn.Module) -> str:
    """The name of a module in the model, "" for the model itself."""
    return next((name for name, module in model.named_modules() if module is owner), "")


def _calls(model: Any) -> Iterator[Call]:
    """Ways to run a model on an image, none of them local functions: they are copied and pickled with the backbone."""
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        yield model.forward_features  # as timm has it, before pooling
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
    if "noise" in parameters and hasattr(getattr(model, "config", None), "mask_ratio"):
        yield partial(masked, model, more)
    if "pixel_values_videos" in parameters:
        skip = {"skip_predictor": True} if "skip_predictor" in parameters else {}
        yield partial(video, model, skip)
    if "grid_thw" in parameters:
        yield partial(grid_of_patches, model)
    elif {"pixel_values", "spatial_shapes"} <= set(parameters):
        mask = next(name for name in ("pixel_attention_mask", "attention_mask") if name in parameters)
        yield partial(naflex, model, mask)
    elif "pixel_values" in parameters:
        yield partial(pixel_values, model, more)
        if more:
            yield partial(pixel_values, model, {})
    else:
        yield model


def pixel_values(model: Any, more: dict[str, Any], image: Tensor) -> Any:
    """Models of transformers, which may take other arguments first."""
    return model(pixel_values=image, **more)


def masked(model: Any, more: dict[str, Any], image: Tensor) -> Any:
    """Masked autoencoders: no patch is left out, and noise keeps them in their order."""
    config, patch = model.config, model.config.patch_size
    count = (image.shape[2] // patch) * (image.shape[3] // patch)
    noise = torch.arange(count, device=image.device, dtype=image.dtype).expand(len(image), -1)
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        return model(image, noise=noise, **more)
    finally:
        config.mask_ratio = ratio


def video(model: Any, skip: dict[str, Any], image: Tensor) -> Any:
    """Models of videos, with as many times the same picture as make one step in time."""
    frames = int(getattr(model.config, "tubelet_size", 1))
    return model(pixel_values_videos=image[:, None].repeat(1, frames, 1, 1, 1), **skip)


def naflex(model: Any, mask_name: str, image: Tensor) -> Any:
    """SigLIP 2 of any shape: pixels of patches in reading order, channels innermost, and the grid beside them."""
    patch = model.config.patch_size if hasattr(model.config, "patch_size") else model.config.vision_config.patch_size
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
    shapes = torch.tensor([[image.shape[2] // patch, image.shape[3] // patch]] * len(image), device=image.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=image.device)
    return model(pixel_values=patches, spatial_shapes=shapes, **{mask_name: mask})


def grid_of_patches(model: Any, image: Tensor) -> Any:
    """Qwen's image towers: patches, neighbours that will be merged one after the other, and the grid beside them."""
    config, count = model.config, len(image)
    patch, times = config.patch_size, int(getattr(config, "temporal_patch_size", 1))
    merge = int(getattr(config, "spatial_merge_size", 1))
    patches = rearrange(
        image[:, None].expand(-1, times, -1, -1, -1),
        "b t c (h m p) (w n q) -> (b h w m n) (c t p q)",
        m=merge, n=merge, p=patch, q=patch,
    )  # fmt: skip
    grid = torch.tensor([[1, image.shape[2] // patch, image.shape[3] // patch]] * count, device=image.device)
    output = model(patches, grid_thw=grid)
    outputs = dict(tensors(output))
    # Pictures lie one behind the other.
    return {
        str(path): x.view(count, -1, x.shape[-1]) for path, x in outputs.items() if x.ndim == 2 and not len(x) % count
    }


def tensors(output: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors of what a module returned, each with its path."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors(value, (*path, key))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from tensors(value, (*path, index))
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors(getattr(output, field.name), (*path, field.name))


def watch(model: nn.Module, call: Call, image: Tensor, wanted: tuple[Place, ...] | None) -> dict[Place, Any]:
    """Run a model; its outputs, or the wanted ones, in the order in which they came.

    Where none is named, only the shapes are kept; where all are inside the model, it runs no further than these.
    """
    outputs: dict[Place, Any] = {}
    counts: dict[str, int] = {}
    names = {place.module for place in wanted} if wanted is not None else None
    stop = names is not None and "" not in names
    thread = threading.get_ident()

    def note(name: str, output: Any) -> None:
        if threading.get_ident() != thread:
            return  # the same model, running for another picture
        number = counts[name] = counts.get(name, -1) + 1
        for path, x in tensors(output):
            place = Place(name, number, path)
            if wanted is not None:
                if place in wanted:
                    last = stop and len({*outputs, place}) == len(set(wanted))
                    # What runs on may change it in place, as ReLUs do.
                    outputs[place] = x if last or not name else x.clone()
                    if last:
                        raise _Enough
            elif x.is_floating_point() and x.ndim in (3, 4):
                outputs[place] = tuple(x.shape)

    # The model's own result is noted from what the call returns.
    hooked = [
        (name, module)
        for name, module in model.named_modules()
        # torch.jit calls none of them, or refuses them.
        if name and (names is None or name in names) and not isinstance(module, torch.jit.ScriptModule)
    ]
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output)) for name, module in hooked
    ]
    try:
        note("", call(image))
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def chosen_modules(owner: nn.Module, layer: Layer, where: str = "") -> tuple[str, ...] | None:
    """The names of the modules that ``layer`` asks for; None if this module, which lies at ``where``, has them not."""
    layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
    names = dict(owner.named_modules())
    if all(isinstance(each, str) for each in layers):
        wanted = [str(each) if each in names else str(each).removeprefix(f"{where}.") for each in layers]
        return tuple(wanted) if all(each in names for each in wanted) else None
    if any(isinstance(each, str) for each in layers):
        raise TypeError(f"layer takes a list of names or one of numbers, got both: {layers}; give the names of all")
    lists = [(len(m), name) for name, m in names.items() if isinstance(m, nn.ModuleList | nn.Sequential) and name]
    blocks = max(lists, default=None, key=lambda each: each[0])
    if blocks is None or blocks[0] < 2:
        return None
    return tuple(f"{blocks[1]}.{index}" for index in pick_layers(layer, blocks[0], type(owner).__name__))


def locate(
    model: Any,
    call: Call,
    size: tuple[int, int],
    shapes: dict[Place, tuple[int, ...]],
    modules: tuple[str, ...],
    patch: int | None,
) -> tuple[tuple[Place, ...], tuple[Order, ...], Maps] | None:
    """The last outputs that keep the picture's order, of the modules asked for or else of all.

    Args:
        model: what is run.
        call: how.
        size: (H, W) of pictures that it takes.
        shapes: of its outputs for one picture, in the order in which they came.
        modules: those asked for; none for the last of all.
        patch: the patch size that it states.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    last = [*(p for p in shapes if not p.module and "last_hidden_state" not in p.path)]
    last = [*(p for p in shapes if p.module), *last, *(p for p in shapes if not p.module and p not in last)]
    readings: dict[Place, list[Order]] = {}
    for place in reversed(last):
        if (modules and place.module not in modules) or len(readings) == MOST_TRIES:
            continue
        if orders := plausible(shapes[place], size, patch):
            readings[place] = orders
    found: dict[str, tuple[Place, Order, Tensor]] = {}
    strides = list(dict.fromkeys(order.stride for orders in readings.values() for order in orders))
    strides.sort(key=lambda stride: stride == 1)  # maps as fine as the picture, logits above all, come last
    for stride in strides[:MOST_STRIDES]:
        grid = (size[0] // stride, size[1] // stride)
        runs = [
            watch(model, call, match_weights(part, model), tuple(readings))
            for part in parts(pictures(size, grid, device))
        ]
        outputs = {
            place: torch.cat([run[place] for run in runs], 1 if orders[0].kind == "nbc" else 0)
            for place, orders in readings.items()
            if all(place in run for run in runs)
        }
        for place, orders in readings.items():
            for order in orders:
                if place.module in found or place not in outputs or order.stride != stride:
                    continue
                if (seen := order.seen(outputs[place], size)) is not None:
                    found[place.module] = (place, seen, seen.read(outputs[place], size))
        if found and len(found) >= len(modules):
            break
    chosen = [found[name] for name in modules if name in found] if modules else list(found.values())[:1]
    if len(chosen) < max(1, len(modules)):
        return None
    return tuple(c[0] for c in chosen), tuple(c[1] for c in chosen), [c[2] for c in chosen]


def plausible(shape: tuple[int, ...], size: tuple[int, int], patch: int | None) -> list[Order]:
    """The ways in which an output for one picture may hold a map, the likeliest first."""
    if len(shape) == 4 and shape[0] == 1:
        grids = {"nchw": (shape[2], shape[3]), "nhwc": (shape[1], shape[2])}
        # Networks without padding have fewer cells than their stride makes. Maps of one channel are predictions.
        return [
            Order(kind, stride)
            for kind, (h, w) in grids.items()
            for stride in range(1, size[0] // SMALLEST + 1)
            if min(h, w) >= SMALLEST and not size[0] % stride and not size[1] % stride and math.prod(shape) > h * w
            if size[0] // stride - h == size[1] // stride - w
            and (size[0] // stride == h or (stride in (8, 16, 32) and 0 < size[0] // stride - h < 4))
        ]
    orders = []
    strides = [s for s in range(2, size[0] // SMALLEST + 1) if not size[0] % s and not size[1] % s]
    for kind, batch, tokens in (("bnc", 0, 1), ("nbc", 1, 0), ("bcn", 0, 2)):
        for stride in strides:
            others = shape[tokens] - (size[0] // stride) * (size[1] // stride) if len(shape) == 3 else -1
            # Channels that happen to be as many as cells and some more are no tokens.
            if shape[batch] == 1 and 0 <= others <= (0 if kind == "bcn" else MOST_OTHERS):
                orders.append(Order(kind, stride, 0, others, stride == patch))
    return sorted(orders, key=lambda order: (bool(patch and order.stride % patch), order.others))
