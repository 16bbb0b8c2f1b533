"""Commands with a user's own files in the way, full disks, closed streams and odd names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from material import drawn_scene
from PIL import Image
from safetensors.torch import load_file, save_file

import loftup.cli.models
from loftup.cli import main
from loftup.files import alone_in, made_here

TINY = ["--backbone", "tiny", "--weights", "any", "--size", "8", "12", "--input", "32"]
LOFTUP = [sys.executable, "-m", "loftup.cli"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    drawn_scene(40, 60).save(path)
    return path


def refused(capsys, command):
    """The one line of a command that is refused."""
    assert main([str(word) for word in command]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_picture_of_the_users_is_no_place_for_the_demo(photo, tmp_path, capsys, monkeypatch):
    mine = photo.read_bytes()
    assert "photo.png exists and was not made by loftup" in refused(capsys, ["demo", *TINY, "-o", photo])
    assert photo.read_bytes() == mine
    for _ in range(2):
        assert main(["demo", str(photo), *TINY, "-o", str(tmp_path / "demo.jpg")]) == 0
    before = (tmp_path / "demo.jpg").read_bytes()
    capsys.readouterr()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["demo", str(photo), *TINY, "-o", str(tmp_path / "demo.jpg")]) == 2
    out, err = capsys.readouterr()
    assert "No space left on device" in err
    assert "wrote" not in out
    assert (tmp_path / "demo.jpg").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.jpg", "photo.png"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_features_of_the_users_stay(photo, tmp_path, capsys, options):
    target = tmp_path / "photo.png.safetensors"
    save_file({"features": torch.ones(2)}, target, {"mine": "1"})
    command = ["features", photo, *TINY, "-o", tmp_path, *options]
    assert "photo.png.safetensors exists and was not made by loftup" in refused(capsys, command)
    assert load_file(target)["features"].tolist() == [1, 1]


def test_two_runs_in_one_folder(photo, tmp_path, capsys):
    command = ["features", photo, *TINY, "-o", tmp_path / "out"]
    with alone_in(tmp_path / "out"):
        assert f"process {os.getpid()} on " in refused(capsys, command)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".loftup.0123456789abcdef").write_bytes(b"half")
    assert main([str(word) for word in command]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo.png.safetensors"]


def test_odd_files_among_the_pictures_leave_the_rest(photo, tmp_path):
    """A pipe, a name that is no UTF-8, names near the limit; on an ASCII console, with stderr closed or not."""
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    names = [b"plain.png", b"\xff\xe9.png", "ü.png".encode(), b"y" * 246 + b".png"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(photo.read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    for number, closing in enumerate(["", " 2>&-"]):
        out = tmp_path / f"out{number}"
        words = [*LOFTUP, "features", folder, *TINY, "-o", out]
        line = " ".join(map(str, words)) + closing
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        made = [f"{os.fsdecode(name)}.safetensors" for name in names[:3]]
        assert sorted(os.listdir(out)) == sorted(made)
        if not closing:
            assert "pipe.png is no regular file" in done.stderr
            assert "File name too long" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    for command in (["list"], ["list", "--json"], ["eval", "list"]):
        done = subprocess.run([*LOFTUP, *command], stdout=write, stderr=subprocess.PIPE, timeout=120)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_a_full_output_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*LOFTUP, "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "loftup list: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--backbone", ""], "argument --backbone: expected a value, got ''; leave the option out for its default"),
        (["--weights", ""], "argument --weights: expected a value, got ''"),
        (["--backbone-weights", ""], "argument --backbone-weights: expected a value, got ''"),
        (["--device", ""], "argument --device: expected a value, got ''"),
        (["-o", ""], "argument -o/--output: expected a value, got ''"),
        (["--mean", "0", "nan", "0"], "argument --mean: expected a finite number, got 'nan'"),
        (["--std", "1", "1", "0"], "argument --std: expected a number above 0, got '0'"),
        (["--std", "1", "1", "1e999"], "argument --std: expected a finite number, got '1e999'"),
        (["--mean", "x", "0", "0"], "argument --mean: expected a finite number, got 'x'"),
        (["--size", "9999999999", "1"], "argument --size: expected a positive whole number, got '9999999999'"),
        (["--option", f"a={'[' * 100_000}"], "argument --option: cannot read the value of a: maximum recursion"),
    ],
)
def test_values_that_are_none_are_refused(capsys, option, text):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *option])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["--option", "layer=3"], "--option layer=3 is no option of timm's but of loftup's own; give it as --layer"),
        (
            ["--option", "weights=x"],
            "--option weights=x is no option of timm's but of loftup's own; give it as --backb",
        ),
        (["--option", "mean=[1,1,1]"], "give it as --mean"),
        (["--backbone", "resnet5"], "unknown backbone 'resnet5'; did you mean 'resnet50'"),
    ],
)
@pytest.mark.parametrize("start", [["demo"], ["features"], ["eval", "efficiency", "--upsampler", "bilinear"]])
def test_names_and_options_of_a_backbone(photo, tmp_path, capsys, start, command, text):
    words = {"demo": [photo], "features": [photo]}.get(start[0], [])
    backbone = [] if "--backbone" in command else ["--backbone", "tiny"]
    assert text in refused(capsys, [*start, *words, *backbone, *command, "-o", tmp_path / "x.png"])


def test_the_device_is_the_gpu_where_there_is_one(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    arguments = loftup.cli._parse(["features", str(photo), "-o", str(tmp_path)])
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    loftup.cli.models.choose_device(arguments)
    assert arguments.device == "cuda"
    assert capsys.readouterr().err == "loftup features: on the GPU (H100); --device cpu for the CPU\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments.device = None
    loftup.cli.models.choose_device(arguments)
    assert arguments.device == "cpu"
    assert capsys.readouterr().err == ""


def test_without_a_network_features_name_what_works(hub, photo, tmp_path, capsys):
    hub.close()
    err = refused(capsys, ["features", photo, "-o", tmp_path / "out"])
    assert "the Hub cannot be reached" in err
    assert "without any network: --backbone tiny --weights any" in err
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
import loftup.cli.models
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
sys.exit(loftup.cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.parametrize("command", ["features", "demo"])
def test_twelve_megapixels_need_little_memory(tmp_path, command):
    Image.linear_gradient("L").resize((4000, 3000)).save(tmp_path / "photo.jpg")
    words = [command, "photo.jpg", "--backbone", "tiny", "--weights", "any", "-o", "out.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    if command == "features":
        features = load_file(tmp_path / "out.png" / "photo.jpg.safetensors")["features"]
        assert features.shape == (192, 384, 512)
    else:
        assert Image.open(tmp_path / "out.png").width > 4 * 512


def test_an_ascii_console_shows_a_table(tmp_path):
    row = {"upsampler": "a", "metrics": {"miou": [1.0, 2.0]}, "parameters": 0, "seconds": 1}
    results = {"task": "segmentation", "dataset": "d", "backbone": {}, "config": {}, "upsamplers": {"ä": row}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [*LOFTUP, "eval", "table", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| \\xe4 | 1.50 \\xb1 1.00 |" in done.stdout


def test_what_a_demo_makes_is_marked(photo, tmp_path):
    assert main(["demo", str(photo), *TINY, "-o", str(tmp_path / "demo.webp")]) == 0
    assert made_here(tmp_path / "demo.webp")
