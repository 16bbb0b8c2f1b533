"""A run in one process: what it writes, counts and refuses."""

import csv
import dataclasses
import errno
import math
import os
import signal
import sys
import threading

import pytest
import torch
from small_run import make_material, small_config, steps_of
from torch import nn

from loftup import LoftUp, LoftUpError
from loftup.files import alone_in
from loftup.train.config import OptimizerConfig, load_config
from loftup.train.data.loader import loader
from loftup.train.objective.objective import Objective
from loftup.train.run import checkpoint, engine
from loftup.train.run.build import build_backbones, build_upsampler, calibrate
from loftup.train.run.checkpoint import load_checkpoint
from loftup.train.run.engine import Interrupted, learning_rate, train
from loftup.train.run.folder import write_config


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material, tmp_path):
    return small_config(material, tmp_path / "run")


def rows(path):
    with path.open() as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def test_learning_rates():
    constant = OptimizerConfig(rate=2.0, warmup=4)
    assert [learning_rate(constant, step, 8) for step in range(8)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    cosine = OptimizerConfig(rate=2.0, schedule="cosine", warmup=2, final=0.1)
    expected = [1.0, 2.0, 2.0, 2 * (0.1 + 0.9 * 0.75), 2 * (0.1 + 0.9 * 0.25), 0.2]
    assert [learning_rate(cosine, step, 6) for step in (0, 1, 2, 3, 4, 5)] == pytest.approx(expected)
    assert learning_rate(cosine, 9, 6) == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(rate=2.0, schedule="cosine"), 0, 1) == 2.0


def test_a_run_from_beginning_to_end(config, capsys):
    """The weights are those of plain AdamW on the same batches; everything that is promised lies in the folder."""
    config.validation.path, config.validation.every, config.validation.pictures = config.data.path, 3, 1
    config.log_every, config.optimizer.clip, config.optimizer.warmup = 2, 0.5, 3
    config.accumulate = 2
    folder = train(config)
    said = capsys.readouterr().err

    torch.manual_seed(config.seed)
    backbone = build_backbones(config)[0]
    objective = Objective(config, build_upsampler(config, backbone), backbone)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.optimizer.rate, weight_decay=config.optimizer.weight_decay)
    losses, norms, batches = [], [], iter(loader(config, backbone))
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1, (step + 1) / 3)
        optimizer.zero_grad()
        loss = sum(objective(next(batches))[0] for _ in range(2)) / 2
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    up = LoftUp.from_pretrained(folder)
    for key, value in objective.up.state_dict().items():
        torch.testing.assert_close(up.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    table = rows(folder / "log.csv")
    assert list(table[0]) == [
        *("step", "rate", "loss", "mask_bicubic", "bicubic", "gradient", "unreadable", "empty", "nonfinite")
    ]
    assert [row["step"] for row in table] == [2, 4]
    assert [row["loss"] for row in table] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    assert [row["gradient"] for row in table] == pytest.approx([sum(norms[:2]) / 2, sum(norms[2:]) / 2], rel=1e-3)
    assert [row["rate"] for row in table] == pytest.approx([2e-4 / 3, 1e-4])

    assert up.config.backbone == "test_efficientnet.r160_in1k"
    assert load_config(folder / "train.yaml") == config
    assert steps_of(folder / "validation.csv") == [3, 4]
    assert {file.name for file in (folder / "pictures").iterdir()} == {"step_000003.png", "step_000004.png"}
    assert len(list((folder / "tensorboard").iterdir())) == 1
    saved = {file.name for file in (folder / "checkpoints").iterdir()}
    assert saved - {"step_000003.pt"} == {"best.pt", "step_000004.pt"}
    best = min(rows(folder / "validation.csv"), key=lambda row: row["loss"])
    state = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert state["step"] == best["step"]
    assert state["progress"]["best"] == best["loss"]
    assert (state["seed"], state["pictures"], state["config"]) == (0, 4, dataclasses.asdict(config))
    assert set(state["versions"]) == {"loftup", "torch", "timm"}
    assert "backbone   test_efficientnet.r160_in1k, 32 channels, patch 8" in said
    assert "pictures   5 of" in said
    assert "2 pictures x 2 x 1 processes a step, windows of 16 pixels" in said
    assert "starting at step 0 of 4" in said
    assert f"finished: LoftUp.from_pretrained({str(folder)!r})" in said


def test_the_student_of_a_checkpoint_loads(config):
    config.steps = 2
    folder = train(config)
    up = LoftUp.from_pretrained(folder / "checkpoints" / "step_000002.pt")
    for key, value in LoftUp.from_pretrained(folder).state_dict().items():
        assert torch.equal(up.state_dict()[key], value), key


def test_stage_2_goes_on_from_stage_1(config, tmp_path, capsys):
    config.steps = 2
    first = LoftUp.from_pretrained(train(config))
    second = dataclasses.replace(config, output=str(tmp_path / "second"), steps=4, precision="bfloat16")
    second.model.pretrained = config.output
    second.objective.mask_bicubic.weight, second.objective.self_distillation.weight = 0.0, 20.0
    second.objective.self_distillation.every, second.objective.self_distillation.decay = 3, 0.9
    folder = train(second)
    state = load_checkpoint(folder / "checkpoints" / "step_000002.pt")
    for key, value in first.state_dict().items():
        assert torch.equal(state["objective"][f"teacher.{key}"], value), key
    assert not torch.equal(state["state_dict"]["upsampler.final_conv.0.weight"], first.upsampler.final_conv[0].weight)
    state = load_checkpoint(folder / "checkpoints" / "step_000004.pt")
    moved = state["objective"]["teacher.upsampler.final_conv.0.weight"]
    assert 0 < (moved - first.upsampler.final_conv[0].weight).abs().max() < 1e-4
    assert f"from {config.output}" in capsys.readouterr().err
    # What a run started from is needed no more when it is resumed.
    (tmp_path / "run" / "model.safetensors").unlink()
    (folder / "checkpoints" / "step_000004.pt").unlink()
    before = (folder / "log.csv").read_text()
    train(second, resume=True)
    assert (folder / "log.csv").read_text() == before
    assert rows(folder / "log.csv")[0]["self_distillation"] > 0


def test_pretrained_weights_must_fit_the_backbone(config, tmp_path):
    LoftUp(24).save_pretrained(tmp_path / "other")
    config.model.pretrained = str(tmp_path / "other")
    with pytest.raises(LoftUpError, match=r"gives 32 channels, the upsampler expects 24"):
        train(config)


def test_heads_must_fit_the_backbone(config):
    config.model.heads = 5
    with pytest.raises(LoftUpError, match=r"does not fit 'test_efficientnet.*5 heads do not divide.*see model.heads"):
        train(config)


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_random_starts(config, batch_norm):
    """Frozen statistics are calibrated before the first step and stay; others follow the batches."""
    config.model.start, config.model.batch_norm, config.steps = "random", batch_norm, 2
    config.window = 16 if batch_norm == "frozen" else None
    up = LoftUp.from_pretrained(train(config))
    torch.manual_seed(config.seed)
    backbone = build_backbones(config)[0]
    expected = build_upsampler(config, backbone)
    if batch_norm == "frozen":
        calibrate(expected, config, backbone)
    norm, other = up.upsampler.first_conv[2], expected.upsampler.first_conv[2]
    assert not torch.equal(norm.running_mean, torch.zeros(52))
    assert torch.equal(norm.running_mean, other.running_mean) == (batch_norm == "frozen")
    assert int(norm.num_batches_tracked) == (32 if batch_norm == "frozen" else 2)


def test_the_folder_of_another_run(config, tmp_path, capsys):
    config.steps = 2
    train(config, resume=True)
    assert f"no checkpoint in {config.output} to resume from: a new run" in capsys.readouterr().err
    with pytest.raises(LoftUpError, match=r"run holds a run already \(step_000002.pt\); go on with it by --resume, or"):
        train(config)
    changed = dataclasses.replace(config, seed=1, accumulate=2, window=8)
    message = (
        r"step_000002.pt was made with another config: window: 16, now 8; seed: 0, now 1; pictures a step \(batch x "
        r"accumulate x processes\): 2, now 4. Resume with the values of .*train.yaml, or start a new run"
    )
    with pytest.raises(LoftUpError, match=message):
        train(changed, resume=True)
    with pytest.raises(LoftUpError, match=r"step_000002.pt has had 2 steps, more than steps=1"):
        train(dataclasses.replace(config, steps=1), resume=True)
    longer = dataclasses.replace(config, steps=3, save_every=1, log_every=2, keep=1, batch=1, accumulate=2)
    train(longer, resume=True)
    assert steps_of(tmp_path / "run" / "log.csv") == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003.pt"]
    train(longer, resume=True)
    assert "going on at step 3 of 3" in capsys.readouterr().err


def test_a_folder_killed_before_the_first_checkpoint(config, tmp_path):
    config.steps = 1
    write_config(config)
    (tmp_path / "run" / "log.csv").write_text("step,loss\n1,0.5\n")
    with pytest.raises(LoftUpError, match=r"holds a run already \(log.csv\)"):
        train(config)
    train(config, resume=True)
    assert steps_of(tmp_path / "run" / "log.csv") == [1]
    for file in ("log.csv", "checkpoints/step_000001.pt"):
        (tmp_path / "run" / file).unlink()
    with pytest.raises(LoftUpError, match=r"holds a run already \(model.safetensors\)"):
        train(config)


MINE = {
    "README.md": "# My project with loftup\n", "config.json": '{"model_type": "mine"}', "train.yaml": "steps: 1\n",
    "validation.csv": "step,mine\n1,2\n", "log.csv": "step,mine\n", "tensorboard/mine": "x", "pictures/me.png": "x",
    "checkpoints/mine.pt": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_what_is_the_users_is_not_overwritten(config, tmp_path, name):
    config.steps = 1
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text(MINE[name])
    for resume in (False, True):
        match = rf"{name.partition('/')[0]} exists and was not made by loftup, which replaces only its own"
        with pytest.raises(LoftUpError, match=match):
            train(config, resume=resume)
    assert [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()] == [MINE[name]]


def test_what_the_user_writes_meanwhile_stays(config, tmp_path, monkeypatch):
    config.steps = 1
    steps = engine._Run.steps

    def write_too(run, stop):
        steps(run, stop)
        (tmp_path / "run" / "README.md").write_text("# Mine\n")

    with monkeypatch.context() as patch:
        patch.setattr(engine._Run, "steps", write_too)
        with pytest.raises(LoftUpError, match=r"cannot write the weights to .*README.md exists and was not made by"):
            train(config)
    assert (tmp_path / "run" / "README.md").read_text() == "# Mine\n"
    (tmp_path / "run" / "README.md").unlink()
    train(config, resume=True)
    train(config, resume=True)
    assert (tmp_path / "run" / "README.md").read_text().startswith("---\nlibrary_name: loftup\n")


def test_a_folder_that_another_run_writes_to(config, tmp_path):
    with (
        alone_in(tmp_path / "run"),
        pytest.raises(LoftUpError, match=rf"process {os.getpid()} on .* is writing to the"),
    ):
        train(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".loftup.0123456789abcdef").write_bytes(b"half")
    config.steps = 1
    write_config(config)
    assert not list((train(config)).rglob(".*"))


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(LoftUpError, match=r"cannot write to the folder .*run: .*set another with output="):
        train(config)


class _Broken(Objective):
    """The loss of chosen steps is not finite."""

    broken: frozenset[int] = frozenset()
    calls = 0

    def forward(self, batch):
        loss, parts = super().forward(batch)
        type(self).calls += 1
        if self.calls in self.broken:
            self.up.upsampler.first_conv[2].running_mean.data.fill_(math.nan)
            return loss * math.nan, parts
        return loss, parts


def test_steps_that_are_not_finite_are_left_out(config, monkeypatch, caplog):
    config.model.start, config.model.batch_norm, config.window, config.log_every = "random", "batch", None, 2
    monkeypatch.setattr(_Broken, "broken", frozenset({2, 3, 4}))
    monkeypatch.setattr(_Broken, "calls", 0)
    monkeypatch.setattr(engine, "Objective", _Broken)
    folder = train(config)
    assert [(row["step"], row["nonfinite"]) for row in rows(folder / "log.csv")] == [(2, 1)]
    assert load_checkpoint(folder / "checkpoints" / "step_000004.pt")["progress"]["nonfinite"] == 3
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"step {step} is left out, for it is not finite" for step in (2, 3, 4)
    ]
    assert "loss nan" in caplog.text
    # Only the first step has changed anything, the running statistics included.
    monkeypatch.setattr(engine, "Objective", Objective)
    once = train(dataclasses.replace(config, output=f"{config.output}_once", steps=1))
    for key, value in LoftUp.from_pretrained(once).state_dict().items():
        assert torch.equal(LoftUp.from_pretrained(folder).state_dict()[key], value), key


def test_too_many_steps_that_are_not_finite(config, monkeypatch):
    config.steps = 40
    monkeypatch.setattr(_Broken, "broken", frozenset(range(3, 50)))
    monkeypatch.setattr(_Broken, "calls", 0)
    monkeypatch.setattr(engine, "Objective", _Broken)
    with pytest.raises(
        LoftUpError, match=r"20 steps in a row were not finite \(the last, 22: loss nan.*a lower optimizer.rate"
    ):
        train(config)


def test_unreadable_pictures_are_counted_and_named(config, material, tmp_path, caplog):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (material / "data").iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 200 if file.name == "p0.jpg" else None])
    config.data.path, config.steps, config.batch = [str(folder)], 8, 5
    output = train(config)
    assert rows(output / "log.csv")[-1]["unreadable"] >= 8
    named = [record.message for record in caplog.records if "p0.jpg" in record.message]
    assert len(named) == 5
    assert named[0].startswith("a picture is left out: ")
    assert named[-1].endswith("; further ones are only counted")


def test_a_full_disk_stops_the_run(config, monkeypatch, tmp_path):
    written, write = [], checkpoint.write_atomically

    def fill(path, content):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", fill)
    with pytest.raises(LoftUpError, match=r"cannot write the checkpoint .*step_000004.pt .*No space left on device"):
        train(config)
    assert load_checkpoint(written[0])["step"] == 2
    monkeypatch.setattr(checkpoint, "write_atomically", write)
    train(config, resume=True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_cannot_be_written(config, monkeypatch, tmp_path):
    config.steps = 1

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LoftUp, "save_pretrained", full)
    with pytest.raises(LoftUpError, match=r"cannot write the weights to .*No space left.*run again with --resume"):
        train(config)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step(config, monkeypatch, number, status, tmp_path):
    class Told(Objective):
        def forward(self, batch):
            if batch.step == 2:
                os.kill(os.getpid(), number)
            return super().forward(batch)

    before = signal.getsignal(number)
    config.save_every = 100
    monkeypatch.setattr(engine, "Objective", Told)
    with pytest.raises(
        Interrupted, match=rf"stopped by {number.name} after step 3 of 4, saved in .*--resume goes on"
    ) as stop:
        train(config)
    assert stop.value.status == status
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003.pt"]
    monkeypatch.setattr(engine, "Objective", Objective)
    train(config, resume=True)
    assert steps_of(tmp_path / "run" / "log.csv") == [1, 2, 3, 4]


@pytest.fixture
def keyboard():
    """SIGINT as at a keyboard: shells let processes in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(config, monkeypatch, keyboard):
    class Told(Objective):
        def forward(self, batch):
            os.kill(os.getpid(), signal.SIGINT)
            # Two signals that come before Python has looked are one.
            while signal.getsignal(signal.SIGINT) is not keyboard:
                pass
            os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch)

    monkeypatch.setattr(engine, "Objective", Told)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def test_a_signal_is_answered(config, monkeypatch, capfd):
    class Told(Objective):
        def forward(self, batch):
            os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch)

    monkeypatch.setattr(engine, "Objective", Told)
    with pytest.raises(Interrupted):
        train(config)
    assert "\nstopping after this step; once more to stop at once\n" in capfd.readouterr().err


def test_in_a_thread_of_its_own(config):
    config.steps, found = 1, []
    thread = threading.Thread(target=lambda: found.append(train(config)))
    thread.start()
    thread.join()
    assert (found[0] / "model.safetensors").exists()


def test_compiled_networks_keep_their_keys(config, monkeypatch):
    """The compiler itself is torch's affair: here it calls the function as it is, and counts."""
    compiled = []
    plain = train(dataclasses.replace(config, output=f"{config.output}_plain"))
    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: (compiled.append(type(self)), original(self, backend="eager"))
    )
    config.compile = True
    up = LoftUp.from_pretrained(train(config))
    assert len(compiled) == 2
    for key, value in LoftUp.from_pretrained(plain).state_dict().items():
        torch.testing.assert_close(up.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_activations_computed_twice_give_the_same(config):
    once = LoftUp.from_pretrained(train(config))
    again = dataclasses.replace(config, output=f"{config.output}_checkpointing", checkpointing=True)
    for key, value in LoftUp.from_pretrained(train(again)).state_dict().items():
        torch.testing.assert_close(once.state_dict()[key], value, msg=key)


def test_missing_accelerate_is_said(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(LoftUpError, match=r'training needs accelerate: pip install "loftup\[train\]"'):
        train(config)
