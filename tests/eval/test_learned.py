"""Learned upsamplers: windows, starts, sizes, files, training."""

import json

import pytest
import torch
import torch.nn.functional as F
from small import mean_colours

from loftup import LoftUp, LoftUpConfig, LoftUpError, load_backbone
from loftup.eval.upsamplers import create
from loftup.train.baselines import ARCHITECTURES, LearnedConfig, build
from loftup.train.baselines.jbu import FeatUpJBU, _Level, _NeighbourDot, _NeighbourSum
from loftup.train.objective.student import upsample_window

NAMES = list(ARCHITECTURES)


def network(name, channels=6, spread=0.1):
    """A network whose weights have moved away from the start."""
    up = build(LearnedConfig(name, channels)).eval()
    with torch.no_grad():
        for parameter in up.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return up


@pytest.mark.parametrize(
    ("name", "millions"), [("featup_jbu", 0.2), ("lift", 1.2), ("resize_conv", 5.4), ("liif", 1.9)]
)
def test_parameters_at_384_channels_are_the_papers(name, millions):
    assert round(sum(p.numel() for p in build(LearnedConfig(name, 384)).parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("grid", "size"), [((5, 6), (40, 48)), ((2, 3), (32, 48)), ((3, 4), (50, 33)), ((1, 1), (9, 9)), ((6, 5), (4, 5))]
)
def test_windows_are_cut_out_of_the_whole_map(name, grid, size):
    up = network(name)
    features, image = torch.randn(2, 6, *grid), torch.rand(2, 3, *size)
    with torch.no_grad():
        whole = upsample_window(up, features, image, None)
        assert whole.shape == (2, 6, *size)
        for box in ((0, 0, 3, 4), (1, 2, 4, 5), (size[0] - 2, size[1] - 3, *size)):
            part = upsample_window(up, features, image, box)
            assert torch.allclose(part, whole[..., box[0] : box[2], box[1] : box[3]], atol=1e-5)
    with pytest.raises(ValueError, match="does not lie in an image of"):
        up.window(features, image, (0, 0, size[0] + 1, 1))


@pytest.mark.parametrize("name", ["lift", "resize_conv", "liif"])
def test_they_begin_as_bilinear_interpolation(name):
    up = build(LearnedConfig(name, 4)).eval()
    features, image = torch.randn(1, 4, 5, 6), torch.rand(1, 3, 40, 48)
    made = up(features, image)
    expected = up.channelnorm(features)
    if name != "liif":  # by doublings, whose interpolations follow one another
        for _ in range(4 if name == "resize_conv" else 3):
            expected = F.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False)
    if expected.shape[-2:] != (40, 48):
        expected = F.interpolate(expected, (40, 48), mode="bilinear", align_corners=False)
    assert torch.allclose(made, expected, atol=1e-5)


def test_the_bilateral_stack_keeps_an_edge_of_the_guidance():
    level = _Level().eval()
    with torch.no_grad():  # keys that are the image, sharply compared
        for layer in (level.project[0], level.project[3]):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:3, :3, 0, 0] = 6 * torch.eye(3)
    guidance = torch.full((1, 3, 16, 16), -0.5)
    guidance[..., 8:] = 0.5
    made = level(guidance[:, :1, ::2, ::2] * 2, guidance)
    assert made[0, 0, 8, 8:].min() > 0.9
    blurred = F.interpolate(guidance[:, :1, ::2, ::2] * 2, scale_factor=2, mode="bicubic")
    assert blurred[0, 0, 8, 8] < 0.7


def test_neighbourhoods_are_those_of_unfold():
    x, weights = torch.randn(2, 3, 10, 11), torch.randn(2, 49, 4, 5)
    unfolded = F.unfold(x, 7).view(2, 3, 49, 4, 5)
    assert torch.allclose(_NeighbourSum.apply(x, weights), (unfolded * weights[:, None]).sum(2), atol=1e-5)
    centre = x[..., 3:-3, 3:-3]
    assert torch.allclose(_NeighbourDot.apply(x), (unfolded * centre[:, :, None]).sum(1), atol=1e-5)
    x = torch.randn(1, 2, 7, 8, dtype=torch.double, requires_grad=True)
    weights = torch.randn(1, 49, 1, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(_NeighbourSum.apply, (x, weights))
    assert torch.autograd.gradcheck(_NeighbourDot.apply, (x,))


def test_dropout_of_the_stack_is_for_training():
    up = network("featup_jbu")
    features, image = torch.randn(1, 6, 3, 3), torch.rand(1, 3, 24, 24)
    assert torch.equal(up(features, image), up(features, image))
    assert not torch.equal(up.train()(features, image), up(features, image))


@pytest.mark.parametrize("name", NAMES)
def test_calls_heads_points_and_checkpointing(name):
    up = network(name)
    features, image = torch.randn(2, 6, 4, 5, requires_grad=True), torch.rand(2, 3, 24, 30)
    dense = up(features, image, (20, 10))
    assert dense.shape == (2, 6, 20, 10)
    head = torch.nn.Linear(6, 2)
    assert torch.equal(up(features, image, (20, 10), head=head), head(dense.movedim(1, -1)).movedim(-1, 1))
    points = torch.tensor([[[9, 0], [3, 19]]]).expand(2, -1, -1)
    assert torch.equal(up.at(features, image, points, (20, 10))[1, 1], dense[1, :, 19, 3])
    halfway = up.at(features, image, torch.tensor([[[2.5, 1.25]]]).expand(2, -1, -1), (20, 10))
    above, below = dense[:, :, 1, 2:4].mean(-1), dense[:, :, 2, 2:4].mean(-1)
    assert torch.allclose(halfway[:, 0], 0.75 * above + 0.25 * below, atol=1e-5)
    with pytest.raises(ValueError, match=r"1 points lie outside the grid, the first at \(x, y\) = \(10, 0\)"):
        up.at(features[:1], image[:1], torch.tensor([[[10, 0]]]), (20, 10))
    (wanted,) = torch.autograd.grad(dense.square().sum(), features)
    up.activation_checkpointing = True
    (got,) = torch.autograd.grad(up(features, image, (20, 10)).square().sum(), features)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(up(features, 255 * image, (20, 10)), dense, atol=1e-4)
    with pytest.raises(ValueError, match=f"features have 5 channels, this {name} was made for 6"):
        up(features[:, :5], image)
    with pytest.raises(ValueError, match="the image has 1 channels, expected 3"):
        up(features, image[:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near(name):
    up = network(name)
    features, image = torch.randn(1, 6, 3, 4), torch.rand(1, 3, 24, 32)
    wanted = up(features, image)
    made = up.bfloat16()(features.bfloat16(), image)
    assert made.dtype == torch.bfloat16
    assert (made - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_files_come_back_and_damage_is_named(name, tmp_path):
    up = network(name)
    up.save_pretrained(tmp_path)
    again = create(f"{name}:{tmp_path}", mean_colours(channels=6))
    assert not any(p.requires_grad for p in again.parameters())
    features, image = torch.randn(1, 6, 4, 5), torch.rand(1, 3, 24, 30)
    assert torch.equal(again(features, image, (24, 30)), up(features, image))
    with pytest.raises(LoftUpError, match="trained for 6 channels, colours has 3"):
        create(f"{name}:{tmp_path}", mean_colours())
    other = "lift" if name != "lift" else "liif"
    with pytest.raises(LoftUpError, match=f"holds a '{name}', expected '{other}'; write {name}:"):
        create(f"{other}:{tmp_path}", mean_colours())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(LoftUpError, match=f"model.safetensors does not fit a {name}"):
        create(f"{name}:{tmp_path}", mean_colours(channels=6))
    (tmp_path / "config.json").write_text(json.dumps({"channels": 6}))
    with pytest.raises(LoftUpError, match=f"does not describe a {name}: expected the keys"):
        create(f"{name}:{tmp_path}", mean_colours(channels=6))
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoftUpError, match="holds no config.json"):
        create(f"{name}:{tmp_path}", mean_colours(channels=6))
    with pytest.raises(
        LoftUpError, match=f"needs its weights: write {name}:FOLDER, the output of `loftup train quick_cpu model"
    ):
        create(name, mean_colours())


def test_files_of_others_stay_and_the_same_weights_give_the_same_bytes(tmp_path):
    up = network("lift")
    contents = set()
    for number in range(8):
        for _ in range(2):  # its own are replaced
            up.save_pretrained(tmp_path / str(number))
        contents.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(contents) == 1
    for name in ("config.json", "model.safetensors"):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text('{"mine": 1}')
        with pytest.raises(LoftUpError, match=f"{name} exists and was not made by loftup"):
            up.save_pretrained(mine.parent)
        assert [path.read_text() for path in mine.parent.iterdir()] == ['{"mine": 1}']
        mine.unlink()


def test_configs_are_checked():
    with pytest.raises(LoftUpError, match="no architecture 'nerf'; expected loftup, featup_jbu"):
        build(LearnedConfig("nerf", 4))
    for channels in (0, True, 2.0):
        with pytest.raises(ValueError, match="channels must be a positive integer"):
            LearnedConfig("lift", channels)
    assert FeatUpJBU(4).config == LearnedConfig("featup_jbu", 4)


def test_loftup_itself_is_one_of_them(tmp_path):
    LoftUp(LoftUpConfig(6, heads=2)).eval().save_pretrained(tmp_path)
    up = create(f"loftup:{tmp_path}", mean_colours(channels=6))
    assert up(torch.randn(1, 6, 3, 3), torch.rand(1, 3, 12, 12), (12, 12)).shape == (1, 6, 12, 12)
    with pytest.raises(ValueError, match="channels"):
        create(f"loftup:{tmp_path}", mean_colours())


@pytest.mark.parametrize("name", ["tiny", "tiny_v1"])
@pytest.mark.parametrize("spec", ["loftup", "views:4:loftup"])
def test_any_is_not_judged_under_loftups_name(name, spec):
    backbone = load_backbone(name, weights=False)
    with pytest.raises(LoftUpError, match=f"there is no LoftUp of its own for {name}; write loftup:any for the"):
        create(spec, backbone)
    assert create(f"{spec}:any", backbone) is not None
