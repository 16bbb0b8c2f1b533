"""Batches from files: the same whoever makes them, and errors that say what is wrong."""

import numpy as np
import pytest
import torch
from material import ROOT
from PIL import Image
from small_config import configured
from torch import nn

from loftup import Backbone, LoftUpError
from loftup.train.config import TrainConfig
from loftup.train.data.loader import StepSampler, loader, open_data
from loftup.train.data.sources import ImageFolder, Several


def config(**settings):
    made = TrainConfig(batch=2, steps=4)
    made.data.workers = 0
    made.data.sizes = [64]
    made.objective.mask_bicubic.weight = 1.0
    return configured(made, **settings)


class TestStepSampler:
    def test_lists_steps_and_slots(self):
        sampler = StepSampler(config(batch=2, steps=2))
        assert list(sampler) == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
        assert len(sampler) == 2

    def test_processes_and_micro_batches_share_the_slots(self):
        made = config(batch=2, steps=3, accumulate=2)
        lists = [list(StepSampler(made, first_step=2, rank=rank, world=2)) for rank in range(2)]
        assert lists[0] == [[(2, 0), (2, 1)], [(2, 4), (2, 5)]]
        assert lists[1] == [[(2, 2), (2, 3)], [(2, 6), (2, 7)]]
        assert len(StepSampler(made, first_step=2, rank=1, world=2)) == 2

    def test_a_finished_run_has_nothing_left(self):
        assert list(StepSampler(config(steps=3), first_step=3)) == []
        assert len(StepSampler(config(steps=3), first_step=5)) == 0


@pytest.fixture
def folder(tmp_path):
    """Three pictures with label maps."""
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.jpg")
        Image.fromarray((np.arange(50)[None] // 10 * np.ones((40, 1))).astype(np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def backbone():
    return Backbone(nn.Identity(), lambda x: x[:, :, ::16, ::16], channels=3, patch_size=16).eval()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.step == other.step
        assert one.names == other.names
        assert one.image.equal(other.image)
        assert all(a.equal(b) for a, b in zip(one.masks, other.masks, strict=True))


class TestLoader:
    def test_workers_change_nothing(self, folder):
        made = config(data__path=[str(folder)], batch=2, steps=3)
        alone = list(loader(made, backbone()))
        assert [batch.step for batch in alone] == [0, 1, 2]
        assert {len(m) for batch in alone for m in batch.masks} <= {3, 4, 5}
        made.data.workers = 2
        batches = loader(made, backbone())
        assert batches.persistent_workers
        assert_same(list(batches), alone)

    def test_a_resumed_run_goes_on_where_it_was(self, folder):
        made = config(data__path=[str(folder)], steps=4)
        assert_same(list(loader(made, backbone(), first_step=2)), list(loader(made, backbone()))[2:])

    def test_processes_share_the_batch(self, folder):
        whole = list(loader(config(data__path=[str(folder)], batch=4, steps=2), backbone()))
        halves = config(data__path=[str(folder)], batch=2, steps=2)
        parts = [list(loader(halves, backbone(), rank=rank, world=2)) for rank in range(2)]
        for step in range(2):
            images = torch.cat([parts[rank][step].image for rank in range(2)])
            assert images.equal(whole[step].image)

    def test_leaves_the_global_random_state(self, folder):
        state = torch.get_rng_state()
        list(loader(config(data__path=[str(folder)], steps=1), backbone()))
        assert torch.get_rng_state().equal(state)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_errors_are_the_same_from_workers(self, folder, workers):
        for file in folder.glob("*.jpg"):
            file.write_bytes(b"")
        made = config(data__path=[str(folder)], data__workers=workers, steps=1)
        batches = iter(loader(made, backbone()))
        with pytest.raises(LoftUpError) as caught:
            next(batches)
        assert str(caught.value).startswith("10 pictures in a row cannot be read; the last: cannot read the image")
        assert str(caught.value).endswith("Check data.path")
        assert batches._num_workers == workers

    def test_masks_are_made_only_for_terms_that_take_them(self, folder, monkeypatch):
        def refuse(*arguments, **options):
            raise LoftUpError("masks were asked for")

        monkeypatch.setattr("loftup.train.data.sources.felzenszwalb_map", refuse)
        options = {"data__path": [str(folder)], "data__kind": "images", "steps": 1}
        total = {"objective__mask_bicubic__weight": 0.0, "objective__total_variation__weight": 1.0}
        (batch,) = loader(config(**options, **total), backbone())
        assert batch.image.shape == (2, 3, 64, 64)
        with pytest.raises(LoftUpError, match="masks were asked for"):
            list(loader(config(**options), backbone()))

    def test_sizes_that_do_not_fit_are_refused(self, folder):
        with pytest.raises(
            LoftUpError, match="data.sizes holds 100; expected multiples of the backbone's patch size 16"
        ):
            loader(config(data__path=[str(folder)], data__sizes=[100]), backbone())


class TestOpenData:
    def test_one_folder_or_several(self, folder):
        assert len(open_data([str(folder)], "auto", [1.0])) == 3
        several = open_data([str(folder), str(folder)], "labels", [1.0])
        assert isinstance(several, Several)
        assert len(several) == 6

    def test_scales_reach_plain_pictures(self, folder):
        for file in folder.glob("*.png"):
            file.unlink()
        source = open_data([str(folder)], "auto", [30.0, 60.0])
        assert isinstance(source, ImageFolder)
        assert source.scales == [30.0, 60.0]

    def test_refuses_nothing(self):
        with pytest.raises(
            LoftUpError, match="data.path is empty; expected a folder of pictures or shards, or several"
        ):
            open_data([], "auto", [1.0])
        with pytest.raises(LoftUpError, match="no folder"):
            open_data([str(ROOT / "no such folder")], "auto", [1.0])
