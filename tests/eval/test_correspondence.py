"""Correspondence: PCK by hand, perfect features, the readers of pairs, and what is refused."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import shared
from PIL import Image
from small import mean_colours
from torch import nn

from loftup import LoftUp, LoftUpError
from loftup.backbones import Backbone
from loftup.cli import main
from loftup.eval.datasets import CorrespondenceSample, Dataset, open_dataset
from loftup.eval.datasets.correspondence import SEEN, homography
from loftup.eval.datasets.synthetic import synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks.correspondence import METRICS, CorrespondenceConfig, correspondence
from loftup.eval.upsamplers.access import at_points
from loftup.eval.upsamplers.simple import Interpolation, LowResolution

ALL = {"alphas": [0.1, 0.05, 0.01], "pictures": 0}


def nearest(features, image, size):
    return F.interpolate(image, size, mode="nearest-exact")


def spots(size=40):
    """A picture of black with one pixel of red, of green and of blue, and where they are, (x, y)."""
    places = torch.tensor([[5.0, 10.0], [20.0, 30.0], [35.0, 3.0]])
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    for channel, (x, y) in enumerate(places.int().tolist()):
        image[channel, y, x] = 255
    return image, places


def sample(shift=((0, 0),) * 3, box=None, category="", name="pair"):
    """A picture and itself, with points in the second that were moved away from where they belong."""
    image, places = spots()
    return CorrespondenceSample(name, image, image, places, places + torch.tensor(shift).float(), box, category)


def judge(*samples, upsampler=nearest, backbone=None, **settings):
    config = CorrespondenceConfig(**{"size": 40, **ALL, **settings})
    return correspondence(backbone or mean_colours(), upsampler, Dataset("mine", [], list(samples)), config)


def numbers(result):
    return {name: value for name, (value,) in result.metrics.items()}


def test_percentages_by_hand():
    # The picture is 40 wide: tolerances of 4, 2 and 0.4 pixels. Distances of 5, 4 and 0.
    first = sample([(3, 4), (0, 4), (0, 0)], name="a")
    # The box is 20 x 30: tolerances of 3, 1.5 and 0.3. Distances of 3, 1.4 and 1.6.
    second = sample([(3, 0), (0, 1.4), (1.6, 0)], box=(0.0, 0.0, 20.0, 30.0), name="b")
    third = CorrespondenceSample("c", *[spots()[0]] * 2, *[spots()[1][:1]] * 2)
    result = judge(first, second, third)
    found = numbers(result)
    assert found["pck_0.1"] == pytest.approx(100 * 6 / 7)
    assert found["pck_0.05"] == pytest.approx(100 * 3 / 7)
    assert found["pck_0.01"] == pytest.approx(100 * 2 / 7)
    assert found["image_pck_0.1"] == pytest.approx(100 * (2 / 3 + 1 + 1) / 3)
    assert found["image_pck_0.05"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 1) / 3)
    assert found["mutual"] == 100
    assert found["mutual_pck_0.05"] == found["pck_0.05"]
    assert result.details["pairs"]["b"] == pytest.approx({"pck_0.1": 100, "pck_0.05": 100 / 3, "pck_0.01": 0})
    assert "categories" not in result.details
    assert set(found) < set(METRICS)
    by_image = numbers(judge(second, tolerance="image"))  # 4, 2 and 0.4
    assert by_image["pck_0.05"] == pytest.approx(100 * 2 / 3)


def test_categories():
    result = judge(sample(category="cat", name="a"), sample([(9, 9)] * 3, category="dog", name="b"))
    perfect, wrong = ({f"pck_{alpha}": value for alpha in ALL["alphas"]} for value in (100.0, 0.0))
    assert result.details["categories"] == {"cat": {"points": 3.0, **perfect}, "dog": {"points": 3.0, **wrong}}


def test_only_the_box_is_searched_where_that_is_asked():
    box = (15.0, 20.0, 30.0, 35.0)  # around the second spot alone
    assert numbers(judge(sample(box=box)))["pck_0.1"] == 100
    inside = judge(sample(box=box), within_box=True)
    assert numbers(inside)["pck_0.1"] == pytest.approx(100 / 3)


def test_the_way_back_tells_mutual_matches():
    image, places = spots()
    target = image.clone()
    target[:, 30, 20] = torch.tensor([255, 255, 0], dtype=torch.uint8)  # red and green in one
    target[0, 10, 5] = 0
    pair = CorrespondenceSample("a", image, target, places, places)
    found = numbers(judge(pair))
    # Red and green both go to the yellow pixel; its way back ends at one of them.
    assert found["mutual"] == pytest.approx(100 * 2 / 3)
    assert found["pck_0.1"] == pytest.approx(100 * 2 / 3)
    flat = torch.full_like(image, 7)
    lost = judge(CorrespondenceSample("a", image, flat, places + 1, places))
    assert numbers(lost)["pck_0.1"] < 100


def test_perfect_features_score_100_on_rendered_scenes_and_bilinear_ones_do_not():
    dataset = synthetic("correspondence", val=3, size=96)
    assert len(dataset.train) == 0
    oracle = Oracle(dataset, "correspondence")
    config = CorrespondenceConfig(size=96, pictures=1)
    result = correspondence(oracle.backbone, oracle.upsampler, dataset, config)
    assert set(numbers(result).values()) == {100.0}
    (row,) = result.pictures
    assert list(row) == ["image", "truth", "ours"]
    assert len({picture.size for picture in row.values()}) == 1
    assert row["image"].tobytes() != row["truth"].tobytes()
    blurred = numbers(correspondence(oracle.backbone, Interpolation("bilinear"), dataset, config))
    coarse = numbers(correspondence(oracle.backbone, LowResolution(), dataset, config))
    assert 100 > blurred["pck_0.05"] > coarse["pck_0.05"]


def test_rendered_points_are_where_they_say():
    pair = synthetic("correspondence", val=1, size=128).val[0]
    assert pair.source_points.shape == pair.target_points.shape == (20, 2)
    moved = (pair.source_points - pair.target_points).norm(dim=1)
    assert (moved == 0).any()
    assert (moved > 1).any()
    colours = []
    for image, points in ((pair.source, pair.source_points), (pair.target, pair.target_points)):
        x, y = points.round().long().unbind(1)
        colours.append(image[:, y, x].float())
    assert (colours[0] - colours[1]).abs().median() < 10


def test_coarse_grids_find_the_middles_of_cells():
    image, places = spots()
    pair = CorrespondenceSample("a", image, image, places, torch.tensor([[5.5, 9.5], [21.5, 29.5], [35.0, 3.0]]))
    result = judge(pair, upsampler=LowResolution(), alphas=[0.01])
    assert numbers(result)["pck_0.01"] == pytest.approx(100 * 2 / 3)  # the third is in the corner of its cell
    # Half as fine, the spots are 2 x 2 pixels that are level.
    half = numbers(judge(sample(), backbone=mean_colours(cell=2), output=0.5, upsampler=Interpolation("nearest")))
    assert half["pck_0.05"] == 100


@dataclass
class Streaming:
    """An upsampler with ``at`` and ``head=`` that counts its maps of features."""

    up: LoftUp
    maps: int = 0

    def __call__(self, features, image, size, head=None):
        self.maps += head is None
        return self.up(features, image, size, head=head)

    def at(self, features, image, points, size):
        return self.up.at(features, image, points, size)


def test_an_upsampler_that_streams_makes_no_map_and_gives_the_same():
    torch.manual_seed(0)
    kernel = torch.randn(16, 3, 8, 8)
    backbone = Backbone(
        nn.Identity(), lambda image: F.conv2d(image, kernel, stride=8), channels=16, patch_size=8, mean=(0, 0, 0),
        std=(1, 1, 1),
    ).eval()  # fmt: skip
    up = LoftUp.from_pretrained("any")
    pair = synthetic("correspondence", val=1, size=64).val[0]
    stream = Streaming(up)
    streamed = judge(pair, backbone=backbone, upsampler=stream, size=64)
    dense = judge(pair, backbone=backbone, upsampler=lambda *call: up(*call), size=64)
    assert stream.maps == 0
    assert numbers(streamed) == pytest.approx(numbers(dense))
    features, image, points = torch.randn(1, 6, 4, 5), torch.rand(1, 3, 16, 20), torch.tensor([[0, 0], [7.25, 15]])
    mine = at_points(lambda *call: up(*call), features, image, (16, 20), points)
    torch.testing.assert_close(mine, at_points(up, features, image, (16, 20), points), atol=1e-5, rtol=1e-4)


def test_some_pairs_alone():
    result = judge(*[sample(name=str(number)) for number in range(6)], pairs=2, pictures=1)
    assert list(result.details["pairs"]) == ["0", "3"]
    assert len(result.pictures) == 1
    with pytest.raises(ValueError, match="empty has no pairs to judge by"):
        correspondence(mean_colours(), nearest, Dataset("empty", [], []))
    for wrong in ([], [0.3]):
        with pytest.raises(ValueError, match=r"alphas must be some of 0.2, 0.15, 0.1, 0.05, 0.02, 0.01, got \["):
            CorrespondenceConfig(alphas=wrong)


def write_spair(root, name="000001-a-b:cat", split="test", separator=":"):
    """One pair in SPair-71k's layout."""
    (root / "JPEGImages/cat").mkdir(parents=True, exist_ok=True)
    for picture, size in (("a", (30, 20)), ("b", (40, 50))):
        Image.fromarray(np.full((*size[::-1], 3), 90, np.uint8)).save(root / f"JPEGImages/cat/{picture}.jpg")
    record = {
        "filename": name, "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_imsize": [30, 20, 3],
        "trg_imsize": [40, 50, 3], "src_bndbox": [1, 2, 20, 18], "trg_bndbox": [4, 6, 30, 46], "category": "cat",
        "src_kps": [[3, 4], [12, 9]], "trg_kps": [[8, 9], [22, 40]], "kps_ids": ["0", "5"], "mirror": 0,
    }  # fmt: skip
    folder = root / "PairAnnotation" / split
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.replace(':', separator)}.json"
    file.write_text(json.dumps(record))
    (root / "Layout/large").mkdir(parents=True, exist_ok=True)
    (root / f"Layout/large/{split}.txt").write_text(f"{name}\n")
    return file


@pytest.mark.parametrize("separator", [":", "_"])
def test_spair(tmp_path, separator):
    file = write_spair(tmp_path, separator=separator)
    dataset = open_dataset(f"spair:{tmp_path}", "correspondence")
    assert (len(dataset.train), len(dataset.val)) == (0, 1)
    pair = dataset.val[0]
    assert (pair.category, pair.target_box) == ("cat", (4, 6, 30, 46))
    assert (pair.source.shape, pair.target.shape) == ((3, 20, 30), (3, 50, 40))
    assert pair.source_points.tolist() == [[3, 4], [12, 9]]
    assert pair.target_points.tolist() == [[8, 9], [22, 40]]
    write_spair(tmp_path, split="trn")
    assert len(open_dataset(f"spair:{tmp_path}", "correspondence").train) == 1
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in record.items() if key != "trg_kps"}))
    with pytest.raises(
        LoftUpError, match=r"expected the annotation of a pair in .*\.json, with 'trg_kps'; got another"
    ):
        dataset.val[0]
    file.unlink()
    with pytest.raises(LoftUpError, match="expected the annotation of a pair at .*cat.json, found nothing"):
        dataset.val[0]
    (tmp_path / "Layout/large/test.txt").unlink()
    with pytest.raises(LoftUpError, match="expected a list of pairs at .*test.txt"):
        open_dataset(f"spair:{tmp_path}", "correspondence")


def write_pairs(root, **changes):
    for name in "ab":
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(root / f"{name}.png")
    record = {"source": "a.png", "target": "b.png", "source_points": [[1, 2]], "target_points": [[3, 4.5]]}
    record |= changes
    content = [{key: value for key, value in record.items() if value is not None}]
    (root / "pairs.json").write_text(json.dumps(content))
    return lambda: open_dataset(f"pairs:{root}", "correspondence").val[0]


def test_pairs_of_ones_own(tmp_path):
    pair = write_pairs(tmp_path)()
    assert (pair.name, pair.category, pair.target_box) == ("0", "", None)
    assert (pair.source_points.tolist(), pair.target_points.tolist()) == ([[1, 2]], [[3, 4.5]])
    pair = write_pairs(tmp_path, category="cup", target_box=[1, 2, 9, 8], similarity=[0.5])()
    assert (pair.category, pair.target_box) == ("cup", (1, 2, 9, 8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": None, "target_points": None}, r"pair 0 of .*pairs.json has no target, target_points; expected sou"),
        ({"target": "c.png"}, "expected a picture at .*c.png"),
        ({"source_points": [[1, 2], [3, 4]]}, "pair 0 of .* has 2 source_points and 1 target_points"),
        ({"source_points": []}, r"source_points of pair 0 of .* must be lists \[x, y\], got \[\]"),
        ({"source_points": [[1, "x"]]}, r"must be lists \[x, y\], got \[\[1, 'x'\]\]"),
        (
            {"target_points": [[30, 2]]},
            r"target_points of pair 0 .* hold \[30.0, 2.0\], outside the picture of 30 x 20",
        ),
        (
            {"target_box": [1, 2, 3]},
            r"target_box of pair 0 of .* must be \[left, top, right, bottom\], got \[1, 2, 3\]",
        ),
        ({"target_box": [9, 2, 3, 4]}, "must be .left, top, right, bottom., got .9, 2, 3, 4."),
    ],
)
def test_what_is_wrong_with_a_pair(tmp_path, changes, said):
    with pytest.raises(LoftUpError, match=said):
        write_pairs(tmp_path, **changes)()


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON"), ("[]", r"expected a list of pairs in .*, got \[\]")]
)
def test_what_is_no_list_of_pairs(tmp_path, content, said):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(LoftUpError, match=said):
        open_dataset(f"pairs:{tmp_path}", "correspondence")


def test_warped_views(tmp_path):
    y, x = np.mgrid[:60, :80]
    image = np.stack([3 * x, 4 * y, 120 + 0 * x], -1).astype(np.uint8)  # the colour tells the place
    for name in ("one", "two"):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("x")
    dataset = open_dataset(f"warped:{tmp_path}", "correspondence")
    assert [pair.name for pair in dataset.val] == ["one", "two"]
    for pair in dataset.val:
        assert pair.target.shape == pair.source.shape == (3, 60, 80)
        columns, rows = pair.target_points.round().long().unbind(1)
        place = pair.target[:2, rows, columns].float().T / torch.tensor([3.0, 4.0])
        assert (place - pair.source_points).abs().max() < 1.1
        assert (pair.source_points - pair.target_points).norm(dim=1).max() > 5
    assert torch.equal(dataset.val[0].target, dataset.val[0].target)
    assert not torch.equal(dataset.val[0].target, dataset.val[1].target)
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(LoftUpError, match="expected photographs in .*, found none of .bmp, .jpeg"):
        open_dataset(f"warped:{tmp_path}", "correspondence")


def test_views_lie_inside_the_picture():
    for seed in range(50):
        matrix = homography(30, 50, torch.Generator().manual_seed(seed))
        corners = torch.tensor([[0.0, 0, 1], [49, 0, 1], [49, 29, 1], [0, 29, 1]], dtype=torch.float64)
        placed = corners @ matrix.mT
        placed = placed[:, :2] / placed[:, 2:]
        assert placed.min() > -1e-9
        assert (placed.amax(0) < torch.tensor([49 + 1e-9, 29 + 1e-9])).all()
        spans = (placed.amax(0) - placed.amin(0)) / torch.tensor([49, 29])
        assert spans.max() <= SEEN + 1e-9


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("loftup.cli.models.backbone_of", lambda arguments: mean_colours(cell=8))
    root = tmp_path / "mine"
    root.mkdir()
    write_pairs(root, category="cup")
    command = ["eval", "correspondence", "--dataset", f"pairs:{root}", "--upsampler", "lowres,bilinear,loftup:any"]
    assert main([*command, "--set", "size=32", "-o", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["upsamplers"]["loftup"]["details"]["categories"].keys() == {"cup"}
    table = (tmp_path / "out/results.md").read_text()
    assert "PCK@0.1 % | PCK@0.05 % | PCK@0.01 % | PCK@0.1 per image %" in table
    assert (tmp_path / "out/figure.png").is_file()


def test_photographs_that_are_shared():
    pair = open_dataset(f"warped:{shared('data/photos')}", "correspondence").val[0]
    found = numbers(judge(pair, backbone=mean_colours(cell=1), upsampler=nearest, size=min(pair.source.shape[1:])))
    assert found["pck_0.1"] < 100  # colours alone do not tell
