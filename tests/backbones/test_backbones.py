"""The backbone module: inputs, sizes, precision, preprocessing, naming, and what it refuses."""

import copy
import io
import re
import subprocess
import sys
import warnings

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small_backbones import vit
from torch import nn

from loftup import LoftUp, LoftUpConfig, LoftUpError, Upsampled
from loftup.backbones import Backbone, identify, wrap


@pytest.mark.parametrize(
    ("size", "resized"),
    [((65, 70), (64, 64)), ((40, 39), (48, 32)), ((1, 200), (16, 208)), ((7, 8), (16, 16))],
)
def test_sizes_between_multiples_are_resized_to_the_nearest(size, resized):
    backbone = wrap(vit())
    image = torch.randn(1, 3, *size)
    expected = backbone(F.interpolate(image, resized, mode="bilinear", align_corners=False))
    features = backbone(image)
    assert features.shape == (1, 48, resized[0] // 16, resized[1] // 16)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_decide_the_precision(dtype):
    backbone, image = wrap(vit()), torch.randn(1, 3, 80, 48)
    expected = backbone(image)
    assert backbone(image.to(dtype)).dtype == torch.float32
    features = backbone.to(dtype)(image)
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), expected, atol=0.2, rtol=0.1)


def test_autocast_inference_mode_gradients_and_memory_formats():
    backbone, image = wrap(vit()), torch.randn(2, 3, 48, 80)
    expected = backbone(image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backbone(image).float(), expected, atol=0.2, rtol=0.1)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(image), expected)
    torch.testing.assert_close(backbone(image.to(memory_format=torch.channels_last)), expected)
    wide = torch.randn(2, 3, 48, 160)
    torch.testing.assert_close(backbone(wide[..., ::2]), backbone(wide[..., ::2].contiguous()))
    image.requires_grad_()
    backbone(image).square().sum().backward()
    assert image.grad.abs().min() > 0


def test_a_backbone_can_be_copied_and_saved_whole():
    backbone, image = wrap(vit()), torch.randn(1, 3, 64, 64)
    twin = copy.deepcopy(backbone)
    nn.init.zeros_(backbone.model.norm.weight)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(image), twin(image))
    assert not torch.equal(backbone(image), twin(image))


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        ([[0.0]], TypeError, r"image must be a tensor \(B, 3, H, W\), got list"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            TypeError,
            "normalised float tensor, got torch.uint8; .*preproc",
        ),
        (
            torch.zeros(3, 32, 32),
            ValueError,
            r"image must be \(B, 3, H, W\), got \(3, 32, 32\); for a single one: image\[None\]$",
        ),
        (
            torch.zeros(32, 32, 3),
            ValueError,
            r"got \(32, 32, 3\); for channels last: image.permute\(2, 0, 1\)\[None\]$",
        ),
        (torch.zeros(1, 32, 32, 3), ValueError, r"\(1, 32, 32, 3\); for channels last: image.permute\(0, 3, 1, 2\)$"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"got \(1, 4, 32, 32\); for RGBA: image\[:, :3\]$"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"for a grey image: image.expand\(-1, 3, -1, -1\)$"),
        (torch.zeros(1, 5, 32, 32), ValueError, r"got \(1, 5, 32, 32\)$"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"got \(1, 3, 0, 32\)$"),
    ],
)
def test_wrong_images_are_refused(image, error, text):
    with pytest.raises(error, match=text):
        wrap(vit())(image)


def test_unsupported_objects_are_refused_with_a_way_out():
    with pytest.raises(
        LoftUpError,
        match=r"no feature map in torch\.nn\.modules\.linear\.Linear: Linear at 224x448: .*Backbone\(model, f",
    ):
        wrap(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"takes a model object .*got str; for a model by its name: load_backbone"):
        wrap("dinov2_vits14")
    with pytest.raises(TypeError, match="got int$"):
        wrap(3)


@pytest.mark.parametrize(
    "inside",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        timm.utils.ModelEmaV3,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_the_model_inside_a_wrapper_is_found(inside):
    model, image = vit(), torch.rand(1, 3, 48, 64)
    backbone = wrap(inside(model))
    assert type(backbone.model) is type(model)
    assert "the model inside" in backbone.explain()
    torch.testing.assert_close(backbone(image), wrap(model)(image))


def test_a_function_of_the_users_own_makes_a_backbone():
    model = nn.Conv2d(3, 8, 4, stride=4)
    backbone = Backbone(model, model, channels=8, patch_size=4, name="mine")
    assert backbone(torch.rand(2, 3, 13, 16)).shape == (2, 8, 3, 4)
    assert identify(backbone) == "mine"
    assert repr(backbone) == "Backbone(Conv2d, name='mine', channels=8, patch_size=4, layer=None)"
    measured = Backbone(model, model, channels=9, patch_size=2, name="mine")
    assert (measured.channels, measured.patch_size) == (8, 4)
    with pytest.raises(LoftUpError, match=r"mine gave features of shape \(1, 8, 2, 2\), expected \(1, 9, h, w\)"):
        Backbone(model, model, channels=9, patch_size=4, name="mine", check=False)(torch.rand(1, 3, 8, 8))


def test_wrapping_again_returns_the_same_and_refuses_contradictions():
    backbone = wrap(vit(), layer=1)
    assert wrap(backbone) is backbone
    assert wrap(backbone, layer=1) is wrap(backbone, layer=-2) is backbone
    assert wrap(backbone, mean=backbone.mean, std=list(backbone.std)) is backbone
    for options in ({"layer": 0}, {"layer": -1}, {"mean": (0.5, 0.5, 0.5)}, {"std": (1, 1, 1)}):
        with pytest.raises(LoftUpError, match=r"a Backbone already, with layer=1, mean=\(0.485.*wrap its .model"):
            wrap(backbone, **options)
    with pytest.raises(LoftUpError, match="a Backbone already, with layer=None"):
        wrap(wrap(vit()), layer=1)


def test_scaling_is_the_models_own_unless_given():
    model = vit()
    assert wrap(model).mean == (0.485, 0.456, 0.406)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    assert wrap(model).mean == (0.1, 0.2, 0.3)
    assert wrap(model, mean=(0, 0, 0)).mean == (0.0, 0.0, 0.0)
    refused = (
        ("mean", (0.5, 0.5)), ("mean", (0, 0, float("nan"))), ("std", (1, 1, 0)), ("mean", 0.5), ("std", "one"),
    )  # fmt: skip
    for name, values in refused:
        for given in (model, wrap(model)):
            with pytest.raises(
                ValueError, match=rf"{name} must be three finite numbers.*, got {re.escape(repr(values))}"
            ):
                wrap(given, **{name: values})


def picture(mode="RGB", size=(6, 4)):
    pixels = torch.randint(0, 256, (size[1] * size[0] * 3,), dtype=torch.uint8)
    return Image.frombytes("RGB", size, bytes(pixels.tolist())).convert(mode)


def test_preprocess_reads_pictures_paths_and_tensors_alike(tmp_path):
    backbone = wrap(vit(), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    source = picture()
    source.save(tmp_path / "picture.png")
    pixels = torch.tensor(list(source.tobytes()), dtype=torch.uint8).view(4, 6, 3).permute(2, 0, 1)
    expected = torch.stack([(pixels[c] / 255 - m) / s for c, m, s in ((0, 0.5, 0.1), (1, 0.4, 0.2), (2, 0.3, 0.3))])[
        None
    ]
    for same in (source, tmp_path / "picture.png", str(tmp_path / "picture.png"), pixels, pixels[None]):
        image = backbone.preprocess(same)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected)
    assert backbone.preprocess(pixels.expand(5, -1, -1, -1)).shape == (5, 3, 4, 6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_preprocess_converts_any_mode(mode):
    source = picture(mode)
    backbone = wrap(vit())
    assert torch.equal(backbone.preprocess(source), backbone.preprocess(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_preprocess_scales_sixteen_bits_down(mode):
    values = [0, 100, 257, 32_768, 60_000, 65_535]
    packed = b"".join(value.to_bytes(2, "big" if mode == "I;16B" else "little") for value in values)
    pixels = wrap(vit(), mean=(0, 0, 0), std=(1, 1, 1)).preprocess(Image.frombytes(mode, (6, 1), packed)) * 255
    expected = torch.tensor([round(value / 257) for value in values]).expand(1, 3, 1, 6).float()
    torch.testing.assert_close(pixels, expected)


def test_files_of_sixteen_bits_are_scaled_and_turned(tmp_path):
    source = Image.frombytes("I;16", (2, 1), b"".join(value.to_bytes(2, "little") for value in (0, 51_400)))
    exif = Image.Exif()
    exif[0x0112] = 6
    source.save(tmp_path / "deep.tiff")
    source.save(tmp_path / "turned.png", exif=exif)
    backbone = wrap(vit(), mean=(0, 0, 0), std=(1, 1, 1))
    expected = torch.tensor([[0.0, 200.0]]).expand(1, 3, 1, 2)
    torch.testing.assert_close(backbone.preprocess(tmp_path / "deep.tiff") * 255, expected)
    torch.testing.assert_close(backbone.preprocess(tmp_path / "turned.png") * 255, expected.mT)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_preprocess_refuses_values_without_a_range(tmp_path, mode):
    Image.new(mode, (6, 4)).save(tmp_path / "depth.tiff")
    for source, name in ((Image.new(mode, (6, 4)), "the picture"), (tmp_path / "depth.tiff", "depth.tiff")):
        with pytest.raises(
            ValueError, match=f"{name} has mode '{mode}', whose .*expected 8 or 16 bits.*scale the valu"
        ):
            wrap(vit()).preprocess(source)


def test_odd_files_are_os_errors_with_the_path(tmp_path, monkeypatch):
    whole = tmp_path / "whole.png"
    picture(size=(60, 40)).save(whole)
    content = bytearray(whole.read_bytes())
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    content[37] ^= 0xFF  # within the name of the chunk behind the header: Pillow raises a SyntaxError
    (tmp_path / "odd.png").write_bytes(content)
    (tmp_path / "text.png").write_text("hello")
    for name in ("half", "odd", "text"):
        with pytest.raises(OSError, match=rf"cannot read the image .*{name}\.png: "):
            wrap(vit()).preprocess(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"cannot read the image .*whole\.png: .*exceeds limit"):
        wrap(vit()).preprocess(whole)


def test_preprocess_applies_the_exif_orientation(tmp_path):
    source, exif = picture(size=(40, 20)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter clockwise
    source.save(tmp_path / "turned.png", exif=exif)
    backbone = wrap(vit())
    turned = backbone.preprocess(tmp_path / "turned.png")
    assert torch.equal(turned, torch.rot90(backbone.preprocess(source), -1, (2, 3)))


def test_preprocess_resizes_antialiased():
    backbone = wrap(vit(), mean=(0, 0, 0), std=(1, 1, 1))
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = backbone.preprocess(stripes, size=16)
    assert small.shape == (1, 3, 16, 16)
    assert (small[..., 2:-2] - 0.5).abs().max() < 0.02
    assert backbone.preprocess(picture(), size=(32, 48)).shape == (1, 3, 32, 48)
    edge = backbone.preprocess(
        torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).expand(3, 16, 16), size=64
    )
    assert (edge.min(), edge.max()) == (0, 1)
    assert backbone.preprocess(picture(), size=(numpy.int64(8), numpy.int32(9))).shape == (1, 3, 8, 9)
    assert backbone.preprocess(picture(), size=numpy.int64(8)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"size must be positive, got \(0, 4\)"):
        backbone.preprocess(picture(), size=(0, 4))
    for size in (8.0, (8.0, 8), (8,), (8, 8, 8), "8", "88", True):
        with pytest.raises(ValueError, match=r"size must be an int or a pair \(height, width\) of ints, got"):
            backbone.preprocess(picture(), size=size)


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (torch.zeros(3, 4, 4), TypeError, r"must be uint8 in 0..255, got torch.float32"),
        (
            torch.zeros(4, 4, 3, dtype=torch.uint8),
            ValueError,
            r"must be \(3, H, W\) or \(B, 3, H, W\), got \(4, 4, 3\)",
        ),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), ValueError, r"W\), got \(3, 0, 4\)"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ValueError, r"W\), got \(0, 3, 4, 4\)"),
        (
            numpy.zeros((3, 4, 4), numpy.uint8),
            ValueError,
            r"array .* uint8 \(H, W, 3\) in RGB, got uint8 of shape \(3, 4, 4\)",
        ),
        (numpy.zeros((4, 4, 3)), ValueError, r"must be uint8 \(H, W, 3\) in RGB, got float64 of shape"),
        (7, TypeError, "a PIL image, a path, a uint8 array or a uint8 tensor, got int"),
        ("no/such/picture.png", FileNotFoundError, "no/such/picture.png"),
    ],
)
def test_preprocess_refuses_other_sources(source, error, text):
    with pytest.raises(error, match=text):
        wrap(vit()).preprocess(source)


def test_preprocess_takes_arrays_as_cameras_give_them():
    backbone, picture = wrap(vit()), numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), numpy.uint8)
    torch.testing.assert_close(backbone.preprocess(picture), backbone.preprocess(Image.fromarray(picture)))


class Up(nn.Module):
    """The interface of an upsampler."""

    def __init__(self, channels=None):
        super().__init__()
        if channels:
            self.config = type("Config", (), {"channels": channels})()

    def forward(self, features, image, size=None):
        return F.interpolate(features, size or image.shape[-2:])


def test_upsampled_runs_both():
    both = Upsampled(vit(), Up(48))
    image = torch.rand(2, 3, 40, 64)
    assert torch.equal(both(image), F.interpolate(both.backbone(image), (40, 64)))
    assert both(image, size=(20, 10)).shape == (2, 48, 20, 10)
    assert Upsampled(wrap(vit()), Up())(image).shape == (2, 48, 40, 64)


def test_upsampled_refuses_another_number_of_channels():
    with pytest.raises(LoftUpError, match=r"'test_vit.r160_in1k' gives 48 channels, .* expects 384; for any backbone"):
        Upsampled(vit(), Up(384))
    with pytest.raises(
        LoftUpError, match=r"gives 384 channels, .* expects 48; for 384 channels: 'dinov2_vits14', 'dinov.*; for any b"
    ):
        Upsampled(vit(embed_dim=384), Up(48))


def test_upsampled_takes_two_modules_in_their_order():
    up = LoftUp(LoftUpConfig(48, image_frequencies=4))
    for swapped in ((up, vit()), (up, wrap(vit())), (Up(), wrap(vit()))):
        with pytest.raises(TypeError, match=r"look swapped: call Upsampled\(backbone, up\)"):
            Upsampled(*swapped)
    with pytest.raises(TypeError, match=r"got str; for a model by its name: load_backbone\(name\)"):
        Upsampled("dinov2_vits14", up)
    with pytest.raises(
        TypeError, match=r"up must be an upsampler .*got str; for weights by their name: LoftUp.from_pre"
    ):
        Upsampled(vit(), "dinov2_vits14")
    with pytest.raises(TypeError, match="up must be an upsampler .*got int$"):
        Upsampled(vit(), 3)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (vit("vit_small_patch14_dinov2.lvd142m"), "vit_small_patch14_dinov2.lvd142m"),
        (wrap(vit("vit_base_patch16_siglip_224.webli", class_token=False, global_pool="map")),
         "vit_base_patch16_siglip_224.webli"),
        (wrap(vit(), layer=2), "test_vit.r160_in1k"),
        (wrap(vit(), layer=1), None),
        (nn.Linear(2, 2), None),
        ("a string", None),
    ],
)  # fmt: skip
def test_identify(model, name):
    assert identify(model) == name


def test_a_vit_without_configuration_has_no_name():
    model = vit()
    del model.pretrained_cfg
    assert wrap(model).name == ""
    assert identify(model) is None


HEAVY = ("timm", "transformers", "open_clip", "PIL")


def loaded_by(statement):
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_loads_no_model_library():
    assert loaded_by("import loftup.backbones") == []
    assert "timm" in loaded_by("import loftup.backbones, timm")


def test_wrapping_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(vit())(torch.rand(1, 3, 64, 64))
