"""The universal network: convexity, symmetries, dtypes, gradients, config, arguments."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from material import FARSIGHTED, inputs, universal

from loftup import LoftUp, LoftUpConfig, LoftUpError, UniversalConfig, Upsampled, load_backbone
from loftup.inference.choose import explain
from loftup.networks.cells import strip_cosines, window_cosines
from loftup.networks.config import read_config


def windows(grid: torch.Tensor, height: int, width: int, radius: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of every channel in the window of each pixel's cell: two (C, height, width)."""
    h, w = grid.shape[-2:]
    low, high = grid.new_empty(len(grid), height, width), grid.new_empty(len(grid), height, width)
    for y in range(height):
        for x in range(width):
            i, j = int((y + 0.5) * h / height), int((x + 0.5) * w / width)
            seen = grid[:, max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1].flatten(1)
            low[:, y, x], high[:, y, x] = seen.amin(1), seen.amax(1)
    return low, high


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_every_output_lies_between_the_extremes_of_its_window(radius, fields):
    up = universal(radius=radius, **fields)
    features, image = inputs(grid=(9, 11), size=(25, 30))
    with torch.inference_mode():
        made = up(features, image)[0]
    low, high = windows(features[0], 25, 30, radius)
    assert (made >= low - 1e-5).all()
    assert (made <= high + 1e-5).all()
    assert made.std() > 0.01


def test_constant_features_stay_as_they_are():
    features, image = torch.linspace(-5, 5, 24).view(1, 24, 1, 1).expand(1, 24, 5, 7), inputs()[1]
    with torch.inference_mode():
        made = universal()(features, image)
    torch.testing.assert_close(made, features[..., :1, :1].expand_as(made), atol=1e-5, rtol=1e-5)


def test_the_order_of_channels_does_not_matter():
    up = universal()
    features, image = inputs()
    order = torch.randperm(24)
    with torch.inference_mode():
        torch.testing.assert_close(up(features[:, order], image), up(features, image)[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
def test_an_affine_scaling_of_each_channel_passes_through(fields):
    """The weights do not change, and they have sum 1."""
    up = universal(**fields)
    features, image = inputs()
    scale, shift = torch.rand(24, 1, 1) * 10 + 0.1, torch.randn(24, 1, 1)
    with torch.inference_mode():
        expected = up(features, image) * scale + shift
        torch.testing.assert_close(up(features * scale + shift, image), expected, atol=1e-4, rtol=1e-4)


def test_an_affine_scaling_of_each_guidance_channel_changes_nothing():
    up = universal()
    features, image = inputs()
    with torch.inference_mode():
        scaled = image * torch.tensor([0.25, 64.0, 2.0]).view(1, 3, 1, 1)
        assert torch.equal(up(features, image), up(features, scaled))
        torch.testing.assert_close(up(features, (image - 0.45) / 0.225), up(features, image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 2048])
def test_any_number_of_channels(channels):
    features, image = inputs(channels=channels, grid=(3, 4), size=(12, 17))
    with torch.inference_mode():
        made = universal()(features, image)
    assert made.shape == (1, channels, 12, 17)
    low, high = windows(features[0], 12, 17)
    assert ((made[0] >= low - 1e-5) & (made[0] <= high + 1e-5)).all()


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
@pytest.mark.parametrize("training", [False, True], ids=["streamed", "whole"])
def test_results_do_not_depend_on_batch_mates(training, fields):
    up = universal(**fields).train(training)
    features, image = inputs(batch=3)
    image[1] *= 255
    features[2] *= 10
    with torch.no_grad():
        together = up(features, image)
        for index in range(3):
            alone = up(features[index : index + 1], image[index : index + 1])
            torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["streamed", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_computes_in_float32(dtype, training):
    features, image = inputs()
    half = universal().to(dtype).train(training)
    exact = copy.deepcopy(half).float()
    with torch.no_grad():
        made, expected = half(features.to(dtype), image), exact(features.to(dtype).float(), image)
        assert made.dtype == dtype
        torch.testing.assert_close(made, expected.to(dtype), atol=0, rtol=2 * torch.finfo(dtype).eps)
        assert torch.equal(half(features, image), exact(features, image))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half(features, image), exact(features, image))


@pytest.mark.parametrize("training", [False, True], ids=["streamed", "whole"])
def test_a_double_module_computes_in_float64(training):
    features, image = inputs()
    up = universal().train(training)
    with torch.no_grad():
        single = up(features, image)
        double = up.double()(features.double(), image)
        assert double.dtype == torch.float64
        assert 0 < (double - single).abs().max() < 1e-4
        assert up(features, image).dtype == torch.float32


@pytest.mark.parametrize("training", [False, True], ids=["streamed", "whole"])
def test_memory_layout_of_the_inputs_does_not_matter(training):
    up = universal().train(training)
    features, image = inputs(batch=2)
    strided = torch.empty(2, 24, 5, 14)[..., ::2].copy_(features)
    with torch.no_grad():
        expected = up(features, image)
        last = up(features.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(up(strided, image.mT.contiguous().mT), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
@pytest.mark.parametrize("module", [torch.float32, torch.bfloat16])
def test_gradients_reach_features_image_and_parameters(module, fields):
    up = universal(**fields).to(module)
    features, image = inputs(batch=2)
    features.requires_grad_()
    image.requires_grad_()
    up(features, image).square().sum().backward()
    for tensor in (features, image, *up.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert features.grad.abs().sum() > 0
    assert image.grad.abs().sum() > 0
    used = [name for name, parameter in up.named_parameters() if parameter.grad.abs().sum() > 0]
    assert {"upsampler.agreement", "upsampler.gate.weight", "upsampler.encoder.down.weight"} <= set(used)
    if fields:
        assert {"upsampler.local.0.weight", "upsampler.encoder.quarter_blocks.4.0.weight"} <= set(used)


def test_linear_codes_of_a_larger_image_are_those_of_its_mean():
    up = universal(oversampling=2)
    with torch.no_grad():
        for layer in (up.upsampler.encoder.fine_out, up.upsampler.encoder.coarse_out):
            layer.weight.zero_()
    features, image = torch.randn(1, 24, 5, 7), torch.rand(1, 3, 66, 92)
    image[..., :2, :2], image[..., -2:, -2:] = 0, 1  # the same extremes in both
    with torch.inference_mode():
        torch.testing.assert_close(
            up(features, image, size=(33, 46)), up(features, F.avg_pool2d(image, 2)), atol=1e-5, rtol=1e-5
        )


def test_the_parts_that_see_farther_begin_as_nothing():
    torch.manual_seed(3)
    plain, farsighted = LoftUp(UniversalConfig()).eval(), LoftUp(UniversalConfig(**FARSIGHTED)).eval()
    missing, unexpected = farsighted.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    features, image = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(farsighted(features, image), plain(features, image), atol=1e-6, rtol=1e-6)
    assert plain.upsampler.encoder.halo == 20
    assert farsighted.upsampler.encoder.halo == 68


def test_likeness_is_the_cosine_to_the_cells_around():
    net = universal(radius=2, **FARSIGHTED).upsampler
    directions = F.normalize(torch.randn(2, 4, 5, 6), dim=-1)
    made = net.likeness(window_cosines(F.pad(directions, (0, 0, 2, 2, 2, 2)), 2))
    assert made.shape == (2, 4, 5, 28)
    for (y, x), (down, right) in itertools.product([(0, 0), (2, 3), (3, 4)], [(-2, 1), (0, 0), (1, 1), (2, -2)]):
        there = 0 <= y + down < 4 and 0 <= x + right < 5
        cosine = directions[1, y, x] @ directions[1, y + down, x + right] if there else torch.tensor(0.0)
        torch.testing.assert_close(made[1, y, x, 5 * (down + 2) + right + 2], cosine - 0.4)
    near = made[0, 1:3, 1:3, :25].unflatten(-1, (5, 5))[..., 1:4, 1:4].flatten(-2) + 0.4
    expected = torch.stack([near.mean(-1), near.amin(-1), near.std(-1)], -1)
    torch.testing.assert_close(made[0, 1:3, 1:3, 25:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (2, 31), (3, 32), (5, 70)])
@pytest.mark.parametrize("radius", [1, 3])
def test_cosines_by_strips(grid, radius):
    directions = torch.randn(2, grid[0] + 2 * radius, grid[1] + 2 * radius, 6)
    torch.testing.assert_close(strip_cosines(directions, radius), window_cosines(directions, radius))


@pytest.mark.parametrize(("grid", "silent"), [((5, 7), 3), ((1, 1), 0), ((1, 2), 24)])
def test_gradients_are_finite_where_channels_are_constant(grid, silent):
    up = universal()
    features, image = inputs(grid=grid)
    features[:, :silent] = 0  # as behind a ReLU that has died
    features.requires_grad_()
    up(features, image).square().sum().backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in up.parameters())


def test_constant_channels_count_for_nothing_whatever_their_value():
    """The rounding of their mean is no feature."""
    up = universal()
    features, image = inputs()
    features[:, :8] = 0
    shifted = features.clone()
    shifted[:, :8] = 100.1
    with torch.inference_mode():
        torch.testing.assert_close(up(shifted, image)[:, 8:], up(features, image)[:, 8:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e-4, 1e6, 1e30])
def test_features_of_any_scale_weigh_alike(scale):
    up = universal()
    features, image = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(up(features * scale, image) / scale, up(features, image), atol=1e-5, rtol=1e-5)
    scaled = (features * scale).requires_grad_()
    up(scaled, image).sum().backward()
    assert scaled.grad.isfinite().all()


def test_autocast_changes_nothing():
    up = universal().train()
    features, image = inputs()
    expected = up(features, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(up(features, image), expected)
        assert torch.equal(up.upsampler(features, image), expected)


def test_shapes_can_be_had_without_computing():
    up = universal().to("meta")
    features, image = (tensor.to("meta") for tensor in inputs())
    assert up.upsampler(features, image).shape == (1, 24, 33, 46)


def test_gradient_through_the_features_is_the_derivative():
    up = universal(heads=2).double()
    features, image = inputs(grid=(2, 3), size=(5, 4), channels=3)
    assert torch.autograd.gradcheck(lambda f: up(f, image), features.double().requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["streamed", "whole"])
def test_an_empty_batch_gives_an_empty_result(training):
    features, image = inputs()
    up = universal().train(training)
    with torch.no_grad():
        assert up(features[:0], image[:0], size=(8, 9)).shape == (0, 24, 8, 9)
        assert up(features[:0], image[:0], head=torch.nn.Linear(24, 5)).shape == (0, 5, 33, 46)


def test_an_empty_batch_minds_its_target():
    features, image = (tensor[:0] for tensor in inputs())
    out = torch.empty(0, 24, 33, 46)
    with torch.no_grad():
        assert universal()(features, image, out=out) is out
        with pytest.raises(ValueError, match=r"out has shape \(5, 5\), the result needs \(0, 24, 33, 46\)"):
            universal()(features, image, out=torch.empty(5, 5))


# Config


def test_the_config_survives_its_dictionary():
    config = UniversalConfig(
        heads=3, radius=1, code_width=4, encoder_width=16, quarter_width=8, local=True, oversampling=2, backbone="mine"
    )
    assert read_config(config.to_dict()) == config
    assert read_config({"values": "features"}) == UniversalConfig()
    projected = LoftUpConfig(24).to_dict()
    assert not {"values", "radius", "code_width", "encoder_width"} & set(projected)
    assert read_config(projected) == LoftUpConfig(24)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"channels": 24, "values": "features"}, r"unknown keys \['channels'\]"),
        ({"channels": None}, "channels must be a positive integer, got None"),
        ({"values": "keys"}, r"'values' must be 'projected' or 'features', got 'keys'"),
        ({"values": "features", "radius": 0}, "radius must be a positive integer, got 0"),
        ({"values": "features", "code_width": 1.5}, "code_width must be a positive integer, got 1.5"),
        ({"values": "features", "encoder_width": True}, "encoder_width must be a positive integer, got True"),
        ({"values": "features", "encoder_width": 1}, "encoder_width must be at least 2, got 1"),
        ({"values": "features", "quarter_width": -1}, "quarter_width must be 0 or a positive integer, got -1"),
        ({"values": "features", "local": 1}, "local must be true or false, got 1"),
    ],
)
def test_bad_configs(fields, text):
    with pytest.raises(ValueError, match=text):
        read_config(fields)


def test_the_settings_shape_the_network():
    up = universal(heads=2, radius=1, code_width=6, encoder_width=10)
    assert up.upsampler.gate.weight.shape == (2, 18)
    assert up.upsampler.encoder.down.weight.shape == (10, 5, 3, 3)
    assert up.upsampler.radius == 1
    assert up.dtype == torch.float32
    assert up.device == torch.device("cpu")
    assert "channels=any, heads=2, backbone=''" in repr(up)
    assert all(key.startswith("upsampler.") for key in up.state_dict())


# Arguments

FEATURES, IMAGE = inputs()


@pytest.mark.parametrize(
    ("features", "image", "text"),
    [
        (IMAGE, FEATURES, r"look swapped: got shapes \(1, 3, 33, 46\) and \(1, 24, 5, 7\); call up\(features, image\)"),
        (FEATURES, IMAGE[:, :1], r"image has 1 channels, expected 3.*image.expand"),
        (FEATURES[:, :0], IMAGE, r"features \(1, 0, 5, 7\) and .* must not be empty"),
        (FEATURES / 0, IMAGE, "features hold 840 values that are not finite"),
        (FEATURES[0], IMAGE, r"features\[None\]"),
    ],
)  # fmt: skip
def test_bad_arguments(features, image, text):
    with pytest.raises(ValueError, match=text):
        universal()(features, image)


def test_a_second_image_is_no_mistake():
    image = torch.rand(1, 3, 33, 46)
    with torch.inference_mode():
        assert universal()(image[..., ::8, ::8], image).shape == image.shape


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_two_backends_mean_the_same(backend):
    up = universal()
    with torch.inference_mode():
        assert torch.equal(up(FEATURES, IMAGE, backend=backend), up(FEATURES, IMAGE))


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    up = universal()
    with torch.inference_mode():
        with pytest.raises(LoftUpError, match="cannot run here: Triton kernels need CUDA tensors, these are on cpu"):
            up(FEATURES, IMAGE, backend="triton")
        with pytest.raises(ValueError, match="unknown backend 'cuda'"):
            up(FEATURES, IMAGE, backend="cuda")


def test_explain_says_what_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert str(explain(universal())) == (
        "runs on backend 'torch'\ncpu: can run\ntorch: can run\n"
        "triton: Triton kernels need CUDA tensors, these are on cpu (set TRITON_INTERPRET=1 to test on a CPU)\n"
        "'cpu' and 'torch' are the same plain PyTorch here"
    )


def test_one_upsampler_goes_with_any_backbone():
    backbone = load_backbone("tiny", weights=False)
    both = Upsampled(backbone, universal()).eval()
    with torch.inference_mode():
        assert both(torch.rand(1, 3, 32, 48), size=(20, 30)).shape == (1, 192, 20, 30)


# Files


def test_saved_weights_load_back(tmp_path):
    up = universal(heads=3, radius=1)
    up.save_pretrained(tmp_path)
    loaded = LoftUp.from_pretrained(tmp_path)
    assert loaded.config == up.config
    assert loaded.state_dict().keys() == up.state_dict().keys()
    assert all(torch.equal(value, up.state_dict()[key]) for key, value in loaded.state_dict().items())
    alone = LoftUp.from_pretrained(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert (alone.config, alone.dtype) == (up.config, torch.bfloat16)


def test_a_bare_state_dict_tells_all_but_the_radius(tmp_path):
    up = universal(heads=3, code_width=5, encoder_width=12)
    torch.save(up.state_dict(), tmp_path / "state.bin")
    assert LoftUp.from_pretrained(tmp_path / "state.bin").config == up.config


def test_loading_is_strict(tmp_path):
    state = universal().state_dict()
    lacking = {key: value for key, value in state.items() if key != "upsampler.agreement"}
    torch.save(lacking, tmp_path / "lacking.bin")
    with pytest.raises(LoftUpError, match=r"does not fit this LoftUp network: missing: upsampler.agreement"):
        LoftUp.from_pretrained(tmp_path / "lacking.bin")
    torch.save({**state, "channelnorm.norm.weight": torch.ones(24)}, tmp_path / "more.bin")
    with pytest.raises(LoftUpError, match=r"unexpected: channelnorm.norm.weight"):
        LoftUp.from_pretrained(tmp_path / "more.bin")


def test_the_card_does_not_name_a_number_of_channels(hub):
    universal().push_to_hub("me/any", token="hf_x")
    card = hub.repos["me/any"]["main"]["README.md"].decode()
    assert "# LoftUp for any vision backbone" in card
    assert "(any C) to any resolution" in card
    assert "# (B, C, h, w) and (B, 3, H, W) to (B, C, H, W)" in card
    assert LoftUp.from_pretrained("me/any").config.channels is None


@pytest.mark.parametrize("grid", [(h, w) for h in range(1, 8) for w in (1, 2)])
def test_narrow_grids_with_gradients(grid):
    up = universal().requires_grad_(True)
    features, image = inputs(grid=grid, size=(40, 33))
    dense = up(features, image)
    dense.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(up(features, image), dense.detach(), atol=2e-5, rtol=1e-4)


# Attention, pixel by pixel


def attention_of_one_pixel(net, code, keys, directions, down, across, settings):
    """The weights of one pixel on the cells of its window, written out; all in float64."""
    steps = range(-net.radius, net.radius + 1)
    cells = [(i, j) for i in steps for j in steps]
    fade = torch.stack([
        sum(2 * (1 - ((place - step) / (net.radius + 0.5)) ** 2).clamp(min=1e-6).log() for place, step in pair)
        for pair in ([(down, i), (across, j)] for i, j in cells)
    ])  # fmt: skip

    def scores(head):
        part = slice(head * net.depth, (head + 1) * net.depth)
        distance = torch.stack([(i - down) ** 2 + (j - across) ** 2 for i, j in cells])
        ours = 2 * keys[:, part] @ code[part] + keys[:, len(code) + head]
        return ours - settings.sharpness[0, head] * (distance - down**2 - across**2) + fade

    first = scores(0).softmax(0)
    mean = first @ directions
    agreement = directions @ mean / mean.square().sum().clamp(min=1e-2).sqrt()
    shares = (net.gate.weight @ code + net.gate.bias + settings.shares[0]).softmax(0)
    heads = [(scores(1 + k) + settings.strength[0, k] * agreement).softmax(0) for k in range(net.heads)]
    return sum(share * weights for share, weights in zip(shares, heads, strict=True))


@pytest.mark.parametrize("radius", [1, 2])
def test_attention_is_what_the_text_says(radius):
    torch.manual_seed(0)
    net = universal(radius=radius, heads=2, code_width=3).upsampler.double()
    n, m, p, q, window = 2, 3, 4, 2, (2 * radius + 1) ** 2
    queries = torch.randn(n * m, p * q, 9, dtype=torch.float64)
    keys = torch.randn(n * m, window, 9 + 3, dtype=torch.float64)
    directions = F.normalize(torch.randn(n * m, window, 5, dtype=torch.float64), dim=-1)
    down, across = torch.rand(n, p, dtype=torch.float64) - 0.5, torch.rand(1, m, q, dtype=torch.float64) - 0.5
    settings = net.settings(F.normalize(torch.randn(1, 6, 7, 5, dtype=torch.float64), dim=-1))
    with torch.no_grad():
        weights = net.attend(queries, keys, directions, down, across, settings)
        for row, column, y, x in itertools.product(range(n), range(m), range(p), range(q)):
            cell, pixel = row * m + column, y * q + x
            expected = attention_of_one_pixel(
                net, queries[cell, pixel], keys[cell], directions[cell], down[row, y], across[0, column, x], settings
            )
            torch.testing.assert_close(weights[cell, :, pixel], expected)
