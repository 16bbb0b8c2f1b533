"""The network: published outputs, an independent float64 implementation, properties, dtypes, errors."""

import json
import warnings

import numpy
import plain
import pytest
import torch
from material import LEARNABLE, SINE, inputs, new_compiler, randomised, shared, universal
from PIL import Image
from safetensors.torch import load_file
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from loftup import LoftUp, LoftUpConfig, LoftUpError
from loftup.networks.layers import FourierCode
from loftup.ops.attention import cross_attention


@pytest.fixture(params=["loftup_sine_d24", "loftup_learnable_d24"])
def golden(request):
    folder = shared(f"golden/{request.param}")
    config = LoftUpConfig.from_dict(json.loads((folder / "config.json").read_text()))
    up = LoftUp(config).eval()
    up.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return up, load_file(folder / "cases.safetensors")


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "4", "5", "6"])
def test_agrees_with_the_published_implementation(golden, case):
    up, cases = golden
    expected = cases[f"{case}.output"]
    guidance = cases.get(f"{case}.guidance", cases[f"{case}.image"])
    with torch.inference_mode():
        error = (up(cases[f"{case}.features"], guidance) - expected).abs()
        assert error.max() <= 2e-4
        assert error.mean() <= 1e-5
        resized = (up(cases[f"{case}.features"], cases[f"{case}.image"], size=expected.shape[-2:]) - expected).abs()
    assert resized.max() <= 3e-2
    assert resized.mean() <= 2e-3


def test_a_batch_equals_the_published_implementation_at_batch_one(golden):
    up, cases = golden
    with torch.inference_mode():
        error = (up(cases["batch.features"], cases["batch.image"]) - cases["batch.output"]).abs()
    assert error.max() <= 2e-4
    assert error.mean() <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        SINE,
        LEARNABLE,
        LoftUpConfig(10, heads=3, blocks=1, image_frequencies=6, feature_frequencies=2),
        LoftUpConfig(7, heads=1, blocks=3, position_code="learnable", lr_size=5),
    ],
    ids=["sine", "learnable", "other-sine", "other-learnable"],
)
@pytest.mark.parametrize(("grid", "size"), [((5, 7), (33, 46)), ((1, 1), (9, 1)), ((8, 8), (16, 16))])
def test_agrees_with_a_float64_implementation_of_the_paper(config, grid, size):
    up = randomised(config)
    features, image = inputs(grid=grid, size=size, channels=config.channels)
    expected = plain.loftup(up.state_dict(), features[0], image[0], heads=config.heads)
    with torch.inference_mode():
        assert (up(features, image)[0] - expected).abs().max() < 2e-5
        assert (up.double()(features, image)[0] - expected).abs().max() < 2e-5


def test_parameter_count_of_the_paper():
    assert sum(parameter.numel() for parameter in LoftUp(384).parameters()) == 4_303_894


@pytest.mark.parametrize("config", [SINE, LEARNABLE])
def test_results_do_not_depend_on_batch_mates(config):
    up = randomised(config)
    features, image = inputs(batch=3)
    image[1] *= 255
    with torch.inference_mode():
        together = up(features, image)
        for index in range(3):
            alone = up(features[index : index + 1], image[index : index + 1])
            torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-5)


def test_an_affine_scaling_of_each_guidance_channel_changes_nothing():
    up = randomised(SINE)
    features, image = inputs()
    # Powers of two keep the scaled guidance the same to the last bit, which e^10 would otherwise make visible.
    scaled = image * torch.tensor([0.25, 64.0, 2.0]).view(1, 3, 1, 1)
    with torch.inference_mode():
        assert torch.equal(up(features, image), up(features, scaled))
        usual = (image - 0.45) / 0.225
        assert (up(features, image) - up(features, usual)).abs().mean() < 1e-2


def test_a_constant_guidance_channel_is_finite():
    up = randomised(SINE)
    features, image = inputs()
    image[:, 1] = 0.3
    assert up(features, image).isfinite().all()


@pytest.mark.parametrize(("size", "shape"), [(None, (33, 46)), (12, (12, 12)), ((1, 50), (1, 50)), ([8, 9], (8, 9))])
def test_output_size(size, shape):
    features, image = inputs()
    with torch.inference_mode():
        assert randomised(SINE)(features, image, size=size).shape == (1, 24, *shape)


def test_an_empty_batch_gives_an_empty_result():
    features, image = inputs()
    assert randomised(SINE)(features[:0], image[:0]).shape == (0, 24, 33, 46)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    """Plain PyTorch: the same weights and convolutions in that dtype, with nothing but nn modules behind the code."""
    up = randomised(SINE)
    features, image = inputs(batch=2)
    half = randomised(SINE)
    half.load_state_dict(up.state_dict())
    half = half.to(dtype)
    exact = LoftUp(SINE).eval()
    exact.load_state_dict(half.state_dict())  # the rounding of the weights is not the arithmetic's error
    with torch.inference_mode():
        expected = torch.stack([plain.loftup(exact.state_dict(), f, i) for f, i in zip(features, image, strict=True)])
        ours = half(features.to(dtype), image)
        assert ours.dtype == dtype
        naive = naive_half(half, features.to(dtype), image)
    error, allowed = (ours.double() - expected).abs(), (naive.double() - expected).abs()
    assert error.mean() <= 2 * allowed.mean()
    assert error.max() <= 2 * allowed.max()


def naive_half(up: LoftUp, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    net = up.upsampler
    norm, *convolutions = net.first_conv
    x = torch.nn.Sequential(*convolutions)(norm(net.fourier_feat(image)).to(up.dtype))
    height, width = x.shape[-2:]
    x, tokens = x.flatten(2).mT, net.tokens(up.channelnorm(features).to(up.dtype))
    for attention, feed_forward in net.ca_transformer.layers:
        mha = torch.nn.MultiheadAttention(x.shape[-1], 4, batch_first=True).to(up.dtype)
        mha.load_state_dict(attention.attention.state_dict())
        kv = attention.norm_kv(tokens)
        x = x + mha(attention.norm_q(x), kv, kv)[0]
        x = x + feed_forward(x)
    return net.final_conv(net.ca_transformer.norm(x).mT.reshape(len(x), -1, height, width))


@pytest.mark.parametrize("module", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_features(module, given):
    features, image = inputs()
    out = randomised(SINE).to(module)(features.to(given), image.to(given))
    assert out.dtype == given
    assert out.isfinite().all()


def test_the_fourier_code_is_float32_in_a_half_precision_module_and_under_autocast():
    code = FourierCode(2, 5)
    values = torch.rand(1, 2, 3, 4)
    expected = code(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(code(values), expected)
    half = code.half()
    assert half.frequencies.dtype == torch.float32
    assert half.frequencies[-1] > 22026
    assert half(values).dtype == torch.float32


def test_autocast_stays_close_to_float32():
    up = randomised(SINE)
    features, image = inputs()
    with torch.inference_mode():
        expected = up(features, image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = up(features, image)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).abs().max() < 0.2


def test_memory_layout_of_the_inputs_does_not_matter():
    up = randomised(SINE)
    features, image = inputs(batch=2)
    strided = torch.empty(2, 24, 5, 14)[..., ::2].copy_(features)
    with torch.inference_mode():
        expected = up(features, image)
        last = up(features.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(up(strided, image.mT.contiguous().mT), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [LoftUpConfig(8, heads=2, image_frequencies=3, feature_frequencies=1), LEARNABLE])
def test_gradients_reach_features_and_parameters(config):
    up = randomised(config)
    features, image = inputs(grid=(2, 3), size=(5, 6), channels=config.channels)
    features.requires_grad_()
    image.requires_grad_()
    up(features, image).square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in up.parameters())


def test_gradient_through_the_features_is_the_derivative():
    config = LoftUpConfig(8, heads=2, image_frequencies=3, feature_frequencies=1)
    up = randomised(config).double()
    features, image = inputs(grid=(2, 2), size=(3, 4), channels=8)
    assert torch.autograd.gradcheck(lambda f: up(f, image), features.double().requires_grad_(), atol=1e-5)


@pytest.mark.slow
@new_compiler
def test_compiled_results_agree():
    up = randomised(SINE)
    features, image = inputs()
    with torch.inference_mode():
        expected = up(features, image)
        compiled = torch.compile(up, fullgraph=True)(features, image)
    # The compiler may fuse multiply and add, which moves an angle of 22 026 by its last bit.
    assert (compiled - expected).abs().mean() < 1e-3
    assert (compiled - expected).abs().max() < 3e-2


@pytest.mark.parametrize("width", [8, 11, 101])
def test_attention_matches_its_definition_and_keeps_no_score_matrix(width):
    q, k, v = torch.randn(2, 4, 50, width), torch.randn(2, 4, 9, width), torch.randn(2, 4, 9, width)
    expected = torch.softmax(q.double() @ k.double().mT / width**0.5, -1) @ v.double()
    assert (cross_attention(q, k, v, width**-0.5) - expected).abs().max() < 1e-5
    pixels, tokens = 20_000, 1_000
    q, k = torch.randn(1, 1, pixels, width), torch.randn(1, 1, tokens, width)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        cross_attention(q, k, k, width**-0.5)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < pixels * tokens * 4 / 4


FEATURES, IMAGE = inputs()


@pytest.mark.parametrize(
    ("features", "image", "size", "error", "text"),
    [
        (IMAGE, FEATURES, None, ValueError, "look swapped.*call up\\(features, image\\)"),
        (FEATURES[0], IMAGE, None, ValueError, r"features must have 4 dim.*got shape \(24, 5, 7\).*features\[None\]"),
        (FEATURES, IMAGE[0], None, ValueError, r"image must have 4 dimensions.*image\[None\]"),
        (FEATURES, IMAGE[:, :1], None, ValueError, r"image has 1 channels, expected 3.*image.expand"),
        (torch.rand(1, 384, 5, 7), IMAGE, None, ValueError, "384 channels, .* expect 24.*'dinov2_vits14'"),
        (torch.rand(2, 24, 5, 7), IMAGE, None, ValueError, "batch size 2, the image 1"),
        (FEATURES, IMAGE[0, 0], None, ValueError, r"image must have 4 dimensions.*got shape \(33, 46\)$"),
        (FEATURES, IMAGE[0].permute(1, 2, 0), None, ValueError, r"\(33, 46, 3\).*image.permute\(2, 0, 1\)\[None\]"),
        (FEATURES, IMAGE.permute(0, 2, 3, 1), None, ValueError, r"33 channels, .* last: image.permute\(0, 3, 1, 2\)"),
        (FEATURES, torch.rand(1, 4, 33, 46), None, ValueError, r"4 channels, expected 3 .* alpha: image\[:, :3\]"),
        (FEATURES.permute(0, 2, 3, 1), IMAGE, None, ValueError, r"5 channels, .* 24.*features.permute\(0, 3, 1, 2\)"),
        (FEATURES, IMAGE.numpy(), None, TypeError, r"image must be a tensor, got ndarray; for a picture \(H, W, 3\)"),
        (FEATURES, Image.new("RGB", (46, 33)), None, TypeError, r"Image; .*numpy.array\(image\)\).permute\(2, 0, 1\)"),
        (FEATURES.to_sparse(), IMAGE, None, TypeError, r"dense tensor, got torch.sparse_coo; .*features.to_dense\(\)"),
        (FEATURES.to(torch.float8_e5m2), IMAGE, None, TypeError, r"got torch.float8_e5m2; convert with features.float"),
        (FEATURES, (IMAGE * 255).byte(), None, TypeError, r"got torch.uint8; convert with image.float\(\)"),
        (FEATURES.numpy(), IMAGE, None, TypeError, "features must be a tensor, got ndarray"),
        (FEATURES[:, :, :0], IMAGE, None, ValueError, "must not be empty"),
        (FEATURES / 0, IMAGE, None, ValueError, r"features hold 840 values that are not .*nan_to_num\(features\)"),
        (FEATURES.half() / 0, IMAGE, None, ValueError, "float16 overflows past 65504"),
        (FEATURES, IMAGE * float("nan"), None, ValueError, r"the image holds 4554 .*nan_to_num\(image\)"),
        (FEATURES, 1e39 * IMAGE.double(), None, ValueError, "the image holds .* values that are not finite"),

        (FEATURES, IMAGE, 0, ValueError, "size must be positive, got 0"),
        (FEATURES, IMAGE, (3, 4, 5), ValueError, r"pair \(height, width\) of ints, got \(3, 4, 5\)"),
        (FEATURES, IMAGE, 1.5, ValueError, "got 1.5"),
        (FEATURES, IMAGE, (2**24 + 1, 3), ValueError, r"size must be at most 16777216 a side, got \(16777217, 3\)"),
        (FEATURES, IMAGE, (3, True), ValueError, r"ints, got \(3, True\)"),
        (FEATURES, IMAGE, numpy.float32(3), ValueError, r"of ints, got"),
        (FEATURES.to("meta"), IMAGE, None, ValueError, "features are on meta, the image on cpu"),
    ],
)  # fmt: skip
def test_bad_arguments(features, image, size, error, text):
    with pytest.raises(error, match=text):
        randomised(SINE)(features, image, size=size)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"memory": "1GB"}, "memory must be a whole number of bytes, got '1GB'; 256 MiB are 256"),
        ({"memory": 1e8}, "memory must be a whole number of bytes, got 100000000.0"),
        ({"memory": True}, "memory must be a whole number of bytes, got True"),
        ({"head": 3}, "head must be a function of features, a.* got int"),
        ({"backend": 3}, "backend must be a name or None, got 3"),
        ({"out": "x"}, "out must be a tensor or a NumPy array of the result's shape, got str"),
    ],
)
@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_options_of_another_type(make, option, text):
    with torch.no_grad(), pytest.raises(TypeError, match=text):
        make()(FEATURES, IMAGE, **option)


def test_whole_numbers_of_numpy():
    up = randomised(SINE)
    with torch.no_grad():
        sizes = (numpy.int64(8), (numpy.int32(8), 8), [8, numpy.uint8(8)])
        for made in [up(FEATURES, IMAGE, size=size, memory=numpy.int64(2**25)) for size in sizes]:
            assert made.shape == (1, 24, 8, 8)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_an_image_divided_twice_is_told(make):
    up = make()
    features, image = inputs(batch=2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        for twice in (image / 255 / 255, (image / 255 / 255 - mean) / std):
            twice[0] = image[0]
            with pytest.warns(UserWarning, match="channels range over .*e-05 at most; .* divided by 255 tw") as w:
                up(features, twice)
            assert w[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for good in (image * 255, (image / 255 - mean) / std, torch.full_like(image, 0.3), 0 * image):
                up(features, good)
            grey = torch.full_like(image, 0.7)
            grey[:, :, 3] = grey[0, 0, 0, 0].nextafter(torch.tensor(1.0))  # rounding, and nothing else
            up(features, grey)


@pytest.mark.parametrize("autocast", [False, True])
def test_features_that_overflow_after_the_cast_are_refused(autocast):
    up = randomised(LoftUpConfig(24, channel_norm="identity"))
    up = up if autocast else up.half()
    features, image = inputs()
    features[0, 0, 0, 0] = 7e4
    text = "features up to 7e.04 overflow in torch.float16, in which this LoftUp computes; use a wider"
    context = torch.autocast("cpu", torch.float16, enabled=autocast)
    for contexts in (torch.no_grad(), torch.enable_grad()):
        with contexts, context, pytest.raises(LoftUpError, match=text):
            up(features, image)
    with torch.no_grad(), context, pytest.raises(LoftUpError, match=text):
        up.at(features, image, torch.zeros(1, 1, 2))
    with torch.no_grad():
        assert up.float()(features, image).isfinite().all()
        with pytest.raises(LoftUpError, match="overflow in torch.float32"):
            universal()(1e39 * features.double().abs() + 1e39, image)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize("wanted", ["features", "image", "weights"])
def test_forward_mode_derivatives_are_those_of_the_whole_image(make, wanted):
    up = make().double().requires_grad_(False)
    features, image = inputs(grid=(2, 3), size=(6, 9))
    state = dict(up.named_parameters())
    name = next(iter(state)) if wanted == "weights" else wanted
    arguments = {"features": features.double(), "image": image, **state}
    primal, tangent = arguments[name], torch.randn_like(arguments[name])

    def call(x):
        every = {**arguments, name: x}
        pair = every.pop("features"), every.pop("image")
        return torch.func.functional_call(up, every, pair)

    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels of attention have no forward mode
        with torch.no_grad():
            made = torch.func.jvp(call, (primal,), (tangent,))[1]
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(call(forward_ad.make_dual(primal, tangent))).tangent
        seen = primal.clone().requires_grad_()
        output = call(seen)
        weights = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, seen, weights)
    expected = (gradient * tangent).sum()  # the same number, by reverse mode
    for result in (made, dual):
        torch.testing.assert_close((result * weights).sum(), expected, rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_traced_module_follows_other_pictures(make):
    up = make()
    smooth = torch.nn.functional.interpolate(torch.randn(1, 24, 2, 2), (5, 7), mode="bilinear")
    features, image = inputs()
    with torch.no_grad():
        traced = torch.jit.trace(up, (smooth, torch.rand_like(image)), check_trace=False)
        torch.testing.assert_close(traced(features, image), up(features, image), atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(make, default):
    up = make()
    features, image = inputs(size=(37, 50))
    points = 30 * torch.rand(1, 9, 2)
    with torch.no_grad():
        expected = up(features, image), up.at(features, image, points)
        torch.set_default_dtype(default)
        try:
            made = up(features, image), up.at(features, image, points)
            whole = up.upsampler(up.channelnorm(features), image)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1], expected[1])
    torch.testing.assert_close(whole, expected[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_vmap_is_refused(make):
    features, image = inputs(batch=2)
    with torch.no_grad(), pytest.raises(LoftUpError, match="torch.vmap hides .*; pass the whole batch to up itself"):
        torch.func.vmap(make())(features[:, None], image[:, None])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"channels": 24, "position_code": "cosine"}, r"one of \('sine', 'learnable'\), got 'cosine'"),
        ({"channels": 25}, r"a width of 45, which 4 heads do not divide; heads that do: \[1, 3, 5, 9, 15\]"),
        ({"dim": 24, "lr_pe_typ": "sine"}, r"unknown keys \['lr_pe_typ'\]"),
        ({"lr_size": 16}, "needs 'channels'"),
    ],
)
def test_bad_configs(fields, text):
    with pytest.raises(ValueError, match=text):
        LoftUpConfig.from_dict(fields)


def test_the_backbone_is_named_in_the_error_of_a_wrong_channel_count():
    up = LoftUp(LoftUpConfig(24, backbone="mine"))
    with pytest.raises(ValueError, match="the weights 'mine' expect 24"):
        up(torch.rand(1, 20, 2, 2), torch.rand(1, 3, 8, 8))


def test_repr_names_the_essentials():
    assert "channels=24, width=44, backbone=''" in repr(LoftUp(24))


@pytest.mark.parametrize("config", ["dinov2_vits14", None, {"channels": 24}])
def test_a_module_is_made_of_a_config(config):
    with pytest.raises(TypeError, match=r"LoftUp takes a config or a number of channels, got .*from_pretrained"):
        LoftUp(config)


def test_features_beyond_float16_reach_the_norm_of_a_half_precision_module():
    up = randomised(SINE).half()
    features, image = inputs()
    with torch.no_grad():
        torch.testing.assert_close(up(1e6 * features, image), up(features, image), atol=0.05, rtol=0.05)


# Inference tensors, frozen weights, half-precision images


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_a_probe_learns_outside_on_features_made_in_inference_mode(make):
    up = make()
    features, image = inputs()
    probe = torch.nn.Conv2d(24, 3, 1)
    with torch.inference_mode():
        dense = up(features, image)
        points = up.at(features, image, torch.zeros(1, 2, 2))
        logits = up(features, image, head=probe)
        inside = torch.randn(1, 24, 5, 7)  # features of another library, made inside
    for result in (dense, points, logits):
        assert not result.is_inference()
    probe(dense).sum().backward()
    assert probe.weight.grad is not None
    trainable = make().requires_grad_(True)
    trainable(inside, image).sum().backward()
    up.requires_grad_(False)(inside, image, head=probe).sum().backward()


def test_frozen_weights_stream_without_a_context(tmp_path, monkeypatch):
    randomised(SINE).save_pretrained(tmp_path)
    up = LoftUp.from_pretrained(tmp_path)
    features, image = inputs()
    assert not up(features, image, memory=2**23).requires_grad  # memory= is for the stream alone
    features.requires_grad_(True)
    up(features, image).sum().backward()
    assert features.grad is not None
    assert all(parameter.grad is None for parameter in up.parameters())
    assert LoftUp.from_pretrained(tmp_path, trainable=True)(features, image).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_image_is_not_taken_in_silence(dtype):
    up = randomised(SINE)
    features, image = inputs()
    with torch.no_grad():
        with pytest.warns(
            UserWarning, match=f"the image is {str(dtype)[6:]}, whose rounding shows .* in float32"
        ) as caught:
            up(features, image.to(dtype))
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            half = up.to(dtype)(features.to(dtype), image)  # guidance in float32, the rest in half precision
    assert half.dtype == dtype


def test_the_guidance_keeps_its_precision_whatever_the_rest_has():
    """A bfloat16 network on a float32 image differs by its own rounding, not by the image's."""
    up = randomised(SINE)
    features, image = inputs(size=(40, 50))
    with torch.no_grad():
        exact = up(features, image)
        sharp = up.to(torch.bfloat16)(features, image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rounded = up(features, image.bfloat16())
    assert (sharp - exact).abs().mean() < 0.5 * (rounded - exact).abs().mean()


@pytest.mark.parametrize("which", ["any", "published"])
def test_a_matrix_of_texts_is_a_head(which):
    up = LoftUp.from_pretrained("any") if which == "any" else LoftUp(16).eval().requires_grad_(False)
    features, image, texts = torch.randn(2, 16, 4, 5), torch.rand(2, 3, 24, 30), torch.randn(3, 16)
    expected = torch.einsum("bchw,kc->bkhw", up(features, image), texts)
    assert torch.allclose(up(features, image, head=texts), expected, atol=1e-4)
    assert up(features, image, head=texts.double()).dtype == torch.float32
    texts.requires_grad_()
    up(features, image, head=texts).sum().backward()
    assert texts.grad is not None


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.randn(3, 7), r"head is a tensor of shape \(3, 7\), expected \(K, 16\)"),
        (torch.randn(16), r"head is a tensor of shape \(16,\), expected \(K, 16\)"),
        (torch.nn.Linear(7, 2), "head takes 7 channels, the features have 16"),
        (torch.nn.Conv2d(7, 2, 1), "head takes 7 channels, the features have 16"),
    ],
)
def test_heads_of_another_width_are_refused(head, message):
    up = LoftUp(16).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        up(torch.randn(1, 16, 4, 5), torch.rand(1, 3, 24, 30), head=head)
