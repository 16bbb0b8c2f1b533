"""How runs start, fail and go on: nothing hangs, nothing is lost, messages name the key."""

import csv
import dataclasses
import re
import shutil
import subprocess
import sys

import pytest
import torch
from small_run import ENVIRONMENT, make_material, small_config, steps_of

from loftup import LoftUp, LoftUpError
from loftup.train.config import load_config, to_yaml
from loftup.train.objective.objective import Objective
from loftup.train.objective.start import start_as_interpolator
from loftup.train.run import engine
from loftup.train.run.build import build_backbones, build_upsampler, check_paths
from loftup.train.run.checkpoint import load_checkpoint
from loftup.train.run.engine import train
from loftup.train.run.validation import Validation


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material, tmp_path):
    return small_config(material, tmp_path / "run")


def test_a_failed_start_leaves_its_folder_free(config, monkeypatch, tmp_path):
    class Failing(Objective):
        def forward(self, batch):
            raise RuntimeError("out of memory")

    config.steps, config.data.sizes = 1, [33]
    with pytest.raises(LoftUpError, match="data.sizes"):
        train(config)
    assert not (tmp_path / "run" / "train.yaml").exists()
    config.data.sizes = [32]
    monkeypatch.setattr(engine, "Objective", Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    monkeypatch.setattr(engine, "Objective", Objective)
    assert load_config(train(config) / "train.yaml") == config


@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_that_come_frozen_are_trained_but_for_the_channel_norm(config, material, tmp_path, pretrained):
    (backbone,) = build_backbones(config)
    if pretrained:
        build_upsampler(config, backbone).save_pretrained(tmp_path / "weights")
        config.model.pretrained = str(tmp_path / "weights")
    up = build_upsampler(config, backbone)
    assert all(parameter.requires_grad != pretrained for parameter in up.parameters())
    Objective(config, up, backbone)
    frozen = {name for name, parameter in up.named_parameters() if not parameter.requires_grad}
    assert frozen == {"channelnorm.norm.weight", "channelnorm.norm.bias"}
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_paths_that_are_not_there(config, material):
    weights, path = config.backbone.weights, config.data.path
    config.data.path = ["nowhere"]
    with pytest.raises(LoftUpError, match=r"data.path names nowhere, which is not there.*set data.path=\[FOLDER\]"):
        train(config)
    config.data.path, config.validation.path = path, [str(material / "data" / "p0.jpg")]
    with pytest.raises(LoftUpError, match=r"validation.path names .*p0.jpg, which is a file.*validation.path=\[\] for"):
        train(config)
    config.validation.path, config.validation.probe, config.validation.probe_classes = [], "none", 3
    with pytest.raises(LoftUpError, match=r"validation.probe names none, which is not there.*validation.probe=null"):
        train(config)
    config.validation.probe, config.backbone.weights = None, "no.safetensors"
    with pytest.raises(LoftUpError, match=r"backbone.weights names no.safetensors, which is no file; set backbone.w"):
        train(config)
    config.backbone.weights, config.data.path = weights, ["sa_{000000..000001}.tar"]
    check_paths(config)


def test_measurements_added_and_dropped_when_resumed(config, material):
    config.steps, config.validation.every, config.validation.path = 2, 2, [str(material / "val")]
    folder = train(config)
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["progress"]["best_by"] == "loss"
    config.steps, config.validation.probe, config.validation.probe_classes = 4, str(material / "val"), 3
    train(config, resume=True)
    with (folder / "validation.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert (first["step"], first["miou"]) == ("2", "")
    assert float(second["loss"]) > 0
    # The probe decides from now on, whatever the loss was.
    progress = load_checkpoint(folder / "checkpoints" / "best.pt")["progress"]
    assert (progress["step"], progress["best_by"], progress["best"]) == (4, "miou", -float(second["miou"]))
    config.steps, config.validation.path = 6, []
    train(config, resume=True)
    with (folder / "validation.csv").open() as stream:
        third = list(csv.DictReader(stream))[-1]
    assert (third["step"], third["loss"]) == ("6", "")
    assert float(third["accuracy"]) >= 0


def test_a_validation_that_fails_costs_no_steps_and_is_made_up_for(config, material, monkeypatch, tmp_path):
    config.validation.path, config.validation.every = [str(material / "val")], 2
    measure = Validation.measure

    def fail(self, up):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Validation, "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002.pt"]
    monkeypatch.setattr(Validation, "measure", measure)
    train(config, resume=True)
    assert steps_of(tmp_path / "run" / "validation.csv") == [2, 4]


def test_moved_data(config, material, tmp_path):
    """Files may move between a run and its resumption, the number of pictures may not change."""
    config.steps = 2
    train(config)
    moved = tmp_path / "moved"
    shutil.copytree(material / "data", moved)
    shutil.copy(config.backbone.weights, tmp_path / "moved.safetensors")
    config.steps, config.data.path, config.backbone.weights = 3, [str(moved)], str(tmp_path / "moved.safetensors")
    config.checkpointing = True
    train(config, resume=True)
    assert steps_of(tmp_path / "run" / "log.csv") == [1, 2, 3]
    (moved / "p0.jpg").unlink()
    (moved / "p0.png").unlink()
    message = r"moved \(data.path\) has 4 pictures, the run in .*run had 5.*resume with the same pictures, or start"
    with pytest.raises(LoftUpError, match=message):
        train(config, resume=True)


def test_progress_without_a_terminal(config, capsys, monkeypatch):
    config.steps, config.log_every = 3, 2
    train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 2 of 3", "step 3 of 3"]
    assert re.fullmatch(r"step 2 of 3: loss [\d.]+, [\d.e+]+ steps/s, \d\d:\d\d left", lines[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(dataclasses.replace(config, output=f"{config.output}_shown"))
    assert "step 2 of 3:" not in capsys.readouterr().err


def test_what_self_distillation_alone_looks_at(config, capsys):
    config.steps, config.objective.mask_bicubic.weight, config.objective.self_distillation.weight = 1, 0.0, 1.0
    train(config)
    assert "a step, crops\n" in capsys.readouterr().err


def test_the_interpolator_is_made_for_the_grid(config):
    config.data.sizes = [32, 64]
    backbone = build_backbones(config)[0]
    torch.manual_seed(0)
    found = build_upsampler(config, backbone)
    torch.manual_seed(0)
    expected = LoftUp(found.config)
    start_as_interpolator(expected, 8)
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_stage_1_that_was_not_trained(config, hub):
    config.model.pretrained = "runs/quick_cpu"
    message = (
        r"no folder or file runs/quick_cpu \(model.pretrained\), and the Hub gives no such repository; train stage"
    )
    with pytest.raises(LoftUpError, match=message):
        train(config)
    hub.close()
    with pytest.raises(
        LoftUpError, match=r"and the Hub cannot be asked for such a repository; train stage 1 first, or"
    ):
        train(config)
    config.model.pretrained = "dinov2_vits1"
    with pytest.raises(LoftUpError, match="unknown LoftUp weights"):
        train(config)


FAILING = """
import sys
from loftup.train.run import engine
from loftup.train.config import load_config
from loftup.train.objective.objective import Objective

class Failing(Objective):
    def forward(self, batch):
        raise RuntimeError("out of memory")

if sys.argv[2] == "fail":
    engine.Objective = Failing
engine.train(load_config(sys.argv[1]))
"""


@pytest.mark.parametrize(("which", "said"), [("fail", "RuntimeError: out of memory"), ("read", "cannot be read")])
def test_failures_end_the_process_with_workers(config, tmp_path, which, said):
    config.data.workers = 1
    if which == "read":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.jpg").write_bytes(b"x")
        config.data.path = [str(tmp_path / "data")]
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, tmp_path / "failing.py", tmp_path / "run.yaml", which]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
