"""Parts that the learned upsamplers share: config, files, guidance, and windows of the output for training."""

import dataclasses
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import LoftUpError
from ...files import refuse_others, write_atomically
from ...inference.canvas import apply_head
from ...inputs import Size, check_inputs, check_points, output_size, resize_guidance
from ...networks.layers import Box, ChannelNorm, MinMaxScale
from ...version import __version__
from ...weights.names import CONFIG, SAFETENSORS

__all__ = ["Doubling", "DoublingUpsampler", "LearnedConfig", "LearnedUpsampler"]


@dataclasses.dataclass(frozen=True)
class LearnedConfig:
    """Architecture of a learned upsampler.

    Args:
        architecture: its name, "lift" for example.
        channels: C of the backbone's features.
        backbone: name of the backbone, for messages; may be empty.

    Raises:
        ValueError: ``channels`` is not a positive integer.
    """

    architecture: str
    channels: int
    backbone: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.channels, int) or isinstance(self.channels, bool) or self.channels < 1:
            raise ValueError(f"channels must be a positive integer, got {self.channels!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearnedConfig":
        """Read :meth:`to_dict`'s output; unknown keys are refused.

        Raises:
            ValueError: a key is missing or unknown.
        """
        keys = {field.name for field in dataclasses.fields(cls)}
        if set(values) - keys or not {"architecture", "channels"} <= set(values):
            raise ValueError(f"expected the keys {', '.join(sorted(keys))}, got {', '.join(sorted(values)) or 'none'}")
        return cls(**values)


class LearnedUpsampler(nn.Module):
    """An upsampler that :mod:`loftup.train` can train: features behind a channel norm, guidance scaled to [-0.5, 0.5].

    Args:
        config: of the network, or the number of channels.

    Attributes:
        activation_checkpointing: whether activations are computed again in the backward pass, to save memory.
    """

    architecture: ClassVar[str]

    def __init__(self, config: LearnedConfig | int) -> None:
        super().__init__()
        self.config = config if isinstance(config, LearnedConfig) else LearnedConfig(self.architecture, config)
        self.channelnorm = ChannelNorm(self.config.channels)
        self.scale = MinMaxScale()
        self.activation_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters."""
        return self.channelnorm.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.channelnorm.norm.weight.device

    def forward(
        self, features: Tensor, image: Tensor, size: Size = None, *, head: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Upsample features, as :meth:`loftup.LoftUp.forward` does.

        Raises:
            TypeError, ValueError: features and image do not go with each other or with the network.
        """
        if features.ndim == 4 and features.shape[1] != self.config.channels:
            raise ValueError(
                f"features have {features.shape[1]} channels, this {self.architecture} was made for "
                f"{self.config.channels}; train one for this backbone"
            )
        check_inputs(features, image, self.config.channels, self.device, self.config.backbone)
        normalised = self.channelnorm(features.to(self.dtype)).to(self.dtype)
        dense = self.window(normalised, resize_guidance(image, output_size(size, image)), None).to(features.dtype)
        return dense if head is None else apply_head(head, dense)

    def at(self, features: Tensor, image: Tensor, points: Tensor, size: Size = None) -> Tensor:
        """Upsampled features at single points, read bilinearly off the whole map, as :meth:`loftup.LoftUp.at` does."""
        height, width = output_size(size, image)
        check_points(points, features, height, width)
        dense: Tensor = self(features, image, (height, width))
        x, y = points.double().unbind(-1)
        batch = torch.arange(len(points), device=points.device)[:, None]
        result = dense.new_zeros(*points.shape[:2], dense.shape[1])
        for row, of_row in ((y.floor(), 1 - y % 1), (y.ceil(), y % 1)):
            for column, of_column in ((x.floor(), 1 - x % 1), (x.ceil(), x % 1)):
                weight = (of_row * of_column).to(dense.dtype)[..., None]
                result = result + weight * dense[batch, :, row.long(), column.long()]
        return result

    def window(self, normalised: Tensor, guidance: Tensor, box: Box | None) -> Tensor:
        """A window of the output, equal to cutting it out of the whole map, at the cost of the window.

        Takes features behind the channel norm (B, C, h, w), and the whole image at output size. ValueError: the box is
        empty or reaches beyond the image.
        """
        height, width = guidance.shape[-2:]
        top, left, bottom, right = box = box or (0, 0, height, width)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"window {box} does not lie in an image of {height}x{width}")
        scaled = self.scale(guidance)
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, normalised, scaled, box, use_reentrant=False)
        return self.compute(normalised, scaled, box)

    @abstractmethod
    def compute(self, normalised: Tensor, guidance: Tensor, box: Box) -> Tensor:
        """:meth:`window` of scaled guidance and a box that lies in the image."""

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``model.safetensors`` and ``config.json``, each whole or not at all.

        The same weights give the same bytes.

        Raises:
            LoftUpError: the folder holds somebody else's files of these names.
        """
        from safetensors.torch import save

        folder = Path(folder).expanduser()
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        fields = {**self.config.to_dict(), "library_name": "loftup", "loftup_version": __version__}
        refuse_others([folder / SAFETENSORS, folder / CONFIG])
        # One entry of metadata: safetensors writes several in any order.
        write_atomically(folder / SAFETENSORS, save(state, {"loftup_version": __version__}))
        write_atomically(folder / CONFIG, (json.dumps(fields, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: "str | os.PathLike[str]") -> "LearnedUpsampler":
        """Read what :meth:`save_pretrained` wrote.

        Returns:
            The module in ``eval()`` mode.

        Raises:
            LoftUpError: a file is missing, damaged, or of another architecture.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        for name in (CONFIG, SAFETENSORS):
            if not (folder / name).is_file():
                raise LoftUpError(f"{folder} holds no {name}, expected the output of a finished `loftup train`")
        try:
            values = json.loads((folder / CONFIG).read_text("utf-8"))
            for key in ("library_name", "loftup_version"):
                values.pop(key, None)
            config = LearnedConfig.from_dict(values)
        except (ValueError, TypeError, AttributeError) as error:
            raise LoftUpError(f"{folder / CONFIG} does not describe a {cls.architecture}: {error}") from error
        if config.architecture != cls.architecture:
            raise LoftUpError(
                f"{folder} holds a {config.architecture!r}, expected {cls.architecture!r}; write "
                f"{config.architecture}:{folder}"
            )
        up = cls(config)
        try:
            up.load_state_dict(load_file(folder / SAFETENSORS))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LoftUpError(f"{folder / SAFETENSORS} does not fit a {cls.architecture}: {error}") from error
        return up.eval()


class Doubling(nn.Module):
    """One step of a :class:`DoublingUpsampler`: features to twice their grid.

    Attributes:
        margin: cells around a part of the input that decide about the part's output.
    """

    margin: ClassVar[int]

    @abstractmethod
    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """(B, C, n, m) and guidance (B, 3, 2n, 2m) to (B, C, 2n, 2m)."""


class DoublingUpsampler(LearnedUpsampler):
    """Doubles the grid step by step, then interpolates bilinearly to the output size.

    Windows are computed backwards: of every level only the part that the next one's part depends on.
    """

    @abstractmethod
    def steps(self, factor: float) -> list[Doubling]:
        """The steps, at least one, for an output ``factor`` times as large as the grid."""

    def finish(self, x: Tensor) -> Tensor:
        """Refine the last step's output, position by position."""
        return x

    def compute(self, normalised: Tensor, guidance: Tensor, box: Box) -> Tensor:
        """See :class:`LearnedUpsampler`."""
        grid, size = normalised.shape[-2:], guidance.shape[-2:]
        steps = self.steps(max(pixels / cells for pixels, cells in zip(size, grid, strict=True)))
        grids = [(grid[0] << level, grid[1] << level) for level in range(len(steps) + 1)]
        rows = _bilinear(size[0], grids[-1][0], box[0], box[2], normalised.device)
        columns = _bilinear(size[1], grids[-1][1], box[1], box[3], normalised.device)
        # The part of every level that is needed, from the last one back.
        parts = [(int(rows[0][0]), int(columns[0][0]), int(rows[1][-1]) + 1, int(columns[1][-1]) + 1)]
        for step, (height, width) in zip(reversed(steps), reversed(grids[:-1]), strict=True):
            top, left, bottom, right = parts[0]
            margin = step.margin
            parts.insert(
                0,
                (
                    max(0, top // 2 - margin),
                    max(0, left // 2 - margin),
                    min(height, -(-bottom // 2) + margin),
                    min(width, -(-right // 2) + margin),
                ),
            )
        x = _cut(normalised, parts[0])
        for level, step in enumerate(steps):
            before, after = parts[level], parts[level + 1]
            doubled: Box = tuple(2 * edge for edge in before)  # type: ignore[assignment]
            at_level = F.interpolate(guidance, grids[level + 1], mode="bilinear", align_corners=False, antialias=True)
            x = step(x, _cut(at_level, doubled))
            top, left, bottom, right = after
            x = _cut(x, (top - doubled[0], left - doubled[1], bottom - doubled[0], right - doubled[1]))
        x = self.finish(x)
        if grids[-1] == tuple(size):
            return x
        x = _sample(x, 2, rows, parts[-1][0])
        return _sample(x, 3, columns, parts[-1][1])


def _cut(x: Tensor, box: Box) -> Tensor:
    return x[..., box[0] : box[2], box[1] : box[3]]


Taps = tuple[Tensor, Tensor, Tensor]


def _bilinear(new: int, old: int, low: int, high: int, device: torch.device) -> Taps:
    """Lower and upper source index and the upper one's share, of the output positions low .. high - 1."""
    at = ((torch.arange(low, high, device=device, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    below = at.floor().long()
    return below, at.ceil().long(), at - below


def _sample(x: Tensor, dim: int, taps: Taps, offset: int) -> Tensor:
    below, above, share = taps
    weight = share.to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
    low, high = x.index_select(dim, below - offset), x.index_select(dim, above - offset)
    return low + weight * (high - low)
