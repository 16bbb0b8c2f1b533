"""Readers of interactive segmentation datasets: one object of one picture is a sample."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...errors import LoftUpError, translate
from ...files import expect_file
from .base import Dataset, InteractiveSample, Samples, SegmentationSample
from .files import check_size, list_files, read_image, read_lines, read_map
from .registry import register
from .segmentation import voc
from .video import one_object_files

__all__ = ["berkeley", "davis2016_objects", "davis_objects", "grabcut", "sbd", "voc_objects"]


Objects = Samples[InteractiveSample]
Entry = tuple[Path, Path, int]  # picture, mask file, number of the object in it


def _objects(entries: list[Entry], read_mask: Callable[[Path, int], Tensor]) -> Objects:
    """Objects to select; a mask is read from its file and number, (H, W) int64: 1 object, 0 not, -1 not judged."""

    def read(entry: Entry) -> InteractiveSample:
        picture, file, number = entry
        image, mask = read_image(picture), read_mask(file, number)
        check_size(mask, file, image, picture)
        return InteractiveSample(f"{picture.stem}/{number}", image, mask)

    return Samples(entries, read)


@register("grabcut", "objects")
def grabcut(root: Path) -> Dataset[InteractiveSample]:
    """GrabCut: ``images/*`` and ``masks/NAME.png`` or ``.bmp``: 0 not, 255 object, 128 void. No training split.

    Where there is ``labels/NAME.png`` instead, 0 is not, 1 is the object and 255 is void.
    """
    if (root / "labels").is_dir() and not (root / "masks").is_dir():
        pictures = list_files(root / "images", "*.*", "pictures")
        entries = [(picture, root / "labels" / f"{picture.stem}.png", 1) for picture in pictures]
        return Dataset("grabcut", [], _objects(entries, _numbered))
    return Dataset("grabcut", [], _images_and_masks(root))


@register("berkeley", "objects")
def berkeley(root: Path) -> Dataset[InteractiveSample]:
    """Berkeley: ``images/*`` and ``masks/NAME[#k].png``, one object a mask. No training split."""
    return Dataset("berkeley", [], _images_and_masks(root))


def _images_and_masks(root: Path) -> Objects:
    pictures = {picture.stem: picture for picture in list_files(root / "images", "*.*", "pictures")}
    entries = []
    for mask in list_files(root / "masks", "*.*", "masks"):
        stem, _, number = mask.stem.partition("#")
        if stem not in pictures:
            raise LoftUpError(f"expected the picture of the mask {mask} as images/{stem}.jpg or .png in {root}")
        entries.append((pictures[stem], mask, int(number or 1)))
    return _objects(entries, _trimap)


def _trimap(file: Path, number: int) -> Tensor:
    values = read_map(file, "a mask")
    values = values if values.ndim == 2 else values[0]
    if values.max() <= 1:  # masks as 0 and 1
        return values
    return (values == 255).long().masked_fill((values > 0) & (values < 255), -1)


@register("davis", "objects")
def davis_objects(root: Path) -> Dataset[InteractiveSample]:
    """Every object of every tenth frame of DAVIS-2017's validation sequences. No training split."""
    entries = []
    for name in read_lines(root / "ImageSets" / "2017" / "val.txt", "names of sequences"):
        for frame in list_files(root / "JPEGImages" / "480p" / name, "*.jpg", f"frames of {name}")[::10]:
            file = root / "Annotations" / "480p" / name / f"{frame.stem}.png"
            numbers = read_map(file, "a palette picture with object numbers").unique().tolist()
            entries += [(frame, file, number) for number in numbers if 0 < number < 255]
    return Dataset("davis", [], _objects(entries, _numbered))


@register("davis2016", "objects")
def davis2016_objects(root: Path) -> Dataset[InteractiveSample]:
    """The object of every tenth frame of DAVIS-2016, where it is seen. No training split."""
    frames = [frame for files in one_object_files(root).values() for frame in files[::10]]
    entries = [(picture, file, 1) for picture, file in frames if read_map(file).any()]
    return Dataset("davis2016", [], _objects(entries, lambda file, number: (read_map(file) > 0).long()))


@register("voc", "objects")
def voc_objects(root: Path) -> Dataset[InteractiveSample]:
    """The largest connected part of every class in every picture of PASCAL VOC 2012, from its semantic maps.

    Other parts of the class, often further objects of it, are not judged, nor is what is void. Parts of less than a
    hundredth of the picture are left out. For the layouts see :func:`loftup.eval.datasets.segmentation.voc`.
    """
    labels = voc(root)

    def split(samples: Samples[SegmentationSample]) -> Objects:
        entries = []
        for pair in samples.entries:
            values = read_map(pair[1])
            least = 0.01 * values.numel()
            sizes = values.flatten().bincount(minlength=255)[1:255]
            for number in (1 + (sizes >= least).nonzero()[:, 0]).tolist():
                if int((_largest_part(pair[1], number) == 1).sum()) >= least:
                    entries.append((*pair, number))
        return _objects(entries, _largest_part)

    return Dataset("voc", split(labels.train), split(labels.val))  # type: ignore[arg-type]


def _largest_part(file: Path, number: int) -> Tensor:
    with translate(ImportError, 'objects of label maps need SciPy: pip install "loftup[eval]"'):
        from scipy.ndimage import label
    values = read_map(file)
    parts = torch.from_numpy(label((values == number).numpy())[0]).long()
    sizes = parts.flatten().bincount()
    sizes[0] = 0
    largest = parts == sizes.argmax()
    return largest.long().masked_fill((values == 255) | ((values == number) & ~largest), -1)


def _numbered(file: Path, number: int) -> Tensor:
    values = read_map(file, "a palette picture with object numbers")
    return (values == number).long().masked_fill(values == 255, -1)


@register("sbd", "objects")
def sbd(root: Path) -> Dataset[InteractiveSample]:
    """SBD: ``dataset/img/NAME.jpg``, ``dataset/inst/NAME.mat``, ``dataset/train.txt`` and ``val.txt``.

    The root may also be the folder ``dataset`` itself. Every instance is a sample.
    """
    inner = root / "dataset"
    root = inner if inner.is_dir() else root

    def split(name: str) -> Objects:
        entries = []
        for stem in read_lines(root / f"{name}.txt", "names of pictures"):
            file = root / "inst" / f"{stem}.mat"
            numbers = _instances(file).unique().tolist()
            entries += [(root / "img" / f"{stem}.jpg", file, number) for number in numbers if 0 < number < 255]
        return _objects(entries, lambda file, number: (_instances(file) == number).long())

    return Dataset("sbd", split("train"), split("val"))


def _instances(file: Path) -> Tensor:
    expect_file(file, "SBD's instances")
    with translate(ImportError, 'SBD\'s .mat files need SciPy: pip install "loftup[eval]"'):
        from scipy.io import loadmat
    try:
        return torch.from_numpy(loadmat(str(file))["GTinst"]["Segmentation"][0, 0].astype("int64"))
    except Exception as error:  # SciPy raises many kinds on a damaged file
        raise LoftUpError(f"cannot read SBD's instances (GTinst.Segmentation) from {file}: {error}") from error
