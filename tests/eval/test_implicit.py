"""FeatUp's per-image upsampler."""

import torch
import torch.nn.functional as F
from small import mean_colours

from loftup.eval.datasets.synthetic import render
from loftup.eval.upsamplers import create


def test_it_fits_an_image_better_than_interpolation():
    backbone = mean_colours(cell=8)
    image = render(3, 64).image[None] / 255
    features = backbone(image)
    state = torch.random.get_rng_state()
    up = create("featup_implicit:120", backbone)
    with torch.inference_mode():
        made = up(features, image, (64, 64))
    assert made.shape == (1, 3, 64, 64)
    assert len(up.losses) == 120
    assert sum(up.losses[-10:]) < 0.2 * sum(up.losses[:10])
    # The features are mean colours, so the picture itself is the truth.
    bilinear = F.interpolate(features, (64, 64), mode="bilinear", align_corners=False)
    assert F.mse_loss(made, image) < 0.8 * F.mse_loss(bilinear, image)
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_is_the_same_every_time_and_keeps_what_it_does_not_fit():
    backbone = mean_colours(cell=8, channels=5)
    image = render(5, 32).image[None] / 255
    features = backbone(image)
    up = create("featup_implicit:3", backbone)
    assert torch.equal(up(features, image, (16, 16)), up(features, image, (16, 16)))
    up.components = 1
    assert up(features.half(), image, (16, 16)).dtype == torch.half
    assert up(features[:0], image[:0], (16, 16)).shape == (0, 5, 16, 16)
