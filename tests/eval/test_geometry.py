"""Depth and surface normals: losses and scores by hand, heads with perfect features, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from material import SINE, randomised
from torch import nn

from loftup.backbones import Backbone
from loftup.eval.datasets import Dataset, GeometrySample
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks.dpt import DptHead
from loftup.eval.tasks.geometry import DEPTH_METRICS, NORMALS_METRICS, GeometryConfig, _Moments, depth, normals
from loftup.eval.tasks.geometry_scores import cosine_loss, depth_scores, normals_scores, scale_invariant_log_loss
from loftup.eval.upsamplers.simple import Interpolation, LowResolution

NAN = math.nan
LINEAR = {"size": [32, 32], "head": "linear", "points": 100, "seeds": 2, "pictures": 1}
DPT = {"size": [32, 32], "epochs": 10, "batch": 2, "rate": 5e-3, "hidden": 8, "seeds": 2, "pictures": 1}


def scenes(task, train=6):
    dataset = synthetic(task, train=train, val=3, size=32)
    dataset = replace(dataset, train=list(dataset.train), val=list(dataset.val))  # rendered once
    return dataset, Oracle(dataset, task, patch_size=8)


def test_depth_scores_by_hand():
    found = depth_scores(torch.tensor([[1.0, 2.2, 3.0, 8.0]]), torch.tensor([[1.0, 2.0, 2.0, 4.0]]))
    assert found["rmse"] == pytest.approx(math.sqrt((0 + 0.04 + 1 + 16) / 4))
    assert found["abs_rel"] == pytest.approx((0 + 0.1 + 0.5 + 1) / 4)
    # Ratios 1, 1.1, 1.5 and 2; the bounds are 1.25, 1.5625 and 1.953.
    assert [found[f"delta_{k}"] for k in (1, 2, 3)] == [50, 75, 75]
    assert list(found) == list(DEPTH_METRICS)


def test_ratios_count_both_ways():
    assert depth_scores(torch.tensor([[1.0]]), torch.tensor([[2.0]]))["delta_3"] == 0
    assert depth_scores(torch.tensor([[2.0]]), torch.tensor([[1.0]]))["delta_3"] == 0


def test_normals_scores_by_hand():
    angles = torch.tensor([0.0, 10.0, 20.0, 90.0]).deg2rad()
    truth = torch.tensor([0.0, 0.0, -1.0])[:, None].expand(3, 4)
    found = normals_scores(torch.stack([angles.sin(), torch.zeros(4), -angles.cos()]), truth)
    assert found["mean"] == pytest.approx(30)
    assert found["median"] == pytest.approx(15)
    assert found["rmse"] == pytest.approx(math.sqrt((100 + 400 + 8100) / 4))
    assert [found[name] for name in ("recall_11", "recall_22", "recall_30")] == [50, 75, 75]
    assert list(found) == list(NORMALS_METRICS)
    assert normals_scores(-truth, truth)["mean"] == pytest.approx(180)


def test_depth_loss_by_hand():
    # Log ratios 1 and 3 in one picture: 10 / 2 - 0.5 * 2^2 = 3; 2 in the other, alone known: 4 - 0.5 * 4 = 2.
    prediction = torch.tensor([[1.0, 3.0], [2.0, 7.0]]).exp().view(2, 1, 1, 2).requires_grad_()
    truth = torch.tensor([[1.0, 1.0], [1.0, NAN]]).view(2, 1, 1, 2)
    loss = scale_invariant_log_loss(prediction, truth)
    assert loss.item() == pytest.approx((3 + 2) / 2)
    loss.backward()
    assert prediction.grad.flatten()[3] == 0
    assert prediction.grad.isfinite().all()
    assert scale_invariant_log_loss(prediction, truth * NAN).item() == 0


def test_normals_loss_by_hand():
    truth = torch.tensor([[0.0, 0, -1], [1, 0, 0], [NAN, NAN, NAN]]).T.view(1, 3, 1, 3)
    prediction = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 3).requires_grad_()
    loss = cosine_loss(prediction, truth)
    assert loss.item() == pytest.approx((0 + 1) / 2)
    loss.backward()
    assert (prediction.grad[..., 2] == 0).all()
    assert cosine_loss(prediction, truth * NAN).item() == 0


def test_ridge_regression_against_a_plain_solution():
    x, y = (
        torch.randn(200, 4, dtype=torch.float64) * torch.tensor([1, 5, 0.01, 1]),
        torch.randn(200, 2, dtype=torch.float64),
    )
    x[:, 3] = 7  # never varies
    moments = _Moments(4, 2)
    for part in range(0, 200, 50):
        moments.add(x[part : part + 50], y[part : part + 50])
    weight, bias = moments.solve(0.1)
    z = ((x - x.mean(0)) / x.std(0, unbiased=False))[:, :3]
    plain = torch.linalg.lstsq(
        torch.cat([z, math.sqrt(0.1 * 200) * torch.eye(3)]).double(), torch.cat([y - y.mean(0), torch.zeros(3, 2)])
    ).solution
    assert (weight[:, 3] == 0).all()
    torch.testing.assert_close(x.float() @ weight.T + bias, (z @ plain + y.mean(0)).float(), rtol=1e-4, atol=1e-5)


def test_perfect_depth_has_no_error_and_bilinear_has():
    dataset, oracle = scenes("depth")
    perfect = depth(oracle.backbone, oracle.upsampler, dataset, GeometryConfig(**LINEAR)).metrics
    assert max(perfect["rmse"]) < 2e-3
    assert max(perfect["abs_rel"]) < 1e-3
    assert perfect["delta_1"] == perfect["delta_2"] == perfect["delta_3"] == [100.0, 100.0]
    bilinear = depth(oracle.backbone, Interpolation("bilinear"), dataset, GeometryConfig(**LINEAR)).metrics
    assert min(bilinear["rmse"]) > 0.3
    assert max(bilinear["delta_1"]) < 90


def test_perfect_normals_have_no_error_and_bilinear_ones_have():
    dataset, oracle = scenes("normals")
    perfect = normals(oracle.backbone, oracle.upsampler, dataset, GeometryConfig(**LINEAR)).metrics
    assert max(perfect["rmse"]) < 0.1
    assert perfect["recall_11"] == perfect["recall_22"] == perfect["recall_30"] == [100.0, 100.0]
    bilinear = normals(oracle.backbone, Interpolation("bilinear"), dataset, GeometryConfig(**LINEAR)).metrics
    assert min(bilinear["rmse"]) > 10
    assert max(bilinear["recall_30"]) < 95


@pytest.mark.parametrize(("task", "measure"), [("depth", depth), ("normals", normals)])
def test_the_convolutional_head_learns_more_from_perfect_features(task, measure):
    dataset, oracle = scenes(task)
    perfect = measure(oracle.backbone, oracle.upsampler, dataset, GeometryConfig(**DPT))
    bilinear = measure(oracle.backbone, Interpolation("bilinear"), dataset, GeometryConfig(**DPT))
    assert max(perfect.metrics["rmse"]) < min(bilinear.metrics["rmse"])
    assert len(set(perfect.metrics["rmse"])) == 2  # seeds differ
    again = measure(oracle.backbone, oracle.upsampler, dataset, GeometryConfig(**DPT))
    assert again.metrics == perfect.metrics


def test_details_and_pictures():
    dataset, oracle = scenes("depth")
    result = depth(oracle.backbone, oracle.upsampler, dataset, GeometryConfig(**LINEAR))
    assert list(result.metrics) == list(DEPTH_METRICS)
    pictures = result.details["pictures"]
    assert list(pictures) == [sample.name for sample in dataset.val]
    # The metrics are the pictures' means; details are means over the seeds.
    rmse = sum(row["rmse"] for row in pictures.values()) / len(pictures)
    assert rmse == pytest.approx(sum(result.metrics["rmse"]) / 2)
    (row,) = result.pictures
    assert list(row) == ["image", "truth", "ours"]
    assert {picture.size for picture in row.values()} == {(32, 32)}


def flat(value, names="ab", size=(8, 8)):
    """Pictures of one surface that faces the camera; the grey level is the depth in half metres."""
    samples = []
    for index, name in enumerate(names):
        image = torch.full((3, *size), 40 * (index + 1), dtype=torch.uint8)
        truth = torch.full(size, value * (index + 1))
        faces = torch.tensor([0.0, 0, -1])[:, None, None].expand(3, *size).clone()
        samples.append(GeometrySample(name, image, truth, faces))
    return samples


GREY = Backbone(
    nn.Identity(), lambda image: F.avg_pool2d(image, 4), channels=3, patch_size=4, mean=(0, 0, 0), std=(1, 1, 1)
).eval()
FLAT = {"size": [8, 8], "points": 20, "seeds": 1, "hidden": 4, "epochs": 2}


def test_normals_are_shown_in_the_usual_colours():
    samples = flat(1.0)
    samples[0].normals[:, 0, 0] = NAN
    result = normals(
        GREY, Interpolation("nearest"), Dataset("flat", samples, samples), GeometryConfig(**FLAT, head="linear")
    )
    truth = result.pictures[0]["truth"]
    assert truth.getpixel((4, 4)) == (128, 128, 255)
    assert truth.getpixel((0, 0)) == (0, 0, 0)
    assert result.pictures[0]["ours"].getpixel((0, 0)) == (128, 128, 255)


def test_an_untrained_head_predicts_the_mean_of_its_first_batch():
    near, far = flat(2.0, names="a"), flat(8.0, names="b")
    near[0].depth[:, 4:] = NAN
    config = GeometryConfig(**{**FLAT, "epochs": 1}, rate=0.0)
    result = depth(GREY, Interpolation("nearest"), Dataset("flat", [*near, *far], near), config)
    # The mean of the logarithms over 32 pixels of 2 m and 64 of 8 m.
    assert result.metrics["abs_rel"][0] == pytest.approx((2 * 8 * 8) ** (1 / 3) / 2 - 1)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_low_resolution_predicts_on_the_backbones_grid(head):
    class Spy(LowResolution):
        called = 0

        def __call__(self, features, image, size):
            self.called += 1
            return super().__call__(features, image, size)

    spy, samples = Spy(), flat(1.0)
    result = depth(GREY, spy, Dataset("flat", samples, samples), GeometryConfig(**FLAT, head=head))
    assert spy.called == (2 if head == "linear" else 0)  # only to draw pixels
    assert result.pictures[0]["ours"].size == (8, 8)
    if head == "linear":
        assert result.metrics["rmse"][0] == pytest.approx(0, abs=1e-3)


def test_features_and_truth_at_a_share_of_the_size():
    asked, samples = [], flat(1.0)

    def spy(features, image, size):
        asked.append((tuple(image.shape[2:]), size))
        return Interpolation("nearest")(features, image, size)

    config = GeometryConfig(**FLAT, head="linear", output=0.5)
    result = depth(GREY, spy, Dataset("flat", samples, samples), config)
    assert set(asked) == {((8, 8), (4, 4))}
    assert result.pictures[0]["truth"].size == result.pictures[0]["image"].size == (4, 4)


def test_an_upsampler_with_a_stream_gives_the_same_as_its_dense_map():
    mix = torch.randn(24, 3, 1, 1)
    backbone = Backbone(
        nn.Identity(), lambda image: F.conv2d(F.avg_pool2d(image, 4), mix), channels=24, patch_size=4
    ).eval()
    up, config = randomised(SINE), GeometryConfig(**{**LINEAR, "seeds": 1, "points": 20})
    dataset = scenes("normals", train=2)[0]
    streamed = normals(backbone, up, dataset, config).metrics
    dense = normals(backbone, lambda features, image, size: up(features, image, size), dataset, config).metrics
    assert streamed == pytest.approx({name: pytest.approx(values, rel=2e-3) for name, values in dense.items()})


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_unknown_pixels_and_pictures_do_not_count(head):
    train, val = flat(1.0), flat(1.0)
    for samples in (train, val):
        samples[0].depth[:, 4:] = NAN
        samples[0].depth[:, :2] = 0  # no depth either
        samples[1].depth[:] = NAN
    config = GeometryConfig(**{**FLAT, "epochs": 60}, head=head, rate=3e-2)
    result = depth(GREY, Interpolation("nearest"), Dataset("flat", train, val), config)
    assert list(result.details["pictures"]) == ["a"]
    assert result.metrics["abs_rel"][0] < 0.05
    assert result.pictures[0]["truth"].getpixel((0, 0)) == (0, 0, 0) != result.pictures[0]["ours"].getpixel((0, 0))
    assert result.pictures[1]["truth"].getcolors() == [(64, (0, 0, 0))]


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_splits_without_truth_are_refused(head):
    known, unknown = flat(1.0), flat(NAN)
    config = GeometryConfig(**FLAT, head=head)
    with pytest.raises(ValueError, match="no picture of flat's training split has a pixel of known depth"):
        depth(GREY, Interpolation("nearest"), Dataset("flat", unknown, known), config)
    with pytest.raises(ValueError, match="no picture of flat's validation split has a pixel of known depth"):
        depth(GREY, Interpolation("nearest"), Dataset("flat", known, unknown), config)
    with pytest.raises(ValueError, match="flat has 2 training and 0 validation pictures"):
        depth(GREY, Interpolation("nearest"), Dataset("flat", known, []))
    for sample in known:
        sample.normals[:] = NAN
    with pytest.raises(ValueError, match="training split has a pixel of known normal"):
        normals(GREY, Interpolation("nearest"), Dataset("flat", known, known), config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "mlp"}, "head must be 'dpt' or 'linear', got 'mlp'"),
        ({"size": [224]}, r"size must be \[height, width\] .* got \[224\] and 1.0"),
        ({"output": 2.0}, r"output in \(0, 1\], got \[224, 224\] and 2.0"),
        ({"seeds": 0}, "must be 1 or more, got GeometryConfig"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GeometryConfig(**wrong)


def test_the_head_has_seven_convolutions_and_does_not_see_the_features_scale():
    head = DptHead(5, 3, hidden=8)
    assert sum(isinstance(module, nn.Conv2d) for module in head.modules()) == 7
    features = torch.randn(2, 5, 6, 7)
    made = head(features)
    assert made.shape == (2, 3, 6, 7)
    torch.testing.assert_close(head(300 * features + 7), made, rtol=1e-3, atol=1e-3)
