"""Checkpoints: single files with all that a run needs to go on, written whole or not at all."""

import io
import math
import random
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import LoftUpError, one_line
from ...files import check_regular, write_atomically

__all__ = [
    "Progress",
    "differences",
    "latest_checkpoint",
    "load_checkpoint",
    "prune",
    "random_states",
    "read_progress",
    "restore_random_states",
    "save_checkpoint",
    "step_file",
]

# A run goes on with these changed: files may have moved. The numbers of pictures, a step and in all, are checked apart.
PLACES = (
    "output", "hub", "data.path", "data.cache", "backbone.weights", "backbones.weights",
    "objective.imitation.upsampler",
)  # fmt: skip
PACE = ("steps", "save_every", "log_every", "keep", "data.workers", "compile", "checkpointing", "triton", "validation")
ENTRIES = (
    "step", "state_dict", "objective", "optimizer", "progress", "random", "config", "pictures", "training_pictures",
    "loftup_config",
)  # fmt: skip
FREE = (*PLACES, *PACE, "batch", "accumulate")


@dataclass
class Progress:
    """Numbers of a run that go on from a checkpoint, beside weights and random states."""

    step: int = 0
    best: float = math.inf  # of best_by, negated where more is better
    best_by: str = ""
    validated: int = 0  # the step of the last validation
    seconds: float = 0.0
    unreadable: int = 0
    empty: int = 0
    nonfinite: int = 0
    streak: int = 0  # steps without a finite loss since the last finite one
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)  # and their number, since the last line of the log
    measured: dict[str, float] = field(default_factory=dict)


def read_progress(values: dict[str, Any]) -> Progress:
    """The progress in a checkpoint; in those of before all terms had one number of steps, ``summed``."""
    values = dict(values)
    if (summed := values.pop("summed", None)) is not None:
        values["sums"] = {name: (total, summed) for name, total in values["sums"].items()}
    return Progress(**values)


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return folder / f"step_{step:06d}.pt"


def _step_files(folder: Path) -> list[Path]:
    files = [path for path in folder.glob("step_*.pt") if path.stem[5:].isdecimal()]
    return sorted(files, key=lambda path: int(path.stem[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps, None if there is none."""
    return files[-1] if (files := _step_files(folder)) else None


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts.

    Raises:
        LoftUpError: the file cannot be written; whatever had that name before is still there, whole.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        before = latest_checkpoint(path.parent)
        remedy = f"free some space and go on from {before.name} with --resume" if before else "free some space"
        raise LoftUpError(
            f"cannot write the checkpoint {path} ({buffer.tell() / 1e6:.1f} MB): {error}; {remedy}, or set another "
            "folder with output=..."
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU.

    Raises:
        LoftUpError: the file is damaged or no checkpoint of a training run.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums
                raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler, fed with anything, raises anything
        reason = one_line(str(error).partition("\n")[0] or error)
        raise LoftUpError(
            f"cannot read the checkpoint {path}: {reason}; remove it to go on from the one before"
        ) from error
    if not isinstance(state, dict) or (missing := [name for name in ENTRIES if name not in state]):
        expected = "step, optimizer and others"
        lacking = f"; it lacks {', '.join(missing)}" if isinstance(state, dict) else ""
        raise LoftUpError(f"{path} is no checkpoint of a training run: expected the entries {expected}{lacking}")
    return state


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints, and what a killed run of an earlier version left half-written."""
    for path in [*_step_files(folder)[:-keep], *folder.glob(".*.pt.*")]:
        path.unlink(missing_ok=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Differences of two configs as nested dicts, ``"key: before, now"``, but for those that a run may have."""
    changes = []
    for key in dict.fromkeys([*before, *now]):
        path, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if re.sub(r"\[\d+\]", "", path) in FREE or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += differences(old, new, f"{path}.")
        elif isinstance(old, list) and isinstance(new, list) and _sections(old, new):
            for index, (one, other) in enumerate(zip(old, new, strict=True)):
                changes += differences(one, other, f"{path}[{index}].")
        else:
            changes.append(f"{path}: {old!r}, now {new!r}")
    return changes


def _sections(old: list[Any], new: list[Any]) -> bool:
    """Tell whether two lists hold as many sections of a config."""
    return len(old) == len(new) and all(isinstance(item, Mapping) for item in [*old, *new])


def random_states() -> dict[str, Any]:
    """States of the global random generators of Python, numpy and torch, as a checkpoint can hold them."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what :func:`random_states` gave; CUDA's only where there are as many devices."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
