"""Clusters of feature vectors, fitted once and applied at every pixel: segments without labels."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import LoftUpError, translate
from .files import MADE_BY, write_atomically

__all__ = ["Clusters"]

MOST = 256  # clusters, which 8 bits tell apart
SAMPLES = 65_536  # vectors that a fit looks at
COMPONENTS = 32  # principal components that vectors are compared in
STARTS = 4  # of k-means, of which the best is kept
NAMES = ("mean", "basis", "centres", "offsets", "whitening")


class Clusters:
    """Clusters of feature vectors; called on features, it gives each position the number of its cluster.

    Vectors are scaled to length 1 and compared in their first principal components. K-means takes the nearest centre, a
    Gaussian mixture the component of the highest posterior probability. Clusters are numbered from the most frequent in
    what they were fitted to.

    Examples:
        >>> from loftup import LoftUp, load_backbone
        >>> backbone, up, image = load_backbone("tiny"), LoftUp.from_pretrained("any"), torch.rand(1, 3, 64, 96)
        >>> features = backbone(image)
        >>> clusters = Clusters.fit(features, 4)
        >>> up(features, image, head=clusters).shape  # the 192-channel map never exists
        torch.Size([1, 64, 96])

    Args:
        mean: (C,), subtracted from every vector of length 1.
        basis: (C, D), what the rest is projected on.
        centres: (K, D).
        offsets: (K,), added to minus half the squared distances.
        whitening: (K, D, D), which distances of a Gaussian's component are measured in; None for k-means.
    """

    def __init__(
        self, mean: Tensor, basis: Tensor, centres: Tensor, offsets: Tensor, whitening: Tensor | None = None
    ) -> None:
        self.mean, self.basis, self.centres, self.offsets, self.whitening = mean, basis, centres, offsets, whitening
        self._place: tuple[Any, tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        """The number of clusters K."""
        return len(self.centres)

    @classmethod
    def fit(
        cls,
        features: Tensor | Sequence[Tensor],
        k: int,
        *,
        method: Literal["kmeans", "gaussian"] = "kmeans",
        seed: int = 0,
    ) -> "Clusters":
        """Fit to feature maps or vectors, each map weighing the same.

        K-means, and the Gaussian mixture with full covariances, are scikit-learn's.

        Args:
            features: one tensor or a sequence of them: maps (B, C, H, W) or (C, H, W), or vectors (N, C). At most
                65 536 vectors are looked at, evenly drawn.
            k: number of clusters, 1..256.
            method: "kmeans", or "gaussian" for a mixture of Gaussians, whose clusters may be long and of different
                sizes.
            seed: of the first centres.

        Returns:
            The clusters, on the CPU in float32.

        Raises:
            LoftUpError: scikit-learn is missing (extra ``segment``).
            ValueError: a shape, ``k`` or ``method`` is out of range, C differs, there are fewer vectors than clusters,
                or values are not finite.
        """
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MOST:
            raise ValueError(f"k must be a whole number from 1 to {MOST}, got {k!r}")
        if method not in ("kmeans", "gaussian"):
            raise ValueError(f"method must be 'kmeans' or 'gaussian', got {method!r}")
        with translate(ImportError, 'clusters need scikit-learn: pip install "loftup[segment]"'):
            from sklearn.decomposition import PCA
        vectors = _vectors(features, k)
        pca = PCA(min(COMPONENTS, *vectors.shape), random_state=seed).fit(vectors.numpy())
        mean, basis = (torch.from_numpy(array).float() for array in (pca.mean_, pca.components_.T.copy()))
        points = (vectors - mean) @ basis
        # Of variance 1 in the mean, for what the mixture adds to its covariances.
        scale = points.var(0, correction=0).mean().sqrt().clamp(min=1e-6)
        points, basis = points / scale, basis / scale
        clusters = cls(mean, basis, *_fitted(points, k, method, seed))
        order = torch.bincount(clusters._scores(points).argmax(-1), minlength=k).argsort(descending=True, stable=True)
        parts = (clusters.centres, clusters.offsets, clusters.whitening)
        return cls(mean, basis, *(None if part is None else part[order] for part in parts))  # type: ignore[arg-type]

    def __call__(self, features: Tensor) -> Tensor:
        """Number the cluster of each position.

        Args:
            features: (B, C, H, W) or (C, H, W), any float dtype and device.

        Returns:
            (B, H, W) or (H, W), uint8, on the features' device.

        Raises:
            ValueError: another shape, or another number of channels than the clusters were fitted to.
        """
        if features.ndim not in (3, 4) or features.shape[-3] != len(self.mean):
            expected = f"(B, {len(self.mean)}, H, W) or ({len(self.mean)}, H, W)"
            raise ValueError(
                f"features must be {expected}, as the clusters were fitted to, got {tuple(features.shape)}"
            )
        mean, basis, *_ = self._on(features.device)
        vectors = F.normalize(features.detach().movedim(-3, -1).float(), dim=-1)
        return self._scores((vectors - mean) @ basis).argmax(-1).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors on a device, kept for the next call."""
        if self._place is None or self._place[0] != device:
            tensors: tuple[Tensor, ...] = (self.mean, self.basis, self.centres, self.offsets)
            tensors += () if self.whitening is None else (self.whitening,)
            self._place = device, tuple(tensor.to(device) for tensor in tensors)
        return self._place[1]

    def _scores(self, points: Tensor) -> Tensor:
        """Projected vectors (..., D) to the clusters' scores (..., K)."""
        _, _, centres, offsets, *whitening = self._on(points.device)
        if not whitening:
            return points @ centres.mT + offsets
        scores = [
            offset - (0.5 * ((points - centre) @ white).square()).sum(-1)
            for centre, offset, white in zip(centres, offsets, whitening[0], strict=True)
        ]
        return torch.stack(scores, -1)

    def save(self, path: "str | os.PathLike[str]", **facts: str) -> None:
        """Write a safetensors file that :meth:`load` reads; ``facts`` go into its metadata."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {**facts, "made_by": MADE_BY})
        write_atomically(Path(path), content)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Clusters":
        """Read what :meth:`save` wrote.

        Raises:
            LoftUpError: the file is no such file.
            OSError: it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = Path(path).read_bytes()
        with translate(
            (SafetensorError, TypeError), lambda error: f"{path} holds no clusters that loftup saved: {error}"
        ):
            clusters = cls(**load(content))
        if len(clusters.centres) != len(clusters.offsets) or clusters.basis.shape[0] != len(clusters.mean):
            raise LoftUpError(f"{path} holds no clusters that loftup saved: shapes do not fit each other")
        return clusters


def _vectors(features: Tensor | Sequence[Tensor], k: int) -> Tensor:
    """Evenly drawn vectors of length 1, (N, C) float32 on the CPU."""
    given = [features] if isinstance(features, Tensor) else list(features)
    if not given:
        raise ValueError("no features given")
    rows = []
    for index, each in enumerate(given):
        if not isinstance(each, Tensor) or each.ndim not in (2, 3, 4) or not each.numel():
            shape = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"features {index} must be maps (B, C, H, W) or (C, H, W), or vectors (N, C), got {shape}")
        matrix = each if each.ndim == 2 else rearrange(each, "... c h w -> (... h w) c")
        places = torch.linspace(0, len(matrix) - 1, min(len(matrix), max(1, SAMPLES // len(given)))).long()
        rows.append(matrix.detach()[places.to(matrix.device)].cpu().float())
    if len(counts := {matrix.shape[1] for matrix in rows}) > 1:
        raise ValueError(f"features have different channel counts {sorted(counts)}, expected those of one backbone")
    vectors = torch.cat(rows)
    if not bool(vectors.isfinite().all()):
        raise ValueError("features hold values that are not finite")
    if len(vectors) < k:
        raise ValueError(
            f"there are {len(vectors)} vectors, expected at least k={k}; give a smaller k or more features"
        )
    return F.normalize(vectors, dim=1)


def _fitted(points: Tensor, k: int, method: str, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Centres, offsets and whitening of clusters of points (N, D)."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if method == "kmeans":
        found = KMeans(k, n_init=STARTS, random_state=seed).fit(points.numpy())
        centres = torch.from_numpy(found.cluster_centers_).float()
        return centres, -0.5 * centres.square().sum(1), None
    mixture = GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(points.double().numpy())
    whitening = torch.from_numpy(mixture.precisions_cholesky_)
    # Up to the constant that all share.
    spread = whitening.diagonal(dim1=1, dim2=2).log().sum(1)
    offsets = torch.from_numpy(mixture.weights_).clamp(min=math.ulp(0.0)).log() + spread
    return torch.from_numpy(mixture.means_).float(), offsets.float(), whitening.float()
