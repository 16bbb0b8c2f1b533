"""FeatUp's views and downsampler against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from loftup.train.objective.multi_view import AttentionDownsampler, Motion, draw_motions


def coordinates(height, width):
    """A map whose values are the row and column of every pixel's centre."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([rows, columns])[None].double()


class TestMotion:
    def test_standing_still(self):
        x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
        torch.testing.assert_close(Motion(1.0, (0.0, 0.0), False)(x), x)

    def test_mirrors_columns(self):
        x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
        torch.testing.assert_close(Motion(1.0, (0.0, 0.0), True)(x), x.flip(-1))

    @pytest.mark.parametrize("mirrored", [False, True])
    @pytest.mark.parametrize("size", [(16, 20), (64, 80)])
    def test_shows_the_part_of_the_image_that_it_names(self, size, mirrored):
        height, width = size
        moved = Motion(2.0, (0.1, -0.2), mirrored)(coordinates(height, width))[0]
        shares = (torch.arange(height) + 0.5).double() / height
        rows = height * (0.5 + 0.1 + (shares - 0.5) / 2)
        shares = (torch.arange(width) + 0.5).double() / width
        columns = width * (0.5 - 0.2 + (shares - 0.5) / 2)
        columns = columns.flip(0) if mirrored else columns
        inner = columns > 0.5  # nearer to the border there is nothing to interpolate
        torch.testing.assert_close(moved[0], rows[:, None].expand(height, width), rtol=0, atol=1e-5)
        torch.testing.assert_close(moved[1][:, inner], columns[inner].expand(height, -1), rtol=0, atol=1e-5)

    def test_moves_every_size_alike(self):
        motion = Motion(1.5, (0.05, 0.1), True)
        fine = motion(coordinates(80, 80))
        coarse = motion(coordinates(20, 20))
        torch.testing.assert_close(F.avg_pool2d(fine, 4), 4 * coarse, rtol=0, atol=1e-4)

    def test_gradients(self):
        x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
        assert gradcheck(Motion(1.3, (0.02, 0.03), True), x)


class TestDrawMotions:
    def test_within_their_bounds_and_inside_the_image(self):
        motions = [motion for step in range(200) for motion in draw_motions(0, step, 2, 1.6, 0.1, 0.5)]
        assert len(motions) == 400
        for motion in motions:
            assert 1 <= motion.zoom <= 1.6
            for shift in motion.shift:
                assert abs(shift) <= 0.1
                assert 0.5 + abs(shift) + 0.5 / motion.zoom <= 1 + 1e-9
        assert max(motion.zoom for motion in motions) > 1.55
        assert max(abs(motion.shift[0]) for motion in motions) > 0.09
        assert min(motion.shift[1] for motion in motions) < -0.09
        assert 150 < sum(motion.mirrored for motion in motions) < 250

    def test_seed_and_step_decide(self):
        bounds = (2, 1.6, 0.2, 0.5)
        assert draw_motions(0, 3, *bounds) == draw_motions(0, 3, *bounds)
        assert draw_motions(0, 3, *bounds) != draw_motions(0, 4, *bounds)
        assert draw_motions(0, 3, *bounds) != draw_motions(1, 3, *bounds)

    def test_nothing_to_draw(self):
        for motion in draw_motions(0, 0, views=3, zoom=1.0, shift=0.2, flip=0.0):
            assert (motion.zoom, motion.mirrored) == (1.0, False)
            assert motion.shift == (0, 0)


class TestAttentionDownsampler:
    def test_equals_the_loop(self):
        down = AttentionDownsampler(5, 3).double()
        with torch.no_grad():
            down.weight.normal_()
            down.offset.normal_()
        dense = torch.randn(2, 5, 6, 9, dtype=torch.float64)
        result = down(dense)
        assert result.shape == (2, 5, 2, 3)
        down.requires_grad_(False)
        kernel, bias = down.saliency.weight[0, :, 0, 0], down.saliency.bias[0]
        for b in range(2):
            for i in range(2):
                for j in range(3):
                    total, norm = torch.zeros(5, dtype=torch.float64), 0.0
                    for y in range(3):
                        for x in range(3):
                            vector = dense[b, :, 3 * i + y, 3 * j + x]
                            weight = math.exp(down.weight[y, x] * (kernel @ vector + bias) + down.offset[y, x])
                            total, norm = total + weight * vector, norm + weight
                    torch.testing.assert_close(result[b, :, i, j], total / norm)

    def test_constant_features_stay(self):
        down = AttentionDownsampler(4, 2)
        vector = torch.randn(1, 4, 1, 1)
        torch.testing.assert_close(down(vector.expand(1, 4, 6, 8)), vector.expand(1, 4, 3, 4))

    def test_begins_near_the_mean(self):
        down = AttentionDownsampler(4, 4)
        with torch.no_grad():
            down.saliency.weight.mul_(0.01)
        dense = torch.randn(1, 4, 16, 16)
        torch.testing.assert_close(down(dense), F.avg_pool2d(dense, 4), rtol=0, atol=0.05)

    def test_gradients(self):
        down = AttentionDownsampler(2, 2).double()
        dense = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(down, dense)
        down(dense).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in (down.saliency.weight, down.weight, down.offset))

    def test_autocast_keeps_the_result_in_float32(self):
        down, dense = AttentionDownsampler(4, 2), torch.randn(1, 4, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = down(dense)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, down(dense), rtol=0, atol=0.05)
