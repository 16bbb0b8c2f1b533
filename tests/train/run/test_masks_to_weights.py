"""From a folder of pictures over masks of a SAM model to weights that load, by the two commands."""

import dataclasses

import pytest
import torch
from small_run import make_material, small_config
from small_sam import write_small_sam

from loftup import LoftUp
from loftup.cli import main
from loftup.train.config import to_yaml
from loftup.train.data.sources import SA1BFolder


@pytest.mark.parametrize("maker", ["sam", "felzenszwalb"])
def test_masks_then_a_step_of_training(tmp_path, maker):
    material = make_material(tmp_path)
    torch.manual_seed(1)
    options = ["--felzenszwalb", "--min-size", "20"]
    if maker == "sam":
        sam = write_small_sam(tmp_path / "sam")
        options = ["--sam", str(sam), "--points-per-side", "2", "--pred-iou-threshold", "-99"]
        options += ["--stability-threshold", "-1"]
    for label_map in (material / "data").glob("*.png"):
        label_map.unlink()
    assert main(["masks", str(material / "data"), *options]) == 0
    source = SA1BFolder(material / "data")
    assert all(len(source.read(index, torch.Generator()).masks) > 0 for index in range(len(source)))

    config = dataclasses.replace(small_config(material, tmp_path / "run"), steps=1)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    start = LoftUp.from_pretrained(tmp_path / "run" / "checkpoints" / "step_000001.pt")
    up = LoftUp.from_pretrained(tmp_path / "run")
    assert up.config == start.config
    assert all(torch.equal(a, b) for a, b in zip(up.parameters(), start.parameters(), strict=True))
    header, row = (tmp_path / "run" / "log.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert values["step"] == "1"
    assert values["empty"] == values["unreadable"] == values["nonfinite"] == "0"
    assert values["mask_bicubic"] == values["loss"]
