"""The command ``loftup masks``."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from material import drawn_scene
from PIL import Image
from small_sam import write_small_sam

from loftup.cli import main
from loftup.files import alone_in
from loftup.pictures import encode
from loftup.train.data.regions import LabelMap, Picture
from loftup.train.data.sources import SA1BFolder
from loftup.train.masks.command import overlay
from loftup.train.masks.make import make_masks
from loftup.train.masks.makers import FelzenszwalbMaker

QUICK = ["--scales", "20", "200", "--min-size", "10"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    drawn_scene(30, 40).save(folder / "a.jpg")
    drawn_scene(40, 30).save(folder / "deep" / "b.png")
    return folder


def test_masks_are_made_and_resumed(photos, tmp_path, capsys):
    assert main(["masks", str(photos), *QUICK]) == 0
    err = capsys.readouterr().err
    counts = [len(SA1BFolder(photos).read(index, torch.Generator()).masks) for index in range(2)]
    assert f"made the masks of 2 of 2 pictures (median {sum(counts) / 2:.0f} masks): {photos}\n" in err
    first = (photos / "a.json").read_bytes()
    make_masks(photos, FelzenszwalbMaker(scales=(20, 200), min_size=10), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "a.json").read_bytes() == first

    assert main(["masks", str(photos), "--felzenszwalb", *QUICK]) == 0
    assert "2 pictures are finished already\nmade the masks of 0 of 0 pictures: " in capsys.readouterr().err
    assert main(["masks", str(photos), *QUICK, "--sigma", "0.5", "--side", "20"]) == 2
    err = capsys.readouterr().err
    assert "a.json was made with other settings (side 480, now 20; sigma 0.8, now 0.5)" in err
    assert err.count("\n") == 1
    assert (photos / "a.json").read_bytes() == first
    assert main(["masks", str(photos), *QUICK, "--sigma", "0.5", "--side", "20", "--overwrite"]) == 0
    assert (photos / "a.json").read_bytes() != first


def test_the_defaults_need_no_download_and_are_said(photos, capsys):
    assert main(["masks", str(photos)]) == 0
    settings = json.loads((photos / "a.json").read_text())["info"]["settings"]
    settings.pop("picture_bytes")
    assert settings == FelzenszwalbMaker().settings
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["masks", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "by Felzenszwalb's segments (the default: it needs no download)" in text
    assert "(default: 300 600 1200)" in text
    assert "smallest segment in pixels (default: 100)" in text


def test_unreadable_pictures_are_counted(photos, capsys):
    (photos / "broken.jpg").write_bytes(b"x")
    assert main(["masks", str(photos), *QUICK]) == 1
    err = capsys.readouterr().err
    assert f"loftup masks: broken.jpg: cannot read the image {photos / 'broken.jpg'}: " in err
    assert "made the masks of 2 of 3 pictures (" in err
    assert not (photos / "broken.json").exists()
    assert main(["masks", str(photos), *QUICK]) == 1
    assert "2 pictures are finished already\nmade the masks of 0 of 1 pictures: " in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(photos, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("loftup.train.masks.command.make_masks", stop)
    assert main(["masks", str(photos)]) == 130
    assert "masks: interrupted; files already written are whole, run again to resume" in capsys.readouterr().err


def test_a_sam_model_from_a_folder(photos, tmp_path, capsys):
    sam = write_small_sam(tmp_path / "sam")
    command = ["masks", str(photos), "--sam", str(sam), "--points-per-side", "2", "--points-per-batch", "3"]
    every = ["--pred-iou-threshold", "0", "--stability-threshold", "0", "-o", str(tmp_path / "out")]
    assert main([*command, *every]) == 0
    source = SA1BFolder(tmp_path / "out")
    assert all(len(source.read(index, torch.Generator()).masks) > 0 for index in range(2))
    capsys.readouterr()
    assert main([*command, "--pred-iou-threshold", "1e9"]) == 0
    assert (
        "2 pictures have no masks at all\nmade the masks of 2 of 2 pictures (median 0 masks)" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--points-per-side", "4"],
            "--points-per-side would do nothing: Felzenszwalb's masks are asked for; see --sam",
        ),
        (["--sam", "x", "--scales", "1", "--side", "9"], "--scales, --side would do nothing: a SAM model is asked for"),
        (["--device", "cuda"], "--device cuda would do nothing: Felzenszwalb's masks are made on the CPU"),
        (["--sam", "x", "--device", "gpu"], "cannot use the device 'gpu'"),
        (["--sam", "no such model"], "cannot load 'no such model' for mask generation"),
        (["-o", "{photos}/out"], "out is inside {photos}, whose pictures include those below it"),
        (["--preview", "{photos}/look"], "look is inside {photos}, whose pictures include those below it"),
        (["-o", "{photos}x", "--preview", "{photos}x/look"], "look is inside {photos}x, whose pictures include"),
    ],
)
def test_options_that_make_no_sense_are_refused_first(photos, capsys, options, text):
    assert main(["masks", str(photos), *(option.format(photos=photos) for option in options)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("loftup masks: error: ")
    assert text.format(photos=photos) in err
    assert not list(photos.rglob("*.json"))


def test_one_maker_at_a_time(photos, capsys):
    with pytest.raises(SystemExit):
        main(["masks", str(photos), "--sam", "x", "--felzenszwalb"])
    assert "--felzenszwalb: not allowed with argument --sam" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.png", "a.seg0.png"])
def test_folders_with_label_maps_are_ready_for_training(photos, capsys, name):
    drawn_scene(30, 40).convert("L").save(photos / name)
    assert main(["masks", str(photos), *QUICK]) == 2
    err = capsys.readouterr().err
    assert f"1 pictures in {photos} have label maps, such as {name} beside a.jpg: training takes those as masks" in err
    assert not list(photos.rglob("*.json"))


def test_previews_are_written(photos, tmp_path, capsys):
    assert main(["masks", str(photos), *QUICK, "--preview", str(tmp_path / "look")]) == 0
    assert f"wrote 2 previews to {tmp_path / 'look'}" in capsys.readouterr().err
    for index, name in enumerate(("a", "deep/b")):
        picture = SA1BFolder(photos).read(index, torch.Generator())
        written = (tmp_path / "look" / f"{name}.jpg").read_bytes()
        assert written == encode(overlay(picture), "JPEG", quality=90)


def test_pictures_without_masks_have_no_preview(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"x")
    command = ["masks", str(photos), *QUICK, "--preview", str(tmp_path / "look")]
    assert main(command) == 1
    assert "wrote 2 previews" in capsys.readouterr().err
    (photos / "broken.json").write_bytes((photos / "a.json").read_bytes())
    assert main([*command, "--overwrite"]) == 1
    err = capsys.readouterr().err
    assert f"loftup masks: no preview: cannot read the image {photos / 'broken.jpg'}: " in err
    assert "wrote 2 previews" in err


def test_without_masks_there_are_no_previews(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"x")
    assert main(["masks", str(tmp_path / "photos"), "--preview", str(tmp_path / "look")]) == 1
    err = capsys.readouterr().err
    assert "made the masks of 0 of 1 pictures" in err
    assert "make masks with" not in err
    assert not (tmp_path / "look").exists()


def test_previews_are_drawn_again_only_with_their_masks(photos, tmp_path, capsys):
    command = ["masks", str(photos), *QUICK, "--preview", str(tmp_path / "look")]
    assert main(command) == 0
    (tmp_path / "look" / "deep" / "b.jpg").unlink()
    other = encode(Image.new("RGB", (3, 4)), "JPEG")
    (tmp_path / "look" / "a.jpg").write_bytes(other)
    capsys.readouterr()
    assert main(command) == 0
    assert f"1 previews are there already\nwrote 1 previews to {tmp_path / 'look'}\n" in capsys.readouterr().err
    assert (tmp_path / "look" / "a.jpg").read_bytes() == other
    assert main([*command, "--overwrite"]) == 0
    assert "wrote 2 previews" in capsys.readouterr().err
    assert (tmp_path / "look" / "a.jpg").read_bytes() != other


def test_an_overlay_by_hand():
    image = torch.arange(2 * 3 * 3, dtype=torch.uint8).reshape(3, 2, 3) * 10
    picture = Picture("x", image, LabelMap([[0, 0, 4], [4, 4, 4]]))
    colours = torch.randint(256, (2, 3), generator=torch.Generator().manual_seed(0)).float()
    expected = image.float()
    label = torch.tensor([[0, 0, 1], [1, 1, 1]])
    for row in range(2):
        for column in range(3):
            expected[:, row, column] = 0.25 * colours[label[row, column]] + 0.75 * image[:, row, column]
    drawn = torch.from_numpy(np.array(overlay(picture, opacity=0.25))).movedim(-1, 0)
    assert torch.equal(drawn, expected.round().to(torch.uint8))
    only = torch.from_numpy(np.array(overlay(picture, keep=[1], opacity=0.25))).movedim(-1, 0)
    assert torch.equal(only[:, 0, :2], image[:, 0, :2])
    assert torch.equal(only[:, 1], drawn[:, 1])


def test_the_help_loads_nothing_heavy():
    code = (
        "import sys, loftup.cli\n"
        "try: loftup.cli.main(['masks', '--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'skimage', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_pictures_of_the_users_are_not_overwritten(photos, tmp_path, capsys):
    """Neither by copies nor by previews; --overwrite replaces what loftup made alone."""
    mine = tmp_path / "mine"
    mine.mkdir()
    drawn_scene(31, 41).save(mine / "a.jpg")
    before = (mine / "a.jpg").read_bytes()
    for option in ("-o", "--preview"):
        for more in ([], ["--overwrite"]):
            assert main(["masks", str(photos), *QUICK, option, str(mine), *more]) == 2
            err = capsys.readouterr().err
            assert f"{mine / 'a.jpg'} exists and was not made by loftup" in err
            assert err.count("\n") == 1
    assert [path.name for path in mine.iterdir()] == ["a.jpg"]
    assert (mine / "a.jpg").read_bytes() == before
    assert not list(photos.rglob("*.json"))


def test_copies_are_made_again_where_they_are_loftups(photos, tmp_path, capsys):
    command = ["masks", str(photos), *QUICK, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    (tmp_path / "out" / "a.json").unlink()  # killed between the two
    assert main(command) == 0
    drawn_scene(33, 44).save(photos / "a.jpg")
    assert main(command) == 2
    assert "picture_bytes" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "out" / "a.jpg").read_bytes() == (photos / "a.jpg").read_bytes()
    drawn_scene(20, 20).save(tmp_path / "out" / "a.jpg")  # another picture in its place
    assert main([*command, "--overwrite"]) == 2
    assert "a.jpg exists and was not made by loftup" in capsys.readouterr().err


def test_previews_among_the_pictures_are_refused(photos, tmp_path, capsys):
    assert main(["masks", str(photos), "--preview", f"{photos}/../photos"]) == 2
    assert "the previews would be written among the pictures in" in capsys.readouterr().err


def test_two_runs_on_one_folder(photos, tmp_path, capsys):
    for options in ([], ["--preview", str(tmp_path / "look")]):
        with alone_in(tmp_path / "look" if options else photos):
            assert main(["masks", str(photos), *QUICK, *options]) == 2
        assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert not list(photos.rglob("*.json"))
    (photos / "deep" / ".loftup.0123456789abcdef").write_bytes(b"half")
    assert main(["masks", str(photos), *QUICK]) == 0
    assert not list(photos.rglob(".*"))


def test_odd_files_leave_the_rest(photos, capsys):
    """A pipe, a link to nowhere, a name whose json would be too long, a name that is no UTF-8."""
    os.mkfifo(photos / "pipe.jpg")
    (photos / "link.jpg").symlink_to(photos / "nowhere")
    for name in ("y" * 251 + ".jpg", os.fsdecode(b"\xff.jpg")):
        (photos / name).write_bytes((photos / "a.jpg").read_bytes())
    assert main(["masks", str(photos), *QUICK]) == 1
    err = capsys.readouterr().err
    assert "pipe.jpg is no regular file" in err
    assert "link.jpg: [Errno 2] No such file" in err
    assert "File name too long" in err
    assert "made the masks of 3 of 6 pictures" in err
    assert (photos / os.fsdecode(b"\xff.json")).exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--sigma", "-1"], "masks: sigma is -1.0, expected at least 0"),
        (["--sigma", "1e9"], "masks: sigma is 1000000000.0, expected at most 100"),
        (["--scales", "-5"], "masks: scales[0] is -5.0, expected above 0"),
        (["--scales", "3", "0"], "masks: scales[1] is 0.0, expected above 0"),
    ],
)
def test_values_of_no_use_are_refused(photos, capsys, options, text):
    assert main(["masks", str(photos), *options]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [["--sigma", "nan"], ["--scales", "inf"], ["--sam", ""], ["--preview", ""]])
def test_values_that_are_none_are_refused(photos, capsys, options):
    with pytest.raises(SystemExit):
        main(["masks", str(photos), *options])
    assert f"argument {options[0]}: expected a " in capsys.readouterr().err
