"""The command ``loftup web``: a page that upsamples pictures in the browser, built and served."""

import argparse
import functools
import http.server
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ..errors import LoftUpError, one_line
from ..files import write_atomically
from ..version import __version__
from ..weights.catalogue import ANY, FOLDER, TINY
from .options import place

__all__ = ["add_parser", "build", "server"]

SOURCE = Path(__file__).parent.parent / "web"
RUNTIME = "onnxruntime-web@1.30.0"  # an npm package, MIT
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SAMPLES = (  # file of skimage.data, name, credit
    ("chelsea", "A cat", "cat by Stefan van der Walt (CC0)"),
    ("astronaut", "An astronaut", "astronaut by NASA (public domain)"),
)


def add_parser(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "web",
        help="a page that upsamples pictures in the browser",
        description="Builds a folder of static files, which any web server can publish, and serves it on this machine. "
        "Pictures never leave the browser. Building needs the extra loftup[web], and npm for ONNX Runtime Web.",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("-o", "--output", type=place, default=Path("loftup-web"), metavar="FOLDER", help="default: %(default)s")
    add("--runtime", type=place, metavar="FOLDER", help=f"the folder dist of {RUNTIME}, in place of fetching it by npm")
    add("--build", action="store_true", help="build the folder and stop")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")


def _run(arguments: argparse.Namespace) -> int:
    folder = arguments.output
    if not arguments.build and _built(folder):
        print(f"{folder} was built before by loftup {__version__}; --build builds it again")
    else:
        build(folder, arguments.runtime)
    if arguments.build:
        return 0
    with server(folder, arguments.port) as running:
        print(f"http://localhost:{running.server_address[1]}/ (Ctrl+C stops)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _built(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "site.json").read_text())["loftup"] == __version__)
    except (OSError, ValueError, KeyError):
        return False


def build(folder: Path, runtime: Path | None = None) -> None:
    """Write the page, its models, the runtime and the samples; ``site.json`` last, so that it tells a whole folder.

    Args:
        folder: made where it is missing; a folder with other files in it is refused.
        runtime: folder with the runtime's files; None fetches them by npm.

    Raises:
        LoftUpError: the folder holds something else, npm or a package is missing, or npm fails.
    """
    from ..backbones import load_backbone
    from ..model import LoftUp

    known = {*(path.name for path in SOURCE.iterdir()), "models", "runtime", "samples", "site.json"}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.is_dir() else []
    if strange:
        raise LoftUpError(f"{folder} holds {strange[0]}, which is not of this page; give a folder of its own with -o")
    (folder / "site.json").unlink(missing_ok=True)
    samples = _samples(folder / "samples")
    _runtime(folder / "runtime", runtime)
    for path in SOURCE.iterdir():
        write_atomically(folder / path.name, path.read_bytes())
    # Four views in one batch, so that the graph holds the model once.
    backbone = load_backbone(TINY, views=4, views_at_once=4)
    for name, module, store in (("backbone", backbone, "int8"), ("upsampler", LoftUp.from_pretrained(ANY), "float16")):
        path = folder / "models" / f"{name}.onnx"
        path.unlink(missing_ok=True)
        module.export(path, store=store)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    facts = {"loftup": __version__, "multiple": backbone.multiple, "mean": backbone.mean, "std": backbone.std}
    write_atomically(folder / "site.json", json.dumps(facts | {"samples": samples}, indent=1).encode())


def _samples(folder: Path) -> list[dict[str, str]]:
    try:
        from PIL import Image
        from skimage import data
    except ImportError as error:
        raise LoftUpError(f"the page's samples need {error.name}: pip install 'loftup[web]'") from error
    photo = {"file": "samples/photo.jpg", "name": "A cup of coffee", "credit": "coffee by Rachel Michetti (CC0)"}
    write_atomically(folder / "photo.jpg", (FOLDER / "photo" / "photo.jpg").read_bytes())
    samples = [photo]
    for name, title, credit in SAMPLES:
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()).save(buffer, "JPEG", quality=90)
        write_atomically(folder / f"{name}.jpg", buffer.getvalue())
        samples.append({"file": f"samples/{name}.jpg", "name": title, "credit": credit})
    return samples


def _runtime(folder: Path, given: Path | None) -> None:
    if given is not None:
        for name in RUNTIME_FILES:
            if not (given / name).is_file():
                raise LoftUpError(f"--runtime {given} has no {name}; expected the folder dist of {RUNTIME}")
            write_atomically(folder / name, (given / name).read_bytes())
        return
    if all((folder / name).is_file() for name in RUNTIME_FILES):
        return
    npm = shutil.which("npm")
    remedy = f"install Node.js, or give the folder dist of {RUNTIME} with --runtime"
    if npm is None:
        raise LoftUpError(f"npm is missing, which fetches {RUNTIME}: {remedy}")
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([npm, "pack", RUNTIME, "--silent"], cwd=scratch, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            raise LoftUpError(f"npm pack {RUNTIME} failed: {one_line(done.stderr or done.stdout)[:300]}; {remedy}")
        with tarfile.open(archives[0]) as archive:
            for name in RUNTIME_FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                write_atomically(folder / name, member.read())


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def end_headers(self) -> None:
        """Add what lets the page use several threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A web server of a folder on this machine alone; the caller runs and closes it."""
    handler = functools.partial(_Handler, directory=str(folder))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
