"""README's Python runs as it stands, and its table and commands say what the code says."""

import io
import json
import re

import pytest
import timm
import torch
from material import ROOT, drawn_scene
from safetensors.torch import save

from loftup import LoftUp, list_pretrained
from loftup.cli import _parser

README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
EXPORT = (ROOT / "docs" / "export.md").read_text("utf-8")
BACKBONES = (ROOT / "docs" / "backbones.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README + GUIDE + BACKBONES, re.DOTALL)


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
    monkeypatch.chdir(tmp_path)
    drawn_scene(60, 80).save("photo.jpg")
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_the_table_of_weights():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| `([\w/-]+)` \|", GUIDE, re.MULTILINE)
    assert rows == [(c.name, str(c.channels), str(c.patch_size), c.repo) for c in list_pretrained()]


def test_the_commands_parse():
    lines = re.findall(r"^loftup ((?:.*\\\n)*.*)", README + GUIDE + EXPORT, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = line.split("#")[0].replace("\\\n", " ").split()
        assert _parser().parse_args(words).command == words[0]


def test_the_two_commands_are_there():
    assert 'python -m pip install ".[viz]" && loftup demo -o demo.png' in README
    assert 'python -m pip install -e ".[dev]" && python -m pytest' in README


@pytest.mark.parametrize(
    "file", ["README.md", *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))], ids=str
)
def test_nothing_is_left_to_be_filled_in(file):
    assert not re.findall(r"@[A-Z0-9]+@|TODO|FIXME", (ROOT / file).read_text("utf-8"))
