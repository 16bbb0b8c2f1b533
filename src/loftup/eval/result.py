"""Results, which every task returns."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Metric", "Result", "spread"]


@dataclass(frozen=True)
class Metric:
    """Form of a number in tables: its heading with the unit, decimals, and whether more is better."""

    heading: str
    decimals: int = 1
    higher_is_better: bool = True


@dataclass
class Result:
    """Numbers, details and pictures of one upsampler on one dataset.

    Args:
        metrics: name to one value per seed (a single one where nothing is random); percentages where the field has
            percentages.
        details: table by name ("classes", "sequences"), of rows by name, of columns: means over the seeds.
        pictures: rows of a figure, each caption to picture, all of one size; "image" and "truth" first, then "ours",
            the method's prediction.
    """

    metrics: dict[str, list[float]]
    details: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pictures: list[dict[str, "Image.Image"]] = field(default_factory=list)


def spread(total: int, count: int) -> set[int]:
    """Numbers of ``count`` pictures of ``total``, evenly spread, as neighbours are often frames of one film."""
    return {index * total // count for index in range(count)} if count < total else set(range(total))
