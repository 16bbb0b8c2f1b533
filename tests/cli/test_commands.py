"""The command, end to end on small weights."""

import argparse
import io
import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import timm
import torch
from material import drawn_scene, shared
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import loftup
import loftup.viz
from loftup import LoftUp, LoftUpConfig
from loftup.cli import main
from loftup.cli.demo import PHOTO
from loftup.pictures import open_picture, picture_size
from loftup.weights.catalogue import IN_PACKAGE, TINY_BACKBONES
from loftup.weights.names import in_package

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


@pytest.fixture
def offline(monkeypatch):
    """No connection can be made, and the Hub's client is told so."""
    import huggingface_hub.constants

    def refuse(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture
def shown(monkeypatch):
    """What the demo puts side by side."""
    maps = {}
    compare = loftup.viz.compare
    monkeypatch.setattr("loftup.viz.compare", lambda image, given: maps.update(given) or compare(image, given))
    return maps


STAND_IN = (
    "no LoftUp weights of its own for this backbone (named 'test_resnet'): using 'any', which takes features of any "
    "backbone. --strict refuses instead; to train weights for this one, see `loftup train --help`\n"
)


def test_the_demo_needs_neither_arguments_nor_a_network(offline, shown, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second = out.splitlines()
    assert first == (
        "Using what comes in the package: the backbone 'tiny' and the upsampler 'any'. "
        "For published ones, from the Hub: loftup demo --backbone dinov2_vits14"
    )
    assert second.startswith("tiny: (192, 28, 42) -> (192, 341, 512) in ")
    assert second.endswith("; wrote loftup_demo.png")
    assert list(shown) == ["tiny 28x42", "bilinear", "any"]
    picture = Image.open("loftup_demo.png")
    assert picture.size == (4 * 512 + 3 * 5, 341 + 2 * 18)
    panel = picture.crop((0, 36, 512, 377)).resize((600, 400))
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in (panel, Image.open(PHOTO))]
    assert (pixels[0].float() - pixels[1].float()).abs().mean() < 5


def test_the_demo_shows_what_the_library_gives(offline, shown, photos, tmp_path):
    command = ["demo", str(photos / "scene0.png"), "--size", "48", "64", "-o", str(tmp_path / "new" / "x.png")]
    assert main(command) == 0
    assert Image.open(tmp_path / "new" / "x.png").width == 4 * 64 + 3 * 4
    backbone = loftup.load_backbone("tiny", views=4)
    with torch.inference_mode():
        low = backbone(backbone.preprocess(photos / "scene0.png", size=(224, 299)))
        image = backbone.preprocess(photos / "scene0.png")
        torch.testing.assert_close(shown["any"], LoftUp.from_pretrained("any")(low, image, size=(48, 64)))


@pytest.mark.parametrize(
    ("options", "grid", "caption", "line"),
    [
        (["--weights", "any"], "28x38", "any", "Using what comes in the package: the backbone 'tiny'. For published"),
        (["--views", "1"], "14x19", "any", "Using what comes in the package: the backbone 'tiny' and the ups"),
        (["--backbone", "tiny"], "14x19", "any", ""),
        (["--backbone", "tiny", "--weights", "any", "--views", "9"], "42x57", "any", ""),
        (["--backbone", "tiny", "--strict"], "14x19", "any", ""),
        (["--backbone", "tiny", "--weights", "tiny_v1"], "14x19", "any", ""),
    ],
)
def test_a_demo_of_one_upsampler_in_the_package(offline, shown, photos, tmp_path, capsys, options, grid, caption, line):
    command = ["demo", str(photos / "scene0.png"), *options, "--size", "48", "64", "-o", str(tmp_path / "x.png")]
    assert main(command) == 0
    assert list(shown) == [f"tiny {grid}", "bilinear", caption]
    out, err = capsys.readouterr()
    assert out.startswith(line or "tiny: ")
    assert err == ""


def test_the_photo_is_small_and_has_its_licence():
    assert min(Image.open(PHOTO).size) <= 400
    assert PHOTO.stat().st_size <= 120 * 1024
    assert "CC0" in (PHOTO.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--layer", "3"], "--layer"),
        (["--backbone-weights", "mine.pth", "--option", "img_size=64"], "--backbone-weights, --option"),
        (["--mean", "0", "0", "0", "--std", "1", "1", "1"], "--mean, --std"),
    ],
)
def test_options_of_a_backbone_need_its_name(tmp_path, capsys, options, named):
    assert main(["demo", *options, "-o", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == (
        f"loftup demo: error: {named} without --backbone: name the backbone too, such as --backbone dinov2_vits14\n"
    )


@pytest.mark.parametrize("command", ["demo", "features"])
def test_any_stands_in_with_one_line_unless_strict(offline, models, photos, tmp_path, capsys, command):
    own = models.index("--weights")
    words = [command, str(photos / "scene0.png"), *models[:own], *models[own + 2 :], "-o"]
    assert main([*words, str(tmp_path / "refused.png"), "--strict"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"loftup {command}: error: no published LoftUp weights for this backbone (named 'test_resn")
    assert err.count("\n") == 1
    assert not (tmp_path / "refused.png").exists()
    assert main([*words, str(tmp_path / "warned.png")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"loftup {command}: {STAND_IN}")
    assert err.count("no LoftUp weights") == 1
    assert "UserWarning" not in err
    assert main([*words, str(tmp_path / "chosen.png"), "--weights", "any", "--strict"]) == 0
    assert "no LoftUp weights" not in capsys.readouterr().err
    assert (tmp_path / "warned.png").exists()


@pytest.mark.parametrize("name", list(TINY_BACKBONES))
def test_features_by_what_is_in_the_package(offline, photos, tmp_path, capsys, name):
    command = ["features", str(photos / "scene0.png"), "--backbone", name, "--size", "48", "64", "-o", str(tmp_path)]
    own = tmp_path / "own"
    LoftUp(LoftUpConfig(192, image_frequencies=4)).save_pretrained(own)
    backbone = loftup.load_backbone(name)
    for weights, options in (("own", ["--weights", str(own)]), ("any", ["--overwrite"])):
        assert main([*command, *options]) == 0
        with safe_open(tmp_path / "scene0.png.safetensors", framework="pt") as handle:
            written, metadata = handle.get_tensor("features"), handle.metadata()
        assert metadata["backbone"] == name
        assert metadata["backbone_weights"] == in_package(TINY_BACKBONES[name])
        assert metadata["weights"].startswith(f"{weights} ")
        with torch.inference_mode():
            low = backbone(backbone.preprocess(photos / "scene0.png", size=(224, 299)))
            image = backbone.preprocess(photos / "scene0.png")
            expected = LoftUp.from_pretrained(own if weights == "own" else "any")(low, image, size=(48, 64))
        torch.testing.assert_close(written, expected[0].half())
    assert metadata["weights"] == f"any {in_package(IN_PACKAGE['any'].folder)}"
    assert "no LoftUp weights" not in capsys.readouterr().err
    # By whichever name, "any" is what the features were made with.
    for same in ([], ["--strict"], ["--weights", "any"], ["--weights", "tiny"]):
        assert main([*command, *same]) == 0
        assert "1 of 1 images are finished already" in capsys.readouterr().err
    assert main([*command, "--weights", str(own)]) == 2
    assert re.search("written with other settings \\(weights 'any in .*', now 'own ", capsys.readouterr().err)


def test_features_of_one_tiny_are_not_the_others(offline, photos, tmp_path, capsys):
    command = ["features", str(photos / "scene0.png"), "--size", "8", "12", "--input", "32", "-o", str(tmp_path)]
    assert main([*command, "--backbone", "tiny"]) == 0
    assert main([*command, "--backbone", "tiny_v1"]) == 2
    assert "written with other settings (backbone 'tiny', now 'tiny_v1'" in capsys.readouterr().err


def test_features_tell_a_stand_in_from_weights_of_its_own(models, photos, tmp_path, capsys):
    named = [part for part in models if part != "--weights" and not part.endswith("up")]
    command = ["features", str(photos / "scene0.png"), *named, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert "no LoftUp weights of its own" in capsys.readouterr().err
    with safe_open(tmp_path / "out" / "scene0.png.safetensors", framework="pt") as handle:
        assert re.fullmatch("any in the package, .* for want of its own", handle.metadata()["weights"])
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().err
    assert main([*command, "--strict"]) == 2  # finished or not
    assert "no published LoftUp weights for this backbone" in capsys.readouterr().err
    assert main([*command, "--weights", "any"]) == 2
    assert "written with other settings (weights 'any in" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*IN_PACKAGE, *TINY_BACKBONES])
def test_names_in_the_package_win_over_folders(models, photos, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "up", tmp_path / "bundled" / "any")
    monkeypatch.setattr("loftup.weights.catalogue.FOLDER", tmp_path / "bundled")
    LoftUp(LoftUpConfig(8, image_frequencies=4)).save_pretrained(name)
    assert main(["features", str(photos / "scene0.png"), *models, "--weights", name, "-o", "out"]) == 0
    with safe_open(tmp_path / "out" / "scene0.png.safetensors", framework="pt") as handle:
        assert handle.metadata()["weights"].startswith("any in the package, ")
    LoftUp(LoftUpConfig(8, image_frequencies=4)).save_pretrained(name)
    assert main(["features", str(photos / "scene0.png"), *models, "--weights", name, "-o", "out"]) == 0


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
    assert (out / "scene0.png.safetensors").stat().st_mtime_ns == first
    assert main([*command, "--input", "32", "--overwrite"]) == 0
    assert (out / "scene0.png.safetensors").stat().st_mtime_ns != first
    assert main([*command[:2], *models, "--input", "32", "-o", str(out)]) == 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["--backbone", "test_resnet.r160_in1k"], "backbone"),
        (["--backbone-weights", "{folder}/copy/backbone.pth"], "backbone_weights"),
        (["--weights", "{folder}/copy/up/"], "weights"),
        (["--weights", "{folder}/up/model.safetensors"], "weights"),
        (["--layer", "2"], "layer"),
        (["--option", "output_stride=8"], "options"),
        (["--mean", "0", "0", "0"], "scaling"),
        (["--std", "1", "1", "1"], "scaling"),
        (["--views", "4"], "views"),
        (["--size", "48", "63"], "asked_size"),
        (["--input", "65"], "input"),
        (["--dtype", "bfloat16"], "dtype"),
    ],
)
def test_other_settings_are_not_taken_as_finished(models, photos, tmp_path, capsys, change, key):
    (tmp_path / "copy").mkdir()
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "copy" / "backbone.pth")
    LoftUp(LoftUpConfig(32, image_frequencies=4)).save_pretrained(tmp_path / "copy" / "up")
    command = ["features", str(photos / "scene0.png"), *models, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, *[part.format(folder=tmp_path) for part in change]]) == 2
    assert f"written with other settings ({key} " in capsys.readouterr().err
    assert main(command) == 0


def test_another_version_or_another_image_of_the_name_is_not_taken_as_finished(
    models, photos, tmp_path, capsys, monkeypatch
):
    command = ["features", str(photos / "scene0.png"), *models, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr("loftup.cli.features.__version__", "9.9")
        assert main(command) == 2
    assert "other settings (loftup_version " in capsys.readouterr().err
    drawn_scene(61, 80).save(photos / "scene0.png")
    assert main(command) == 2
    assert "other settings (image_file " in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0
    (photos / "scene0.png").unlink()
    assert main(command) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_trailing_slash_leaves_the_name(models, photos, tmp_path):
    command = ["features", str(photos / "scene0.png"), *models, "-o", str(tmp_path)]
    assert main([*command, "--weights", f"{tmp_path}/up//"]) == 0
    with safe_open(tmp_path / "scene0.png.safetensors", framework="pt") as handle:
        status = (tmp_path / "up" / "model.safetensors").stat()
        assert handle.metadata()["weights"].startswith(f"up {status.st_size}@{status.st_mtime_ns} ")
    assert main([*command, "--weights", f"{tmp_path}/up"]) == 0


def test_an_image_given_twice_is_made_once(models, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    again = [str(photos), "scene0.png", "./scene0.png", str(photos / "scene1.png")]
    assert main(["features", *again, *models, "-o", str(tmp_path / "out")]) == 0
    assert "wrote 3 of 3 files" in capsys.readouterr().err


def test_without_a_size_the_result_has_the_images_at_most_512_long(models, photos, tmp_path):
    drawn_scene(300, 600).save(photos / "wide.png")
    models = [*models[: models.index("--size")], "--input", "64"]
    assert main(["features", str(photos), *models, "-o", str(tmp_path)]) == 0
    for name, size in (("scene1", (70, 80)), ("wide", (256, 512))):
        with safe_open(tmp_path / f"{name}.png.safetensors", framework="pt") as handle:
            assert handle.get_slice("features").get_shape() == [32, *size]


def test_dtype_is_that_of_the_network(models, photos, tmp_path):
    for dtype in ("float32", "bfloat16"):
        command = ["features", str(photos / "scene0.png"), *models, "--dtype", dtype, "-o", str(tmp_path / dtype)]
        assert main(command) == 0
    full, half = (
        load_file(tmp_path / dtype / "scene0.png.safetensors")["features"].float() for dtype in ("float32", "bfloat16")
    )
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, atol=0.2, rtol=0.1)


def test_the_exif_orientation_is_applied(models, photos, tmp_path):
    upright, exif = drawn_scene(60, 80), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(photos / "turned.png", exif=exif)
    upright.save(photos / "upright.png")
    assert main(["features", str(photos), *models, "-o", str(tmp_path)]) == 0
    turned, plain = (load_file(tmp_path / f"{name}.png.safetensors")["features"] for name in ("turned", "upright"))
    assert torch.equal(turned, plain)


def test_features_beyond_float16_are_refused(models, photos, tmp_path, capsys):
    up = LoftUp.from_pretrained(tmp_path / "up")
    with torch.no_grad():
        up.upsampler.final_conv[1].bias.fill_(1e5)
    up.save_pretrained(tmp_path / "up")
    assert main(["features", str(photos / "scene0.png"), *models, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "scene0.png: features reach 1e+05, beyond what float16 holds" in err
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_on_one_image_leaves_the_rest(models, photos, tmp_path, capsys, monkeypatch):
    forward = LoftUp.forward

    def short(self, features, image, size=None):
        if image.shape[2] == 70:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
        return forward(self, features, image, size)

    monkeypatch.setattr(LoftUp, "forward", short)
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "scene1.png: CUDA out of memory. Tried to allocate 3 GiB\n" in err
    assert "wrote 2 of 3 files" in err


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


def test_features_of_shifted_views_equal_the_library(models, photos, tmp_path, capsys):
    command = ["features", str(photos / "scene2.png"), *models, "--views", "4", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    with safe_open(tmp_path / "out" / "scene2.png.safetensors", framework="pt") as handle:
        written, metadata = handle.get_tensor("features"), handle.metadata()
    assert metadata["views"] == "4"
    backbone = loftup.load_backbone("test_resnet", weights=tmp_path / "backbone.pth", layer=1, views=4)
    up = LoftUp.from_pretrained(tmp_path / "up")
    with torch.inference_mode():
        low = backbone(backbone.preprocess(photos / "scene2.png", size=(64, 64)))
        expected = up(low, backbone.preprocess(photos / "scene2.png"), size=(48, 64))
    torch.testing.assert_close(written, expected[0].half())
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().err
    assert main([*command, "--views", "1"]) == 2
    assert "written with other settings (views '4', now '1')" in capsys.readouterr().err
    assert main([*command, "--option", "views=9"]) == 2
    assert "--option views=9 is no option of timm's but of loftup's own; give it as --views" in capsys.readouterr().err


def test_one_unreadable_image_is_reported_and_the_rest_written(models, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"not a picture")
    Image.new("F", (8, 8)).save(photos / "depth.tiff")
    (photos / "half.png").write_bytes((photos / "scene0.png").read_bytes()[:200])
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "broken.png: cannot read the image" in err
    assert "half.png: cannot read the image" in err
    assert "depth.tiff has mode 'F', whose values have no fixed range" in err
    assert "wrote 3 of 6 files" in err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_interrupt_leaves_whole_files(models, photos, tmp_path, capsys, monkeypatch):
    import loftup.weights.files

    write = loftup.files.write_atomically

    def once(path, content):
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr("loftup.cli.features.write_atomically", once)
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 130
    assert "interrupted; files already written are whole, run again to resume" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["scene0.png.safetensors"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--weights", "dinov2_vits15"], "did you mean 'dinov2_vits14'"),
        (["--backbone-weights", "nowhere.pth"], "nowhere.pth"),
        (["--layer", "2"], "48"),
        (["--option", "no_such_option=1"], "no_such_option"),
        (["--device", "gpu"], "cannot use the device 'gpu': "),
        (["--device", "cuda:99"], "cannot use the device 'cuda:99': "),
    ],
)
def test_errors_are_one_line_and_status_two(models, tmp_path, capsys, change, text):
    assert main(["demo", *models, *change, "-o", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("loftup demo: error: ")
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_without_a_network_the_demo_says_how_to_give_local_files(hub, tmp_path, capsys):
    hub.close()
    command = ["demo", "--backbone", "dinov2_vits14", "-o", str(tmp_path / "x.png")]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "haiwen/loftup-dinov2s" in err
    assert "HF_HUB_OFFLINE=1" in err
    assert (
        "from the Hub repository 'timm/vit_small_patch14_dinov2.lvd142m': give both --weights and --backbone-w" in err
    )
    for own in (["--backbone-weights", str(tmp_path / "mine.pth")], ["--backbone", "tiny", "--weights", "me/mine"]):
        assert main([*command, *own]) == 2
        err = capsys.readouterr().err
        assert "HF_HUB_OFFLINE=1" in err
        assert "give both" not in err


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
    assert "scene0.png.safetensors exists and was not made by loftup" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["--option", "pad_type"], "argument --option: expected KEY=VALUE, got 'pad_type'"),
        (["--size", "0", "5"], "argument --size: expected a positive whole number, got '0'"),
        (["--size", "5", "1.5"], "argument --size: expected a positive whole number, got '1.5'"),
        (["--input", "-3"], "argument --input: expected a positive whole number, got '-3'"),
        (["--views", "2"], "argument --views: expected 1, 4, 9 or 16, got '2'"),
        (["--views", "4.0"], "argument --views: expected 1, 4, 9 or 16, got '4.0'"),
    ],
)
def test_options_are_read_before_anything_else(capsys, wrong, text):
    with pytest.raises(SystemExit):
        main(["demo", *wrong])
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.psd"])
def test_pictures_that_cannot_be_written_are_refused_first(capsys, name):
    assert main(["demo", "no_such_photo.png", "-o", name]) == 2
    assert f"cannot write a picture named '{name}': expected a suffix such as .png" in capsys.readouterr().err


def test_the_caption_names_timms_weights_only_where_they_are_used(models, shown, tmp_path):
    assert main(["demo", *models, "-o", str(tmp_path / "x.png")]) == 0
    assert list(shown) == ["test_resnet 16x24", "bilinear", "LoftUp"]


def test_list(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "haiwen/loftup-siglip2" in lines[-2]
    assert [line.split() for line in lines[-1:]] == [
        ["any", "any", "any", "in", "the", "package", "CC-BY-4.0", "any"],
    ]


def test_list_as_json(capsys):
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    published = loftup.list_pretrained()
    assert [entry["name"] for entry in entries] == [*[checkpoint.name for checkpoint in published], *IN_PACKAGE]
    assert entries[0]["channels"] == 384
    assert [entry["in_package"] for entry in entries] == [False] * len(published) + [True] * len(IN_PACKAGE)
    assert all(entry.keys() == entries[0].keys() for entry in entries)
    for entry in entries[len(published) :]:
        assert entry["channels"] == LoftUp.from_pretrained(entry["name"]).config.channels
    assert entries[-1]["backbones"] == ["tiny", "tiny_v1"]


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "loftup.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"loftup {loftup.__version__}"


def test_folders_are_taken_with_their_subfolders(models, photos, tmp_path, capsys):
    (photos / "more" / "still").mkdir(parents=True)
    (photos / "scene0.png").rename(photos / "more" / "still" / "scene1.png")
    command = ["features", str(photos), *models, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert "3 files of 32 channels in float16: about 0.6 MB" in capsys.readouterr().err
    written = sorted(
        file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.safetensors")
    )
    assert written == ["more/still/scene1.png.safetensors", "scene1.png.safetensors", "scene2.png.safetensors"]
    (tmp_path / "out" / "more" / "still" / f".loftup.{'0' * 16}").touch()  # what a killed run leaves
    (photos / "scene9.png").write_bytes((photos / "scene1.png").read_bytes())
    assert main(command) == 0
    assert "3 of 4 images are finished already" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out" / "more" / "still").iterdir()] == ["scene1.png.safetensors"]


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("", 1), (None, 2)])
def test_much_to_write_is_asked_about(models, photos, tmp_path, capsys, monkeypatch, answer, status):
    stdin = io.StringIO(answer or "")
    monkeypatch.setattr(stdin, "isatty", lambda: answer is not None)
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("loftup.cli.features.MOST", 500_000)
    command = ["features", str(photos), *models, "-o", str(tmp_path / "out")]
    assert main(command) == status
    err = capsys.readouterr().err
    assert "3 files of 32 channels in float16: about 0.6 MB" in err
    assert ("--yes to write them" in err) == (answer is None)
    assert (tmp_path / "out").exists() == (status == 0)
    assert main([*command, "--yes"]) == 0


def test_more_than_the_disk_holds_is_asked_about(models, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=100_000))
    assert main(["features", str(photos), *models, "-o", str(tmp_path / "out")]) == 2
    assert "about 0.6 MB, and 0.1 MB are free; give a smaller --size" in capsys.readouterr().err


def test_the_size_of_a_picture_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn_scene(40, 60).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == open_picture(tmp_path / "turned.jpg").size[::-1] == (60, 40)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(OSError, match=r"cannot read the image .*empty\.jpg"):
        picture_size(tmp_path / "empty.jpg")
