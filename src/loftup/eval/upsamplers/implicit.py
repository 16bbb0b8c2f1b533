"""FeatUp's implicit upsampler: a small network fitted to one image."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbones import Backbone
from ...errors import LoftUpError
from ...inputs import resize_guidance
from ...networks.layers import MinMaxScale, grid_coordinates
from ...progress import track
from ...train.objective.multi_view import AttentionDownsampler, Motion, draw_motions
from ..features import extract
from .registry import Upsampler, register

__all__ = ["ImplicitUpsampler"]

FREQUENCIES = 10
VIEWS_KEPT = 200


@dataclass
class ImplicitUpsampler:
    """Fit an MLP from Fourier features of position and colour to dense features, for every image anew.

    Fu et al., *FeatUp*, ICLR 2024: the MLP's map, moved as the image is and downsampled by a learned attention
    downsampler, must equal the backbone's features of the moved image, over many small zooms, shifts and flips. It
    follows the published one in this, in the reduction of the features to principal components and in the network's
    size (0.4M parameters for 128 components); codes are sines and cosines of ``FREQUENCIES`` octaves instead of
    random frequencies, and no uncertainty weighs the views. Minutes an image instead of milliseconds.

    Args:
        backbone: frozen, to look at the moved images.
        steps: of the optimizer; one batch of views each.
        components: principal components of the features that are fitted; the others keep their bilinear values.
        rate: learning rate of Adam.
        seed: of the views and the first weights.

    Attributes:
        losses: mean squared error of every step of the last image fitted, in variances of the components.
    """

    backbone: Backbone
    steps: int = 1000
    components: int = 128
    rate: float = 3e-3
    seed: int = 0
    losses: list[float] = field(default_factory=list, init=False)

    def __call__(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) and the image (B, 3, H, W) in [0, 1] to (B, C, H', W'); every image is fitted."""
        pairs = zip(features, image, strict=True)
        with torch.inference_mode(False), torch.enable_grad():
            maps = [self._fit(f[None].clone().float(), i[None].clone(), size) for f, i in pairs]
        return torch.cat(maps).to(features.dtype) if maps else features.new_empty(0, features.shape[1], *size)

    def _fit(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        stride = self.backbone.stride  # of shifted views it need not be whole, but the picture's sides are
        cells = features.shape[-2:]
        image = resize_guidance(image, (int(cells[0] * stride), int(cells[1] * stride)))
        views = self._views(image)
        reduction = _Reduction.of(torch.cat([features, *(target for _, target in views)]), self.components)
        targets = [reduction(target) for _, target in views]
        # Below the image's own resolution the map is cheaper by the square, and sharper than a cell still.
        cell = int(stride) // max(1, int(stride) // 4)
        working = (cells[0] * cell, cells[1] * cell)
        guidance = F.interpolate(image, working, mode="area")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _network(reduction.count).to(image.device)
            downsampler = AttentionDownsampler(reduction.count, cell).to(image.device)
        parameters = [*network.parameters(), *downsampler.parameters()]
        optimizer = torch.optim.Adam(parameters, self.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, max(2, self.steps), pct_start=0.1)
        code = _code(guidance)
        generator = torch.Generator().manual_seed(self.seed)
        self.losses = []
        progress = tqdm(range(self.steps), "fit one image", leave=False, disable=None)
        for _ in progress:
            dense = network(code)
            batch = torch.randint(len(views), (4,), generator=generator).tolist()
            errors = [F.mse_loss(downsampler(views[index][0](dense)), targets[index]) for index in batch]
            loss = torch.stack(errors).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.losses.append(float(loss.detach()))
            progress.set_postfix(loss=f"{self.losses[-1]:.4f}")
        with torch.no_grad():
            components = network(_code(resize_guidance(image, size)))
            rest = features - reduction.back(reduction(features))
            return reduction.back(components) + F.interpolate(rest, size, mode="bilinear", align_corners=False)

    def _views(self, image: Tensor) -> list[tuple[Motion, Tensor]]:
        """Motions and the backbone's features of the moved images; the image itself comes first."""
        count = min(VIEWS_KEPT, 4 * self.steps)
        views = draw_motions(self.seed, 0, views=count, zoom=1.8, shift=0.25, flip=0.5)
        motions = [Motion(1.0, (0.0, 0.0), False), *views]
        return [
            (motion, extract(self.backbone, motion(image))) for motion in track(motions, "look at views", leave=False)
        ]


@dataclass(frozen=True)
class _Reduction:
    """Principal components of features, each in units of the first one's deviation."""

    mean: Tensor
    basis: Tensor  # (C, count)
    scale: float

    @classmethod
    def of(cls, features: Tensor, count: int) -> "_Reduction":
        vectors = rearrange(features, "b c h w -> (b h w) c")
        mean = vectors.mean(0)
        covariance = (vectors - mean).T @ (vectors - mean) / len(vectors)
        variances, basis = torch.linalg.eigh(covariance.double())
        first = basis.flip(1)[:, : min(count, len(mean))].float()
        return cls(mean, first, max(1e-12, math.sqrt(float(variances.clamp(min=0).mean()))))

    @property
    def count(self) -> int:
        return self.basis.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        centred = x - self.mean[:, None, None]
        return torch.einsum("bchw,ck->bkhw", centred, self.basis) / self.scale

    def back(self, x: Tensor) -> Tensor:
        return torch.einsum("bkhw,ck->bchw", x * self.scale, self.basis) + self.mean[:, None, None]


def _network(channels: int, width: int = 320) -> nn.Sequential:
    inputs = 5 * 2 * FREQUENCIES + 5
    widths = (inputs, width, width, width)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Conv2d(width, channels, 1))


def _code(guidance: Tensor) -> Tensor:
    """(B, 3, H, W) to position and colour with sines and cosines of ``FREQUENCIES`` octaves."""
    coordinates = grid_coordinates(guidance.shape[-2], guidance.shape[-1], guidance.device)
    values = torch.cat([coordinates.expand(len(guidance), -1, -1, -1), 2 * MinMaxScale()(guidance)], 1)
    octaves = 2.0 ** torch.linspace(-1, 6, FREQUENCIES, device=guidance.device)
    angles = rearrange(values[:, None] * octaves[:, None, None, None], "b k c h w -> b (k c) h w") * math.pi / 2
    return torch.cat([values, angles.sin(), angles.cos()], 1)


@register("featup_implicit")
def _featup_implicit(backbone: Backbone, argument: str) -> Upsampler:
    if argument and not (argument.isdecimal() and int(argument)):
        expected = "the number of steps an image, a positive integer"
        raise LoftUpError(
            f"the argument of 'featup_implicit' is {expected}, got {argument!r}; write featup_implicit:1000"
        )
    return ImplicitUpsampler(backbone, int(argument or 1000))
