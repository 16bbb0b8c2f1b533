"""The command ``loftup video``: the features of a video, frame by frame, beside the frames."""

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoftUpError, translate
from ..files import MADE_BY, PREFIX, refuse_others, write_atomically
from ..progress import track
from .demo import package_or_named
from .options import add_model_options, place, positive

if TYPE_CHECKING:
    from torch import Tensor

    from ..viz import PCA

__all__ = ["add_parser"]

SUFFIXES = (".mp4", ".mkv", ".mov")
STATE = "loftup_pca.safetensors"  # of a folder of frames, so that a run that was cut off goes on in its colours
SETTINGS = "loftup_video.json"
SAME = ("video", "backbone", "backbone_weights", "layer", "views", "weights", "size", "input", "point", "fit")


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "video",
        help="features of a video beside its frames",
        description="Writes the frames, their features enlarged bilinearly, and upsampled, side by side: three "
        "principal components as colours, fitted to the first frames and kept, or the likeness to a point of the first "
        "frame. Reads and writes one frame at a time. Needs the extra loftup[video].",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("video", type=place, metavar="VIDEO", help="file that FFmpeg reads, GIFs too, or a folder of pictures")
    kinds = ", ".join(SUFFIXES)
    said = f"a video ({kinds}), or a folder for one PNG a frame: there a run that was cut off goes on"
    add("-o", "--output", required=True, type=place, metavar="FILE|FOLDER", help=said)
    add_model_options(parser, backbone=None)
    add("--point", nargs=2, type=int, metavar=("X", "Y"), help="of the first frame: show the likeness to it")
    add(
        "--fit",
        type=positive,
        default=8,
        metavar="N",
        help="first frames that the colours follow (default: %(default)s)",
    )
    add("--frames", type=positive, metavar="N", help="stop after so many")
    add("--fps", type=positive, default=25, help="of a folder of pictures (default: %(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from .models import load_models, upsample_picture

    if arguments.output.suffix and arguments.output.suffix not in SUFFIXES:
        raise ValueError(f"{arguments.output} is none of {', '.join(SUFFIXES)}; a name without a dot is a folder")
    weights = package_or_named(arguments)
    settings = _settings(arguments)
    backbone, up = load_models(arguments, weights)
    frames, rate, count = _frames(arguments.video, arguments.fps)
    frames = itertools.islice(frames, arguments.frames)
    count = min(filter(None, (count, arguments.frames)), default=None)

    def maps(frame: Any) -> "tuple[Tensor, Tensor]":
        low, dense = upsample_picture(arguments, backbone, up, frame)
        return low.float().cpu(), dense.float().cpu()

    # The first frames are looked at twice, so that memory does not grow with their number.
    first = list(itertools.islice(frames, arguments.fit if arguments.point is None else 1))
    if not first:
        raise ValueError(f"{arguments.video} holds no frames")
    paint, pca = _painter(arguments, first, maps)
    if not arguments.output.suffix:  # once nothing is left to refuse
        write_atomically(arguments.output / SETTINGS, settings)
        if pca is not None:
            pca.save(arguments.output / STATE)
    written = skipped = 0
    everything = itertools.chain(first, frames)
    with _writer(arguments.output, rate) as write:
        for index, frame in enumerate(track(everything, "video", count, unit="frames")):
            if not write.wants(index):
                skipped += 1
                continue
            low, dense = maps(frame)
            size = (dense.shape[2], dense.shape[3])
            bilinear = F.interpolate(low, size, mode="bilinear", align_corners=False)
            shown = torch.cat([paint(bilinear), paint(dense)], 2).mul(255).round().to(torch.uint8)
            picture = Image.new("RGB", (3 * size[1], size[0]))
            picture.paste(frame.resize(size[::-1], Image.Resampling.BICUBIC), (0, 0))
            picture.paste(Image.fromarray(shown.movedim(0, -1).numpy()), (size[1], 0))
            write(index, picture)
            written += 1
    if skipped:
        print(f"{skipped} frames are finished already")
    print(f"{written} frames: image | bilinear | upsampled; wrote {arguments.output}")
    return 0


def _settings(arguments: argparse.Namespace) -> bytes:
    """The settings of a folder's frames, as a file; ValueError where the folder holds frames made with others."""
    settings = {name: str(getattr(arguments, name)) for name in SAME}
    content = json.dumps({"made_by": MADE_BY, **settings}, indent=1).encode()
    file = arguments.output / SETTINGS
    if arguments.output.suffix or not file.is_file():
        return content
    with translate((OSError, ValueError), f"{file} is damaged; give another folder"):
        before = json.loads(file.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{arguments.output} holds frames of {name} {before.get(name)}, got {value}; give another folder"
            )
    return content


def _painter(
    arguments: argparse.Namespace, first: list[Any], maps: Callable[[Any], Any]
) -> "tuple[Callable[[Tensor], Tensor], PCA | None]":
    """Features (1, C, H, W) to colours (3, H, W) in [0, 1], and the PCA that gives them."""
    import torch

    from ..viz import PCA

    if arguments.point is not None:
        _, dense = maps(first[0])
        (x, y), (width, height) = arguments.point, first[0].size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"--point {x} {y} is outside the video's {width} columns and {height} rows")
        x, y = x * dense.shape[3] // width, y * dense.shape[2] // height
        wanted = dense[0, :, y, x]
        least = float(torch.cosine_similarity(dense[0], wanted[:, None, None], dim=0).quantile(0.02))

        def likeness(features: "Tensor") -> "Tensor":
            alike = torch.cosine_similarity(features[0], wanted[:, None, None], dim=0)
            return ((alike - least) / (1 - least)).clamp(0, 1).expand(3, -1, -1)

        return likeness, None
    kept = arguments.output / STATE
    known = not arguments.output.suffix and kept.is_file()
    pca = PCA.load(kept) if known else PCA.fit([maps(frame)[0] for frame in first])
    return lambda features: pca.transform(features)[0], pca


def _frames(path: Path, fps: int) -> tuple[Iterator[Any], Any, int | None]:
    """Frames as PIL images, frames a second, and how many there are, if that is known."""
    from ..pictures import IMAGE_SUFFIXES, open_picture

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        return map(open_picture, files), fps, len(files)
    av = _av()
    if not path.is_file():
        raise FileNotFoundError(f"there is no video {path}")
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except (av.error.FFmpegError, IndexError) as error:
        raise OSError(f"cannot read {path} as a video: {error}") from error
    stream.thread_type = "AUTO"
    return (frame.to_image() for frame in container.decode(stream)), stream.average_rate or fps, stream.frames or None


class _Folder:
    """Writes a PNG a frame and leaves those that are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def wants(self, index: int) -> bool:
        return not self._path(index).is_file()

    def __call__(self, index: int, picture: Any) -> None:
        from ..pictures import encode

        write_atomically(self._path(index), encode(picture, "PNG"))


class _Stream:
    """Writes a video, under another name until it is whole."""

    def __init__(self, container: Any, rate: Any) -> None:
        self.container, self.rate = container, rate
        self.stream: Any = None

    def wants(self, index: int) -> bool:
        return True

    def __call__(self, index: int, picture: Any) -> None:
        av = _av()
        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=Fraction(self.rate).limit_denominator(65535))
            # Its colours are shared by 2x2 pixels, which takes even sides.
            self.stream.width, self.stream.height = (side - side % 2 for side in picture.size)
            self.stream.pix_fmt, self.stream.options = "yuv420p", {"crf": "18"}
        whole = picture.crop((0, 0, self.stream.width, self.stream.height))
        self.container.mux(self.stream.encode(av.VideoFrame.from_image(whole)))


@contextlib.contextmanager
def _writer(output: Path, rate: Any) -> Iterator[Any]:
    if not output.suffix:
        output.mkdir(parents=True, exist_ok=True)
        yield _Folder(output)
        return
    refuse_others([output])
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{PREFIX}{os.getpid()}{output.suffix}")
    try:
        with _av().open(str(temporary), "w") as container:
            container.metadata["comment"] = MADE_BY
            writer = _Stream(container, rate)
            yield writer
            container.mux(writer.stream.encode())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise LoftUpError("videos need PyAV: pip install 'loftup[video]'; or give a folder of pictures") from error
    return av
