"""Pictures of images, labels and numbers, pixel by pixel."""

import math

import torch

from loftup.eval.colour import label_picture, map_picture, palette, picture


def test_images_are_rounded_and_clamped():
    image = torch.tensor([[0.0, 2.0], [0.5, -1.0], [1.0, 0.3]]).view(3, 1, 2)
    made = picture(image)
    assert made.size == (2, 1)
    assert [made.getpixel((x, 0)) for x in range(2)] == [(0, 128, 255), (255, 0, 76)]


def test_labels_get_their_colours_and_what_has_none_is_black():
    made = label_picture(torch.tensor([[0, 1], [-1, 1]]), ((10, 20, 30), (200, 0, 255)))
    pixels = [made.getpixel((x, y)) for y in range(2) for x in range(2)]
    assert pixels == [(10, 20, 30), (200, 0, 255), (0, 0, 0), (200, 0, 255)]


def test_made_up_colours_differ_and_are_not_black():
    colours = palette(150)
    assert len(set(colours)) == 150
    assert min(max(colour) for colour in colours) > 60


def test_numbers_go_from_dark_blue_to_yellow():
    made = map_picture(torch.tensor([[0.0, 2.0, 4.0, -9.0, 9.0, math.nan]]), 0, 4)
    pixels = [made.getpixel((x, 0)) for x in range(6)]
    dark, middle, yellow = (68, 1, 84), (33, 145, 140), (253, 231, 37)
    assert pixels == [dark, middle, yellow, dark, yellow, (0, 0, 0)]
