"""The LoftUp network: pixels ask, low-resolution features answer (paper section 3.1, figure 3)."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import universal_streaming
from .inputs import Size, check_inputs, check_points, output_size, resize_guidance
from .layers import (
    ChannelNorm,
    CrossTransformer,
    FourierCode,
    ImageCode,
    LayerNorm2d,
    MinMaxScale,
    grid_coordinates,
    run,
)
from .prepare import forget
from .streaming import Head, apply_head, features_at, upsample
from .universal import UniversalUpsampler

__all__ = ["LoftUp", "LoftUpConfig"]


_UNIVERSAL_SIZES = ("radius", "code_width", "encoder_width")


@dataclasses.dataclass(frozen=True)
class LoftUpConfig:
    """Architecture of a LoftUp network; the defaults are the published ones.

    Args:
        channels: C of the backbone features; None for any, with ``values="features"``.
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
        values: what attention averages: ``"projected"`` features, the published network; or the ``"features"``
            themselves, a smaller network for any backbone, whose output is a convex combination of the features around
            each pixel (:mod:`loftup.universal`). Of the fields above it has ``heads`` and ``backbone`` alone.
        radius: of the window of cells that a pixel looks at, (2 * radius + 1)**2 cells; for ``values="features"``.
        code_width: width of a head's guidance code; for ``values="features"``.
        encoder_width: width of the network that makes these codes; for ``values="features"``.

    Raises:
        ValueError: a value is out of range, or D is not divisible by ``heads``.
    """

    channels: int | None = None
    position_code: Literal["sine", "learnable"] = "sine"
    lr_size: int = 16
    heads: int = 4
    blocks: int = 2
    image_frequencies: int = 20
    feature_frequencies: int = 5
    channel_norm: Literal["layer", "identity"] = "layer"
    backbone: str = ""
    values: Literal["projected", "features"] = "projected"
    radius: int = 2
    code_width: int = 8
    encoder_width: int = 32

    def __post_init__(self) -> None:
        for name, choices in (
            ("position_code", ("sine", "learnable")),
            ("channel_norm", ("layer", "identity")),
            ("values", ("projected", "features")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"LoftUpConfig.{name} must be one of {choices}, got {getattr(self, name)!r}")
        universal = self.values == "features"
        if universal and self.channels is not None:
            raise ValueError(
                f'LoftUpConfig.channels must be None with values="features", which take any number, got '
                f"{self.channels!r}"
            )
        sizes = ("lr_size", "heads", "blocks", "image_frequencies", "feature_frequencies", *_UNIVERSAL_SIZES)
        for name in sizes if universal else ("channels", *sizes):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LoftUpConfig.{name} must be a positive integer, got {value!r}")
        if self.encoder_width < 2:
            raise ValueError(f"LoftUpConfig.encoder_width must be at least 2, got {self.encoder_width}")
        if not universal and self.width % self.heads:
            fitting = [n for n in range(1, 17) if self.width % n == 0]
            raise ValueError(
                f"{self.channels} channels make a width of {self.width}, which {self.heads} heads do not divide; "
                f"heads that do: {fitting}"
            )

    @property
    def width(self) -> int:
        """D, the width of queries and tokens; with ``values="features"`` that of a head's codes."""
        if self.channels is None:
            return self.code_width
        return self.channels + (4 * self.feature_frequencies if self.position_code == "sine" else 0)

    def to_dict(self) -> dict[str, Any]:
        """All fields that the network has, for config.json."""
        fields = dataclasses.asdict(self)
        names = ("values", "heads", *_UNIVERSAL_SIZES, "backbone")
        if self.values == "features":
            return {name: fields[name] for name in names}
        return {name: value for name, value in fields.items() if name not in ("values", *_UNIVERSAL_SIZES)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoftUpConfig":
        """Read :meth:`to_dict`'s output or the published ``{dim, lr_pe_type, lr_size}``; unknown keys are refused."""
        published = {"dim": "channels", "lr_pe_type": "position_code"}
        fields = {published.get(key, key): value for key, value in values.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown keys {unknown} in a LoftUp config; known keys: {sorted(known)}")
        if "channels" not in fields and fields.get("values") != "features":
            raise ValueError(f"a LoftUp config needs 'channels' (or the published 'dim'), got {sorted(values)}")
        return cls(**fields)


class Upsampler(nn.Module):
    """The network behind the channel norm; its parameter names are those of the published ``upsampler.*``."""

    def __init__(self, config: LoftUpConfig) -> None:
        super().__init__()
        assert config.channels is not None
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

    def queries(self, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        """Guidance code and stem: an image (B, 3, H, W) to (B, H*W, D)."""
        norm, *convolutions = self.first_conv
        # Code and norm are float32 whatever the module's dtype.
        x = norm(self.fourier_feat(guidance)).to(dtype)
        for layer in convolutions:
            x = layer(x)
        return rearrange(x, "b d h w -> b (h w) d")  # type: ignore[no-any-return]

    def forward(self, features: Tensor, guidance: Tensor, checkpointing: bool = False) -> Tensor:
        """Normalised features (B, C, h, w) and an image at output size (B, 3, H, W) to (B, C, H, W).

        With ``checkpointing`` the blocks' activations are computed again in the backward pass, and in ``eval()`` mode
        the stem's too.
        """
        height, width = guidance.shape[-2:]
        # Not in training mode: the second pass would update the batch norms' statistics again.
        queries = run(checkpointing and not self.training, self.queries, guidance, features.dtype)
        queries = self.ca_transformer(queries, self.tokens(features), checkpointing)
        return self.final_conv(rearrange(queries, "b (h w) d -> b d h w", h=height, w=width))  # type: ignore[no-any-return]


class LoftUp(nn.Module):
    """Upsample the features of a frozen vision backbone to any size, guided by the image.

    >>> up = LoftUp.from_pretrained("dinov2_vits14")            # doctest: +SKIP
    >>> up(features, image).shape                               # (B, 384, h, w), (B, 3, H, W)  # doctest: +SKIP
    torch.Size([B, 384, H, W])

    Args:
        config: a :class:`LoftUpConfig`, or the channel count C for the published architecture. Weights are random:
            use :meth:`from_pretrained` for trained ones.

    Attributes:
        activation_checkpointing: save memory in training by computing activations twice. Without effect with
            ``values="features"``.
    """

    upsampler: Any  # Upsampler or UniversalUpsampler

    def __init__(self, config: LoftUpConfig | int) -> None:
        super().__init__()
        self.config = config if isinstance(config, LoftUpConfig) else LoftUpConfig(config)
        channels = self.config.channels
        self.upsampler = UniversalUpsampler(self.config) if channels is None else Upsampler(self.config)
        plain = self.config.channel_norm == "identity"
        self.channelnorm = nn.Identity() if channels is None or plain else ChannelNorm(channels)
        self.activation_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters, in which the network computes.

        The Fourier code stays float32; with ``values="features"`` everything is computed in float32 at least.
        """
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        net = self.upsampler
        return net.gate.weight if isinstance(net, UniversalUpsampler) else net.ca_transformer.norm.weight

    def forward(
        self,
        features: Tensor,
        image: Tensor,
        size: Size = None,
        *,
        head: Head | None = None,
        out: Tensor | None = None,
        memory: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Upsample backbone features to any output size.

        In inference (``eval()``, and no gradient wanted: inside ``torch.inference_mode()`` or ``torch.no_grad()``, or
        nothing requires one) the result is made in bands of rows, so that memory is the result plus a constant. When a
        gradient is wanted, in training mode and inside ``torch.compile`` the whole image is computed at once; set
        ``up.activation_checkpointing = True`` to save memory there by computing activations twice. Forward hooks on
        inner modules run only then.

        Args:
            features: (B, C, h, w), straight from the backbone, any float dtype.
            image: (B, 3, H, W), the guidance; any per-channel affine scaling, so [0, 1], ImageNet-normalised or
                0..255, any float dtype. Each image is scaled by its own extremes: batch-mates never matter.
            size: (H', W') of the result in pixels, or one int for a square; None means (H, W). Another size than the
                image's resizes the guidance bilinearly first.
            head: a pointwise function of features, applied band by band, so that the (B, C, H', W') map never exists:
                an ``nn.Linear`` over C, or anything that maps (1, C, n, m) to (1, K, n, m) or (1, n, m) position by
                position (1x1 convolution, linear probe, similarity to texts, argmax). It sees the dtype of
                ``features``. Where gradients of its own parameters are wanted, the map is kept for them. With
                ``values="features"`` an ``nn.Linear`` or 1x1 ``nn.Conv2d`` is applied to the cells, to the same
                result.
            out: tensor to write the result into, of its shape and any dtype, device and memory layout (a memory-mapped
                one too).
            memory: budget in bytes for our own buffers in inference, beside the tokens' keys and values and the
                libraries' scratch; None means 96 MiB on the CPU and 384 MiB on CUDA. With ``values="features"`` it is
                also beside the guidance's codes at half resolution and some six times the features.
            backend: "cpu", "torch", "triton" or None to choose; see :func:`loftup.engines.explain`.

        Returns:
            (B, C, H', W') in the dtype of ``features``; with ``head`` (B, K, H', W') or (B, H', W') in the head's
            dtype; ``out`` where it is given.

        Raises:
            ValueError: C is not what these weights expect, or an argument is not a finite 4-d tensor (finiteness is
                not checked inside ``torch.compile`` and ``torch.export``); ``size`` is not positive; the head is not
                pointwise; ``out`` has another shape; ``memory`` does not hold the smallest band; there is no such
                ``backend``; or ``out``, ``memory`` or ``backend`` are given where the whole image is computed at once.
            TypeError: an argument is not a float tensor.
            LoftUpError: ``backend`` cannot run here.
        """
        check_inputs(features, image, self)
        size = output_size(size, image)
        universal = isinstance(self.upsampler, UniversalUpsampler)
        if not self._whole_at_once(features, image):
            stream = universal_streaming.upsample if universal else upsample
            return stream(self, features, image, size, head=head, out=out, memory=memory, backend=backend)
        for name, value in (("out", out), ("memory", memory), ("backend", backend)):
            if value is not None:
                raise ValueError(
                    f"{name}= is for inference: call up.eval() and use torch.inference_mode(), outside torch.compile"
                )
        guidance = resize_guidance(image, size)
        if universal:
            dense = self._universal(features, guidance)
        else:
            normalised = self.channelnorm(features.to(self.dtype)).to(self.dtype)
            dense = self.upsampler(normalised, guidance, self.activation_checkpointing)
        dense = dense.to(features.dtype)
        return dense if head is None else apply_head(head, dense)

    def _universal(self, features: Tensor, guidance: Tensor) -> Tensor:
        """The universal network all at once, in float32 at least whatever the module's dtype and autocast say."""
        if features.shape[0] == 0:  # len() would fix the batch of an export
            return features.new_empty(0, features.shape[1], *guidance.shape[-2:])
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.dtype == dtype:
            return self.upsampler(features, guidance)  # type: ignore[no-any-return]
        state = {name: parameter.to(dtype) for name, parameter in self.upsampler.named_parameters()}
        return torch.func.functional_call(self.upsampler, state, (features, guidance))  # type: ignore[no-any-return]

    def at(
        self, features: Tensor, image: Tensor, points: Tensor, size: Size = None, *, backend: str | None = None
    ) -> Tensor:
        """Upsampled features at points alone; the cost grows with their number, not with the image's size.

        With ``values="features"`` the whole image is looked at first, and from some percent of its pixels on the map
        costs less.

        At pixel centres these are the vectors of ``up(features, image, size)``; between them they are interpolated
        bilinearly, as ``grid_sample`` would from the full map. Inference only.

        Args:
            features: as for :meth:`forward`.
            image: as for :meth:`forward`.
            points: (B, N, 2), any float or integer dtype: (x, y) in pixels of the ``size`` grid, so that (0, 0) is the
                centre of the top left pixel and (W' - 1, H' - 1) that of the bottom right one.
            size: as for :meth:`forward`.
            backend: as for :meth:`forward`.

        Returns:
            (B, N, C) in the dtype of ``features``.

        Raises:
            ValueError: as for :meth:`forward`; points have another shape or lie outside the grid; or a gradient is
                wanted.
            TypeError: as for :meth:`forward`.
            LoftUpError: ``backend`` cannot run here.
        """
        check_inputs(features, image, self)
        height, width = output_size(size, image)
        check_points(points, features, height, width)
        if self._whole_at_once(features, image):
            raise ValueError(
                "up.at is for inference: call up.eval() and use torch.inference_mode(), outside torch.compile. With "
                "gradients, sample the map: up(features, image, size)[..., y, x]"
            )
        read = universal_streaming.features_at if self.config.values == "features" else features_at
        return read(self, features, image, (height, width), points, backend=backend)

    def refresh(self) -> None:
        """Forget the weights prepared for inference; needed only after writing through ``parameter.data``."""
        forget(self)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # .to() and .half() put new data into the same parameters, past their version counters.
        forget(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _whole_at_once(self, features: Tensor, image: Tensor) -> bool:
        if self.training or torch.compiler.is_compiling():
            return True
        wanted = features.requires_grad or image.requires_grad or any(p.requires_grad for p in self.parameters())
        return torch.is_grad_enabled() and wanted

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
        strict: bool = False,
    ) -> "LoftUp":
        """Load trained weights by backbone name, backbone object, Hub repository, local folder or file.

        Args:
            name_or_path: "any", the upsampler for every backbone, or "tiny", that of ``load_backbone("tiny")``, which
                come with the package; a name of :func:`loftup.list_pretrained` or that backbone's timm, torch.hub,
                open_clip or transformers name; a backbone object of one of these libraries or from
                :func:`loftup.wrap`; a timm name of any other backbone, which gets "any" with a warning; a Hub
                repository id ("user/repo"); a folder or a file (``pytorch_model.bin``, ``.safetensors``, a training
                checkpoint with ``state_dict``). Names win over folders of the same name: write "./name" for those, or
                pass a ``Path``, which is never a name or a repository. A file without a config does not tell the
                number of attention heads: the published 4 are assumed (:meth:`save_pretrained` stores the number).
            revision: branch, tag or commit of the Hub repository.
            cache_dir: where downloads are kept; None means the Hub's default cache.
            local_files_only: take files from the cache and never ask the network.
            device: where to put the module; None means the CPU.
            dtype: floating dtype to convert the parameters to; None means as stored (float32 in the published weights),
                and float32 for those in the package.
            channel_norm: "identity" accepts a file that lacks the channel norm and passes features on as they come.
                Otherwise such a file is refused, because its results would be wrong without any sign of it.
            strict: refuse a backbone without weights of its own, in place of taking "any" with a warning.

        Returns:
            The module in ``eval()`` mode.

        Raises:
            LoftUpError: the name is unknown (near misses are named), the Hub is unreachable, or a file is missing,
                truncated, incomplete, of another architecture or of mixed dtypes.
            TypeError: ``name_or_path`` or ``dtype`` is of another type.
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
            strict=strict,
        )

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``model.safetensors`` and ``config.json`` that :meth:`from_pretrained` reads back bit for bit.

        The whole config is in the header of ``model.safetensors`` too, so that the file can travel alone.
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
        if self.config.values == "features":
            return f"values='features', channels=any, heads={self.config.heads}, backbone={self.config.backbone!r}"
        return f"channels={self.config.channels}, width={self.config.width}, backbone={self.config.backbone!r}"
