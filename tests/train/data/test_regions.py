"""Masks cut out of regions, against full-size masks in plain numpy."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from loftup.train.data.regions import LabelMap, RleMasks, run_lengths

HEIGHT, WIDTH = 23, 17


@pytest.fixture
def random():
    return np.random.default_rng(0)


def compressed(mask, text=True):
    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode() if text else code["counts"]}


def uncompressed(mask):
    """Runs down the columns, written the long way."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def plainly_cropped(masks, box, size):
    """Every mask at full size, one pixel after another."""
    top, left, bottom, right = box
    found = np.zeros((len(masks), *size), dtype=bool)
    for row in range(size[0]):
        for column in range(size[1]):
            y = int(np.floor(top + (row + 0.5) * (bottom - top) / size[0]))
            x = int(np.floor(left + (column + 0.5) * (right - left) / size[1]))
            found[:, row, column] = masks[:, y, x]
    return torch.from_numpy(found[found.any((1, 2))])


CROPS = [
    ((0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH)),
    ((0, 0, HEIGHT, WIDTH), (7, 5)),
    ((0, 0, HEIGHT, WIDTH), (61, 40)),
    ((3, 2, 14, 15), (11, 13)),
    ((3, 2, 14, 15), (20, 6)),
    ((22, 16, 23, 17), (3, 2)),
]


@pytest.mark.parametrize(("box", "size"), CROPS)
def test_label_maps_are_cropped_as_their_masks(random, box, size):
    labels = random.choice([0, 3, 255, 40_000], (HEIGHT, WIDTH)).astype(np.uint16)
    labels[:6, :6] = 7
    masks = LabelMap(labels)
    assert len(masks) == 5
    full = np.stack([labels == value for value in (0, 3, 7, 255, 40_000)])
    cropped = masks.crop(box, size)
    assert cropped.dtype == torch.bool
    assert torch.equal(cropped, plainly_cropped(full, box, size))
    assert torch.equal(masks.crop(box, size, keep=[4, 2, 0]), plainly_cropped(full[[4, 2, 0]], box, size))


@pytest.mark.parametrize(("box", "size"), CROPS)
@pytest.mark.parametrize("form", ["str", "bytes", "list"])
def test_rle_masks_are_cropped_as_their_masks(random, box, size, form):
    full = random.random((6, HEIGHT, WIDTH)) < np.array([0, 0.02, 0.3, 0.5, 0.97, 1])[:, None, None]
    full[2, 5:9] = True
    codes = [uncompressed(mask) if form == "list" else compressed(mask, form == "str") for mask in full]
    masks = RleMasks(codes, (HEIGHT, WIDTH))
    assert len(masks) == 6
    cropped = masks.crop(box, size)
    assert cropped.dtype == torch.bool
    assert torch.equal(cropped, plainly_cropped(full, box, size))
    assert torch.equal(masks.crop(box, size, keep=(5, 0, 2)), plainly_cropped(full[[5, 0, 2]], box, size))


def test_nearest_is_torchs_nearest_exact(random):
    labels = random.integers(0, 4, (HEIGHT, WIDTH))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].float(), (9, 31), mode="nearest-exact"
    )[0, 0]
    cropped = LabelMap(labels).crop((0, 0, HEIGHT, WIDTH), (9, 31))
    assert torch.equal(cropped, torch.stack([expected == value for value in range(4)]))


def test_no_mask_left_is_an_empty_stack():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = True
    for masks in (RleMasks([compressed(mask)], (HEIGHT, WIDTH)), LabelMap(mask.astype(np.uint8))):
        assert masks.crop((5, 5, 9, 9), (4, 4), keep=[len(masks) - 1]).shape == (0, 4, 4)
        assert masks.crop((5, 5, 9, 9), (4, 4), keep=[]).shape == (0, 4, 4)
    assert RleMasks([], (HEIGHT, WIDTH)).crop((0, 0, 9, 9), (3, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("scale", [1, 40])
def test_run_lengths_are_those_of_the_mask(random, scale):
    """At scale 40 numbers take several characters, and differences between runs are negative and large."""
    mask = np.kron(random.random((30, 20)) < 0.4, np.ones((scale, scale), dtype=bool))
    expected = uncompressed(mask)["counts"]
    assert run_lengths(compressed(mask)["counts"]).tolist() == expected
    assert run_lengths(expected).tolist() == expected
    assert np.array_equal(coco.decode(coco.frPyObjects(uncompressed(mask), *mask.shape)), mask)


def test_codes_survive_json(random):
    mask = random.random((HEIGHT, WIDTH)) < 0.5
    masks = RleMasks(json.loads(json.dumps([compressed(mask), uncompressed(mask)])), (HEIGHT, WIDTH))
    assert torch.equal(masks.crop((0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH)), torch.from_numpy(np.stack([mask, mask])))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ({"size": [2, 3], "counts": [2, 3]}, "mask 1: run lengths add up to 5, expected 2 x 3 = 6"),
        ({"size": [2, 3], "counts": [2, 5]}, "run lengths add up to 7, expected 2 x 3 = 6"),
        ({"size": [2, 3], "counts": [8, -2]}, "run lengths add up to 6"),
        ({"size": [2, 3], "counts": "23"}, "run lengths add up to 5"),
        ({"size": [2, 3], "counts": "T"}, "the counts of 1 characters are empty, truncated or no run-length code"),
        ({"size": [2, 3], "counts": ""}, "the counts of 0 characters are empty"),
        ({"size": [2, 3], "counts": "2!"}, "the counts of 2 characters"),
        ({"size": [2, 3], "counts": "2\xff"}, "the counts of 3 characters"),
        ({"size": [2, 3], "counts": "o" * 12 + "0"}, "a number of more than 60 bits"),
        ({"size": [2, 3], "counts": "o" * 9 + "0"}, "a number of more than 40 bits"),
        ({"size": [2, 3], "counts": [2**63 - 1, 2**63 - 1, 8]}, f"run lengths add up to {2**64 + 6}, expected 2 x 3"),
        ({"size": [2, 3], "counts": [2**62] * 4 + [6]}, f"run lengths add up to {2**64 + 6}"),
        ({"size": [2, 3], "counts": [2**63]}, f"the counts hold {2**63}, a number of more than 63 bits"),
        ({"size": [2, 3], "counts": [2**64, 6]}, "a list of whole numbers"),
        ({"size": [2, 3], "counts": []}, "expected counts as a string or a list of whole numbers, got '[]'"),
        ({"size": [2, 3], "counts": [2.5, 3.5]}, "list of whole numbers, got '[2.5, 3.5]'"),
        ({"size": [2, 3], "counts": None}, "list of whole numbers, got 'None'"),
        ({"size": [3, 2], "counts": [6]}, "a run-length code of size [3, 2], expected [2, 3]"),
        ({"counts": [6]}, "expected a run-length code with size and counts, got {'counts': [6]}"),
        ([[1.0, 2.0, 3.0, 4.0]], "expected a run-length code with size and counts, got [[1.0, 2.0, 3.0, 4.0]]"),
    ],
)
def test_damaged_codes_are_refused(code, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        RleMasks([{"size": [2, 3], "counts": [6]}, code], (2, 3))
    assert text in str(caught.value)


@pytest.mark.parametrize("make", [lambda: LabelMap(np.ones((4, 5), int)), lambda: RleMasks([], (4, 5))])
def test_wrong_regions_are_refused(make):
    masks = make()
    for box in ((0, 0, 5, 5), (-1, 0, 4, 5), (2, 0, 2, 5), (0, 3, 4, 3), (0, 0, 4, 6)):
        with pytest.raises(ValueError, match=r"is empty or leaves the picture 4x5"):
            masks.crop(box, (2, 2))
    with pytest.raises(ValueError, match=r"size must be positive, got \(2, 0\)"):
        masks.crop((0, 0, 4, 5), (2, 0))
    for keep in ([-1], [len(masks)]):
        with pytest.raises(IndexError, match=rf"keep asks for mask {keep[0]}..{keep[0]}, there are {len(masks)}"):
            masks.crop((0, 0, 4, 5), (2, 2), keep)


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (np.ones((2, 3, 1), int), ValueError, r"must be \(H, W\) and not empty, got \(2, 3, 1\)"),
        (np.ones((0, 3), int), ValueError, r"not empty, got \(0, 3\)"),
        (np.ones((2, 3)), TypeError, "must hold integers, got float64"),
    ],
)
def test_wrong_label_maps_are_refused(labels, error, text):
    with pytest.raises(error, match=text):
        LabelMap(labels)


def test_a_tensor_is_a_label_map():
    assert len(LabelMap(torch.tensor([[1, 2], [2, 5]]))) == 3


def test_boxes_of_fractions_of_pixels():
    labels = np.arange(8)[None].repeat(2, 0)
    masks = RleMasks([compressed(labels == value) for value in range(8)], (2, 8))
    for box, seen in [((0, 0.5, 2, 4.5), [1, 2, 3, 4]), ((0.5, 1.25, 1.5, 2.5), [1, 1, 2, 2]), ((0, 7.9, 2, 8), [7])]:
        crop = LabelMap(labels).crop(box, (1, len(seen)))
        assert [sorted(set(seen))[int(column.nonzero())] for column in crop[:, 0].mT] == seen
        found = {tuple(mask.flatten().tolist()) for mask in masks.crop(box, (1, len(seen)))}
        assert found == {tuple(mask.flatten().tolist()) for mask in crop}
