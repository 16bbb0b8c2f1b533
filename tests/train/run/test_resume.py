"""Runs that are killed or told to stop, in processes of their own, and resumed."""

import os
import signal
import subprocess

import torch
from safetensors.torch import load_file
from small_run import ENVIRONMENT, RUN, make_material, small_config, steps_of

from loftup.train.config import to_yaml

STEPS = 16


def start(*arguments, **environment):
    command = [*RUN, *map(str, arguments)]
    return subprocess.Popen(command, env={**ENVIRONMENT, **environment}, stderr=subprocess.PIPE, text=True)


def wait_for(process, text):
    """Read what the process says until a line holds the text."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"never said {text!r}: {''.join(said)}")


def test_a_killed_and_a_stopped_run_end_as_if_undisturbed(tmp_path):
    """Student, teacher, optimizer, data order: the logs and weights are the same bytes (worker processes included)."""
    config = small_config(make_material(tmp_path), tmp_path / "whole")
    config.steps, config.save_every, config.batch, config.data.workers = STEPS, 3, 1, 1
    config.objective.self_distillation.weight, config.objective.self_distillation.every = 1.0, 2
    config.log_every = 2
    config.validation.path, config.validation.every, config.validation.images = [str(tmp_path / "val")], 5, 1
    file, broken = tmp_path / "run.yaml", tmp_path / "broken"
    file.write_text(to_yaml(config))

    undisturbed = start(file)
    killed = start(file, f"output={broken}")
    wait_for(killed, "step 5:")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    checkpoints = sorted(path.name for path in (broken / "checkpoints").glob("step_*.pt"))
    assert "step_000003.pt" in checkpoints
    assert f"step_{STEPS:06d}.pt" not in checkpoints
    assert 4 in steps_of(broken / "log.csv")

    stopped = start(file, f"output={broken}", "--resume")
    wait_for(stopped, "step 10:")
    os.kill(stopped.pid, signal.SIGTERM)
    said = stopped.stderr.read()
    assert stopped.wait() == 143
    assert "loftup train: stopped by SIGTERM after step 1" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("the same command with --resume goes on")
    assert steps_of(broken / "log.csv")[-1] < STEPS

    # What a launcher may set decides neither about precision nor about accumulation: the config does.
    launcher = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    resumed = start(file, f"output={broken}", "--resume", **launcher)
    resumed.stderr.read()
    undisturbed.stderr.read()
    assert (resumed.wait(), undisturbed.wait()) == (0, 0)
    assert steps_of(broken / "log.csv") == list(range(2, STEPS + 1, 2))
    for name in ("log.csv", "validation.csv"):
        assert (broken / name).read_text() == (tmp_path / "whole" / name).read_text()
    weights, expected = (load_file(folder / "model.safetensors") for folder in (broken, tmp_path / "whole"))
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
