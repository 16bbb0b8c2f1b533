"""Plain vision transformers of every packaging as one structure: embed, blocks, norm, drop the prefix tokens.

timm, open_clip, OpenAI's clip and transformers hold the same network under different attribute names. A
:class:`Layout` says where the parts are; :class:`PlainViT` runs them. Parts are looked up at each call, never copied,
so that the user's model stays as it is and adapters put into it later take effect.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import LoftUpError
from ..weights.catalogue import IMAGENET_MEAN, IMAGENET_STD
from .geometry import Geometry, Maps

__all__ = [
    "ANTIALIASED",
    "IMAGENET",
    "WITH_OFFSET",
    "Layer",
    "Layout",
    "PlainViT",
    "Scaling",
    "Source",
    "Triple",
    "part",
    "pick_layers",
    "plain_source",
]

Layer = int | str | Sequence[int | str] | None
Triple = tuple[float, float, float]
Scaling = tuple[Triple, Triple]  # mean and std of images in [0, 1]
IMAGENET: Scaling = (IMAGENET_MEAN, IMAGENET_STD)


@dataclass
class Source:
    """The features of a model that a family recognised."""

    # Image (B, 3, H, W) to features (B, C, h, w), one map for each chosen layer.
    features: Callable[[Tensor], Maps]
    channels: tuple[int, ...]  # C of each map, as declared
    strides: tuple[int, ...]  # of each map's grid in pixels, as declared
    layers: int  # how many layers there are to choose from
    chosen: tuple[int, ...]  # indices of the chosen ones
    name: str = ""  # the model's name where it can be known
    scaling: Scaling = IMAGENET  # mean and std of the images that the model was trained on
    standard: bool = True  # these are the features that upsamplers published for name were trained on
    native: tuple[int, int] | None = None  # (H, W) that the model was built for
    fixed: bool = False  # it is known to take no other
    exact: bool = False  # each cell is a token of its own
    note: str = ""  # a sentence on what the features are
    measured: Geometry | None = None  # where it is known already


@dataclass(frozen=True)
class Layout:
    """Dotted attribute paths of the parts of a plain ViT; "" where the family has no such part."""

    patch: str  # the patch convolution
    blocks: str  # the transformer blocks
    norm: str  # the final norm
    # Prefix tokens (class, registers) in the order in which they are prepended; a None one is skipped.
    tokens: tuple[str, ...] = ()
    position: str = ""  # position table, (1, n, D) or (n, D)
    patch_norm: str = ""  # norm of the patch tokens before positions are added
    pre_norm: str = ""  # norm of all tokens before the first block
    rope: str = ""  # module that makes rotary position embeddings for an image, handed to every block
    block_norm: str = "norm1"  # first norm inside a block
    attention: str = "attn"  # attention inside a block
    pooled_norm: str = ""  # the final norm of models that average their tokens, which have no other


@dataclass(frozen=True)
class Resampling:
    """How a family fits its position table to another grid: bicubic, antialiased or not, by size or by scale."""

    antialias: bool
    offset: float


# DINOv2's hub code for the models without registers, and MaskCLIP's: the offset goes into the scale factor.
WITH_OFFSET = Resampling(antialias=False, offset=0.1)
# timm for all models, and DINOv2's hub code for the models with registers.
ANTIALIASED = Resampling(antialias=True, offset=0.0)


def part(model: Any, path: str) -> Any:
    """The attribute at a dotted path; None where the path is empty or leads nowhere."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def pick_layers(layer: Layer, count: int, name: str) -> tuple[int, ...]:
    """Resolve ``layer`` (None: the last, negative: from the end) among ``count``; TypeError or LoftUpError if none."""
    if layer is None:
        return (count - 1,)
    layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
    for each in layers:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"layer must be an integer, or a list of them, got {each!r}")
        if not -count <= each < count:
            raise LoftUpError(f"layer {each} is out of range: {name} has {count} layers, so {-count} to {count - 1}")
    if not layers:
        raise LoftUpError("layer is an empty list; give at least one index, or None for the last layer")
    return tuple(each % count for each in layers)


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], how: Resampling) -> Tensor:
    """Resample position embeddings (1, M * N, D) from a grid ``old`` (M, N), in reading order, to ``new`` (h, w).

    The result is (1, h * w, D) in the dtype of ``table``, by way of float32 at least; the table where the grids agree.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    if torch.compiler.is_compiling():
        # As matrix products: the same numbers, for any size of a graph, which interpolation's ONNX form is not.
        last_row, last_column = (torch.arange(n, device=wide.device).amax(0) for n in new)
        taken = (last_row == old[0] - 1) & (last_column == old[1] - 1)
        rows, columns = (cubic_weights(m, n, how, wide, taken) for m, n in zip(old, new, strict=True))
        grid = torch.einsum("hm,wn,mnd->hwd", rows, columns, wide[0].unflatten(0, old))
        return grid.flatten(0, 1)[None].to(table.dtype)
    if old == new:  # not asked above: a graph would be for this grid alone
        return table
    cells = rearrange(wide, "1 (m n) d -> 1 d m n", m=old[0])
    # The scale factor itself enters the sampling positions, so that an offset is not the same as giving the size.
    scale = ((new[0] + how.offset) / old[0], (new[1] + how.offset) / old[1])
    target: dict[str, Any] = {"scale_factor": scale} if how.offset else {"size": new}
    cells = F.interpolate(cells, **target, mode="bicubic", antialias=how.antialias)
    assert cells.shape[-2:] == new, (cells.shape, new)
    return rearrange(cells, "1 d h w -> 1 (h w) d").to(table.dtype)


def cubic_weights(old: int, new: int, how: Resampling, like: Tensor, taken: Tensor | None = None) -> Tensor:
    """Weights of ``old`` values for each of ``new`` in bicubic interpolation of an axis: (new, old), rows sum to 1.

    Where the tensor ``taken`` is true, the values are taken as they are, as models do with a table of the grid's size.
    """
    if taken is not None:
        same = torch.arange(new, device=like.device)[:, None] == torch.arange(old, device=like.device)
        return torch.where(taken, same.to(like.dtype), cubic_weights(old, new, how, like))
    scale = old / (new + how.offset)
    centre = (torch.arange(new, device=like.device, dtype=like.dtype)[:, None] + 0.5) * scale - 0.5
    if how.antialias:
        # Keys' kernel with a = -0.5, widened where the axis shrinks, over the values that exist.
        place = torch.arange(old, device=like.device, dtype=like.dtype)
        widened: Any = torch.sym_max(scale, 1.0)
        weights = _cubic((place - centre) / widened, -0.5)
        return weights / weights.sum(1, keepdim=True)
    # a = -0.75, four values, those beyond an end taken from the end.
    first = centre.floor() - 1
    taps = torch.arange(4, device=like.device, dtype=like.dtype)
    weights = _cubic(first + taps - centre, -0.75)
    place = (first + taps).clamp(0, old - 1)
    return (weights[..., None] * (place[..., None] == torch.arange(old, device=like.device))).sum(1)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (1981) of a distance in samples."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def table_grid(model: Any, count: int) -> tuple[int, int]:
    """The (rows, columns) of a position table with ``count`` entries: as the model says, else a square."""
    grids = [part(model, "patch_embed.grid_size"), part(model, "grid_size")]
    if (config := getattr(model, "config", None)) is not None and hasattr(config, "image_size"):
        sizes = (pair(config.image_size), pair(config.patch_size))
        grids.append(tuple(side // patch for side, patch in zip(*sizes, strict=True)))
    side = math.isqrt(count)
    for rows, columns in [*(grid for grid in grids if grid), (side, side)]:
        if rows * columns == count:
            return int(rows), int(columns)
    kind = type(model).__name__
    raise LoftUpError(f"the position table of this {kind} has {count} entries, which form no known grid")


def pair(value: Any) -> tuple[int, int]:
    """An int as a square pair; a pair as it is."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclass
class PlainViT:
    """A plain ViT as a function from an image (B, 3, H, W) to features (B, C, H / patch, W / patch)."""

    trunk: Any  # the object that layout's paths start from
    layout: Layout  # where its parts are
    resampling: Resampling  # how its position table is fitted to the grid
    lasts: tuple[int, ...]  # indices of the blocks whose outputs are taken
    table_tokens: int  # how many prefix tokens have an entry of their own at the front of the position table
    value_path: bool = False  # take the last block's value path (see value_path) instead of its output
    # Owner and path of the projection behind the final norm: a module, or a matrix (D, C).
    projection: tuple[Any, str] | None = None
    normed: bool = True  # whether features get the final norm
    told: bool = False  # of hooks that do not run

    def __post_init__(self) -> None:
        # Blocks of transformers want masks by position: two in CLIP of version 4, one in version 5; others want none.
        try:
            parameters = list(inspect.signature(self.blocks[0].forward).parameters.values())[1:]
        except (TypeError, ValueError):
            parameters = []  # scripted
        self.masks = [None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]

    def __call__(self, image: Tensor) -> Maps:
        self._warn_of_hooks()
        # Weights decide the precision; under autocast the residual stream stays as wide as they are.
        image = image.to(self.convolution.weight.dtype)
        tokens, (h, w) = self.embed(image)
        prefix = tokens.shape[1] - h * w
        outputs = self.encode(tokens, image)
        return [self._map(outputs[index], prefix, h, w) for index in self.lasts]

    def _warn_of_hooks(self) -> None:
        """Say once that hooks of modules that are not called as a whole do not run."""
        whole = (self.trunk, part(self.trunk, self.layout.patch.rpartition(".")[0] or "-"))
        hooked = [
            type(m).__name__ for m in whole if isinstance(m, nn.Module) and (m._forward_hooks or m._forward_pre_hooks)
        ]
        if hooked and not self.told:
            self.told = True
            warnings.warn(
                f"the forward hooks of {' and '.join(hooked)} do not run: its blocks and norms are called one by one. "
                "Put hooks on these, or give Backbone(model, function, channels=C, patch_size=p)",
                stacklevel=4,
            )

    def _map(self, tokens: Tensor, prefix: int, h: int, w: int) -> Tensor:
        """A block's output (B, prefix + h * w, D) as features (B, C, h, w)."""
        if tokens.shape[1] - prefix != h * w:
            raise LoftUpError(
                f"{type(self.trunk).__name__} gave {tokens.shape[1]} tokens, expected {h} x {w} patches + {prefix} "
                "prefix tokens; do its blocks drop or merge tokens?"
            )
        norm = self._part("norm") if self.normed else None
        if isinstance(norm, nn.Identity | None):
            norm = part(self.trunk, self.layout.pooled_norm) or nn.Identity()
        features: Tensor = norm(tokens[:, prefix:])
        if self.projection:
            project = part(*self.projection)
            features = project(features) if isinstance(project, nn.Module) else features @ project
        return rearrange(features, "b (h w) c -> b c h w", h=h, w=w).contiguous()

    @property
    def patch(self) -> Any:
        """The patch convolution, or the adapter around it."""
        return self._part("patch")

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks; traced modules only tell their children."""
        blocks = self._part("blocks")
        return list(blocks.children()) if isinstance(blocks, torch.jit.ScriptModule) else list(blocks)

    @property
    def convolution(self) -> Any:
        """The patch convolution itself, inside an adapter such as LoRA's."""
        return getattr(self.patch, "base_layer", self.patch)

    def _part(self, name: str) -> Any:
        return part(self.trunk, getattr(self.layout, name))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image to the tokens before the first block, (B, prefix + h * w, D), and the grid (h, w).

        Dropout of positions or patches is left out: features are the same in training mode.
        """
        patches = self.patch(image).to(image.dtype)
        grid = (patches.shape[2], patches.shape[3])
        patches = rearrange(patches, "b d h w -> b (h w) d")
        if (patch_norm := self._part("patch_norm")) is not None:
            patches = patch_norm(patches)
        width = patches.shape[-1]
        parts = (part(self.trunk, path) for path in self.layout.tokens)
        tokens = [token.reshape(1, -1, width) for token in parts if token is not None]
        prefix = torch.cat(tokens, 1) if tokens else patches.new_empty(1, 0, width)
        if (table := self._part("position")) is not None:
            table, n = table.reshape(1, -1, width), self.table_tokens
            prefix, table = torch.cat([prefix[:, :n] + table[:, :n], prefix[:, n:]], 1), table[:, n:]
            table = resample_positions(table, table_grid(self.trunk, table.shape[1]), grid, self.resampling)
            patches = patches + table.to(patches.dtype)
        patches = torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], 1)
        if (pre_norm := self._part("pre_norm")) is not None:
            patches = pre_norm(patches)
        return patches, grid

    def encode(self, tokens: Tensor, image: Tensor) -> dict[int, Tensor]:
        """Run the blocks as far as needed, (B, n, D) to (B, n, D) of each block asked for, by its index."""
        rope = self._part("rope")
        extra = {} if rope is None else {"position_embeddings": rope(image)}
        blocks = self.blocks[: max(self.lasts) + 1]
        attention = getattr(blocks[0], self.layout.attention, None)
        # OpenAI's package and open_clip before 2.24 run tokens first, (n, B, D).
        tokens_first = getattr(attention, "batch_first", None) is False
        if tokens_first:
            tokens = tokens.transpose(0, 1)
        outputs = {}
        for index, block in enumerate(blocks):
            if self.value_path and block is blocks[-1]:
                tokens = value_path(block, self.layout, tokens)
            else:
                output = block(tokens, *self.masks, **extra)
                tokens = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
            if index in self.lasts:
                outputs[index] = tokens.transpose(0, 1) if tokens_first else tokens
        return outputs


def value_path(block: Any, layout: Layout, tokens: Tensor) -> Tensor:
    """out_proj(v_proj(norm(x))) for every token: no attention, no residual, no MLP ("MaskCLIP")."""
    tokens = getattr(block, layout.block_norm)(tokens)
    attention: Any = getattr(block, layout.attention)
    if getattr(attention, "in_proj_weight", None) is not None:  # PyTorch's MultiheadAttention, also scripted
        weight = attention.in_proj_weight.chunk(3)[2]
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[2]
        return attention.out_proj(F.linear(tokens, weight, bias))  # type: ignore[no-any-return]
    if hasattr(attention, "v_proj"):
        return attention.out_proj(attention.v_proj(tokens))  # type: ignore[no-any-return]
    return attention.proj(attention.qkv(tokens).chunk(3, dim=-1)[2])  # type: ignore[no-any-return]


def plain_source(vit: PlainViT, count: int, name: str, scaling: Scaling, clip: bool = False) -> Source:
    """Sizes of a plain ViT, read off its parts."""
    kernel = vit.convolution.weight.shape
    stride = getattr(vit.convolution, "stride", kernel[2:])  # traced modules have no stride; a ViT's is its kernel
    if stride[0] != stride[1]:
        raise LoftUpError(f"{name or type(vit.trunk).__name__} has patches of {stride}, only square ones are supported")
    channels = kernel[0]
    if vit.projection:
        project = part(*vit.projection)
        channels = project.out_features if isinstance(project, nn.Module) else project.shape[1]
    # Upsamplers for CLIP were trained on the projected value path alone; for the others, on the last block.
    standard = vit.projection is not None if clip else vit.lasts == (count - 1,)
    maps = len(vit.lasts)
    sizes = (channels,) * maps, (int(stride[0]),) * maps
    return Source(vit, *sizes, count, vit.lasts, name, scaling, standard, exact=True)
