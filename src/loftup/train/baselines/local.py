"""Networks of other projects from local files: a checkout of their code and a file of their weights."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LoftUpError, one_line
from ...files import expect_file

__all__ = ["ANYUP", "JAFAR", "Project", "load_local"]

Weights = Mapping[str, Tensor]
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Project:
    """Where a project keeps its network.

    Args:
        module: of the network, dotted, below the folder of the code.
        network: name of its class.
        packages: top-level packages of the code, which are imported from the folder alone.
        key: under which the file of weights may hold the state dict.
        arguments: of the class, from the state dict.
        channels: of the features that the weights are for, from the state dict; None for any.
    """

    module: str
    network: str
    packages: tuple[str, ...]
    key: str = ""
    arguments: Callable[[Weights], dict[str, int]] = lambda state: {}
    channels: Callable[[Weights], int | None] = lambda state: None

    @property
    def file(self) -> str:
        """Path of the module below the folder."""
        return self.module.replace(".", "/") + ".py"


def _jafar_arguments(state: Weights) -> dict[str, int]:
    keys, image = (state.get(f"{name}.0.weight") for name in ("key_features_encoder", "image_encoder"))
    if keys is None or image is None:
        return {}  # comparing the state dicts says what is missing
    return {"qk_dim": keys.shape[0], "v_dim": keys.shape[1], "kernel_size": image.shape[-1]}


ANYUP = Project("anyup.model", "AnyUp", ("anyup",))
JAFAR = Project(
    "src.upsampler.jafar",
    "JAFAR",
    ("src", "utils"),
    key="jafar",
    arguments=_jafar_arguments,
    channels=lambda state: _jafar_arguments(state).get("v_dim"),
)


def load_local(name: str, argument: str, project: Project, channels: int) -> nn.Module:
    """Make another project's network from ``WEIGHTS@FOLDER``; this runs the code in the folder.

    Args:
        name: of the upsampler, for messages.
        argument: file of weights and folder of the code. The weights are read as tensors alone.
        project: what to look for in them.
        channels: of the backbone.

    Raises:
        LoftUpError: the argument has another form, a file or folder or the class is not there, a package that the code
            imports is missing, or the weights are of another network or for another number of channels.
    """
    weights, at, folder = argument.rpartition("@")
    if not at or not weights or not folder:
        raise LoftUpError(
            f"{name!r} needs its weights and a folder with its code; write {name}:WEIGHTS@FOLDER, where FOLDER holds "
            f"{project.file}, got {argument!r}"
        )
    code = Path(folder).expanduser()
    if not code.is_dir():
        raise LoftUpError(f"the folder of {name}'s code is not there: {code}")
    expect_file(code / project.file, f"the code of {name}")
    file = expect_file(Path(weights).expanduser(), f"the weights of {name}")
    state = _read(file, project.key)
    wanted = project.channels(state)
    if wanted not in (None, channels):
        raise LoftUpError(f"{file} was trained for {wanted} channels, the backbone has {channels}")
    module = _imported(name, code.resolve(), project)
    network = _network(module, code / project.file, project, state)
    _fill(network, state, file, project.network)
    _follow_the_device(module, network)
    return network


def _read(file: Path, key: str) -> Weights:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds, and so does one that holds more than tensors
        raise LoftUpError(f"cannot read weights from {file}: {one_line(error)[:300]}") from error
    state = content.get(key, content) if isinstance(content, dict) and key else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dict with {_some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        under = f", or one under {key!r}" if key else ""
        raise LoftUpError(f"expected a state dict{under} in {file}, found {found}")
    return state


@contextlib.contextmanager
def _importing_from(folder: Path, packages: tuple[str, ...]) -> Iterator[None]:
    """Find these packages in a folder alone, and forget them afterwards: names such as "utils" are others' too."""

    def taken() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    others = {name: sys.modules.pop(name) for name in taken()}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(others)


def _imported(name: str, folder: Path, project: Project) -> ModuleType:
    with _importing_from(folder, project.packages):
        try:
            return importlib.import_module(project.module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.partition(".")[0] in project.packages:
                path = missing.replace(".", "/")
                raise LoftUpError(
                    f"{name}'s code in {folder} is not whole: it lacks {path}; check out all of its repository"
                ) from error
            raise LoftUpError(
                f"{name}'s code needs the package {missing!r}, which is missing; install it: pip install {missing}"
            ) from error
        except Exception as error:  # code of others, which may raise anything
            raise LoftUpError(f"cannot import {project.module} from {folder}: {one_line(error)}") from error


def _network(module: ModuleType, file: Path, project: Project, state: Weights) -> nn.Module:
    kind: Any = getattr(module, project.network, None)
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise LoftUpError(
            f"expected the class {project.network}, a torch.nn.Module, in {file}; it has {_some(classes)}"
        )
    arguments = project.arguments(state)
    try:
        network: nn.Module = kind(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise LoftUpError(f"cannot make {project.network}({given}) of {file}: {one_line(error)}") from error
    return network


def _fill(network: nn.Module, state: Weights, file: Path, name: str) -> None:
    own = network.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    wrong = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    if any(wrong.values()):
        faults = "; ".join(f"{fault}: {_some(keys)}" for fault, keys in wrong.items() if keys)
        raise LoftUpError(f"the weights in {file} are not those of this {name}: {faults}")
    network.load_state_dict(dict(state))


def _follow_the_device(module: ModuleType, network: nn.Module) -> None:
    """Let coordinates that the module makes lie where the network is: JAFAR's are on "cuda" unless that is said."""
    original = getattr(module, "create_coordinate", None)
    if original is None or "device" not in inspect.signature(original).parameters:
        return

    def create_coordinate(*sides: int, **options: Any) -> Tensor:
        if options.get("device") is None:
            options["device"] = next(network.parameters()).device
        return original(*sides, **options)  # type: ignore[no-any-return]

    module.create_coordinate = create_coordinate  # type: ignore[attr-defined]


def _some(names: Any) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "nothing") + more
