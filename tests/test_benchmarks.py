"""The benchmarks' own parts: contenders that agree, tables that keep what was measured, and stages without a GPU."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from material import ROOT
from torch import Tensor

from loftup import LoftUp, load_backbone
from loftup.backbones.views import shifted

FOLDER = ROOT / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("needs the benchmarks beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import contenders
import gpu_training
import measure
import views_shift
from cases import Case

CASE = Case(24, 21, 3, batch=2)
COLUMNS = ("size", "contender", *measure.SPREAD, "mean", "status")


@pytest.mark.parametrize(
    "name", ["published", "published_sdpa", "untiled", "compiled", "loftup:torch", "loftup:cpu", "loftup:cpu_direct"]
)
def test_contenders_agree_with_the_network_on_the_whole_image(name: str) -> None:
    up = contenders.make_loftup(CASE.channels, "cpu")
    features, image = contenders.make_inputs(CASE, "cpu")
    with torch.inference_mode():
        result = contenders.contender(f"{name}:float32", up, CASE)(features, image)
    tolerance = 2e-3 if name == "compiled" else 1e-4  # coordinates' last bits, at a frequency of e^10
    torch.testing.assert_close(result, contenders.untiled(up, features, image), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["untiled", "compiled", "loftup:torch"])
def test_contenders_agree_for_any(name: str) -> None:
    up = LoftUp.from_pretrained("any")
    features, image = contenders.make_inputs(CASE, "cpu")
    with torch.inference_mode():
        result = contenders.contender(f"{name}:float32", up, CASE)(features, image)
    torch.testing.assert_close(result, contenders.untiled(up, features, image), atol=1e-4, rtol=0)


def test_a_head_is_applied_without_winograd_too() -> None:
    case = Case(24, 21, 3, head=5)
    up = contenders.make_loftup(24, "cpu")
    features, image = contenders.make_inputs(case, "cpu")
    with torch.inference_mode():
        assert contenders.contender("loftup:cpu_direct:bfloat16", up, case)(features, image).shape == (1, 5, 21, 21)


def test_views_shifted_by_parts_of_pixels() -> None:
    columns = torch.arange(24.0).expand(1, 3, 20, 24).clone()
    for how in views_shift.SHIFTS:
        whole = views_shift.move(columns, Fraction(-2), Fraction(3), how)
        torch.testing.assert_close(whole, shifted(columns, -2, 3), atol=1e-4, rtol=0)
        part = views_shift.move(columns, Fraction(0), Fraction(-7, 2), how)[0, 0, 9, 8:16]
        away = {"floor": -0.5, "nearest": -0.5, "bilinear": 0.0, "bicubic": 0.0}[how]
        torch.testing.assert_close(part, torch.arange(8.0, 16.0) - 3.5 + away, atol=1e-4, rtol=0)
    rows = views_shift.move(columns.mT, Fraction(14, 3), Fraction(0), "nearest")[0, 0, 8:12, 9]
    torch.testing.assert_close(rows, torch.arange(8.0, 12.0) + 5)
    assert views_shift.exact_offsets(14, 2) == [Fraction(-7, 2), Fraction(7, 2)]


def test_views_in_the_benchmark_are_the_backbones_own() -> None:
    backbone = load_backbone("tiny")
    image = torch.rand(1, 3, 70, 64)
    for views in (4, 9):
        expected = backbone.with_views(views)(backbone.normalise(image))
        torch.testing.assert_close(views_shift.look_at(backbone, views, "floor")(image), expected, atol=1e-4, rtol=1e-4)


def test_the_benchmark_of_shifts_goes_on(tmp_path, monkeypatch, capsys) -> None:
    table = tmp_path / "shifts.csv"
    words = ["--backbone", "tiny", "--dataset", "synthetic", "--size", "32", "32", "--most", "2", "-o", str(table)]
    monkeypatch.setattr(sys, "argv", ["views_shift.py", *words])
    views_shift.main()
    lines = table.read_text().splitlines()
    assert len(lines) == 1 + 5 * 2
    assert lines[1].startswith("synthetic,tiny,None,16,1,,bilinear,1,")
    assert lines[-1].startswith("synthetic,tiny,None,16,4,bicubic,loftup:any,1,")
    assert len(capsys.readouterr().out.splitlines()) == 10
    table.write_text("\n".join(lines[:-1]) + "\n")
    views_shift.main()
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert table.read_text().splitlines() == lines


def test_percentiles() -> None:
    assert measure.percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert measure.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    seconds = measure.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, "cpu", 5, limit=0)  # type: ignore[misc]
    assert calls == ["a", "b"] * 3  # the least number of rounds, for the time was up at once
    assert [len(times) for times in seconds.values()] == [3, 3]


def working() -> Callable[[], Tensor]:
    return lambda: torch.tensor(2.0)


def failing() -> Callable[[], Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def refusing() -> Callable[[], Tensor]:
    def refuse() -> Tensor:
        raise ValueError("no such\nkernel")

    return refuse


def mean(result: Tensor) -> dict[str, float]:
    return {"mean": result.mean().item()}


def test_a_failure_gets_a_row_and_is_not_tried_again(tmp_path) -> None:
    makers = {"good": working, "large": failing, "broken": refusing}
    table = measure.Table(tmp_path / "table.csv", COLUMNS)
    measure.Group(table, {"size": 7}, "cpu", 4, 1.0).measure(makers, mean)
    assert {row["contender"]: row["status"] for row in table.rows} == {
        "large": "out of memory",
        "broken": "ValueError: no such kernel",
        "good": "ok",
    }
    again = measure.Table(tmp_path / "table.csv", COLUMNS, go_on=True)
    assert again.rows == table.rows
    measure.Group(again, {"size": 7}, "cpu", 4, 1.0).measure({**makers, "late": working}, mean)
    assert [row["contender"] for row in again.rows] == ["large", "broken", "good", "late"]
    good = again.rows[2]
    assert (good["size"], good["rounds"], good["mean"]) == ("7", "4", "2.0")
    measure.Group(again, {"size": 8}, "cpu", 4, 1.0).measure({"good": working}, mean)
    assert again.rows[-1]["size"] == "8"
    assert measure.Table(tmp_path / "table.csv", COLUMNS).rows == []


def test_a_device_that_does_not_answer_starts_the_stage_again(tmp_path, monkeypatch) -> None:
    class Restart(Exception):  # noqa: N818
        pass

    def restart(program: str, command: list[str]) -> None:
        raise Restart(command)

    def unusable() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.setattr(torch.cuda, "synchronize", unusable)
    monkeypatch.setattr(measure, "describe", lambda device: {})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "upsamplers", "folder"])
    table = measure.Table(tmp_path / "table.csv", COLUMNS)
    with pytest.raises(Restart) as restarted:
        measure.Group(table, {"size": 7}, "cuda", 4, 1.0).measure({"broken": refusing, "good": working}, mean)
    assert restarted.value.args[0] == [sys.executable, "gpu.py", "upsamplers", "folder", "--go-on"]
    assert [row["contender"] for row in table.rows] == ["broken"]


def test_crops_of_the_photograph_can_be_trained_on(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    gpu_training.cut_photo(tmp_path / "pictures", 2)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "000.jpg",
        "000.png",
        "001.jpg",
        "001.png",
    ]
    picture, labels = (image.open(tmp_path / "pictures" / f"001.{kind}") for kind in ("jpg", "png"))
    assert picture.size == labels.size
    assert 2 <= len(labels.getcolors()) <= 12


def test_a_row_that_is_being_written_is_left_for_later(tmp_path) -> None:
    log = tmp_path / "log.csv"
    assert gpu_training.rows_of(log) == []
    log.write_text("step,loss\n10,0.5\n20,0.")
    assert gpu_training.rows_of(log) == [{"step": "10", "loss": "0.5"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the stages would run")
def test_the_stages_say_that_there_is_no_gpu(tmp_path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "results")}
    command = ["bash", str(FOLDER / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stdout.startswith("no CUDA device")
    assert not (tmp_path / "results").exists()
    wrong = subprocess.run([*command, "--fast"], env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert wrong.stderr == "unknown option --fast; there are --dry and --no-install\n"


def test_every_stage_runs_dry(tmp_path) -> None:
    """All but the tests, in Triton's interpreter where there is no GPU."""
    stages = ["environment", "upsamplers", "end_to_end", "training", "training_any"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "STAGES": " ".join(stages)}
    command = ["bash", str(FOLDER / "gpu.sh"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    with (tmp_path / "stages.csv").open() as stream:
        ended = {row["stage"]: row["status"] for row in csv.DictReader(stream)}
    assert ended == dict.fromkeys(stages, "ok")
    assert {"upsamplers.csv", "end_to_end.csv", "training.csv", "training_any.csv"} <= {
        p.name for p in tmp_path.iterdir()
    }
