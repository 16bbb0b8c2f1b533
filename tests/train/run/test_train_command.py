"""``loftup train`` as a user calls it."""

import signal

import pytest
from small_run import make_material, small_config

from loftup import LoftUp
from loftup.cli import main
from loftup.train.config import load_config, to_yaml
from loftup.train.run import command
from loftup.train.run.engine import Interrupted


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(small_config(make_material(tmp_path), tmp_path / "run")))
    return path


def test_train_and_resume(file, tmp_path, capsys):
    assert main(["train", str(file), "steps=1", "optimizer.rate=1e-3"]) == 0
    assert load_config(tmp_path / "run" / "train.yaml").optimizer.rate == 0.001
    assert "starting at step 0 of 1" in capsys.readouterr().err
    assert main(["train", str(file), "steps=1"]) == 2
    assert "loftup train: error: " in capsys.readouterr().err
    assert main(["train", str(file), "steps=2", "optimizer.rate=1e-3", "--resume"]) == 0
    assert "going on at step 1 of 2" in capsys.readouterr().err
    assert LoftUp.from_pretrained(tmp_path / "run").config.channels == 32


def test_values_behind_an_option(file, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "train", lambda config, resume: asked.append((config.steps, config.batch, resume)))
    assert main(["train", str(file), "batch=3", "--resume", "steps=7"]) == 0
    assert asked == [(7, 3, True)]
    for arguments in (["train", str(file), "--resum3"], ["train", str(file), "--resume", "x"], ["list", "steps=7"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_errors_are_one_line(file, capsys):
    assert main(["train", str(file), "setps=1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("loftup train: error: unknown key 'setps' in the command line; did you mean 'steps' or ")
    assert said.count("\n") == 1
    assert main(["train", "quick_cpuu"]) == 2
    assert "did you mean 'quick_cpu'" in capsys.readouterr().err


def test_a_push_is_asked_for_by_an_option(file, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "train", lambda config, resume: asked.append((config.hub, resume)))
    assert main(["train", str(file), "--push-to-hub", "me/mine", "--resume"]) == 0
    assert main(["train", str(file), "hub=me/other"]) == 0
    assert asked == [("me/mine", True), ("me/other", False)]


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_a_stopped_run_says_so_once(file, monkeypatch, capsys, rank, lines):
    def stop(config, resume):
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(command, "train", stop)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert main(["train", str(file)]) == 143
    assert capsys.readouterr().err == "loftup train: stopped by SIGTERM\n" * lines
