"""`loftup find` with a small CLIP of random weights: its arithmetic, ranking, boxes, what resumes and is refused."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from material import drawn_scene
from PIL import Image

from loftup import LoftUp
from loftup.cli import main
from loftup.cli.find import best_region
from loftup.eval.text import OpenClip, embed, templates

pytest.importorskip("open_clip")
pytest.importorskip("scipy")


@pytest.fixture(autouse=True)
def small_clip(monkeypatch, tmp_path):
    """open_clip, which makes a small CLIP of fixed random weights instead of loading one."""
    import open_clip

    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
    text = {"width": 16, "heads": 2, "layers": 1}

    def create_model(name, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return open_clip.CLIP(24, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=True)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setenv("LOFTUP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    drawn_scene(60, 80).save(folder / "a.png")
    drawn_scene(90, 64).save(folder / "more" / "b.jpg")
    Image.new("RGB", (64, 48), "teal").save(folder / "plain.png")
    return folder


def rows(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_means_of_the_most_alike_pixels(photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "find",
        "a red house",
        str(photos),
        "--also",
        "sky, blue sky",
        "-o",
        str(out),
        "--input",
        "48",
        "--top",
        "2",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "ranked 3 of 3 pictures, 4 shown" in captured.err
    table = rows(out)
    assert [row["query"] for row in table] == ["a red house"] * 3 + ["sky, blue sky"] * 3
    assert captured.out.startswith(f"'a red house': best {table[0]['image']}, ")
    for start in (0, 3):
        scores = [float(row["score"]) for row in table[start : start + 3]]
        assert scores == sorted(scores, reverse=True)
        assert [row["rank"] for row in table[start : start + 3]] == ["1", "2", "3"]

    # By hand.
    clip, up = OpenClip("ViT-B-16/openai"), LoftUp.from_pretrained("any")
    texts = embed(clip, ["red house", "sky, blue sky"], templates())
    image = clip.backbone.preprocess(photos / "a.png")
    features = clip.backbone(clip.backbone.preprocess(photos / "a.png", size=(48, 64)))
    alike = torch.einsum("bchw,kc->bkhw", F.normalize(up(features, image), dim=1), texts)[0]
    for index, each in enumerate(alike):
        found = next(row for row in table[3 * index :] if row["image"].endswith("a.png"))
        assert float(found["score"]) == pytest.approx(float(each.flatten().sort().values[-48:].mean()), abs=1e-5)
        y, x = divmod(int(each.argmax()), 80)
        left, top, right, bottom = (int(found[side]) for side in ("left", "top", "right", "bottom"))
        assert left <= x < right <= 80
        assert top <= y < bottom <= 60
    shown = sorted(path.name for path in (out / "a_red_house").iterdir())
    assert [name[:4] for name in shown] == ["001_", "002_"]
    assert shown[0] == f"001_{table[0]['image'].rpartition('/')[2]}.jpg"
    assert len(list((out / "sky_blue_sky").iterdir())) == 2

    # Nothing to score, fewer to show, one picture anew, others' settings.
    assert main([*command, "--top", "1"]) == 0
    assert "3 of 3 images are scored already" in capsys.readouterr().err
    assert [path.name for path in (out / "a_red_house").iterdir()] == shown[:1]
    drawn_scene(61, 80).save(photos / "a.png")
    assert main(command) == 0
    assert "2 of 3 images are scored already" in capsys.readouterr().err
    assert main([*command, "--not", "wood"]) == 2
    assert "written with other settings (not [], now ['wood'])" in capsys.readouterr().err
    assert main([*command, "--not", "wood", "--overwrite", "--views", "4"]) == 0
    less = json.loads((out / "results.json").read_text())["pictures"][str(photos / "plain.png")]["scores"][0]
    assert less < float(next(row for row in table if row["image"].endswith("plain.png"))["score"]) + 1


def test_the_best_place_of_a_map():
    alike = torch.zeros(20, 30)
    alike[2:5, 3:9] = 0.8
    alike[4, 4] = 1.0
    alike[10:18, 20:28] = 0.9  # apart from it
    score, box, shape = best_region(alike)
    assert score == pytest.approx((1.0 + 5 * 0.9) / 6)
    assert box == (3, 2, 9, 5)
    assert shape == (20, 30)
    assert best_region(torch.zeros(1, 1)) == (0, (0, 0, 1, 1), (1, 1))


def test_pictures_that_cannot_be_read_and_files_of_others(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "bad.jpg").write_text("no picture")
    command = ["find", "sky", str(photos), "-o", str(out), "--input", "32"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "bad.jpg: cannot read the image" in err
    assert "ranked 3 of 4 pictures" in err
    assert main(["find", "sky", str(photos / "bad.jpg"), "-o", str(tmp_path / "other")]) == 2
    assert "none of the 1 pictures can be used" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (out / "results.csv").write_text("mine")
    assert main(command) == 2
    assert "exists and was not made by loftup" in capsys.readouterr().err


def test_two_texts_of_one_folder_name(photos, tmp_path):
    command = ["find", "sky!", str(photos / "a.png"), "--also", "sky?", "--also", "空", "-o", str(tmp_path / "out")]
    assert main([*command, "--input", "32"]) == 0
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["sky", "sky_2", "text_3"]


def test_weights_that_do_not_fit(photos, tmp_path, capsys):
    assert main(["find", "sky", str(photos), "-o", str(tmp_path / "out"), "--clip", "ViT-B-16"]) == 2
    assert "expected a CLIP as MODEL/PRETRAINED, got 'ViT-B-16'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
