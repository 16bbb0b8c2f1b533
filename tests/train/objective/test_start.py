"""First weights: statistics of the norms, and the hand-made interpolator."""

import pytest
import torch
import torch.nn.functional as F
from material import LEARNABLE, SINE, inputs, randomised
from torch import nn

from loftup import LoftUp, LoftUpConfig, UniversalConfig
from loftup.train.objective.start import calibrate_batch_norm, freeze_batch_norm, start_as_interpolator
from loftup.train.objective.student import upsample_window


def norms(up):
    return [m for m in up.modules() if isinstance(m, nn.BatchNorm2d)]


def smooth(batch, channels, grid):
    """Random features without detail finer than a cell or two, as those of a backbone."""
    coarse = torch.randn(batch, channels, 6, 6)
    return F.interpolate(coarse, (grid, grid), mode="bicubic", align_corners=True)


class TestCalibrate:
    def test_statistics_are_those_of_the_images(self):
        up = LoftUp(SINE)
        images = [torch.rand(2, 3, 20, 31), torch.rand(2, 3, 20, 31)]
        calibrate_batch_norm(up, images)
        norm, conv1, norm1, relu, conv2, norm2, _ = up.upsampler.first_conv
        first, second = [], []
        with torch.no_grad():
            for image in images:
                x = conv1(norm(up.upsampler.fourier_feat(image)))
                first.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
                # Behind the first norm every batch is seen by its own statistics.
                x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
                x = conv2(relu(norm1.weight[:, None, None] * x + norm1.bias[:, None, None]))
                second.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
        for module, seen in ((norm1, first), (norm2, second)):
            torch.testing.assert_close(module.running_mean, (seen[0][0] + seen[1][0]) / 2, rtol=0, atol=1e-5)
            torch.testing.assert_close(module.running_var, (seen[0][1] + seen[1][1]) / 2, rtol=1e-4, atol=1e-5)

    def test_the_output_then_equals_that_with_batch_statistics(self):
        up = LoftUp(SINE)
        features, image = inputs(size=(40, 50))
        calibrate_batch_norm(up, [image])
        with torch.no_grad():
            normalised = up.channelnorm(features)
            trained = up.train().upsampler(normalised, image)
            calibrate_batch_norm(up, [image])
            evaluated = up.eval().upsampler(normalised, image)
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-2)

    @pytest.mark.parametrize("training", [True, False])
    def test_modes_and_momentum_stay(self, training):
        up = LoftUp(SINE).train(training)
        norms(up)[0].eval()
        calibrate_batch_norm(up, [torch.rand(1, 3, 8, 8)])
        assert [(n.training, n.momentum) for n in norms(up)] == [(False, 0.1), (training, 0.1)]
        assert up.training == training

    def test_modes_stay_when_an_image_fails(self):
        up = LoftUp(SINE).eval()
        with pytest.raises(RuntimeError):
            calibrate_batch_norm(up, [torch.rand(1, 2, 8, 8)])
        assert [(n.training, n.momentum) for n in norms(up)] == [(False, 0.1), (False, 0.1)]

    def test_refuses_no_images(self):
        with pytest.raises(ValueError, match="no images to take statistics of"):
            calibrate_batch_norm(LoftUp(SINE), [])


def test_frozen_norms_use_their_running_statistics_in_training():
    up = randomised(SINE).train()
    freeze_batch_norm(up)
    features, image = inputs()
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms(up)]
    normalised = up.channelnorm(features)
    trained = up.upsampler(normalised, image)
    assert up.training
    assert trained.equal(up.eval().upsampler(normalised, image))
    for n, (mean, var) in zip(norms(up), before, strict=True):
        assert n.running_mean.equal(mean)
        assert n.running_var.equal(var)


class TestInterpolator:
    @pytest.mark.parametrize("channels", [24, 96, 384])
    def test_output_is_nearly_bilinear_interpolation(self, channels):
        up = LoftUp(LoftUpConfig(channels)).eval()
        start_as_interpolator(up)
        features, image = smooth(1, channels, 20), torch.rand(1, 3, 80, 80)
        with torch.inference_mode():
            dense = up(features, image)
            bilinear = F.interpolate(up.channelnorm(features), (80, 80), mode="bilinear", align_corners=False)
        assert F.cosine_similarity(dense, bilinear, dim=1).mean() > 0.9
        # Not so before.
        with torch.inference_mode():
            other = LoftUp(LoftUpConfig(channels)).eval()(features, image)
        assert F.cosine_similarity(other, bilinear, dim=1).mean() < 0.2

    @pytest.mark.parametrize("grid", [(14, 14), (28, 20)])
    def test_on_other_grids(self, grid):
        up = LoftUp(LoftUpConfig(96)).eval()
        start_as_interpolator(up)
        features = F.interpolate(torch.randn(1, 96, 5, 5), grid, mode="bicubic", align_corners=True)
        image = torch.rand(1, 3, 4 * grid[0], 4 * grid[1])
        with torch.inference_mode():
            dense = up(features, image)
            bilinear = F.interpolate(up.channelnorm(features), image.shape[2:], mode="bilinear", align_corners=False)
        assert F.cosine_similarity(dense, bilinear, dim=1).mean() > 0.85

    def test_every_part_gets_a_gradient(self):
        up = LoftUp(LoftUpConfig(96)).train()
        start_as_interpolator(up)
        freeze_batch_norm(up)
        features, image = smooth(2, 96, 14), torch.rand(2, 3, 56, 56)
        up.channelnorm.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in up.parameters() if p.requires_grad], 0.02)
        for step in range(2):
            optimizer.zero_grad()
            dense = upsample_window(up, up.channelnorm(features), image, (8, 8, 40, 40))
            (dense * torch.randn_like(dense)).mean().backward()
            dead = {
                name
                for name, p in up.upsampler.named_parameters()
                if not p.grad.isfinite().all() or not p.grad.abs().max() > 0
            }
            if not step:
                # What starts at zero hides what lies before it for the first step; the stem learns at once.
                assert not [name for name in dead if "first_conv" in name or "fourier" in name or "final_conv" in name]
            optimizer.step()
        assert not dead

    def test_most_of_the_stem_is_alive(self):
        up = LoftUp(LoftUpConfig(96)).eval()
        start_as_interpolator(up)
        with torch.no_grad():
            queries = up.upsampler.queries(torch.rand(1, 3, 40, 40))[0]
        assert (queries.amax(0) > 0).all()
        assert (queries[:, 96:104] > 0).float().mean(0).min() > 0.2  # the position: each half the time

    def test_leaves_the_channel_norm_and_the_global_random_state(self):
        up = randomised(LoftUpConfig(24))
        before, state = up.channelnorm.norm.weight.clone(), torch.get_rng_state()
        start_as_interpolator(up)
        assert up.channelnorm.norm.weight.equal(before)
        assert torch.get_rng_state().equal(state)

    def test_all_weights_stay_finite_and_trainable(self):
        up = LoftUp(LoftUpConfig(24))
        start_as_interpolator(up)
        assert all(p.isfinite().all() and p.requires_grad for p in up.parameters())

    @pytest.mark.parametrize(
        ("config", "options", "text"),
        [
            (LEARNABLE, {}, "needs position_code='sine' with at least 2 frequencies, got 'learnable'"),
            (LoftUpConfig(24, feature_frequencies=1), {}, "got 'sine' with 1 and 20"),
            (LoftUpConfig(24, image_frequencies=1), {}, "got 'sine' with 5 and 1"),
            (LoftUpConfig(28, heads=16), {}, "heads of width 4 or more, got width 48 with 16 heads"),
            (SINE, {"grid": 1}, "grid is 1, expected at least 2"),
            (UniversalConfig(), {}, "is for the published network, got the one behind 'any'"),
        ],
    )
    def test_refuses(self, config, options, text):
        with pytest.raises(ValueError, match=text):
            start_as_interpolator(LoftUp(config), **options)
