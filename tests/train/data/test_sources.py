"""Pictures with masks from folders of every kind, and which kind a path is."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from material import drawn_scene, shared
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loftup import LoftUpError
from loftup.train.data.felzenszwalb import felzenszwalb_map
from loftup.train.data.loader import open_data
from loftup.train.data.sa1b import annotate, write_sa1b
from loftup.train.data.sources import (
    ImageFolder,
    LabelFolder,
    SA1BFolder,
    SA1BShards,
    Several,
    UnreadableError,
    open_source,
)

SIZE = (24, 32)
WHOLE = ((0, 0, *SIZE), SIZE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)


def halves():
    """Two masks: the upper half, and the left third."""
    masks = np.zeros((2, *SIZE), dtype=bool)
    masks[0, :12], masks[1, :, :10] = True, True
    return masks


def sa1b_folder(folder, names=("a.jpg", "deep/b.png")):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn_scene(*SIZE).save(path)
        write_sa1b(path.with_suffix(".json"), annotate(halves()), 32, 24, path.name)
    return folder


def label_folder(folder):
    folder.mkdir(exist_ok=True)
    drawn_scene(*SIZE).save(folder / "a.jpg")
    for number in range(3):
        labels = np.full(SIZE, 300, dtype=np.uint16)
        labels[: 4 * (number + 1)] = number
        Image.fromarray(labels).save(folder / f"a.seg{number}.png")
    drawn_scene(*SIZE).save(folder / "b.webp")
    palette = Image.fromarray(halves()[1].astype(np.uint8) * 3, "L").convert("P")
    palette.putpalette([255, 0, 0, 9, 9, 9, 0, 0, 255, 255, 0, 0])
    palette.save(folder / "b.png")
    return folder


def test_sa1b_folders_are_read(tmp_path):
    source = SA1BFolder(sa1b_folder(tmp_path))
    assert len(source) == 2
    for index, name in enumerate(("a.jpg", "deep/b.png")):
        picture = source.read(index, generator())
        assert picture.name == name
        assert picture.image.dtype == torch.uint8
        assert torch.equal(picture.image, pixels(tmp_path / name))
        assert torch.equal(picture.masks.crop(*WHOLE), torch.from_numpy(halves()))


def test_sa1bs_own_fields_are_read(tmp_path):
    """A file as SA-1B has it, compressed counts written by hand."""
    Image.new("RGB", (3, 2)).save(tmp_path / "sa_1.jpg")
    annotation = {
        "segmentation": {"size": [2, 3], "counts": "123"}, "bbox": [0.0, 0.0, 1.0, 2.0], "area": 2, "id": 5,
        "predicted_iou": 0.9, "stability_score": 0.96, "point_coords": [[1.0, 1.0]], "crop_box": [0.0, 0.0, 3.0, 2.0],
    }  # fmt: skip
    image = {"image_id": 1, "width": 3, "height": 2, "file_name": "sa_1.jpg"}
    (tmp_path / "sa_1.json").write_text(json.dumps({"image": image, "annotations": [annotation]}))
    masks = SA1BFolder(tmp_path).read(0, generator()).masks
    assert masks.crop((0, 0, 2, 3), (2, 3)).int().tolist() == [[[0, 1, 0], [1, 0, 0]]]


def test_left_out_pictures_are_said_once(tmp_path, caplog):
    sa1b_folder(tmp_path)
    drawn_scene(*SIZE).save(tmp_path / "lonely.jpg")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / ".hidden.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "loftup"):
        source = SA1BFolder(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: left out 1 pictures without a json",
        f"{tmp_path}: left out 1 json files without a picture",
    ]
    assert len(source) == 2


def test_sa1b_folders_without_masks_are_refused(tmp_path):
    drawn_scene(*SIZE).save(tmp_path / "a.jpg")
    with pytest.raises(LoftUpError, match=r"none of the 1 pictures in .* has a NAME.json beside it; .*loftup masks "):
        SA1BFolder(tmp_path)
    drawn_scene(*SIZE).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(LoftUpError, match=r"a.jpg and a.png in .* would share their masks; rename one"):
        SA1BFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda found: found["image"].update(width=31), "a.json is of a picture of 24x31, a.jpg has 24x32; make its"),
        (lambda found: found.pop("annotations"), "a.json as SA-1B's annotations: no field 'annotations'"),
        (lambda found: found["annotations"][0].pop("segmentation"), "annotations: no field 'segmentation'"),
        (lambda found: found["annotations"][1]["segmentation"].update(counts="2"), "mask 1: run lengths add up to 2"),
        (lambda found: found["annotations"][0]["segmentation"].update(size=5), "'int' object is not iterable"),
        (lambda found: found.update(image=None), "'NoneType' object is not subscriptable"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, change, text):
    path = sa1b_folder(tmp_path, ["a.jpg"]) / "a.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(UnreadableError) as caught:
        SA1BFolder(tmp_path).read(0, generator())
    assert text in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    source = SA1BFolder(sa1b_folder(tmp_path))
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:50])
    with pytest.raises(UnreadableError, match=r"cannot read .*a.json as SA-1B's annotations: "):
        source.read(0, generator())
    (tmp_path / "a.json").unlink()
    with pytest.raises(UnreadableError, match=r"cannot read .*a.json: No such file"):
        source.read(0, generator())
    (tmp_path / "deep" / "b.png").write_bytes((tmp_path / "deep" / "b.png").read_bytes()[:100])
    with pytest.raises(UnreadableError, match=r"cannot read the image .*b.png"):
        source.read(1, generator())


def test_pipes_and_endless_brackets_are_unreadable(tmp_path):
    folder = sa1b_folder(tmp_path)
    for name, content in (("a.json", None), ("deep/b.json", "[" * 100_000)):
        (folder / name).unlink()
        if content is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_text(content)
    source = SA1BFolder(folder)
    for index, text in enumerate(["a.json: .*is no regular file", "b.json as SA-1B's annotations: maximum recursion"]):
        with pytest.raises(UnreadableError, match=text):
            source.read(index, generator())
    labelled = label_folder(tmp_path / "labels")
    for path in labelled.rglob("*.png"):
        path.unlink()
        os.mkfifo(path)
    source = LabelFolder(labelled)
    with pytest.raises(UnreadableError, match=r"cannot read the label map .*\.png: .*is no regular file"):
        source.read(0, generator())
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(LoftUpError, match=r"cannot read .*x.tar as a tar file: .*is no regular file"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("index", [-1, 2])
def test_pictures_that_are_not_there(tmp_path, index):
    for source in (SA1BFolder(sa1b_folder(tmp_path / "a")), LabelFolder(label_folder(tmp_path / "b"))):
        for each in (source, Several([source])):
            with pytest.raises(IndexError, match=f"no picture {index}, there are 2"):
                each.read(index, generator())


def test_label_folders_pick_one_map_at_random(tmp_path):
    source = LabelFolder(label_folder(tmp_path))
    assert len(source) == 2
    seen = set()
    for seed in range(20):
        first, again = (source.read(0, generator(seed)).masks.labels for _ in range(2))
        assert np.array_equal(first, again)
        number = int(first[0, 0])
        assert np.array_equal(first, np.array(Image.open(tmp_path / f"a.seg{number}.png")))
        seen.add(number)
    assert seen == {0, 1, 2}
    assert first.max() == 300


def test_void_is_no_mask(tmp_path):
    labels = np.array([[0, 0, 255], [7, 7, 255]], dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg")
    masks = LabelFolder(tmp_path, void=255).read(0, generator()).masks
    assert len(masks) == 2
    assert masks.crop((0, 0, 2, 3), (2, 3)).sum((1, 2)).tolist() == [2, 2]
    assert len(LabelFolder(tmp_path).read(0, generator()).masks) == 3
    assert len(open_data([str(tmp_path)], "auto", [1.0], 255).read(0, generator()).masks) == 2


def test_palette_indices_are_labels(tmp_path):
    picture = LabelFolder(label_folder(tmp_path)).read(1, generator())
    assert picture.name == "b.webp"
    assert np.array_equal(picture.masks.labels, halves()[1] * 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_png_photographs_may_have_numbered_maps(tmp_path, dtype):
    drawn_scene(*SIZE).save(tmp_path / "a.png")
    Image.fromarray(halves()[0].astype(dtype)).save(tmp_path / "a.seg0.png")
    picture = LabelFolder(tmp_path).read(0, generator())
    assert torch.equal(picture.image, pixels(tmp_path / "a.png"))
    assert torch.equal(picture.masks.crop(*WHOLE), torch.from_numpy(np.stack([~halves()[0], halves()[0]])))


def test_labels_that_do_not_fit_are_refused(tmp_path, caplog):
    Image.fromarray(np.zeros((24, 31), dtype=np.uint8)).save(label_folder(tmp_path) / "b.png")
    source = LabelFolder(tmp_path)
    with pytest.raises(UnreadableError, match=r"b.png has 24x31 labels, b.webp has 24x32 pixels; expected the same"):
        source.read(1, generator())
    drawn_scene(*SIZE).save(tmp_path / "b.png")
    with pytest.raises(UnreadableError, match=r"b.png has mode 'RGB'; expected a label map of one channel, 8 or 16"):
        source.read(1, generator())
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(UnreadableError, match=r"cannot read the label map .*b.png"):
        source.read(1, generator())
    for name in ("c.jpg", "d.png", "e.seg0.png"):
        drawn_scene(*SIZE).save(tmp_path / name)
    assert len(LabelFolder(tmp_path)) == 2
    assert "left out 3 pictures without a partner (picture or label map)" in caplog.text


def test_what_belongs_together_must_be_plain(tmp_path):
    drawn_scene(*SIZE).save(tmp_path / "c.jpg")
    with pytest.raises(LoftUpError, match=r"none of the 1 pictures in .* has a label map NAME.png or NAME.segK.png"):
        LabelFolder(tmp_path)
    drawn_scene(*SIZE).save(tmp_path / "c.png")
    drawn_scene(*SIZE).save(tmp_path / "c.seg0.png")
    with pytest.raises(LoftUpError, match=r"c.jpg in .* has label maps of two kinds, c.png and c.seg0.png; keep one"):
        LabelFolder(tmp_path)
    (tmp_path / "c.png").unlink()
    drawn_scene(*SIZE).save(tmp_path / "c.webp")
    with pytest.raises(LoftUpError, match=r"c.jpg and c.webp in .* would share their masks"):
        LabelFolder(tmp_path)


def test_plain_pictures_are_segmented_on_the_fly(tmp_path):
    drawn_scene(60, 80).save(tmp_path / "a.png")
    source = ImageFolder(tmp_path, scales=(20, 300), min_size=5, sigma=0.5, side=30)
    assert len(source) == 1
    seen = set()
    for seed in range(8):
        picture = source.read(0, generator(seed))
        seen.add(picture.masks.crop((0, 0, 60, 80), (60, 80)).numpy().tobytes())
        assert torch.equal(picture.image, pixels(tmp_path / "a.png"))
    expected = [felzenszwalb_map(picture.image, scale, min_size=5, sigma=0.5, side=30) for scale in (20, 300)]
    assert len(picture.masks) in map(len, expected)
    assert seen == {made.crop((0, 0, 60, 80), (60, 80)).numpy().tobytes() for made in expected}
    with pytest.raises(ValueError, match="no scale given"):
        ImageFolder(tmp_path, scales=())


def test_pictures_are_upright(tmp_path):
    upright, exif = drawn_scene(*SIZE), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(ImageFolder(tmp_path).read(0, generator()).image, torch.tensor(np.array(upright)).movedim(-1, 0))


def test_links_to_folders_are_followed_once(tmp_path):
    sa1b_folder(tmp_path / "data")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "deep" / "up").symlink_to(tmp_path / "data")
    source = SA1BFolder(tmp_path / "all")
    assert [source.read(index, generator()).name for index in range(len(source))] == ["link/a.jpg", "link/deep/b.png"]


def test_several_sources_follow_one_another(tmp_path):
    first, second = SA1BFolder(sa1b_folder(tmp_path / "a")), LabelFolder(label_folder(tmp_path / "b"))
    source = Several([first, second, first])
    assert len(source) == 6
    names = [source.read(index, generator()).name for index in range(6)]
    assert names == ["0/a.jpg", "0/deep/b.png", "1/a.jpg", "1/b.webp", "2/a.jpg", "2/deep/b.png"]
    assert np.array_equal(source.read(2, generator(3)).masks.labels, second.read(0, generator(3)).masks.labels)
    with pytest.raises(ValueError, match="no source given"):
        Several([])


class Read(Dataset):
    """Pictures by number, each with a generator of its own."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        picture = self.source.read(index, generator(index))
        return picture.name, picture.image, picture.masks.crop(*WHOLE)


def test_worker_processes_read_the_same(tmp_path):
    data = Read(Several([SA1BFolder(sa1b_folder(tmp_path / "a")), LabelFolder(label_folder(tmp_path / "b"))]))
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    there, copied = list(loader), pickle.loads(pickle.dumps(data))
    for index in range(4):
        name, image, masks = data[index]
        for other in (there[index], copied[index]):
            assert name == other[0]
            assert torch.equal(image, other[1])
            assert torch.equal(masks, other[2])


def test_the_kind_is_seen(tmp_path):
    sa1b_folder(tmp_path / "a")
    label_folder(tmp_path / "b")
    (tmp_path / "c").mkdir()
    for name in ("a.png", "b.jpg", "b.webp"):
        drawn_scene(*SIZE).save(tmp_path / "c" / name)
    (tmp_path / "c" / "notes.json").write_text("{}")
    kinds = {"a": SA1BFolder, "b": LabelFolder, "c": ImageFolder}
    for name, kind in kinds.items():
        assert type(open_source(tmp_path / name)) is kind
        assert type(open_source(str(tmp_path / name))) is kind
    assert type(open_source(tmp_path / "a", "images")) is ImageFolder
    assert open_source(tmp_path / "c", scales=[7]).scales == [7]
    assert open_source(tmp_path / "c", "images", min_size=3).options["min_size"] == 3


def test_what_has_no_kind_is_refused(tmp_path):
    drawn_scene(*SIZE).save(tmp_path / "a.jpg")
    with pytest.raises(LoftUpError, match="unknown kind of data 'coco'; expected auto, sa1b, shards, labels, images"):
        open_source(tmp_path, "coco")
    with pytest.raises(
        LoftUpError, match=r"is data of kind 'images', which has no option factor; it has scales, sigma"
    ):
        open_source(tmp_path, factor=2)
    with pytest.raises(LoftUpError, match=r"of kind 'labels', which has no option scales, sigma; it has void"):
        open_source(tmp_path, "labels", sigma=1, scales=[1])
    for kind in ("auto", "sa1b", "labels", "images"):
        with pytest.raises(LoftUpError, match=r"no folder .*nowhere"):
            open_source(tmp_path / "nowhere", kind)
        with pytest.raises(LoftUpError, match=r"no folder .*a.jpg: it is a file"):
            open_source(tmp_path / "a.jpg", kind)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoftUpError, match=r"empty holds neither tar files nor pictures; looked for .tar, .bmp, .jpeg"):
        open_source(tmp_path / "empty")
    for kind in ("sa1b", "images"):
        with pytest.raises(LoftUpError, match=r"no pictures in the folder .*empty; looked for .bmp, .jpeg"):
            open_source(tmp_path / "empty", kind)
    label_folder(sa1b_folder(tmp_path / "both"))
    with pytest.raises(LoftUpError, match=r"both holds data of kinds sa1b and labels; say which: .* data.kind or"):
        open_source(tmp_path / "both")


def test_real_label_maps(tmp_path):
    source = open_source(shared("data/bsds500/val"))
    picture = source.read(0, generator())
    assert isinstance(source, LabelFolder)
    assert len(source) == 100
    assert sorted(picture.image.shape) == [3, 321, 481]
    masks = picture.masks.crop((0, 0, *picture.image.shape[1:]), (100, 100))
    assert len(picture.masks) >= len(masks) > 1
    assert bool((masks.sum(0) == 1).all())


def test_shards_are_opened(tmp_path):
    import tarfile

    sa1b_folder(tmp_path / "a")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
    for path in (
        tmp_path / "tars",
        tmp_path / "tars" / "x.tar",
        f"{tmp_path}/tars/*.tar",
        f"{tmp_path}/tars/{{x,x}}.tar",
    ):
        assert type(open_source(path)) is SA1BShards
