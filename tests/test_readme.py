"""README's Python runs as it stands, and its table and commands say what the code says."""

import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm
import torch
from material import ROOT, drawn_scene
from safetensors.torch import save, save_file

from loftup import LoftUp
from loftup.cli import _parser

README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
EXPORT = (ROOT / "docs" / "export.md").read_text("utf-8")
BACKBONES = (ROOT / "docs" / "backbones.md").read_text("utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README + GUIDE + BACKBONES + RECIPES, re.DOTALL)


@pytest.fixture
def published(hub):
    """The Hub with random weights under the names of DINOv2-S/14 and its LoftUp."""
    buffer = io.BytesIO()
    torch.save(LoftUp(384).state_dict(), buffer)
    hub.add("haiwen/loftup-dinov2s", {"pytorch_model.bin": buffer.getvalue()})
    model = timm.create_model("vit_small_patch14_dinov2")
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "pretrained_cfg": model.pretrained_cfg}
    hub.add(
        "timm/vit_small_patch14_dinov2.lvd142m",
        {"config.json": json.dumps(config).encode(), "model.safetensors": save(model.state_dict())},
    )


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.strip().splitlines()[-1][:40] for snippet in SNIPPETS])
def test_the_snippets_run(snippet, published, tmp_path, monkeypatch):
    if "CUDAGraph" in snippet and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.chdir(tmp_path)
    Path("features").mkdir()
    drawn_scene(60, 80).save("photo.jpg")
    save_file({"features": torch.zeros(1, 2, 3)}, "features/photo.jpg.safetensors", {"size": "2x3"})
    snippet = snippet.replace('pretrained="openai"', "pretrained=None")  # a CLIP of 600 MB
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_the_table_of_weights():
    """``python mkdocs_hooks.py`` prints it."""
    table = runpy.run_path(str(ROOT / "mkdocs_hooks.py"))["weights_table"]()
    assert table in (ROOT / "docs" / "models.md").read_text("utf-8")
    assert all(f"| `{name}` | {channels} |" in table for name, channels in (("clip_vitb16", 512), ("any", "any")))


def test_the_commands_parse():
    lines = re.findall(r"^loftup ((?:.*\\\n)*.*)", README + GUIDE + EXPORT + RECIPES, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        assert _parser().parse_args(words).command == words[0]


def test_the_first_page_is_short():
    assert README.count("\n") <= 160


def test_the_two_commands_are_there():
    assert 'python -m pip install ".[viz]" && loftup demo -o demo.png' in README
    assert 'python -m pip install -e ".[dev]" && python -m pytest' in README


@pytest.mark.parametrize(
    "file", ["README.md", *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))], ids=str
)
def test_nothing_is_left_to_be_filled_in(file):
    assert not re.findall(r"@[A-Z0-9]+@|TODO|FIXME", (ROOT / file).read_text("utf-8"))
