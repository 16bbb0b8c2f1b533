"""Two processes do what one does with twice the batch."""

import dataclasses
import functools
import os
import socket
import subprocess

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_run import ENVIRONMENT, TORCHRUN, make_material, small_config, steps_of
from torch import nn

from loftup import LoftUp, LoftUpError
from loftup.files import alone_in
from loftup.train.config import to_yaml
from loftup.train.run.checkpoint import load_checkpoint
from loftup.train.run.distributed import Processes, SynchronisedBatchNorm2d, synchronise_batch_norm
from loftup.train.run.engine import train


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that torchrun starts: sums in another order differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchrun(*arguments):
    done = subprocess.run(
        [*TORCHRUN, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same_training(folder, other, steps, gradients=1e-5, weights=1.0):
    """The same gradients to `gradients` of the largest, and so the same weights, at least that share of them.

    Where a gradient is 0 but for rounding (of key biases, and of biases in front of batch statistics), AdamW turns the
    rounding into steps of full length: those weights are only near.
    """
    name = f"checkpoints/step_{steps:06d}.pt"
    ours, theirs = load_checkpoint(folder / name), load_checkpoint(other / name)
    up, compared, equal = LoftUp.from_pretrained(folder), 0, 0
    names = [name for name, _ in up.named_parameters() if not name.startswith("channelnorm")]
    moments = [[run["optimizer"]["state"][index] for index in range(len(names))] for run in (ours, theirs)]
    largest = max(float(moment["exp_avg"].abs().max()) for moment in moments[1])
    for name, mine, other_moment in zip(names, *moments, strict=True):
        close = functools.partial(torch.testing.assert_close, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        close(mine["exp_avg"], other_moment["exp_avg"], atol=gradients * largest)
        a, b = (run["state_dict"][name] for run in (ours, theirs))
        certain = other_moment["exp_avg_sq"].sqrt() > 1e-7
        close(a, b, atol=2 * steps * 1e-4)
        compared += int(certain.sum())
        equal += int(torch.isclose(a, b, rtol=0, atol=1e-5)[certain].sum())
    assert compared > 0.8 * sum(p.numel() for p in up.parameters())
    assert equal >= weights * compared
    for name, buffer in LoftUp.from_pretrained(other).named_buffers():
        # Running means follow the biases in front.
        torch.testing.assert_close(up.get_buffer(name), buffer, rtol=1e-5, atol=2 * steps * 1e-4, msg=name)


def test_frozen_norms_resumed_in_two_processes(material, tmp_path):
    """One process with batch 4 = two with batch 2 = one with batch 2 that accumulates twice."""
    config = small_config(material, tmp_path / "one")
    config.steps, config.batch = 3, 4
    config.validation.path, config.validation.pictures = [str(material / "val")], 1
    config.validation.probe, config.validation.probe_classes = str(material / "val"), 3
    train(config)
    accumulated = dataclasses.replace(config, output=str(tmp_path / "accumulated"), batch=2, accumulate=2)
    train(accumulated)
    assert_same_training(tmp_path / "accumulated", tmp_path / "one", 3)

    (tmp_path / "run.yaml").write_text(to_yaml(config))
    halves = [tmp_path / "run.yaml", "batch=2", f"output={tmp_path / 'two'}"]
    said = torchrun(*halves, "steps=2")
    assert said.count("starting at step 0 of 2") == 1
    assert "2 pictures x 1 x 2 processes a step" in said
    assert len(load_checkpoint(tmp_path / "two" / "checkpoints" / "step_000002.pt")["random"]) == 2
    said = torchrun(*halves, "--resume")
    assert said.count("going on at step 2 of 3") == 1
    assert_same_training(tmp_path / "two", tmp_path / "one", 3)
    assert steps_of(tmp_path / "two" / "log.csv") == [1, 2, 3]
    one, two = ((tmp_path / name / "validation.csv").read_text().splitlines()[-1] for name in ("one", "two"))
    assert list(map(float, two.split(",")))[:4] == pytest.approx(list(map(float, one.split(",")))[:4], rel=1e-4)


def test_batch_statistics_over_two_processes(material, tmp_path):
    config = small_config(material, tmp_path / "one")
    config.steps, config.batch, config.window = 3, 4, None
    config.model.batch_norm, config.model.start = "batch", "random"
    train(config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    torchrun(tmp_path / "run.yaml", "batch=2", f"output={tmp_path / 'two'}")
    # Statistics summed in another order differ in the last digit, which turns a ReLU of the stem on or off where its
    # input is 0 but for rounding: a jump in the gradients in front of it. How large depends on the processor; 4e-4 of
    # the largest gradient and 78 of 151 000 weights were seen.
    assert_same_training(tmp_path / "two", tmp_path / "one", 3, gradients=1e-3, weights=0.99)


def test_an_error_of_the_main_process_reaches_all(material, tmp_path):
    config = small_config(material, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step,loss\n1,0.5\n")
    done = subprocess.run(
        [*TORCHRUN, tmp_path / "run.yaml"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("holds a run already (log.csv)") == 2


def test_a_folder_in_use_is_refused_in_all(material, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(small_config(material, tmp_path / "run")))
    with alone_in(tmp_path / "run"):
        done = subprocess.run(
            [*TORCHRUN, tmp_path / "run.yaml"], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
    assert done.returncode != 0
    assert done.stderr.count(f"process {os.getpid()} on {socket.gethostname()} is writing to the folder") == 2


def _normalise(rank, folder, outcomes):
    torch.manual_seed(0)
    whole = torch.randn(6, 5, 4, 3, dtype=torch.float64) * 3 + 100
    weights = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    up = LoftUp(4)
    norm = up.upsampler.first_conv[2]
    plain = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        plain.weight.uniform_()
        plain.bias.uniform_()
    together = SynchronisedBatchNorm2d(5).double()
    together.load_state_dict(plain.state_dict())
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    # Shares of different sizes.
    share = slice(0, 2) if rank == 0 else slice(2, 6)
    x = whole[share].clone().requires_grad_()
    (together(x) * weights[share]).sum().backward()
    for parameter in together.parameters():
        dist.all_reduce(parameter.grad)
    y = whole.clone().requires_grad_()
    expected = plain(y)
    (expected * weights).sum().backward()
    torch.testing.assert_close(together(x), expected[share])
    torch.testing.assert_close(x.grad, y.grad[share])
    torch.testing.assert_close(together.weight.grad, plain.weight.grad)
    torch.testing.assert_close(together.bias.grad, plain.bias.grad)
    plain(y)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(together.get_buffer(name), buffer, msg=name)
    torch.testing.assert_close(together.eval()(x), plain.eval()(x))
    half = together.float().train()(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected[share], atol=0.1, rtol=0.1)

    synchronise_batch_norm(up)
    replaced = up.upsampler.first_conv[2]
    assert isinstance(replaced, SynchronisedBatchNorm2d)
    assert replaced.weight is norm.weight
    assert replaced.running_var is norm.running_var
    assert list(up.state_dict()) == list(LoftUp(4).state_dict())
    dist.destroy_process_group()
    outcomes.put(rank)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path):
    outcomes = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_normalise, (str(tmp_path), outcomes), nprocs=2)
    assert {outcomes.get(), outcomes.get()} == {0, 1}


def test_one_process_speaks_for_itself(capsys):
    processes = Processes()
    assert (processes.rank, processes.world, processes.main) == (0, 1, True)
    assert processes.gather("x") == ["x"]
    assert processes.main_first(lambda: 3) == 3
    assert processes.total(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(processes.clip([parameter], None)) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert float(processes.clip([parameter], 1.0)) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    processes.say("a line")
    assert capsys.readouterr().err == "a line\n"

    def fail():
        raise LoftUpError("no")

    with pytest.raises(LoftUpError, match="no"):
        processes.from_main(fail)
    with pytest.raises(LoftUpError, match="no"):
        processes.together(fail)
    assert processes.together(lambda: 4) == 4


def test_an_error_of_another_process_reaches_this_one(monkeypatch):
    processes = Processes()
    processes.world = 2
    monkeypatch.setattr(processes, "gather", lambda reason: [reason, "damaged"])
    with pytest.raises(LoftUpError, match="damaged"):
        processes.together(lambda: 4)
