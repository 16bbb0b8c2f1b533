"""The script of the pictures on a vision transformer, with the backbone of the package."""

import importlib.util
from pathlib import Path

import pytest
import torch

from loftup.pictures import open_picture

pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "recipes" / "vit_pictures.py"
spec = importlib.util.spec_from_file_location("vit_pictures", SCRIPT)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

PHOTO = Path(__file__).parents[1] / "src" / "loftup" / "bundled" / "photo" / "photo.jpg"


def test_three_sheets_of_a_photograph(tmp_path):
    words = [str(PHOTO), "--backbone", "tiny", "--side", "64", "--clusters", "3", "-o", str(tmp_path / "out" / "a")]
    recipe.main(words)
    sheets = [open_picture(tmp_path / "out" / f"a-{part}.jpg") for part in ("components", "likeness", "segments")]
    assert len({sheet.size for sheet in sheets}) == 1
    assert not list((tmp_path / "out").glob("*.txt"))
    recipe.main([*words, "--blind", "1"])
    key = dict(line.split(" ", 1) for line in (tmp_path / "out" / "a-key.txt").read_text().splitlines())
    assert sorted(key.values()) == ["any", "any, four views", "bilinear"]
    assert list(key) == ["1", "2", "3"]


def test_likeness_is_highest_at_the_point():
    maps = {"one": torch.randn(8, 12, 16), "other": torch.randn(8, 12, 16)}
    for shown in recipe.likeness(maps, (0.5, 0.25)).values():
        brightness = shown.sum(0)
        assert brightness[6, 4] == brightness.max()
    assert recipe.coloured(torch.tensor([[0.0, 1.0]])).mul(255).round().movedim(0, -1).tolist() == [
        [[12, 7, 60], [255, 240, 170]]
    ]


def test_segments_have_the_same_colours_in_all_maps():
    base = torch.zeros(4, 6, 8)
    base[0, :, :4], base[1, :, 4:] = 1, 1
    made = recipe.segments({"one": base + 0.01 * torch.randn(4, 6, 8), "other": base}, 2)
    assert made["one"].equal(made["other"])
    assert len(made["other"].flatten(1).unique(dim=1).mT) == 2
