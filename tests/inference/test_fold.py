"""Folding takes what it knows, and never outlives the weights."""

import copy
import dataclasses

import pytest
import torch
from material import LEARNABLE, SINE, inputs, randomised, universal
from torch import nn

from loftup import LoftUp, LoftUpError, explain
from loftup.inference import fold
from loftup.inference.engine import FoldedEngine

FEATURES, IMAGE = inputs(grid=(5, 7), size=(33, 46))
POINTS = torch.tensor([[[0.0, 0.0], [45.0, 32.0], [7.5, 20.25], [8.0, 20.0]]])


class LowRank(nn.Linear):
    """A linear layer with a low-rank term beside it, as LoRA adds."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def whole(up, features=FEATURES, image=IMAGE):
    with torch.no_grad():
        return up.upsampler(up.channelnorm(features), image)


def streamed(up, **options):
    with torch.inference_mode():
        return up(FEATURES, IMAGE, **options)


def check_streams(up, memory=None):
    """The streamed map and points are the module's own, and the map comes in parts."""
    expected = whole(up)
    calls = []
    handle = up.upsampler.final_conv.register_forward_hook(lambda *_: calls.append(1))
    result = streamed(up, memory=memory if "whole image" not in str(explain(up)) else None)
    handle.remove()
    assert (result - expected).abs().max() <= 2e-5
    with torch.inference_mode():
        at = up.at(FEATURES, IMAGE, POINTS)
    torch.testing.assert_close(
        at[0, :2], torch.stack([expected[0, :, 0, 0], expected[0, :, 32, 45]]), atol=2e-5, rtol=0
    )
    return len(calls)


@pytest.mark.parametrize("config", [SINE, LEARNABLE], ids=["sine", "learnable"])
def test_a_replaced_layer_counts(config):
    up = randomised(config)
    before = streamed(up)
    attention = up.upsampler.ca_transformer.layers[1][0].attention
    attention.out_proj = LowRank(attention.out_proj)
    assert (streamed(up) - before).abs().max() > 0.1
    assert check_streams(up, memory=3 * 2**20) > 1
    assert "module by module: ca_transformer.layers.1.0.attention.out_proj is a LowRank(" in str(explain(up))


@pytest.mark.parametrize("place", ["first_conv.4", "first_conv.3", "ca_transformer.layers.0.1.net.2"])
def test_hooks_inside_run(place):
    up = randomised(SINE)
    before = streamed(up)
    handle = up.upsampler.get_submodule(place).register_forward_hook(lambda module, given, output: 1.5 * output)
    assert (streamed(up) - before).abs().max() > 1e-3
    assert check_streams(up, memory=3 * 2**20) > 1
    assert "with forward hooks or methods of its own" in str(explain(up))
    handle.remove()
    assert torch.equal(streamed(up), before)
    assert "module by module" not in str(explain(up))


def test_a_forward_of_the_objects_own_runs():
    up = randomised(SINE)
    layer = up.upsampler.ca_transformer.layers[0][1].net[1]
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    check_streams(up)
    assert "net.1 is a Linear with forward hooks or methods of its own" in str(explain(up))


def test_other_settings_of_a_known_layer_count():
    up = randomised(SINE)
    up.upsampler.ca_transformer.layers[0][1].net[2] = nn.GELU(approximate="tanh")
    check_streams(up)
    assert "is a GELU(approximate='tanh'), not GELU(approximate='none')" in str(explain(up))


def test_a_larger_kernel_widens_the_halo():
    up = randomised(SINE)
    up.upsampler.first_conv[4] = nn.Conv2d(44, 44, 5, padding=2)
    assert up.upsampler.first_conv.halo == 3
    assert check_streams(up, memory=3 * 2**20) > 1


@pytest.mark.parametrize("replace", [
    lambda network: network.first_conv.__setitem__(3, nn.GroupNorm(4, 44)),
    lambda network: network.final_conv.__setitem__(0, nn.Conv2d(44, 24, 3, padding=1)),
    lambda network: network.fourier_feat.register_forward_pre_hook(lambda *_: None),
    lambda network: network.register_forward_hook(lambda module, given, output: output + 1),
])  # fmt: skip
def test_what_may_see_further_runs_on_the_whole_image(replace):
    up = randomised(SINE)
    replace(up.upsampler)
    assert check_streams(up, memory=3 * 2**20) == 1
    assert "the whole image at once: " in str(explain(up))


def test_folding_backends_refuse_what_they_cannot_fold():
    up = randomised(SINE)
    up.upsampler.first_conv[6].register_forward_hook(lambda *_: None)
    with pytest.raises(LoftUpError, match="backend='cpu' cannot run here: it takes folded weights alone"):
        streamed(up, backend="cpu")
    assert torch.equal(streamed(up, backend="torch"), streamed(up))


@pytest.mark.filterwarnings("ignore")  # PyTorch moves its quantisation elsewhere
@pytest.mark.parametrize("up", [randomised(SINE), universal()], ids=["loftup", "any"])
def test_quantised_layers(up):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(up), {nn.Linear}, dtype=torch.qint8)
    result = streamed(quantised)
    # The range that activations are quantised in is that of a band here, of the whole image there.
    assert (result - whole(quantised)).abs().max() <= 0.05
    assert (result - streamed(up)).abs().mean() < 0.1


def test_hooks_and_layers_of_any():
    up = universal()
    before, width = streamed(up), up.config.encoder_width
    up.upsampler.gate.register_forward_hook(lambda module, given, output: 3 * output + 1)
    up.upsampler.encoder.blocks[1].register_forward_hook(lambda module, given, output: 2 * output)
    assert (streamed(up) - before).abs().max() > 1e-3
    assert (streamed(up) - whole(up)).abs().max() <= 2e-5
    up.upsampler.encoder.blocks[0] = nn.Conv2d(width, width, 7, padding=3)
    assert (streamed(up) - whole(up)).abs().max() <= 2e-5
    up.upsampler.encoder.fine = nn.Conv2d(3, width // 2, 5, padding=2)
    assert "the whole image at once" in str(explain(up))
    assert (streamed(up) - whole(up)).abs().max() <= 2e-5
    with torch.inference_mode():
        at = up.at(FEATURES, IMAGE, POINTS)
    torch.testing.assert_close(at[0, 0], whole(up)[0, :, 0, 0])


def test_a_layer_in_training_mode_sees_the_whole_image():
    up = randomised(SINE)
    up.upsampler.first_conv[2].train()
    batch = up.upsampler.first_conv[2].num_batches_tracked.clone()
    streamed(up)
    assert up.upsampler.first_conv[2].num_batches_tracked == batch + 1


class Centred(nn.Identity):
    """A layer that sees the whole image, under the name of one that does not."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


class Wrapped(nn.Module):
    """A convolution with a low-rank one beside it, as adapters wrap it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.low = layer, nn.Conv2d(layer.in_channels, layer.out_channels, 1)

    def forward(self, x):
        return self.layer(x) + self.low(x)


@pytest.mark.parametrize("replace", [
    lambda stem: stem.__setitem__(2, nn.Sequential(nn.BatchNorm2d(44).eval(), nn.Conv2d(44, 44, 3, padding=1))),
    lambda stem: stem.__setitem__(6, nn.Sequential(nn.ReLU(), nn.Conv2d(44, 44, 3, padding=1))),
    lambda stem: stem.__setitem__(4, nn.Conv2d(44, 44, 4, padding="same")),
    lambda stem: stem.__setitem__(4, nn.Conv2d(44, 44, 3, padding=1, padding_mode="reflect")),
])  # fmt: skip
def test_convolutions_in_other_places_and_of_other_kinds_are_cut_right(replace):
    up = randomised(SINE)
    replace(up.upsampler.first_conv)
    assert check_streams(up, memory=4 * 2**20) > 1


@pytest.mark.parametrize("layer", [
    Centred(),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample((33, 46))),
    nn.Conv2d(44, 44, 3, padding=1, padding_mode="circular"),
])  # fmt: skip
def test_layers_that_see_the_whole_image_get_it(layer):
    up = randomised(SINE)
    up.upsampler.first_conv[6] = layer
    assert check_streams(up) == 1
    with pytest.raises(ValueError, match=r"memory=1000 cannot be kept: this network is computed on the whole image"):
        streamed(up, memory=1000)


def test_methods_and_classes_of_ones_own_count():
    up = randomised(SINE)
    up.upsampler.head = lambda queries, height, width: 2 * type(up.upsampler).head(up.upsampler, queries, height, width)
    assert check_streams(up) == 1

    for up in (randomised(SINE), universal()):
        expected = 2 * whole(up)
        up.upsampler.__class__ = type("Doubled", (type(up.upsampler),), {
            "forward": lambda self, *inputs, **options: 2 * super(type(self), self).forward(*inputs, **options)
        })  # fmt: skip
        assert (streamed(up) - expected).abs().max() <= 4e-5
        assert "the whole image at once" in str(explain(up))


def test_adapters_around_the_convolutions_of_any():
    up = universal()
    encoder = up.upsampler.encoder
    encoder.coarse_out, encoder.fine = Wrapped(encoder.coarse_out), nn.Sequential(encoder.fine)
    assert (streamed(up) - whole(up)).abs().max() <= 2e-5


def test_hooks_on_all_modules_run_in_bands():
    up = randomised(SINE)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        result = streamed(up, memory=3 * 2**20)
    finally:
        handle.remove()
    assert seen.count("Stem") > 1
    assert (result - whole(up)).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_on_the_network_of_any_runs_once(dtype):
    up = universal().to(dtype)
    before = streamed(up)
    up.upsampler.register_forward_hook(lambda module, given, output: 2 * output)
    torch.testing.assert_close(streamed(up), 2 * before, atol=1e-5, rtol=1e-5)


# Stale weights


def changes():
    def fused(up):
        optimizer = torch.optim.AdamW(up.parameters(), lr=1e-2, fused=True)
        up(FEATURES, IMAGE).square().mean().backward()
        optimizer.step()

    def data(up):
        up.upsampler.first_conv[1].weight.data.mul_(0.5)

    def numpy(up):
        up.upsampler.first_conv[1].weight.detach().numpy()[:] *= 0.5

    def dlpack(up):
        torch.from_dlpack(up.upsampler.first_conv[1].weight.detach()).mul_(0.5)

    def vector(up):
        parameters = [parameter.detach() for parameter in up.parameters()]
        nn.utils.vector_to_parameters(0.9 * nn.utils.parameters_to_vector(parameters), up.parameters())

    def average(up):
        with torch.no_grad():
            torch._foreach_mul_(list(up.parameters()), 0.9)

    def swapped_rows(up):
        weight = up.upsampler.ca_transformer.layers[0][1].net[1].weight
        weight.data[[0, 1]] = weight.data[[1, 0]]

    def replaced(up):
        layer = up.upsampler.first_conv[1]
        weight = layer.weight.detach() * 0.1
        del layer.weight
        layer.weight = nn.Parameter(weight)

    def no_parameter(up):
        norm = up.upsampler.ca_transformer.norm
        weight = norm.weight.detach()
        del norm.weight
        norm.weight = weight * 3
        streamed(up)
        norm.weight = weight * -5

    return [fused, data, numpy, dlpack, vector, average, swapped_rows, replaced, no_parameter]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_no_change_of_the_weights_is_missed(change):
    up = randomised(SINE)
    before = streamed(up)
    change(up)
    after = streamed(up)
    assert not torch.equal(after, before)
    assert (after - whole(up)).abs().max() <= 2e-5


def test_members_by_functional_call_get_their_own_answer():
    up = randomised(SINE)
    key = "upsampler.first_conv.1.weight"
    base = dict(up.named_parameters())[key].detach()
    with torch.no_grad():
        for scale in (1.0, 0.5, 0.1):
            weight = {key: base * scale}  # may lie at the address of the last one
            member = torch.func.functional_call(up, weight, (FEATURES, IMAGE))
            other = copy.deepcopy(up)
            other.load_state_dict(other.state_dict() | weight)
            assert (member - whole(other)).abs().max() <= 2e-5


def test_equal_weights_are_not_folded_again(monkeypatch):
    up = randomised(SINE)
    first = streamed(up)
    monkeypatch.setattr(fold, "fold", lambda network: pytest.fail("folded again"))
    up.load_state_dict(copy.deepcopy(up.state_dict()))
    up.to(torch.float32)
    assert torch.equal(streamed(up), first)


def test_weights_that_are_not_numbers_are_folded_once(monkeypatch):
    up = randomised(SINE)
    up.upsampler.first_conv[1].weight.data[0, 0, 0, 0] = torch.nan
    streamed(up)
    monkeypatch.setattr(fold, "fold", lambda network: pytest.fail("folded again"))
    assert streamed(up).isnan().any()


def test_a_loaded_module_made_in_inference_mode_is_an_ordinary_one(tmp_path):
    randomised(SINE).save_pretrained(tmp_path)
    with torch.inference_mode():
        up = LoftUp.from_pretrained(tmp_path)
    assert not any(tensor.is_inference() for tensor in up.state_dict().values())
    up.requires_grad_(True)(FEATURES, IMAGE).sum().backward()


# Devices without float64


class Mps:
    """A tensor that says it is on a device without float64."""

    device = torch.device("mps")

    def __init__(self, tensor):
        self.tensor = tensor

    def cpu(self):
        return self.tensor


def test_folding_leaves_a_device_without_float64_and_comes_back():
    weight = torch.rand(3)
    doubled = fold._double(Mps(weight))
    assert doubled.dtype == torch.float64
    assert torch.equal(doubled, weight.double())
    weights = fold.fold(randomised(SINE).upsampler)
    elsewhere = dataclasses.replace(weights, code=tuple(x.to("meta") for x in weights.code))  # the rest is on the CPU
    engine = FoldedEngine(elsewhere, torch.float32)
    pairs = [engine.code_norm, engine.conv1, engine.conv2, engine.head, engine.head_norm]
    pairs += [pair for block in engine.blocks for pair in block.values()]
    assert {(x.device.type, x.dtype) for pair in pairs for x in pair} == {("meta", torch.float32)}
