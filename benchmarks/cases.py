"""The shapes that are measured: real backbones' channels, grids and output sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        channels: C.
        size: side of the square output.
        grid: side of the square feature grid.
        batch: images at once.
        ours_only: the published way would not fit into memory.
        head: output channels of a 1x1 convolution applied on the way, 0 for none.
        points: take features at so many points in place of the map, 0 for the map.
        quick: part of ``--quick``.
    """

    channels: int
    size: int
    grid: int
    batch: int = 1
    ours_only: bool = False
    head: int = 0
    points: int = 0
    quick: bool = False

    @property
    def name(self) -> str:
        """Short name, such as ``c384_448_32x32_b1``."""
        extra = f"_head{self.head}" if self.head else f"_at{self.points}" if self.points else ""
        return f"c{self.channels}_{self.size}_{self.grid}x{self.grid}_b{self.batch}{extra}"

    @property
    def gflop(self) -> float:
        """Multiplications and additions of the direct algorithm, in 10^9 (the map's, also for ``head``)."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """The same of the 3x3 convolutions, of attention (both products), and of the other matrix products."""
        pixels, tokens, width = self.batch * self.size**2, self.grid**2, self.channels + 20
        linear = pixels * (2 * (2 * width * width + 2 * width * self.channels) + width * self.channels)
        return {
            "convolution": 2 * pixels * 9 * width * (203 + width) / 1e9,
            "attention": 2 * pixels * 2 * 2 * tokens * width / 1e9,
            "matrix": 2 * (linear + self.batch * tokens * 2 * 2 * width * width) / 1e9,
        }


CASES = (
    Case(384, 224, 16, quick=True),
    Case(384, 336, 24),
    Case(384, 448, 32, quick=True),
    Case(384, 1024, 37, ours_only=True, quick=True),
    Case(384, 1024, 37, ours_only=True, head=21),
    Case(384, 1024, 37, ours_only=True, points=1000, quick=True),
    Case(384, 1024, 73, ours_only=True),
    Case(512, 224, 14),
    Case(768, 224, 16),
    Case(768, 1024, 37, ours_only=True, head=21),
    Case(384, 224, 16, batch=8),
)
