"""The command, end to end on small weights."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import shared
from PIL import Image
from safetensors import safe_open

import loftup
from loftup import LoftUp, LoftUpConfig
from loftup.cli import drawn_scene, main

MOBILENET = ["--layer", "1", "--option", "pad_type=same", "--mean", ".5", ".5", ".5", "--std", ".5", ".5", ".5"]


@pytest.fixture
def models(tmp_path):
    """Options that name a small random backbone and LoftUp in local files."""
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "backbone.pth")
    LoftUp(LoftUpConfig(32, image_frequencies=4)).save_pretrained(tmp_path / "up")
    return [
        "--backbone", "test_resnet", "--backbone-weights", str(tmp_path / "backbone.pth"), "--layer", "1",
        "--weights", str(tmp_path / "up"), "--size", "48", "64", "--input", "64",
    ]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        drawn_scene(60 + 10 * index, 80).save(folder / f"scene{index}.png")
    return folder


def test_demo_draws_a_scene_when_no_image_is_given(models, tmp_path, capsys):
    assert main(["demo", *models, "-o", str(tmp_path / "new" / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "-> (32, 48, 64) in" in out
    assert Image.open(tmp_path / "new" / "out.png").width == 4 * 64 + 3 * 4


@pytest.mark.slow
def test_demo_on_a_photograph_with_real_weights(photo, tmp_path, capsys):
    weights = shared("weights/mobilenetv2_100.safetensors")
    up = shared("weights/loftup_mobilenetv2_100_s16")
    done = main([
        "demo", str(photo), "--backbone", "mobilenetv2_100", "--backbone-weights", str(weights), "--weights", str(up),
        "--layer", "3", *MOBILENET[2:], "--size", "168", "224", "-o", str(tmp_path / "demo.png"),
    ])  # fmt: skip
    assert done == 0, capsys.readouterr().err
    assert "(96, 14, " in capsys.readouterr().out
    picture = torch.frombuffer(bytearray(Image.open(tmp_path / "demo.png").tobytes()), dtype=torch.uint8).float()
    assert picture.std() > 30


def test_features_are_written_resumed_and_guarded(models, photos, tmp_path, capsys):
    out = tmp_path / "features"
    command = ["features", str(photos / "scene0.png"), *models, "-o", str(out)]
    assert main(command) == 0
    first = (out / "scene0.png.safetensors").stat().st_mtime_ns
    assert main(["features", str(photos), *models, "-o", str(out)]) == 0
    assert "1 of 3 images are finished already" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == [f"scene{index}.png.safetensors" for index in range(3)]
    assert (out / "scene0.png.safetensors").stat().st_mtime_ns == first
    with safe_open(out / "scene1.png.safetensors", framework="pt") as handle:
        features, metadata = handle.get_tensor("features"), handle.metadata()
    assert features.shape == (32, 48, 64)
    assert features.dtype == torch.float16
    assert metadata["size"] == "48x64"
    assert metadata["backbone"] == "test_resnet"
    assert metadata["image"] == "scene1.png"
    assert metadata["loftup_version"] == loftup.__version__

    assert main([*command, "--input", "32"]) == 2
    assert "written with other settings (input '64', now '32')" in capsys.readouterr().err
    assert main([*command, "--input", "32", "--overwrite"]) == 0
    assert (out / "scene0.png.safetensors").stat().st_mtime_ns != first
    assert main([*command[:2], *models, "--input", "32", "-o", str(out)]) == 0


def test_features_equal_the_library(models, photos, tmp_path):
    assert main(["features", str(photos / "scene2.png"), *models, "-o", str(tmp_path)]) == 0
    with safe_open(tmp_path / "scene2.png.safetensors", framework="pt") as handle:
        written = handle.get_tensor("features")
    backbone = loftup.load_backbone("test_resnet", weights=tmp_path / "backbone.pth", layer=1)
    up = LoftUp.from_pretrained(tmp_path / "up")
    image = photos / "scene2.png"
    with torch.inference_mode():
        low = backbone(backbone.preprocess(image, size=(64, 64)))
        expected = up(low, backbone.preprocess(image), size=(48, 64))
    torch.testing.assert_close(written, expected[0].half())


def test_one_unreadable_image_is_reported_and_the_rest_written(models, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"not a picture")
    (photos / "half.png").write_bytes((photos / "scene0.png").read_bytes()[:200])
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "broken.png: cannot read the image" in err
    assert "half.png: cannot read the image" in err
    assert "wrote 3 of 5 files" in err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_interrupt_leaves_whole_files(models, photos, tmp_path, capsys, monkeypatch):
    import loftup.weights

    write = loftup.weights.write_atomically

    def once(path, content):
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr("loftup.weights.write_atomically", once)
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 130
    assert "interrupted; files already written are whole" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["scene0.png.safetensors"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--weights", "dinov2_vits15"], "did you mean 'dinov2_vits14'"),
        (["--backbone-weights", "nowhere.pth"], "nowhere.pth"),
        (["--layer", "2"], "48"),
        (["--size", "0", "5"], "size must be positive"),
        (["--option", "no_such_option=1"], "no_such_option"),
    ],
)
def test_errors_are_one_line_and_status_two(models, tmp_path, capsys, change, text):
    assert main(["demo", *models, *change, "-o", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("loftup demo: error: ")
    assert text in err
    assert not (tmp_path / "x.png").exists()


def test_without_a_network_the_demo_says_how_to_give_local_files(hub, tmp_path, capsys):
    hub.close()
    assert main(["demo", "-o", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert "haiwen/loftup-dinov2s" in err
    assert "--weights" in err
    assert "--backbone-weights" in err


def test_two_images_of_one_name_are_refused(models, photos, tmp_path, capsys):
    other = tmp_path / "more"
    other.mkdir()
    drawn_scene(60, 80).save(other / "scene0.png")
    assert main(["features", str(photos), str(other / "scene0.png"), *models, "-o", str(tmp_path / "out")]) == 2
    assert "would both be written to" in capsys.readouterr().err


def test_an_empty_folder_and_a_foreign_file(models, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["features", str(tmp_path / "empty"), *models, "-o", str(tmp_path / "out")]) == 2
    assert "no images in the folder" in capsys.readouterr().err
    (tmp_path / "scene0.png.safetensors").write_bytes(b"x")
    assert main(["features", str(photos / "scene0.png"), *models, "-o", str(tmp_path)]) == 2
    assert "is no safetensors file" in capsys.readouterr().err


def test_options_must_be_pairs(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--option", "pad_type"])
    assert "expected KEY=VALUE, got 'pad_type'" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "haiwen/loftup-siglip2" in lines[-1]
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["channels"] == 384


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "loftup.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"loftup {loftup.__version__}"
