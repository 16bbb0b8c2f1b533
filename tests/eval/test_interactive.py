"""Clicks by hand, the loss by hand, the head, and perfect features on rendered scenes."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loftup import LoftUpError
from loftup.backbones import Backbone
from loftup.eval.datasets import Dataset, InteractiveSample
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks import interactive as task
from loftup.eval.tasks.clicks import Click, click_maps, first_click, inside_click, next_click, similarity_maps
from loftup.eval.tasks.interactive import METRICS, ClickHead, InteractiveConfig, interactive, normalised_focal_loss
from loftup.eval.upsamplers.simple import Interpolation

QUICK = InteractiveConfig(size=[32, 32], hidden=8, epochs=8, batch=2, rate=1e-2, seeds=2, pictures=1)


def box(top, left, height, width, size=(12, 12)):
    made = torch.zeros(size, dtype=torch.bool)
    made[top : top + height, left : left + width] = True
    return made


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (box(2, 3, 5, 5), Click(4, 5)),
        (box(7, 1, 1, 1), Click(7, 1)),
        # The picture's border is a boundary: the middle, not the corner.
        (box(0, 0, 12, 12, (12, 12)), Click(5, 5)),
        (box(0, 0, 3, 3), Click(1, 1)),
        # Of two parts the thicker one.
        (box(0, 0, 1, 12) | box(4, 4, 3, 3), Click(5, 5)),
    ],
)
def test_the_first_click_is_farthest_from_the_boundary(mask, expected):
    assert first_click(mask) == expected


def test_training_clicks_are_well_inside():
    generator = torch.Generator().manual_seed(0)
    clicks = {inside_click(box(2, 2, 7, 7), generator) for _ in range(200)}
    # The middle is 4 pixels from the outside, those 2 and more make 5 x 5.
    assert {(click.row, click.column) for click in clicks} == {(y, x) for y in range(3, 8) for x in range(3, 8)}


def test_corrections_go_to_the_larger_error():
    truth = box(2, 2, 3, 3).long()
    assert next_click(box(0, 0, 0, 0), truth, []) == Click(3, 3, True)
    assert next_click(box(2, 2, 3, 3), truth, []) is None
    # A 5 x 5 square too much weighs more than the 3 x 3 missed.
    assert next_click(box(6, 6, 5, 5), truth, []) == Click(8, 8, False)
    assert next_click(box(6, 6, 3, 3), truth, [Click(7, 7, False)]) == Click(3, 3, True)
    # What is not judged is no error, and what was clicked is not clicked again.
    unjudged = truth.masked_fill(box(6, 6, 5, 5), -1)
    assert next_click(box(6, 6, 5, 5) | box(2, 2, 3, 3), unjudged, []) is None
    assert next_click(box(7, 7, 1, 1) | box(2, 2, 3, 3), truth, [Click(7, 7, False)]) is None


def test_an_empty_mask_cannot_be_clicked():
    with pytest.raises(ValueError, match="nothing to click: the mask is empty"):
        first_click(box(0, 0, 0, 0))


def test_clicks_move_with_the_size():
    assert Click(3, 9, False).scaled((10, 10), (20, 5)) == Click(7, 4, False)
    assert Click(9, 0).scaled((10, 10), (3, 3)) == Click(2, 0)


def test_click_maps_by_hand():
    maps = click_maps([Click(0, 0), Click(0, 4), Click(5, 2, positive=False)], (6, 20), radius=1)
    assert maps[0].nonzero().tolist() == [[0, 0], [0, 1], [0, 3], [0, 4], [0, 5], [1, 0], [1, 4]]
    assert maps[1].nonzero().tolist() == [[4, 2], [5, 1], [5, 2], [5, 3]]
    # The decay's length is 0.6; the nearer click counts.
    assert maps[2, 0, 1] == pytest.approx(math.exp(-1 / 0.6))
    assert maps[2, 3, 0] == pytest.approx(math.exp(-3 / 0.6))
    assert maps[3, 2, 6] == pytest.approx(math.exp(-5 / 0.6))
    assert (click_maps([], (3, 3), 1) == 0).all()


def test_similarity_maps_against_cosines():
    features = torch.randn(4, 3, 5)
    clicks = [Click(0, 1), Click(2, 4), Click(1, 0, positive=False)]
    maps = similarity_maps(features, clicks)
    centred = features - features.flatten(1).mean(1)[:, None, None]
    to = [F.cosine_similarity(centred, centred[:, click.row, click.column][:, None, None], dim=0) for click in clicks]
    torch.testing.assert_close(maps, torch.stack([torch.maximum(to[0], to[1]), to[2]]))
    assert (similarity_maps(features, clicks[:1])[1] == 0).all()


def test_the_loss_by_hand():
    # p = 0.8 of the truth in one pixel and 0.5 in the other: weights 0.04 and 0.25, scaled to 1.
    p = torch.tensor([0.8, 0.5, 0.9])
    logits = torch.logit(p)[None, None] * torch.tensor([1, -1, 1])
    truth = torch.tensor([[[1, 0, -1]]])
    expected = -(0.04 * math.log(0.8) + 0.25 * math.log(0.5)) / 0.29
    assert normalised_focal_loss(logits, truth).item() == pytest.approx(0.5 * expected, rel=1e-5)
    one = -(0.9 * 0.04 * math.log(0.8) + 0.1 * 0.25 * math.log(0.5)) / 0.29
    assert normalised_focal_loss(logits, truth, alpha=0.9).item() == pytest.approx(one, rel=1e-5)
    flat = -(math.log(0.8) + math.log(0.5)) / 2
    assert normalised_focal_loss(logits, truth, gamma=0).item() == pytest.approx(0.5 * flat, rel=1e-5)
    both = normalised_focal_loss(torch.cat([logits, logits]), torch.cat([truth, truth * 0 - 1]))
    assert both.item() == pytest.approx(0.25 * expected, rel=1e-5)


def test_the_losses_weights_are_constant_in_sum_alone():
    logits = torch.tensor([[[0.3, -1.2]]], dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([[[1, 1]]])
    normalised_focal_loss(logits, truth).backward()
    total = ((1 - logits.sigmoid()) ** 2).sum().item()
    again = logits.detach().clone().requires_grad_()
    (-0.5 * (1 - again.sigmoid()) ** 2 * again.sigmoid().log()).sum().div(total).backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_perfect_features_score_100_on_rendered_scenes_and_bilinear_ones_do_not():
    rendered = synthetic("interactive", train=6, val=3, size=32)
    dataset = replace(rendered, train=list(rendered.train), val=list(rendered.val))  # rendered once
    oracle = Oracle(dataset, "interactive", patch_size=8)
    config = replace(QUICK, hidden=16, epochs=30, seeds=1)
    perfect = interactive(oracle.backbone, oracle.upsampler, dataset, config)
    assert perfect.metrics == {"iou_at_1": [100.0]}
    assert perfect.details == {"samples": {sample.name: {"iou_at_1": 100.0} for sample in dataset.val}}
    bilinear = interactive(oracle.backbone, Interpolation("bilinear"), dataset, config)
    assert bilinear.metrics["iou_at_1"][0] < 90


RED = Backbone(
    nn.Identity(), lambda image: F.avg_pool2d(image, 2), channels=3, patch_size=2, mean=(0, 0, 0), std=(1, 1, 1)
).eval()


def sharp(features, image, size):
    return F.interpolate(image, size, mode="nearest-exact")


def square(name="red", size=(16, 16), at=(4, 5, 6, 7), colour=(255, 0, 0)):
    mask = box(*at, size)
    image = torch.where(mask, torch.tensor(colour)[:, None, None], torch.tensor([0, 0, 255])[:, None, None])
    return InteractiveSample(name, image.byte(), mask.long())


SMALL = replace(QUICK, size=[16, 16], seeds=1)


def test_similarity_finds_the_clicked_object_among_others():
    """Red and green objects take turns at being asked for: only what was clicked tells which."""

    def pair(asked, at):
        left, right = box(at, 1, 6, 6, (16, 16)), box(at, 9, 6, 6, (16, 16))
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        image[0, left], image[1, right], image[2] = 255, 255, 60
        return InteractiveSample(f"{asked}{at}", image, (left if asked else right).long())

    dataset = Dataset("pairs", [pair(asked, at) for at in (0, 2, 8) for asked in (0, 1)], [pair(0, 5), pair(1, 5)])
    # The disc is a pixel and two convolutions see two pixels around it.
    told = interactive(RED, sharp, dataset, replace(SMALL, radius=0, epochs=20))
    assert told.metrics["iou_at_1"][0] > 95
    heads = {similar: ClickHead(3, 8, similarity=similar) for similar in (True, False)}
    assert heads[True].encode.in_channels == 6
    assert heads[False].encode.in_channels == 4
    untold = interactive(RED, sharp, dataset, replace(SMALL, similarity=False, epochs=1))
    assert 0 <= untold.metrics["iou_at_1"][0] <= 100


def test_seeds_differ_and_repeat():
    dataset = Dataset("squares", [square(), square("other", at=(1, 1, 5, 9))], [square()])
    config = replace(SMALL, seeds=2, epochs=2)
    metrics = interactive(RED, Interpolation("bilinear"), dataset, config).metrics
    assert len(set(metrics["iou_at_1"])) == 2
    assert interactive(RED, Interpolation("bilinear"), dataset, config).metrics == metrics


def test_pictures_show_the_click_and_the_masks():
    dataset = Dataset("squares", [square()], [square("wide", (16, 32))])
    result = interactive(RED, sharp, dataset, replace(SMALL, size=[40, 40], epochs=1))
    (row,) = result.pictures
    assert list(row) == ["image", "truth", "ours"]
    assert {picture.size for picture in row.values()} == {(40, 40)}
    # The object's middle, (6, 7) of 16 x 32, is at (16, 9) of 40 x 40.
    assert row["image"].getpixel((9, 16)) == (51, 204, 51)
    assert row["image"].getpixel((10, 16)) == (255, 255, 255)
    assert row["truth"].getpixel((39, 39)) == (0, 0, 255)
    assert row["truth"].getpixel((10, 16)) == (0.4 * 255 + 0.6 * 250, 0.6 * 200, 0.6 * 40)


def test_further_clicks_correct_the_mask(monkeypatch):
    """A head that marks what is near positive clicks and not near negative ones."""
    asked = []

    class Near(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, features, clicks):
            asked.append([list(each) for each in clicks])
            maps = torch.stack([click_maps(each, features.shape[2:], 2) for each in clicks])
            return self.scale * (maps[:, 0] - maps[:, 1] - 0.5)

    monkeypatch.setattr(task, "ClickHead", Near)
    config = replace(SMALL, clicks=3, epochs=6)
    result = interactive(RED, sharp, Dataset("squares", [square()], [square()]), config)
    assert list(result.metrics) == list(METRICS)[:3] == ["iou_at_1", "iou_at_2", "iou_at_3"]
    first, second, third = (result.metrics[name][0] for name in result.metrics)
    assert first == pytest.approx(100 * 13 / 42)  # a disc of 13 pixels in 6 x 7
    assert first < min(second, third)
    judged = asked[-3:]
    assert [len(clicks) for ((clicks),) in judged] == [1, 2, 3]
    assert judged[0][0] == [Click(6, 7)]
    # In training a random number of corrections is made.
    assert {len(clicks) for (clicks,) in asked[:-3]} == {1, 2, 3}


def test_no_click_is_made_where_nothing_is_wrong(monkeypatch):
    class Perfect(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, features, clicks):
            assert [len(each) for each in clicks] == [1]
            return self.scale * (features[:, 0] - 0.5)

    monkeypatch.setattr(task, "ClickHead", Perfect)
    dataset = Dataset("squares", [square()], [square()])
    assert interactive(RED, sharp, dataset, replace(SMALL, clicks=3)).metrics["iou_at_3"] == [100.0]


def test_masks_are_judged_in_the_pictures_own_size_without_void(monkeypatch):
    class Left(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, features, clicks):
            half = torch.arange(features.shape[3]) < features.shape[3] / 2
            return self.scale * (half * 2.0 - 1).expand(len(features), *features.shape[2:])

    monkeypatch.setattr(task, "ClickHead", Left)
    sample = square(size=(20, 32), at=(0, 0, 20, 16))
    sample.mask[:10, :8] = 0
    sample.mask[:5, :8] = -1
    # Of 20 x 16 predicted 5 x 8 are void; 5 x 8 of the rest are wrong.
    result = interactive(RED, sharp, Dataset("x", [square()], [sample]), SMALL)
    assert result.metrics["iou_at_1"] == [100 * (320 - 80) / (320 - 40)]


def test_an_object_smaller_than_the_grid_is_still_learnt():
    tiny = square("tiny", (64, 64), (20, 20, 1, 1))
    found = task.Selection(RED, sharp, SMALL).pose(tiny, torch.Generator())
    assert found[0].nonzero().tolist() == [[5, 5]]
    assert found[1] == [Click(5, 5)]


def test_training_data_may_come_from_another_dataset(monkeypatch):
    asked = []
    monkeypatch.setattr(task, "open_dataset", lambda *spec: asked.append(spec) or Dataset("sbd", [square()], []))
    grabcut = Dataset("grabcut", [], [square()])
    interactive(RED, sharp, grabcut, replace(SMALL, train="sbd:folder", epochs=1))
    assert asked == [("sbd:folder", "interactive")]
    with pytest.raises(LoftUpError, match="grabcut has no training split; give one that has as train, such as sbd:F"):
        interactive(RED, sharp, grabcut, SMALL)
    monkeypatch.setattr(task, "open_dataset", lambda *spec: grabcut)
    with pytest.raises(LoftUpError, match="berkeley:x has no training split"):
        interactive(RED, sharp, grabcut, replace(SMALL, train="berkeley:x"))


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="x has no validation pictures"):
        interactive(RED, sharp, Dataset("x", [square()], []), SMALL)
    empty = square("nothing", at=(0, 0, 0, 0))
    for dataset in (Dataset("x", [empty], [square()]), Dataset("x", [square()], [empty])):
        with pytest.raises(LoftUpError, match="the mask of nothing is empty: there is no object to click on"):
            interactive(RED, sharp, dataset, SMALL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clicks": 0}, "clicks must be 1 to 20, got 0"),
        ({"clicks": 21}, "clicks must be 1 to 20, got 21"),
        ({"size": [224]}, r"size must be \[height, width\]"),
        ({"output": 0.0}, r"output in \(0, 1\], got \[224, 224\] and 0.0"),
        ({"batch": 0}, "must be 1 or more, got InteractiveConfig"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        InteractiveConfig(**wrong)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(LoftUpError, match=r'clicks need SciPy: pip install "loftup\[eval\]"'):
        first_click(box(0, 0, 3, 3))
