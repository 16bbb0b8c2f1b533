"""The folder of a run: new, to be resumed, or to be refused."""

import dataclasses
from pathlib import Path
from typing import Any

from ..errors import LoftUpError
from ..weights import write_atomically
from .checkpoint import differences, latest_checkpoint, load_checkpoint
from .config import TrainConfig, to_yaml

__all__ = ["CONFIG", "open_folder"]

CONFIG = "train.yaml"


def open_folder(config: TrainConfig, pictures: int, resume: bool) -> dict[str, Any] | None:
    """Make a run's folder, or find the checkpoint to go on from; write the config there.

    Args:
        config: of the run.
        pictures: of a step, in all processes.
        resume: whether a run that is there is to go on.

    Returns:
        The last checkpoint; None for a run that begins.

    Raises:
        LoftUpError: the folder holds a run and ``resume`` is not set, or that run had another config; a push is asked
            for without a token; or the folder cannot be written.
    """
    folder = Path(config.output).expanduser()
    path = latest_checkpoint(folder / "checkpoints")
    if not resume and (path or (folder / CONFIG).exists()):
        raise LoftUpError(
            f"{folder} holds a run already ({path.name if path else CONFIG}); go on with it by --resume, or take "
            "another folder: output=..."
        )
    if config.hub:
        import huggingface_hub

        if huggingface_hub.get_token() is None:
            raise LoftUpError(
                f"pushing to {config.hub!r} needs a Hub token: log in with `hf auth login` before training"
            )
    state = load_checkpoint(path) if path else None
    if state is not None:
        _check_same(config, pictures, state, str(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, to_yaml(config).encode())
    except OSError as error:
        raise LoftUpError(f"cannot write to the folder {folder}: {error}; set another with output=...") from error
    return state


def _check_same(config: TrainConfig, pictures: int, state: dict[str, Any], path: str) -> None:
    changed = differences(state["config"], dataclasses.asdict(config))
    if state["pictures"] != pictures:
        changed.append(f"pictures a step (batch x accumulate x processes): {state['pictures']}, now {pictures}")
    if changed:
        raise LoftUpError(
            f"{path} was made with another config: {'; '.join(changed)}. Resume with the values of "
            f"{Path(config.output) / CONFIG}, or start a new run in another folder, from these weights with "
            f"model.pretrained={path}"
        )
    if state["step"] > config.steps:
        raise LoftUpError(f"{path} has had {state['step']} steps, more than steps={config.steps}")
