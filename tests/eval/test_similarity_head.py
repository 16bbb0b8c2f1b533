"""Selecting by likeness to the clicks: thresholds by hand, and against every threshold tried one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from loftup.eval.datasets import Dataset, InteractiveSample
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks.clicks import Click
from loftup.eval.tasks.interactive import InteractiveConfig, interactive
from loftup.eval.tasks.similarity_head import STEPS, SimilarityHead, ThresholdFit
from loftup.eval.upsamplers.simple import Interpolation

LIKENESS = InteractiveConfig(head="similarity", size=[32, 32], seeds=2, pictures=1)


def test_a_pixel_is_selected_that_is_like_a_positive_click_and_less_like_the_negative_ones():
    features = torch.eye(3)[torch.tensor([[0, 0, 1], [1, 2, 2]])].movedim(-1, 0)[None]
    one = SimilarityHead(0.5)(features, [[Click(0, 0)]])
    assert torch.equal(one > 0, torch.tensor([[[True, True, False], [False, False, False]]]))
    low = SimilarityHead(-1.0)
    assert (low(features, [[Click(0, 0)]]) > 0).all()
    two = low(features, [[Click(0, 0), Click(0, 2, positive=False)]]) > 0
    assert two[0, 0].tolist() == [True, True, False]
    assert not two[0, 1, 0]
    assert len(low(features.expand(2, -1, -1, -1), [[Click(0, 0)], [Click(1, 1)]])) == 2


def test_the_threshold_is_the_best_of_all():
    generator = torch.Generator().manual_seed(3)
    fit, objects = ThresholdFit(), []
    for _ in range(3):
        mask = torch.randint(-1, 2, (9, 11), generator=generator)
        likeness = (0.5 * torch.randn(9, 11, generator=generator) + 0.4 * mask).clamp(-1, 1)
        fit.add(likeness, mask)
        objects.append((likeness.double(), mask))
    means = []
    for step in range(STEPS):
        threshold, ious = 2 * step / STEPS - 1, []
        for likeness, mask in objects:
            chosen, judged = likeness > threshold, mask >= 0
            ious.append(((chosen & (mask == 1)).sum() / ((chosen | (mask == 1)) & judged).sum()).item())
        means.append(sum(ious))
    assert fit.best() == pytest.approx(2 * means.index(max(means)) / STEPS - 1)


def test_perfect_features_select_the_clicked_object_and_bilinear_ones_less_well():
    scenes = synthetic("interactive")
    small = Dataset("synthetic", [scenes.train[i] for i in range(6)], [scenes.val[i] for i in range(3)])
    oracle = Oracle(small, "interactive")
    config = replace(LIKENESS, size=list(small.val[0].image.shape[1:]))
    perfect = interactive(oracle.backbone, oracle.upsampler, small, config).metrics["iou_at_1"]
    bilinear = interactive(oracle.backbone, Interpolation("bilinear"), small, config).metrics["iou_at_1"]
    assert perfect == [100.0, 100.0]
    assert all(50 < value < 99 for value in bilinear)


def test_as_many_objects_as_asked_for_are_learnt_from():
    read = []

    class Split(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    mask = F.pad(torch.ones(8, 8, dtype=torch.long), (4, 4, 4, 4))
    sample = InteractiveSample("a", mask.expand(3, -1, -1).to(torch.uint8) * 200, mask)
    dataset = Dataset("mine", Split([sample] * 10), [sample])
    oracle = Oracle(Dataset("mine", [sample], [sample]), "interactive", patch_size=4)
    config = replace(LIKENESS, size=[16, 16], objects=4)
    assert interactive(oracle.backbone, oracle.upsampler, dataset, config).metrics["iou_at_1"] == [100.0, 100.0]
    assert read == [0, 2, 5, 7]


def test_another_head_is_refused():
    with pytest.raises(ValueError, match="head must be 'convolutions' or 'similarity', got 'likeness'"):
        InteractiveConfig(head="likeness")
