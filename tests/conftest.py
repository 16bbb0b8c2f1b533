"""Fixtures shared by all tests; nothing here may touch the network."""

import os
import tempfile
from pathlib import Path

from hub_server import HubServer

# Before anything imports torch: processes that share the machine's cores take one each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports huggingface_hub, which reads these once: the tests' Hub is a local server.
HUB = HubServer()
HF_HOME = tempfile.TemporaryDirectory()
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME.name, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="0")

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from material import shared


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The local Hub, empty, with an empty cache and no waiting between the client's retries."""
    import huggingface_hub.constants
    import huggingface_hub.utils._http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    # The client has no public setting for the pauses between its retries.
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    HUB.open()
    yield HUB
    HUB.close()


@pytest.fixture
def photo() -> Path:
    return shared("data/photos/n01440764_tench.jpg")


@pytest.fixture(scope="session")
def any_graph(tmp_path_factory):
    """The upsampler for every backbone as ONNX, its weights as the package stores them."""
    pytest.importorskip("onnx")
    from loftup import LoftUp

    return LoftUp.from_pretrained("any").export(tmp_path_factory.mktemp("any") / "any.onnx", store="float16")
