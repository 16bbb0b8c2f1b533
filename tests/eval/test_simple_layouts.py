"""Small layouts: two folders, two lists and names of classes; one object a sequence; normals that follow from depth."""

import json

import layouts
import pytest
import torch
from material import shared

from loftup import LoftUpError
from loftup.eval.datasets import open_dataset
from loftup.eval.datasets.plane_fit import normals_by_plane_fit
from loftup.eval.datasets.synthetic import SyntheticVideo, render

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def write_lists(root, classes=NAMES):
    (root / "train.txt").write_text("s0\ns1\n\n")
    (root / "test.txt").write_text("s2\n")
    (root / "classes.json").write_text(json.dumps(classes))


def write_labels(root, decode=lambda classes: classes):
    scenes = layouts.pairs(root, "images/{name}.jpg", "labels/{name}.png", ("train", "test"), decode)
    write_lists(root)
    return scenes


@pytest.mark.parametrize(("name", "classes"), [("simple", 8), ("nyuv2", 8), ("voc", 21)])
def test_labels(tmp_path, name, classes):
    root = tmp_path / "mine"
    scenes = write_labels(root, lambda values: values.where(values != 3, 255))
    dataset = open_dataset(f"{name}:{root}", "segmentation")
    assert dataset.name == {"simple": "mine"}.get(name, name)
    assert len(dataset.classes) == classes
    assert [[sample.name for sample in split] for split in (dataset.train, dataset.val)] == [["s0", "s1"], ["s2"]]
    for sample, scene in zip([*dataset.train, *dataset.val], scenes.values(), strict=True):
        assert torch.equal(sample.labels, scene.classes.where(scene.classes != 3, -1))
    assert bool(dataset.colours) == (name == "voc")


def test_pictures_may_be_png(tmp_path):
    layouts.pairs(tmp_path, "images/{name}.png", "labels/{name}.png", ("train", "test"))
    write_lists(tmp_path)
    sample = open_dataset(f"simple:{tmp_path}", "segmentation").val[0]
    assert torch.equal(sample.image, render(2, layouts.SIZE).image)


def test_what_is_missing_is_named(tmp_path):
    write_labels(tmp_path)
    for content, said in (("{", "is no JSON"), ("[]", r"expected a list of the classes' names in .*, got \[\]")):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(LoftUpError, match=f"{said}"):
            open_dataset(f"simple:{tmp_path}", "segmentation")
    (tmp_path / "classes.json").unlink()
    with pytest.raises(LoftUpError, match="expected the names of the classes at .*classes.json, found nothing"):
        open_dataset(f"simple:{tmp_path}", "segmentation")
    write_lists(tmp_path)
    (tmp_path / "images/s1.jpg").unlink()
    with pytest.raises(LoftUpError, match=r"expected a picture \(.jpg or .png\) at .*s1.jpg, found nothing; .* holds"):
        open_dataset(f"simple:{tmp_path}", "segmentation")
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(LoftUpError, match=r"train.txt names no picture; expected one name a line"):
        open_dataset(f"simple:{tmp_path}", "segmentation")
    (tmp_path / "train.txt").unlink()
    with pytest.raises(LoftUpError, match="expected names of pictures at .*train.txt, found nothing"):
        open_dataset(f"voc:{tmp_path}", "segmentation")


def test_normals_of_a_plane_are_exact_beside_another_surface():
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    focal, centre = (60.0, 64.0), (18.0, 14.0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    rays = torch.stack([(x - centre[0]) / focal[0], (y - centre[1]) / focal[1], torch.ones_like(x)])
    depth = normal[2] * 2 / (normal[:, None, None] * rays).sum(0)
    wall = x >= 30
    depth[wall] = 6.0
    depth[4, 4] = float("nan")
    normals = normals_by_plane_fit(depth, focal, centre, step=1)
    known = ~wall & ~depth.isnan()
    assert torch.allclose(normals[:, known], normal[:, None].expand(-1, int(known.sum())), atol=2e-3)
    assert torch.allclose(normals[:, wall], torch.tensor([[0.0], [0.0], [-1.0]]).expand(-1, int(wall.sum())), atol=1e-3)
    assert normals[:, 4, 4].isnan().all()


def test_normals_need_enough_points():
    assert normals_by_plane_fit(torch.ones(2, 5), (9.0, 9.0), (2.0, 1.0)).isnan().all()
    line = torch.full((9, 40), float("nan"))
    line[4] = 2.0
    assert normals_by_plane_fit(line, (9.0, 9.0), (20.0, 4.0), step=1).isnan().all()


def test_depth_and_normals_are_cut_to_what_is_judged(tmp_path):
    x = torch.arange(64.0).expand(48, 64)
    depth = (2000 + 50 * x).round().long()  # of a wall that recedes to the right, beyond 4 metres at its end
    depth[20, 30] = 0
    for name in ("s0", "s1", "s2"):
        layouts.save(torch.randint(256, (3, 48, 64)), tmp_path / f"images/{name}.jpg")
        layouts.save(depth, tmp_path / f"depth_mm/{name}.png")
    write_lists(tmp_path)
    dataset = open_dataset(f"nyuv2:{tmp_path}", "normals")
    assert (len(dataset.train), len(dataset.val)) == (2, 1)
    sample = dataset.val[0]
    rows, columns = slice(4, 47), slice(4, 60)  # a tenth of the official crop, rounded
    assert sample.image.shape == (3, 43, 56)
    assert torch.equal(sample.depth.nan_to_num(), depth[rows, columns] / 1000)
    assert sample.depth[16, 26].isnan()
    assert torch.equal(sample.normals.isnan().any(0), sample.depth.isnan() | (sample.depth > 4))
    there = sample.normals[:, ~sample.normals.isnan().any(0)]
    assert (there[0] > 0.3).all()
    layouts.save(depth[:, :60], tmp_path / "depth_mm/s2.png")
    with pytest.raises(LoftUpError, match=r"s2.png is \(48, 60\), but its picture"):
        dataset.val[0]


def test_davis_2016_as_video_and_as_objects(tmp_path):
    video = SyntheticVideo(11, layouts.SIZE, 12)
    for inner, scale in (("", 1), ("480p/", 255)):
        root = tmp_path / f"davis{scale}"
        for index in range(12):
            layouts.save(video.frame(index), root / f"JPEGImages/{inner}shapes/{index:05d}.jpg")
            layouts.save((video.annotation(index) > 0) * scale, root / f"Annotations/{inner}shapes/{index:05d}.png")
        (sequence,) = open_dataset(f"davis2016:{root}", "video").val
        assert (sequence.name, len(sequence)) == ("shapes", 12)
        assert torch.equal(sequence.annotation(3), (video.annotation(3) > 0).long())
        objects = open_dataset(f"davis2016:{root}", "interactive").val
        assert [sample.name for sample in objects] == ["00000/1", "00010/1"]
        assert torch.equal(objects[1].mask, (video.annotation(10) > 0).long())
    with pytest.raises(LoftUpError, match="expected a folder with a folder for every sequence at .*Annotations"):
        open_dataset(f"davis2016:{tmp_path}", "video")
    (tmp_path / "empty/Annotations").mkdir(parents=True)
    with pytest.raises(LoftUpError, match="expected a folder for every sequence in .*Annotations, found none"):
        open_dataset(f"davis2016:{tmp_path / 'empty'}", "video")


def test_grabcut_with_labels(tmp_path):
    mask = torch.zeros(16, 16, dtype=torch.long)
    mask[4:9, 4:9] = 1
    mask[9] = 255
    layouts.save(torch.randint(256, (3, 16, 16)), tmp_path / "images/a.jpg")
    layouts.save(mask, tmp_path / "labels/a.png")
    (sample,) = open_dataset(f"grabcut:{tmp_path}", "interactive").val
    assert torch.equal(sample.mask, mask.where(mask < 255, -1))


def test_objects_of_voc_are_the_largest_parts_of_classes(tmp_path):
    labels = torch.zeros(40, 40, dtype=torch.long)
    labels[2:12, 2:12] = 3
    labels[20:24, 2:6] = 3  # another of that class
    labels[30:33, 30:33] = 5  # too small
    labels[12, 2:12] = 255
    for name in ("s0", "s1", "s2"):
        layouts.save(torch.randint(256, (3, 40, 40)), tmp_path / f"images/{name}.jpg")
        layouts.save(labels, tmp_path / f"labels/{name}.png")
    write_lists(tmp_path)
    dataset = open_dataset(f"voc:{tmp_path}", "interactive")
    assert [sample.name for sample in dataset.train] == ["s0/3", "s1/3"]
    expected = torch.zeros(40, 40, dtype=torch.long)
    expected[2:12, 2:12] = 1
    expected[20:24, 2:6] = -1
    expected[12, 2:12] = -1
    assert torch.equal(dataset.val[0].mask, expected)


@pytest.mark.parametrize(
    ("spec", "task", "train", "val"),
    [
        ("voc:voc2012", "segmentation", 220, 140),
        ("nyuv2:nyuv2", "segmentation", 60, 38),
        ("nyuv2:nyuv2", "normals", 60, 38),
        ("davis2016:davis2016", "video", 0, 5),
        ("grabcut:grabcut", "interactive", 0, 50),
    ],
)
def test_as_they_are_shared(spec, task, train, val):
    name, _, folder = spec.partition(":")
    dataset = open_dataset(f"{name}:{shared(f'data/{folder}')}", task)
    assert (len(dataset.train), len(dataset.val)) == (train, val)
    sample = dataset.val[0]
    if task == "normals":
        assert sample.image.shape == (3, 426, 560)
        assert sample.normals.isnan().float().mean() < 0.5
        assert sample.normals[2].nan_to_num(-1).mean() < -0.3
    elif task == "segmentation":
        assert -1 <= sample.labels.min() <= sample.labels.max() < len(dataset.classes)
