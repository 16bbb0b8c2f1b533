"""Sizes, times and costs of an extraction before it is begun."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..progress import readable
from .codec import shard
from .compute import Extractor
from .decode import load, result_size
from .sources import Place

__all__ = ["Estimate", "bytes_of_picture", "estimate"]

SIDES = 375, 500  # (H, W) of the picture that sizes are estimated for before one is read
SHARE = 0.9  # of N times one worker's rate, that N workers are reckoned with
SAMPLE = 32  # pictures that are tried
REGIONS = 20  # of a picture, where nobody has counted


@dataclass(frozen=True)
class Estimate:
    """The size, time and cost of an extraction, by a sample of its pictures on this machine.

    Attributes:
        pictures: in all.
        sample: pictures that were tried.
        failed: of the sample.
        bytes: of all shards.
        read: seconds a picture to read, decode and resize.
        compute: seconds a picture for the networks, and to encode what they give.
        workers: that the hours are for.
    """

    pictures: int
    sample: int
    failed: int
    bytes: float
    read: float
    compute: float
    workers: int

    @property
    def rate(self) -> float:
        """Pictures a second of all workers, where reading overlaps with computing: SHARE * workers / (read + compute).

        On CPUs both take the same processors; beside a GPU, whose pictures others decode meanwhile, it is more.
        """
        return SHARE * self.workers / max(1e-9, self.read + self.compute)

    @property
    def hours(self) -> float:
        """For all pictures."""
        return self.pictures / self.rate / 3600

    @property
    def million(self) -> float:
        """Hours for a million pictures."""
        return 1e6 / self.rate / 3600

    def lines(self, price: float | None = None) -> list[str]:
        """The estimate in sentences; ``price`` is of an hour of a machine with these workers."""
        each = self.read + self.compute
        said = [
            f"{self.pictures} pictures, {self.sample} of them tried"
            + (f", {self.failed} of these cannot be read" if self.failed else ""),
            f"output: {readable(self.bytes)}, {self.bytes / max(1, self.pictures) / 1e3:.3g} kB a picture",
            f"one worker: {1000 * each:.0f} ms a picture, {1000 * self.read:.0f} of them to read and decode it",
            f"{self.workers} worker{'s' if self.workers > 1 else ''}: {SHARE} * {self.workers} / {each:.4g} s = "
            f"{self.rate:.3g} a second, {_time(self.hours)} for all, {_time(self.million)} a million",
        ]
        if price is not None:
            said.append(f"cost: {self.million:.3g} h * {price:g} an hour = {self.million * price:.3g} a million")
        return said


def _time(hours: float) -> str:
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"


def estimate(extractor: Extractor, places: Sequence[Place], workers: int = 1) -> Estimate:
    """Try some pictures, evenly spread, and reckon with all; ``places`` must not be empty."""
    count = min(SAMPLE, len(places))
    chosen = [places[index * len(places) // count] for index in range(count)]
    settings = extractor.settings
    extractor.rows(load(chosen[: settings.batch], settings))  # the first call of a network takes longer
    start = time.perf_counter()
    pictures = load(chosen, settings)
    read = time.perf_counter() - start
    start = time.perf_counter()
    rows, errors = extractor.rows(pictures)
    content = shard(rows, settings.as_json(), extractor.networks, 0)
    compute = time.perf_counter() - start
    good = max(1, len(rows))
    return Estimate(
        len(places), count, len(errors), len(content) / good * len(places), read / count, compute / good, workers
    )


def bytes_of_picture(extractor: Extractor, size: tuple[int, int] = SIDES) -> float:
    """The bytes that a picture of a size takes in a shard, some percent more or less."""
    settings, backbone = extractor.settings, extractor.backbone
    height, width = size
    scale = min(settings.input, min(size)) / min(size)
    stride = float(backbone.stride)
    cells = max(1.0, height * scale / stride) * max(1.0, width * scale / stride)
    high, wide = result_size(settings, height, width)
    points = settings.points[0] * settings.points[1] if settings.points else 0
    vectors = {"features": cells, "points": points, "regions": REGIONS, "dense": high * wide}
    item, classes = (1 if settings.store == "uint8" else 2), extractor.head.out_features if extractor.head else 0
    sizes = {name: item * backbone.channels * count for name, count in vectors.items()}
    sizes |= {"pooled": 4 * backbone.channels, "labels": high * wide, "logits": item * classes * high * wide}
    return float(200 + sum(sizes[name] for name in settings.save) + (0.15 * high * wide if settings.images else 0))
