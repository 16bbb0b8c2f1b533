"""Upsamplers by name, open to others."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Protocol

from torch import Tensor

from ...backbones import Backbone
from ...errors import LoftUpError, suggest

__all__ = ["Factory", "Make", "Upsampler", "check_name", "create", "names", "register"]


class Upsampler(Protocol):
    """The form of every upsampler: a callable, often an ``nn.Module`` in ``eval()`` mode.

    One that need not make the whole map may also have ``at(features, image, points, size)`` and take ``head=``, as
    :class:`loftup.LoftUp` does; :mod:`loftup.eval.features` uses them where they are.
    """

    def __call__(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample features.

        Args:
            features: (B, C, h, w) float, straight from the backbone.
            image: (B, 3, H, W) float in [0, 1], the picture that the features were taken from.
            size: (H', W') of the result in pixels.

        Returns:
            (B, C, H', W') in the dtype of ``features``.
        """


Factory = Callable[..., Upsampler]  # of the backbone, the argument and, around another upsampler, what makes that
Make = Callable[[str, Backbone], Upsampler]
_FACTORIES: dict[str, Factory] = {}
_REMOTE: dict[str, str] = {}  # names of those that run the code of a repository, and which
_AROUND: set[str] = set()  # names of those around another
# Modules of this package that register upsamplers when they are imported.
_MODULES = ("simple", "anew", "bilateral", "implicit", "hub", "learned")


def register(name: str, remote: str = "", around: bool = False) -> Callable[[Factory], Factory]:
    """Add an upsampler under a name, as a decorator of its factory.

    >>> @register("zeros")
    ... def zeros(backbone, argument):
    ...     return lambda features, image, size: features.new_zeros(*features.shape[:2], *size)

    The factory is called with the backbone and the text behind the colon of ``"name:text"`` ("" without a colon): the
    weights of a learned upsampler, the factor of an enlargement.

    Args:
        name: of the upsampler.
        remote: repository whose code it runs, "OWNER/NAME at COMMIT"; it is made only where that is asked for.
        around: whether it is put around another upsampler: the factory is called with a third value, a function from
            another's ``"name:text"`` and its backbone to that upsampler.

    Raises:
        ValueError: the name is taken, or holds a colon, a comma or an equals sign.
    """
    if not name or set(name) & set(":,="):
        raise ValueError(f"the name of an upsampler must not be empty or hold any of ':,=', got {name!r}")

    def add(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise ValueError(f"there is an upsampler {name!r} already; choose another name")
        _FACTORIES[name] = factory
        if remote:
            _REMOTE[name] = remote
        if around:
            _AROUND.add(name)
        return factory

    return add


def names() -> list[str]:
    """Names of all upsamplers, in the order of their registration."""
    for module in _MODULES:
        import_module(f".{module}", __package__)
    return list(_FACTORIES)


def create(spec: str, backbone: Backbone, *, trust_remote_code: bool = False) -> Upsampler:
    """Make the upsampler that ``"name"`` or ``"name:argument"`` stands for.

    Args:
        spec: of the upsampler, such as ``"bilinear"``, ``"loftup:runs/stage1"`` or ``"views:4:loftup:any"``.
        backbone: that the features come from.
        trust_remote_code: let it run the code of another repository.

    Raises:
        LoftUpError: there is no such name, it runs the code of another repository and that is not asked for, or its
            factory refuses the argument or the backbone.
    """
    check_name(spec, trust_remote_code=trust_remote_code)
    name, _, argument = spec.partition(":")
    if name in _AROUND:
        return _FACTORIES[name](backbone, argument, partial(create, trust_remote_code=trust_remote_code))
    return _FACTORIES[name](backbone, argument)


def check_name(spec: str, *, trust_remote_code: bool = False) -> None:
    """Raise the errors of :func:`create` that need no backbone: an unknown name, code that is not trusted."""
    name, choices = spec.partition(":")[0], names()
    if name not in choices:
        hint = suggest(name, choices, 3).rstrip() or f"expected {', '.join(choices)}"
        raise LoftUpError(f"there is no upsampler {name!r}; {hint}")
    if name in _REMOTE and not trust_remote_code:
        raise LoftUpError(
            f"the upsampler {name!r} runs code of {_REMOTE[name]}, which is not loftup's; read it, and if you trust it "
            "give --trust-remote-code (in Python: trust_remote_code=True)"
        )
