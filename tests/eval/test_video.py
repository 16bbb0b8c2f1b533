"""Label propagation: against plain loops, with perfect features, and what it refuses."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loftup.backbones import Backbone
from loftup.eval.datasets import Dataset
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks import video as task
from loftup.eval.tasks.video import METRICS, VideoConfig, propagate, video
from loftup.eval.upsamplers.simple import Interpolation, LowResolution


@dataclass
class Frames:
    """A sequence in memory."""

    images: Tensor
    labels: Tensor
    name: str = "moving"
    read: list = field(default_factory=list)

    def __len__(self):
        return len(self.images)

    def frame(self, index):
        self.read.append(index)
        return self.images[index]

    def annotation(self, index):
        return self.labels[index]


def colours(size=24, frames=5, shift=2):
    """A red square on blue that moves to the right; a backbone whose features are the mean colours of 4 x 4 cells."""
    labels = torch.zeros(frames, size, size, dtype=torch.int64)
    for index in range(frames):
        labels[index, 6:14, 2 + shift * index : 10 + shift * index] = 1
    red, blue = (torch.tensor(colour)[:, None, None] for colour in ([255, 0, 0], [0, 0, 255]))
    return Frames(torch.where(labels[:, None] == 1, red, blue).byte(), labels)


BACKBONE = Backbone(
    nn.Identity(), lambda image: F.avg_pool2d(image, 4), channels=3, patch_size=4, mean=(0, 0, 0), std=(1, 1, 1)
).eval()
SMALL = VideoConfig(size=24, feature_size=24, radius=3, pictures=1)


def sharp(features, image, size):
    return F.interpolate(image, size, mode="nearest-exact")


def test_perfect_features_score_100_on_rendered_scenes_and_bilinear_ones_do_not():
    dataset = synthetic("video", val=4, size=64)
    oracle = Oracle(dataset, "video")
    config = VideoConfig(size=64, feature_size=64, radius=6, pictures=1)
    result = video(oracle.backbone, oracle.upsampler, dataset, config)
    assert {name: result.metrics[name] for name in ("j_and_f", "j", "f", "j_recall", "f_recall")} == {
        name: [100.0] for name in ("j_and_f", "j", "f", "j_recall", "f_recall")
    }
    assert result.metrics["j_decay"] == result.metrics["f_decay"] == [0.0]
    blurred = video(oracle.backbone, Interpolation("bilinear"), dataset, config)
    assert blurred.metrics["j"][0] < 90
    assert blurred.metrics["f"][0] < 90


def test_metrics_details_and_pictures():
    sequence = colours()
    result = video(BACKBONE, sharp, Dataset("moving", [], [sequence]), SMALL)
    assert list(result.metrics) == list(METRICS)
    assert result.metrics["j_and_f"] == [100.0]
    assert result.details == {"sequences": {"moving": {"j_and_f": 100.0, "j": 100.0, "f": 100.0}}}
    (row,) = result.pictures
    assert list(row) == ["image", "truth", "ours"]
    assert row["truth"].tobytes() == row["ours"].tobytes() != row["image"].tobytes()
    # The middle frame, with the object painted over.
    assert row["image"].getpixel((0, 0)) == row["truth"].getpixel((0, 0)) == (0, 0, 255)
    assert row["image"].getpixel((8, 8)) == (255, 0, 0) != row["truth"].getpixel((8, 8))


def test_first_and_last_frames_are_not_judged():
    sequence = colours()
    sequence.labels[-1] = 1 - sequence.labels[-1]
    assert video(BACKBONE, sharp, Dataset("moving", [], [sequence]), SMALL).metrics["j"] == [100.0]
    sequence.labels[-2] = 1 - sequence.labels[-2]  # one of three judged frames is then wholly wrong
    found = video(BACKBONE, sharp, Dataset("moving", [], [sequence]), SMALL).metrics
    assert found["j"][0] == pytest.approx(200 / 3)
    assert found["j_recall"][0] == pytest.approx(200 / 3)
    assert found["j_decay"][0] == pytest.approx(100 - 0)


def test_unjudged_pixels_give_no_label_and_count_nothing():
    sequence = colours()
    sequence.labels[0, 6:8, 2:10] = -1
    sequence.labels[1:, :, 20:] = -1
    result = video(BACKBONE, sharp, Dataset("moving", [], [sequence]), SMALL)
    assert result.metrics["j"] == [100.0]


def test_a_cell_without_judged_ones_around_it_has_no_label():
    features = F.normalize(torch.ones(2, 1, 9), dim=0)
    masks = torch.zeros(1, 1, 9)
    masks[..., 6:] = 1
    made = task._vote(features, [(features, masks)], VideoConfig(radius=2))
    torch.testing.assert_close(made[0, 0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1, 1]))


def plain_vote(features, context, config):
    height, width = features.shape[1:]
    masks = torch.zeros(len(context[0][1]), height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            near = []
            for keys, values in context:
                for j in range(max(0, y - config.radius), min(height, y + config.radius + 1)):
                    for i in range(max(0, x - config.radius), min(width, x + config.radius + 1)):
                        near.append((float(features[:, y, x] @ keys[:, j, i]), values[:, j, i]))
            best = sorted(near, key=lambda pair: -pair[0])[: config.top]
            weights = [math.exp(similarity / config.temperature) for similarity, _ in best]
            for weight, (_, value) in zip(weights, best, strict=True):
                masks[:, y, x] += weight / sum(weights) * value
    return masks


@pytest.mark.parametrize("top", [3, 1000])
def test_votes_against_loops_over_their_definition(monkeypatch, top):
    monkeypatch.setattr(task, "TILE", 4)
    config = VideoConfig(radius=2, top=top)
    features, *others = (F.normalize(torch.randn(6, 7, 9, dtype=torch.float64), dim=0) for _ in range(3))
    context = [(each, torch.rand(2, 7, 9, dtype=torch.float64)) for each in others]
    expected = plain_vote(features, context, config)
    torch.testing.assert_close(task._vote(features, context, config), expected, rtol=1e-9, atol=1e-12)


def test_labels_come_from_the_first_frame_and_the_last_few(monkeypatch):
    seen = []

    def spy(features, context, config):
        seen.append(len(context))
        return context[0][1]

    monkeypatch.setattr(task, "_vote", spy)
    list(propagate(BACKBONE, sharp, colours(frames=6), VideoConfig(size=24, feature_size=24, context=2)))
    assert seen == [1, 2, 3, 3, 3]


def test_labels_are_stretched_only_where_asked(monkeypatch):
    weak = torch.tensor([[[1.0, 0.7], [0.7, 1.0]], [[0.0, 0.3], [0.3, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    monkeypatch.setattr(task, "_vote", lambda features, context, config: weak)
    sequence = Frames(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([[[0, 1], [1, 2]]] * 2))
    options = {"size": 2, "feature_size": 2}
    (plain,) = propagate(BACKBONE, sharp, sequence, VideoConfig(**options, stretch=False))
    (stretched,) = propagate(BACKBONE, sharp, sequence, VideoConfig(**options))
    assert plain.tolist() == [[0, 0], [0, 0]]
    assert stretched.tolist() == [[0, 1], [1, 0]]


def test_sizes_keep_the_proportions():
    asked = []

    def spy(features, image, size):
        asked.append((tuple(features.shape[2:]), tuple(image.shape[2:]), size))
        return sharp(features, image, size)

    wide = torch.zeros(1, 3, 48, 85, dtype=torch.uint8)
    features = task._features(BACKBONE, spy, wide[0], VideoConfig(size=24, feature_size=12))
    # 85 * 24 / 48 = 42.5 columns are 10.6 patches of 4: 11.
    assert asked == [((6, 11), (24, 44), (12, 22))]
    assert features.shape == (3, 12, 22)
    tall = task._features(BACKBONE, LowResolution(), wide[0].mT, VideoConfig(size=24, feature_size=12))
    assert tall.shape == (3, 11, 6)


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="empty has no validation sequences"):
        video(BACKBONE, sharp, Dataset("empty", [], []))
    with pytest.raises(ValueError, match="moving has 2 frames and 1 objects in the first; expected at least 3"):
        video(BACKBONE, sharp, Dataset("x", [], [colours(frames=2)]), SMALL)
    blank = colours()
    blank.labels[:] = -1
    with pytest.raises(ValueError, match="5 frames and 0 objects"):
        video(BACKBONE, sharp, Dataset("x", [], [blank]), SMALL)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"temperature": -0.1}, {"context": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be positive and context 0 or more, got VideoConfig"):
        VideoConfig(**wrong)
