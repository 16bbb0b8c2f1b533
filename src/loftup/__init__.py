"""loftup: pixel-dense features from any vision backbone."""

from typing import TYPE_CHECKING, Any

from .errors import LoftUpError

if TYPE_CHECKING:
    from .backbones import Backbone, Upsampled, load_backbone, wrap
    from .model import LoftUp, LoftUpConfig
    from .published import list_pretrained

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "LoftUp",
    "LoftUpConfig",
    "LoftUpError",
    "Upsampled",
    "__version__",
    "list_pretrained",
    "load_backbone",
    "wrap",
]

_HOME = {
    "Backbone": "backbones",
    "LoftUp": "model",
    "LoftUpConfig": "model",
    "Upsampled": "backbones",
    "list_pretrained": "published",
    "load_backbone": "backbones",
    "wrap": "backbones",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import loftup` and the command's --help do not wait for torch.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
