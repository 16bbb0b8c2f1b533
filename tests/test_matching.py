"""Matches against loops over dense maps, with what is known to be right, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from loftup import LoftUp, Matches, match, matching
from loftup.matching import most_alike, rescaled


@pytest.fixture(scope="module")
def up():
    return LoftUp.from_pretrained("any")


def pair(seed=0, size=(40, 56), cells=(5, 7), channels=12):
    """Features and image."""
    torch.manual_seed(seed)
    return torch.randn(1, channels, *cells), torch.rand(1, 3, *size)


def test_a_picture_matches_itself(up):
    features, image = pair()
    found = match(up, features, image, features, image, step=4)
    assert len(found) == 10 * 14
    assert torch.equal(found.points, found.targets)
    assert torch.allclose(found.similarity, torch.ones(140), atol=1e-5)
    assert found.similarity.max() <= 1
    assert found.mutual.all()
    points = torch.tensor([[3, 5], [55, 39], [0, 0]])
    found = match(up, features, image, features, image, points)
    assert torch.equal(found.points, points.float())
    assert torch.equal(found.targets, points.float())
    assert found.mutual.all()
    assert [len(match(up, features, image, features, image, torch.empty(0, 2)))] == [0]


@pytest.mark.parametrize("chunks", [(64, 2048), (3, 5)])
def test_the_grid_against_loops(up, monkeypatch, chunks):
    monkeypatch.setattr(matching, "QUERIES", chunks[0])
    monkeypatch.setattr(matching, "ROWS", chunks[1])
    (features, image), (others, other) = pair(1), pair(2, size=(48, 40), cells=(6, 5))
    found = match(up, features, image, others, other, step=8)
    first, second = (F.normalize(up(*each)[0].double(), dim=0) for each in ((features, image), (others, other)))
    # The outermost points are as far from the edges.
    starts = [(x, y) for y in range(3, 40, 8) for x in range(3, 56, 8)]
    ends = [(x, y) for y in range(3, 48, 8) for x in range(3, 40, 8)]
    table = torch.stack([torch.stack([first[:, y, x] @ second[:, j, i] for i, j in ends]) for x, y in starts])
    expected = {}
    for number, (x, y) in enumerate(starts):
        best = int(table[number].argmax())
        if int(table[:, best].argmax()) == number:
            i, j = ends[best]
            window = {
                (a, b): float(first[:, y, x] @ second[:, b, a])
                for b in range(max(0, j - 8), min(48, j + 9))
                for a in range(max(0, i - 8), min(40, i + 9))
            }
            expected[x, y] = max(window.items(), key=lambda item: item[1])
    assert len(expected) > 5
    made = {tuple(map(int, a)): tuple(map(int, b)) for a, b in zip(found.points, found.targets, strict=True)}
    assert made == {start: end for start, (end, _) in expected.items()}
    wanted = torch.tensor([expected[tuple(map(int, a))][1] for a in found.points])
    torch.testing.assert_close(found.similarity, wanted, atol=1e-5, rtol=0)
    assert torch.equal(found.similarity, found.similarity.sort(descending=True).values)


def test_points_against_the_whole_map_and_the_way_back(up):
    (features, image), (others, other) = pair(3), pair(4)
    points = torch.tensor([[10.0, 20.0], [31.5, 7.25], [55.0, 0.0], [2.0, 38.0]])
    found = match(up, features, image, others, other, points)
    first, second = up(features, image)[0], F.normalize(up(others, other)[0], dim=0)
    vectors = F.normalize(up.at(features, image, points[None])[0], dim=1)
    for number, query in enumerate(vectors):
        similarity = torch.einsum("chw,c->hw", second, query)
        x, y = map(int, found.targets[number])
        assert float(similarity[y, x]) == pytest.approx(float(similarity.max()), abs=1e-6)
        assert float(found.similarity[number]) == pytest.approx(float(similarity.max()), abs=1e-5)
        back = torch.einsum("chw,c->hw", F.normalize(first, dim=0), second[:, y, x]).flatten().argmax()
        near = (torch.tensor([float(back % 56), float(back // 56)]) - points[number]).abs().amax() <= 8
        assert bool(found.mutual[number]) == bool(near)


def test_coordinates_are_the_images_whatever_the_size(up):
    features, image = pair()
    found = match(up, features, image, features, image, size=(20, 28), other_size=(20, 28), step=4)
    assert torch.equal(found.points, found.targets)
    # The first point is pixel (1, 1) of 28 x 20, which covers pixels 2 and 3 of the image.
    assert found.points.amin(0).tolist() == [2.5, 2.5]
    assert found.points.amax() < 56
    assert rescaled(torch.tensor([[0.0, 0.0], [1.0, 0.5]]), (2, 2), (4, 8)).tolist() == [[1.5, 0.5], [5.5, 1.5]]
    assert rescaled(torch.tensor([[0.0, 3.0]]), (4, 4), (2, 2)).tolist() == [[0.0, 1.0]]


def test_where_pixels_are_level_the_middle_one_is_taken():
    maps = torch.zeros(3, 6, 7)
    maps[0, 1:4, 2:7] = 0.5
    maps[1, 5, 6] = 1
    maps[2, 0, 0] = maps[2, 5, 6] = maps[2, 4, 6] = 2
    places, values = most_alike(maps)
    assert places.tolist() == [[4, 2], [6, 5], [6, 4]]
    assert values.tolist() == [0.5, 1, 2]


def test_the_best_of_every_part_come_first(up):
    features, image = pair()
    found = match(up, features, image, features, image, step=2, most=12)
    assert len(found) == 12
    cells = {(int(x * 4 // 56), int(y * 3 // 40)) for x, y in found.points.tolist()}
    assert len(cells) == 12
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 1.0], [9.0, 2.0]])
    order = matching._spread(points, torch.tensor([0.5, 0.9, 0.3, 0.2]), (4, 10), 2)
    assert order.tolist() == [1, 2]
    assert matching._spread(points, torch.tensor([0.5, 0.9, 0.3, 0.2]), (4, 10), 3).tolist()[:2] == [1, 2]
    assert matching._spread(points, torch.ones(4), (4, 10), None).tolist() == [0, 1, 2, 3]


def test_what_is_asked_wrongly(up):
    features, image = pair()
    both = features, image, features, image
    points = torch.tensor([[1.0, 2.0]])
    for arguments, options, said in (
        (both, {"step": 0}, "step must be at least 1, got 0"),
        (both, {"most": 0}, "most must be at least 1, got 0"),
        (both, {"points": points, "most": 3}, "most= chooses among a grid's matches, and every one of points= is kept"),
        (both, {"points": points[None]}, r"points must be \(N, 2\), \(x, y\) in pixels of image, got \(1, 1, 2\)"),
        (both, {"points": points + 60}, "1 points lie outside the grid"),
        ((features.repeat(2, 1, 1, 1), image.repeat(2, 1, 1, 1), *both[2:]), {}, "got batches of 2 and 1; choose one"),
        ((*both[:2], features[:, :5], image), {}, "features of 12 and 5 channels; take both from one backbone"),
    ):
        with pytest.raises(ValueError, match=said):
            match(up, *arguments, **options)
    assert isinstance(match(up, *both, most=1), Matches)
