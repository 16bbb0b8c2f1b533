"""The backbone that comes with the package."""

import pytest
import torch

from loftup import load_backbone
from loftup.backbones import identify
from loftup.weights.catalogue import TINY_BACKBONE as FOLDER


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny")


def test_tiny_needs_no_network_and_takes_any_size(tiny):
    image = tiny.preprocess(torch.randint(0, 255, (3, 96, 160), dtype=torch.uint8))
    with torch.inference_mode():
        features = tiny(image)
    assert features.shape == (1, 192, 6, 10)
    assert features.dtype == torch.float32
    assert not tiny.training
    assert identify(tiny) == "tiny"


def test_tiny_is_small(tiny):
    assert sum(p.numel() for p in tiny.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6 * 2**20


def test_tiny_knows_edges_from_flat_ground(tiny):
    """Its weights are trained ones: cells of one side of an edge are alike, those across it are not."""
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    image[0, :, :112], image[1, :, 112:] = 200, 160
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(tiny(tiny.preprocess(image))[0, :, 7], dim=0)  # (C, 14)
    same, across = rows[:, 2] @ rows[:, 4], rows[:, 2] @ rows[:, 11]
    assert same > across + 0.05


def test_tiny_takes_options_of_its_own(tiny):
    random = load_backbone("tiny", weights=False, mean=(0, 0, 0), layer=2)
    assert random.mean == (0, 0, 0)
    assert random.std == (0.5, 0.5, 0.5)
    assert random.layer == 2
    copied = load_backbone("tiny", weights=FOLDER / "model.safetensors")
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(copied(image), tiny(image))
