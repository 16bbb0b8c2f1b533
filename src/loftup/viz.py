"""Pictures of feature maps: principal components, maps side by side, what a pixel attends to, matches of two images."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .drawing import as_picture, matches, to_pil
from .errors import translate
from .files import MADE_BY, write_atomically
from .inputs import check_inputs, output_size, resize_guidance
from .pictures import require_pillow

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PCA", "attention", "attention_maps", "compare", "matches", "overlay", "pca_image"]

SAMPLES_PER_MAP = 16_384
HEAT = (255, 120, 0)
OPACITY = 0.8  # of HEAT at most


def pca_image(
    features: Tensor | Sequence[Tensor], *, shared: bool = True, shared_range: bool = True, quantile: float = 0.01
) -> Tensor | list[Tensor]:
    """Colour feature maps by their first three principal components.

    Examples:
        >>> pca_image(torch.rand(2, 384, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
        >>> low, high = pca_image([torch.rand(8, 16, 16), torch.rand(8, 64, 64)])  # same colours mean same features

    Args:
        features: one map or a sequence of maps, each (B, C, H, W) or (C, H, W), any float dtype; sizes may differ,
            C may not unless ``shared`` is False.
        shared: fit one PCA to all maps and images, each map weighing the same, so that colours can be compared; False
            fits every map by itself.
        shared_range: use one colour range for all maps of a shared PCA; False gives each map its own, which keeps the
            hues and shows maps of different spread or offset equally bright.
        quantile: this share of the values at either end of a component is clipped, so that a few outliers do not
            grey out the rest; in [0, 0.5).

    Returns:
        For each map a float32 tensor (B, 3, H, W) or (3, H, W) in [0, 1], on the CPU; a single tensor for a single map.

    Raises:
        ValueError: a shape or ``quantile`` is out of range, C differs, or values are not finite.
    """
    maps, rows = _matrices(features, quantile)
    if shared and len(counts := {matrix.shape[1] for matrix in rows}) > 1:
        raise ValueError(f"maps have different channel counts {sorted(counts)}; use shared=False")
    groups = [rows] if shared else [[matrix] for matrix in rows]
    colours = [matrix for group in groups for matrix in _colour(group, shared_range, quantile)]
    pairs = zip(colours, maps, strict=True)
    images = [c.reshape(*x.shape[:-3], *x.shape[-2:], 3).movedim(-1, -3) for c, x in pairs]
    return images[0] if isinstance(features, Tensor) else images


class PCA:
    """Three principal components of feature maps and their range, kept so that later maps get the same colours.

    Examples:
        >>> pca = PCA.fit(torch.rand(4, 384, 16, 16))
        >>> pca.transform(torch.rand(384, 224, 224)).shape
        torch.Size([3, 224, 224])

    Args:
        mean: (C,), subtracted from every vector.
        basis: (C, 3), the components.
        low: (3,), the value of each that becomes 0.
        high: (3,), the value that becomes 1.
    """

    def __init__(self, mean: Tensor, basis: Tensor, low: Tensor, high: Tensor) -> None:
        self.mean, self.basis, self.low, self.high = mean, basis, low, high

    @classmethod
    def fit(cls, features: Tensor | Sequence[Tensor], *, quantile: float = 0.01) -> "PCA":
        """Fit to one map or several, each weighing the same; arguments and errors are those of :func:`pca_image`."""
        return cls._fit(_matrices(features, quantile)[1], quantile)

    @classmethod
    def _fit(cls, rows: list[Tensor], quantile: float) -> "PCA":
        samples = _samples(rows)
        mean, basis = _components(samples)
        values = torch.cat([(sample - mean) @ basis for sample in samples])
        return cls(mean, basis, values.quantile(quantile, dim=0), values.quantile(1 - quantile, dim=0))

    def transform(self, features: Tensor) -> Tensor:
        """Colour a map (B, C, H, W) or (C, H, W): float32 (B, 3, H, W) or (3, H, W) in [0, 1], on the CPU.

        Raises:
            ValueError: another shape, or another number of channels than the PCA was fitted to.
        """
        if features.ndim not in (3, 4) or features.shape[-3] != len(self.mean):
            expected = f"(B, {len(self.mean)}, H, W) or ({len(self.mean)}, H, W)"
            raise ValueError(f"features must be {expected}, as the PCA was fitted to, got {tuple(features.shape)}")
        matrix = features.detach().cpu().float().movedim(-3, -1)
        return self._project(matrix).movedim(-1, -3)

    def _project(self, matrix: Tensor) -> Tensor:
        return (((matrix - self.mean) @ self.basis - self.low) / (self.high - self.low).clamp(min=1e-6)).clamp(0, 1)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a safetensors file that :meth:`load` reads."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "basis", "low", "high")}
        write_atomically(Path(path), save(tensors, {"made_by": MADE_BY}))

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "PCA":
        """Read what :meth:`save` wrote.

        Raises:
            LoftUpError: the file is no such file.
            OSError: it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = Path(path).read_bytes()
        with translate((SafetensorError, TypeError), lambda error: f"{path} is no PCA that loftup saved: {error}"):
            return cls(**load(content))


def _matrices(features: Tensor | Sequence[Tensor], quantile: float) -> tuple[list[Tensor], list[Tensor]]:
    """The maps, and each as a matrix (pixels, C), checked."""
    if not 0 <= quantile < 0.5:
        raise ValueError(f"quantile must be in [0, 0.5), got {quantile}")
    maps = [features] if isinstance(features, Tensor) else list(features)
    if not maps:
        raise ValueError("no feature maps given")
    rows = []
    for index, dense in enumerate(maps):
        if dense.ndim not in (3, 4) or dense.numel() == 0:
            raise ValueError(f"map {index} must be (B, C, H, W) or (C, H, W) and not empty, got {tuple(dense.shape)}")
        if not bool(dense.isfinite().all()):
            raise ValueError(f"map {index} holds values that are not finite")
        rows.append(rearrange(dense.detach().cpu().float(), "... c h w -> (... h w) c"))
    return maps, rows


def _samples(rows: list[Tensor]) -> list[Tensor]:
    """Evenly drawn vectors of matrices (pixels, C)."""
    return [matrix[torch.linspace(0, len(matrix) - 1, min(len(matrix), SAMPLES_PER_MAP)).long()] for matrix in rows]


def _components(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and the first three components (C, 3) of matrices that weigh the same."""
    mean = torch.stack([sample.mean(0) for sample in samples]).mean(0)
    covariance = torch.stack([(sample - mean).mT @ (sample - mean) / len(sample) for sample in samples]).mean(0)
    basis = torch.linalg.eigh(covariance.double()).eigenvectors.flip(-1)[:, :3].float()
    # An eigenvector's sign is arbitrary: let its largest entry be positive, so that colours repeat between runs.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return mean, F.pad(basis, (0, 3 - basis.shape[1]))


def _colour(rows: list[Tensor], shared_range: bool, quantile: float) -> list[Tensor]:
    """Matrices (pixels, C) of one PCA as (pixels, 3) in [0, 1]."""
    pca = PCA._fit(rows, quantile)
    if shared_range:
        return [pca._project(matrix) for matrix in rows]
    colours = []
    for matrix, sample in zip(rows, _samples(rows), strict=True):
        values = (sample - pca.mean) @ pca.basis
        own = PCA(pca.mean, pca.basis, values.quantile(quantile, dim=0), values.quantile(1 - quantile, dim=0))
        colours.append(own._project(matrix))
    return colours


def compare(
    image: "Image.Image | Tensor",
    maps: Mapping[str, Tensor],
    *,
    shared: bool = True,
    shared_range: bool = False,
    height: int | None = None,
) -> "Image.Image":
    """Put an image and its feature maps side by side, coloured by :func:`pca_image`, with captions.

    Args:
        image: PIL image, or a tensor (3, H, W) or (1, 3, H, W) of any scaling (shown from its minimum to its maximum).
        maps: caption to map, (C, h, w) or (1, C, h, w); each is enlarged to the panel without smoothing.
        shared: one PCA for all maps, see :func:`pca_image`.
        shared_range: one colour range for all maps, see :func:`pca_image`.
        height: of the panels in pixels; None means the largest of image and maps.

    Returns:
        A PIL image.

    Raises:
        LoftUpError: Pillow is missing (extra ``viz``).
        ValueError: see :func:`pca_image`; or more than one image in a batch.
        TypeError: the image is neither a PIL image nor a tensor.
    """
    pil = require_pillow()
    from PIL import ImageDraw, ImageFont

    for name, features in maps.items():
        if features.ndim == 4 and features.shape[0] != 1:
            raise ValueError(f"compare shows one image, map {name!r} has a batch of {features.shape[0]}")
    picture = as_picture(image)
    height = height or max([picture.height, *(features.shape[-2] for features in maps.values())])
    width = round(height * picture.width / picture.height)
    panels = {"image": picture.resize((width, height), pil.Resampling.BICUBIC)}
    images = pca_image(list(maps.values()), shared=shared, shared_range=shared_range) if maps else []
    for name, colours in zip(maps, images, strict=True):
        panels[name] = to_pil(colours, scale=False).resize((width, height), pil.Resampling.NEAREST)
    gap, size = max(4, height // 60), max(12, height // 18)
    font = ImageFont.load_default(size)
    sheet = pil.new("RGB", (len(panels) * (width + gap) - gap, height + 2 * size), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(panels.items()):
        left = index * (width + gap)
        draw.text((left + width // 2, size), name, fill="black", font=font, anchor="mm")
        sheet.paste(panel, (left, 2 * size))
    return sheet  # type: ignore[no-any-return]


def overlay(image: "Image.Image | Tensor", values: Tensor, *, smooth: bool = True) -> "Image.Image":
    """Show a map over a photograph: in grey where it is 0, orange where it is 1.

    Args:
        image: PIL image or tensor, see :func:`compare`.
        values: (h, w) in [0, 1], any float dtype; enlarged to the image.
        smooth: enlarge bilinearly; False shows the map's cells.

    Returns:
        A PIL image of the image's size.

    Raises:
        LoftUpError: Pillow is missing (extra ``viz``).
        ValueError: a shape is wrong, or values lie outside [0, 1].
        TypeError: the image is neither a PIL image nor a tensor.
    """
    pil = require_pillow()
    if values.ndim != 2 or not values.numel() or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"values must be (h, w) in [0, 1], got {tuple(values.shape)}, {values.dtype}")
    photo = as_picture(image)
    opacity = (values.detach().float() * 255 * OPACITY).round().to(torch.uint8).cpu().numpy()
    mask = pil.fromarray(opacity).resize(photo.size, pil.Resampling.BILINEAR if smooth else pil.Resampling.NEAREST)
    return pil.composite(pil.new("RGB", photo.size, HEAT), photo.convert("L").convert("RGB"), mask)  # type: ignore[no-any-return]


def attention_maps(
    up: Any,
    features: Tensor,
    image: Tensor,
    points: Sequence[Sequence[int]],
    size: "int | tuple[int, int] | None" = None,
) -> Tensor:
    """How output pixels weigh the backbone's cells.

    With "any" these weights make the output: it is their average of the features. With the published network they are
    those of its last block, the mean of its heads (paper, section 3.1).

    Args:
        up: a :class:`loftup.LoftUp`.
        features: (1, C, h, w), as for its call.
        image: (1, 3, H, W), as for its call.
        points: (x, y) of N output pixels, whole numbers.
        size: of the output, as for its call; None means the image's.

    Returns:
        (N, h, w) float32, not negative, each with sum 1.

    Raises:
        ValueError: features or image do not fit, hold more than one image, or a point is no pixel of the output.
        TypeError: features or image are no float tensors, or ``up`` is no LoftUp.
    """
    if not hasattr(up, "upsampler"):
        raise TypeError(f"attention takes a LoftUp, got {type(up).__name__}")
    check_inputs(features, image, up.config.channels, up.device, up.config.backbone, stacklevel=3)
    height, width = output_size(size, image)
    if len(features) != 1:
        raise ValueError(f"attention shows one image, got a batch of {len(features)}; choose one: features[:1]")
    guidance = resize_guidance(image, (height, width), up.config.oversampling)
    maps = []
    with torch.inference_mode():
        normal = up.channelnorm(features).to(up.upsampler.dtype)
        for x, y in _pixels(points, height, width):
            maps.append(up.upsampler.attention(normal, guidance, y, x)[0].float())
        return torch.stack(maps) if maps else features.new_empty(0, *features.shape[2:], dtype=torch.float32)


def _pixels(points: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Points (x, y) as whole numbers, checked."""
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError):
        raise ValueError(f"points must be pairs (x, y), got {points!r}; for a single one: [(x, y)]") from None
    for x, y in pairs:
        if x != round(x) or y != round(y):
            raise ValueError(f"point {(x, y)} lies between pixels, expected whole numbers; round them")
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"point {(int(x), int(y))} lies outside the output of {width}x{height} pixels (x, y)")
    return [(int(x), int(y)) for x, y in pairs]


def attention(
    up: Any,
    features: Tensor,
    image: Tensor,
    points: Sequence[Sequence[int]],
    *,
    picture: "Image.Image | Tensor | None" = None,
    height: int = 336,
) -> "Image.Image":
    """Draw what output pixels attend to over the photograph: a panel for each, its pixel a dot.

    Cells are coloured by their weight, the heaviest most, over the photograph in grey.

    Args:
        up: see :func:`attention_maps`.
        features: see there.
        image: see there; the output has its size.
        points: (x, y) of pixels of ``image``.
        picture: to draw over, a PIL image or a tensor as for :func:`compare`; None means ``image``.
        height: of the panels in pixels.

    Returns:
        A PIL image.

    Raises:
        LoftUpError: Pillow is missing (extra ``viz``).
        ValueError: see :func:`attention_maps`; or there are no points.
        TypeError: see there.
    """
    pil = require_pillow()
    from PIL import ImageDraw

    maps = attention_maps(up, features, image, points)
    if not len(maps):
        raise ValueError("no points given, expected at least one (x, y)")
    photo = as_picture(image if picture is None else picture)
    size, gap = (round(height * photo.width / photo.height), height), max(4, height // 60)
    photo = photo.resize(size, pil.Resampling.BICUBIC)
    sheet = pil.new("RGB", (len(maps) * (size[0] + gap) - gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, ((x, y), weights) in enumerate(zip(points, maps, strict=True)):
        left = index * (size[0] + gap)
        sheet.paste(overlay(photo, weights / weights.max(), smooth=False), (left, 0))
        middle = left + (x + 0.5) * size[0] / image.shape[-1], (y + 0.5) * height / image.shape[-2]
        cell = min(height / weights.shape[0], size[0] / weights.shape[1])
        _dot(draw, *middle, max(1.0, min(cell / 6, height / 100)))
    return sheet  # type: ignore[no-any-return]


def _dot(draw: Any, x: float, y: float, radius: float) -> None:
    """Mark a point by a dot that is smaller than the cell it lies in."""
    for wide, colour in ((radius + max(1.0, radius / 2), "black"), (radius, "white")):
        draw.ellipse([x - wide, y - wide, x + wide, y + wide], fill=colour)
