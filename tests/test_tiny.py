"""The backbone that comes with the package, and its distillation."""

import pytest
import torch

from loftup import load_backbone
from loftup.backbones import identify
from loftup.weights.catalogue import TINY_BACKBONE as FOLDER


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny")


def test_tiny_needs_no_network_and_takes_any_size(tiny):
    image = tiny.preprocess(torch.randint(0, 255, (3, 96, 160), dtype=torch.uint8))
    with torch.inference_mode():
        features = tiny(image)
    assert features.shape == (1, 192, 6, 10)
    assert features.dtype == torch.float32
    assert not tiny.training
    assert identify(tiny) == "tiny"


def test_tiny_is_small(tiny):
    assert sum(p.numel() for p in tiny.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6 * 2**20


def test_tiny_knows_edges_from_flat_ground(tiny):
    """Its weights are trained ones: cells of one side of an edge are alike, those across it are not."""
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    image[0, :, :112], image[1, :, 112:] = 200, 160
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(tiny(tiny.preprocess(image))[0, :, 7], dim=0)  # (C, 14)
    same, across = rows[:, 2] @ rows[:, 4], rows[:, 2] @ rows[:, 11]
    assert same > across + 0.05


def test_tiny_takes_options_of_its_own(tiny):
    random = load_backbone("tiny", weights=False, mean=(0, 0, 0), layer=2)
    assert random.mean == (0, 0, 0)
    assert random.std == (0.5, 0.5, 0.5)
    assert random.layer == 2
    copied = load_backbone("tiny", weights=FOLDER / "model.safetensors")
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(copied(image), tiny(image))


def test_distillation_stops_and_goes_on_as_if_it_had_not(tmp_path, capsys, monkeypatch):
    pil = pytest.importorskip("PIL.Image")
    import timm
    from safetensors.torch import load_file, save_file

    from loftup.train.distill import Pictures, main

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
    main(command)
    assert "2.85 M parameters" in capsys.readouterr().out
    made = load_file(tmp_path / "run" / "model.safetensors")
    assert made.keys() == load_file(FOLDER / "model.safetensors").keys()
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in made.values())
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == state["steps"] == 2

    read = Pictures.__getitem__

    def interrupted(self, index):
        if index == 1:  # the second step
            raise KeyboardInterrupt
        return read(self, index)

    command[-1] = str(tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(Pictures, "__getitem__", interrupted)
        with pytest.raises(SystemExit, match="stopped after step 1, saved"):
            main(command)
    main(command)
    again = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(made[key], again[key]) for key in made)


def test_distillation_without_pictures_says_so(tmp_path):
    from loftup.train.distill import main

    with pytest.raises(SystemExit, match=r"no \.jpg file"):
        main(
            [str(tmp_path), "--teacher", "resnet18", "--teacher-weights", "none", "--layers", "3", "-o", str(tmp_path)]
        )
