r"""Gather labelled pictures of several sets to train "any" on, a folder for each: as they are, and mosaics of four.

    python benchmarks/recipes/any_pictures.py --bsds bsds500/train --voc voc2012 --nyu nyuv2 --camvid camvid/train \
        -o data/any

Pictures of the training splits alone are taken. In the label maps, NAME.png beside NAME.jpg, 255 is no mask: train with
data.void=255 and, in this order, data.path=[data/any/bsds,data/any/camvid,data/any/nyu,data/any/voc] and
data.classes=[0,11,39,21]. A mosaic shows crops of four pictures of one set at half the size, so that masks are small
there.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

VOID = 255
SIDE = 448  # of a mosaic, in pixels
FRAME = 12  # white pixels around NYU's pictures
EVERY = 2  # of CamVid's frames, which follow one another

Labelled = tuple[Path, Path]
Pixels = NDArray[np.uint8]


def pairs(kind: str, folder: Path) -> list[Labelled]:
    """Pictures and label maps of a set's training split."""
    if kind in ("voc", "nyu"):
        names = (folder / "train.txt").read_text().split()
        return [(folder / "images" / f"{name}.jpg", folder / "labels" / f"{name}.png") for name in names]
    pictures = sorted(folder.glob("*.jpg"))
    if kind == "camvid":
        return [(picture, picture.with_suffix(".png")) for picture in pictures[::EVERY]]
    return [(picture, min(folder.glob(f"{picture.stem}.seg*.png"))) for picture in pictures]


def read(kind: str, pair: Labelled) -> tuple[Image.Image, Image.Image]:
    """A picture and its labels, with ``VOID`` where there is none; the labels of a set's own void become that."""
    picture = Image.open(pair[0]).convert("RGB")
    labels = np.array(Image.open(pair[1]))
    if kind == "camvid":
        labels = np.where(labels == 11, VOID, labels)
    labels = _eight_bits(labels.astype(np.int64))
    if kind == "nyu":
        width, height = picture.size
        inside = (FRAME, FRAME, width - FRAME, height - FRAME)
        return picture.crop(inside), Image.fromarray(labels).crop(inside)
    return picture, Image.fromarray(labels)


def _eight_bits(labels: NDArray[np.int64]) -> Pixels:
    """Labels as 0 to 254 and ``VOID``; of more than 255 the largest keep theirs, the others become void."""
    if labels.max() <= VOID:
        return labels.astype(np.uint8)
    values, areas = np.unique(labels[labels != VOID], return_counts=True)
    result = np.full(labels.shape, VOID, np.uint8)
    for number, value in enumerate(sorted(values[np.argsort(-areas)][:VOID])):
        result[labels == value] = number
    return result


def mosaic(kind: str, four: Sequence[Labelled], generator: random.Random) -> tuple[Image.Image, Image.Image]:
    """Four pictures' crops in a square; labels of segments, which are no classes, stay apart."""
    picture = Image.new("RGB", (SIDE, SIDE))
    labels = np.full((SIDE, SIDE), VOID, np.int64)
    half = SIDE // 2
    for number, pair in enumerate(four):
        image, its = read(kind, pair)
        side = int(min(image.size) * generator.uniform(0.6, 1))
        left, top = (generator.randint(0, length - side) for length in image.size)
        box, place = (left, top, left + side, top + side), (number % 2 * half, number // 2 * half)
        picture.paste(image.resize((half, half), Image.Resampling.LANCZOS, box), place)
        small = np.array(its.resize((half, half), Image.Resampling.NEAREST, box)).astype(np.int64)
        if kind == "bsds":
            small = np.where(small == VOID, VOID, small + 256 * (number + 1))
        labels[place[1] : place[1] + half, place[0] : place[0] + half] = small
    return picture, Image.fromarray(_eight_bits(labels))


def labelled(folders: dict[str, Path], mosaics: int, seed: int) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """All pictures with their names."""
    generator = random.Random(seed)
    for kind, folder in folders.items():
        of_set = pairs(kind, folder)
        for pair in of_set:
            yield f"{kind}_{pair[0].stem}", *read(kind, pair)
        for number in range(mosaics if kind in ("bsds", "voc") else 0):
            yield f"{kind}_mosaic_{number:03d}", *mosaic(kind, generator.sample(of_set, 4), generator)


def main(words: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bsds", type=Path, metavar="FOLDER", help="NAME.jpg and NAME.segK.png")
    add("--voc", type=Path, metavar="FOLDER", help="images/, labels/ and train.txt")
    add("--nyu", type=Path, metavar="FOLDER", help="the same, with white frames of 12 pixels")
    add("--camvid", type=Path, metavar="FOLDER", help="NAME.jpg and NAME.png, of which every second one is taken")
    add("--mosaics", type=int, default=110, metavar="N", help="of BSDS and of VOC (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args(words)
    folders = {kind: folder for kind in ("bsds", "voc", "nyu", "camvid") if (folder := getattr(given, kind))}
    if not folders:
        parser.error("no set is given, expected one or several of --bsds, --voc, --nyu, --camvid")
    count = 0
    for name, picture, labels in tqdm(labelled(folders, given.mosaics, given.seed), unit="picture"):
        folder = given.output / name.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.jpg", quality=95)
        labels.save(folder / f"{name}.png")
        count += 1
    print(f"{count} pictures in {given.output}")


if __name__ == "__main__":
    main()
