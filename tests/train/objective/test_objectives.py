"""Objectives against loops over pixels in float64 that share nothing with them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from loftup.train.objective.distances import affinity_loss, distance
from loftup.train.objective.maps import crop_border, pool_to
from loftup.train.objective.mask_bicubic import mask_bicubic_target, mask_refine
from loftup.train.objective.total_variation import total_variation


def random_masks(batch, height, width, counts=(3, 0, 5)):
    return [torch.rand(counts[i % len(counts)], height, width) < 0.4 for i in range(batch)]


def plain_refine(features, masks, alpha, limit):
    """Eq. 1, pixel by pixel, each mask to what those before it have left."""
    result = features.double().clone()
    for image, members in enumerate(masks):
        for member in members[:limit]:
            inside = [(y, x) for y in range(member.shape[0]) for x in range(member.shape[1]) if member[y, x]]
            if inside:
                mean = sum(result[image, :, y, x] for y, x in inside) / len(inside)
                for y, x in inside:
                    result[image, :, y, x] = alpha * mean + (1 - alpha) * result[image, :, y, x]
    return result


def plain_affinity(a, b):
    """Eq. 3 with its N x N matrices."""
    total = 0.0
    for one, other in zip(a.double().flatten(2), b.double().flatten(2), strict=True):
        one, other = (x / x.norm(dim=0) for x in (one, other))
        total += (one.T @ one - other.T @ other).square().mean()
    return total / len(a)


class TestMaskRefine:
    def test_equals_the_loop(self):
        features = torch.randn(3, 4, 5, 7, dtype=torch.float64)
        masks = random_masks(3, 5, 7)
        for alpha in (0.0, 0.3, 0.8, 1.0):
            expected = plain_refine(features, masks, alpha, 150)
            torch.testing.assert_close(mask_refine(features, masks, alpha), expected, rtol=0, atol=1e-14)

    def test_masks_are_applied_one_after_another(self):
        features = torch.tensor([1.0, 3.0, 8.0]).view(1, 1, 1, 3)
        first, second = torch.tensor([[[1, 1, 0]], [[0, 1, 1]]], dtype=torch.bool)
        refined = mask_refine(features, [torch.stack([first, second])], alpha=0.5)
        # The first gives 1.5, 2.5, 8; the mean of the last two is then 5.25.
        assert refined.flatten().tolist() == [1.5, 3.875, 6.625]
        swapped = mask_refine(features, [torch.stack([second, first])], alpha=0.5)
        # 1, 4.25, 6.75; the mean of the first two is then 2.625.
        assert swapped.flatten().tolist() == [1.8125, 3.4375, 6.75]

    def test_only_the_first_masks_up_to_the_limit(self):
        features = torch.randn(1, 2, 4, 4, dtype=torch.float64)
        masks = [torch.rand(5, 4, 4) < 0.5]
        torch.testing.assert_close(mask_refine(features, masks, limit=2), plain_refine(features, masks, 0.8, 2))
        assert mask_refine(features, masks, limit=0).equal(features)

    def test_no_masks_and_empty_masks_change_nothing(self):
        features = torch.randn(2, 3, 4, 5)
        nothing = [torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(2, 4, 5, dtype=torch.bool)]
        refined = mask_refine(features, nothing)
        assert refined.equal(features)
        assert refined.data_ptr() != features.data_ptr()

    def test_leaves_its_input_alone_and_does_not_mix_images(self):
        features = torch.randn(2, 3, 4, 5)
        before, masks = features.clone(), random_masks(2, 4, 5, (2, 4))
        refined = mask_refine(features, masks)
        assert features.equal(before)
        assert refined[1:].equal(mask_refine(features[1:], masks[1:]))

    def test_gradients(self):
        masks = random_masks(2, 3, 4, (3, 1))
        features = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: mask_refine(x, masks, 0.7), features)

    def test_bfloat16_is_rounded_once(self):
        features = torch.randn(1, 4, 6, 6).bfloat16()
        masks = random_masks(1, 6, 6, (20,))
        refined = mask_refine(features, masks)
        assert refined.dtype == torch.bfloat16
        assert refined.equal(plain_refine(features, masks, 0.8, 150).bfloat16())

    @pytest.mark.parametrize(
        ("masks", "options", "text"),
        [
            ([torch.zeros(1, 4, 4, dtype=torch.bool)], {}, r"expected 2 bool tensors \(M, 4, 4\)"),
            ([torch.zeros(1, 4, 4, dtype=torch.bool)] * 3, {}, "expected 2 bool tensors"),
            ([torch.zeros(1, 4, 5, dtype=torch.bool)] * 2, {}, r"got masks \[\(\(1, 4, 5\), torch.bool\)"),
            ([torch.zeros(4, 4, dtype=torch.bool)] * 2, {}, r"got masks \[\(\(4, 4\), torch.bool\)"),
            ([torch.zeros(1, 4, 4)] * 2, {}, "torch.float32"),
            (
                [torch.zeros(1, 4, 4, dtype=torch.bool)] * 2,
                {"alpha": 1.1},
                r"alpha is 1.1, expected a number in \[0, 1\]",
            ),
            ([torch.zeros(1, 4, 4, dtype=torch.bool)] * 2, {"alpha": -0.1}, "alpha is -0.1"),
            ([torch.zeros(1, 4, 4, dtype=torch.bool)] * 2, {"limit": -1}, "limit is -1"),
        ],
    )
    def test_refuses(self, masks, options, text):
        with pytest.raises(ValueError, match=text):
            mask_refine(torch.zeros(2, 3, 4, 4), masks, **options)


def cubic(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def plain_bicubic(x, size):
    """Keys' interpolation with half-pixel centres and the edge repeated, as torch has it (a = -0.75)."""
    h, w = x.shape[2:]
    matrices = []
    for old, new in ((h, size[0]), (w, size[1])):
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            place = (i + 0.5) * old / new - 0.5
            for j in range(int(place // 1) - 1, int(place // 1) + 3):
                matrix[i, min(max(j, 0), old - 1)] += cubic(place - j)
        matrices.append(matrix)
    return torch.einsum("yh,xw,bchw->bcyx", *matrices, x.double())


class TestMaskBicubicTarget:
    def test_equals_the_loop(self):
        features, masks = torch.randn(2, 3, 3, 4, dtype=torch.float64), random_masks(2, 9, 11, (2, 3))
        expected = plain_refine(plain_bicubic(features, (9, 11)), masks, 0.8, 150)
        torch.testing.assert_close(mask_bicubic_target(features, masks, (9, 11)), expected, rtol=0, atol=1e-12)
        expected = plain_refine(plain_bicubic(features, (9, 11)), masks, 0.5, 1)
        torch.testing.assert_close(mask_bicubic_target(features, masks, (9, 11), 0.5, 1), expected, rtol=0, atol=1e-12)

    def test_gradients(self):
        masks = random_masks(1, 5, 6, (2,))
        features = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: mask_bicubic_target(x, masks, (5, 6)), features)


class TestAffinity:
    def test_equals_the_form_with_all_pairs(self):
        a, b = torch.randn(3, 6, 5, 7, dtype=torch.float64), torch.randn(3, 6, 5, 7, dtype=torch.float64)
        assert abs(affinity_loss(a, b) - plain_affinity(a, b)) < 1e-12
        near = a + 0.01 * b
        assert abs(affinity_loss(a, near) - plain_affinity(a, near)) < 1e-12

    def test_in_float32(self):
        a, b = torch.randn(2, 48, 20, 20), torch.randn(2, 48, 20, 20)
        loss = affinity_loss(a, b)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), plain_affinity(a, b), rtol=1e-5, atol=0)
        near = a + 0.1 * b
        torch.testing.assert_close(affinity_loss(a, near).double(), plain_affinity(a, near), rtol=1e-3, atol=0)

    def test_of_equal_maps_is_nothing(self):
        a = torch.randn(2, 8, 9, 9)
        assert abs(affinity_loss(a, 3 * a)) < 1e-7

    def test_channels_may_differ(self):
        a, b = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 9, 3, 4, dtype=torch.float64)
        assert abs(affinity_loss(a, b) - plain_affinity(a, b)) < 1e-12

    def test_half_precision_is_computed_in_float32(self):
        a, b = torch.randn(1, 16, 8, 8).bfloat16(), torch.randn(1, 16, 8, 8).bfloat16()
        loss = affinity_loss(a, b)
        assert loss.dtype == torch.float32
        assert loss == affinity_loss(a.float(), b.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert affinity_loss(a.float(), b.float()) == loss

    def test_gradients(self):
        a = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
        b = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(affinity_loss, (a, b))

    def test_gradient_equals_that_of_all_pairs(self):
        a = torch.randn(1, 5, 4, 4, dtype=torch.float64, requires_grad=True)
        b = torch.randn(1, 5, 4, 4, dtype=torch.float64)
        (ours,) = torch.autograd.grad(affinity_loss(a, b), a)
        (theirs,) = torch.autograd.grad(plain_affinity(a, b), a)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("other", [(2, 4, 3, 4), (1, 4, 3, 3)])
    def test_refuses_other_grids(self, other):
        with pytest.raises(ValueError, match=r"affinities of \(1, 4, 3, 4\) and .*: the grids must be equal"):
            affinity_loss(torch.zeros(1, 4, 3, 4), torch.zeros(other))

    def test_memory_grows_with_positions_not_pairs(self):
        script = Path(__file__).parents[3] / "benchmarks" / "affinity_memory.py"
        if not script.exists():
            pytest.skip("needs the benchmarks beside the tests")
        run = subprocess.run(
            [sys.executable, str(script), "--side", "100", "--channels", "64"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "100x100, C=64" in run.stdout
        # The N x N matrices alone would take 400 MB each; one input takes 2.6 MB.
        assert float(run.stdout.split("MiB")[0].split()[-1]) < 40


class TestDistance:
    def test_l2_and_cosine_equal_their_definitions(self):
        a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
        assert abs(distance(a, b, "l2") - sum((a - b).flatten() ** 2) / a.numel()) < 1e-12
        pairs = [
            (a[i, :, y, x] @ b[i, :, y, x]) / (a[i, :, y, x].norm() * b[i, :, y, x].norm())
            for i in range(2) for y in range(4) for x in range(5)
        ]  # fmt: skip
        assert abs(distance(a, b, "cosine") - (1 - sum(pairs) / len(pairs))) < 1e-12
        assert distance(a, b, "affinity") == affinity_loss(a, b)

    @pytest.mark.parametrize("kind", ["l2", "cosine"])
    def test_gradients(self, kind):
        a = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: distance(x, torch.ones(1, 3, 2, 3, dtype=torch.float64), kind), a)

    @pytest.mark.parametrize("kind", ["l2", "cosine"])
    def test_half_precision_is_computed_in_float32(self, kind):
        a, b = torch.randn(1, 3, 4, 5).bfloat16(), torch.randn(1, 3, 4, 5).bfloat16()
        loss = distance(a, b, kind)
        assert loss.dtype == torch.float32
        assert loss == distance(a.float(), b.float(), kind)

    def test_refuses(self):
        with pytest.raises(ValueError, match="unknown distance 'l1'; expected affinity, l2, cosine"):
            distance(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), "l1")
        with pytest.raises(ValueError, match=r"distance of \(1, 2, 3, 3\) and \(1, 1, 3, 3\)"):
            distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3), "l2")


class TestCropBorder:
    def test_cuts_both_sides(self):
        x = torch.arange(20 * 33).view(1, 1, 20, 33)
        assert crop_border(x).equal(x[..., 2:18, 3:30])
        assert crop_border(x, 0.25).equal(x[..., 5:15, 8:25])

    def test_rounds_down_and_may_cut_nothing(self):
        x = torch.arange(9 * 19).view(9, 19)
        assert crop_border(x).equal(x[:, 1:18])
        assert crop_border(x, 0.0).equal(x)

    @pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0])
    def test_refuses(self, fraction):
        with pytest.raises(ValueError, match=rf"fraction is {fraction}, expected a number in \[0, 0.5\)"):
            crop_border(torch.zeros(4, 4), fraction)


class TestPoolTo:
    def test_means_of_whole_cells(self):
        x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
        pooled = pool_to(x, (3, 2))
        for i in range(3):
            for j in range(2):
                cell = x[:, :, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4]
                torch.testing.assert_close(pooled[:, :, i, j], cell.mean((2, 3)))

    def test_a_pixel_on_a_border_counts_twice(self):
        x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 1, 5)
        assert pool_to(x, (1, 2)).flatten().tolist() == [pytest.approx(7 / 3), pytest.approx(28 / 3)]

    def test_of_its_own_size_and_gradients(self):
        x = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
        assert pool_to(x, (3, 5)).equal(x)
        assert gradcheck(lambda y: pool_to(y, (2, 3)), x)

    @pytest.mark.parametrize("grid", [(4, 2), (2, 6)])
    def test_refuses_a_finer_grid(self, grid):
        with pytest.raises(ValueError, match=r"cannot pool \(3, 5\) to .*: the grid must not be finer"):
            pool_to(torch.zeros(1, 1, 3, 5), grid)


class TestTotalVariation:
    def test_equals_the_loop(self):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        down = [
            abs(x[b, c, i + 1, j] - x[b, c, i, j])
            for b in range(2)
            for c in range(3)
            for i in range(3)
            for j in range(5)
        ]
        right = [
            abs(x[b, c, i, j + 1] - x[b, c, i, j])
            for b in range(2)
            for c in range(3)
            for i in range(4)
            for j in range(4)
        ]
        assert abs(total_variation(x) - (sum(down) / len(down) + sum(right) / len(right))) < 1e-12

    def test_of_lines_and_of_a_point(self):
        assert total_variation(torch.tensor([[[[1.0, 3.0, 2.0]]]])) == 1.5
        assert total_variation(torch.tensor([[[[1.0], [3.0], [2.0]]]])) == 1.5
        assert total_variation(torch.ones(1, 4, 1, 1)) == 0

    def test_gradients_and_precision(self):
        x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(total_variation, x)
        half = torch.randn(1, 2, 9, 9).bfloat16()
        assert total_variation(half).dtype == torch.float32
        assert total_variation(half) == total_variation(half.float())
