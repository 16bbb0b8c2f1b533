"""The command ``loftup web``: a page that upsamples pictures in the browser, built and served."""

import argparse
import functools
import http.server
import io
import json
import os
import secrets
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ..errors import LoftUpError, one_line
from ..files import PREFIX, write_atomically
from ..version import __version__
from ..weights.catalogue import ANY, FOLDER, TINY
from .options import place

__all__ = ["add_parser", "build", "server"]

SOURCE = Path(__file__).parent.parent / "web"
RUNTIME = "onnxruntime-web@1.30.0"  # an npm package, MIT
RUNTIME_FILES = (
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    # Loaded where there is a GPU alone.
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
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
    if not arguments.build and _built(folder) == __version__:
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


def _built(folder: Path) -> str:
    """The version that built a folder, "" where it is no folder of this page."""
    try:
        return str(json.loads((folder / "site.json").read_text())["loftup"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def build(folder: Path, runtime: Path | None = None) -> None:
    """Write the page, its models, the runtime and the samples: beside the folder, which takes their place when whole.

    Args:
        folder: missing, empty, or built before by this command, which it replaces.
        runtime: folder with the runtime's files; None fetches them by npm.

    Raises:
        LoftUpError: the folder holds something else, npm or a package is missing, or npm fails.
    """
    from ..backbones import load_backbone
    from ..model import LoftUp

    if folder.exists() and not folder.is_dir():
        raise LoftUpError(f"{folder} is a file; give a folder with -o")
    before = _built(folder)
    if folder.is_dir() and any(folder.iterdir()) and not before:
        raise LoftUpError(f"{folder} holds other files than a page of loftup; give a new or empty folder with -o")
    new = folder.with_name(f"{PREFIX}{secrets.token_hex(8)}")
    try:
        samples = _samples(new / "samples")
        _runtime(new / "runtime", runtime or (folder / "runtime" if before == __version__ else None))
        for path in SOURCE.iterdir():
            write_atomically(new / path.name, path.read_bytes())
        # Four views in one batch, so that the graph holds the model once.
        backbone, up = load_backbone(TINY, views=4, views_at_once=4), LoftUp.from_pretrained(ANY)
        for name, module, store in (("backbone", backbone, "int8"), ("upsampler", up, "float16")):
            print(f"exporting the {name}, up to a minute", flush=True)
            path = module.export(new / "models" / f"{name}.onnx", store=store)
            print(f"{folder / 'models' / path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
        facts = {"loftup": __version__, "multiple": backbone.multiple, "mean": backbone.mean, "std": backbone.std}
        facts |= {"radius": up.upsampler.radius, "samples": samples}
        write_atomically(new / "site.json", json.dumps(facts, indent=1).encode())
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
