"""loftup: pixel-dense features from any vision backbone."""

from typing import TYPE_CHECKING, Any

from .errors import LoftUpError
from .version import __version__

if TYPE_CHECKING:
    from . import viz
    from .backbones import Backbone, load_backbone, wrap
    from .inference.choose import explain
    from .matching import Matches, match
    from .model import LoftUp
    from .networks.config import LoftUpConfig, UniversalConfig
    from .scale.reader import open as open  # not in __all__, or it would take the place of the built-in one
    from .upsampled import Upsampled
    from .weights.catalogue import list_pretrained


__all__ = [
    "Backbone",
    "LoftUp",
    "LoftUpConfig",
    "LoftUpError",
    "Matches",
    "UniversalConfig",
    "Upsampled",
    "__version__",
    "explain",
    "list_pretrained",
    "load_backbone",
    "match",
    "viz",
    "wrap",
]

_HOME = {
    "Backbone": "backbones",
    "LoftUp": "model",
    "LoftUpConfig": "networks.config",
    "Matches": "matching",
    "UniversalConfig": "networks.config",
    "Upsampled": "upsampled",
    "explain": "inference.choose",
    "list_pretrained": "weights.catalogue",
    "load_backbone": "backbones",
    "match": "matching",
    "open": "scale.reader",
    "wrap": "backbones",
}


if not TYPE_CHECKING:  # or checkers would let any name pass

    def __getattr__(name: str) -> Any:
        # Loaded on first use, so that `import loftup` and the command's --help do not wait for torch.
        from importlib import import_module

        if name == "viz":
            return import_module(".viz", __name__)
        if name in _HOME:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})
