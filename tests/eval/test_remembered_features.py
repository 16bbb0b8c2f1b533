"""Features remembered for several upsamplers: the same values, made once, within bounds."""

import torch
from layouts import pairs
from small import mean_colours

from loftup.eval.features import extract, recall, remembering
from loftup.eval.run import Comparison


def counting(backbone):
    """The pictures that a backbone is asked about."""
    seen = []
    backbone.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape)))
    return seen


def test_a_picture_is_looked_at_once_within_and_each_time_outside():
    backbone = mean_colours()
    seen, image = counting(backbone), torch.rand(1, 3, 16, 16)
    recall(backbone, image)
    with remembering():
        first = recall(backbone, image)
        first.zero_()  # spoils nothing
        assert torch.equal(recall(backbone, image.clone()), extract(mean_colours(), image))
        assert len(seen) == 2
        recall(backbone, image + 0.1)
        recall(backbone, image[:, :, :, :8])
        recall(mean_colours(), image)
        assert len(seen) == 4
        recall(backbone, image.expand(2, -1, -1, -1))
        recall(backbone, image.expand(2, -1, -1, -1))
        assert len(seen) == 6
    recall(backbone, image)
    assert len(seen) == 7


def test_no_more_is_held_than_allowed():
    backbone = mean_colours()
    seen, images = counting(backbone), torch.rand(3, 1, 3, 16, 16)
    with remembering(2 * 3 * 4 * 4 * 4):
        for _ in range(2):
            for image in images:
                assert torch.equal(recall(backbone, image), extract(mean_colours(), image))
    assert len(seen) == 4


def test_upsamplers_of_one_comparison_share_them(tmp_path):
    pairs(tmp_path / "camvid", "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    settings = {"training": "samples", "points": 50, "size": [32, 32], "seeds": 1}

    def compare(upsamplers, folder, every=1):
        backbone = mean_colours(cell=8)
        seen = counting(backbone)
        dataset = f"camvid:{tmp_path / 'camvid'}"
        comparison = Comparison("segmentation", dataset, backbone, {}, settings, tmp_path / folder, every=every)
        assert comparison.run(upsamplers, lambda text: None) == 0
        return comparison, len(seen)

    both, count = compare("bilinear,nearest", "both")
    assert count == 3  # two to train on, one to judge
    alone, _ = compare("nearest", "alone")
    assert both.rows["nearest"]["metrics"] == alone.rows["nearest"]["metrics"]
    fewer, count = compare("bilinear", "fewer", every=2)
    assert count == 2
    assert fewer.identity["dataset"] == "camvid, 1 of 2"
