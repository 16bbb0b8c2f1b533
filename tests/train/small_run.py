"""A tiny run: a made-up backbone, drawn pictures with label maps, everything within a second or two."""

import os
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from loftup.train.config import TrainConfig

RUN = [sys.executable, "-m", "loftup.cli", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *RUN[2:]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def make_material(folder: Path) -> Path:
    """A backbone's weights, and pictures with label maps of three classes in data/ and val/."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), folder / "backbone.safetensors")
    random = np.random.default_rng(0)
    for name, count in (("data", 5), ("val", 4)):
        (folder / name).mkdir()
        for index in range(count):
            labels = np.kron(random.integers(0, 3, (5, 6)), np.ones((8, 8))).astype(np.uint8)
            image = labels[..., None] * 80 + random.integers(0, 60, (40, 48, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"p{index}.jpg")
            Image.fromarray(labels).save(folder / name / f"p{index}.png")
    return folder


def small_config(material: Path, output: Path) -> TrainConfig:
    """Stage 1 on windows with frozen batch norms: four steps."""
    config = TrainConfig(output=str(output), steps=4, batch=2, window=16, save_every=2, log_every=1)
    config.backbone.name, config.backbone.layer = "test_efficientnet", 2
    config.backbone.weights = str(material / "backbone.safetensors")
    config.model.start, config.model.batch_norm = "interpolator", "frozen"
    config.data.path, config.data.sizes, config.data.workers = [str(material / "data")], [32], 0
    config.objective.mask_bicubic.weight = 1.0
    config.validation.size, config.validation.pictures = 32, 0
    return config


def steps_of(table: Path) -> list[int]:
    """The first column of a CSV file."""
    return [int(line.split(",")[0]) for line in table.read_text().splitlines()[1:]]
