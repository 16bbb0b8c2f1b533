"""Views of pictures whose colours tell where they come from; the same batches whoever makes them."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from small_config import configured

from loftup import LoftUpError
from loftup.train.config import TrainConfig
from loftup.train.data.cache import FeatureCache
from loftup.train.data.plan import make_plan
from loftup.train.data.sources import LabelMap, Picture, UnreadableError
from loftup.train.data.views import TrainingViews, collate

HEIGHT, WIDTH, PATCH = 200, 240, 16


def ramp():
    """A picture whose red is the row and whose green the column."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 7)]).byte()


class Ramps:
    """A source of ramps; masks are the rows above 100, the rest, and a frame of nothing."""

    def __init__(self, count=5, broken=(), bare=()):
        self.count, self.broken, self.bare = count, set(broken), set(bare)
        self.masks = LabelMap((np.arange(HEIGHT)[:, None] >= 100) * np.ones((1, WIDTH), dtype=int))

    def __len__(self):
        return self.count

    def read(self, index, generator):
        if index in self.broken:
            raise UnreadableError(f"cannot read {index}.jpg: truncated")
        return Picture(f"{index}.jpg", ramp(), NoMasks() if index in self.bare else self.masks)


class NoMasks:
    def __len__(self):
        return 0

    def crop(self, box, size, keep=None):
        return torch.zeros(0, *size, dtype=torch.bool)


class Stripes(NoMasks):
    """Of 20 masks the odd ones are outside of every crop; mask i has i + 1 pixels."""

    def __len__(self):
        return 20

    def crop(self, box, size, keep=None):
        assert keep is None
        return torch.stack([torch.arange(size[0] * size[1]).view(size) <= i for i in range(0, 20, 2)])


def config(**settings):
    made = TrainConfig(batch=2, steps=4)
    made.data.workers = 0
    made.data.sizes = [64]
    made.objective.mask_bicubic.weight = 1.0
    return configured(made, **settings)


def everything(**settings):
    return config(
        objective__self_distillation__weight=1.0,
        objective__high_resolution__weight=1.0,
        window=32,
        **settings,
    )


def view_of(sample, mirrored):
    """Top, left and side of a sample's view, read off its colours by fitting lines."""
    size = sample.image.shape[-1]
    inner = slice(size // 4, size - size // 4)
    centres = (torch.arange(size) + 0.5)[inner].double()

    def line(values):
        slope = ((centres - centres.mean()) * (values - values.mean())).sum() / (
            centres - centres.mean()
        ).square().sum()
        return float(values.mean() - slope * centres.mean()), float(slope)

    pixels = sample.image.double() * 255
    top, down = line(pixels[0][inner][:, inner].mean(1))
    left, right = line(pixels[1][inner][:, inner].mean(0))
    assert down == pytest.approx(abs(right), abs=0.01)
    assert (right < 0) == mirrored
    side = down * size
    return top + 0.5, left + 0.5 - (side if mirrored else 0), side


def expected_ramp(view, box, whole, size, mirrored):
    """Rows and columns of the picture at the pixel centres of a box of a view."""
    top, left, side = view
    scale = side / whole
    rows = top + scale * (box[0] + (box[2] - box[0]) * (torch.arange(size) + 0.5) / size) - 0.5
    columns = scale * (box[1] + (box[3] - box[1]) * (torch.arange(size) + 0.5) / size)
    columns = left + (side - columns if mirrored else columns) - 0.5
    return rows, columns


def assert_shows(image, rows, columns):
    # The filter repeats pixels at the picture's border; elsewhere only rounding to 8 bits is left, and that of the fit.
    pixels = image * 255
    for channel, values in ((pixels[0], rows[:, None]), (pixels[1], columns[None])):
        inside = (values > 6) & (values < (HEIGHT - 7 if channel is pixels[0] else WIDTH - 7))
        error = (channel - values).abs() * inside
        assert error.max() < 1.5
    assert ((pixels[2] - 7).abs() < 0.6).all()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_all_views_show_the_same_place(mirrored, ratio):
    made = everything(data__flip=float(mirrored), data__ratios=[ratio], data__sizes=[128])
    views = TrainingViews(Ramps(), made, PATCH)
    for step in range(4):
        plan, sample = make_plan(made, PATCH, step), views[step, 0]
        view, whole = view_of(sample, mirrored), (0, 0, plan.output, plan.output)
        assert sample.image.shape == (3, 128, 128)
        assert_shows(sample.image, *expected_ramp(view, whole, plan.output, 128, mirrored))
        assert sample.guidance.shape == (3, plan.output, plan.output)
        assert_shows(sample.guidance, *expected_ramp(view, whole, plan.output, plan.output, mirrored))
        assert sample.large.shape == (3, 128 * plan.factor, 128 * plan.factor)
        assert_shows(sample.large, *expected_ramp(view, whole, plan.output, 128 * plan.factor, mirrored))
        rows, _ = expected_ramp(view, whole, plan.output, plan.output, mirrored)
        assert_masks(sample.masks, rows, view[2] / plan.output)
        for box, (image, masks) in zip(plan.crops, sample.crops, strict=True):
            rows, columns = expected_ramp(view, box, plan.output, 128, mirrored)
            assert image.shape == (3, 128, 128)
            assert_shows(image, rows, columns)
            assert_masks(masks, rows, 1.0)


def assert_masks(masks, rows, step):
    """Masks split the rows of the picture at 100, give or take a row and a rounding."""
    assert masks.dtype == torch.bool
    below = rows > 99.5
    sure = (rows - 99.5).abs() > 1 + step
    if not sure.all() and len(masks) < 2:
        return
    expected = [part for part in (~below, below) if (part & sure).any()]
    assert len(masks) >= len(expected)
    if len(masks) == 2:
        assert (masks[1].all(1) == below)[sure].all()
        assert (masks[0] ^ masks[1]).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_enlarged_part_shows_its_region(mirrored):
    made = everything(data__flip=float(mirrored), data__sizes=[128], objective__high_resolution__crop=True)
    views = TrainingViews(Ramps(), made, PATCH)
    for step in range(4):
        plan, sample = make_plan(made, PATCH, step), views[step, 0]
        view = view_of(sample, mirrored)
        assert sample.large.shape == (3, 128, 128)
        assert_shows(sample.large, *expected_ramp(view, plan.region, plan.factor * 8, 128, mirrored))


def test_mirrored_masks_follow_the_picture():
    class Left(Ramps):
        def __init__(self):
            super().__init__()
            self.masks = LabelMap((np.arange(WIDTH)[None] >= 120) * np.ones((HEIGHT, 1), dtype=int))

    views = TrainingViews(Left(), config(data__flip=1.0, data__scale=[0.9, 1.0]), PATCH)
    sample = views[0, 0]
    columns = sample.image[1] * 255
    sure = (columns - 119.5).abs() > 4
    assert sample.masks.shape == (2, 64, 64)
    assert (sample.masks[1] == (columns > 119.5))[sure].all()
    assert sample.masks[1][0].long().diff().abs().sum() == 1


def test_only_what_the_terms_need_is_made():
    sample = TrainingViews(Ramps(), config(objective__mask_bicubic__weight=0.0), PATCH)[0, 0]
    assert sample.masks.shape == (0, 64, 64)
    assert (sample.crops, sample.large, sample.features, sample.key) == ([], None, None, None)
    assert sample.guidance is sample.image
    assert not sample.empty

    options = {"objective__mask_bicubic__weight": 0.0, "objective__self_distillation__weight": 1.0}
    refined = TrainingViews(Ramps(), config(**options), PATCH)[0, 0]
    assert all(len(masks) for _, masks in refined.crops)
    plain = TrainingViews(Ramps(), config(**options, objective__self_distillation__refine=False), PATCH)[0, 0]
    assert len(plain.crops) == 2
    assert all(masks.shape == (0, 64, 64) for _, masks in plain.crops)


def test_values_are_between_nothing_and_one():
    class Checkers(Ramps):
        def read(self, index, generator):
            image = (torch.arange(HEIGHT)[:, None] // 5 + torch.arange(WIDTH) // 5) % 2 * 255
            return Picture("checkers", image.expand(3, -1, -1).byte(), self.masks)

    sample = TrainingViews(Checkers(), config(data__sizes=[512]), PATCH)[0, 0]
    assert sample.image.dtype == torch.float32
    assert sample.image.min() == 0
    assert sample.image.max() == 1


def test_tiny_pictures():
    class Tiny(Ramps):
        def read(self, index, generator):
            return Picture("tiny", torch.full((3, 1, 2), 51, dtype=torch.uint8), LabelMap(np.array([[1, 2]])))

    views = TrainingViews(Tiny(), everything(data__scale=[0.1, 1.0]), PATCH)
    for step in range(5):
        sample = views[step, 0]
        assert (sample.image == 0.2).all()
        assert len(sample.masks) in (1, 2)
        assert all(len(masks) for _, masks in sample.crops)


def test_too_many_masks_are_thinned_at_random_in_their_order():
    class Striped(Ramps):
        def __init__(self):
            super().__init__()
            self.masks = Stripes()

    def chosen(limit, slot):
        masks = TrainingViews(Striped(), config(objective__mask_bicubic__masks=limit), PATCH)[0, slot].masks
        assert masks.shape[1:] == (64, 64)
        return (masks.sum((1, 2)) - 1).tolist()

    # Masks outside of the crop do not count.
    found = [chosen(6, slot) for slot in range(4)]
    assert all(len(set(kept)) == 6 and kept == sorted(kept) and set(kept) <= set(range(0, 20, 2)) for kept in found)
    assert len(set(map(tuple, found))) > 1
    assert set().union(*found) == set(range(0, 20, 2))
    assert chosen(10, 0) == list(range(0, 20, 2))


class TestOrder:
    def test_every_epoch_shows_every_picture_once_in_its_own_order(self):
        views = TrainingViews(Ramps(5), config(), PATCH)
        names = [views[step, slot].name for step in range(10) for slot in range(2)]
        epochs = [names[i : i + 5] for i in range(0, 20, 5)]
        assert all(sorted(epoch) == [f"{i}.jpg" for i in range(5)] for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1

    def test_going_back_and_forth_changes_nothing(self):
        views = TrainingViews(Ramps(5), config(), PATCH)
        forth = [views[step, 1].name for step in range(8)]
        assert [views[step, 1].name for step in reversed(range(8))] == forth[::-1]

    def test_more_processes_share_the_pictures_of_larger_batches(self):
        one = TrainingViews(Ramps(7), config(batch=4), PATCH)
        two = TrainingViews(Ramps(7), config(batch=2), PATCH, world=2)
        accumulated = TrainingViews(Ramps(7), config(batch=2, accumulate=2), PATCH)
        for step, slot in itertools.product(range(3), range(4)):
            for other in (two, accumulated):
                assert one[step, slot].name == other[step, slot].name
                assert one[step, slot].image.equal(other[step, slot].image)

    def test_slots_and_steps_draw_their_own_views(self):
        views = TrainingViews(Ramps(1), config(), PATCH)
        images = [views[step, slot].image for step in range(3) for slot in range(2)]
        assert all(not a.equal(b) for a, b in itertools.combinations(images, 2))

    def test_the_seed_decides_and_the_global_state_does_not(self):
        first = TrainingViews(Ramps(), everything(), PATCH)[1, 1]
        torch.rand(3)
        again = TrainingViews(Ramps(), everything(), PATCH)[1, 1]
        other = TrainingViews(Ramps(), everything(seed=1), PATCH)[1, 1]
        assert first.image.equal(again.image)
        assert first.large.equal(again.large)
        assert not first.image.equal(other.image)

    def test_views_can_be_sent_to_another_process(self):
        views = TrainingViews(Ramps(), everything(), PATCH)
        views[3, 1]
        assert pickle.loads(pickle.dumps(views))[1, 1].image.equal(views[1, 1].image)


class TestFixedViews:
    def test_as_many_views_of_a_picture_as_asked_for(self):
        views = TrainingViews(Ramps(1), config(data__views=3), PATCH)
        seen = {views[step, slot].image.numpy().tobytes() for step in range(20) for slot in range(2)}
        assert len(seen) == 3

    def test_each_picture_has_its_own(self):
        views = TrainingViews(Ramps(2), config(data__views=1), PATCH)
        samples = [views[step, slot] for step in range(6) for slot in range(2)]
        assert len({(s.name, s.image.numpy().tobytes()) for s in samples}) == 2
        assert len({s.image.numpy().tobytes() for s in samples}) == 2

    def test_cached_features_come_with_their_samples(self, tmp_path):
        cache = FeatureCache(tmp_path)
        views = TrainingViews(Ramps(1), config(data__views=1), PATCH, caches=[cache])
        missed = collate([views[0, 0], views[0, 1]])
        assert missed.features == [None, None]
        assert missed.keys[0] == missed.keys[1] == cache.key(missed.image[0])
        cache.write(missed.keys[0], torch.ones(4, 2, 2))
        assert views[1, 0].features.equal(torch.ones(4, 2, 2))


class TestBadPictures:
    def test_an_unreadable_picture_is_replaced_and_said(self):
        views = TrainingViews(Ramps(4, broken=[2]), config(), PATCH)
        samples = [views[step, slot] for step in range(2) for slot in range(2)]
        replaced = [s for s in samples if s.unreadable]
        assert len(replaced) == 1
        assert set(replaced[0].unreadable) == {"cannot read 2.jpg: truncated"}
        assert replaced[0].name != "2.jpg"
        batch = collate(samples)
        assert batch.skipped == len(replaced[0].unreadable)
        assert batch.unreadable == replaced[0].unreadable
        again = TrainingViews(Ramps(4, broken=[2]), config(), PATCH)
        assert [again[step, slot].name for step in range(2) for slot in range(2)] == [s.name for s in samples]

    def test_ten_in_a_row_are_too_many(self):
        views = TrainingViews(Ramps(3, broken=[0, 1, 2]), config(), PATCH)
        with pytest.raises(
            LoftUpError, match=r"10 pictures in a row cannot be read; the last: cannot read \d.jpg: trunc"
        ):
            views[0, 0]

    def test_pictures_without_masks_are_counted(self):
        batch = collate([TrainingViews(Ramps(2, bare=[0, 1]), everything(), PATCH)[0, slot] for slot in range(2)])
        assert batch.empty == 2
        assert all(masks.shape == (0, 64, 64) for masks in batch.masks)
        bare = TrainingViews(Ramps(2, bare=[0]), everything(), PATCH)
        assert collate([bare[0, slot] for slot in range(2)]).empty == 1
        unmasked = config(objective__mask_bicubic__weight=0.0, objective__total_variation__weight=1.0)
        assert not TrainingViews(Ramps(1, bare=[0]), unmasked, PATCH)[0, 0].empty


class TestCollate:
    def test_stacks_what_is_there(self):
        views = TrainingViews(Ramps(), everything(data__ratios=[2.0]), PATCH)
        samples = [views[2, slot] for slot in range(3)]
        batch, plan = collate(samples), samples[0].plan
        assert batch.step == 2
        assert batch.names == [s.name for s in samples]
        assert batch.image.shape == (3, 3, 64, 64)
        assert batch.guidance.shape == (3, 3, 128, 128)
        assert [m.shape[1:] for m in batch.masks] == [(128, 128)] * 3
        assert batch.large.shape == (3, 3, 64 * plan.factor, 64 * plan.factor)
        assert (batch.window, batch.factor, batch.region) == (plan.window, plan.factor, plan.region)
        assert [crop.box for crop in batch.crops] == list(plan.crops)
        for index, crop in enumerate(batch.crops):
            assert crop.image.equal(torch.stack([s.crops[index][0] for s in samples]))
            assert all(m.equal(s.crops[index][1]) for m, s in zip(crop.masks, samples, strict=True))
        assert (batch.features, batch.keys) == ([], [])

    def test_equal_sizes_share_the_image(self):
        views = TrainingViews(Ramps(), config(), PATCH)
        batch = collate([views[0, 0], views[0, 1]])
        assert batch.guidance is batch.image
        assert batch.large is None

    def test_goes_to_a_device(self):
        views = TrainingViews(Ramps(), everything(), PATCH)
        batch = collate([views[0, 0], views[0, 1]])
        batch.features = [None, torch.zeros(2)]
        moved = batch.to("meta")
        tensors = [moved.image, moved.guidance, moved.large, *moved.masks, moved.features[1]]
        tensors += [t for crop in moved.crops for t in (crop.image, *crop.masks)]
        assert all(t.device.type == "meta" for t in tensors)
        assert moved.guidance is moved.image
        assert moved.features[0] is None
        assert (moved.step, moved.names, moved.window) == (batch.step, batch.names, batch.window)
        assert batch.image.device.type == "cpu"


@pytest.mark.parametrize(
    ("ratio", "oversampling", "factor"), [(1.0, 4, 1), (0.5, 1, 1), (0.5, 2, 2), (0.25, 2, 2), (0.25, 4, 4)]
)
def test_guidance_holds_the_pictures_own_pixels(ratio, oversampling, factor):
    """As many of them for an output pixel as the network looks at."""
    settings = {"model__oversampling": oversampling, "model__architecture": "any"}
    made = configured(TrainConfig(batch=1), data__sizes=[32], data__ratios=[ratio], **settings)
    sample = TrainingViews(Ramps(), made, 4)[0, 0]
    side = round(32 * ratio)
    assert sample.guidance.shape == (3 * factor**2, side, side)
    if side * factor == 32:
        assert torch.equal(torch.nn.functional.pixel_shuffle(sample.guidance, factor), sample.image)
