"""Readers on scenes written in the real layouts, and what they say about missing files."""

import layouts
import pytest
import torch
from material import shared

from loftup import LoftUpError
from loftup.eval.catalogue import TASKS
from loftup.eval.datasets import names, open_dataset, register, registry
from loftup.eval.datasets.geometry import normals_from_depth
from loftup.eval.datasets.prepare import fit
from loftup.eval.datasets.synthetic import FOCAL, render


def test_names_and_specs():
    assert names("video") == ["synthetic", "davis", "davis2016"]
    assert {"camvid", "cityscapes", "coco_stuff", "ade20k", "voc"} < set(names("segmentation"))
    for task in (name for name, entry in TASKS.items() if entry.data):
        assert len(open_dataset("synthetic", task).val)
    for spec, expected in (
        ("canvid:x", "no dataset 'canvid' for segmentation; did you mean 'camvid'"),
        ("zzz:x", "no dataset 'zzz' for segmentation; expected synthetic, camvid"),
        ("camvid", "'camvid' needs its folder; write camvid:FOLDER"),
        ("camvid:nowhere", "the folder of 'camvid' is not there: nowhere"),
        ("synthetic:x", "is rendered and has no folder, got 'synthetic:x'"),
    ):
        with pytest.raises(LoftUpError, match=expected):
            open_dataset(spec, "segmentation")


def test_others_register_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))

    @register("mine", "geometry")
    def mine(folder):
        return folder

    for task in ("depth", "normals"):
        assert open_dataset(f"mine:{tmp_path}", task) == tmp_path
    with pytest.raises(ValueError, match="a dataset 'mine' of geometry already"):
        register("mine", "geometry")
    with pytest.raises(ValueError, match="there is no kind 'deep' of samples; expected one of labels, geometry"):
        register("mine", "deep")


def same(dataset, scenes, labels=lambda scene: scene.classes, exact=True):
    """Whether a dataset has the scenes 0, 1 and 2 with these labels."""
    samples = [*dataset.train, *dataset.val]
    assert [sample.name for sample in samples] == ["s0", "s1", "s2"]
    for sample, scene in zip(samples, scenes.values(), strict=True):
        assert torch.equal(sample.labels, labels(scene))
        assert sample.image.dtype == torch.uint8
        if exact:
            assert torch.equal(sample.image, scene.image)
        else:
            assert (sample.image.int() - scene.image.int()).abs().float().mean() < 4


def test_camvid_in_both_layouts(tmp_path):
    scenes = layouts.pairs(tmp_path / "a", "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    dataset = open_dataset(f"camvid:{tmp_path / 'a'}", "segmentation")
    same(dataset, scenes, exact=False)
    assert len(dataset.classes) == len(dataset.colours) == 11
    scenes = layouts.pairs(
        tmp_path / "b", "{split}/{name}.png", "{split}annot/{name}.png", ("train", "val"), lambda x: x + 6
    )
    same(
        open_dataset(f"camvid:{tmp_path / 'b'}", "segmentation"),
        scenes,
        lambda scene: (scene.classes + 6).where(scene.classes + 6 < 11, -1),
    )


def test_camvid_as_it_is_shared():
    dataset = open_dataset(f"camvid:{shared('data/camvid')}", "segmentation")
    sample = dataset.val[0]
    assert sample.image.shape == (3, 360, 480)
    assert sample.labels.min() >= -1
    assert sample.labels.max() < 11


def test_cityscapes(tmp_path):
    ids = torch.tensor([7, 8, 11, 12, 13, 17, 19, 34])  # the last is none of the 19
    scenes = layouts.pairs(
        tmp_path,
        "leftImg8bit/{split}/town/{name}_leftImg8bit.png",
        "gtFine/{split}/town/{name}_gtFine_labelIds.png",
        ("train", "val"),
        lambda classes: ids[classes],
    )
    dataset = open_dataset(f"cityscapes:{tmp_path}", "segmentation")
    assert len(dataset.classes) == 19
    for sample, scene in zip([*dataset.train, *dataset.val], scenes.values(), strict=True):
        assert torch.equal(sample.labels, scene.classes.where(scene.classes < 7, -1))


def test_coco_stuff_in_coarse_classes(tmp_path):
    fine = torch.tensor([0, 1, 8, 156, 181, 71, 255, 60])  # person, vehicles, sky, wood, electronic, void, food
    coarse = torch.tensor([9, 11, 11, 23, 24, 0, -1, 2])
    scenes = layouts.pairs(
        tmp_path,
        "images/{split}/{name}.jpg",
        "annotations/{split}/{name}.png",
        ("train2017", "val2017"),
        lambda classes: fine[classes],
    )
    dataset = open_dataset(f"coco_stuff:{tmp_path}", "segmentation")
    same(dataset, scenes, lambda scene: coarse[scene.classes], exact=False)
    assert [dataset.classes[i] for i in (9, 11, 23, 24, 0, 2)] == [
        "person",
        "vehicle",
        "sky",
        "solid",
        "electronic",
        "food",
    ]
    (tmp_path / "curated").mkdir()
    (tmp_path / "curated/train2017.txt").write_text("s1\n")
    assert [sample.name for sample in open_dataset(f"coco_stuff:{tmp_path}", "segmentation").train] == ["s1"]


def test_ade20k(tmp_path):
    scenes = layouts.pairs(
        tmp_path / "ADEChallengeData2016",
        "images/{split}/{name}.jpg",
        "annotations/{split}/{name}.png",
        ("training", "validation"),
    )
    info = tmp_path / "ADEChallengeData2016" / "objectInfo150.txt"
    with pytest.raises(LoftUpError, match="expected ADE20K's list of classes at .*objectInfo150.txt"):
        open_dataset(f"ade20k:{tmp_path}", "segmentation")
    info.write_text("Idx\tName\n1\twall\n")
    with pytest.raises(LoftUpError, match="names 1 classes, expected a heading and 150 lines"):
        open_dataset(f"ade20k:{tmp_path}", "segmentation")
    info.write_text("Idx\tName\n" + "".join(f"{i}\t0.1\tclass {i}, thing\n" for i in range(150)))
    dataset = open_dataset(f"ade20k:{tmp_path}", "segmentation")
    same(dataset, scenes, lambda scene: scene.classes - 1, exact=False)
    assert dataset.classes[7] == "class 7"


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    scenes = layouts.pairs(
        root,
        "JPEGImages/{name}.jpg",
        "SegmentationClass/{name}.png",
        ("train", "val"),
        lambda classes: classes.where(classes != 3, 255),
        layouts.palette_png,
    )
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("s0\ns1\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("s2\n")
    dataset = open_dataset(f"voc:{tmp_path}", "segmentation")
    same(dataset, scenes, lambda scene: scene.classes.where(scene.classes != 3, -1), exact=False)
    assert dataset.colours[1] == (128, 0, 0)


def test_nyuv2(tmp_path):
    layouts.nyuv2(tmp_path)
    dataset = open_dataset(f"nyuv2:{tmp_path}", "normals")
    assert (len(dataset.train), len(dataset.val)) == (2, 1)
    sample, scene = dataset.val[0], render(2, layouts.SIZE)
    assert sample.depth[0, 0].isnan()
    assert (sample.depth - scene.depth).abs().nan_to_num().max() < 6e-4
    assert sample.normals[:, 0, 1].isnan().all()
    assert (sample.normals - scene.normals).abs().nan_to_num().max() < 0.02


def test_navi(tmp_path):
    layouts.navi(tmp_path)
    dataset = open_dataset(f"navi:{tmp_path}", "depth")
    sample, scene = dataset.val[0], render(2, 64)
    assert sample.name == "toy/b/000"
    assert torch.equal(sample.depth.isnan(), scene.objects == 0)
    inner = -torch.nn.functional.max_pool2d(-(scene.objects > 0).float()[None], 3, 1, 1)[0] > 0
    assert not sample.normals[:, inner].isnan().any()
    (tmp_path / "toy/b/annotations.json").write_text('[{"filename": "000.jpg"}]')
    with pytest.raises(LoftUpError, match="is not NAVI's: expected a list of entries with filename, split"):
        open_dataset(f"navi:{tmp_path}", "depth")


def test_normals_of_a_plane_are_exact():
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    axis = torch.arange(20) - 9.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([x / 24, y / 24, torch.ones_like(x)])
    depth = (normal[2] * 2) / (normal[:, None, None] * rays).sum(0)
    depth[4, 4] = float("nan")
    found = normals_from_depth(depth, 24)
    assert torch.allclose(found[:, 10, 10], normal, atol=1e-4)
    assert found[:, 4, 4].isnan().all()
    assert found[:, 4, 5].isnan().all()
    assert found[:, 0].isnan().all()
    assert FOCAL > 0


def test_davis_as_video_and_as_objects(tmp_path):
    video = layouts.davis(tmp_path)
    (sequence,) = open_dataset(f"davis:{tmp_path}", "video").val
    assert (sequence.name, len(sequence)) == ("shapes", 4)
    assert torch.equal(sequence.annotation(2), video.annotation(2))
    assert sequence.frame(0).shape == (3, layouts.SIZE, layouts.SIZE)
    objects = open_dataset(f"davis:{tmp_path}", "interactive").val
    numbers = [n for n in video.annotation(0).unique().tolist() if n]
    assert [sample.name for sample in objects] == [f"00000/{number}" for number in numbers]
    assert torch.equal(objects[0].mask, (video.annotation(0) == numbers[0]).long())


def test_grabcut_berkeley_and_sbd(tmp_path):
    scene = render(0, layouts.SIZE)
    mask = (scene.objects == 1).long() * 255
    mask[0, 0] = 128
    layouts.save(scene.image, tmp_path / "g/images/a.jpg")
    layouts.save(mask, tmp_path / "g/masks/a.png")
    (sample,) = open_dataset(f"grabcut:{tmp_path / 'g'}", "interactive").val
    assert torch.equal(sample.mask, (scene.objects == 1).long().masked_fill(mask == 128, -1))
    layouts.save(scene.image, tmp_path / "b/images/a.jpg")
    for number in (1, 2):
        layouts.save((scene.objects == number).long(), tmp_path / f"b/masks/a#{number}.png")
    samples = list(open_dataset(f"berkeley:{tmp_path / 'b'}", "interactive").val)
    assert [sample.name for sample in samples] == ["a/1", "a/2"]
    assert torch.equal(samples[1].mask, (scene.objects == 2).long())
    layouts.save(mask, tmp_path / "b/masks/stray.png")
    with pytest.raises(LoftUpError, match="expected the picture of the mask .*stray.png as images/stray.jpg"):
        open_dataset(f"berkeley:{tmp_path / 'b'}", "interactive")
    layouts.sbd(tmp_path)
    dataset = open_dataset(f"sbd:{tmp_path}", "interactive")
    seen = [n for n in scene.objects.unique().tolist() if n]
    assert [sample.name for sample in dataset.train] == [f"s0/{number}" for number in seen]
    assert torch.equal(dataset.train[0].mask, (scene.objects == seen[0]).long())
    (tmp_path / "dataset/inst/s0.mat").write_bytes(b"nothing")
    with pytest.raises(LoftUpError, match="cannot read SBD's instances"):
        open_dataset(f"sbd:{tmp_path}", "interactive")


def test_missing_and_damaged_files_are_named(tmp_path):
    scenes = layouts.pairs(tmp_path, "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    assert scenes
    (tmp_path / "train/s0.png").unlink()
    dataset = open_dataset(f"camvid:{tmp_path}", "segmentation")
    with pytest.raises(LoftUpError, match=r"expected a label map at .*s0.png, found nothing; .* holds s0.jpg, s1.jpg"):
        dataset.train[0]
    layouts.save(torch.zeros(8, 8, dtype=torch.long), tmp_path / "train/s0.png")
    with pytest.raises(LoftUpError, match=r"s0.png is \(8, 8\), but its picture .*s0.jpg is \(32, 32\)"):
        dataset.train[0]
    (tmp_path / "train/s0.png").write_bytes(b"damaged")
    with pytest.raises(LoftUpError, match="cannot read a label map from"):
        dataset.train[0]
    (tmp_path / "train/s0.jpg").write_bytes(b"damaged")
    with pytest.raises(LoftUpError, match="cannot read the image"):
        dataset.train[0]
    for file in (tmp_path / "val").iterdir():
        file.unlink()
    with pytest.raises(LoftUpError, match=r"expected CamVid frames as \*.jpg in .*val, found no such file"):
        open_dataset(f"camvid:{tmp_path}", "segmentation")
    (tmp_path / "val").rmdir()
    with pytest.raises(
        LoftUpError, match="expected a folder with CamVid frames at .*val, found nothing; .* holds train"
    ):
        open_dataset(f"camvid:{tmp_path}", "segmentation")
    (tmp_path / "val").write_text("")
    with pytest.raises(LoftUpError, match="found a file"):
        open_dataset(f"camvid:{tmp_path}", "segmentation")


def test_fit_resamples_only_what_has_another_scale():
    image = torch.randint(256, (3, 36, 48), dtype=torch.uint8)
    labels = torch.randint(5, (36, 48))
    picture, cut = fit(image, labels, size=(32, 48))
    assert torch.equal(picture, image[:, 2:34].float() / 255)
    assert torch.equal(cut, labels[2:34])
    assert torch.equal(fit(image, size=None)[0], image.float() / 255)
    picture, cut, stack = fit(image, labels, labels.expand(2, -1, -1), size=(18, 18))
    assert picture.shape == (3, 18, 18)
    assert torch.equal(cut, labels[1::2, 1::2][:, 3:21])
    assert torch.equal(stack[1], cut)
    grown, cut = fit(image, labels, size=(72, 96))
    assert torch.equal(cut[::2, ::2], labels)
    assert grown.min() >= 0
    assert grown.max() <= 1
