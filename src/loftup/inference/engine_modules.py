"""The published network by its own modules, for one with parts that cannot be folded: replaced or hooked ones."""

import torch
from torch import Tensor

from ..networks.layers import Box, Stem, reach
from ..networks.loftup import LoftUpNetwork
from .engine import StemReader
from .fold import is_plain

__all__ = ["ModuleEngine", "fits_bands"]


def fits_bands(network: LoftUpNetwork) -> bool:
    """Tell whether a network may be computed band by band: stem and head see a known halo at most.

    Modules of the blocks are taken to work token by token, as a replaced linear layer does.
    """
    local = type(network.first_conv) is Stem and network.first_conv.halo is not None
    # Bands do not call these two as a whole.
    return local and reach(network.final_conv) == 0 and is_plain(network) and is_plain(network.fourier_feat)


class ModuleEngine:
    """An engine that calls the network's modules, band by band; see :class:`loftup.inference.engine.FoldedEngine`.

    Hooks see one band at a time. Points cost the part of their row that lies between them.

    Args:
        network: for which :func:`fits_bands` has no objection.
    """

    in_threads = False  # hooks and modules of the user's own may not bear it

    def __init__(self, network: LoftUpNetwork) -> None:
        self.network = network
        self.channels, self.width = network.config.channels, network.config.width
        assert network.first_conv.halo is not None
        self.halo = network.first_conv.halo

    arithmetic = staticmethod(torch.no_grad)  # autocast as the caller has it, for the modules follow it

    def rows(self, width: int, budget: int) -> int:
        """How many rows of a strip fit a budget in bytes; 0 if none does."""
        code = 10 * self.network.config.image_frequencies + 3
        item = self.network.dtype.itemsize
        return max(0, budget // (width * item * (5 * code + 9 * self.width + 2 * self.channels)) - 2 * self.halo)

    def keys_values(self, tokens: Tensor) -> Tensor:
        """The tokens (1, T, D): the modules project them."""
        return tokens

    def stem(self, scaled: Tensor, left: int, right: int, band: int) -> StemReader:
        """Start reading the stem's output for a strip of columns from the top."""
        return StemReader(self.queries, scaled, left, right)

    def queries(self, scaled: Tensor, box: Box) -> Tensor:
        """The stem's output for a box of (3, H, W): (n * m, D)."""
        return self.network.stem(scaled[None], box)[0]

    def write(self, queries: Tensor, memory: Tensor, out: Tensor) -> None:
        """Blocks and head: stem output (n * m, D) to a box (C, n, m) of the result."""
        x = self.network.ca_transformer(queries[None], memory)
        out.copy_(self.network.head(x, out.shape[1], out.shape[2])[0])

    def at(self, scaled: Tensor, memory: Tensor, pixels: Tensor) -> Tensor:
        """Features (n, C) at pixels, row by row of the image."""
        width = scaled.shape[2]
        features = scaled.new_empty(len(pixels), self.channels, dtype=self.network.dtype)
        for row in (pixels // width).unique().tolist():
            here = pixels // width == row
            columns = pixels[here] % width
            first, last = int(columns.min()), int(columns.max())
            queries = self.queries(scaled, (row, first, row + 1, last + 1))
            x = self.network.ca_transformer(queries[None, columns - first], memory)
            features[here] = self.network.head(x, 1, len(columns))[0, :, 0].mT.to(features.dtype)
        return features
