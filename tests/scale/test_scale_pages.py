"""Snippets, commands and files of docs/scale.md and the pages beside it."""

import re
import subprocess

import pytest
from material import ROOT
from photos import photos

from loftup.cli import _parser

PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
CLUSTER = ROOT / "examples" / "cluster"


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    photos(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "scale.md", "exec"), names)
    assert names["dense"].shape == (192, 480, 640)
    assert names["array"].shape == tuple(names["record"].features.shape)


def test_the_commands_parse():
    job = (CLUSTER / "rayjob.yaml").read_text("utf-8")
    texts = [
        PAGE,
        (CLUSTER / "slurm.sh").read_text("utf-8").replace("\\\n", " "),
        job.replace("\n    --backbone", " --backbone"),
    ]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("loftup features")]
    assert len(lines) == 5
    for line in lines:
        _parser().parse_args(line.partition("#")[0].replace('"', "").split()[1:])


def test_the_files_for_clusters_are_well_formed():
    yaml = pytest.importorskip("yaml")
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text("utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    (group,) = cluster["workerGroupSpecs"]
    worker = group["template"]["spec"]["containers"][0]
    assert (job["kind"], head["image"]) == ("RayJob", worker["image"])
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
