"""`loftup segment`: label maps of a small backbone, shared and of each picture, resumed and refused."""

import json

import numpy as np
import pytest
import torch
from material import drawn_scene
from PIL import Image

from loftup import LoftUp, load_backbone
from loftup.cli import main
from loftup.clusters import Clusters

pytest.importorskip("sklearn")
TINY = ["--backbone", "tiny", "--input", "64", "-k", "3"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    drawn_scene(60, 80).save(folder / "a.png")
    drawn_scene(90, 64).save(folder / "more" / "b.jpg")
    return folder


def labels(path):
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.asarray(picture), json.loads(picture.text["loftup_segment"])


def test_label_maps_of_the_pictures_own_size(photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["segment", str(photos), "-o", str(out), *TINY, "--overlay"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "2 label maps of 3 clusters, 0.0 megapixels" in err
    assert "wrote 2 of 2 label maps" in err
    found, settings = labels(out / "a.png.png")
    assert found.shape == (60, 80)
    assert found.max() < 3
    assert settings["k"] == "3"
    assert labels(out / "more" / "b.jpg.png")[0].shape == (90, 64)
    assert Image.open(out / "more" / "b.jpg.overlay.jpg").size == (64, 90)
    assert (out / "a.png.png").read_bytes()[24] == 8  # bits

    # The same as by hand, with the kept centres.
    clusters, backbone = Clusters.load(out / "clusters.safetensors"), load_backbone("tiny")
    image = backbone.preprocess(photos / "a.png")
    features = backbone(backbone.preprocess(photos / "a.png", size=(64, 85)))
    expected = LoftUp.from_pretrained("any")(features, image, head=clusters)[0]
    assert torch.equal(torch.from_numpy(found.copy()), expected)

    # Nothing to do, one gone, one new, which gets the same clusters.
    before = (out / "clusters.safetensors").read_bytes()
    assert main(command) == 0
    assert "2 of 2 images are finished already" in capsys.readouterr().err
    (out / "a.png.overlay.jpg").unlink()
    drawn_scene(70, 70).save(photos / "c.png")
    assert main(command) == 0
    assert "1 of 3 images are finished already" in capsys.readouterr().err
    assert (out / "clusters.safetensors").read_bytes() == before

    # Other settings.
    assert main([*command, "-k", "4"]) == 2
    assert "clusters.safetensors was written with other settings (k '3', now '4')" in capsys.readouterr().err
    (out / "clusters.safetensors").unlink()
    assert main(command) == 2
    assert "now 'not there'" in capsys.readouterr().err
    assert main([*command, "-k", "4", "--overwrite"]) == 0


def test_clusters_of_each_and_a_size(photos, tmp_path, capsys):
    command = ["segment", str(photos), "-o", str(tmp_path / "out"), *TINY, "--each", "--size", "20", "30"]
    assert main([*command, "--method", "gaussian"]) == 0
    assert labels(tmp_path / "out" / "a.png.png")[0].shape == (20, 30)
    assert not (tmp_path / "out" / "clusters.safetensors").exists()
    centres = Clusters.load(tmp_path / "out" / "more" / "b.jpg.clusters.safetensors").centres
    assert len(centres) == 3
    longest = ["segment", str(photos), "-o", str(tmp_path / "small"), *TINY, "--longest", "45"]
    assert main(longest) == 0
    assert labels(tmp_path / "small" / "more" / "b.jpg.png")[0].shape == (45, 32)
    assert main(command) == 2
    assert "other settings (method 'gaussian', now 'kmeans')" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_and_files_of_others(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "bad.jpg").write_text("no picture")
    command = ["segment", str(photos), "-o", str(out), *TINY, "--size", "20", "30"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "bad.jpg: cannot read the image" in err
    assert "wrote 2 of 3 label maps" in err
    assert main(["segment", str(photos / "bad.jpg"), "-o", str(tmp_path / "other"), *TINY]) == 2
    assert "none of the 1 pictures to fit clusters to can be used" in capsys.readouterr().err
    (out / "a.png.png").write_bytes((photos / "a.png").read_bytes())
    assert main(command) == 2
    assert "exists and was not made by loftup" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-k", "300"], "--clusters must be at most 256"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--layer", "99"], "layer"),
    ],
)
def test_refusals(photos, tmp_path, capsys, options, text):
    assert main(["segment", str(photos), "-o", str(tmp_path / "out"), *TINY, *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
