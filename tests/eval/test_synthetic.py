"""Rendered scenes are what they say, and the oracle knows them."""

import pytest
import torch
import torch.nn.functional as F

from loftup import LoftUpError
from loftup.eval.datasets.synthetic import CLASSES, COLOURS, FOCAL, SyntheticVideo, render, synthetic
from loftup.eval.oracle import Oracle


def test_scenes_are_told_by_their_seed():
    first, again, other = render(4, 64), render(4, 64), render(5, 64)
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert first.image.dtype == torch.uint8
    assert len(CLASSES) == len(COLOURS) == 8


def test_geometry_is_consistent():
    for seed in range(8):
        scene = render(seed, 96)
        assert scene.depth.isfinite().all()
        assert (scene.normals.norm(dim=0) - 1).abs().max() < 1e-5
        # Every surface that is seen faces the camera, and what is in front hides what is behind.
        axis = (torch.arange(96) + 0.5) / 96 - 0.5
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        rays = torch.stack([x / FOCAL, y / FOCAL, torch.ones_like(x)])
        balls = scene.classes == CLASSES.index("ball")
        assert ((scene.normals * rays).sum(0)[~balls] < 1e-4).all()
        assert (scene.normals[2][balls] <= 0).all()
        background = torch.where(y > 0, FOCAL / y.clamp(min=1e-6), 1e9).clamp(max=7)
        assert (scene.depth <= background + 1e-4).all()
        assert torch.equal(scene.depth[scene.objects == 0], background[scene.objects == 0])
        assert torch.equal(scene.objects == 0, scene.classes < 2)
        for number in scene.objects.unique()[1:]:
            assert len(scene.classes[scene.objects == number].unique()) == 1


def test_splits_are_different_scenes_of_the_wanted_size():
    dataset = synthetic("segmentation", train=3, val=2, size=48)
    assert (len(dataset.train), len(dataset.val)) == (3, 2)
    names = [sample.name for sample in (*dataset.train, *dataset.val)]
    assert len(set(names)) == 5
    assert dataset.train[-1].name == dataset.train[2].name
    assert dataset.train[0].image.shape == (3, 48, 48)
    with pytest.raises(IndexError):
        dataset.train[3]
    with pytest.raises(ValueError, match="no scenes for the task 'tracking'"):
        synthetic("tracking")


def test_videos_move_and_number_the_objects_of_the_first_frame():
    video = synthetic("video", val=4, size=64).val[0]
    assert isinstance(video, SyntheticVideo)
    assert len(video) == 10
    first, last = video.annotation(0), video.annotation(9)
    numbers = first.unique().tolist()
    assert numbers == list(range(len(numbers)))
    assert not torch.equal(first, last)
    assert not torch.equal(video.frame(0), video.frame(1))


def test_interactive_scenes_have_an_object():
    for sample in synthetic("interactive", train=12, val=4, size=48).train:
        assert 0.01 <= float(sample.mask.float().mean()) < 0.6


@pytest.mark.parametrize("task", ["segmentation", "open_vocabulary", "depth", "normals", "video", "interactive"])
def test_the_oracle_gives_cell_means_and_the_truth(task):
    dataset = synthetic(task, train=2, val=4, size=32)
    oracle = Oracle(dataset, task)
    sample = dataset.val[0]
    image = (sample.frame(3) if task == "video" else sample.image)[None] / 255
    low, dense = oracle.backbone(image), None
    dense = oracle.upsampler(low, image, (32, 32))
    assert low.shape == (1, oracle.backbone.channels, 2, 2)
    assert torch.allclose(low, F.avg_pool2d(dense, 16))
    if task == "depth":
        assert torch.equal(dense[0, 0], sample.depth)
    elif task == "normals":
        assert torch.equal(dense[0], sample.normals)
    else:
        truth = {"video": lambda: sample.annotation(3), "interactive": lambda: sample.mask}.get(
            task, lambda: sample.labels
        )()
        assert torch.equal(dense[0].argmax(0), truth)
    assert oracle.upsampler(low, image, (16, 16)).shape == (1, oracle.backbone.channels, 16, 16)
    with pytest.raises(LoftUpError, match="knows the pictures of its dataset in their own size alone"):
        oracle.backbone(torch.rand(1, 3, 32, 32))
