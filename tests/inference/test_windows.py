"""Streamed inference with values="features": equal to the network all at once, whatever is cut where."""

import copy
import weakref

import pytest
import torch
from material import FARSIGHTED, inputs, universal
from torch import nn

from loftup.inference import windows as universal_streaming
from loftup.inference.codes import cut_blocks, encode, least_tile, rectangles
from loftup.inputs import resize_guidance
from loftup.networks.cells import make_axis

MIB = 2**20


def whole(up, features, image, size=None):
    """The network all at once, without gradients."""
    with torch.no_grad():
        return up.upsampler(features, image if size is None else resize_guidance(image, size))


CASES = [
    ((5, 7), (33, 46)),  # cells do not divide the size
    ((4, 6), (32, 48)),
    ((1, 1), (1, 1)),
    ((1, 1), (9, 1)),
    ((6, 5), (6, 5)),
    ((8, 9), (3, 5)),  # cells without pixels
    ((3, 20), (40, 7)),
    ((2, 3), (150, 131)),  # cells of several blocks
    ((1, 1), (70, 45)),
    ((2, 40), (9, 300)),
]


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
@pytest.mark.parametrize("memory", [None, 2 * MIB])
@pytest.mark.parametrize(("grid", "size"), CASES)
def test_the_streamed_result_equals_the_whole_one(grid, size, memory, fields):
    up = universal(**fields)
    features, image = inputs(batch=2, grid=grid, size=size)
    with torch.inference_mode():
        made = up(features, image, memory=memory and memory * (4 if fields else 1))
    assert (made - whole(up, features, image)).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("shape", "factor"), [((66, 92), 2), ((70, 95), 2), ((99, 138), 3), ((400, 92), 2), ((60, 92), 1)]
)
def test_codes_of_a_larger_image_are_averaged(shape, factor, monkeypatch):
    up = universal(oversampling=3, **FARSIGHTED)
    features, image = torch.randn(1, 24, 5, 7), torch.rand(1, 3, *shape)
    guidance = resize_guidance(image, (33, 46), 3)
    assert guidance.shape == (1, 3 * factor**2, 33, 46)
    points = torch.tensor([[[0.0, 0.0], [45.0, 32.0], [17.3, 20.6]]])
    with torch.inference_mode():
        expected = up.upsampler(features, guidance)
        for cache in (2**24, 1):
            monkeypatch.setattr(universal_streaming, "IN_CACHE", cache)
            assert (up(features, image, size=(33, 46)) - expected).abs().max() <= 2e-5
            made = up.at(features, image, points, size=(33, 46))
            assert (made[0, :2] - expected[0, :, [0, 32], [0, 45]].T).abs().max() <= 2e-5
    whole = up.train()(features, image, size=(33, 46))
    assert (whole - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("radius", [1, 3])
def test_other_settings(radius):
    up = universal(radius=radius, heads=3, code_width=5, encoder_width=12)
    features, image = inputs(size=(41, 52))
    with torch.inference_mode():
        assert (up(features, image) - whole(up, features, image)).abs().max() <= 2e-5


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
def test_no_cut_shows(monkeypatch, fields):
    """With next to no cache, every step works on one block, and codes come in the smallest tiles."""
    up = universal(**fields)
    features, image = inputs(grid=(5, 7), size=(161, 183) if fields else (61, 83))
    expected = whole(up, features, image)
    monkeypatch.setattr(universal_streaming, "IN_CACHE", 1)
    for longest in (32, 1) if fields else (32, 5, 1):
        monkeypatch.setattr(universal_streaming, "LONGEST", longest)
        for memory in (None, 8 * MIB if fields else 2 * MIB):
            with torch.inference_mode():
                assert (up(features, image, memory=memory) - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("fields", [{}, FARSIGHTED], ids=["plain", "farsighted"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 46), (64, 30), (131, 97), (257, 203)])
def test_codes_made_in_tiles_equal_the_encoders(size, fields):
    net = universal(**fields).upsampler
    image = net.scale(torch.rand(1, 3, *size))
    height, width = size
    with torch.no_grad():
        expected = net.encoder(image)
        small = least_tile(net, size, image.dtype)
        for budget in (small, 96 * MIB):
            codes = encode(net, image, budget)
            torch.testing.assert_close(codes.coarse, net.encoder.coarse(image), atol=1e-5, rtol=1e-5)
            for top, bottom, left, right in ((0, height, 0, width), (height // 3, height, width // 2, width)):
                made = codes.read(top, bottom, left, right).movedim(-1, 0)
                torch.testing.assert_close(made, expected[0, :, top:bottom, left:right], atol=1e-5, rtol=1e-5)
        y, x = torch.randint(height, (20,)), torch.randint(width, (20,))
        torch.testing.assert_close(codes.at(y, x), expected[0][:, y, x].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "cells"), [(33, 5), (32, 4), (3, 8), (100, 1), (1, 1), (7, 7)])
@pytest.mark.parametrize("side", [1, 4, 32])
def test_blocks_have_every_pixel_once_and_average_their_cells(length, cells, side):
    axis = make_axis(length, cells)
    blocks = cut_blocks(axis, side, torch.float64)
    own = [pixel for first, count in blocks.spans for pixel in range(first, first + count)]
    assert own == list(range(length))
    assert blocks.pixels.shape[1] <= side
    values = torch.rand(length, dtype=torch.float64)
    means = torch.zeros(cells, dtype=torch.float64)
    means.index_add_(0, blocks.cells, (values[blocks.pixels] * blocks.weights).sum(1))
    torch.testing.assert_close(means, (values[axis.pixels] * axis.weights).sum(1), atol=1e-6, rtol=1e-6)
    kept = blocks.with_pixels()
    assert [span for span in blocks.spans if span[1]] == kept.spans
    assert kept.range == (0, length)


@pytest.mark.parametrize("most", [0, 1, 3, 5, 12, 100])
def test_rectangles_cover_a_table_once(most):
    table = torch.zeros(4, 5)
    for rows, columns in rectangles(4, 5, most):
        assert table[rows, columns].numel() <= max(1, most)
        table[rows, columns] += 1
    assert (table == 1).all()


def test_another_size_and_a_batch():
    up = universal()
    features, image = inputs(batch=3)
    with torch.inference_mode():
        made = up(features, image, size=(50, 31))
    assert (made - whole(up, features, image, (50, 31))).abs().max() <= 2e-5


def test_the_memory_must_hold_one_block():
    up = universal()
    features, image = inputs()
    text = r"memory=1000 bytes do not hold the smallest piece of this network's work.*give a larger memory="
    with torch.inference_mode():
        with pytest.raises(ValueError, match=text):
            up(features, image, memory=1000)
        # Enough for a block, but not for a tile of codes.
        with pytest.raises(ValueError, match="memory=200000 bytes do not hold the smallest piece"):
            up(*inputs(channels=1, size=(90, 90)), memory=200_000)


def test_the_working_memory_stays_near_the_budget():
    up = universal()
    features, image = inputs(grid=(32, 32), size=(256, 256))
    result, memory = 24 * 256 * 256 * 4, 4 * MIB
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        up(features, image, head=nn.Linear(24, 1), memory=memory)
    changes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(changes) <= memory
    assert max(changes) < result


def test_an_image_is_forgotten_before_the_next(monkeypatch):
    jobs, alive, made = [], [], universal_streaming.Job.__init__

    def watched(self, *arguments, **keywords):
        alive.append(sum(job() is not None for job in jobs))
        jobs.append(weakref.ref(self))
        made(self, *arguments, **keywords)

    monkeypatch.setattr(universal_streaming.Job, "__init__", watched)
    up = universal()
    features, image = inputs(batch=3)
    with torch.inference_mode():
        up(features, image)
        up.at(features, image, torch.zeros(3, 2, 2))
    assert len(jobs) == 6
    assert sum(alive) == 0


def test_many_points_come_in_parts(monkeypatch):
    up = universal()
    features, image = inputs(grid=(5, 7), size=(40, 50))
    points = torch.rand(1, 300, 2) * torch.tensor([49, 39])
    with torch.inference_mode():
        expected = up.at(features, image, points)
        parts, read = [], universal_streaming.Job.at
        monkeypatch.setattr(universal_streaming, "IN_CACHE", 500_000)
        monkeypatch.setattr(universal_streaming.Job, "at", lambda self, y, x: parts.append(len(y)) or read(self, y, x))
        torch.testing.assert_close(up.at(features, image, points), expected, atol=1e-5, rtol=1e-5)
    assert len(parts) > 1
    assert max(parts) < 300


# Heads


@pytest.mark.parametrize(
    "head",
    [
        nn.Conv2d(24, 5, 1),
        nn.Conv2d(24, 5, 1, bias=False),
        nn.Linear(24, 5),
        nn.Conv2d(24, 6, 1, groups=2),
        nn.Sequential(nn.Conv2d(24, 9, 1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 5, 1)).eval(),
        lambda features: features[:, :2] * features[:, 2:4],
        lambda features: features.argmax(1),
    ],
    ids=["conv", "conv-without-bias", "linear", "groups", "network", "product", "argmax"],
)
@pytest.mark.parametrize("size", [(33, 46), (40, 56)])
def test_a_head_on_the_way_equals_the_head_on_the_map(head, size):
    up = universal()
    features, image = inputs(batch=2, size=size)
    with torch.inference_mode():
        dense = up(features, image)
        expected = head(dense.movedim(1, -1)).movedim(-1, 1) if isinstance(head, nn.Linear) else head(dense)
        made = up(features, image, head=head, memory=2 * MIB)
        written = torch.full(expected.shape, 99, dtype=expected.dtype)
        assert up(features, image, head=head, out=written) is written
    assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
    if made.is_floating_point():
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)
    else:
        assert (made != expected).float().mean() < 0.01


@pytest.mark.parametrize("head", [nn.Linear(24, 5), nn.Conv2d(24, 5, 1)], ids=["linear", "conv"])
def test_a_linear_head_sees_the_cells_instead_of_the_pixels(head, monkeypatch):
    up = universal()
    features, image = inputs()
    seen = []
    forward = type(head).forward

    def watched(self, x):
        if self is head:
            seen.append(x.numel())
        return forward(self, x)

    monkeypatch.setattr(type(head), "forward", watched)
    with torch.inference_mode():
        short = up(features, image, head=head)
        assert seen == [features.numel()]
        long = up(features, image, head=lambda x: nn.functional.conv2d(x, head.weight.view(5, 24, 1, 1), head.bias))
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
        hooked = copy.deepcopy(head)
        hooked.register_forward_hook(lambda module, args, output: output.relu())
        torch.testing.assert_close(up(features, image, head=hooked), long.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patched", ["its own forward", "a hook on all modules"])
def test_a_head_that_is_linear_no_more_is_applied_to_the_pixels(patched):
    up = universal()
    features, image = inputs()
    head = nn.Linear(24, 5)
    hook = None
    if patched == "its own forward":
        head.forward = lambda x: nn.functional.linear(x, head.weight, head.bias).relu()
    else:
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, _, made: made.relu() if module is head else None
        )
    try:
        with torch.inference_mode():
            expected = head(up(features, image).movedim(1, -1)).movedim(-1, 1)
            torch.testing.assert_close(up(features, image, head=head), expected, atol=1e-5, rtol=1e-5)
    finally:
        if hook:
            hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_sees_and_sets_the_dtype(dtype):
    up, head = universal(), nn.Linear(24, 5).to(dtype)
    features, image = inputs()
    with torch.inference_mode():
        made = up(features.to(dtype), image, head=head)
        expected = head(up(features.to(dtype), image).movedim(1, -1)).movedim(-1, 1)
    assert made.dtype == dtype
    torch.testing.assert_close(made, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("head", [nn.Conv2d(24, 3, 1), nn.Linear(24, 3)], ids=["conv", "linear"])
def test_a_head_learns_through_the_stream(head):
    up = universal().requires_grad_(False)
    features, image = inputs()
    up(features, image, head=head).square().sum().backward()
    learned = head.weight.grad.clone()
    head.zero_grad()
    dense = whole(up, features, image)
    made = head(dense.movedim(1, -1)) if isinstance(head, nn.Linear) else head(dense)
    made.square().sum().backward()
    torch.testing.assert_close(learned, head.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("head", [nn.Conv2d(24, 5, 3), lambda f: f.mean((2, 3)), lambda f: 3])
def test_a_head_must_be_pointwise(head):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"head must be pointwise"):
        universal()(*inputs(), head=head)


# out=


def test_results_are_written_into_a_given_tensor(tmp_path):
    up = universal()
    features, image = inputs(batch=2)
    with torch.inference_mode():
        expected = up(features, image)
        mapped = torch.from_file(str(tmp_path / "map"), shared=True, size=expected.numel(), dtype=torch.float16)
        mapped = mapped.view(expected.shape)
        assert up(features, image, out=mapped) is mapped
        torch.testing.assert_close(mapped, expected.half())
        last = torch.full((2, 33, 46, 24), torch.nan).movedim(-1, 1)
        torch.testing.assert_close(up(features, image, out=last), expected)
        with pytest.raises(ValueError, match=r"out has shape \(2, 5, 33, 46\), the result needs \(2, 24, 33, 46\)"):
            up(features, image, out=torch.empty(2, 5, 33, 46))
        with pytest.raises(ValueError, match=r"out has shape \(1, 24, 33, 46\), the result needs \(2, 3, 33, 46\)"):
            up(features, image, out=torch.empty(1, 24, 33, 46), head=nn.Linear(24, 3))


def test_arguments_of_inference_are_refused_elsewhere():
    up = universal().train()
    with pytest.raises(ValueError, match=r"memory= is for inference, but .*: call up.eval\(\)"):
        up(*inputs(), memory=MIB)


# Points


@pytest.mark.parametrize(("grid", "size"), [*CASES[:8], ((4, 4), (64, 64))])
def test_points_at_pixel_centres_equal_the_map(grid, size):
    up = universal()
    features, image = inputs(batch=2, grid=grid, size=size)
    points = torch.stack([torch.randint(size[1], (2, 40)), torch.randint(size[0], (2, 40))], -1)
    with torch.inference_mode():
        made, dense = up.at(features, image, points), up(features, image)
    for index in range(2):
        x, y = points[index].unbind(-1)
        torch.testing.assert_close(made[index], dense[index][:, y, x].T, atol=2e-5, rtol=1e-5)


def test_points_between_pixels_are_interpolated():
    up = universal()
    features, image = inputs()
    points = torch.rand(1, 30, 2) * torch.tensor([45.0, 32.0])
    with torch.inference_mode():
        made, dense = up.at(features, image, points), up(features, image)
    grid = 2 * points[:, None] / torch.tensor([45.0, 32.0]) - 1
    expected = nn.functional.grid_sample(dense, grid, align_corners=True)[:, :, 0].mT
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=1e-5)


def test_points_of_another_size_dtype_and_number(monkeypatch):
    up = universal()
    features, image = inputs()
    points = torch.tensor([[[0, 0], [19, 29], [19, 29]]])
    monkeypatch.setattr(universal_streaming, "IN_CACHE", 1)  # one point at a time
    with torch.inference_mode():
        made = up.at(features.half(), image, points, size=(30, 20))
        dense = up(features.half(), image, size=(30, 20))
        assert made.dtype == torch.float16
        torch.testing.assert_close(made[0].T, dense[0][:, [0, 29, 29], [0, 19, 19]], atol=1e-3, rtol=1e-3)
        assert up.at(features, image, points[:, :0]).shape == (1, 0, 24)
        assert up.at(features[:0], image[:0], points[:0]).shape == (0, 3, 24)
    with pytest.raises(ValueError, match="up.at is for inference"):
        up.at(features, image, points)
