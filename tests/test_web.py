"""The page of ``loftup web`` in a headless browser, against Python; skipped where Chromium or npm is missing."""

import base64
import json
import shutil
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from material import drawn_scene
from PIL import Image

from loftup import LoftUp, LoftUpError, load_backbone, viz
from loftup.cli import main
from loftup.cli.web import RUNTIME_FILES, build, server

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def site(tmp_path_factory, any_graph):
    def copied(up, path, *, store):
        assert store == "float16"  # as the graph was made, which takes a minute
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(any_graph, path))

    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("needs Chromium and npm")
    folder = tmp_path_factory.mktemp("web") / "site"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoftUp, "export", copied)
            build(folder)
    except LoftUpError as error:
        if "npm pack" in str(error):
            pytest.skip(f"npm does not answer: {error}")
        raise
    return folder


@pytest.fixture(scope="module")
def address(site):
    with server(site, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


@pytest.fixture(scope="module")
def driver(site):
    """After the site, which skips where there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(driver):
    running = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser_with_gpu(driver):
    flags = ("--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--use-vulkan=swiftshader")
    features = "--enable-features=Vulkan,WebGPU"
    running = driver.chromium.launch(executable_path=CHROMIUM, args=[*flags, features])
    yield running
    running.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})  # a phone: 224 pixels
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    shown(page)
    yield page
    page.close()


def shown(page):
    """Wait until a picture is done or failed."""
    done = "document.querySelector('#status').textContent.includes('feature vectors in')"
    page.wait_for_function(f"{done} || document.querySelector('#status.error')", timeout=180_000)


def floats(page, expression):
    """A Float32Array of the page."""
    code = f"""() => {{
        const bytes = new Uint8Array(new Float32Array({expression}).buffer);
        let text = "";
        for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
        return btoa(text);
    }}"""
    return torch.from_numpy(np.frombuffer(base64.b64decode(page.evaluate(code)), np.float32).copy())


def canvas(page, name):
    """The pixels that a canvas shows, (H, W, 3) in 0..255."""
    width, height = (page.evaluate(f"document.getElementById('{name}').{side}") for side in ("width", "height"))
    pixels = f"document.getElementById('{name}').getContext('2d').getImageData(0, 0, {width}, {height}).data"
    return floats(page, pixels).view(height, width, 4)[..., :3]


def test_the_models_are_small_and_right(site):
    sizes = {path.name: path.stat().st_size for path in (site / "models").iterdir()}
    assert set(sizes) == {"backbone.onnx", "upsampler.onnx"}
    assert sum(sizes.values()) < 5e6
    facts = json.loads((site / "site.json").read_text())
    assert [sample["file"] for sample in facts["samples"]] == [
        "samples/photo.jpg",
        "samples/chelsea.jpg",
        "samples/astronaut.jpg",
    ]
    assert all((site / sample["file"]).is_file() for sample in facts["samples"])


def test_the_page_computes_what_python_computes(page):
    assert page.wrong == []
    width, height, channels, h, w = (
        page.evaluate(f"loftup.current.{key}") for key in ("width", "height", "channels", "h", "w")
    )
    assert (width, height, channels, h, w) == (224, 144, 192, 18, 28)
    pixels = floats(page, "loftup.current.pixels.data").view(height, width, 4)[..., :3].permute(2, 0, 1)
    backbone = load_backbone("tiny", views=4)
    image = backbone.preprocess(pixels.to(torch.uint8))
    features = floats(page, "loftup.current.features").view(1, channels, h, w)
    # Weights of 8 bits in the page, of 32 here.
    assert torch.cosine_similarity(features, backbone(image), dim=1).mean() > 0.998
    dense = floats(page, "loftup.current.dense").view(1, channels, height, width)
    expected = LoftUp.from_pretrained("any")(features, image)
    assert (dense - expected).abs().max() < 2e-3 * expected.abs().max()  # weights of 16 bits in the page

    # The colours: principal components of the low-resolution features, in one range of percentiles.
    cells = features.flatten(2)[0].double()
    centred = cells - cells.mean(1, keepdim=True)
    axes = torch.linalg.eigh(centred @ centred.T)[1][:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    low = axes.T @ centred
    high = axes.T @ (dense.flatten(2)[0].double() - cells.mean(1, keepdim=True))
    ordered, count = low.sort(1)[0], low.shape[1] - 1
    least, most = ordered[:, [int(0.01 * count)]], ordered[:, [int(np.ceil(0.99 * count))]]
    picture = ((high - least) / (most - least)).clamp(0, 1).mul(255).view(3, height, width).permute(1, 2, 0)
    assert (canvas(page, "dense") - picture).abs().max() < 3


def test_a_click_shows_the_similarity_that_python_computes(page):
    box = page.locator("#photo").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.4)
    caption = page.inner_text("#caption")
    column, row = (int(word.strip(",:")) for word in caption.split() if word.strip(",:").isdigit())
    assert abs(column - 0.6 * 224) < 2
    assert abs(row - 0.4 * 144) < 2
    dense = floats(page, "loftup.current.dense").view(192, 144, 224)
    expected = torch.cosine_similarity(dense, dense[:, row, column][:, None, None], dim=0)
    found = floats(page, f"loftup.compare({column}, {row}).sharp").view(144, 224)
    assert (found - expected).abs().max() < 1e-4
    assert canvas(page, "dense")[row, column].mean() > 200  # bright where it was clicked
    page.click("#components")
    assert "principal components" in page.inner_text("#caption")
    assert page.wrong == []


def test_a_click_shows_the_cells_that_the_pixel_looks_at(page):
    assert "Move over the picture" in page.inner_text("#looks")
    box = page.locator("#photo").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.4)
    assert "that this pixel is a mean of" in page.inner_text("#looks")
    pixels = floats(page, "loftup.current.pixels.data").view(144, 224, 4)[..., :3].permute(2, 0, 1)
    image = load_backbone("tiny").preprocess(pixels.to(torch.uint8))
    features, up = floats(page, "loftup.current.features").view(1, 192, 18, 28), LoftUp.from_pretrained("any")
    # In the middle, at edges and corners, where the window is cut off.
    points = [(134, 57), (0, 0), (223, 143), (3, 100), (120, 143)]
    for (x, y), expected in zip(points, viz.attention_maps(up, features, image, points), strict=True):
        found = floats(page, f"loftup.looksAt({x}, {y})").view(18, 28)
        assert found.sum() == pytest.approx(1, abs=1e-3)
        assert (found - expected).abs().max() < 0.01  # weights of 16 bits in the page
    # Grey but for the cells that weigh something, orange there.
    shown = canvas(page, "photo")
    column, row = (int(word.strip(",:")) for word in page.inner_text("#caption").split() if word.strip(",:").isdigit())
    colourful = shown.amax(-1) - shown.amin(-1) > 60
    assert 20 < colourful.sum() < 56 * 56
    rows, columns = colourful.nonzero(as_tuple=True)
    assert (rows - row).abs().max() <= 32
    assert (columns - column).abs().max() <= 32
    page.click("#components")
    assert (canvas(page, "photo").permute(2, 0, 1) == pixels).all()
    assert "Move over the picture" in page.inner_text("#looks")
    assert page.wrong == []


def test_the_keyboard_does_it_too(page):
    page.focus("#photo")
    page.keyboard.press("ArrowRight")
    assert "column 120, row 72" in page.inner_text("#caption")
    page.keyboard.press("Shift+ArrowUp")
    assert "column 120, row 71" in page.inner_text("#caption")
    page.keyboard.press("Escape")
    assert "principal components" in page.inner_text("#caption")
    page.focus("#slider")
    page.keyboard.press("Home")
    assert page.evaluate("document.getElementById('compare').style.getPropertyValue('--border')") == "0%"


def test_own_files_and_what_is_no_picture(page, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)).save(tmp_path / "mine.png")
    page.set_input_files("#file", tmp_path / "mine.png")
    page.wait_for_function("loftup.current?.height === 96 && loftup.current.width === 64", timeout=60_000)
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_selector("#status.error")
    assert "no picture that the browser can read" in page.inner_text("#status")
    assert page.wrong == []


class TestGpu:
    """WebGPU, by Chromium's software GPU, which is slow: a picture of 64 pixels."""

    @pytest.fixture
    def small(self, browser_with_gpu, address, tmp_path):
        page = browser_with_gpu.new_page(viewport={"width": 390, "height": 844})
        drawn_scene(48, 64).save(tmp_path / "small.jpg")
        page.route("**/samples/photo.jpg", lambda route: route.fulfill(path=tmp_path / "small.jpg"))

        def opened(query):
            page.goto(address + query)
            shown(page)
            return floats(page, "loftup.current.dense"), page.inner_text("#status")

        opened.page = page
        yield opened
        page.close()

    def test_it_computes_what_the_cpu_computes(self, small):
        expected, text = small("?processor=cpu")
        assert text.endswith(" s on the CPU")
        if not small.page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
            pytest.skip("this Chromium has no software GPU")
        dense, text = small("?processor=gpu")
        assert text.endswith(" s on the GPU (WebGPU)")
        assert (dense - expected).abs().max() < 2e-3 * expected.abs().max()
        # Nobody asks for a slow one.
        assert small("")[1].endswith(" s on the CPU")

    def test_where_it_fails_the_cpu_does_it_and_says_so(self, small):
        small.page.route("**/ort.webgpu.min.mjs", lambda route: route.abort())
        small("?processor=cpu")
        if not small.page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
            pytest.skip("this Chromium has no software GPU")
        assert small("?processor=gpu")[1].endswith(" s on the CPU, as the GPU failed")


def test_nothing_is_wider_than_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = "[...document.querySelectorAll('img')].filter((image) => !image.alt).length"
    assert page.evaluate(unnamed) == 0


def test_the_server_gives_the_headers_that_threads_need(site, address):
    with urllib.request.urlopen(address + "runtime/ort.wasm.min.mjs") as answer:
        assert answer.headers["Content-Type"] == "text/javascript"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


def test_refusals(tmp_path, monkeypatch, capsys):
    (tmp_path / "index.html").write_text("mine")
    assert main(["web", "--build", "-o", str(tmp_path)]) == 2
    assert "holds other files than a page of loftup" in capsys.readouterr().err
    assert main(["web", "--build", "-o", str(tmp_path / "index.html")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    (tmp_path / "index.html").unlink()
    assert main(["web", "--build", "-o", str(tmp_path / "site"), "--runtime", str(tmp_path)]) == 2
    assert f"has no {RUNTIME_FILES[0]}; expected the folder dist" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["web", "--build", "-o", str(tmp_path / "other")]) == 2
    assert "npm is missing" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
