"""The table of all tasks: gains by hand, and the script on tiny layouts with a backbone of mean colours."""

import csv
import json
import sys
from dataclasses import replace

import pytest
from material import ROOT

FOLDER = ROOT / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("needs the benchmarks beside the tests", allow_module_level=True)
sys.path[:0] = [str(FOLDER), str(ROOT / "tests" / "eval")]

import gains
import layouts
import vit_table
from small import mean_colours

from loftup.eval.catalogue import TASKS
from loftup.eval.datasets.synthetic import SyntheticVideo, render


def labelled(**upsamplers):
    """Content of results.json with [mIoU, boundary mIoU, mIoU of the low-resolution probe] by seed."""
    rows = {}
    for label, seeds in upsamplers.items():
        rows[label] = {"metrics": dict(zip(gains.GAINS.values(), map(list, zip(*seeds, strict=True)), strict=True))}
    return {"upsamplers": rows}


def test_gains_by_hand():
    first = labelled(bilinear=[(40.0, 30.0, 38.0), (41.0, 31.0, 39.0)], ours=[(42.0, 33.0, 37.0), (44.0, 33.0, 39.0)])
    second = labelled(bilinear=[(20.0, 10.0, 15.0)] * 2, ours=[(21.0, 12.0, 16.0)] * 2, late=[(19.0, 9.0, 15.0)] * 2)
    columns = gains.gains({"A": first, "B": second, "C": labelled(ours=[(1.0, 1.0, 1.0)])})
    assert [column.heading for column in columns] == [
        f"{name}, {kind}" for name in ("A", "B", "mean") for kind in ("gain", "boundary gain", "kept")
    ]
    assert columns[0].values == {"bilinear": [0, 0], "ours": [2, 3]}
    assert columns[2].values["ours"] == [-1, 0]
    assert columns[6].values == {"bilinear": [0, 0], "ours": [1.5, 2]}
    assert [columns[0].cell(label) for label in ("bilinear", "ours", "late")] == [
        "+0.00 ± 0.00",
        "**+2.50 ± 1.00**",
        "",
    ]
    assert columns[2].cell("ours") == "-0.50 ± 1.00"
    assert gains.labels_of(columns) == ["bilinear", "ours", "late"]
    assert len(gains.gains({"A": first})) == 3
    text = gains.markdown(columns[:2], ["ours"])
    assert text.splitlines()[2] == "| ours | **+2.50 ± 1.00** | **+2.50 ± 1.00** |"
    rows = list(csv.DictReader(gains.comma_separated(columns[:1], ["bilinear", "ours"]).splitlines()))
    assert rows[1] == {
        "upsampler": "ours", "column": "A, gain", "mean": "2.5", "least": "2", "greatest": "3", "seeds": "2",
        "best": "yes",
    }  # fmt: skip
    assert rows[0]["best"] == ""


def test_lower_is_better_where_it_is():
    results = {"upsamplers": {"a": {"metrics": {"rmse": [0.5]}}, "b": {"metrics": {"rmse": [0.4]}}}}
    (column,) = gains.plain("depth", results, TASKS["depth"].load()[2], ["rmse"])
    assert [column.cell(label) for label in "ab"] == ["0.5000", "**0.4000**"]


@pytest.fixture
def data(tmp_path):
    """All datasets of the table, tiny."""
    root = tmp_path / "data"
    layouts.pairs(root / "camvid", "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    for name in ("voc2012", "nyuv2"):
        layouts.pairs(root / name, "images/{name}.jpg", "labels/{name}.png", ("train", "test"))
        (root / name / "train.txt").write_text("s0\ns1\n")
        (root / name / "test.txt").write_text("s2\n")
        (root / name / "classes.json").write_text(json.dumps([f"class {i}" for i in range(21)]))
    for seed in range(3):
        depth = (render(seed, layouts.SIZE).depth * 300).round().long()
        layouts.save(depth, root / f"nyuv2/depth_mm/s{seed}.png")
    video = SyntheticVideo(11, layouts.SIZE, 4)
    for index in range(4):
        layouts.save(video.frame(index), root / f"davis2016/JPEGImages/a/{index:05d}.jpg")
        layouts.save((video.annotation(index) > 0).long(), root / f"davis2016/Annotations/a/{index:05d}.png")
    scene = render(4, layouts.SIZE)
    layouts.save(scene.image, root / "grabcut/images/a.jpg")
    layouts.save((scene.objects == 1).long(), root / "grabcut/labels/a.png")
    return root


def test_all_parts_in_one_table_that_goes_on(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loftup.cli.models.backbone_of", lambda arguments: mean_colours(cell=8))
    settings = {name: {**part.settings, "size": [32, 32], "pictures": 1} for name, part in vit_table.PARTS.items()}
    settings["video"] |= {"size": 32, "feature_size": 16}
    small = {name: replace(part, settings=settings[name]) for name, part in vit_table.PARTS.items()}
    monkeypatch.setattr(vit_table, "PARTS", small)
    monkeypatch.setattr(sys, "argv", ["vit_table.py"])
    words = ["--data", str(data), "-o", str(tmp_path / "out"), "--seeds", "2", "--backbone", "x"]
    assert vit_table.main([*words, "--upsampler", "bilinear,nearest"]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert "| upsampler | CamVid, gain | CamVid, boundary gain | CamVid, kept | VOC, gain |" in table
    for heading in ("mean, kept", "NYU depth, RMSE m", "NYU normals, mean deg", "DAVIS, J&F", "GrabCut, IoU@1 %"):
        assert f" {heading} |" in table
    assert "name x; segmentation on camvid; segmentation on voc" in table
    rows = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert {row["upsampler"] for row in rows} == {"bilinear", "nearest"}
    assert {row["column"]: row["seeds"] for row in rows}["mean, gain"] == "2"
    results = json.loads((tmp_path / "out/clicks/results.json").read_text())
    assert results["config"]["train"] == "voc:voc2012"
    assert str(tmp_path) not in json.dumps(results)
    capsys.readouterr()

    assert vit_table.main([*words, "--upsampler", "bilinear,nearest", "--add", "bicubic", "--parts", "voc"]) == 0
    assert "nearest: finished already" in capsys.readouterr().err
    assert "| bicubic | " in (tmp_path / "out/table.md").read_text()
    assert vit_table.main([*words, "--upsampler", "lift", "--parts", "voc"]) == 1
    assert vit_table.main([*words[:3], str(tmp_path / "new"), "--data", str(data / "none"), "--parts", "voc"]) == 2
    assert not (tmp_path / "new/table.md").exists()


def test_commands_are_shown(capsys, tmp_path):
    words = ["--data", "d", "-o", "o", "--anyup", "w.pth@code", "--quick", "40", "--dry", "--layer", "10"]
    assert vit_table.main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert "views4_any=views:4:loftup:any,anyup:w.pth@code" in lines[0]
    assert lines[0].endswith("--seeds 3 --every 40 --layer 10 --trust-remote-code -o o/camvid")
    assert "--seeds" not in lines[5]
    assert "--set objects=5 " in lines[6]
    assert not list(tmp_path.iterdir())
    assert vit_table.main(["--data", "d", "-o", "o", "--dry", "--thin", "video=8"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.count("--every 8") for line in lines] == [0, 0, 0, 0, 0, 1, 0]
    for wrong, said in (
        (["--parts", "x"], "unknown parts x"),
        (["--seeds", "0"], "must be 1 or more"),
        (["--thin", "video=0"], "expected PART=N,... of camvid"),
    ):
        with pytest.raises(SystemExit):
            vit_table.main(["--data", "d", "-o", "o", *wrong])
        assert said in capsys.readouterr().err
