"""Writing rendered scenes in the layouts of real datasets."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from loftup.eval.datasets.synthetic import FOCAL, SyntheticVideo, render

SIZE = 32


def save(values, path):
    """(H, W) or (3, H, W) integers as a PNG, or a JPEG of the best quality."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = values.numpy() if values.ndim == 2 else values.movedim(0, -1).numpy()
    kind = np.uint16 if array.max() > 255 else np.uint8
    Image.fromarray(array.astype(kind)).save(path, quality=100, subsampling=0)


def palette_png(values, path):
    """(H, W) integers as indices of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.numpy().astype(np.uint8), "P")
    picture.putpalette([(37 * i) % 256 for i in range(768)])
    picture.save(path)


def pairs(root, picture, labels, splits, map_labels=lambda x: x, write=save):
    """Scenes 0, 1 of the first split and 2 of the second as pictures and label maps."""
    scenes = {}
    for split, seeds in zip(splits, ((0, 1), (2,)), strict=True):
        for seed in seeds:
            scene = scenes[seed] = render(seed, SIZE)
            save(scene.image, root / picture.format(split=split, name=f"s{seed}"))
            write(map_labels(scene.classes), root / labels.format(split=split, name=f"s{seed}"))
    return scenes


def davis(root: Path, frames=4):
    """One sequence; its name is returned."""
    video = SyntheticVideo(11, SIZE, frames)
    for index in range(frames):
        save(video.frame(index), root / f"JPEGImages/480p/shapes/{index:05d}.jpg")
        palette_png(video.annotation(index), root / f"Annotations/480p/shapes/{index:05d}.png")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("shapes\n\n")
    return video


def nyuv2(root: Path):
    """Scenes 0, 1 for training and 2 for testing."""
    for split, seeds in (("train", (0, 1)), ("test", (2,))):
        for seed in seeds:
            scene = render(seed, SIZE)
            save(scene.image, root / f"{split}/rgb/s{seed}.png")
            depth = (scene.depth * 1000).round().long()
            depth[0, 0] = 0
            save(depth, root / f"{split}/depth/s{seed}.png")
            normals = ((scene.normals + 1) * 127.5).round().long()
            normals[:, 0, 1] = 0
            save(normals, root / f"{split}/normals/s{seed}.png")


def navi(root: Path):
    """An object in two scenes, on which alone depth is known."""
    for place, seed, split in (("a", 0, "train"), ("b", 2, "val")):
        scene = render(seed, 64)
        folder = root / "toy" / place
        save(scene.image, folder / "images/000.jpg")
        save((scene.depth * 1000).round().long() * (scene.objects > 0), folder / "depth/000.png")
        entry = {"filename": "000.jpg", "split": split, "camera": {"focal_length": FOCAL * 64}}
        (folder / "annotations.json").write_text(json.dumps([entry]))


def sbd(root: Path):
    """Scene 0 for training and 2 for validation."""
    for name, seed in (("train", 0), ("val", 2)):
        scene = render(seed, SIZE)
        save(scene.image, root / f"dataset/img/s{seed}.jpg")
        (root / "dataset/inst").mkdir(exist_ok=True)
        record = np.zeros((1, 1), dtype=[("Segmentation", object)])
        record["Segmentation"][0, 0] = scene.objects.numpy().astype(np.uint8)
        savemat(root / f"dataset/inst/s{seed}.mat", {"GTinst": record})
        (root / f"dataset/{name}.txt").write_text(f"s{seed}\n")
