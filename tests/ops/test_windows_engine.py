"""``any`` on Triton kernels, in the interpreter or on a GPU, against the network and float64, with gradients."""

import copy

import pytest
import torch
from material import FARSIGHTED, inputs, universal
from torch import nn

from loftup import LoftUp, LoftUpError
from loftup.inference.choose import explain
from loftup.inputs import resize_guidance

PACKAGED = {"heads": 3, "radius": 3, **FARSIGHTED}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernel's calls, as (size of the box, exact): each test sees that it ran."""
    seen = []
    for module in ("loftup.inference.windows_triton", "loftup.networks.universal_triton"):
        real = pytest.importorskip(module).windows

        def spy(codes, shares, cells, box, size, out, exact=True, real=real):
            seen.append((box[2] - box[0], box[3] - box[1], exact))
            real(codes, shares, cells, box, size, out, exact)

        monkeypatch.setattr(f"{module}.windows", spy)
    return seen


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def untiled(up: LoftUp, features, image, size) -> torch.Tensor:
    with torch.no_grad():
        return up.upsampler(features, resize_guidance(image, size, up.config.oversampling))


@pytest.mark.parametrize("settings", [PACKAGED, {}, {"heads": 1, "radius": 1, "code_width": 5}, {"oversampling": 3}])
@pytest.mark.parametrize(
    ("grid", "size", "channels"),
    [((5, 7), (19, 30), 24), ((1, 1), (1, 1), 3), ((6, 3), (4, 50), 1), ((1, 9), (17, 5), 70)],
)
def test_it_errs_at_most_twice_as_much_as_pytorch(settings, grid, size, channels, device, launches):
    up = universal(**settings).to(device)
    features, image = on(device, *inputs(2, grid, (37, 29), channels))
    with torch.no_grad():
        ours = up(features, image, size, backend="triton")
    assert launches == 2 * [(*size, True)]
    truth = untiled(copy.deepcopy(up).double(), features.double(), image.double(), size)
    allowed = (untiled(up, features, image, size).double() - truth).abs().max()
    assert (ours.double() - truth).abs().max() <= 2 * allowed + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, device, launches):
    up = universal(**PACKAGED).to(device)
    features, image = on(device, *inputs(1, (4, 5), (30, 41)))
    features = features.to(dtype)
    with torch.no_grad():
        ours = up(features, image, backend="triton")
        exact = up(features.float(), image)
    assert ours.dtype == dtype
    assert launches == [(30, 41, False)]
    # Half a unit in the last place from the rounding, and TF32's error in the weights on a GPU.
    assert (ours.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * features.abs().max() + 2e-3


def test_layouts_heads_points_budgets_and_other_outputs(device, launches):
    up = universal(**PACKAGED).to(device)
    features, image = on(device, *inputs(1, (4, 3), (18, 21)))
    with torch.inference_mode():
        dense = up(features, image)
        strided = features.to(memory_format=torch.channels_last), image.flip(-1).contiguous().flip(-1)
        torch.testing.assert_close(up(*strided, backend="triton"), dense, atol=2e-5, rtol=0)
        linear, other = nn.Linear(24, 5).to(device), nn.Sequential(nn.Conv2d(24, 3, 1), nn.ReLU()).to(device)
        for head, expected in ((linear, linear(dense.movedim(1, -1)).movedim(-1, 1)), (other, other(dense))):
            torch.testing.assert_close(up(features, image, head=head, backend="triton"), expected, atol=1e-4, rtol=1e-4)
        wide = torch.empty(dense.shape, dtype=torch.float64)
        up(features, image, out=wide, backend="triton")
        torch.testing.assert_close(wide, dense.double().cpu(), atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match=r"memory=10 bytes do not hold .* takes \d+ bytes") as caught:
            up(features, image, memory=10, backend="triton")
        launches.clear()
        needed = int(str(caught.value).split(" takes ")[1].split()[0])
        torch.testing.assert_close(up(features, image, memory=needed, backend="triton"), dense, atol=2e-5, rtol=0)
        assert len(launches) > 1
        points = torch.tensor([[[0.0, 0.0], [20.0, 17.0]]], device=device)
        at = up.at(features, image, points, backend="triton")
        torch.testing.assert_close(at[0], torch.stack([dense[0, :, 0, 0], dense[0, :, 17, 20]]), atol=2e-5, rtol=0)
        assert up(features[:0], image[:0], backend="triton").shape == (0, 24, 18, 21)


@pytest.mark.parametrize("box", [None, (3, 5, 11, 22)])
@pytest.mark.parametrize("settings", [PACKAGED, {"heads": 1}])
def test_gradients(settings, box, device, monkeypatch, launches):
    """Of features, image, values and all parameters, as those of the network; whatever the bands."""
    up = universal(**settings).to(device)
    features, image = on(device, *inputs(2, (5, 4), (19, 26)))
    values = torch.randn(2, 7, 5, 4, device=device)

    def gradients(network: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.to(dtype).requires_grad_() for x in (features, image, values)]
        out = network(given[0], given[1], box, values=given[2])
        torch.manual_seed(5)
        (out * torch.randn(out.shape).to(out)).sum().backward()
        return [out.detach(), *(x.grad for x in given), *(x.grad for x in network.parameters())]

    truth = gradients(copy.deepcopy(up.upsampler).double(), torch.float64)
    plain = gradients(copy.deepcopy(up.upsampler), torch.float32)
    for band in (2**16, 300):
        monkeypatch.setattr("loftup.networks.universal_triton.BAND", band)
        network = copy.deepcopy(up.upsampler)
        network.in_triton = True
        launches.clear()
        found = gradients(network, torch.float32)
        assert len(launches) == 2
        for ours, theirs, exact in zip(found, plain, truth, strict=True):
            allowed = 2 * (theirs.double() - exact).abs().max() + 1e-5 * exact.abs().max() + 1e-6
            assert (ours.double() - exact).abs().max() <= allowed


def test_gradients_in_half_precision_and_of_some_inputs_alone(device):
    up = universal(**PACKAGED).to(device, torch.bfloat16)
    network = up.upsampler.requires_grad_(False)
    network.in_triton = True
    features, image = on(device, *inputs(1, (3, 4), (20, 21)))
    features.requires_grad_()
    network(features, image).square().sum().backward()
    ours, features.grad = features.grad, None
    network.in_triton = False
    network(features, image).square().sum().backward()
    torch.testing.assert_close(ours, features.grad, atol=1e-4, rtol=1e-4)


def test_every_picture_of_a_batch_is_computed_alike(device, launches):
    """Whatever dtype a head gives; features wider than float32 as exactly as those."""
    up = universal(**PACKAGED).to(device)
    features, image = on(device, *inputs(2, (3, 4), (16, 17)))
    with torch.inference_mode():
        up(features, image, head=lambda x: x.argmax(1), backend="triton")
        up(features.double(), image, backend="triton")
    assert [exact for *_, exact in launches] == 4 * [True]


def test_a_head_of_ones_own_gets_boxes_that_fit_the_budget(device, launches):
    up = universal().to(device)
    features, image = on(device, *inputs(1, (3, 4), (30, 40), channels=600))
    with torch.inference_mode():
        expected = up(features, image, head=lambda x: x[:, :3].relu())
        result = up(features, image, head=lambda x: x[:, :3].relu(), memory=2 * 2**20, backend="triton")
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)
    assert max(tall * wide for tall, wide, _ in launches) * 600 * 4 < 2 * 2**20


def test_a_head_is_called_as_the_caller_has_it(device):
    """With gradients of its own, and under autocast."""
    up = universal().to(device).requires_grad_(False)
    features, image = on(device, *inputs(1, (3, 4), (16, 17)))
    head = nn.Sequential(nn.Conv2d(24, 3, 1), nn.Tanh()).to(device)
    up(features, image, head=head, backend="triton").sum().backward()
    ours, head[0].weight.grad = head[0].weight.grad, None
    up(features, image, head=head).sum().backward()
    torch.testing.assert_close(ours, head[0].weight.grad, atol=1e-4, rtol=1e-4)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        assert up(features, image, head=head, backend="triton").dtype == up(features, image, head=head).dtype


def test_training_refuses_other_dtypes(device):
    network = universal().to(device).double().upsampler
    network.in_triton = True
    features, image = on(device, *inputs())
    with pytest.raises(
        LoftUpError, match=r"in_triton is for float32 on CUDA, .* torch.float64 .* set in_triton = False"
    ):
        network(features.double(), image)


def test_what_it_does_not_run(device):
    up = universal().to(device)
    assert explain(up).backend == "torch"
    assert explain(up, "triton").backend == "triton"
    assert "windows of at most 3" in str(explain(universal(radius=4).to(device)))
    assert "not float64" in str(explain(universal().double().to(device)))
    up.upsampler.encoder.register_forward_hook(lambda *arguments: None)
    with pytest.raises(LoftUpError, match="takes the network as it is built alone"):
        explain(up, "triton")
