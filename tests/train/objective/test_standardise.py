"""Features on one scale, and the channels that a step keeps."""

import pytest
import torch

from loftup.train.objective.standardise import draw_channels, standardisation


class TestStandardisation:
    def test_every_channel_of_every_picture_has_mean_0_and_deviation_1(self):
        features = torch.randn(2, 5, 6, 7, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 5]).view(5, 1, 1) + 7
        made = standardisation(features)(features)
        torch.testing.assert_close(made.mean((2, 3)), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(made.square().mean((2, 3)), torch.ones(2, 5, dtype=torch.float64))

    def test_another_grid_is_mapped_by_the_same_numbers(self):
        features, finer = torch.randn(2, 5, 6, 7), 3 * torch.randn(2, 5, 12, 14)
        mean = features.flatten(2).mean(2)[..., None, None]
        deviation = features.flatten(2).std(2, correction=0)[..., None, None]
        torch.testing.assert_close(standardisation(features)(finer), (finer - mean) / deviation)

    def test_shifts_and_scales_of_channels_cancel(self):
        features, finer = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 12, 14)
        scale, shift = torch.rand(5, 1, 1) + 0.5, 10 * torch.randn(5, 1, 1)
        moved = standardisation(scale * features + shift)(scale * finer + shift)
        torch.testing.assert_close(moved, standardisation(features)(finer), rtol=1e-4, atol=1e-4)

    def test_a_silent_channel_does_not_outweigh_the_others(self):
        """Where nothing varies, a tenth of the mean deviation stands in."""
        features, finer = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 16, 16)
        features[:, 1] = 2.0
        deviation = features.flatten(2).std(2, correction=0)[0]
        found = standardisation(features)
        torch.testing.assert_close(found.deviation[0, 1, 0, 0], 0.1 * deviation.mean())
        torch.testing.assert_close(found(finer)[0, 1], (finer[0, 1] - 2) / (0.1 * deviation.mean()))
        torch.testing.assert_close(found.deviation[0, [0, 2, 3], 0, 0], deviation[[0, 2, 3]])

    def test_a_picture_without_any_variation_stays_finite(self):
        flat = torch.full((1, 3, 4, 4), 5.0)
        assert standardisation(flat)(flat).abs().max() == 0

    def test_the_dtype_stays(self):
        features = torch.randn(1, 3, 4, 4).bfloat16()
        assert standardisation(features)(features).dtype == torch.bfloat16


class TestChannels:
    def test_none_are_left_out_where_none_may_be(self):
        assert draw_channels(32, 0.0, 0, 0) is None

    def test_every_number_from_the_fewest_to_all_is_drawn(self):
        kept = [draw_channels(32, 0.5, 0, step) for step in range(300)]
        assert {len(channels) for channels in kept} == set(range(16, 33))
        assert all(channels.tolist() == sorted(set(channels.tolist())) for channels in kept)
        assert set(torch.cat(kept).tolist()) == set(range(32))

    @pytest.mark.parametrize(("channels", "fewest"), [(32, 8), (9, 8), (8, 8), (3, 3)])
    def test_eight_stay_or_all(self, channels, fewest):
        assert min(len(draw_channels(channels, 0.99, 0, step)) for step in range(100)) == fewest

    def test_seed_and_step_decide(self):
        first = draw_channels(32, 0.5, 0, 1)
        assert draw_channels(32, 0.5, 0, 1).equal(first)
        assert not draw_channels(32, 0.5, 0, 2).equal(first)
        assert not draw_channels(32, 0.5, 1, 1).equal(first)
