"""The examples that need no network run as they stand; the other one compiles."""

import runpy
import sys

import pytest
from material import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(example, capsys, monkeypatch):
    compile(example.read_text("utf-8"), example.name, "exec")
    if example.name == "upsample_photo.py":
        pytest.skip("fetches weights from the Hub")
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
