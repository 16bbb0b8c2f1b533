"""The folder of a run: new, to be resumed, or to be refused."""

import dataclasses
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from ...errors import LoftUpError, translate
from ...files import MADE_BY, alone_in, made_here, refuse_others, write_atomically
from ...weights.names import CONFIG as UP_CONFIG
from ...weights.names import SAFETENSORS
from ..config import TrainConfig, checked, to_yaml
from .checkpoint import differences, latest_checkpoint, load_checkpoint

__all__ = ["AT_THE_END", "CARD", "CONFIG", "check_data", "hold_folder", "open_folder", "write_config"]

CONFIG, CARD = "train.yaml", "README.md"
AT_THE_END = (CARD, UP_CONFIG, SAFETENSORS)  # of a run these are written, the others while it lasts
DURING = ("log.csv", "validation.csv", "checkpoints", "pictures", "tensorboard")


def hold_folder(config: TrainConfig, stack: ExitStack) -> None:
    """Hold a run's folder for as long as the stack lasts; LoftUpError if another run has it or it cannot be made."""
    folder = Path(config.output).expanduser()
    with _writing(folder):
        stack.enter_context(alone_in(folder, ["checkpoints", "pictures"]))


def open_folder(config: TrainConfig, pictures: int, resume: bool) -> dict[str, Any] | None:
    """Make a run's folder, or find the checkpoint to go on from.

    A folder in which a start failed, without a checkpoint, weights or a line of the log, is as good as new.
    ``pictures`` are those of a step, in all processes.

    Returns:
        The last checkpoint; None for a run that begins.

    Raises:
        LoftUpError: the folder holds a run and ``resume`` is not set, or that run had another config; it holds files
            of the user's that would be overwritten; or a push is asked for without a token.
    """
    folder = Path(config.output).expanduser()
    path = latest_checkpoint(folder / "checkpoints")
    if not resume and (evidence := path.name if path else _evidence(folder)):
        remedy = "go on with it by --resume, or take another folder: output=..."
        raise LoftUpError(f"{folder} holds a run already ({evidence}); {remedy}")
    if config.hub:
        import huggingface_hub

        if huggingface_hub.get_token() is None:
            remedy = "log in with `hf auth login` before training"
            raise LoftUpError(f"pushing to {config.hub!r} needs a Hub token: {remedy}")
    state = load_checkpoint(path) if path else None
    if state is not None:
        _check_same(config, pictures, state, str(path))
    _check_own(folder, state is not None)
    return state


def write_config(config: TrainConfig) -> None:
    """Write the config into the folder of a run that can start; LoftUpError if that fails."""
    folder = Path(config.output).expanduser()
    with _writing(folder):
        write_atomically(folder / CONFIG, f"# {MADE_BY}: the whole config of this run\n{to_yaml(config)}".encode())


def check_data(config: TrainConfig, state: dict[str, Any], count: int) -> None:
    """Raise LoftUpError unless there are as many training pictures as when the checkpoint was made."""
    if (before := state["training_pictures"]) != count:
        raise LoftUpError(
            f"{', '.join(config.data.path)} (data.path) has {count} pictures, the run in {config.output} had {before}, "
            "which decide about the order of the data; resume with the same pictures, or start a new run in another "
            "folder, from its weights with model.pretrained=CHECKPOINT"
        )


def _evidence(folder: Path) -> str:
    """The file that tells of a run without checkpoints, "" if there is none."""
    table = folder / "log.csv"
    if table.is_file() and table.read_bytes().count(b"\n") > 1:
        return table.name
    return SAFETENSORS if (folder / SAFETENSORS).exists() else ""


def _check_own(folder: Path, goes_on: bool) -> None:
    """Raise LoftUpError if a run would overwrite what is the user's: a folder without a run's config is no run's."""
    begun = goes_on or made_here(folder / CONFIG)
    refuse_others(folder / name for name in (*AT_THE_END, *(() if begun else (CONFIG, *DURING))))


def _writing(folder: Path) -> AbstractContextManager[None]:
    remedy = "set another with output=..."
    return translate(OSError, lambda error: f"cannot write to the folder {folder}: {error}; {remedy}")


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with the defaults of settings that came later; as it is where it is of another kind."""
    try:
        return dataclasses.asdict(checked(TrainConfig, config, "the checkpoint's config"))
    except LoftUpError:
        return config


def _check_same(config: TrainConfig, pictures: int, state: dict[str, Any], path: str) -> None:
    changes = differences(_completed(state["config"]), dataclasses.asdict(config))
    if state["pictures"] != pictures:
        changes.append(f"pictures a step (batch x accumulate x processes): {state['pictures']}, now {pictures}")
    if changes:
        raise LoftUpError(
            f"{path} was made with another config: {'; '.join(changes)}. Resume with the values of "
            f"{Path(config.output) / CONFIG}, or start a new run in another folder, from these weights with "
            f"model.pretrained={path}"
        )
    if state["step"] > config.steps:
        raise LoftUpError(f"{path} has had {state['step']} steps, more than steps={config.steps}")
