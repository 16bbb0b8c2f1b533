"""``loftup match``: the drawing, the numbers, and what it refuses."""

import csv
import json

import pytest
import torch
from material import drawn_scene
from PIL import Image

import loftup
from loftup.cli import main
from loftup.eval.datasets import open_dataset
from loftup.files import made_here

SMALL = ["--input", "64", "--views", "1", "--backbone", "tiny", "--size", "60", "80"]


@pytest.fixture
def photos(tmp_path):
    scene = drawn_scene(120, 160)
    scene.save(tmp_path / "a.png")
    scene.crop((0, 0, 140, 120)).save(tmp_path / "b.png")
    return [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_the_command_gives_what_the_library_gives(photos, tmp_path, capsys):
    files = {name: tmp_path / f"m.{name}" for name in ("jpg", "csv", "json")}
    command = ["match", *photos, *SMALL, "--most", "9", "-o", str(files["jpg"])]
    assert main([*command, "--csv", str(files["csv"]), "--json", str(files["json"])]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny: 9 matches in ")
    assert all(str(path) in out for path in files.values())
    assert err == ""
    assert all(made_here(path) for path in files.values())
    sheet = Image.open(files["jpg"])
    assert sheet.height == 120
    assert 300 < sheet.width < 306
    backbone, up = loftup.load_backbone("tiny"), loftup.LoftUp.from_pretrained("any")
    inputs = []
    with torch.inference_mode():
        for photo, width in zip(photos, (85, 75), strict=True):
            inputs += [backbone(backbone.preprocess(photo, size=(64, width))), backbone.preprocess(photo)]
        found = loftup.match(up, *inputs, size=(60, 80), other_size=(60, 80), most=9)
    with files["csv"].open() as stream:
        rows = [[float(value) for value in row.values()] for row in csv.DictReader(stream)]
    record = json.loads(files["json"].read_text())
    assert len(record["mutual"]) == len(rows) == 9
    assert [row[:2] for row in rows] == record["source_points"]
    torch.testing.assert_close(torch.tensor(record["source_points"]), found.points, atol=0.006, rtol=0)
    torch.testing.assert_close(torch.tensor(record["target_points"]), found.targets, atol=0.006, rtol=0)
    torch.testing.assert_close(torch.tensor(record["similarity"]), found.similarity, atol=1e-4, rtol=0)
    # What was found may be corrected by hand, and judged by.
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    sample = open_dataset(f"pairs:{tmp_path}", "correspondence").val[0]
    assert sample.target_points.tolist() == torch.tensor(record["target_points"]).tolist()
    assert main([*command, "--csv", str(files["csv"])]) == 0  # its own files are replaced


def test_given_points(photos, tmp_path, capsys):
    command = ["match", *photos, *SMALL, "-o", str(tmp_path / "m.png"), "--json", str(tmp_path / "m.json")]
    assert main([*command, "--points", "20,30.5", "0,0", "159,119"]) == 0
    assert "tiny: 3 points, " in capsys.readouterr().out
    record = json.loads((tmp_path / "m.json").read_text())
    assert record["source_points"] == [[20, 30.5], [0, 0], [159, 119]]
    assert len(record["mutual"]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--points", "160,3"], "--points 160,3 is outside "),
        (["--points", "3,3", "--most", "4"], "--most chooses among the matches of a grid, and --points keeps every"),
        (["--csv", "m.csv", "--json", "./m.csv"], "-o, --csv and --json name one file; give each its own"),
        (["--csv", "mine.csv"], "mine.csv exists and was not made by loftup"),
        (["-o", "m.xyz"], "cannot write a picture named 'm.xyz'"),
    ],
)
def test_what_is_refused_before_any_work(photos, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("source_x,mine\n")
    assert main(["match", *photos, *SMALL, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("loftup match: error: ")
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "mine.csv"]


def test_points_are_two_numbers_and_pictures_are_there(photos, tmp_path, capsys):
    for wrong in ("3", "3,x", "3,nan"):
        with pytest.raises(SystemExit, match="2"):
            main(["match", *photos, "--points", wrong])
        assert "expected a" in capsys.readouterr().err
    assert main(["match", photos[0], str(tmp_path / "none.png"), "-o", str(tmp_path / "m.png")]) == 2
    assert "none.png" in capsys.readouterr().err
