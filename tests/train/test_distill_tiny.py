"""The recipe of the packaged backbone, loaded from its file."""

import importlib.util
from pathlib import Path

import pytest
import torch

from loftup.weights.catalogue import TINY_BACKBONE as FOLDER

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recipes" / "distill_tiny.py"
spec = importlib.util.spec_from_file_location("distill_tiny", SCRIPT)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def test_distillation_stops_and_goes_on_as_if_it_had_not(tmp_path, capsys, monkeypatch):
    pil = pytest.importorskip("PIL.Image")
    import timm
    from safetensors.torch import load_file, save_file

    pil.new("RGB", (64, 48), (200, 30, 60)).save(tmp_path / "a.jpg")
    pil.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "b.jpg")
    teacher = timm.create_model("mobilenetv2_035", pretrained=False)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    command = [
        str(tmp_path),
        "--teacher",
        "mobilenetv2_035",
        "--teacher-weights",
        str(tmp_path / "teacher.safetensors"),
    ]
    command += ["--layers", "3", "--batch", "2", "--steps", "2", "-o", str(tmp_path / "run")]
    recipe.main(command)
    assert "2.85 M parameters" in capsys.readouterr().out
    made = load_file(tmp_path / "run" / "model.safetensors")
    assert made.keys() == load_file(FOLDER / "model.safetensors").keys()
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in made.values())
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == state["steps"] == 2

    read = recipe.Pictures.__getitem__

    def interrupted(self, index):
        if index == 1:  # the second step
            raise KeyboardInterrupt
        return read(self, index)

    command[-1] = str(tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(recipe.Pictures, "__getitem__", interrupted)
        with pytest.raises(SystemExit, match="stopped after step 1, saved"):
            recipe.main(command)
    recipe.main(command)
    again = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(made[key], again[key]) for key in made)


def test_distillation_without_pictures_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no \.jpg file"):
        recipe.main(
            [str(tmp_path), "--teacher", "resnet18", "--teacher-weights", "none", "--layers", "3", "-o", str(tmp_path)]
        )
