"""Readers of semantic segmentation datasets in their published layouts."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...errors import LoftUpError
from .base import Dataset, Samples, SegmentationSample
from .files import check_size, expect_folder, list_files, read_image, read_lines, read_map
from .registry import register
from .simple import has_simple_layout, named_classes, named_files

__all__ = ["ade20k", "camvid", "cityscapes", "coco_stuff", "nyuv2", "simple", "voc"]


Pairs = Samples[SegmentationSample]


def _pairs(files: list[tuple[Path, Path]], decode: Callable[[Tensor], Tensor]) -> Pairs:
    """Pictures with label maps; ``decode`` turns the values of a map into labels, -1 where there is none."""

    def read(pair: tuple[Path, Path]) -> SegmentationSample:
        picture, file = pair
        image, values = read_image(picture), read_map(file)
        check_size(values, file, image, picture)
        return SegmentationSample(picture.stem, image, decode(values))

    return Samples(files, read)


def _names() -> dict[str, dict[str, list]]:  # type: ignore[type-arg]
    return json.loads((Path(__file__).parent / "classes.json").read_text())  # type: ignore[no-any-return]


def _dataset(name: str, train: Pairs, val: Pairs) -> Dataset[SegmentationSample]:
    entry = _names()[name]
    return Dataset(name, train, val, tuple(entry["classes"]), tuple(tuple(c) for c in entry.get("colours", [])))


def _below(classes: int) -> Callable[[Tensor], Tensor]:
    """Labels as they are, -1 for everything from ``classes`` on."""
    return lambda values: values.where(values < classes, -1)


def _looked_up(table: dict[int, int]) -> Callable[[Tensor], Tensor]:
    lookup = torch.full((256,), -1)
    for value, label in table.items():
        lookup[value] = label
    return lambda values: lookup[values.clamp(0, 255)]


@register("camvid", "labels")
def camvid(root: Path) -> Dataset[SegmentationSample]:
    """CamVid with 11 classes: ``train/*.png`` with ``trainannot/*.png``, or ``train/NAME.jpg`` with ``NAME.png``.

    Values 0..10 are classes, everything else (11) is void.
    """

    def split(name: str) -> Pairs:
        annotations = root / f"{name}annot"
        if annotations.is_dir():
            pictures = list_files(root / name, "*.png", "CamVid frames")
            files = [(picture, annotations / picture.name) for picture in pictures]
        else:
            pictures = list_files(root / name, "*.jpg", "CamVid frames")
            files = [(picture, picture.with_suffix(".png")) for picture in pictures]
        return _pairs(files, _below(11))

    return _dataset("camvid", split("train"), split("val"))


@register("cityscapes", "labels")
def cityscapes(root: Path) -> Dataset[SegmentationSample]:
    """Cityscapes with 19 classes: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and ``gtFine/.../*_labelIds.png``."""
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    decode = _looked_up({value: label for label, value in enumerate(ids)})

    def split(name: str) -> Pairs:
        pictures = list_files(root / "leftImg8bit" / name, "*/*_leftImg8bit.png", "Cityscapes pictures")
        cities = [root / "gtFine" / name / picture.parent.name for picture in pictures]
        names = [picture.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png") for picture in pictures]
        return _pairs([(p, city / file) for p, city, file in zip(pictures, cities, names, strict=True)], decode)

    return _dataset("cityscapes", split("train"), split("val"))


@register("coco_stuff", "labels")
def coco_stuff(root: Path) -> Dataset[SegmentationSample]:
    """COCO-Stuff with 27 coarse classes: ``images/SPLIT2017/*.jpg`` and the pixel maps ``annotations/SPLIT2017/*.png``.

    Where ``curated/SPLIT2017.txt`` names pictures (one stem a line), those alone are taken.
    """
    groups: list[list[int]] = _names()["coco_stuff"]["ids"]
    decode = _looked_up({value: label for label, values in enumerate(groups) for value in values})

    def split(name: str) -> Pairs:
        annotations = expect_folder(root / "annotations" / name, "COCO-Stuff pixel maps (PNG)")
        subset = root / "curated" / f"{name}.txt"
        if subset.is_file():
            pictures = [root / "images" / name / f"{stem}.jpg" for stem in read_lines(subset, "names of pictures")]
        else:
            pictures = list_files(root / "images" / name, "*.jpg", "COCO pictures")
        return _pairs([(picture, annotations / f"{picture.stem}.png") for picture in pictures], decode)

    return _dataset("coco_stuff", split("train2017"), split("val2017"))


@register("ade20k", "labels")
def ade20k(root: Path) -> Dataset[SegmentationSample]:
    """ADE20K's scene parsing challenge, 150 classes: ``images/training/*.jpg`` and ``annotations/training/*.png``.

    The root may be the folder ``ADEChallengeData2016`` or the one around it. Value 0 is void.
    """
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root

    def split(name: str) -> Pairs:
        pictures = list_files(root / "images" / name, "*.jpg", "ADE20K pictures")
        files = [(picture, root / "annotations" / name / f"{picture.stem}.png") for picture in pictures]
        return _pairs(files, lambda values: values - 1)

    file = root / "objectInfo150.txt"
    lines = read_lines(file, "ADE20K's list of classes")[1:]
    classes = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines)
    if len(classes) != 150:
        raise LoftUpError(f"{file} names {len(classes)} classes, expected a heading and 150 lines")
    return Dataset("ade20k", split("training"), split("validation"), classes)


@register("voc", "labels")
def voc(root: Path) -> Dataset[SegmentationSample]:
    """PASCAL VOC 2012, 21 classes with the background: ``JPEGImages``, ``SegmentationClass``, ``ImageSets``.

    The root may be ``VOC2012`` or the folder around ``VOCdevkit``, or a part of VOC in the simple layout (see
    :func:`simple`). Value 255 is void.
    """
    if has_simple_layout(root):
        entry = _names()["voc"]
        return _simple("voc", root, tuple(entry["classes"]), tuple(tuple(colour) for colour in entry["colours"]))
    inner = root / "VOCdevkit" / "VOC2012"
    root = inner if inner.is_dir() else root

    def split(name: str) -> Pairs:
        stems = read_lines(root / "ImageSets" / "Segmentation" / f"{name}.txt", "names of pictures")
        files = [(root / "JPEGImages" / f"{stem}.jpg", root / "SegmentationClass" / f"{stem}.png") for stem in stems]
        return _pairs(files, _below(21))

    return _dataset("voc", split("train"), split("val"))


@register("nyuv2", "labels")
def nyuv2(root: Path) -> Dataset[SegmentationSample]:
    """NYUv2 in the simple layout (see :func:`simple`), 39 classes or as many as ``classes.json`` names."""
    return _simple("nyuv2", root, named_classes(root))


@register("simple", "labels")
def simple(root: Path) -> Dataset[SegmentationSample]:
    """Any dataset in the simple layout: ``images/NAME.jpg`` (or ``.png``) and ``labels/NAME.png``.

    ``train.txt`` and ``test.txt`` name pictures, one a line; ``classes.json`` is a list of the names of the classes
    0, 1, 2, ... Values beyond them are void.
    """
    return _simple(root.resolve().name, root, named_classes(root))


def _simple(
    name: str, root: Path, classes: tuple[str, ...], colours: tuple[tuple[int, int, int], ...] = ()
) -> Dataset[SegmentationSample]:
    decode = _below(len(classes))
    train, test = (_pairs(named_files(root, split), decode) for split in ("train", "test"))
    return Dataset(name, train, test, classes, colours)
