"""Fitting: ``any`` as it ships, a short training, and the best of what came out, judged on held-out pictures."""

import contextlib
import copy
import dataclasses
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...backbones import Backbone
from ...errors import LoftUpError, translate
from ...files import alone_in, refuse_others, write_atomically
from ...model import LoftUp
from ...networks.config import UniversalConfig
from ...pictures import encode
from ...progress import tell
from ...weights.names import CONFIG, SAFETENSORS
from ..config import TrainConfig, check, load_config
from ..data.loader import loader, open_data
from ..objective.objective import Objective
from ..run.build import build_backbones, build_upsampler, check_paths
from ..run.checkpoint import latest_checkpoint
from ..run.distributed import Processes
from ..run.engine import train
from ..run.folder import CARD
from ..run.folder import CONFIG as RUN_CONFIG
from .card import fit_card, table
from .criteria import Errors, HeldOut, enough, gains
from .picture import comparison

__all__ = ["FitSettings", "choose", "fit"]

FEWEST = 20  # photographs
SIDE, CELLS = 224, 7  # of the backbone's input, about; and patches along it at least
RUN = "run"  # folder of the training, inside the result's
PICTURE = "comparison.png"
FILES = (CARD, CONFIG, SAFETENSORS, PICTURE)
OWN = (  # keys that are not for --set
    "backbone", "data.path", "data.held_out", "model.architecture", "model.pretrained", "output", "steps", "save_every",
    "hub",
)  # fmt: skip
START = "any"  # name of the candidate that is as it was


@dataclasses.dataclass
class FitSettings:
    """A fit.

    Attributes:
        output: folder for the result.
        minutes: that everything is to take, about: the first steps are timed, and decide about the number of steps.
        steps: of the training, in place of ``minutes``.
        overrides: of the ready config ``fit``, as ``"key=value"``, see :func:`loftup.train.config.load_config`.
    """

    output: Path
    minutes: float = 10.0
    steps: int | None = None
    overrides: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An upsampler chosen, and the errors by which it was.

    Attributes:
        name: of the candidate; "any" for the start.
        up: the upsampler.
        errors: by the half ("choosing", "reporting") and the upsampler ("bilinear", "any", "fitted").
        refused: the candidate that was chosen, and was worse than the start on the pictures to report by; "" for none.
    """

    name: str
    up: LoftUp
    errors: Mapping[str, Mapping[str, Errors]]
    refused: str = ""

    @property
    def gained(self) -> bool:
        """Tell whether it is better than the start."""
        return self.name != START


def fit(
    settings: FitSettings, backbone: Mapping[str, object], pictures: Sequence[str], *, resume: bool = False
) -> Outcome:
    """Fit ``any`` to a backbone.

    A tenth of the pictures, 8 to 40, is held out: half of these to choose by, half to report by. The training is that
    of the ready config ``fit``. Of the checkpoints the best is chosen that gains what is asked for in each of the
    errors of :mod:`loftup.train.fit.criteria`; unless the other half agrees, the start is written.

    In the folder are then README.md, config.json and model.safetensors, which :meth:`loftup.LoftUp.from_pretrained`
    reads, comparison.png, and in ``run`` what :func:`loftup.train.run.engine.train` writes.

    Args:
        settings: of the fit.
        backbone: the section ``backbone`` of the config.
        pictures: folders of photographs; masks beside them, if any, are taken in place of Felzenszwalb's.
        resume: go on with a training that was stopped or killed; begin where there is none.

    Returns:
        What was chosen, and is in the folder.

    Raises:
        LoftUpError: there are too few pictures; the folder holds a fit already, or files of the user's; or see
            :func:`loftup.train.run.engine.train`.
        Interrupted: a signal came; the text says how to go on.
    """
    began = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoftUpError(f"a fit is one process, got {os.environ['WORLD_SIZE']}; start it without torchrun")
    folder = settings.output.expanduser()
    config = _configured(settings, backbone, pictures, folder)
    with contextlib.ExitStack() as stack:
        with translate(OSError, lambda error: f"cannot write to the folder {folder}: {error}; choose another: -o DIR"):
            stack.enter_context(alone_in(folder))
        _check_folder(folder, resume)
        processes = Processes()
        (model,) = build_backbones(config)
        model = model.to(processes.device)
        _fit_sizes(config, model)
        config = check(config)
        start = build_upsampler(config, model).to(processes.device).eval().requires_grad_(False)
        processes.say(f"backbone   {model.name}, {model.channels} channels, stride {model.stride}")
        held_out = HeldOut(config, model)
        asked = time.monotonic()
        errors = {
            half: {"bilinear": held_out.bilinear(examples), START: held_out.errors(start, examples)}
            for half, examples in (("choosing", held_out.choosing), ("reporting", held_out.reporting))
        }
        judging = time.monotonic() - asked
        config.steps = _steps(settings, config, model, start, began, judging, resume)
        config.save_every = math.ceil(config.steps / 5)
        train(config, resume=resume)
        candidates = _candidates(folder / RUN / "checkpoints", processes.device)
        processes.say(f"judging {len(candidates)} checkpoints on held-out pictures")
        outcome = choose(start, candidates, held_out, errors)
        held = f"{len(held_out.choosing)} to choose by and {len(held_out.reporting)} to report by were held out"
        facts = {
            "pictures": f"{_count(config)}, of which {held}",
            "steps": f"{config.steps} of {config.batch} pictures each",
            "time": f"{(time.monotonic() - began) / 60:.1f} minutes in all",
        }
        _write(folder, config, outcome, facts)
        picture = comparison(held_out, start, outcome.up, outcome.gained)
        write_atomically(folder / PICTURE, encode(picture))
    print(table(outcome.errors["reporting"]), file=sys.stderr)
    return outcome


def choose(
    start: LoftUp, candidates: Mapping[str, LoftUp], held_out: HeldOut, errors: Mapping[str, Mapping[str, Errors]]
) -> Outcome:
    """Choose the candidate of the best mean gain, of those that gain what :data:`LEAST` asks for in every error.

    It is chosen by one half of the held-out pictures. Where it gains less on the other half, the start is taken.

    Args:
        start: that must not be made worse.
        candidates: by their names.
        held_out: the pictures.
        errors: of bilinear interpolation and of the start, by half and upsampler.
    """
    best, best_gain, chosen = START, 0.0, errors["choosing"][START]
    for name, up in candidates.items():
        found = held_out.errors(up, held_out.choosing)
        gain = gains(found, errors["choosing"][START])
        each = list(gain.values())
        parts = ", ".join(f"{key} {100 * value:+.2f} %" for key, value in gain.items())
        tell(f"{name.replace('_', ' ')}: gain in {parts}")
        if enough(gain) and (mean := sum(each) / len(each)) > best_gain:
            best, best_gain, chosen = name, mean, found
    up, reported = start, errors["reporting"][START]
    refused = ""
    if best != START:
        found = held_out.errors(candidates[best], held_out.reporting)
        if enough(gains(found, reported)):
            up, reported = candidates[best], found
        else:
            best, refused, chosen = START, best, errors["choosing"][START]
    both = {
        "choosing": {**errors["choosing"], "fitted": chosen},
        "reporting": {**errors["reporting"], "fitted": reported},
    }
    return Outcome(best, up, both, refused)


def _configured(
    settings: FitSettings, backbone: Mapping[str, object], pictures: Sequence[str], folder: Path
) -> TrainConfig:
    """The config but for the sizes, which want the backbone, and the number of steps, which wants its pace."""
    for override in settings.overrides:
        if (key := override.partition("=")[0]).startswith(OWN):
            raise LoftUpError(f"--set {key}: the command's own options say it; see loftup fit --help")
    config = load_config("fit", settings.overrides)
    for name, value in backbone.items():
        setattr(config.backbone, name, value)
    config.data.path, config.output = list(pictures), str(folder / RUN)
    shifted = config.objective.shifted
    shifted.views = next((n for n in (shifted.views, 9) if n > config.backbone.views), 16)
    config = check(config)
    check_paths(config)
    total = _count(config)
    if total < FEWEST:
        raise LoftUpError(
            f"{', '.join(pictures)}: {total} pictures, expected at least {FEWEST}, better some hundreds; give more, in "
            "one folder or several"
        )
    config.data.held_out = min(40, max(8, total // 10)) // 2 * 2
    return config


def _count(config: TrainConfig) -> int:
    return len(open_data(config.data.path, config.data.kind, config.data.felzenszwalb))


def _fit_sizes(config: TrainConfig, backbone: Backbone) -> None:
    """Set the sizes that go with the backbone's patch size."""
    patch = int(backbone.patch_size)
    size = max(CELLS, round(SIDE / patch)) * patch
    config.data.sizes, config.validation.size = [size], size
    whole = (size // 2) % (size // patch * max(1, round(patch / backbone.stride))) == 0
    config.data.ratios = config.data.ratios if whole and size % 2 == 0 else [1.0]


def _check_folder(folder: Path, resume: bool) -> None:
    """Raise LoftUpError if there is a fit to go on with, or a file of the user's in the place of the result's."""
    begun = latest_checkpoint(folder / RUN / "checkpoints")
    refuse_others(folder / name for name in FILES)
    if not resume and (evidence := begun or next(filter(Path.exists, (folder / SAFETENSORS,)), None)):
        remedy = "go on with it by --resume, or write to another folder: -o DIR"
        raise LoftUpError(f"{folder} holds a fit already ({evidence.name}); {remedy}")


def _steps(
    settings: FitSettings,
    config: TrainConfig,
    backbone: Backbone,
    start: LoftUp,
    began: float,
    judging: float,
    resume: bool,
) -> int:
    """The number of steps of the training: as asked for, as begun, or as many as the time allows."""
    if resume and latest_checkpoint(Path(config.output) / "checkpoints"):
        return load_config(Path(config.output) / RUN_CONFIG).steps
    if settings.steps is not None:
        return settings.steps
    pace = _pace(config, backbone, start, 0.05 * 60 * settings.minutes)
    # Five checkpoints are judged on one half, the chosen one on the other.
    left = 60 * settings.minutes - (time.monotonic() - began) - 3 * judging
    return _steps_in(left, pace)


def _steps_in(seconds: float, pace: float) -> int:
    """Steps that so many seconds allow; some even where there are none, or nothing could be learned."""
    return max(20, int(seconds / pace))


def _pace(config: TrainConfig, backbone: Backbone, start: LoftUp, budget: float) -> float:
    """The seconds that a step takes, by at least four steps and about ``budget`` seconds of them."""
    objective = Objective(config, copy.deepcopy(start), backbone)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    seconds: list[float] = []
    before = time.monotonic()
    for batch in loader(config, backbone):
        loss, _ = objective(batch.to(start.device))
        loss.backward()
        if start.device.type == "cuda":
            torch.cuda.synchronize(start.device)
        now = time.monotonic()
        seconds, before = [*seconds, now - before], now
        if len(seconds) > 3 and sum(seconds) > budget:
            break
    return sum(seconds[1:]) / len(seconds[1:])  # the first one also warms up


def _candidates(folder: Path, device: torch.device) -> dict[str, LoftUp]:
    """The student of every checkpoint."""
    files = sorted(folder.glob("step_*.pt"))
    return {path.stem: LoftUp.from_pretrained(path, device=device, dtype=torch.float32) for path in files}


def _write(folder: Path, config: TrainConfig, outcome: Outcome, facts: Mapping[str, str]) -> None:
    up = outcome.up
    assert isinstance(up.config, UniversalConfig)
    refuse_others(folder / name for name in FILES)
    up.save_pretrained(folder)
    config = dataclasses.replace(config, output=str(folder))  # where the weights are
    card = fit_card(config, up.config, facts, outcome.errors, outcome.name if outcome.gained else "")
    write_atomically(folder / CARD, card.encode())
