"""The LoftUp network: pixels ask, low-resolution features answer (paper section 3.1, figure 3)."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import ChannelNorm, CrossTransformer, FourierCode, ImageCode, LayerNorm2d, MinMaxScale, grid_coordinates

__all__ = ["LoftUp", "LoftUpConfig", "output_size"]

Size = int | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class LoftUpConfig:
    """Architecture of a LoftUp network; the defaults are the published ones.

    Args:
        channels: C of the backbone features.
        position_code: how feature positions are told apart: ``"sine"`` appends a Fourier code (width D = C + 4 *
            feature_frequencies), ``"learnable"`` adds a table of ``lr_size**2`` vectors (D = C).
        lr_size: side of the learnable table; without effect for ``"sine"``.
        heads: attention heads; must divide D.
        blocks: cross-attention blocks.
        image_frequencies: frequencies of the guidance code.
        feature_frequencies: frequencies of the feature-grid code.
        channel_norm: ``"layer"`` normalises the features over C first, as all published weights expect;
            ``"identity"`` takes them as they come.
        backbone: name of the backbone that the weights belong to, for messages; may be empty.

    Raises:
        ValueError: a value is out of range, or D is not divisible by ``heads``.
    """

    channels: int
    position_code: Literal["sine", "learnable"] = "sine"
    lr_size: int = 16
    heads: int = 4
    blocks: int = 2
    image_frequencies: int = 20
    feature_frequencies: int = 5
    channel_norm: Literal["layer", "identity"] = "layer"
    backbone: str = ""

    def __post_init__(self) -> None:
        for name in ("channels", "lr_size", "heads", "blocks", "image_frequencies", "feature_frequencies"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LoftUpConfig.{name} must be a positive integer, got {value!r}")
        for name, choices in (("position_code", ("sine", "learnable")), ("channel_norm", ("layer", "identity"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"LoftUpConfig.{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.width % self.heads:
            fitting = [n for n in range(1, 17) if self.width % n == 0]
            raise ValueError(
                f"{self.channels} channels make a width of {self.width}, which {self.heads} heads do not divide; "
                f"heads that do: {fitting}"
            )

    @property
    def width(self) -> int:
        """D, the width of queries and tokens."""
        return self.channels + (4 * self.feature_frequencies if self.position_code == "sine" else 0)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoftUpConfig":
        """Read :meth:`to_dict`'s output or the published ``{dim, lr_pe_type, lr_size}``; unknown keys are refused."""
        published = {"dim": "channels", "lr_pe_type": "position_code"}
        fields = {published.get(key, key): value for key, value in values.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown keys {unknown} in a LoftUp config; known keys: {sorted(known)}")
        if "channels" not in fields:
            raise ValueError(f"a LoftUp config needs 'channels' (or the published 'dim'), got {sorted(values)}")
        return cls(**fields)


class Upsampler(nn.Module):
    """The network behind the channel norm; its parameter names are those of the published ``upsampler.*``."""

    def __init__(self, config: LoftUpConfig) -> None:
        super().__init__()
        channels, width = config.channels, config.width
        code_channels = 10 * config.image_frequencies + 3
        self.lr_size = config.lr_size
        self.lr_pe: FourierCode | Tensor
        if config.position_code == "sine":
            self.lr_pe = FourierCode(2, config.feature_frequencies)
        else:
            self.lr_pe = nn.Parameter(0.02 * torch.randn(1, config.lr_size**2, channels))
        self.fourier_feat = nn.Sequential(MinMaxScale(), ImageCode(config.image_frequencies))
        self.first_conv = nn.Sequential(
            ChannelNorm(code_channels),
            nn.Conv2d(code_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.ca_transformer = CrossTransformer(width, channels, config.heads, config.blocks)
        self.final_conv = (
            nn.Sequential(nn.Conv2d(width, channels, 1), LayerNorm2d(channels))
            if config.position_code == "sine"
            else LayerNorm2d(channels)
        )

    def tokens(self, features: Tensor) -> Tensor:
        """Keys and values: normalised features (B, C, h, w) with their positions, as (B, h*w, D)."""
        batch, _, h, w = features.shape
        if isinstance(self.lr_pe, FourierCode):
            position = self.lr_pe(grid_coordinates(h, w, features.device)).to(features.dtype)
            grid = torch.cat([features, position.expand(batch, -1, -1, -1)], dim=1)
        else:
            table = rearrange(self.lr_pe, "1 (i j) c -> 1 c i j", i=self.lr_size)
            if (h, w) != (self.lr_size, self.lr_size):
                table = F.interpolate(table.float(), (h, w), mode="bicubic", align_corners=False)
            grid = features + table.to(features.dtype)
        return rearrange(grid, "b d h w -> b (h w) d")

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """Normalised features (B, C, h, w) and an image at output size (B, 3, H, W) to (B, C, H, W)."""
        norm, *convolutions = self.first_conv
        code = norm(self.fourier_feat(guidance))  # float32 up to here, whatever the module's dtype
        queries = code.to(features.dtype)
        for layer in convolutions:
            queries = layer(queries)
        height, width = queries.shape[-2:]
        queries = rearrange(queries, "b d h w -> b (h w) d")
        queries = self.ca_transformer(queries, self.tokens(features))
        return self.final_conv(rearrange(queries, "b (h w) d -> b d h w", h=height, w=width))  # type: ignore[no-any-return]


class LoftUp(nn.Module):
    """Upsample the features of a frozen vision backbone to any size, guided by the image.

    >>> up = LoftUp.from_pretrained("dinov2_vits14")            # doctest: +SKIP
    >>> up(features, image).shape                               # (B, 384, h, w), (B, 3, H, W)  # doctest: +SKIP
    torch.Size([B, 384, H, W])

    Args:
        config: a :class:`LoftUpConfig`, or the channel count C for the published architecture. Weights are random:
            use :meth:`from_pretrained` for trained ones.
    """

    def __init__(self, config: LoftUpConfig | int) -> None:
        super().__init__()
        self.config = config if isinstance(config, LoftUpConfig) else LoftUpConfig(config)
        self.upsampler = Upsampler(self.config)
        self.channelnorm = ChannelNorm(self.config.channels) if self.config.channel_norm == "layer" else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters, in which the network computes (the Fourier code stays float32)."""
        return self.upsampler.ca_transformer.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.upsampler.ca_transformer.norm.weight.device

    def forward(self, features: Tensor, image: Tensor, size: Size = None) -> Tensor:
        """Upsample backbone features to any output size.

        Args:
            features: (B, C, h, w), straight from the backbone, any float dtype.
            image: (B, 3, H, W), the guidance; any per-channel affine scaling, so [0, 1], ImageNet-normalised or
                0..255, any float dtype. Each image is scaled by its own extremes: batch-mates never matter.
            size: (H', W') of the result in pixels, or one int for a square; None means (H, W). Another size than the
                image's resizes the guidance bilinearly first.

        Returns:
            (B, C, H', W') in the dtype of ``features``.

        Raises:
            ValueError: C is not what these weights expect, or an argument is not a finite 4-d tensor (finiteness is
                not checked inside ``torch.compile`` and ``torch.export``), or ``size`` is not positive.
            TypeError: an argument is not a float tensor.
        """
        check_inputs(features, image, self)
        guidance = resize_guidance(image, output_size(size, image))
        normalised = self.channelnorm(features.to(self.dtype)).to(self.dtype)
        return self.upsampler(normalised, guidance).to(features.dtype)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: "str | os.PathLike[str] | nn.Module",
        *,
        revision: str | None = None,
        cache_dir: "str | os.PathLike[str] | None" = None,
        local_files_only: bool = False,
        device: "str | torch.device | None" = None,
        dtype: torch.dtype | None = None,
        channel_norm: Literal["identity"] | None = None,
    ) -> "LoftUp":
        """Load trained weights by backbone name, backbone object, Hub repository, local folder or file.

        Args:
            name_or_path: a name of :func:`loftup.list_pretrained` or that backbone's timm, torch.hub, open_clip or
                transformers name; a backbone object of one of these libraries or from :func:`loftup.wrap`; a Hub
                repository id ("user/repo"); a folder or a file (``pytorch_model.bin``, ``.safetensors``, a training
                checkpoint with ``state_dict``). Names win over folders of the same name: write "./name" for those.
            revision: branch, tag or commit of the Hub repository.
            cache_dir: where downloads are kept; None means the Hub's default cache.
            local_files_only: take files from the cache and never ask the network.
            device: where to put the module; None means the CPU.
            dtype: floating dtype to convert the parameters to; None means float32.
            channel_norm: "identity" accepts a file that lacks the channel norm and passes features on as they come.
                Otherwise such a file is refused, because its results would be wrong without any sign of it.

        Returns:
            The module in ``eval()`` mode.

        Raises:
            LoftUpError: the name is unknown (near misses are named), the Hub is unreachable, or a file is missing,
                truncated, incomplete or of another architecture.
        """
        from .weights import load_pretrained

        return load_pretrained(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
            channel_norm=channel_norm,
        )

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``model.safetensors`` and ``config.json`` that :meth:`from_pretrained` reads back bit for bit.

        Each file appears whole or not at all: it is written under another name first and then renamed.
        """
        from .weights import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Add LoftUp weights",
    ) -> str:
        """Create the Hub repository where needed and upload weights, config and a model card.

        Returns:
            The address of the commit.

        Raises:
            LoftUpError: the Hub refuses or cannot be reached.
        """
        from .weights import push_to_hub

        return push_to_hub(self, repo, private=private, token=token, commit_message=commit_message)

    def extra_repr(self) -> str:
        """Channels, width and backbone, for ``print(up)``."""
        return f"channels={self.config.channels}, width={self.config.width}, backbone={self.config.backbone!r}"


def output_size(size: Size, image: Tensor) -> tuple[int, int]:
    """Resolve ``size`` (None, int or pair) to (H', W'); ValueError unless both are positive integers."""
    if size is None:
        return image.shape[-2], image.shape[-1]
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in pair):
        raise ValueError(f"size must be an int or a pair (height, width) of ints, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    return pair[0], pair[1]


def resize_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring the image to the output size as the paper does: bilinear, align_corners=False, no antialias, float32."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image.float(), size, mode="bilinear", align_corners=False)


def check_inputs(features: Tensor, image: Tensor, up: LoftUp) -> None:
    """Raise TypeError or ValueError, with got, expected and remedy, unless the two fit each other and the weights."""
    config = up.config
    for name, tensor in (("features", features), ("image", image)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}; convert with {name}.float()")
        if tensor.ndim != 4:
            remedy = f"; for a single one: {name}[None]" if tensor.ndim == 3 else ""
            tokens = "; for tokens (B, h*w, C): features.mT.reshape(B, C, h, w)" if name == "features" else ""
            raise ValueError(
                f"{name} must have 4 dimensions ({'B, C, h, w' if name == 'features' else 'B, 3, H, W'}), "
                f"got shape {tuple(tensor.shape)}{remedy}{tokens if tensor.ndim == 3 else ''}"
            )
    channels = features.shape[1]
    if channels == 3 != config.channels and image.shape[1] == config.channels:
        raise ValueError(
            f"features and image look swapped: got shapes {tuple(features.shape)} and {tuple(image.shape)}; "
            "call up(features, image)"
        )
    if image.shape[1] != 3:
        remedy = "; for a grey image: image.expand(-1, 3, -1, -1)" if image.shape[1] == 1 else ""
        raise ValueError(f"the image has {image.shape[1]} channels, expected 3 (B, 3, H, W){remedy}")
    if channels != config.channels:
        raise ValueError(channel_mismatch(channels, config))
    if features.shape[0] != image.shape[0]:
        raise ValueError(
            f"features have batch size {features.shape[0]}, the image {image.shape[0]}; "
            "repeat the smaller one with .expand(B, -1, -1, -1)"
        )
    if 0 in features.shape[-2:] or 0 in image.shape[-2:]:
        raise ValueError(f"features {tuple(features.shape)} and image {tuple(image.shape)} must not be empty")
    if features.device != up.device or image.device != up.device:
        raise ValueError(
            f"features are on {features.device}, the image on {image.device}, the LoftUp weights on {up.device}; "
            "move them to one device with .to()"
        )
    if not torch.compiler.is_compiling():
        for name, tensor in (("features", features), ("image", image)):
            if not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                half = "; float16 overflows past 65504: run the backbone in bfloat16 or float32"
                raise ValueError(
                    f"{name} hold {bad} values that are not finite{half if tensor.dtype == torch.float16 else ''}"
                )


def channel_mismatch(channels: int, config: LoftUpConfig) -> str:
    """Explain features of the wrong channel count, naming the published weights that would fit."""
    from .weights import PUBLISHED

    weights = f"the weights {config.backbone!r} expect" if config.backbone else "these weights expect"
    fitting = [repr(name) for name, checkpoint in PUBLISHED.items() if checkpoint.channels == channels]
    remedy = f"; for {channels} channels: {', '.join(fitting)}" if fitting else ""
    return f"features have {channels} channels, {weights} {config.channels}{remedy}"
