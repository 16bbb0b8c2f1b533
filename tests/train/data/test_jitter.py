"""Changed colours of the guidance."""

import pytest
import torch
import torch.nn.functional as F

from loftup.train.data import jitter as module
from loftup.train.data.jitter import jitter


def test_without_probability_nothing_changes():
    image = torch.rand(1, 3, 4, 4)
    assert jitter(image, 0.0, 0, 1) is image


def test_it_follows_from_seed_and_step():
    image = torch.rand(2, 3, 4, 6)
    made = [jitter(image, 1.0, 0, step) for step in range(30)]
    assert all(again.equal(jitter(image, 1.0, 0, step)) for step, again in enumerate(made))
    assert len({float(each.sum()) for each in made}) > 10
    assert any(each.equal(image) for each in made)
    assert all(each.shape == image.shape and torch.isfinite(each).all() for each in made)


@pytest.mark.parametrize("step", range(6))
def test_pixels_in_the_channels_change_as_pixels_do(step, monkeypatch):
    monkeypatch.setattr(module, "NOISE", 0.0)
    image = torch.rand(1, 3, 8, 8)
    folded = jitter(F.pixel_unshuffle(image, 2), 1.0, 0, step)
    torch.testing.assert_close(F.pixel_shuffle(folded, 2), jitter(image, 1.0, 0, step))


def test_pictures_of_a_step_change_alike():
    image = torch.rand(1, 3, 4, 6)
    for step in range(10):
        both = jitter(image.expand(2, -1, -1, -1), 1.0, 0, step)
        torch.testing.assert_close(both[0], both[1])
        torch.testing.assert_close(both[:1], jitter(image, 1.0, 0, step))
    with torch.autocast("cpu", torch.bfloat16):
        assert jitter(image, 1.0, 0, 3).dtype == torch.float32


def test_grey_is_grey(monkeypatch):
    for name, probability in {"GREY": 1.0, "GAMMA": 1.0, "MIX": 0.0, "NOISE": 0.0}.items():
        monkeypatch.setattr(module, name, probability)
    made = jitter(torch.rand(1, 3, 4, 4), 1.0, 0, 0)
    assert made[:, 0].equal(made[:, 1])
