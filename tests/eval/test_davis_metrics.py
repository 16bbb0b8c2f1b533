"""J and F on masks small enough to be worked out by hand, and against plain loops over the definition."""

import math
import sys

import pytest
import torch

from loftup import LoftUpError
from loftup.eval.tasks.davis_metrics import boundary_f, boundary_map, jaccard, object_statistics


def mask(*rows):
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def box(top, left, height, width, size=(40, 40)):
    made = torch.zeros(size, dtype=torch.bool)
    made[top : top + height, left : left + width] = True
    return made


EMPTY, FULL = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
PIXEL = box(1, 1, 1, 1, (4, 4))


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (EMPTY, EMPTY, 1.0),
        (FULL, FULL, 1.0),
        (EMPTY, FULL, 0.0),
        (FULL, EMPTY, 0.0),
        (PIXEL, PIXEL, 1.0),
        (PIXEL, EMPTY, 0.0),
        (PIXEL, FULL, 1 / 16),
        (box(0, 0, 2, 4, (4, 4)), box(1, 0, 2, 4, (4, 4)), 4 / 12),
        (box(0, 0, 2, 2, (4, 4)), box(2, 2, 2, 2, (4, 4)), 0.0),
        (box(0, 0, 4, 3, (4, 4)), box(0, 1, 4, 3, (4, 4)), 8 / 16),
    ],
)
def test_j_by_hand(prediction, truth, expected):
    assert jaccard(prediction, truth) == pytest.approx(expected, abs=1e-15)


def test_j_leaves_out_void():
    # Of the truth's 8 pixels 4 are void, of the prediction's 4 others none: 4 right of 4 + 4.
    truth, void = box(0, 0, 2, 4, (4, 4)), box(0, 0, 1, 4, (4, 4))
    assert jaccard(box(1, 0, 2, 4, (4, 4)), truth, void) == 4 / 8
    assert jaccard(truth, EMPTY, box(0, 0, 2, 4, (4, 4))) == 1.0


@pytest.mark.parametrize(
    ("filled", "edge"),
    [
        # A pixel differs from what is right of it, below it or below right of it: its upper left neighbours do.
        (("....", ".#..", "....", "...."), ("##..", "##..", "....", "....")),
        # The last column looks down, the last row looks right, the last pixel at nothing.
        (("....", "....", "....", "...#"), ("....", "....", "..##", "..#.")),
        (("####", "####", "####", "####"), ("....", "....", "....", "....")),
        (("##..", "##..", "##..", "##.."), (".#..", ".#..", ".#..", ".#..")),
        (("....", "####", "####", "...."), ("####", "....", "####", "....")),
    ],
)
def test_the_boundary_of_a_mask(filled, edge):
    assert torch.equal(boundary_map(mask(*filled)), mask(*edge))


COLUMNS = box(0, 0, 40, 20)  # its boundary is column 19, all 40 rows of it


@pytest.mark.parametrize(
    ("prediction", "truth", "bound_th", "expected"),
    [
        (EMPTY, EMPTY, 0.008, 1.0),
        (FULL, FULL, 0.008, 1.0),
        (EMPTY, FULL, 0.008, 1.0),  # neither has a boundary
        (PIXEL, EMPTY, 0.008, 0.0),
        (EMPTY, PIXEL, 0.008, 0.0),
        (PIXEL, FULL, 0.008, 0.0),
        (PIXEL, PIXEL, 0.008, 1.0),
        # 40 x 40: the diagonal is 56.6 pixels, 0.008 of it 0.45, so the tolerance is 1 pixel.
        (box(0, 0, 40, 21), COLUMNS, 0.008, 1.0),
        (box(0, 0, 40, 22), COLUMNS, 0.008, 0.0),
        (box(0, 0, 40, 22), COLUMNS, 2, 1.0),
        (box(0, 0, 40, 22), COLUMNS, 0.03, 1.0),  # 1.7 pixels, rounded up
        # Half of the truth's rows are found, and all that is found is right but for the lower end: the prediction's
        # boundary is column 19 of 20 rows and row 19's columns 0..18; of the latter only column 18 is near.
        (box(0, 0, 20, 20), COLUMNS, 0.008, 2 * (21 / 39) * (21 / 40) / (21 / 39 + 21 / 40)),
        # One pixel's boundary is 2 x 2 pixels; a pixel further along both axes 1 of 4 is in place, 2 are beside.
        (box(11, 11, 1, 1), box(10, 10, 1, 1), 0.008, 3 / 4),
    ],
)
def test_f_by_hand(prediction, truth, bound_th, expected):
    assert boundary_f(prediction, truth, bound_th=bound_th) == pytest.approx(expected, abs=1e-12)


def test_f_takes_void_out_of_both_masks():
    right = box(0, 20, 40, 20)
    assert boundary_f(COLUMNS | right, COLUMNS) == 0.0
    assert boundary_f(COLUMNS | right, COLUMNS, right) == 1.0


def plain_f(prediction, truth, radius):
    def edges(m):
        height, width = len(m), len(m[0])
        found = []
        for y in range(height):
            for x in range(width):
                neighbours = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (1, 1))]
                inside = [(j, i) for j, i in neighbours if j < height and i < width]
                if any(m[j][i] != m[y][x] for j, i in inside):
                    found.append((y, x))
        return found

    def share(of, near):
        return sum(any((y - j) ** 2 + (x - i) ** 2 <= radius**2 for j, i in near) for y, x in of) / len(of)

    ours, theirs = edges(prediction.tolist()), edges(truth.tolist())
    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall)


def test_f_against_loops_over_its_definition():
    for radius in (1, 2, 3):
        generator = torch.Generator().manual_seed(radius)
        prediction, truth = (torch.rand(2, 11, 14, generator=generator) > 0.8).unbind()
        assert boundary_f(prediction, truth, bound_th=radius) == pytest.approx(plain_f(prediction, truth, radius))


def test_masks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"one size \(H, W\), got prediction torch.bool \(4, 4\), truth .*\(40, 40\)"):
        jaccard(EMPTY, COLUMNS)
    with pytest.raises(ValueError, match="masks must be bool .*prediction torch.int64"):
        boundary_f(EMPTY.long(), EMPTY)
    with pytest.raises(ValueError, match="masks must be bool"):
        jaccard(EMPTY[None], EMPTY[None])


def test_statistics_by_hand():
    # 8 frames: the bins end at frames 1, 2.75 -> 3, 4.5 -> 5, 6.25 -> 6 and 8, and share those frames.
    found = object_statistics([1.0, 0.8, 0.6, 0.5, 0.5, 0.4, 0.2, 0.0])
    assert found.mean == pytest.approx(4 / 8)
    assert found.recall == pytest.approx(3 / 8)
    assert found.decay == pytest.approx((1.0 + 0.8 + 0.6) / 3 - (0.4 + 0.2 + 0.0) / 3)
    assert object_statistics([0.7]).decay == 0
    assert all(
        math.isnan(value)
        for value in (object_statistics([]).mean, object_statistics([]).recall, object_statistics([]).decay)
    )


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(LoftUpError, match=r'pip install "loftup\[eval\]"'):
        boundary_f(PIXEL, PIXEL)
