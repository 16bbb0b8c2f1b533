"""Colours of feature maps."""

import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from material import FARSIGHTED, LEARNABLE, SINE, inputs, randomised, universal
from PIL import Image

from loftup import LoftUpConfig, LoftUpError, viz
from loftup.viz import compare, pca_image


def test_components_match_a_singular_value_decomposition():
    features = torch.randn(1, 6, 20, 30) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1, 0.1]).view(1, 6, 1, 1)
    coloured = pca_image(features, quantile=0.0)[0].flatten(1)
    rows = features[0].flatten(1).T
    rows = rows - rows.mean(0)
    scores = (rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:3].T).T
    scaled = (scores - scores.amin(1, keepdim=True)) / (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True))
    for ours, theirs in zip(coloured, scaled, strict=True):
        assert min((ours - theirs).abs().max(), (ours - (1 - theirs)).abs().max()) < 1e-3


def test_shapes_range_and_determinism():
    maps = [torch.randn(2, 8, 4, 5), torch.randn(8, 16, 20).half()]
    first, second = pca_image(maps)
    assert first.shape == (2, 3, 4, 5)
    assert second.shape == (3, 16, 20)
    assert first.dtype == second.dtype == torch.float32
    assert min(first.min(), second.min()) >= 0
    assert max(first.max(), second.max()) <= 1
    assert torch.equal(pca_image(maps)[1], second)
    assert pca_image(maps[1]).shape == (3, 16, 20)


def test_a_shared_pca_gives_equal_features_equal_colours():
    small = torch.randn(8, 4, 4)
    large = small.repeat_interleave(5, -1).repeat_interleave(5, -2)
    first, second = pca_image([small, large])
    torch.testing.assert_close(first.repeat_interleave(5, -1).repeat_interleave(5, -2), second)
    alone = pca_image([small, 10 * torch.randn(5, 4, 4)], shared=False)
    assert len(alone) == 2


def test_outliers_do_not_grey_out_the_rest():
    features = torch.randn(4, 64, 64)
    features[:, 0, 0] = 1e4
    coloured = pca_image(features, quantile=0.01)
    assert coloured[:, 1:].std() > 0.15


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels(channels):
    assert pca_image(torch.randn(channels, 5, 5)).shape == (3, 5, 5)


@pytest.mark.parametrize(
    ("features", "options", "text"),
    [
        (torch.rand(4, 4), {}, r"must be \(B, C, H, W\) or \(C, H, W\).*got \(4, 4\)"),
        (torch.rand(3, 4, 4) / 0, {}, "map 0 holds values that are not finite"),
        ([torch.rand(3, 4, 4), torch.rand(5, 4, 4)], {}, r"different channel counts \[3, 5\]; use shared=False"),
        ([], {}, "no feature maps"),
        (torch.rand(3, 4, 4), {"quantile": 0.5}, r"quantile must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_bad_arguments(features, options, text):
    with pytest.raises(ValueError, match=text):
        pca_image(features, **options)


@pytest.mark.parametrize("image", [Image.new("RGB", (40, 30), "red"), torch.rand(3, 30, 40), torch.rand(1, 3, 30, 40)])
def test_compare_puts_panels_side_by_side(image):
    sheet = compare(image, {"low": torch.rand(1, 8, 3, 4), "high": torch.rand(8, 60, 80)}, height=60)
    assert sheet.height == 60 + 2 * 12
    assert sheet.width == 3 * 80 + 2 * 4
    assert sheet.getpixel((82, 50)) == (255, 255, 255)


def test_compare_shows_one_image_only():
    with pytest.raises(ValueError, match="map 'x' has a batch of 2"):
        compare(torch.rand(3, 8, 8), {"x": torch.rand(2, 8, 3, 4)})
    with pytest.raises(ValueError, match=r"a picture shows one image, got a batch of 2; choose one: image\[0\]"):
        compare(torch.rand(2, 3, 8, 8), {})
    for shape in ((8, 8), (8, 8, 3), (3, 0, 8)):
        with pytest.raises(ValueError, match=r"image must be \(3, H, W\) or \(1, 3, H, W\), got"):
            compare(torch.rand(shape), {})


@pytest.mark.parametrize("image", [numpy.zeros((8, 8, 3)), "photo.jpg", Path("photo.jpg"), [[0.0]], None])
def test_compare_takes_pictures_and_tensors_alone(image):
    with pytest.raises(TypeError, match=f"image must be a PIL image or a tensor .*got {type(image).__name__}"):
        compare(image, {})


def test_without_pillow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(LoftUpError, match=r'pip install "loftup\[viz\]"'):
        compare(torch.rand(3, 8, 8), {})


class TestAttention:
    @pytest.mark.parametrize("make", [lambda: randomised(SINE), lambda: randomised(LEARNABLE), universal])
    def test_maps_are_weights_of_the_cells(self, make):
        up, (features, image) = make(), inputs()
        maps = viz.attention_maps(up, features, image, [(0, 0), (45, 32), (20, 11)])
        assert maps.shape == (3, 5, 7)
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))
        assert viz.attention_maps(up, features, image, []).shape == (0, 5, 7)

    @pytest.mark.parametrize("size", [None, (20, 31)])
    def test_those_of_any_make_its_output(self, size):
        up, (features, image) = universal(heads=3, radius=3, **FARSIGHTED), inputs()
        weights = viz.attention_maps(up, features, image, [(7, 13)], size)[0]
        with torch.inference_mode():
            expected = up(features, image, size)[0, :, 13, 7]
        torch.testing.assert_close((weights * features[0]).sum((1, 2)), expected, atol=1e-5, rtol=1e-5)

    def test_those_of_the_published_network_make_its_last_block(self):
        up, (features, image) = randomised(LoftUpConfig(24, blocks=1, heads=1)), inputs()
        net, attention = up.upsampler, up.upsampler.ca_transformer.layers[-1][0].attention
        seen = {}
        attention.register_forward_hook(lambda module, given, out: seen.update(tokens=given[1], out=out))
        with torch.inference_mode():
            net(up.channelnorm(features), image)
            width = seen["tokens"].shape[-1]
            values = F.linear(
                seen["tokens"], attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
            )
            weights = viz.attention_maps(up, features, image, [(7, 13)])[0]
            ours = attention.out_proj(weights.flatten() @ values[0])
        torch.testing.assert_close(ours, seen["out"][0, 13 * 46 + 7], atol=1e-5, rtol=1e-4)

    def test_the_picture(self):
        up, (features, image) = universal(), inputs()
        image[..., 20:] = 0
        sheet = viz.attention(up, features, image, [(3, 4), (40, 30)], height=66)
        assert sheet.size == (2 * 92 + 4, 66)
        first, second = (numpy.asarray(sheet)[40:, start + 60 : start + 92, 0].mean() for start in (0, 96))
        assert first < 5  # black
        assert second > 20  # coloured for the second point

    def test_the_dot_leaves_the_heaviest_cell_in_sight(self):
        up, (features, image) = universal(), (torch.randn(1, 24, 6, 8), torch.zeros(1, 3, 48, 64))
        weights = viz.attention_maps(up, features, image, [(29, 21)])[0]
        sheet = numpy.asarray(viz.attention(up, features, image, [(29, 21)], height=240)).astype(int)
        assert weights.argmax() == 2 * 8 + 3
        cell = sheet[80:120, 120:160]
        orange = (cell[..., 0] - cell[..., 2] > 150).mean()
        assert orange > 0.75
        assert (cell.min(-1) > 250).any()  # the dot
        assert (sheet[:, 0] == 0).all()

    def test_refusals(self):
        up, (features, image) = universal(), inputs(2)
        with pytest.raises(ValueError, match="one image, got a batch of 2"):
            viz.attention_maps(up, features, image, [(0, 0)])
        with pytest.raises(ValueError, match=r"point \(46, 0\) lies outside the output of 46x33 pixels"):
            viz.attention_maps(up, features[:1], image[:1], [(46, 0)])
        for points, message in (
            ((10, 20), r"points must be pairs \(x, y\), got \(10, 20\); for a single one"),
            ([(1, 2, 3)], "points must be pairs"),
            (torch.tensor([[[10, 20]]]), "points must be pairs"),
            ([(1.5, 2)], "lies between pixels, expected whole numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                viz.attention_maps(up, features[:1], image[:1], points)
        with pytest.raises(TypeError, match="attention takes a LoftUp, got Linear"):
            viz.attention_maps(torch.nn.Linear(2, 2), features[:1], image[:1], [(1, 1)])
        with pytest.raises(ValueError, match="no points given"):
            viz.attention(up, features[:1], image[:1], [])


def test_a_map_over_a_photograph():
    photo = Image.new("RGB", (40, 20), (100, 100, 100))
    values = torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    sheet = numpy.asarray(viz.overlay(photo, values, smooth=False))
    assert sheet.shape == (20, 40, 3)
    assert sheet[2, 2].tolist() == [100, 100, 100]
    assert abs(sheet[17, 2] - numpy.array([224, 116, 20])).max() <= 1  # four fifths of orange
    smooth = numpy.asarray(viz.overlay(torch.zeros(3, 20, 40), values.half()))
    assert len(numpy.unique(smooth[..., 0])) > 20
    for wrong in (torch.rand(3, 2, 2), torch.tensor([[1.5]]), torch.tensor([[torch.nan]])):
        with pytest.raises(ValueError, match=r"values must be \(h, w\) in \[0, 1\]"):
            viz.overlay(photo, wrong)
