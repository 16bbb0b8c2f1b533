"""One task for several upsamplers, written to a folder that a stopped run goes on in."""

import dataclasses
import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..backbones import Backbone
from ..errors import FAILURES, LoftUpError, one_line
from ..files import MADE_BY, refuse_others, write_atomically
from ..pictures import encode
from ..train.config import checked
from ..version import __version__
from .catalogue import TASKS
from .datasets import open_dataset
from .datasets.base import Dataset, thinned
from .features import remembering
from .figure import figure
from .table import markdown, read_file
from .upsamplers import Upsampler, check_name, create

__all__ = ["Comparison"]

RESULTS, TABLE, FIGURE, PICTURES = "results.json", "results.md", "figure.png", "pictures"


class Comparison:
    """A task, a dataset and a backbone, on which upsamplers are compared one after another.

    Args:
        task: a name of :data:`loftup.eval.catalogue.TASKS`.
        dataset: as :func:`loftup.eval.datasets.open_dataset` takes it; None for a task without one.
        backbone: in ``eval()`` mode; None for the oracle of the synthetic scenes.
        description: of the backbone, for the results; part of what a stopped run must agree in.
        settings: values of the task's config by name.
        folder: for the results.
        overwrite: forget results of other settings that are there.
        trust_remote_code: let upsamplers run the code of other repositories.
        every: take every Nth sample of both splits alone, for a first look; 0 as few as the task's quick protocol.

    Raises:
        LoftUpError: the dataset is not there, a setting is unknown, of another kind or out of bounds, the folder holds
            results of other settings or files of the names that loftup did not make, or the oracle is asked about
            another dataset than "synthetic".
    """

    def __init__(
        self,
        task: str,
        dataset: str | None,
        backbone: Backbone | None,
        description: Mapping[str, Any],
        settings: Mapping[str, Any],
        folder: Path,
        overwrite: bool = False,
        trust_remote_code: bool = False,
        every: int = 1,
    ) -> None:
        self.task, self.folder, self.trust_remote_code = task, folder.expanduser(), trust_remote_code
        self.function, kind, self.metrics = TASKS[task].load()
        self.config = _config(kind, settings, task)
        self.dataset: Dataset[Any] | None = None if dataset is None else open_dataset(dataset, task)
        self.oracle: Any = None
        if backbone is None:
            from .oracle import Oracle

            if self.dataset is None or dataset != "synthetic":
                raise LoftUpError(f"the oracle knows the synthetic scenes alone, got --dataset {dataset}")
            self.oracle = Oracle(self.dataset, task)
            backbone = self.oracle.backbone
        self.backbone: Backbone = backbone
        self.identity = {
            "task": task,
            "dataset": None if dataset is None else dataset.partition(":")[0],
            "backbone": dict(description),
            "config": {
                name: _without_folders(value) if isinstance(value, str) else value
                for name, value in dataclasses.asdict(self.config).items()
            },
        }
        if self.dataset is not None and every != 1:
            lengths, most = (len(self.dataset.train), len(self.dataset.val)), TASKS[task].most
            steps = (every, every) if every else (max(1, -(-lengths[0] // most)), max(1, -(-lengths[1] // most)))
            if max(steps) > 1:
                self.dataset = thinned(self.dataset, steps)
                # Part of the name, so that tables tell it apart from the whole.
                said = (
                    f"1 of {steps[0]}" if steps[0] == steps[1] else f"1 of {steps[0]} to learn, of {steps[1]} to judge"
                )
                self.identity["dataset"] = f"{self.identity['dataset']}, {said}"
        self.rows: dict[str, dict[str, Any]] = {}
        if not overwrite:
            self._resume()
        refuse_others(self.folder / name for name in (RESULTS, TABLE, FIGURE))
        refuse_others((self.folder / PICTURES).glob("[0-9][0-9]_*.png"))

    def run(self, upsamplers: str, say: Callable[[str], None]) -> int:
        """Compare upsamplers, ``"[LABEL=]NAME[:ARGUMENT],..."``; returns how many of them failed.

        The backbone's features of pictures are computed for the first one and remembered, up to 512 MiB.
        """
        with remembering():
            return self._run(upsamplers, say)

    def _run(self, upsamplers: str, say: Callable[[str], None]) -> int:
        failed, specs = 0, _specs(upsamplers)
        for label, spec in specs:  # not only when the ones before are done
            if label not in self.rows and spec != "perfect":
                check_name(spec, trust_remote_code=self.trust_remote_code)
        if self.rows:
            self._write_views()  # a killed run may have left them out
        for label, spec in specs:
            if row := self.rows.get(label):
                if row["upsampler"] != _without_folders(spec):
                    raise LoftUpError(
                        f"{self.folder / RESULTS} has {label!r} already, of {row['upsampler']}; name this one "
                        f"otherwise: LABEL={spec}"
                    )
                say(f"{label}: finished already")
                continue
            try:
                self._one(label, spec)
            except FAILURES as error:
                failed += 1
                say(f"{label}: failed: {one_line(error)}")
                continue
            self._write()
            say(f"{label}: {self._line(self.rows[label])}")
        return failed

    def _one(self, label: str, spec: str) -> None:
        upsampler = self._create(spec)
        start = time.perf_counter()
        dataset = () if self.dataset is None else (self.dataset,)
        result = self.function(self.backbone, upsampler, *dataset, self.config)
        self.rows[label] = {
            "upsampler": _without_folders(spec),
            "parameters": sum(p.numel() for p in upsampler.parameters()) if isinstance(upsampler, nn.Module) else 0,
            "metrics": result.metrics,
            "details": result.details,
            "seconds": round(time.perf_counter() - start, 1),
        }
        # They are stored one by one, so that the figure can be made anew when others are added.
        for index, pictures in enumerate(result.pictures):
            for caption, picture in pictures.items():
                column = _column(label) if caption == "ours" else caption
                write_atomically(self.folder / PICTURES / f"{index:02d}_{column}.png", encode(picture))

    def _create(self, spec: str) -> Upsampler:
        if spec == "perfect":
            if self.oracle is None:
                raise LoftUpError("only the oracle's features have a perfect upsampler: --backbone oracle")
            return self.oracle.upsampler  # type: ignore[no-any-return]
        upsampler = create(spec, self.backbone, trust_remote_code=self.trust_remote_code)
        if isinstance(upsampler, nn.Module):
            upsampler.to(self.config.device)
        return upsampler

    def _line(self, row: Mapping[str, Any]) -> str:
        means = {self.metrics[name]: fmean(values) for name, values in row["metrics"].items()}
        numbers = ", ".join(f"{metric.heading} {mean:.{metric.decimals}f}" for metric, mean in means.items())
        return f"{numbers} ({row['seconds']:.0f} s)"

    def _write(self) -> None:
        results = {**self.identity, "upsamplers": self.rows, "environment": _environment(self.config.device)}
        write_atomically(self.folder / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
        self._write_views()

    def _write_views(self) -> None:
        """Write what follows from the results and the pictures."""
        table = markdown([{**self.identity, "upsamplers": self.rows}])
        write_atomically(self.folder / TABLE, f"{table}\n<!-- {MADE_BY} -->\n".encode())
        grid = figure(self.folder / PICTURES, {label: _column(label) for label in self.rows})
        if grid is not None:
            write_atomically(self.folder / FIGURE, encode(grid))

    def _resume(self) -> None:
        file = self.folder / RESULTS
        if not file.is_file():
            return
        results = read_file(file)
        previous = {key: results[key] for key in self.identity}
        self.rows = results["upsamplers"]
        # As JSON has it: tuples are lists there.
        current = json.loads(json.dumps(self.identity))
        if previous != current:
            differences = ", ".join(_differences(previous, current))
            remedy = "give another -o, or --overwrite to forget it"
            raise LoftUpError(f"{file} was made with other settings ({differences}); {remedy}")


def _config(kind: Any, settings: Mapping[str, Any], task: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    default = kind()
    for name, value in settings.items():
        if name not in fields:
            raise LoftUpError(f"{task} has no setting {name!r}; it has {', '.join(sorted(fields))}")
        usual = getattr(default, name)
        number = isinstance(usual, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and not isinstance(value, type(usual)):
            raise LoftUpError(f"{name} of {task} is {usual!r} by default, got {value!r} of another kind")
    return checked(kind, settings, f"the settings of {task}")


def _specs(upsamplers: str) -> list[tuple[str, str]]:
    """("label", "name:argument") of every upsampler."""
    specs = []
    for text in filter(None, (part.strip() for part in upsamplers.split(","))):
        label, equals, spec = text.partition("=")
        specs.append((label, spec) if equals else (text.partition(":")[0], text))
    if not specs or len(dict(specs)) < len(specs):
        raise LoftUpError(
            f"expected upsamplers of different labels, got {upsamplers!r}; write LABEL=NAME:ARGUMENT to tell two of "
            "one name apart"
        )
    return specs


def _column(label: str) -> str:
    """Part of a picture's file name that says which upsampler it is of: another one for every label."""
    plain = re.sub(r"[^a-z0-9_.-]", "_", label)[:100]
    # Where letters are replaced, also capitals, which not all file systems tell apart.
    return f"of_{plain}" if plain == label else f"of_{plain}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in new | old for d in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} {old!r}, now {new!r}"]


def _environment(device: str) -> dict[str, str]:
    environment = {
        "loftup": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["loftup", *map(_without_folders, sys.argv[1:])]),
    }
    commit = _commit()
    return environment | ({"commit": commit} if commit else {})


def _without_folders(text: str) -> str:
    """A text as others may see it: of absolute paths the last part; two may be joined as in WEIGHTS@FOLDER."""
    part = r"(?:[^\s,:=/@]|@(?!/))+"
    return re.sub(rf"(?<![\w.~])(?:/{part})*/({part})/?", r"\1", text)


def _commit() -> str | None:
    """Commit of the checkout that this file lies in, marked where files differ from it."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        if subprocess.run([*here, "ls-files", "--error-unmatch", __file__], capture_output=True).returncode:
            return None
        commit = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*here, "status", "--porcelain", "--untracked-files=no"], capture_output=True)
        return commit.stdout.strip() + ("+" if changes.stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None
