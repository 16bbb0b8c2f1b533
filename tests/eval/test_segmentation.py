"""Linear probes: scores by hand, training against a plain loop, perfect features, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from material import randomised, shared
from small import mean_colours

from loftup import LoftUpConfig
from loftup.eval.colour import label_picture, palette
from loftup.eval.datasets import Dataset, SegmentationSample, open_dataset
from loftup.eval.datasets.prepare import fit
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.result import spread
from loftup.eval.tasks import segmentation as module
from loftup.eval.tasks.scores import class_details, percentages
from loftup.eval.tasks.segmentation import METRICS, Probing, SegmentationConfig, _draw, segmentation
from loftup.eval.upsamplers.simple import Interpolation, LowResolution
from loftup.train.run.probe import Confusion, boundary_band, score

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
BACKBONE = mean_colours(cell=4)
SMALL = SegmentationConfig(size=[16, 16], seeds=1, pictures=1)
UNTRAINED = replace(SMALL, rate=0.0, epochs=1)


def sharp(features, image, size):
    return F.interpolate(image, size, mode="nearest-exact")


def painted(labels, name="a"):
    """A picture in the colours of its labels; where there is none, in that of class 0."""
    image = torch.tensor(COLOURS, dtype=torch.uint8)[labels.clamp(min=0)].movedim(-1, 0)
    return SegmentationSample(name, image, labels)


def stripes(*widths, height=16):
    """Labels 0, 1, 2, ... from the left."""
    return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).expand(height, -1).clone()


def dataset(train=None, val=None):
    train = [painted(stripes(5, 6, 5))] if train is None else train
    return Dataset("stripes", train, train if val is None else val, ("red", "green", "blue"), COLOURS)


def scenes(train=24):
    rendered = synthetic("segmentation", train=train, val=3, size=32)
    rendered = replace(rendered, train=list(rendered.train), val=list(rendered.val))  # rendered once
    return rendered, Oracle(rendered, "segmentation", patch_size=8)


def test_scores_by_hand():
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])[None]
    found = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 2]])[None]
    confusion = Confusion(4, radius=1)
    confusion.update(found, labels)
    # Class 0: 3 of 5; class 1: 2 of 4; the others never occur where there are labels.
    scores = confusion.scores()
    assert scores.per_class[:2] == (60, 50)
    assert all(math.isnan(iou) for iou in scores.per_class[2:])
    # Beside another label: two pixels at the edge of 0 and 1 (0 found as 1; 1 rightly), one beside what has no label.
    assert percentages(scores) == {
        "miou": 55,
        "accuracy": pytest.approx(500 / 7),
        "boundary_miou": pytest.approx(100 * (0 / 2 + 1 / 3) / 2),
    }


def plain_ious(pairs, classes, counted=lambda labels: labels >= 0):
    """IoU of every class in percent, NaN where it never occurs, counted pixel by pixel."""
    pixels = [
        pixel
        for prediction, labels in pairs
        for pixel in zip(prediction[counted(labels)].tolist(), labels[counted(labels)].tolist(), strict=True)
    ]
    ious = []
    for index in range(classes):
        union = sum(index in pixel for pixel in pixels)
        ious.append(100 * pixels.count((index, index)) / union if union else math.nan)
    return ious


def test_scores_gathered_batch_by_batch_are_those_of_a_plain_count_and_of_the_training_probe():
    confusion, pairs = Confusion(5, radius=2), []
    for _ in range(3):
        labels = torch.randint(-1, 4, (2, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        pairs.append(
            (torch.where(torch.rand(labels.shape) < 0.3, torch.randint(0, 4, labels.shape), labels % 5), labels)
        )
        confusion.update(*pairs[-1])
    scores, ious = confusion.scores(), plain_ious(pairs, 5)
    band = plain_ious(pairs, 5, lambda labels: (labels >= 0) & boundary_band(labels, 2))
    right = [(prediction == labels)[labels >= 0] for prediction, labels in pairs]
    assert percentages(scores) == {
        "miou": pytest.approx(torch.tensor(ious).nanmean().item()),
        "accuracy": pytest.approx(100 * torch.cat(right).float().mean().item()),
        "boundary_miou": pytest.approx(torch.tensor(band).nanmean().item()),
    }
    torch.testing.assert_close(list(scores.per_class), ious, equal_nan=True)
    assert percentages(score(pairs, 5, radius=2)) == percentages(scores)


def test_details_are_means_over_the_seeds_that_know_a_class():
    confusions = [Confusion(3), Confusion(3)]
    confusions[0].update(torch.tensor([[[0, 0]]]), torch.tensor([[[0, 0]]]))
    confusions[1].update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
    details = class_details(("a", "b", "c"), [confusion.scores() for confusion in confusions])
    assert details["a"] == {"iou": 75}
    assert details["b"] == {"iou": 0}
    assert math.isnan(details["c"]["iou"])


@pytest.mark.parametrize("training", ["dense", "samples"])
def test_perfect_features_score_100_on_rendered_scenes_and_bilinear_ones_do_not(training):
    rendered, oracle = scenes()
    config = SegmentationConfig(size=[32, 32], training=training, epochs=20, rate=0.1, seeds=2, points=100)
    perfect = segmentation(oracle.backbone, oracle.upsampler, rendered, config)
    assert perfect.metrics == {name: [100.0, 100.0] for name in ("miou", "accuracy", "boundary_miou")}
    present = torch.cat([sample.labels.unique() for sample in rendered.val]).unique().tolist()
    ious = [entry["iou"] for entry in perfect.details["classes"].values()]
    assert [index for index, iou in enumerate(ious) if iou == 100] == present
    assert sum(math.isnan(iou) for iou in ious) == 8 - len(present)
    assert len(perfect.pictures) == 3
    assert all(row["truth"].tobytes() == row["ours"].tobytes() for row in perfect.pictures)
    bilinear = segmentation(oracle.backbone, Interpolation("bilinear"), rendered, config)
    assert max(bilinear.metrics["miou"]) < 90
    assert max(bilinear.metrics["boundary_miou"]) < min(bilinear.metrics["miou"])


@pytest.mark.parametrize("training", ["dense", "samples"])
def test_the_low_resolution_probe_tells_whether_the_feature_space_is_kept(training):
    rendered, oracle = scenes()
    both = SegmentationConfig([32, 32], training=training, epochs=20, rate=0.1, seeds=1, probes=["upsampled", "lowres"])
    kept = segmentation(oracle.backbone, oracle.upsampler, rendered, both).metrics
    assert list(kept) == list(METRICS)
    assert kept["lowres_probe_accuracy"][0] > 95

    def elsewhere(features, image, size):
        return oracle.upsampler(features, image, size).roll(1, dims=1)

    left = segmentation(oracle.backbone, elsewhere, rendered, both).metrics
    assert left["miou"] == [100.0]
    assert left["lowres_probe_accuracy"][0] < 20


def test_the_low_resolution_probe_alone_takes_the_labels_at_the_cells_centres():
    # Of cells 4 wide, with centres at 2, 6, 10 and 14, the last one's alone is blue.
    wide = dataset([painted(stripes(6, 6, 4))])
    task = Probing(BACKBONE, sharp, wide, replace(SMALL, points=16, training="samples"))
    seen = []

    def spy(vectors, found, classes, seed):
        seen.append((vectors, found))
        return torch.nn.Linear(3, classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit_probe", spy)
        task.train_on_samples(("lowres",))
    vectors, found = seen[0]
    assert found.bincount().tolist() == [4, 8, 4]
    means = {0: [[1, 0, 0]], 1: [[0.5, 0.5, 0], [0, 1, 0]], 2: [[0, 0, 1]]}
    for label, expected in means.items():
        assert all(vector in expected for vector in vectors[found == label].tolist())


def test_a_probe_scores_alike_with_and_without_the_other():
    rendered, oracle = scenes(4)
    alone = replace(SMALL, size=[32, 32], training="samples", points=20, seeds=2)
    for probes in (["upsampled"], ["lowres"]):
        both = segmentation(
            oracle.backbone, Interpolation("bilinear"), rendered, replace(alone, probes=["upsampled", "lowres"])
        )
        single = segmentation(oracle.backbone, Interpolation("bilinear"), rendered, replace(alone, probes=probes))
        assert single.metrics == {name: both.metrics[name] for name in single.metrics}


def first_weights(seed, classes=3, channels=3):
    return 0.01 * torch.randn(classes, channels, generator=torch.Generator().manual_seed(seed))


def test_dense_training_is_adam_on_cross_entropy():
    labels = [stripes(5, 6, 5), stripes(9, 4, 3), stripes(2, 2, 12)]
    labels[1][3:5] = -1
    samples = [painted(each, str(index)) for index, each in enumerate(labels)]
    config = replace(SMALL, epochs=3, batch=2, rate=0.05)
    probe = Probing(BACKBONE, sharp, dataset(samples), config).train_densely(4)

    weight, bias = first_weights(4).requires_grad_(), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.05)
    order = torch.Generator().manual_seed(4)
    torch.randn(3, 3, generator=order)
    for _ in range(3):
        for chosen in torch.randperm(3, generator=order).split(2):
            vectors = torch.stack([samples[i].image for i in chosen]).movedim(1, -1).flatten(0, 2) / 255
            truth = torch.stack([samples[i].labels for i in chosen]).flatten()
            logs = (vectors @ weight.T + bias).log_softmax(-1)[truth >= 0]
            loss = -logs[torch.arange(len(logs)), truth[truth >= 0]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(probe.weight, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.bias, bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("upsampler", [Interpolation("bilinear"), LowResolution()])
def test_predictions_are_of_the_upsampled_features_and_enlarged_where_there_are_none(upsampler):
    val = [painted(stripes(7, 4, 5))]
    config = replace(UNTRAINED, seeds=2, probes=["upsampled", "lowres"])
    result = segmentation(BACKBONE, upsampler, dataset(val=val), config)
    low = F.avg_pool2d(val[0].image.float() / 255, 4)[None]
    for seed in range(2):
        # A pointwise linear map and bilinear interpolation commute.
        logits = torch.einsum("bchw,kc->bkhw", F.interpolate(low, (16, 16), mode="bilinear"), first_weights(seed))
        expected = score([(logits.argmax(1), val[0].labels[None])], 3)
        assert result.metrics["miou"][seed] == pytest.approx(expected.miou)
        assert result.metrics["boundary_miou"][seed] == pytest.approx(expected.boundary_miou)
        if seed == 0:
            assert result.pictures[0]["ours"].tobytes() == label_picture(logits.argmax(1)[0], COLOURS).tobytes()


@pytest.mark.parametrize("training", ["dense", "samples"])
def test_low_resolution_is_never_enlarged_before_the_head(training):
    class Spy(LowResolution):
        def __call__(self, features, image, size):
            assert training == "samples", "upsampled"
            return super().__call__(features, image, size)

    result = segmentation(BACKBONE, Spy(), dataset(), replace(SMALL, training=training, epochs=1))
    assert 0 <= result.metrics["miou"][0] <= 100


@pytest.mark.parametrize("training", ["dense", "samples"])
def test_an_upsampler_that_wants_gradients_gets_none_and_streams_alike(training):
    up = randomised(LoftUpConfig(3, image_frequencies=3, feature_frequencies=2, heads=1, blocks=1))
    config = replace(SMALL, training=training, epochs=2, rate=0.1, points=50)
    streamed = segmentation(BACKBONE, up, dataset(), config)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in up.parameters())
    mapped = segmentation(BACKBONE, lambda *inputs: up(*inputs).detach(), dataset(), config)
    assert streamed.metrics["accuracy"] == pytest.approx(mapped.metrics["accuracy"], abs=1)


def test_labels_are_strided_where_the_output_is_smaller():
    labels = stripes(5, 6, 5)
    labels[0, 0] = 2
    result = segmentation(BACKBONE, sharp, dataset([painted(labels)]), replace(SMALL, output=0.5, epochs=1))
    row = result.pictures[0]
    assert {caption: picture.size for caption, picture in row.items()} == dict.fromkeys(
        ("image", "truth", "ours"), (8, 8)
    )
    assert row["truth"].tobytes() == label_picture(labels[::2, ::2], COLOURS).tobytes()


def test_seeds_differ_and_repeat():
    noise = torch.randint(0, 3, (4, 4)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    mixed = SegmentationSample("noise", torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), noise)
    for training in ("dense", "samples"):
        config = replace(SMALL, training=training, seeds=3, epochs=1, points=20)
        result = segmentation(BACKBONE, sharp, dataset([mixed]), config).metrics
        assert len(set(result["accuracy"])) > 1
        torch.rand(3)
        assert segmentation(BACKBONE, sharp, dataset([mixed]), config).metrics == result


def test_pixels_without_a_label_are_never_drawn(monkeypatch):
    labels = stripes(5, 6, 5)
    labels[:, :4] = -1
    drawn = []
    real = module.at_pixels
    monkeypatch.setattr(module, "at_pixels", lambda *inputs: drawn.append(inputs[-1][0]) or real(*inputs))
    config = replace(SMALL, training="samples", points=30, seeds=3)
    segmentation(BACKBONE, sharp, dataset([painted(labels), painted(labels * 0 - 1, "void")]), config)
    assert [len(pixels) for pixels in drawn] == [90]
    assert drawn[0][:, 1].min() == 4
    assert len(drawn[0].unique(dim=0)) == 90
    monkeypatch.setattr(module, "SAMPLES", 20)
    segmentation(BACKBONE, sharp, dataset([painted(labels), painted(labels, "b")]), config)
    assert [len(pixels) for pixels in drawn[1:]] == [30, 30]


def test_draws_repeat_only_when_all_are_drawn():
    counts = _draw(4, 10, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert counts.sum() == 10
    assert set(counts.tolist()) == {2, 3}
    assert sorted(_draw(5, 5, torch.Generator()).tolist()) == list(range(5))


def test_pictures_show_the_first_of_the_split_in_the_datasets_colours_or_made_up_ones():
    val = [painted(stripes(4 + index, 8, 4 - index), str(index)) for index in range(3)]
    result = segmentation(BACKBONE, sharp, dataset(val=val), replace(UNTRAINED, pictures=2))
    assert [row["truth"].getpixel((4, 0)) for row in result.pictures] == [(0, 255, 0), (255, 0, 0)]
    assert result.pictures[0]["image"].getpixel((4, 0)) == (0, 255, 0)
    result = segmentation(BACKBONE, sharp, replace(dataset(), colours=()), UNTRAINED)
    assert result.pictures[0]["truth"].getpixel((15, 0)) == palette(3)[2]
    assert segmentation(BACKBONE, sharp, dataset(), replace(UNTRAINED, pictures=0)).pictures == []


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, training="samples"), replace(SMALL, probes=["lowres"])])
def test_training_without_a_label_is_refused(config):
    void = [painted(stripes(5, 6, 5) * 0 - 1)]
    with pytest.raises(ValueError, match="none of the 1 pictures of stripes's training split has a labelled pixel"):
        segmentation(BACKBONE, sharp, dataset(void, [painted(stripes(5, 6, 5))]), config)


def test_no_label_at_the_centre_of_any_cell_is_refused():
    labels = stripes(5, 6, 5)
    labels[2::4, 2::4] = -1
    both = replace(SMALL, training="samples", probes=["upsampled", "lowres"])
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        segmentation(BACKBONE, sharp, dataset([painted(labels)]), both)


def test_an_empty_split_and_nameless_classes_are_refused():
    with pytest.raises(ValueError, match="stripes has 1 training and 0 validation pictures"):
        segmentation(BACKBONE, sharp, dataset(val=[]))
    with pytest.raises(ValueError, match="stripes has 0 training and 1 validation pictures"):
        segmentation(BACKBONE, sharp, dataset([], [painted(stripes(5, 6, 5))]))
    with pytest.raises(ValueError, match="stripes names no classes"):
        segmentation(BACKBONE, sharp, replace(dataset(), classes=()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": "sparse"}, "training must be 'dense' or 'samples', got 'sparse'"),
        ({"probes": []}, r"probes must name 'upsampled', 'lowres' or both, got \[\]"),
        ({"probes": ["low"]}, r"got \['low'\]"),
        ({"size": [224]}, r"size must be \[height, width\] and output in \(0, 1\], got \[224\] and 1.0"),
        ({"output": 2.0}, r"got \[224, 224\] and 2.0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"points": -1}, "points must be at least 1, got -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationConfig(**settings)


def test_camvid_runs_in_its_layout():
    camvid = open_dataset(f"camvid:{shared('data/camvid')}", "segmentation")
    camvid = replace(camvid, train=[camvid.train[index] for index in range(0, 30, 10)], val=[camvid.val[0]])
    config = SegmentationConfig(size=[88, 120], output=0.5, training="samples", points=200, seeds=2, pictures=1)
    result = segmentation(mean_colours(8), Interpolation("bilinear"), camvid, config)
    assert all(0 < value < 100 for values in result.metrics.values() for value in values)
    assert list(result.details["classes"]) == list(camvid.classes)
    _, labels = fit(camvid.val[0].image, camvid.val[0].labels, size=(88, 120))
    assert labels.min() == -1
    assert result.pictures[0]["truth"].tobytes() == label_picture(labels[::2, ::2], camvid.colours).tobytes()


@pytest.mark.parametrize(
    ("total", "wanted", "expected"), [(9, 3, {0, 3, 6}), (2, 4, {0, 1}), (5, 0, set()), (4, 4, {0, 1, 2, 3})]
)
def test_shown_pictures_are_spread_evenly(total, wanted, expected):
    assert spread(total, wanted) == expected
