"""Names that users try, objects as they print, and features that the weights do not know."""

import dataclasses
import warnings

import pytest
import torch
from small_backbones import vit
from torch import nn

import loftup
from loftup import LoftUp, LoftUpConfig, Upsampled, load_backbone, wrap
from loftup.networks.config import read_config


@pytest.fixture(scope="module")
def pair():
    backbone = wrap(vit())
    return backbone, LoftUp(backbone.channels).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["output_size", "scale_factor", "shape"])
def test_names_of_other_libraries_get_the_right_one(pair, name):
    backbone, up = pair
    image = torch.rand(1, 3, 32, 32)
    remedy = rf"there is no option '{name}'; the size of the result is size=\(height, width\)"
    with pytest.raises(TypeError, match=remedy):
        up(backbone(image), image, **{name: 2})
    with pytest.raises(TypeError, match=remedy):
        Upsampled(backbone, up)(image, **{name: 2})


def test_another_name_gets_the_names_that_there_are(pair):
    backbone, up = pair
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(TypeError, match="no option 'chunk'; it has size, head, out, memory, backend"):
        up(backbone(image), image, chunk=2)


def test_both_in_one_take_a_head(pair):
    backbone, up = pair
    image, head = torch.rand(1, 3, 32, 40), torch.randn(5, backbone.channels)
    scores = Upsampled(backbone, up)(image, size=(16, 20), head=head, memory=2**24, backend="torch")
    torch.testing.assert_close(scores, up(backbone(image), image, size=(16, 20), head=head), atol=1e-4, rtol=1e-4)
    several = wrap(vit(), layer=[1, 2])
    first, second = Upsampled(several, up)(image, head=head)
    assert first.shape == second.shape == (1, 5, 32, 40)


def test_images_of_different_sizes(pair):
    both = Upsampled(*pair)
    images = [torch.rand(3, *size) for size in ((32, 48), (40, 32), (32, 48), (32, 48))]
    many = both.many(images, batch=2, head=torch.randn(5, 48))
    assert [tuple(each.shape) for each in many] == [(5, 32, 48), (5, 40, 32), (5, 32, 48), (5, 32, 48)]
    for image, dense in zip(images, both.many(iter(images), size=20), strict=True):
        torch.testing.assert_close(dense, both(image[None], size=20)[0], atol=1e-4, rtol=1e-4)
    first, second = Upsampled(wrap(vit(), layer=[1, 2]), pair[1]).many(images[:1])[0]
    assert first.shape == second.shape == (48, 32, 48)
    assert both.many([]) == []
    with pytest.raises(ValueError, match=r"image 1 must be \(3, H, W\), got shape \(1, 3, 32, 48\)"):
        both.many([images[0], images[0][None]])
    with pytest.raises(ValueError, match="batch must be a positive integer, got 0"):
        both.many(images, batch=0)


def test_the_dtype_of_the_result(pair):
    image = torch.rand(1, 3, 32, 40)
    half = Upsampled(*pair)(image, dtype=torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), Upsampled(*pair)(image), atol=2e-2, rtol=1e-2)


def test_upsamplers_of_others_are_called_as_they_are(pair):
    class Nearest(nn.Module):
        def forward(self, features, image, size=None):
            return nn.functional.interpolate(features, size or image.shape[2:])

    assert Upsampled(pair[0], Nearest())(torch.rand(1, 3, 32, 40)).shape[2:] == (32, 40)


def test_the_list_prints_as_a_table():
    lines = repr(loftup.list_pretrained()).splitlines()
    assert lines[0].split() == ["NAME", "C", "PATCH", "HUB", "REPOSITORY", "LICENCE", "BACKBONE", "(timm)"]
    assert [line.split()[0] for line in lines[1:]] == [each.name for each in loftup.list_pretrained()]


def test_a_backbone_prints_on_a_line():
    assert repr(load_backbone("tiny", views=4)) == (
        "Backbone(VisionTransformer, name='tiny', channels=192, patch_size=16, layer=None, views=4)"
    )


class TestTrainedOn:
    """Weights say which features of their backbone they learned from."""

    def upsampler(self, **trained_on):
        name = "test_resnet.r160_in1k"
        return LoftUp(LoftUpConfig(48, backbone=name, trained_on=trained_on or None)).eval()

    def backbone(self, layer=2, **options):
        return load_backbone("test_resnet", weights=False, layer=layer, check=False, **options)

    def test_the_same_features_are_taken_without_a_word(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Upsampled(self.backbone(), self.upsampler(layer=2, views=1, options={}))
            Upsampled(self.backbone(), self.upsampler())  # not known
            Upsampled(self.backbone(drop_rate=0.0), self.upsampler(layer=2, views=1, options={"drop_rate": 0.0}))
            # Of a model that was built elsewhere nobody knows the options.
            Upsampled(wrap(self.backbone().model, layer=2), self.upsampler(layer=2, views=1, options={"x": 1}))

    def test_others_are_named(self):
        backbone = self.backbone(output_stride=8)
        expected = r"trained on 'test_resnet.r160_in1k' with layer=1, views=4, options=\{\}, got layer=2, views=1, "
        with pytest.warns(
            UserWarning, match=expected + r"options=\{'output_stride': 8\}: the upsampled features may be"
        ):
            Upsampled(backbone, self.upsampler(layer=1, views=4, options={}))

    def test_the_last_layer_is_another_one(self):
        last = self.backbone(None)
        up = LoftUp(LoftUpConfig(last.channels, backbone=last.name, trained_on={"layer": 2}))
        with pytest.warns(UserWarning, match="with layer=2, got layer=None"):
            Upsampled(last, up)

    def test_they_are_stored_with_the_weights(self, tmp_path):
        up = self.upsampler(layer=2, views=1, options={"output_stride": 8})
        up.save_pretrained(tmp_path)
        assert LoftUp.from_pretrained(tmp_path).config == up.config
        assert hash(up.config)

    def test_a_config_with_something_else_is_refused(self):
        values = {**dataclasses.asdict(LoftUpConfig(8)), "trained_on": "layer 3"}
        with pytest.raises(ValueError, match="trained_on must be a mapping or None, got 'layer 3'"):
            read_config(values)


def test_remedies_for_what_is_often_given(pair):
    backbone, up = pair
    image = torch.rand(1, 3, 32, 32)
    features = backbone(image)
    for call, error, text in (
        (lambda: up(features, "photo.jpg"), TypeError, r"got str; for a file: backbone.preprocess\(path\)"),
        (lambda: up.at(features, image, torch.zeros(2, 2)), ValueError, r"got \(2, 2\); .* points\[None\]"),
        (lambda: up.at(features, image, [[1, 2]]), TypeError, r"got list; .* torch.tensor\(points\)\[None\]"),
        (lambda: loftup.explain(backbone), TypeError, r"got Backbone; a backbone has backbone.explain\(\)"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_errors_about_tiny_are_short_and_call_it_so():
    with pytest.raises(loftup.LoftUpError, match=r"timm cannot build 'tiny' with the options \{'view': 4\}") as caught:
        load_backbone("tiny", view=4)
    assert len(str(caught.value)) < 400


def test_open_clips_weights_of_openai_have_their_activation(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    given = []

    def create(kind, **options):
        given.append((kind, options["force_quick_gelu"]))
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    for name in ("ViT-L-14/openai", "ViT-L-14/laion2b_s32b_b82k"):
        with pytest.raises(loftup.LoftUpError, match="enough"):
            load_backbone(name)
    assert given == [("ViT-L-14", True), ("ViT-L-14", False)]
