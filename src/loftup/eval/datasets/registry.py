"""Datasets by name, open to others."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import LoftUpError, suggest
from ..catalogue import TASKS
from .base import KINDS, Dataset

__all__ = ["names", "open_dataset", "register"]

Reader = Callable[[Path], Dataset[Any]]
_READERS: dict[tuple[str, str], Reader] = {}
# Modules of this package that register readers when they are imported.
_MODULES = ("segmentation", "geometry", "video", "interactive", "correspondence")


def register(name: str, kind: str) -> Callable[[Reader], Reader]:
    """Add a reader, a function of the dataset's folder, under a name, as its decorator.

    One name may stand for datasets of several kinds, each with its own reader.

    Args:
        name: of the dataset.
        kind: of its samples, of KINDS; every task on that kind takes it.

    Raises:
        ValueError: there is such a dataset of that kind already, or no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of samples; expected one of {', '.join(KINDS)}")
    if (name, kind) in _READERS:
        raise ValueError(f"there is a dataset {name!r} of {kind} already; choose another name")

    def add(reader: Reader) -> Reader:
        _READERS[name, kind] = reader
        return reader

    return add


def names(task: str) -> list[str]:
    """Datasets that a task can be done on, "synthetic" among them."""
    for module in _MODULES:
        import_module(f".{module}", __package__)
    return ["synthetic", *(name for name, kind in _READERS if kind == TASKS[task].data)]


def open_dataset(spec: str, task: str) -> Dataset[Any]:
    """Open ``"NAME:PATH"``, or ``"synthetic"`` for rendered scenes, for a task.

    Args:
        spec: name and folder of the dataset; see :func:`names` and each reader for the files expected in it.
        task: a name of :data:`loftup.eval.catalogue.TASKS`.

    Raises:
        LoftUpError: there is no such dataset for the task, or a file or folder of it is missing; it names the file.
    """
    name, _, path = spec.partition(":")
    choices = names(task)
    if name not in choices:
        hint = suggest(name, choices, 3).rstrip() or f"expected {', '.join(choices)}"
        raise LoftUpError(f"there is no dataset {name!r} for {task}; {hint}")
    if name == "synthetic":
        from .synthetic import synthetic

        if path:
            raise LoftUpError(f"'synthetic' is rendered and has no folder, got {spec!r}; write synthetic")
        return synthetic(task)
    if not path:
        raise LoftUpError(f"the dataset {name!r} needs its folder; write {name}:FOLDER")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise LoftUpError(f"the folder of {name!r} is not there: {folder}")
    return _READERS[name, TASKS[task].data](folder)
