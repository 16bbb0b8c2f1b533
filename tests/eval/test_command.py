"""``loftup eval``: what it writes, how it goes on, what it refuses."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from layouts import pairs
from PIL import Image
from small import mean_colours

from loftup import LoftUpError
from loftup.cli import main
from loftup.eval import run as module
from loftup.eval.catalogue import TASKS, Task
from loftup.eval.datasets.base import KINDS
from loftup.eval.result import Metric, Result
from loftup.eval.run import Comparison
from loftup.eval.table import comma_separated, markdown, read_results
from loftup.files import alone_in

SMALL = ["--set", "size=[32,32]", "--set", "training=samples", "--set", "points=50", "--set", "pictures=1"]


@pytest.fixture
def camvid(tmp_path):
    pairs(tmp_path / "camvid", "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    return f"camvid:{tmp_path / 'camvid'}"


@pytest.fixture
def colours(monkeypatch):
    """Stands for every backbone that the command line names."""
    monkeypatch.setattr("loftup.cli.models.backbone_of", lambda arguments: mean_colours(cell=8))


def call(*arguments):
    return main(["eval", *map(str, arguments)])


def test_the_table_of_tasks_loads_nothing_heavy_and_names_what_is_there():
    heavy = "torch", "numpy", "PIL", "timm"
    code = f"import sys, loftup.eval.catalogue; assert not set({heavy}) & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name, task in TASKS.items():
        function, config, metrics = task.load()
        assert function.__name__ == task.name == name
        assert config().device == "cpu"
        assert all(isinstance(metric, Metric) for metric in metrics.values())
        assert task.data in {*KINDS, ""}


def test_a_comparison_is_written_and_goes_on(camvid, colours, tmp_path, capsys):
    folder = tmp_path / "out"
    backbone = ["--backbone", "x", "--backbone-weights", tmp_path / "tuned.safetensors"]
    common = ["segmentation", "--dataset", camvid, *backbone, "--seeds", 2, *SMALL, "-o", folder]
    assert call(*common, "--upsampler", "bilinear,k3=large_input:3") == 0
    said = capsys.readouterr().err
    assert "bilinear: mIoU %" in said
    assert f"wrote {folder}" in said
    results = json.loads((folder / "results.json").read_text())
    assert list(results["upsamplers"]) == ["bilinear", "k3"]
    assert results["upsamplers"]["k3"]["upsampler"] == "large_input:3"
    assert len(results["upsamplers"]["bilinear"]["metrics"]["miou"]) == 2
    assert results["config"]["points"] == 50
    assert results["dataset"] == "camvid"
    assert {"loftup", "torch", "timm", "python", "device", "threads", "date"} <= set(results["environment"])
    assert str(tmp_path) not in (folder / "results.json").read_text()
    assert results["backbone"] == {"name": "x", "layer": None, "weights": "tuned.safetensors"}
    table = (folder / "results.md").read_text()
    assert "### segmentation on camvid, x" in table
    assert "| bilinear |" in table
    assert "±" in table
    figure = Image.open(folder / "figure.png")
    assert figure.size == (4 * (32 + 4) + 4, 22 + 32 + 8)

    assert call(*common, "--upsampler", "bilinear,nearest") == 0
    assert "bilinear: finished already" in capsys.readouterr().err
    again = json.loads((folder / "results.json").read_text())
    assert list(again["upsamplers"]) == ["bilinear", "k3", "nearest"]
    assert again["upsamplers"]["bilinear"] == results["upsamplers"]["bilinear"]
    assert Image.open(folder / "figure.png").width > figure.width

    assert call(*common[:-4], "--set", "points=60", *common[-2:], "--upsampler", "bilinear") == 2
    expected = "was made with other settings (config.pictures 1, now 4, config.points 50, now 60); give another -o"
    assert expected in capsys.readouterr().err
    assert call(*common, "--upsampler", "k3=large_input:2") == 2
    assert "has 'k3' already, of large_input:3; name this one otherwise" in capsys.readouterr().err
    assert call(*common, "--upsampler", "nearest", "--overwrite") == 0
    assert list(json.loads((folder / "results.json").read_text())["upsamplers"]) == ["nearest"]
    (folder / "results.json").write_text("{")
    assert call(*common, "--upsampler", "nearest") == 2
    assert "results.json does not hold results of `loftup eval` (" in capsys.readouterr().err


def test_a_failing_upsampler_stops_no_other(camvid, colours, tmp_path, capsys):
    folder = tmp_path / "out"
    common = ["segmentation", "--dataset", camvid, *SMALL, "-o", folder]
    assert call(*common, "--upsampler", "lift,bilinear") == 1
    assert "lift: failed: the upsampler 'lift' needs its weights" in capsys.readouterr().err
    assert list(json.loads((folder / "results.json").read_text())["upsamplers"]) == ["bilinear"]
    assert call("segmentation", "--dataset", camvid, *SMALL, "-o", tmp_path / "none", "--upsampler", "lift") == 1
    assert "nothing to write" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_oracle_on_rendered_scenes(tmp_path, capsys, monkeypatch):
    small = module.open_dataset("synthetic", "segmentation")
    small = type(small)("synthetic", [small.train[i] for i in range(6)], [small.val[0]], small.classes, small.colours)
    monkeypatch.setattr(module, "open_dataset", lambda spec, task: small)
    oracle = ["segmentation", "--backbone", "oracle", "--set", "training=samples", "--seeds", 1]
    assert call(*oracle, "--dataset", "synthetic", "--upsampler", "perfect", "-o", tmp_path / "out") == 0
    assert "mIoU % 100.00" in capsys.readouterr().err
    assert call(*oracle, "--dataset", "camvid:x", "--upsampler", "perfect", "-o", tmp_path / "other") == 2
    assert "the oracle knows the synthetic scenes alone" in capsys.readouterr().err


def test_efficiency_needs_no_dataset(colours, tmp_path, capsys):
    settings = ["--set", "size=[16,16]", "--set", "output=[16,16]", "--set", "rounds=1"]
    assert call("efficiency", "--upsampler", "bilinear,perfect", *settings, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "bilinear: added parameters M 0.000" in said
    assert "perfect: failed: only the oracle's features have a perfect upsampler" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dataset"] is None
    assert not (tmp_path / "out" / "figure.png").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--set", "speed=1"], "segmentation has no setting 'speed'; it has batch, boundary"),
        (["--set", "points=many"], "points of segmentation is 500 by default, got 'many' of another kind"),
        (["--set", "training=fast"], "the settings of segmentation: training must be 'dense' or 'samples'"),
        (["--upsampler", ","], "expected upsamplers of different labels, got ','"),
        (["--upsampler", "nearest,nearest"], "expected upsamplers of different labels"),
        (["--dataset", "camvid:nowhere"], "the folder of 'camvid' is not there: nowhere"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
        (["--set", "device=abacus"], "cannot use the device 'abacus'"),
        (["--device", "cpu", "--set", "device=cuda"], "--set device=cuda contradicts --device cpu; give one of them"),
        (["--set", "device=3"], "--set device=3: expected cpu, cuda"),
        (["--seeds", "2", "--set", "seeds=7"], "--set seeds=7 contradicts --seeds 2; give one of them"),
        (["--set", "size=[1.5,2]"], "the settings of segmentation: size[0] is 1.5, expected a valid integer"),
        (["--set", "size=[0,2]"], "the settings of segmentation: size[0] is 0, expected at least 1"),
        (["--set", "size=[true,2]"], "the settings of segmentation: size[0] is True, expected a number"),
        (["--set", "size=[2]"], "size is [2], expected a list of at least 2 items"),
        (["--set", "rate=1e999"], "the settings of segmentation: rate is inf, expected a finite number"),
        (["--set", "rate=NaN"], "the settings of segmentation: rate is nan, expected a finite number"),
        (["--set", "rate=0"], "the settings of segmentation: rate is 0, expected above 0"),
        (["--set", "rate=-1"], "the settings of segmentation: rate is -1, expected above 0"),
        (["--set", "points=true"], "the settings of segmentation: points is True, expected a number"),
        (["--set", "points=0"], "the settings of segmentation: points is 0, expected at least 1"),
    ],
)
def test_what_is_asked_wrongly(settings, expected, camvid, colours, tmp_path, capsys):
    assert call("segmentation", "--dataset", camvid, "--upsampler", "nearest", "-o", tmp_path / "o", *settings) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["results.json", "results.md", "figure.png", "pictures/03_mine.png"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_what_is_the_users_is_not_overwritten(camvid, colours, tmp_path, capsys, name, options):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    common = ["segmentation", "--dataset", camvid, "--seeds", 1, *SMALL, "--upsampler", "bilinear"]
    assert call(*common, "-o", tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "results.json does not hold results" in err or f"{file.name} exists and was not made by loftup" in err
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["{}"]


def test_a_run_killed_between_its_files_is_finished(camvid, colours, tmp_path, capsys):
    folder = tmp_path / "out"
    two = ["--upsampler", "a/b=lowres,a_b=nearest"]
    common = ["segmentation", "--dataset", camvid, "--seeds", 1, *SMALL, "-o", folder, *two]
    assert call(*common) == 0
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert len(names) == 4
    assert names[2:] == ["00_of_a_b.png", "00_truth.png"]
    assert names[1].startswith("00_of_a_b-")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("results.md", "figure.png"):
        (folder / name).unlink()
    (folder / "pictures" / ".loftup.0123456789abcdef").write_bytes(b"half")
    assert call(*common) == 0
    assert "a/b: finished already\na_b: finished already\n" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert call(*common, "--overwrite") == 0


def test_labels_have_files_of_their_own():
    labels = ["a", "A", "a/b", "a_b", "a b", "ä", "x" * 300, "x" * 301, "../a", "a_b-1234"]
    columns = {module._column(label).lower() for label in labels}
    assert len(columns) == len(labels)
    assert all(re.fullmatch(r"of_[a-z0-9_.-]{1,109}", column) for column in columns)


def test_two_runs_in_one_folder(camvid, colours, tmp_path, capsys):
    common = ["segmentation", "--dataset", camvid, "--seeds", 1, *SMALL, "--upsampler", "bilinear"]
    with alone_in(tmp_path / "out"):
        assert call(*common, "-o", tmp_path / "out") == 2
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lists(capsys):
    assert call("list") == 0
    shown = capsys.readouterr().out
    assert "featup_jbu" in shown
    assert "video            synthetic, davis" in shown
    assert call("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["datasets"]["depth"] == ["synthetic", "nyuv2", "navi"]


def result_of(upsamplers, dataset="camvid", **config):
    return {
        "task": "segmentation",
        "dataset": dataset,
        "backbone": {"name": "b", "layer": 3, "pad_type": "same"},
        "config": {"size": [8, 8], "device": "cpu", "pictures": 1, **config},
        "upsamplers": {
            label: {"upsampler": label, "metrics": {"miou": values}, "parameters": 2_500_000, "seconds": 61.2}
            for label, values in upsamplers.items()
        },
    }


def test_tables_join_what_belongs_together():
    results = [
        result_of({"a": [40.0, 42.0], "b": [44.0, 45.0]}),
        result_of({"c": [39.0]}),
        result_of({"a": [10.0]}, dataset="voc"),
    ]
    text = markdown(results)
    first, second = text.split("### ")[1:]
    assert first.startswith("segmentation on camvid, b, layer 3")
    assert "Protocol: size [8, 8]. Backbone: pad_type same." in first
    assert "| a | 41.00 ± 2.00 | 2.50 M | 61 |" in first
    assert "| b | **44.50 ± 1.00** |" in first
    assert "| c | 39.00 |" in first
    assert "| a | 10.00 | 2.50 M | 61 |" in second
    lines = comma_separated(results, ["miou"]).splitlines()
    assert lines[0].startswith("task,dataset,backbone,layer,upsampler,metric,mean,least,greatest,seeds")
    assert lines[1] == "segmentation,camvid,b,3,a,miou,41,40,42,2,2500000,61.2"
    assert len(lines) == 5
    with pytest.raises(LoftUpError, match="no result has the metric speed; they have miou"):
        markdown(results, ["speed"])


def test_tables_from_folders(tmp_path, capsys):
    for name, upsamplers in (("one", {"a": [40.0]}), ("two", {"b": [41.0]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(result_of(upsamplers)))
    assert call("table", tmp_path / "one", tmp_path / "two" / "results.json") == 0
    assert "| b | **41.00** |" in capsys.readouterr().out
    for suffix, expected in ((".md", "| a | 40.00 |"), (".csv", "miou,41,41,41,1")):
        file = tmp_path / "made" / f"table{suffix}"
        assert call("table", tmp_path / "one", tmp_path / "two", "-o", file, "--metrics", "miou") == 0
        assert expected in file.read_text()
    assert call("table", tmp_path / "one", "-o", tmp_path / "table.txt") == 2
    assert "expected a file with one of the suffixes .md, .csv" in capsys.readouterr().err
    for name in ("mine.md", "mine.csv"):
        (tmp_path / name).write_text("# mine\n")
        assert call("table", tmp_path / "one", "-o", tmp_path / name) == 2
        assert f"{name} exists and was not made by loftup" in capsys.readouterr().err
        assert call("table", tmp_path / "one", "-o", tmp_path / "made" / f"table{name[4:]}") == 0
    with pytest.raises(LoftUpError, match="expected results.json of `loftup eval` in"):
        read_results([tmp_path / "three"])
    row = {"upsampler": "a", "metrics": {"miou": [1.0]}, "parameters": 0, "seconds": 1}
    bad = [
        "[]", "{", "[" * 100_000, "\xff", "{}", json.dumps(result_of({"a": [1.0]}) | {"task": "x"}),
        *(json.dumps(result_of({}) | {"upsamplers": rows}) for rows in ([], {"a": 1}, {"a": {**row, "metrics": []}})),
        *(json.dumps(result_of({}) | {"upsamplers": {"a": row | {key: "x"}}}) for key in ("metrics", "seconds")),
        json.dumps(result_of({}) | {"upsamplers": {"a": row | {"metrics": {"miou": []}}}}),
    ]  # fmt: skip
    for content in bad:
        (tmp_path / "bad.json").write_text(content, "latin1")
        with pytest.raises(LoftUpError, match=r"does not hold results of `loftup eval` \(.*; remove it"):
            read_results([tmp_path / "bad.json"])


def test_lower_is_better_where_it_is(monkeypatch):
    results = result_of({"a": [2.0], "b": [1.0], "c": [float("nan")]})
    metrics = {"miou": Metric("error", 1, higher_is_better=False)}
    monkeypatch.setattr(Task, "load", lambda self: (None, None, metrics))
    assert "| b | **1.0** |" in markdown([results])


def test_a_network_is_moved_and_counted(monkeypatch, tmp_path):
    moved = []

    class Network(torch.nn.Linear):
        def to(self, device):
            moved.append(device)
            return self

    monkeypatch.setattr(module, "create", lambda spec, backbone, trust_remote_code: Network(2, 3))
    comparison = Comparison("efficiency", None, mean_colours(), {}, {}, tmp_path)
    comparison.function = lambda backbone, up, config: Result({"seconds": [1.0]})
    assert comparison.run("net=bilinear", lambda text: None) == 0
    assert moved == ["cpu"]
    assert comparison.rows["net"]["parameters"] == 9


def test_paths_are_shown_by_their_last_part(monkeypatch):
    assert module._without_folders("camvid:/a/b/camvid") == "camvid:camvid"
    assert module._without_folders("lift=lift:/a/run,b=liif:/c/other/,nearest") == "lift=lift:run,b=liif:other,nearest"
    assert module._without_folders("runs/one ./two ~/three") == "runs/one ./two ~/three"
    assert module._without_folders("bilinear") == "bilinear"
    assert module._without_folders("anyup:/a/b/w.pth@/c/d/code,jafar:/e@f/w.pth@/g") == "anyup:w.pth@code,jafar:w.pth@g"
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no git")))
    assert module._commit() is None
    monkeypatch.setattr(
        module.subprocess, "run", lambda *a, **k: argparse.Namespace(returncode=1, stdout="", stderr="")
    )
    assert module._commit() is None


def test_who_names_no_setting_gets_the_quick_protocol(camvid, colours, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "segmentation", dataclasses.replace(TASKS["segmentation"], most=1))
    common = ["segmentation", "--dataset", camvid, "--backbone", "x", "--upsampler", "bilinear", "-o"]
    assert call(*common, tmp_path / "quick") == 0
    assert "the quick protocol, for a first look: training=samples, output=0.5" in capsys.readouterr().err
    results = json.loads((tmp_path / "quick" / "results.json").read_text())
    assert results["dataset"] == "camvid, 1 of 2 to learn, of 1 to judge"
    assert results["config"]["training"] == "samples"
    assert call(*common, tmp_path / "set", *SMALL) == 0
    assert "quick" not in capsys.readouterr().err
    results = json.loads((tmp_path / "set" / "results.json").read_text())
    assert (results["dataset"], results["config"]["seeds"], results["config"]["output"]) == ("camvid", 3, 1.0)
    # Named, it is the base of what is set.
    assert call(*common, tmp_path / "both", *SMALL, "--protocol", "quick") == 0
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert (results["config"]["seeds"], results["config"]["points"]) == (1, 50)


@pytest.mark.parametrize("name", TASKS)
def test_the_help_of_a_task_explains_all_its_settings(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        call(name, "--help")
    lines = capsys.readouterr().out.partition("settings of the protocol")[2].splitlines()[1:]
    config = TASKS[name].load()[1]()
    starts = [number for number, line in enumerate(lines) if line.startswith("  --set ")]
    assert [lines[number].split()[1].partition("=")[0] for number in starts] == list(vars(config))
    assert all(lines[number + 1].startswith("      ") for number in starts)
    assert not any(":class:" in line or "``" in line for line in lines)
    settings = {key: value for key, value in TASKS[name].quick.items() if key not in vars(config)}
    assert not settings


def test_a_misspelt_upsampler_is_found_before_any_work(camvid, colours, tmp_path, capsys):
    words = ["segmentation", "--dataset", camvid, "--backbone", "x", *SMALL, "-o", tmp_path / "out"]
    assert call(*words, "--upsampler", "bilinear,billinear") == 2
    err = capsys.readouterr().err
    assert "there is no upsampler 'billinear'; did you mean 'bilinear'" in err
    assert "mIoU" not in err
