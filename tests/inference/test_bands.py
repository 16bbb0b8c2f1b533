"""Bands, strips, heads, points and prepared weights: equal to the untiled computation."""

import copy
import gc
import pickle

import numpy
import pytest
import torch
from material import LEARNABLE, SINE, inputs, randomised, universal
from torch import nn

from loftup import LoftUp, LoftUpConfig, LoftUpError
from loftup.inference.bands import Cut, cut
from loftup.inference.canvas import HUGE
from loftup.inference.choose import can_run, explain
from loftup.inference.engine import FoldedEngine
from loftup.inference.engine_cpu import CpuEngine
from loftup.inference.fold import _CACHE, fold
from loftup.inputs import resize_guidance

WIDE = LoftUpConfig(384)
BACKENDS = ("torch", "cpu")  # tests/ops/test_engine.py has "triton"


def untiled(up: LoftUp, features, image, size=None):
    """The training path, without gradients."""
    with torch.no_grad():
        guidance = image if size is None else resize_guidance(image, size)
        normal = up.channelnorm(features.to(up.dtype)).to(up.dtype)
        return up.upsampler(normal, guidance).to(features.dtype)


def force(monkeypatch, columns: int, rows: int) -> None:
    monkeypatch.setattr("loftup.inference.bands.cut", lambda *arguments: Cut(columns, rows))


@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(33, 46), (1, 1), (1, 50), (50, 1), (3, 5), (8, 4), (64, 64)])
def test_the_streamed_result_equals_the_untiled_one(config, backend, size):
    up = randomised(config)
    features, image = inputs(batch=2, size=size)
    with torch.inference_mode():
        streamed = up(features, image, backend=backend)
    assert (streamed - untiled(up, features, image)).abs().max() <= 1e-5


@pytest.mark.parametrize("columns", [26, 25, 9, 1])
@pytest.mark.parametrize(("backend", "heights"), [("torch", range(1, 20)), ("cpu", [4, 8, 12, 16, 19])])
def test_every_band_height_and_strip_width_gives_the_same(backend, heights, columns, monkeypatch):
    """The Winograd stem reads multiples of 4 rows, or all of them."""
    up = randomised(SINE)
    features, image = inputs(size=(19, 26))
    expected = untiled(up, features, image)
    for rows in heights:
        force(monkeypatch, columns, rows)
        with torch.inference_mode():
            assert (up(features, image, backend=backend) - expected).abs().max() <= 1e-5, rows


@pytest.mark.parametrize("matrix_unit", [False, True])
def test_bfloat16_with_and_without_a_matrix_unit(matrix_unit, monkeypatch):
    monkeypatch.setattr("loftup.inference.engine_cpu.has_matrix_unit", lambda: matrix_unit)
    monkeypatch.setattr("loftup.inference.choose.has_matrix_unit", lambda: matrix_unit)
    up, (features, image) = randomised(SINE), inputs(size=(19, 26))
    expected = untiled(up, features, image)
    up.to(torch.bfloat16)
    allowed = (untiled(up, features, image) - expected).abs().mean()
    assert ("matrix unit" if matrix_unit else "Winograd") in str(explain(up))
    for columns, rows in ((26, 19), (26, 8), (9, 4)):
        force(monkeypatch, columns, rows)
        with torch.inference_mode():
            assert (up(features, image, backend="cpu") - expected).abs().mean() <= 1.5 * allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_real_width(backend):
    up = randomised(WIDE)
    features, image = inputs(grid=(6, 9), size=(41, 70), channels=384)
    with torch.inference_mode():
        assert (up(features, image, backend=backend) - untiled(up, features, image)).abs().max() <= 2e-5


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_threads_change_nothing(make, threads):
    """The rest of the suite may run on one, where several processes share the cores."""
    up, (features, image) = make(), inputs(size=(90, 130))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            streamed = up(features, image)
    finally:
        torch.set_num_threads(before)
    assert (streamed - untiled(up, features, image)).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_result_is_an_ordinary_tensor(dtype):
    """It lies in huge pages, which nothing else may show."""
    up, (features, image) = universal(), inputs(size=(500, 720))
    with torch.inference_mode():
        result = up(features.to(dtype), image)
    assert result.nbytes > HUGE
    assert result._base is None
    assert not result.is_inference()
    assert torch.equal(copy.deepcopy(result), result)
    result.requires_grad_().sum().backward()
    result.detach_()


def test_another_size_and_a_batch():
    up = randomised(SINE)
    features, image = inputs(batch=3)
    with torch.inference_mode():
        streamed = up(features, image, size=(50, 31))
    assert (streamed - untiled(up, features, image, (50, 31))).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_in_other_dtypes_is_at_most_twice_the_untiled_one(backend, dtype):
    if can_run(backend, torch.device("cpu"), dtype):
        text = r"backend='cpu' cannot run here: it computes in float32 and bfloat16, not float"
        with torch.inference_mode(), pytest.raises(LoftUpError, match=text):
            randomised(SINE).to(dtype)(*inputs(), backend=backend)
        return
    up = randomised(SINE)
    features, image = inputs(batch=2)
    half = copy.deepcopy(up).to(dtype)
    exact = untiled(copy.deepcopy(half).double(), features.to(dtype).double(), image)
    with torch.inference_mode():
        error = (half(features.to(dtype), image, backend=backend).double() - exact).abs()
    allowed = (untiled(half, features.to(dtype), image).double() - exact).abs()
    assert error.mean() <= 2 * allowed.mean() + 1e-12
    assert error.max() <= 2 * allowed.max() + 1e-12


def test_autocast_runs_the_engine_of_its_dtype():
    up = randomised(SINE)
    features, image = inputs()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cast = up(features, image)
    with torch.inference_mode():
        assert not torch.equal(cast, up(features, image))
    assert ("cpu", torch.bfloat16) in _CACHE[up.upsampler].engines
    wide = copy.deepcopy(up).double()
    with torch.inference_mode():
        exact = wide(features.double(), image)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(wide(features.double(), image), exact)
    assert cast.dtype == torch.float32


# Heads


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(24, 5, 1),
        nn.Linear(24, 5),
        nn.Sequential(nn.Conv2d(24, 9, 1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 5, 1)).eval(),
        lambda features: features[:, :2] * features[:, 2:4],
        lambda features: features.argmax(1),
        lambda features: torch.einsum("bchw,kc->bkhw", features, torch.ones(3, 24)),
    ],
    ids=["conv", "linear", "network", "product", "argmax", "similarity"],
)
def test_a_head_on_the_way_equals_the_head_on_the_map(head, monkeypatch):
    up = randomised(SINE)
    features, image = inputs(batch=2)
    with torch.inference_mode():
        dense = up(features, image)
        expected = head(dense.movedim(1, -1)).movedim(-1, 1) if isinstance(head, nn.Linear) else head(dense)
        force(monkeypatch, 20, 8)
        made = up(features, image, head=head)
    assert made.dtype == expected.dtype
    assert made.shape == expected.shape
    if made.is_floating_point():
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (made != expected).float().mean() < 0.01


def test_a_head_learns_through_the_stream(monkeypatch):
    up = randomised(SINE).requires_grad_(False)
    features, image = inputs()
    head, other = nn.Conv2d(24, 3, 1), nn.Conv2d(24, 3, 1)
    other.load_state_dict(head.state_dict())
    force(monkeypatch, 20, 8)
    up(features, image, head=head).square().sum().backward()
    other(untiled(up, features, image)).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-2)


def test_a_head_with_gradients_through_the_network():
    up = randomised(SINE)
    features, image = inputs()
    made = up(features, image, head=nn.Linear(24, 3))
    assert made.shape == (1, 3, 33, 46)
    made.sum().backward()
    assert up.channelnorm.norm.weight.grad is not None


@pytest.mark.parametrize("head", [nn.Conv2d(24, 5, 3), lambda f: f.mean((2, 3)), lambda f: 3, lambda f: f[0, :, None]])
def test_a_head_must_be_pointwise(head):
    up = randomised(SINE)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"head must be pointwise: given \(1, 24, 33, 46\)"):
        up(*inputs(), head=head)


def labels(features):
    """The nearest of some vectors, after smoothing."""
    vectors = features[0].flatten(1)[:, ::97]
    return (
        torch.cdist(nn.functional.avg_pool2d(features, 5, 1, 2)[0].flatten(1).mT, vectors.mT)
        .argmin(1)
        .view(1, *features.shape[2:])
    )


MIXING = {
    "conv3x3": lambda: nn.Conv2d(24, 5, 3, padding=1),
    "conv3x3-relu": lambda: nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 5, 1)),
    "residual": lambda: lambda f: f + 0.1 * nn.functional.avg_pool2d(f, 3, 1, 1),
    "conv3x1": lambda: nn.Conv2d(24, 5, (3, 1), padding=(1, 0)),
    "conv1x3": lambda: nn.Conv2d(24, 5, (1, 3), padding=(0, 1)),
    "labels": lambda: labels,
    "mean": lambda: lambda f: f - f.mean((2, 3), keepdim=True),
    "max pooling": lambda: nn.MaxPool2d(3, 1, 1),
    "group norm": lambda: nn.GroupNorm(4, 24),
    "instance norm": lambda: nn.InstanceNorm2d(24),
    "spatial softmax": lambda: lambda f: f.flatten(2).softmax(-1).view(f.shape),
    "flip": lambda: lambda f: f.flip(-1),
    "coordinates": lambda: lambda f: f + torch.arange(f.shape[-1]),
    "reflection": lambda: nn.Conv2d(24, 5, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("gradients", [False, True])
def test_heads_that_mix_positions_are_refused(make, kind, gradients):
    up, head = make(), MIXING[kind]()
    features, image = inputs()
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(LoftUpError, match=r"head must be pointwise, but .*head\(up\("),
    ):
        up(features, image, head=head)


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_heads_that_mix_positions_do_not_hide_behind_dropout(dropout):
    head = nn.Sequential(dropout(), nn.Conv2d(24, 5, 3, padding=1)).train()
    with torch.no_grad(), pytest.raises(LoftUpError, match="head must be pointwise, but gives pixels other values"):
        randomised(SINE)(*inputs(), head=head)
    assert head[0].training


def test_batch_norms_in_training_mode_are_refused_before_they_count():
    up, head = randomised(SINE), nn.Sequential(nn.Conv2d(24, 5, 1), nn.BatchNorm2d(5), nn.Dropout())
    for gradients in (False, True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(LoftUpError, match="its batch norm '1' is in training mode, .*; call head.eval"),
        ):
            up(*inputs(), head=head)
    assert head[1].num_batches_tracked == 0


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("size", [(33, 46), (1, 50), (2, 1), (1, 1)])
def test_pointwise_heads_are_taken_in_every_dtype(make, dtype, size):
    up = make()
    features, image = inputs(size=size)
    context = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    dtype = torch.float32 if dtype == "autocast" else dtype
    network = nn.Sequential(nn.Conv2d(24, 90, 1), nn.GELU(), nn.Conv2d(90, 90, 1), nn.GELU(), nn.Conv2d(90, 5, 1))
    network = network.to(dtype)
    heads = [
        network,
        lambda f: network(f).argmax(1),
        lambda f: network(f).softmax(1),
        lambda f: network(f)[:, 0] > 0,
        lambda f: nn.functional.normalize(f),
        lambda f: nn.functional.normalize(f)[:, :3].log(),  # not finite where negative
        lambda f: f[:, :0],
        lambda f: torch.zeros_like(f),
        lambda f: network(f[0].flatten(1).mT.view(*f.shape[2:], -1).permute(2, 0, 1)[None]),  # of one image alone
        nn.Sequential(nn.Dropout(), nn.Conv2d(24, 5, 1)).to(dtype).train(),
        nn.Sequential(nn.Conv2d(24, 1, 1), nn.Dropout2d()).to(dtype).train(),
        lambda f: nn.functional.dropout(f, 0.5),
    ]
    with torch.no_grad(), context:
        for head in heads:
            assert up(features.to(dtype), image, head=head).shape[-2:] == size


@pytest.mark.parametrize("head", [None, nn.Conv2d(24, 5, 1)])
def test_an_empty_batch(head):
    features, image = inputs()
    with torch.inference_mode():
        assert randomised(SINE)(features[:0], image[:0], head=head).shape == (0, 5 if head else 24, 33, 46)


# out=


def test_results_are_written_into_a_given_tensor(tmp_path):
    up = randomised(SINE)
    features, image = inputs(batch=2)
    with torch.inference_mode():
        expected = up(features, image)
        mapped = torch.from_file(str(tmp_path / "map"), shared=True, size=expected.numel(), dtype=torch.float16)
        mapped = mapped.view(expected.shape)
        assert up(features, image, out=mapped) is mapped
        torch.testing.assert_close(mapped, expected.half())
        last = torch.full((2, 33, 46, 24), torch.nan).movedim(-1, 1)
        torch.testing.assert_close(up(features, image, out=last), expected)
        logits = torch.full((2, 5, 33, 46), torch.nan)
        head = nn.Conv2d(24, 5, 1)
        torch.testing.assert_close(up(features, image, head=head, out=logits), head(expected), atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"out has shape \(2, 5, 33, 46\), the result needs \(2, 24, 33, 46\)"):
            up(features, image, out=logits)


def test_results_are_written_into_numpy_arrays(tmp_path):
    up = randomised(SINE)
    features, image = inputs(batch=2)
    with torch.no_grad():
        expected = up(features, image)
        for out in (
            numpy.empty((2, 24, 33, 46), numpy.float32),
            numpy.empty((2, 33, 46, 24)).transpose(0, 3, 1, 2),
            numpy.memmap(tmp_path / "map", numpy.float16, "w+", shape=(2, 24, 33, 46)),
        ):
            assert up(features, image, out=out) is out
            assert numpy.allclose(out, expected.numpy(), atol=1e-2)
        labels = numpy.empty((2, 33, 46), numpy.uint8)
        assert up(features, image, out=labels, head=lambda f: f.argmax(1)) is labels
        assert (labels == expected.argmax(1).numpy()).mean() > 0.99


SHAPE = (1, 24, 33, 46)
READ_ONLY = numpy.zeros(SHAPE, numpy.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (
            torch.empty(SHAPE, dtype=torch.int32),
            ValueError,
            "out is torch.int32, which does not hold the result",
        ),
        (torch.empty(SHAPE, dtype=torch.bool), ValueError, "out is torch.bool, which does not hold"),
        (numpy.empty(SHAPE, numpy.int64), ValueError, "out is torch.int64, which does not hold"),
        (torch.empty(1, 1, 33, 46).expand(SHAPE), ValueError, r"out has several elements in one place .*out.clone\(\)"),
        (torch.empty(40_000).as_strided(SHAPE, (0, 1518, 46, 2)), ValueError, "several elements in one place"),
        (torch.empty(SHAPE, device="meta"), ValueError, "out is on meta; give a dense tensor with memory"),
        (
            torch.empty(SHAPE).to(torch.float8_e5m2),
            ValueError,
            "out is .*float8_e5m2; give a dense .* of 16 bits",
        ),
        (torch.empty(SHAPE).to_sparse(), ValueError, "out is torch.sparse_coo"),
        (torch.empty(SHAPE, requires_grad=True), ValueError, r"out requires a gradient .*out.detach\(\)"),
        (READ_ONLY, ValueError, r"out is a read-only array; give one that can be written .*mode='r\+'"),
        (numpy.zeros(SHAPE, ">f4"), TypeError, "out cannot be used: .*byte order.*; give a plain one"),
        (numpy.zeros(SHAPE, numpy.float32)[..., ::-1], TypeError, "out cannot be used: .*stride.*; give a plain one"),
        (numpy.zeros(SHAPE, object), TypeError, "out cannot be used: "),
        ([[1.0]], TypeError, "out must be a tensor or a NumPy array of the result's shape, got list"),
    ],
)
def test_what_cannot_be_written_to(make, out, error, text):
    features, image = inputs()
    with torch.no_grad(), pytest.raises(error, match=text):
        make()(features, image, out=out)


def test_out_that_is_an_argument():
    up = randomised(LoftUpConfig(3, heads=1))
    features, image = inputs(channels=3)
    with torch.no_grad():
        for arguments, out, name in (
            ((features, image), image, "image"),
            ((features, features + 0), features, "features"),
        ):
            with pytest.raises(ValueError, match=rf"out shares its memory with {name}, .*; give out.clone\(\)"):
                up(*arguments, out=out)
        both = torch.rand(2, 3, 33, 46)
        up(features, both[:1], out=both[1:])


def test_values_that_out_does_not_hold():
    up = universal()
    features, image = inputs()
    features[0, 3] += 7e4
    half, labels = torch.empty(SHAPE, dtype=torch.float16), torch.empty(1, 33, 46, dtype=torch.uint8)
    with torch.no_grad():
        with pytest.raises(ValueError, match="[0-9]+ values .* or more do not fit into out's torch.float16; give"):
            up(features, image, out=half)
        with pytest.raises(ValueError, match="do not fit into out's torch.float16"):
            up(features, image, out=half, head=lambda f: 1.0 * f)
        up(features, image, out=half, head=lambda f: (f - f).log())  # -inf is the head's own
        up(features, image, out=labels, head=lambda f: f.argmax(1))
        with pytest.raises(ValueError, match="do not fit into out's torch.uint8; give an out of torch.int64"):
            up(features, image, out=labels, head=lambda f: 300 + f.argmax(1))


# Points


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
def test_points_at_pixel_centres_equal_the_map(backend, config):
    up = randomised(config)
    features, image = inputs(batch=2, size=(9, 11))
    ys, xs = torch.meshgrid(torch.arange(9), torch.arange(11), indexing="ij")
    points = torch.stack([xs, ys], -1).reshape(1, -1, 2).expand(2, -1, -1)
    with torch.inference_mode():
        dense = up(features, image, backend=backend)
        at = up.at(features, image, points, backend=backend)
    torch.testing.assert_close(at.mT.reshape(2, 24, 9, 11), dense, atol=1e-5, rtol=1e-5)


def test_points_between_pixels_interpolate_the_map():
    up = randomised(SINE)
    features, image = inputs(batch=2)
    size = (40, 31)
    points = torch.rand(2, 700, 2) * torch.tensor([size[1] - 1.0, size[0] - 1.0])
    with torch.inference_mode():
        dense = up(features, image, size=size)
        grid = points / torch.tensor([size[1] - 1.0, size[0] - 1.0]) * 2 - 1
        expected = nn.functional.grid_sample(dense, grid[:, None], align_corners=True)[:, :, 0].mT
        at = up.at(features, image, points, size=size)
    torch.testing.assert_close(at, expected, atol=1e-4, rtol=1e-4)


def test_points_are_continuous():
    up = randomised(SINE)
    features, image = inputs()
    line = torch.stack([torch.linspace(3, 6, 301), torch.full((301,), 7.5)], -1)[None]
    with torch.inference_mode():
        steps = up.at(features, image, line).diff(dim=1).abs().max()
        jump = up(features, image).diff(dim=-1).abs().max()
    assert steps <= 0.011 * jump


@pytest.mark.parametrize("points", [torch.zeros(1, 0, 2), torch.zeros(1, 3, 2, dtype=torch.long)])
def test_no_points_and_integer_points(points):
    up = randomised(SINE)
    with torch.inference_mode():
        assert up.at(*inputs(), points).shape == (1, points.shape[1], 24)


@pytest.mark.parametrize(
    ("points", "error", "text"),
    [
        (torch.zeros(4, 2), ValueError, r"points must be \(B, N, 2\) with B = 1, got \(4, 2\)"),
        (torch.zeros(2, 4, 2), ValueError, "with B = 1"),
        ([[1, 2]], TypeError, "points must be a tensor"),
        (torch.tensor([[[45.5, 3.0]]]), ValueError, r"1 points lie outside .* \(45.5, 3.0\); x must be in \[0, 45\]"),
        (torch.tensor([[[float("nan"), 3.0]]]), ValueError, "1 points lie outside"),
        (torch.zeros(1, 1, 2, device="meta"), ValueError, "points are on meta, the features on cpu"),
        (torch.ones(1, 1, 2, dtype=torch.bool), TypeError, r"points must be real numbers, got torch.bool; .*nonzero"),
        (torch.zeros(1, 1, 2, dtype=torch.complex64), TypeError, "points must be real numbers, got torch.complex64"),
    ],
)
def test_bad_points(points, error, text):
    with torch.inference_mode(), pytest.raises(error, match=text):
        randomised(SINE).at(*inputs(), points)


def test_points_give_no_gradient():
    up = randomised(SINE).requires_grad_(False)
    with pytest.raises(ValueError, match=r"points require a gradient, .*points.detach\(\)"):
        up.at(*inputs(), torch.zeros(1, 1, 2, requires_grad=True))


# Which path


def test_what_is_for_inference_is_refused_where_gradients_are_wanted():
    up = randomised(SINE)
    features, image = inputs()
    for option in ({"out": torch.empty(1, 24, 33, 46)}, {"memory": 10**9}, {"backend": "cpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}= is for inference"):
            up(features, image, **option)
    with pytest.raises(ValueError, match="up.at is for inference"):
        up.at(features, image, torch.zeros(1, 1, 2))
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=r"memory= is for inference, but the module is in training mode: call up.eval\(\)"
        ),
    ):
        up.train()(features, image, memory=10**9)


def test_activation_checkpointing_gives_the_same_gradients():
    features, image = inputs()
    plain, saving = randomised(SINE), randomised(SINE)
    saving.load_state_dict(plain.state_dict())
    saving.activation_checkpointing = True
    for up in (plain, saving):
        up(features, image).square().sum().backward()
    for first, second in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)


def test_activation_checkpointing_updates_batch_statistics_once():
    features, image = inputs()
    plain, saving = randomised(SINE).train(), randomised(SINE).train()
    saving.load_state_dict(plain.state_dict())
    saving.activation_checkpointing = True
    for up in (plain, saving):
        up(features, image).square().sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        first, second = (getattr(up.upsampler.first_conv[2], name) for up in (plain, saving))
        torch.testing.assert_close(first, second)


def test_training_mode_uses_batch_statistics():
    up = randomised(SINE).train()
    before = up.upsampler.first_conv[2].running_mean.clone()
    with torch.no_grad():
        up(*inputs())
    assert not torch.equal(before, up.upsampler.first_conv[2].running_mean)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    features, image = inputs()
    expected = randomised(SINE)
    torch.set_default_dtype(default)
    try:
        up = LoftUp(SINE).to(torch.float32).eval()
        up.load_state_dict(expected.state_dict())
        with torch.inference_mode():
            made = up(features, image)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(made, expected(features, image))


def test_notes_on_slow_bfloat16(monkeypatch):
    monkeypatch.setattr("loftup.inference.choose.has_bfloat16", lambda: False)
    assert "no bfloat16 arithmetic: float32 will be faster" in str(explain(randomised(SINE).bfloat16()))


# Prepared weights


def test_prepared_weights_are_kept_until_something_changes():
    up = randomised(SINE)
    features, image = inputs()

    def check():
        with torch.inference_mode():
            assert (up(features, image) - untiled(up, features, image)).abs().max() <= 1e-5
        return _CACHE[up.upsampler].engines

    first = check()
    assert check() is first
    optimizer = torch.optim.SGD(up.parameters(), lr=0.1)
    up(features, image).square().mean().backward()
    optimizer.step()
    second = check()
    assert second is not first
    up.load_state_dict(randomised(SINE).state_dict())
    assert check() is not second
    third = check()
    up.upsampler.first_conv[2].running_mean.add_(0.3)
    assert check() is not third
    fourth = check()
    up.half().float()
    assert check() is not fourth
    fifth = check()
    up.upsampler.first_conv[1].weight.data.mul_(0.5)
    assert check() is not fifth


def test_preparation_leaves_module_state_copies_and_pickles_alone():
    up = randomised(SINE)
    before = {key: value.clone() for key, value in up.state_dict().items()}
    features, image = inputs()
    with torch.inference_mode():
        expected = up(features, image)
    assert all(torch.equal(before[key], value) for key, value in up.state_dict().items())
    assert before.keys() == up.state_dict().keys()
    for twin in (copy.deepcopy(up), pickle.loads(pickle.dumps(up))):
        assert twin.upsampler not in _CACHE
        with torch.inference_mode():
            assert torch.equal(twin(features, image), expected)
    count = len(_CACHE)
    del up, twin
    gc.collect()
    assert len(_CACHE) < count


def test_weights_made_in_inference_mode_are_prepared_once(monkeypatch):
    folded = []
    monkeypatch.setattr("loftup.inference.fold.fold", lambda network: folded.append(network) or fold(network))
    with torch.inference_mode():
        up = LoftUp(SINE).eval()
        features, image = inputs()
        first = up(features, image)
        assert torch.equal(up(features, image), first)
        assert len(folded) == 1
        up.upsampler.final_conv[1].bias.add_(1)
        torch.testing.assert_close(up(features, image), first + 1)
    assert len(folded) == 2


def test_prepared_in_inference_mode_used_outside_it():
    up = randomised(SINE).requires_grad_(False)
    features, image = inputs()
    with torch.inference_mode():
        expected = up(features, image)
    assert torch.equal(up(features, image), expected)


# The budget


@pytest.mark.parametrize("kind", [FoldedEngine, CpuEngine])
@pytest.mark.parametrize("size", [(1, 1), (224, 224), (1024, 1024), (3, 20_000), (20_000, 3), (4000, 6000)])
def test_plans_cover_the_image_within_the_budget(kind, size):
    engine = kind(fold(randomised(WIDE).upsampler), torch.float32)
    chosen = cut(*size, engine, None, torch.device("cpu"))
    assert 1 <= chosen.rows <= size[0]
    assert 1 <= chosen.columns <= size[1]
    assert engine.rows(min(size[1], chosen.columns + 4), 96 * 2**20) >= chosen.rows


def test_a_budget_that_is_too_small_is_refused():
    up = randomised(SINE)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="memory=1000 bytes do not hold .* give a larger memory="),
    ):
        up(*inputs(), memory=1000)


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
@pytest.mark.parametrize("size", [(33, 46), (300, 300), (2, 3)])
def test_the_error_says_what_is_enough(make, size):
    up = make()
    features, image = inputs(size=size)
    with torch.no_grad():
        expected = up(features, image)
        with pytest.raises(ValueError, match=r"memory=10 bytes do not hold .*, which takes \d+ bytes; give") as caught:
            up(features, image, memory=10)
        needed = int(str(caught.value).split(" takes ")[1].split()[0])
        torch.testing.assert_close(up(features, image, memory=needed), expected, atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match=f"memory={needed - 1} bytes do not hold .* takes {needed} bytes"):
            up(features, image, memory=needed - 1)


def test_a_smaller_budget_gives_the_same_result():
    up = randomised(WIDE)
    features, image = inputs(grid=(3, 4), size=(64, 200), channels=384)
    with torch.inference_mode():
        small = up(features, image, memory=24 * 2**20)
        torch.testing.assert_close(small, up(features, image), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_the_working_memory_stays_within_the_budget():
    """Peak of what PyTorch allocates beyond the result, seen by its profiler."""
    up = LoftUp(WIDE).eval()
    features, image = inputs(grid=(24, 24), size=(336, 336), channels=384)
    out = torch.empty(1, 384, 336, 336)
    with torch.inference_mode():
        up(features, image[:, :, :8, :8])  # prepares the weights
        with torch.profiler.profile(profile_memory=True) as profile:
            up(features, image, out=out)
    memory = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            memory += event.nbytes()
            peak = max(peak, memory)
    assert 0 < peak <= 200 * 2**20


def test_backends_are_honoured_or_refused():
    up = randomised(SINE)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="unknown backend 'cuda'; there are cpu, .*device"),
    ):
        up(*inputs(), backend="cuda")
    assert can_run("cpu", torch.device("meta"), torch.float32) == "the weights are on meta"
    assert explain(up).backend == "cpu"
    assert explain(up.double()).backend == "torch"
    assert explain(up, backend="torch").backend == "torch"
    assert "cpu: it computes in float32 and bfloat16, not float64" in str(explain(up))
