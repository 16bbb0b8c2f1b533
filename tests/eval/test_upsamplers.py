"""Upsamplers without learned weights, and the registry."""

import pytest
import torch
import torch.nn.functional as F
from small import mean_colours, ramp

from loftup import LoftUpError
from loftup.eval.upsamplers import create, names, register, registry
from loftup.eval.upsamplers.access import at_pixels, with_head
from loftup.eval.upsamplers.bilateral import JointBilateral


def test_every_name_is_registered_and_unknown_ones_get_a_hint():
    expected = {"lowres", "nearest", "bilinear", "bicubic", "large_input", "joint_bilateral", "featup_jbu"}
    expected |= {
        "views",
        "featup_implicit",
        "lift",
        "resize_conv",
        "liif",
        "loftup",
        "anyup",
        "anyup_multi_backbone",
        "naf",
    }
    assert expected | {"featup", "uplift", "loftup_published"} <= set(names())
    with pytest.raises(LoftUpError, match="no upsampler 'bilinaer'; did you mean 'bilinear'"):
        create("bilinaer", mean_colours())
    with pytest.raises(LoftUpError, match="no upsampler 'xyz'; expected .*bilinear"):
        create("xyz", mean_colours())


def test_others_register_their_own(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register("constant")
    def constant(backbone, argument):
        return lambda features, image, size: torch.full((len(features), backbone.channels, *size), float(argument))

    made = create("constant:2.5", mean_colours())(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 8, 8), (8, 8))
    assert made.shape == (1, 3, 8, 8)
    assert (made == 2.5).all()
    with pytest.raises(ValueError, match="there is an upsampler 'constant' already"):
        register("constant")(constant)
    for name in ("", "a:b", "a,b", "a=b"):
        with pytest.raises(ValueError, match="must not be empty or hold any of"):
            register(name)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolations_are_torchs(mode):
    features = torch.randn(2, 3, 5, 4)
    options = {"mode": "nearest-exact"} if mode == "nearest" else {"mode": mode, "align_corners": False}
    made = create(mode, mean_colours())(features, torch.rand(2, 3, 20, 16), (13, 17))
    assert torch.equal(made, F.interpolate(features, (13, 17), **options))


def test_lowres_gives_every_pixel_its_cell_and_says_so():
    up = create("lowres", mean_colours())
    assert up.native
    made = up(ramp(2, 3), torch.rand(1, 3, 4, 6), (4, 6))
    assert made[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_arguments_that_make_no_sense_are_refused():
    for spec, expected in (
        ("bilinear:3", "takes no argument, got bilinear:3"),
        ("large_input:1", "must be a number above 1, got '1'"),
        ("large_input:x", "must be a number above 1, got 'x'"),
        ("joint_bilateral:-1", "positive number for colours"),
        ("joint_bilateral:x", "positive number for colours"),
        ("featup_implicit:0", "number of steps an image"),
    ):
        with pytest.raises(LoftUpError, match=expected):
            create(spec, mean_colours())


def test_large_input_looks_at_the_larger_image():
    backbone = mean_colours(cell=4)
    image = torch.rand(1, 3, 16, 24)
    made = create("large_input:4", backbone)(backbone(image), image, (16, 24))
    # Cells of 4 pixels of a 4 times larger image are the pixels themselves, up to bicubic blur.
    large = F.interpolate(image, (64, 96), mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.allclose(made, F.avg_pool2d(large, 4), atol=1e-6)
    assert torch.equal(*(create(spec, backbone)(large, image, (9, 9)) for spec in ("large_input", "large_input:2")))


def plain_bilateral(features, image, colour, spatial, radius):
    """Pixel by pixel, as the paper's formula says."""
    _, channels, h, w = features.shape
    height, width = image.shape[-2:]
    colours = F.adaptive_avg_pool2d(image, (h, w))
    result = torch.zeros(1, channels, height, width)
    for y in range(height):
        for x in range(width):
            at_y = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
            at_x = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
            total = 0
            for i in range(h):
                for j in range(w):
                    if abs(i - round(at_y)) > radius or abs(j - round(at_x)) > radius:
                        continue
                    near = ((i - at_y) ** 2 + (j - at_x) ** 2) / (2 * spatial**2)
                    alike = float((image[0, :, y, x] - colours[0, :, i, j]).square().sum()) / (2 * colour**2)
                    weight = torch.tensor(-near - alike).exp()
                    total += weight
                    result[0, :, y, x] += weight * features[0, :, i, j]
            result[0, :, y, x] /= total
    return result


def test_joint_bilateral_is_the_papers_formula():
    features, image = torch.randn(1, 2, 3, 4), torch.rand(1, 3, 7, 11)
    made = JointBilateral(0.3, 0.8, 1)(features, image, (7, 11))
    assert torch.allclose(made, plain_bilateral(features, image, 0.3, 0.8, 1), atol=1e-5)


def test_joint_bilateral_follows_an_edge_that_bilinear_blurs():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 12:] = 1  # in the middle of the second column of cells
    features = F.avg_pool2d(image[:, :1], 8)
    made = create("joint_bilateral", mean_colours())(features, image, (32, 32))
    assert made[0, 0, 16, 13] > 0.9
    assert made[0, 0, 16, 10] < 0.5
    strange = image.clone()
    strange[0, :, 5, 5] = torch.tensor([0.0, 1.0, 0.0])  # a colour like no cell's
    assert create("joint_bilateral:0.01", mean_colours())(features, strange, (32, 32)).isfinite().all()


def test_features_at_pixels_and_through_a_head_are_those_of_the_map():
    class Streamed:
        def __call__(self, features, image, size, head=None):
            dense = F.interpolate(features, size, mode="nearest")
            return dense if head is None else head(dense)

        def at(self, features, image, points, size):
            dense = self(features, image, size)
            return torch.stack([d[:, p[:, 1], p[:, 0]].T for d, p in zip(dense, points, strict=True)])

    features, image = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 8, 10)
    pixels = torch.tensor([[[0, 9], [7, 0]], [[3, 4], [5, 6]]])
    dense = F.interpolate(features, (8, 10), mode="nearest")
    for up in (Streamed(), lambda f, i, s: F.interpolate(f, s, mode="nearest")):
        found = at_pixels(up, features, image, (8, 10), pixels)
        assert torch.equal(found[0, 0], dense[0, :, 0, 9])
        assert torch.equal(found[1, 1], dense[1, :, 5, 6])
        assert torch.equal(with_head(up, features, image, (8, 10), lambda x: x[:, :1] * 2), dense[:, :1] * 2)
