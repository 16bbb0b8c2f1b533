"""The weights that the package brings: whole, small, and worth having."""

import json

import pytest
import torch
import torch.nn.functional as F
from material import new_compiler

from loftup import LoftUp, LoftUpError, UniversalConfig, load_backbone
from loftup.weights.catalogue import FOLDER, IN_PACKAGE, TINY_BACKBONES


@pytest.fixture(scope="module")
def any_up():
    return LoftUp.from_pretrained("any")


def edge(size=64, cells=8, channels=16, shift=5):
    """An image of two colours, and features that the outline runs through in the middle of a cell."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 3, size, size), 0.2) + 0.02 * torch.rand(1, 3, size, size, generator=generator)
    side = torch.arange(size) >= size // 2 + shift
    image[..., side] += 0.5
    two = torch.randn(2, channels, generator=generator)
    truth = torch.where(side, two[1][:, None], two[0][:, None]).expand(size, -1, -1).permute(1, 0, 2)[None]
    return image, F.adaptive_avg_pool2d(truth, cells), truth


def test_all_of_it_is_at_most_twelve_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12_000_000


def test_nothing_else_is_in_the_package():
    assert {path.name for path in FOLDER.iterdir()} == {"any", "photo", "tiny_backbone", "tiny_v1_backbone"}


@pytest.mark.parametrize("folder", ["any", "tiny_backbone", "tiny_v1_backbone"])
def test_every_model_has_weights_config_and_card(folder):
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (FOLDER / folder / name).stat().st_size > 100
    assert json.loads((FOLDER / folder / "config.json").read_text("utf-8"))
    assert "license: " in (FOLDER / folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(IN_PACKAGE))
def test_weights_are_used_in_float32_unless_asked_otherwise(name):
    assert LoftUp.from_pretrained(name).dtype == torch.float32
    assert LoftUp.from_pretrained(name, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_any_is_small(any_up):
    assert any_up.config.channels is None
    assert sum(p.numel() for p in any_up.parameters()) <= 1_500_000


@torch.inference_mode()
def test_any_follows_an_outline_that_bilinear_blurs(any_up):
    image, features, truth = edge()
    ours = (any_up(features, image) - truth).square().mean()
    bilinear = (F.interpolate(features, (64, 64), mode="bilinear") - truth).square().mean()
    assert ours < 0.5 * bilinear


@torch.inference_mode()
@pytest.mark.parametrize("channels", [1, 2048])
def test_any_takes_few_and_many_channels(any_up, channels):
    image, features, truth = edge(channels=channels)
    dense = any_up(features.half(), image)
    assert dense.dtype == torch.float16
    assert dense.shape == truth.shape
    assert (dense.float() - any_up(features.half().float(), image)).abs().max() < 2e-3 * features.abs().max()
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert (dense >= low - 4e-3).all()
    assert (dense <= high + 4e-3).all()


@pytest.mark.parametrize("channels", [1, 2, 384])
@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (14, 14)])
# Noise has outlines everywhere, at which the last bits of float32 come out as the fourth digit, streamed or not.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_any_streams_to_what_it_gives_as_a_whole(grid, channels, dtype, bound):
    up = LoftUp.from_pretrained("any", dtype=dtype)
    torch.manual_seed(7)
    features, image = torch.randn(1, channels, *grid).to(dtype), torch.rand(1, 3, 8 * grid[0], 8 * grid[1]).to(dtype)
    with torch.no_grad():
        whole = up.upsampler(features, image)
        assert (up(features, image) - whole).abs().max() <= bound


@torch.inference_mode()
def test_any_knows_no_order_of_channels(any_up):
    torch.manual_seed(3)
    features, image = torch.randn(1, 24, 6, 7), torch.rand(1, 3, 60, 77)
    order = torch.randperm(24)
    torch.testing.assert_close(any_up(features[:, order], image), any_up(features, image)[:, order], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", list(TINY_BACKBONES))
def test_the_backbones_in_the_package_go_with_any(name, any_up):
    backbone, up = load_backbone(name), LoftUp.from_pretrained(name, strict=True)
    assert isinstance(up.config, UniversalConfig)
    image = torch.rand(1, 3, 64, 96)
    features = backbone(image)
    dense = up(features, image)
    assert dense.shape == (1, 192, 64, 96)
    assert torch.equal(dense, any_up(features, image))
    assert dense.min() >= features.min() - 1e-4
    assert dense.max() <= features.max() + 1e-4


@new_compiler
@torch.inference_mode()
def test_any_compiles_and_exports_whole(any_up):
    image, features, _ = edge(channels=3)
    whole = any_up(features, image)
    compiled = torch.compile(any_up, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, image), whole, atol=2e-5, rtol=0)
    with torch.no_grad():
        exported = torch.export.export(any_up, (features.clone(), image.clone())).module()
        torch.testing.assert_close(exported(features.clone(), image.clone()), whole.clone(), atol=2e-5, rtol=0)


@new_compiler
def test_any_exports_for_any_batch(any_up):
    image, features, _ = edge(channels=3)
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        pair = features.repeat(2, 1, 1, 1), image.repeat(2, 1, 1, 1)
        shapes = {"features": {0: batch}, "image": {0: batch}}
        exported = torch.export.export(any_up, pair, dynamic_shapes=shapes).module()
        four = features.repeat(4, 1, 1, 1), image.repeat(4, 1, 1, 1)
        torch.testing.assert_close(exported(*four), any_up(*four), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(IN_PACKAGE))
def test_what_is_in_the_package_has_no_revisions(name):
    with pytest.raises(LoftUpError, match=f"'{name}' comes with the package and has no revisions, got revision='v2'"):
        LoftUp.from_pretrained(name, revision="v2")
    with pytest.raises(LoftUpError, match="network without a channel norm|has a channel norm"):
        LoftUp.from_pretrained(name, channel_norm="identity")
