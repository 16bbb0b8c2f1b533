"""Losses and scores of depth and surface normals."""

import torch
from torch import Tensor

from ..result import Metric

__all__ = [
    "DEPTH_METRICS",
    "NORMALS_METRICS",
    "cosine_loss",
    "depth_scores",
    "normals_scores",
    "scale_invariant_log_loss",
]

DEPTH_METRICS = {
    "rmse": Metric("RMSE m", 4, higher_is_better=False),
    "abs_rel": Metric("abs rel", 4, higher_is_better=False),
    "delta_1": Metric("delta < 1.25 %", 2),
    "delta_2": Metric("delta < 1.25^2 %", 2),
    "delta_3": Metric("delta < 1.25^3 %", 2),
}
NORMALS_METRICS = {
    "rmse": Metric("RMSE deg", 2, higher_is_better=False),
    "mean": Metric("mean deg", 2, higher_is_better=False),
    "median": Metric("median deg", 2, higher_is_better=False),
    "recall_11": Metric("< 11.25 deg %", 2),
    "recall_22": Metric("< 22.5 deg %", 2),
    "recall_30": Metric("< 30 deg %", 2),
}


def scale_invariant_log_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean square of the log ratio less half of its squared mean (Eigen et al. 2014), averaged over pictures.

    Args:
        prediction: (B, 1, H, W), positive.
        truth: (B, 1, H, W), positive; NaN pixels do not count.
    """
    finite = truth.isfinite()
    # Unknown pixels become 1 before the logarithm, whose gradient would turn NaN for others too.
    ratio = (prediction.where(finite, 1.0).log() - truth.where(finite, 1.0).log()).flatten(1)
    count = finite.flatten(1).sum(1).clamp(min=1)
    return ((ratio**2).sum(1) / count - 0.5 * (ratio.sum(1) / count) ** 2).mean()


def cosine_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """1 less the cosine between unit vectors (B, 3, H, W), averaged over the pixels whose truth is not NaN."""
    finite = truth.isfinite().all(1, keepdim=True)
    cosine = (prediction * truth.where(finite, 0.0)).sum(1, keepdim=True)
    return ((1 - cosine) * finite).sum() / finite.sum().clamp(min=1)


def depth_scores(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """DEPTH_METRICS of N pixels, (1, N) metres each: errors, and percentages of ratios below a bound."""
    ratio = torch.maximum(prediction / truth, truth / prediction)
    return {
        "rmse": float((prediction - truth).square().mean().sqrt()),
        "abs_rel": float(((prediction - truth).abs() / truth).mean()),
        **{f"delta_{k}": 100 * float((ratio < 1.25**k).double().mean()) for k in (1, 2, 3)},
    }


def normals_scores(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """NORMALS_METRICS of N pixels, (3, N) unit vectors each: angles in degrees, and percentages of small ones."""
    # The arc cosine would lose what is below 0.02 degrees.
    sine = torch.linalg.vector_norm(torch.linalg.cross(prediction, truth, dim=0), dim=0)
    angle = torch.atan2(sine, (prediction * truth).sum(0)).rad2deg()
    return {
        "rmse": float(angle.square().mean().sqrt()),
        "mean": float(angle.mean()),
        "median": float(angle.quantile(0.5)),
        **{f"recall_{int(bound)}": 100 * float((angle < bound).double().mean()) for bound in (11.25, 22.5, 30.0)},
    }
