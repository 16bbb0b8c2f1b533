"""Lines between two pictures: where they are, in which colours, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from loftup import viz
from loftup.drawing import RIGHT, WRONG


def near(picture, at, colour, within=40):
    """Tell whether a pixel has about that colour."""
    return np.abs(np.array(picture.getpixel(at), dtype=int) - np.array(colour)).max() <= within


GREY = Image.new("RGB", (100, 60), (40, 40, 40))


def test_lines_go_from_point_to_point():
    sheet = viz.matches(GREY, GREY, [(20, 30)], [(70, 30)], correct=[True])
    gap = sheet.width - 200
    assert sheet.size == (200 + gap, 60)
    assert near(sheet, (20, 30), RIGHT)
    assert near(sheet, (100 + gap + 70, 30), RIGHT)
    assert near(sheet, (60, 30), RIGHT, within=120)
    assert near(sheet, (10, 30), (40, 40, 40))
    assert near(sheet, (100, 10), (255, 255, 255))
    below = viz.matches(GREY, GREY, [(20, 30)], [(20, 40)], correct=[False], stacked=True)
    assert below.size == (100, 120 + gap)
    assert near(below, (20, 30), WRONG)
    assert near(below, (20, 60 + gap + 40), WRONG)
    assert not near(below, (23, 60 + gap + 40), WRONG)  # a cross, no disc


def test_the_second_picture_gets_the_height_of_the_first():
    small = Image.new("RGB", (50, 30))
    sheet = viz.matches(GREY, small, torch.tensor([[99.0, 59.0]]), torch.tensor([[49.0, 29.0]]), height=120)
    assert sheet.height == 120
    assert 400 < sheet.width < 410
    assert viz.matches(GREY, small, [], [], stacked=True).width == 100
    tensor = torch.rand(1, 3, 60, 100)
    assert viz.matches(tensor, tensor[0], [(1, 2)], [(3, 4)]).height == 60


def test_right_and_wrong_differ_in_lightness_and_hue():
    light = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (RIGHT, WRONG)]
    assert abs(light[0] - light[1]) > 20
    assert RIGHT[2] - WRONG[2] > 200  # blue against orange, which all kinds of colour blindness tell apart


@pytest.mark.parametrize(
    ("points", "targets", "correct", "said"),
    [
        ([(1, 2)], [(1, 2), (3, 4)], None, r"\(N, 2\) both, got \(1, 2\) and \(2, 2\)"),
        ([1, 2], [1, 2], None, r"\(N, 2\) both, got \(2,\) and \(2,\)"),
        ([(1, 2)], [(1, 2)], [True, False], r"correct must be \(1,\), one for each point, got \(2,\)"),
    ],
)
def test_what_does_not_fit(points, targets, correct, said):
    with pytest.raises(ValueError, match=said):
        viz.matches(GREY, GREY, points, targets, correct=correct)
