"""The two networks, as modules of whole tensors; they know no bands, files or names."""

from torch import nn

from .config import Config, LoftUpConfig, UniversalConfig
from .layers import ChannelNorm
from .loftup import LoftUpNetwork
from .universal import UniversalNetwork

__all__ = ["build_network", "build_norm"]


def build_network(config: Config) -> LoftUpNetwork | UniversalNetwork:
    """The network of a config, with random weights."""
    return UniversalNetwork(config) if isinstance(config, UniversalConfig) else LoftUpNetwork(config)


def build_norm(config: Config) -> nn.Module:
    """The norm of the features before the network of a config."""
    if isinstance(config, LoftUpConfig) and config.channel_norm == "layer":
        return ChannelNorm(config.channels)
    return nn.Identity()
