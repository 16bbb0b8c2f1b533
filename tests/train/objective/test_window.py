"""Windows of the output against cuts of the whole map."""

import pytest
import torch
from material import LEARNABLE, SINE, inputs, randomised
from torch import nn

from loftup.train.objective.start import freeze_batch_norm
from loftup.train.objective.student import upsample_window

SIZE = (33, 46)
BOXES = [
    (0, 0, 33, 46),  # everything
    (0, 0, 8, 9),  # corners
    (0, 40, 7, 46),
    (29, 0, 33, 5),
    (30, 43, 33, 46),
    (0, 10, 33, 12),  # from border to border
    (12, 0, 13, 46),
    (1, 1, 32, 45),  # one pixel off the borders: half of the halo
    (2, 2, 31, 44),
    (10, 20, 20, 31),  # inside
    (0, 0, 1, 1),  # single pixels
    (32, 45, 33, 46),
    (1, 44, 2, 45),
    (17, 23, 18, 24),
]


def cut(x, box):
    top, left, bottom, right = box
    return x[..., top:bottom, left:right]


@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_equals_the_cut(box, config):
    up = randomised(config)
    features, image = inputs(batch=2)
    with torch.no_grad():
        whole = up.upsampler(up.channelnorm(features), image)
        window = upsample_window(up, up.channelnorm(features), image, box)
    # sin(22026 x) makes the last bit of the colours' scaling visible.
    torch.testing.assert_close(window, cut(whole, box), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
@pytest.mark.parametrize("box", BOXES[2::3], ids=str)
def test_equals_the_cut_in_float64_with_gradients(box, config):
    up = randomised(config).double().train()
    freeze_batch_norm(up)
    features, image = inputs(batch=2)
    features, image = features.double(), image.double()
    weights = torch.randn(2, 24, *SIZE, dtype=torch.float64)
    gradients = []
    for made in ("whole", "window"):
        up.zero_grad()
        normalised = up.channelnorm(features).detach().requires_grad_()
        if made == "whole":
            expected = cut(up.upsampler(normalised, image), box)
            (expected * cut(weights, box)).sum().backward()
        else:
            output = upsample_window(up, normalised, image, box)
            (output * cut(weights, box)).sum().backward()
        gradients.append({name: p.grad for name, p in up.upsampler.named_parameters()} | {"": normalised.grad})
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for name, whole in gradients[0].items():
        # The codes and the sums over their phases' gradients are float32.
        rtol, atol = (1e-4, 1e-5) if name.endswith("biases") else (1e-8, 1e-9)
        torch.testing.assert_close(gradients[1][name], whole, rtol=rtol, atol=atol)


def test_no_box_is_everything():
    up = randomised(SINE)
    features, image = inputs()
    with torch.no_grad():
        normalised = up.channelnorm(features)
        assert upsample_window(up, normalised, image, None).equal(up.upsampler(normalised, image))


def test_batch_mates_do_not_matter():
    up = randomised(SINE)
    features, image = inputs(batch=3)
    with torch.no_grad():
        normalised, box = up.channelnorm(features), (3, 4, 12, 20)
        together = upsample_window(up, normalised, image, box)
        alone = upsample_window(up, normalised[1:2], image[1:2], box)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_gradient(training):
    up = randomised(SINE).double().train(training)
    freeze_batch_norm(up)
    features, image = inputs(batch=2)
    gradients, calls = [], []
    up.upsampler.first_conv[0].register_forward_pre_hook(lambda *_: calls.append("stem"))
    up.upsampler.ca_transformer.layers[0][0].register_forward_pre_hook(lambda *_: calls.append("attention"))
    for checkpointing in (False, True):
        up.activation_checkpointing = checkpointing
        up.zero_grad()
        calls.clear()
        upsample_window(up, up.channelnorm(features.double()), image.double(), (5, 6, 15, 20)).square().sum().backward()
        gradients.append([p.grad.clone() for p in up.parameters()])
        assert calls.count("attention") == 1 + checkpointing
        assert calls.count("stem") == 1 + checkpointing
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_checkpointing_updates_batch_statistics_once():
    up = randomised(SINE).train()
    up.activation_checkpointing = True
    features, image = inputs()
    upsample_window(up, up.channelnorm(features), image, (5, 6, 15, 20)).sum().backward()
    counts = [m.num_batches_tracked.item() for m in up.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [1, 1]


def test_batch_statistics_of_a_window_are_others():
    up = randomised(SINE).train()
    features, image = inputs()
    with torch.no_grad():
        normalised, box = up.channelnorm(features), (5, 6, 15, 20)
        whole = up.upsampler(normalised, image)
        assert (upsample_window(up, normalised, image, box) - cut(whole, box)).abs().max() > 0.1


def test_autocast():
    up = randomised(SINE)
    features, image = inputs()
    with torch.no_grad():
        normalised, box = up.channelnorm(features), (5, 6, 15, 20)
        exact = upsample_window(up, normalised, image, box)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = upsample_window(up, normalised, image, box)
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    "box", [(0, 0, 34, 10), (0, 0, 10, 47), (-1, 0, 5, 5), (0, -1, 5, 5), (4, 4, 4, 8), (4, 8, 8, 8), (9, 0, 8, 4)]
)
def test_refuses_boxes_outside(box):
    up = randomised(SINE)
    features, image = inputs()
    with pytest.raises(ValueError, match=r"window \(.*\) does not lie in an image of 33x46"):
        upsample_window(up, features, image, box)
