"""The model card, and pushing a finished run."""

import json

import pytest
import torch
import yaml
from small_run import make_material, small_config

from loftup import LoftUp, LoftUpConfig, LoftUpError
from loftup.train.config import BackboneConfig, TrainConfig, load_config
from loftup.train.run import card
from loftup.train.run.card import machine, push, training_card, versions
from loftup.train.run.engine import train


def test_a_card_holds_facts_numbers_and_a_config_that_reads_back(tmp_path):
    config = TrainConfig(output="runs/mine", hub="me/mine")
    config.data.path, config.objective.mask_bicubic.weight = ["photos"], 0.5
    text = training_card(config, LoftUpConfig(32), {"pictures": "5 of photos"}, {"loss": 0.123456, "miou": 30.0})
    header, *_ = text.split("---\n")[1:]
    assert yaml.safe_load(header)["library_name"] == "loftup"
    assert 'LoftUp.from_pretrained("me/mine")' in text
    assert "| pictures | 5 of photos |" in text
    assert "| loss | 0.1235 |" in text
    assert "| miou | 30 |" in text
    assert f"| versions | loftup {versions()['loftup']}, torch {torch.__version__}, timm" in text
    (tmp_path / "card.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_config(tmp_path / "card.yaml") == config


def test_a_card_without_hub_and_numbers():
    text = training_card(TrainConfig(output="runs/mine"), LoftUpConfig(32), {}, {})
    assert 'LoftUp.from_pretrained("./mine")' in text
    assert "Measured" not in text


def test_a_card_tells_how_to_load_the_backbone():
    config = TrainConfig()
    config.backbone = BackboneConfig("resnet18", "/home/me/w.safetensors", 3, options={"img_size": 64})
    text = training_card(config, LoftUpConfig(32), {}, {})
    assert (
        "from loftup import LoftUp, load_backbone\n\n"
        "backbone = load_backbone('resnet18', weights='w.safetensors', layer=3, img_size=64)  # weights: your file\n"
    ) in text
    config.backbone = BackboneConfig("resnet18", views=4)
    text = training_card(config, LoftUpConfig(32), {}, {})
    assert "\nbackbone = load_backbone('resnet18', views=4)\n" in text
    assert "views: 4\n" in text.split("```yaml\n")[1]
    assert "\nbackbone = load_backbone('dinov2_vits14')\n" in training_card(TrainConfig(), LoftUpConfig(32), {}, {})


def test_a_card_keeps_places_on_the_machine_to_itself():
    config = TrainConfig(output="/home/me/runs/mine")
    config.data.path, config.data.cache = ["/home/me/photos", "data/more"], "/home/me/cache"
    config.validation.path, config.validation.probe = ["/home/me/val"], "/home/me/probe"
    config.backbone.weights, config.model.pretrained = "/home/me/w.safetensors", "/home/me/first"
    text = training_card(config, LoftUpConfig(32), {}, {"loss": 1.0})
    assert "/home" not in text
    assert "Measured on the validation pictures (val, probe) after the last step" in text
    written = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert written["data"]["path"] == ["photos", "data/more"]
    assert (written["output"], written["data"]["cache"]) == ("mine", "cache")
    assert config.data.path[0] == "/home/me/photos"


def test_the_machine(monkeypatch):
    monkeypatch.setattr(card.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 at {device}")
    assert machine(torch.device("cpu"), 1) == "x86_64"
    assert machine(torch.device("cpu"), 2) == "2 x x86_64"
    assert machine(torch.device("cuda", 1), 8) == "8 x H200 at cuda:1"


def test_a_finished_run_is_pushed(tmp_path, hub, monkeypatch, capsys):
    """Weights, config and card alone; without a token nothing is begun; what could not be pushed is pushed later."""
    config = small_config(make_material(tmp_path), tmp_path / "run")
    config.steps, config.hub = 1, "me/mine"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(
        LoftUpError, match=r"pushing to 'me/mine' needs a Hub token: log in with `hf auth login` before"
    ):
        train(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.close()
    with pytest.raises(
        LoftUpError, match=r"pushing .*failed: .*The weights are in .*run; push them with --resume --push"
    ):
        train(config)
    assert LoftUp.from_pretrained(tmp_path / "run").config.channels == 32
    hub.open()
    train(config, resume=True)
    files = hub.repos["me/mine"]["main"]
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(files["config.json"])["channels"] == 32
    assert files["README.md"].decode() == (tmp_path / "run" / "README.md").read_text()
    assert "pushed to http://127.0.0.1" in capsys.readouterr().err
    assert LoftUp.from_pretrained("me/mine").config.backbone == "test_efficientnet.r160_in1k"


def test_only_whole_runs_are_pushed(tmp_path):
    with pytest.raises(FileNotFoundError):
        push(tmp_path, "me/mine")
