"""Training: one process or many, on whatever device there is, stopped and resumed at will."""

import contextlib
import dataclasses
import logging
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoftUpError
from ...files import refuse_others, write_atomically
from ...inference.choose import why_no_triton_windows
from ...networks.config import LoftUpConfig
from ...networks.universal import UniversalNetwork
from ..config import TrainConfig, check
from ..data.loader import loader
from ..data.views import Batch
from ..objective.objective import Objective
from .build import build_backbones, build_upsampler, calibrate, check_paths, rebuild
from .card import how_to_load, machine, portable, push, training_card, versions
from .checkpoint import Progress, prune, random_states, read_progress, restore_random_states, save_checkpoint, step_file
from .distributed import Processes, synchronise_batch_norm
from .folder import AT_THE_END, CARD, check_data, hold_folder, open_folder, write_config
from .logs import Board, Table
from .schedule import adamw, learning_rate
from .signals import Interrupted, StopSignal, ignore_signals
from .validation import LinearProbe, Validation, mean_losses, open_validation, report, save_picture

__all__ = ["Interrupted", "learning_rate", "train"]

log = logging.getLogger("loftup")
STREAK = 20  # steps in a row without a finite loss and gradient that end a run


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train an upsampler for a backbone (paper section 3.2), or a universal one on several.

    Works alone and in every process of ``torchrun`` or ``accelerate launch``; takes a GPU where there is one. In the
    folder ``config.output`` it writes the config (train.yaml), checkpoints/, log.csv, validation.csv, tensorboard/,
    pictures/ and at the end model.safetensors, config.json and README.md, which :meth:`loftup.LoftUp.from_pretrained`
    reads. SIGINT and SIGTERM stop it after the step at hand, saved. Global random generators are seeded.

    Args:
        config: of the run.
        resume: go on from the last checkpoint in the folder, exactly as if there had been no break; begin anew where
            there is none.

    Returns:
        The folder of the run.

    Raises:
        LoftUpError: the config cannot be used, the folder holds a run already, or files of the user's that would be
            overwritten, or another process writes to it, the data cannot be read, the disk is full, or the loss is not
            finite any more; the text says what to do.
        Interrupted: a signal came; the text says how to go on.
    """
    config = check(config)
    processes = Processes()
    with contextlib.ExitStack() as stack:
        processes.from_main(lambda: hold_folder(config, stack))
        run = _Run(config, processes, resume)
        try:
            with StopSignal("stopping after this step" if processes.main else "") as stop:
                run.steps(stop)
            run.finish()
        except Interrupted:
            processes.end()
            raise
        finally:
            run.close()
    processes.end()
    return run.folder


class _Run:
    def __init__(self, config: TrainConfig, processes: Processes, resume: bool) -> None:
        self.config, self.processes, self.warned = config, processes, 0
        self.folder = Path(config.output).expanduser()
        pictures = config.batch * config.accumulate * processes.world
        if config.objective.classes.weight and processes.world > 1:
            raise LoftUpError(
                f"objective.classes trains probes of which a step needs some alone, which {processes.world} processes "
                "cannot do together; start one process, or set objective.classes.weight=0"
            )
        check_paths(config)
        state = processes.from_main(lambda: open_folder(config, pictures, resume))
        if resume and not state:
            processes.say(f"no checkpoint in {self.folder} to resume from: a new run")
        processes.seed(config.seed)
        self.backbones = [each.to(processes.device) for each in processes.main_first(lambda: build_backbones(config))]
        first = self.backbones[0]
        # A resumed run gets its weights from the checkpoint; what it started from need not be there any more.
        up = rebuild(state["loftup_config"]) if state else build_upsampler(config, first)
        up.to(processes.device).activation_checkpointing = config.checkpointing
        if config.triton:
            network: Any = up.upsampler
            if reason := why_no_triton_windows(network, processes.device, network.dtype):
                raise LoftUpError(f"triton=true cannot run here: {reason}; set triton=false")
            network.in_triton = True
        self.progress = read_progress(state["progress"]) if state else Progress()
        published = config.model.architecture == "loftup"
        random = published and config.model.pretrained is None and config.model.start == "random"
        if random and not state and config.model.batch_norm == "frozen":
            calibrate(up, config, first)
        if published and config.model.batch_norm == "batch" and processes.world > 1:
            synchronise_batch_norm(up)
        self.objective = Objective(config, up, self.backbones)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = adamw(config.optimizer, self.parameters)
        self.loader = loader(config, self.backbones, self.progress.step, processes.rank, processes.world)
        self.loader.worker_init_fn = ignore_signals
        self.pictures = len(self.loader.dataset.source)  # type: ignore[attr-defined]
        if state:
            check_data(config, state, self.pictures)
        self._open_validation()
        processes.from_main(self._open_logs)
        if state:
            self._load(state)
        self.model = processes.prepare(self.objective)
        if config.compile:
            for part in filter(None, (self.objective.up, self.objective.teacher)):
                _compile(part.upsampler)
        self._announce("going on" if state else "starting")

    def _open_validation(self) -> None:
        self.validations: list[Validation] = []  # one for each backbone
        self.probe: LinearProbe | None = None
        if self.config.validation.path:
            self.validations = [open_validation(self.config, each, self.processes) for each in self.backbones]
            self._warn_of(self.validations[0].unreadable)
        if self.config.validation.probe:
            self.processes.from_main(self._open_probe)

    def _open_probe(self) -> None:
        self.probe = probe = LinearProbe(self.config, self.backbones[0])
        self._warn_of(probe.unreadable)
        self.bilinear = {f"bilinear_{name}": value for name, value in probe.bilinear().items()}

    def _open_logs(self) -> None:
        write_config(self.config)
        self.table = Table(self.folder / "log.csv", self.progress.step)
        self.measurements = Table(self.folder / "validation.csv", self.progress.step)
        self.board = Board(self.folder / "tensorboard", self.progress.step)

    def _announce(self, what: str) -> None:
        config, model = self.config, self.config.model
        start = f"from {model.pretrained}" if model.pretrained else f"start: {model.start}"
        trained = sum(p.numel() for p in self.parameters)
        window = f"windows of {config.window} pixels" if config.window else "whole pictures"
        if {name for name, term in vars(config.objective).items() if term.weight} == {"self_distillation"}:
            window = "crops"  # the student's output is computed there alone
        batch = f"{config.batch} pictures x {config.accumulate} x {self.processes.world} processes"
        for section, backbone in zip(config.sections.values(), self.backbones, strict=True):
            name = backbone.name or section.name
            views = f", {backbone.views} shifted views" if backbone.views > 1 else ""
            self.processes.say(f"backbone   {name}, {backbone.channels} channels, patch {backbone.patch_size}{views}")
        kind: str = model.architecture
        if model.universal:
            kind = f"for any backbone, {start if model.pretrained else 'anew'}"
        elif isinstance(network := self.objective.up.config, LoftUpConfig):
            kind = f"width {network.width}, {start}"
        self.processes.say(f"upsampler  {trained / 1e6:.2f} M trained parameters, {kind}")
        self.processes.say(f"pictures   {self.pictures} of {', '.join(config.data.path)}; {batch} a step, {window}")
        on = machine(self.processes.device, self.processes.world)
        self.processes.say(f"device     {self.processes.device} ({on}), {config.precision}")
        self.processes.say(f"{what} at step {self.progress.step} of {config.steps}, in {self.folder}")

    def steps(self, stop: StopSignal) -> None:
        """Train to the last step, or until a signal comes."""
        from tqdm import tqdm

        config, progress = self.config, self.progress
        hidden = None if self.processes.main else True
        try:
            batches: Iterator[Batch] = iter(self.loader)
            with tqdm(initial=progress.step, total=config.steps, unit="step", disable=hidden) as bar:
                if self._to_validate():  # killed between saving and validating
                    self._save(self._validate())
                self._loop(batches, stop, bar)
        finally:
            # The workers ignore SIGTERM, by which multiprocessing would end them.
            if (workers := getattr(self.loader, "_iterator", None)) is not None:
                workers._shutdown_workers()

    def _loop(self, batches: Iterator[Batch], stop: StopSignal, bar: Any) -> None:
        config, progress = self.config, self.progress
        start, seconds, steps = time.perf_counter(), 0.0, 0
        while progress.step < config.steps:
            before = time.perf_counter()
            number = self._step(batches, stop)
            seconds, steps = seconds + time.perf_counter() - before, steps + 1
            bar.update()
            last = progress.step == config.steps
            if progress.step % config.log_every == 0 or last:
                bar.set_postfix(self._log(steps / seconds), refresh=False)
                seconds, steps = 0.0, 0
            now = time.perf_counter()
            progress.seconds, start = progress.seconds + now - start, now
            due = progress.step % config.save_every == 0 or last or number
            if due:
                self._save(best=False)
            if self._to_validate() and ((best := self._validate()) or due):
                self._save(best)
            if number and not last:
                raise Interrupted(
                    f"stopped by {signal.Signals(number).name} after step {progress.step} of {config.steps}, saved "
                    f"in {self.folder}; the same command with --resume goes on",
                    number,
                )

    def _step(self, batches: Iterator[Batch], stop: StopSignal) -> int:
        """One step of the optimizer; returns the number of a signal that any process has got, or 0."""
        config, progress = self.config, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, progress.step, config.steps)
        # Batch statistics move in the forward pass; a step that is not taken must not leave them spoilt.
        before = [(buffer, buffer.clone()) for buffer in self.objective.up.buffers()]
        sums: dict[str, Tensor] = {}
        counts = Counter(unreadable=0, empty=0)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(config.accumulate):
            batch = next(batches).to(self.processes.device)
            self._warn_of(batch.unreadable)
            counts.update(unreadable=batch.skipped, empty=batch.empty)
            last = micro == config.accumulate - 1
            # Gradients of several processes are averaged once a step.
            with contextlib.nullcontext() if last else self.processes.no_sync(self.model):
                with self._autocast():
                    loss, parts = self.model(batch)
                (loss / config.accumulate).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value / config.accumulate
        norm = self.processes.clip(self.parameters, config.optimizer.clip)
        names = list(sums)
        signals = [signal.SIGTERM, signal.SIGINT]
        numbers = norm.new_tensor([*counts.values(), *(float(stop.number == number) for number in signals)])
        numbers = torch.cat([torch.stack([sums[name].float() for name in names]), numbers])
        total = self.processes.total(numbers).tolist()
        mean = {name: value / self.processes.world for name, value in zip(names, total, strict=False)}
        mean["gradient"] = float(norm)
        progress.unreadable += int(total[len(names)])
        progress.empty += int(total[len(names) + 1])
        if math.isfinite(mean["loss"]) and math.isfinite(mean["gradient"]):
            self.optimizer.step()
            progress.streak = 0
            for name, value in mean.items():  # not every step has every term
                so_far, count = progress.sums.get(name, (0.0, 0))
                progress.sums[name] = so_far + value, count + 1
        else:
            for buffer, value in before:
                buffer.copy_(value)
            self._count_nonfinite(mean)
        self.objective.after_step(progress.step)
        progress.step += 1
        return next((number for number, count in zip(signals, total[-2:], strict=True) if count), 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _count_nonfinite(self, mean: dict[str, float]) -> None:
        progress = self.progress
        progress.nonfinite, progress.streak = progress.nonfinite + 1, progress.streak + 1
        terms = ", ".join(f"{name} {value:g}" for name, value in mean.items() if name != "bicubic")
        if progress.nonfinite <= 3:
            log.warning("step %d is left out, for it is not finite: %s", progress.step + 1, terms)
        if progress.streak == STREAK:
            raise LoftUpError(
                f"{STREAK} steps in a row were not finite (the last, {progress.step + 1}: {terms}). Go on from "
                "the last checkpoint with a lower optimizer.rate, more optimizer.warmup, a smaller optimizer.clip or "
                "precision=float32: in a new folder, with model.pretrained=CHECKPOINT"
            )

    def _warn_of(self, unreadable: list[str]) -> None:
        """Say why pictures were left out, the first times."""
        for reason in unreadable:
            if self.warned < 5:
                self.warned += 1
                end = "; further ones are only counted" if self.warned == 5 else ""
                log.warning("a picture is left out: %s%s", reason, end)

    def _log(self, rate: float) -> dict[str, str]:
        """Write a line of the log, given the steps a second; returns what the progress bar shows."""
        progress = self.progress
        means = {name: total / count for name, (total, count) in progress.sums.items()}
        progress.sums = {}
        self.processes.from_main(lambda: self._write_log(means, rate))
        return {"loss": f"{means['loss']:.4g}"} if means else {}

    def _write_log(self, means: dict[str, float], rate: float) -> None:
        from tqdm import tqdm

        config, progress = self.config, self.progress
        counts = {name: getattr(progress, name) for name in ("unreadable", "empty", "nonfinite")}
        step_rate = learning_rate(config.optimizer, progress.step - 1, config.steps)
        if means:
            self.table.add({"step": progress.step, "rate": step_rate, **means, **counts})
            self.board.add("train", {**means, "rate": step_rate, **counts}, progress.step)
        pictures = rate * config.batch * config.accumulate * self.processes.world
        self.board.add("speed", {"steps per second": rate, "pictures per second": pictures}, progress.step)
        if not sys.stderr.isatty():  # where the progress bar does not show
            loss = f"loss {means['loss']:.4g}" if means else "no finite loss"
            left = tqdm.format_interval((config.steps - progress.step) / rate)
            self.processes.say(f"step {progress.step} of {config.steps}: {loss}, {rate:.3g} steps/s, {left} left")

    def _to_validate(self) -> bool:
        step, settings = self.progress.step, self.config.validation
        due = bool(settings.path or settings.probe) and step > self.progress.validated
        return due and (step % settings.every == 0 or step == self.config.steps)

    def _validate(self) -> bool:
        """Measure and draw; returns whether the probe's mIoU, or without a probe the loss, is the best so far."""
        up, progress, scores = self.objective.up, self.progress, dict[str, float]()
        up.eval()
        if self.validations:
            scores = mean_losses([self.processes.total(each.measure(up)) for each in self.validations])
        progress.measured = scores = self.processes.from_main(lambda: self._write_validation(scores))
        self.objective.train()
        progress.validated = progress.step
        by, value = ("miou", -scores["miou"]) if "miou" in scores else ("loss", scores["loss"])
        best = by != progress.best_by or value < progress.best
        if best:
            progress.best_by, progress.best = by, value
        return best

    def _write_validation(self, scores: dict[str, float]) -> dict[str, float]:
        up, step = self.objective.up, self.progress.step
        if self.validations and self.config.validation.pictures:
            picture = self.validations[0].picture(up, self.objective.teacher)
            if picture is not None:
                save_picture(picture, self.folder / "pictures" / f"step_{step:06d}.png")
                self.board.picture("features", picture, step)
        if self.probe is not None:
            scores = {**scores, **self.probe.measure(up), **self.bilinear}
        self.measurements.add({"step": step, **scores})
        self.board.add("validation", scores, step)
        self.processes.say(f"step {step}: {report(scores)}")
        return scores

    def _save(self, best: bool) -> None:
        states = self.processes.gather(random_states())
        self.processes.from_main(lambda: self._write(states, best))

    def _write(self, states: list[Any], best: bool) -> None:
        objective = self.objective.state_dict()
        folder = self.folder / "checkpoints"
        state = {
            "step": self.progress.step,
            # Under this name LoftUp.from_pretrained finds the student in a checkpoint.
            "state_dict": {key[3:]: value for key, value in objective.items() if key.startswith("up.")},
            "objective": {key: value for key, value in objective.items() if not key.startswith("up.")},
            "optimizer": self.optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "random": states,
            "config": dataclasses.asdict(self.config),
            "pictures": self.config.batch * self.config.accumulate * self.processes.world,
            "training_pictures": self.pictures,
            "seed": self.config.seed,
            "versions": versions(),
            "loftup_config": self.objective.up.config.to_dict(),
        }
        if best:
            save_checkpoint(folder / "best.pt", state)
        save_checkpoint(step_file(folder, self.progress.step), state)
        prune(folder, self.config.keep)

    def _load(self, state: dict[str, Any]) -> None:
        weights = {f"up.{key}": value for key, value in state["state_dict"].items()} | state["objective"]
        self.objective.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if len(state["random"]) == self.processes.world:
            restore_random_states(state["random"][self.processes.rank])

    def finish(self) -> None:
        """Write the weights and their card, and push them."""
        self.processes.from_main(self._export)

    def _export(self) -> None:
        up, progress, config = self.objective.up, self.progress, self.config
        model = config.model
        start = f"from {portable(model.pretrained)}" if model.pretrained else model.start
        facts = {
            "pictures": f"{self.pictures} of {', '.join(map(portable, config.data.path))}",
            **({"start": start} if model.pretrained or model.architecture == "loftup" else {}),
            "steps": f"{progress.step} of {config.batch * config.accumulate * self.processes.world} pictures each",
            "device": machine(self.processes.device, self.processes.world),
            "time": f"{progress.seconds / 60:.1f} minutes, validation included",
            "unreadable pictures replaced": progress.unreadable,
            "pictures without masks": progress.empty,
            "steps left out as not finite": progress.nonfinite,
        }
        try:
            refuse_others([self.folder / name for name in AT_THE_END])  # made by the user since the start
            up.save_pretrained(self.folder)
            card = training_card(config, up.config, facts, progress.measured)
            write_atomically(self.folder / CARD, card.encode())
        except (OSError, LoftUpError) as error:
            raise LoftUpError(
                f"cannot write the weights to {self.folder}: {error}; the last checkpoint holds them: free some space "
                "and run again with --resume"
            ) from error
        self.processes.say(
            f"{progress.unreadable} unreadable pictures replaced, {progress.empty} pictures without masks, "
            f"{progress.nonfinite} steps left out as not finite"
        )
        self.processes.say(f"finished: {how_to_load(config, self.folder)}")
        if config.hub:
            self.processes.say(f"pushed to {push(self.folder, config.hub)}")

    def close(self) -> None:
        """Close the logs."""
        if self.processes.main and hasattr(self, "board"):
            self.board.close()


def _compile(network: Any) -> None:
    if isinstance(network, UniversalNetwork):
        network.encoder.compile()  # the rest works on cells, whose numbers differ from step to step
    else:
        for part in (network.ca_transformer, network.final_conv):
            part.compile()
