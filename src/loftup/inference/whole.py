"""A network called on whole images: for networks with parts that may see further than a stream can tell."""

from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import resize_guidance
from .canvas import Canvas, sample

__all__ = ["Whole"]


class Whole:
    """One call of the network for each image, under the caller's autocast; memory grows with the image."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network

    def upsample(self, features: Tensor, image: Tensor, canvas: Canvas, memory: int | None) -> None:
        """See :meth:`loftup.inference.bands.Bands.upsample`; a ``memory`` is refused, for it cannot be kept to."""
        if memory is not None:
            raise ValueError(
                f"memory={memory} cannot be kept: this network is computed on the whole image at once, and "
                "loftup.explain(up) says why; leave memory out"
            )
        for index in range(len(image)):
            with torch.no_grad():
                dense = self._dense(features, image, index, canvas.size)
            canvas.paint(index, (0, 0, *canvas.size), lambda out, dense=dense: out.copy_(dense), torch.no_grad)  # type: ignore[misc]

    def at(self, features: Tensor, image: Tensor, size: tuple[int, int], points: Tensor, out: Tensor) -> None:
        """See :meth:`loftup.inference.bands.Bands.at`."""
        with torch.no_grad():
            for index in range(len(image)):
                flat = self._dense(features, image, index, size).flatten(1)
                out[index] = sample(points[index], size, points.numel(), lambda pixels, flat=flat: flat[:, pixels].mT)  # type: ignore[misc]

    def _dense(self, features: Tensor, image: Tensor, index: int, size: tuple[int, int]) -> Tensor:
        one = slice(index, index + 1)
        guidance = resize_guidance(image[one], size, self.network.config.oversampling)
        return self.network(features[one], guidance)[0]  # type: ignore[no-any-return]
