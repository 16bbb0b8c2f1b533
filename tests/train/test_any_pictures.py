"""The script that gathers labelled pictures for "any", loaded from its file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from loftup.train.data.sources import LabelFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recipes" / "any_pictures.py"
spec = importlib.util.spec_from_file_location("any_pictures", SCRIPT)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

pil = pytest.importorskip("PIL.Image")


def write(folder, name, labels, width=64, height=48):
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pil.effect_noise((width, height), 80).convert("RGB").save(folder / "images" / f"{name}.jpg")
    pil.fromarray(labels).save(folder / "labels" / f"{name}.png")


@pytest.fixture
def sets(tmp_path):
    for kind in ("voc", "nyu"):
        for number in range(4):
            labels = np.full((48, 64), number, np.uint8)
            labels[:20, :30], labels[20:24] = 5, 255
            write(tmp_path / kind, f"p{number}", labels)
        (tmp_path / kind / "train.txt").write_text("p0\np1\np2\np3\n")
    for number in range(4):
        camvid = np.full((48, 64), 11, np.uint8)
        camvid[:24] = 3
        segments = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) // 8  # 384 of them
        for folder, labels, name in (("camvid", camvid, f"f{number}.png"), ("bsds", segments, f"f{number}.seg0.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            pil.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / folder / f"f{number}.jpg")
            pil.fromarray(labels).save(tmp_path / folder / name)
    return tmp_path


def test_all_sets_become_one_folder(sets):
    folders = [word for kind in ("voc", "nyu", "camvid", "bsds") for word in (f"--{kind}", str(sets / kind))]
    recipe.main([*folders, "--mosaics", "2", "-o", str(sets / "out")])
    source = LabelFolder(sets / "out", void=255)
    assert len(source) == 4 + 4 + 2 + 4 + 2 * 2
    files = {path.name: np.array(pil.open(path)) for path in (sets / "out").glob("*/*.png")}
    assert set(np.unique(files["camvid_f2.png"])) == {3, 255}
    assert files["nyu_p1.png"].shape == (24, 40)
    assert set(np.unique(files["voc_p1.png"])) == {1, 5, 255}
    # More segments than eight bits hold: the largest stay.
    assert len(np.unique(files["bsds_f0.png"])) == 256
    mosaic = files["voc_mosaic_000.png"]
    assert mosaic.shape == (recipe.SIDE, recipe.SIDE)
    assert set(np.unique(mosaic)) <= {0, 1, 2, 3, 5, 255}
    assert len(np.unique(files["bsds_mosaic_001.png"])) == 256


def test_segments_of_different_pictures_stay_apart(sets):
    for number in range(4):
        segments = np.full((48, 64), 3, np.uint8)
        pil.fromarray(segments).save(sets / "bsds" / f"f{number}.seg0.png")
    recipe.main(["--bsds", str(sets / "bsds"), "--mosaics", "1", "-o", str(sets / "out")])
    assert len(np.unique(np.array(pil.open(sets / "out" / "bsds" / "bsds_mosaic_000.png")))) == 4


def test_no_set_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["-o", str(tmp_path)])
    assert "no set is given, expected one or several of --bsds" in capsys.readouterr().err
