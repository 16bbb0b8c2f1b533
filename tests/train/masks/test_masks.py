"""Making masks, writing them as SA-1B does, and doing so for a folder."""

import errno
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import drawn_scene
from PIL import Image
from skimage.segmentation import felzenszwalb
from small_sam import write_small_sam

import loftup
from loftup import LoftUpError
from loftup.train.data.felzenszwalb import felzenszwalb_map
from loftup.train.data.regions import RleMasks
from loftup.train.data.sa1b import annotate, write_sa1b
from loftup.train.data.sources import SA1BFolder
from loftup.train.masks.make import make_masks
from loftup.train.masks.makers import FelzenszwalbMaker, SamMaker

QUICK = FelzenszwalbMaker(scales=(20, 200), min_size=10)


def full_size(annotations, height, width):
    masks = RleMasks([annotation["segmentation"] for annotation in annotations], (height, width))
    return masks.crop((0, 0, height, width), (height, width)).numpy()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    drawn_scene(30, 40).save(folder / "a.jpg")
    drawn_scene(40, 30).save(folder / "deep" / "b.png")
    return folder


def test_a_map_is_scikit_images():
    scene = drawn_scene(60, 80)
    expected = felzenszwalb(np.array(scene), scale=50, sigma=0.6, min_size=9)
    assert expected.max() > 5
    for image in (scene, torch.tensor(np.array(scene)).movedim(-1, 0), scene.convert("RGBA")):
        found = felzenszwalb_map(image, 50, sigma=0.6, min_size=9)
        assert np.array_equal(found.labels, expected)


def test_large_pictures_are_segmented_small():
    scene = drawn_scene(90, 120)
    small = scene.resize((40, 30), Image.Resampling.BICUBIC)
    expected = felzenszwalb(np.array(small), scale=50, sigma=0.8, min_size=9)
    found = felzenszwalb_map(scene, 50, min_size=9, side=30).labels
    assert np.array_equal(found, np.kron(expected, np.ones((3, 3), int)))


def test_the_segments_of_all_scales_are_masks_once_and_large_ones_first():
    scene = drawn_scene(60, 80)
    scales = (30, 100, 300)
    labels = [felzenszwalb(np.array(scene), scale=scale, sigma=0.8, min_size=10) for scale in scales]
    expected = {(one == value).tobytes() for one in labels for value in np.unique(one)}
    annotations = FelzenszwalbMaker(scales, min_size=10)(scene)
    found = full_size(annotations, 60, 80)
    assert {mask.tobytes() for mask in found} == expected
    assert len(found) == len(expected) < sum(one.max() + 1 for one in labels)
    areas = [annotation["area"] for annotation in annotations]
    assert areas == sorted(areas, reverse=True) == found.sum((1, 2)).tolist()
    assert min(areas) >= 10
    assert annotations == FelzenszwalbMaker(scales, min_size=10)(scene)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2000)])
def test_pictures_of_hardly_a_pixel(size):
    assert [a["area"] for a in FelzenszwalbMaker(side=1)(Image.new("RGB", size))] == [size[0] * size[1]]


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.uint8)])
def test_other_tensors_are_refused(image):
    with pytest.raises(ValueError, match=r"image must be \(3, H, W\) uint8, got \("):
        felzenszwalb_map(image, 50)


def test_annotations_by_hand():
    masks = np.zeros((4, 3, 4), dtype=bool)
    masks[0, 1, 2] = masks[3, 1, 2] = True
    masks[1, 1:, :3] = True
    assert annotate(masks, [0.25, 0.5, 0.75, 1.0]) == [
        {
            "segmentation": {"size": [3, 4], "counts": "1210002"},
            "bbox": [0, 1, 3, 2], "area": 6, "crop_box": [0, 0, 4, 3], "predicted_iou": 0.5, "id": 0,
        },
        {
            "segmentation": {"size": [3, 4], "counts": "714"},
            "bbox": [2, 1, 1, 1], "area": 1, "crop_box": [0, 0, 4, 3], "predicted_iou": 0.25, "id": 1,
        },
    ]  # fmt: skip
    assert np.array_equal(full_size(annotate(masks), 3, 4), masks[[1, 0]])
    assert "predicted_iou" not in annotate(masks)[0]
    assert annotate([]) == []
    with pytest.raises(ValueError, match="zip"):
        annotate(masks, [0.5])


def test_a_file_is_sa1bs(tmp_path):
    write_sa1b(tmp_path / "a.json", [{"id": 0}], 4, 3, "a.jpg")
    assert (tmp_path / "a.json").read_text() == (
        '{"image":{"image_id":"a","width":4,"height":3,"file_name":"a.jpg"},"annotations":[{"id":0}]}\n'
    )
    write_sa1b(tmp_path / "b.json", [], 4, 3, "b.jpg", {"made_by": "me"})
    assert json.loads((tmp_path / "b.json").read_text())["info"] == {"made_by": "me"}


@pytest.fixture
def full_disk(monkeypatch):
    def sync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)


def test_a_full_disk_leaves_nothing_and_names_the_file(photos, full_disk, tmp_path):
    for output in (None, tmp_path / "out"):
        with pytest.raises(OSError, match=r"No space left on device: '.*a.j") as caught:
            make_masks(photos, QUICK, output, progress=False)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(file.name for file in photos.iterdir()) == ["a.jpg", "deep"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_gets_its_masks(photos):
    report = make_masks(photos, QUICK, progress=False)
    source = SA1BFolder(photos)
    assert len(source) == 2
    for index, (name, (height, width)) in enumerate({"a.jpg": (30, 40), "deep/b.png": (40, 30)}.items()):
        picture = source.read(index, torch.Generator())
        assert picture.name == name
        expected = QUICK(picture.image)
        assert len(expected) == len(picture.masks) == report.counts[index] > 2
        masks = picture.masks.crop((0, 0, height, width), (height, width))
        assert np.array_equal(masks.numpy(), full_size(expected, height, width))
    assert (report.finished, report.failed) == (0, {})
    info = json.loads((photos / "a.json").read_text())["info"]
    assert info == {
        "made_by": f"loftup {loftup.__version__}",
        "settings": {
            "maker": "felzenszwalb", "scales": [20.0, 200.0], "sigma": 0.8, "min_size": 10, "side": 480,
            "picture_bytes": (photos / "a.jpg").stat().st_size,
        },
    }  # fmt: skip


def test_another_folder_gets_pictures_and_masks(photos, tmp_path):
    before = sorted(photos.rglob("*"))
    make_masks(photos, QUICK, tmp_path / "out", progress=False)
    assert sorted(photos.rglob("*")) == before
    files = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert files == ["a.jpg", "a.json", "deep/b.json", "deep/b.png"]
    assert (tmp_path / "out" / "a.jpg").read_bytes() == (photos / "a.jpg").read_bytes()
    assert len(SA1BFolder(tmp_path / "out")) == 2


def test_a_run_is_resumed(photos, tmp_path):
    class Stops(FelzenszwalbMaker):
        def __call__(self, picture):
            if picture.height == 40:
                raise KeyboardInterrupt
            return super().__call__(picture)

    for output in (None, tmp_path / "out"):
        target = output or photos
        with pytest.raises(KeyboardInterrupt):
            make_masks(photos, Stops(scales=(20, 200), min_size=10), output, progress=False)
        first = (target / "a.json").stat().st_mtime_ns
        report = make_masks(photos, QUICK, output, progress=False)
        assert (report.finished, len(report.counts)) == (1, 1)
        assert (target / "a.json").stat().st_mtime_ns == first
        report = make_masks(photos, QUICK, output, progress=False)
        assert (report.finished, report.counts) == (2, [])
    (tmp_path / "out" / "a.jpg").unlink()
    assert make_masks(photos, QUICK, tmp_path / "out", progress=False).finished == 1
    assert (tmp_path / "out" / "a.jpg").exists()


def test_other_masks_are_not_taken_as_finished(photos):
    make_masks(photos, QUICK, progress=False)
    before = (photos / "a.json").read_bytes()
    coarse = FelzenszwalbMaker(scales=(20, 300), min_size=10)
    with pytest.raises(
        LoftUpError,
        match=r"a.json was made with other settings \(scales \[20.0, 200.0\], now \[20.0, 300.0\]\); overwrite it",
    ):
        make_masks(photos, coarse, progress=False)
    drawn_scene(31, 40).save(photos / "a.jpg")
    with pytest.raises(LoftUpError, match=r"a.json was made with other settings \(picture_bytes \d+, now \d+\)"):
        make_masks(photos, QUICK, progress=False)
    assert (photos / "a.json").read_bytes() == before
    assert len(make_masks(photos, coarse, overwrite=True, progress=False).counts) == 2
    assert make_masks(photos, coarse, progress=False).finished == 2
    for content in ('{"image": {}, "annotations": []}', "[]", "{", '{"info": {"settings": 3}}', '{"info": null}'):
        (photos / "a.json").write_text(content)
        with pytest.raises(LoftUpError, match=r"a.json was not made by loftup masks, which replaces only its own"):
            make_masks(photos, coarse, progress=False)
        with pytest.raises(LoftUpError, match=r"a.json was not made by loftup masks, which replaces only its own"):
            make_masks(photos, coarse, overwrite=True, progress=False)
        assert (photos / "a.json").read_text() == content


def test_pictures_that_fail_leave_the_others_alone(photos):
    (photos / "broken.jpg").write_bytes(b"x")
    (photos / "short.jpg").write_bytes((photos / "a.jpg").read_bytes()[:400])

    class Memory(FelzenszwalbMaker):
        def __call__(self, picture):
            if picture.height == 40:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
            return super().__call__(picture)

    report = make_masks(photos, Memory(min_size=10), progress=False)
    assert list(report.failed) == ["broken.jpg", "deep/b.png", "short.jpg"]
    assert report.failed["broken.jpg"].startswith(f"cannot read the image {photos / 'broken.jpg'}: ")
    assert report.failed["deep/b.png"] == "CUDA out of memory. Tried to allocate 3 GiB"
    assert len(report.counts) == 1
    assert sorted(file.name for file in photos.rglob("*.json")) == ["a.json"]


def test_folders_that_cannot_be_used_are_refused(photos, tmp_path):
    for output in (photos / "out", photos / "deep" / "out", tmp_path / "photos" / ".." / "photos" / "out"):
        with pytest.raises(ValueError, match=r"out is inside .*photos, whose pictures include those below it"):
            make_masks(photos, QUICK, output)
    assert len(make_masks(photos, QUICK, photos, progress=False).counts) == 2
    drawn_scene(30, 40).save(photos / "a.webp")
    with pytest.raises(LoftUpError, match=r"a.jpg and a.webp in .* would share their masks; rename one, or take"):
        make_masks(photos, QUICK)
    with pytest.raises(LoftUpError, match="no folder nowhere"):
        make_masks("nowhere", QUICK)


def test_a_sam_model_makes_masks(photos, tmp_path):
    sam = write_small_sam(tmp_path / "sam")
    maker = SamMaker(sam, points_per_side=3, points_per_batch=4, pred_iou_threshold=0, stability_threshold=0)
    report = make_masks(photos, maker, progress=False)
    assert min(report.counts) > 0
    options = {"points_per_batch": 4, "points_per_crop": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    made = maker.pipeline(Image.open(photos / "deep" / "b.png"), **options)
    best = {}
    for mask, score in zip(made["masks"], made["scores"], strict=True):
        best.setdefault(np.asarray(mask).tobytes(), float(score))
    picture = SA1BFolder(photos).read(1, torch.Generator())
    masks = picture.masks.crop((0, 0, 40, 30), (40, 30)).numpy()
    assert {mask.tobytes() for mask in masks} == {mask for mask in best if any(mask)}
    written = json.loads((photos / "deep" / "b.json").read_text())
    for mask, annotation in zip(masks, written["annotations"], strict=True):
        assert annotation["predicted_iou"] == pytest.approx(best[mask.tobytes()], abs=1e-6)
        assert annotation["crop_box"] == [0, 0, 30, 40]
    weights = (sam / "model.safetensors").stat()
    assert maker.settings == {
        "maker": "sam", "model": f"sam {weights.st_size}@{weights.st_mtime_ns}",
        "points_per_crop": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0,
    }  # fmt: skip
    strict = SamMaker(sam, points_per_side=3)
    with pytest.raises(
        LoftUpError, match=r"other settings \(pred_iou_thresh 0, now 0.88; stability_score_thresh 0, now"
    ):
        make_masks(photos, strict, progress=False)
    assert make_masks(photos, strict, overwrite=True, progress=False).counts == [0, 0]
    assert len(SA1BFolder(photos).read(0, torch.Generator()).masks) == 0


def test_a_loaded_pipeline_is_used_as_it_is():
    asked = []

    def pipeline(picture, **options):
        asked.append(options)
        masks = torch.zeros(3, 3, 4, dtype=torch.bool)
        masks[0, 0, 0] = masks[1] = True
        return {"masks": list(masks), "scores": torch.tensor([0.91, 0.97, 0.99])}

    pipeline.model = SimpleNamespace(name_or_path="facebook/sam-vit-base")
    maker = SamMaker(pipeline, points_per_batch=16)
    found = maker(Image.new("RGB", (4, 3)))
    assert [(annotation["area"], annotation["predicted_iou"]) for annotation in found] == [(12, 0.97), (1, 0.91)]
    assert asked == [
        {"points_per_batch": 16, "points_per_crop": 32, "pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}
    ]
    assert maker.settings["model"] == "facebook/sam-vit-base"
    pipeline.model = SimpleNamespace(name_or_path="")
    assert maker.settings["model"] == "SimpleNamespace"


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(answers, monkeypatch):
    from huggingface_hub import constants

    seen = []

    def pipeline(*arguments, **options):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("not there")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("loftup.weights.hub.Repository.answers", lambda self, file: answers)
    monkeypatch.setattr("transformers.pipeline", pipeline)
    with pytest.raises(LoftUpError, match="cannot load 'facebook/sam-vit-base' for mask generation: not there"):
        SamMaker("facebook/sam-vit-base")
    assert seen == [not answers]
    assert constants.HF_HUB_OFFLINE is False


def test_models_that_make_no_masks_are_refused(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    with pytest.raises(
        LoftUpError, match=r"cannot load '.*' for mask generation: .*; expected a SAM model of transfor"
    ):
        SamMaker(tmp_path)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(LoftUpError, match="a ViTModel makes no masks of points; expected a SAM model"):
        SamMaker(tmp_path)


@pytest.mark.parametrize(
    ("module", "use", "text"),
    [
        ("skimage.segmentation", lambda: felzenszwalb_map(drawn_scene(), 1), "Felzenszwalb masks need scikit-image"),
        ("pycocotools", lambda: annotate([np.ones((2, 2), bool)]), "run-length codes need pycocotools"),
        ("transformers", lambda: SamMaker("facebook/sam-vit-base"), "SAM masks need transformers"),
    ],
)
def test_missing_libraries_name_the_extra(monkeypatch, module, use, text):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoftUpError, match=rf'{text}: pip install "loftup\[masks\]"'):
        use()
