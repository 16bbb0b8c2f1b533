"""Weights from the Hub: the real client against a local server."""

import io
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save

from loftup import LoftUp, LoftUpConfig, LoftUpError, wrap


@pytest.fixture
def up():
    return LoftUp(24).eval()


def pickled(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def inner(up: LoftUp) -> bytes:
    """The Hub's model.safetensors: the inner module alone."""
    return save(
        {key.removeprefix("upsampler."): v for key, v in up.state_dict().items() if key.startswith("upsampler.")}
    )


def same(first: LoftUp, second: LoftUp) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


PUBLISHED_CONFIG = b'{"dim": 24, "lr_pe_type": "sine", "lr_size": 16}'


@pytest.mark.parametrize(
    "name", ["dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", "hf-hub:timm/vit_small_patch14_dinov2.lvd142m",
             "facebook/dinov2-small", "haiwen/loftup-dinov2s"],
)  # fmt: skip
def test_a_published_name_takes_the_complete_file(hub, up, name):
    hub.add("haiwen/loftup-dinov2s", {
        "pytorch_model.bin": pickled(up.state_dict()), "model.safetensors": inner(up), "config.json": PUBLISHED_CONFIG,
    })  # fmt: skip
    loaded = LoftUp.from_pretrained(name)
    assert same(loaded, up)
    assert loaded.config.backbone == "dinov2_vits14"
    assert not loaded.training
    assert all("safetensors" not in path for _, path in hub.requests)


def test_any_repository_with_both_files_takes_the_complete_one(hub, up):
    hub.add("me/both", {
        "pytorch_model.bin": pickled(up.state_dict()), "model.safetensors": inner(up), "config.json": PUBLISHED_CONFIG,
    })  # fmt: skip
    assert same(LoftUp.from_pretrained("me/both"), up)


def test_a_repository_with_the_inner_module_alone_is_refused(hub, up):
    hub.add("me/inner", {"model.safetensors": inner(up), "config.json": PUBLISHED_CONFIG})
    with pytest.raises(LoftUpError, match=r"lacks the channel norm.*pytorch_model.bin.*channel_norm=\"identity\""):
        LoftUp.from_pretrained("me/inner")
    bare = LoftUp.from_pretrained("me/inner", channel_norm="identity")
    assert bare.config.channel_norm == "identity"
    assert not any("channelnorm" in key for key in bare.state_dict())


def test_the_second_load_works_with_the_server_gone(hub, up):
    hub.add("haiwen/loftup-clip", {"pytorch_model.bin": pickled(up.state_dict())})
    hub.add("me/plain", {"pytorch_model.bin": pickled(up.state_dict())})
    LoftUp.from_pretrained("clip_vitb16")
    LoftUp.from_pretrained("me/plain")
    hub.close()
    assert same(LoftUp.from_pretrained("clip_vitb16"), up)
    assert same(LoftUp.from_pretrained("clip_vitb16", local_files_only=True), up)
    assert same(LoftUp.from_pretrained("me/plain"), up)


def test_a_revision_is_honoured(hub, up):
    other = LoftUp(24)
    hub.add("me/repo", {"pytorch_model.bin": pickled(up.state_dict())})
    hub.add("me/repo", {"pytorch_model.bin": pickled(other.state_dict())}, revision="v1")
    assert same(LoftUp.from_pretrained("me/repo"), up)
    assert same(LoftUp.from_pretrained("me/repo", revision="v1"), other)
    with pytest.raises(LoftUpError, match="'me/repo' has no revision 'v2'"):
        LoftUp.from_pretrained("me/repo", revision="v2")


def test_a_truncated_download_is_an_error_and_the_next_try_succeeds(hub, up):
    hub.add("haiwen/loftup-dinov2b", {"pytorch_model.bin": pickled(up.state_dict())})
    hub.truncate.add("pytorch_model.bin")
    with pytest.raises(LoftUpError, match=r"downloading 'pytorch_model.bin' of .*loftup-dinov2b' failed.*Try again"):
        LoftUp.from_pretrained("dinov2_vitb14")
    hub.truncate.clear()
    assert same(LoftUp.from_pretrained("dinov2_vitb14"), up)


def test_what_is_not_there(hub, up):
    with pytest.raises(
        LoftUpError,
        match="there is no Hub repository 'me/nothing'.*loftup list.*; and there is no local folder of that n",
    ):
        LoftUp.from_pretrained("me/nothing")
    hub.add("me/empty", {})
    with pytest.raises(LoftUpError, match="'me/empty' holds neither model.safetensors nor pytorch_model.bin"):
        LoftUp.from_pretrained("me/empty")
    hub.add("haiwen/loftup-siglip", {"model.safetensors": inner(up)})
    with pytest.raises(LoftUpError, match="'haiwen/loftup-siglip' holds no 'pytorch_model.bin'"):
        LoftUp.from_pretrained("siglip_vitb16")
    hub.add("facebook/dinov2-huge", {"config.json": b'{"model_type": "dinov2"}', "model.safetensors": b""})
    with pytest.raises(LoftUpError, match="'facebook/dinov2-huge' holds a 'dinov2' model, not LoftUp weights"):
        LoftUp.from_pretrained("facebook/dinov2-huge")


def test_without_a_network_the_error_says_how_to_work_offline(hub):
    hub.close()
    with pytest.raises(
        LoftUpError, match=r"Hub cannot be reached for .*local_files_only=True .*HF_HUB_OFFLINE=1.*path"
    ):
        LoftUp.from_pretrained("dinov2_vits14")
    with pytest.raises(
        LoftUpError, match=r"cannot be reached for 'config.json' of .*; and there is no local folder of"
    ):
        LoftUp.from_pretrained("me/mine")
    with pytest.raises(LoftUpError, match="not in the Hub cache, and local_files_only=True"):
        LoftUp.from_pretrained("dinov2_vits14", local_files_only=True)


def test_without_a_network_the_hub_is_asked_once(hub, monkeypatch, caplog):
    hub.close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(LoftUpError, match="cannot be reached .*'any' and 'tiny' come with the package") as caught:
        LoftUp.from_pretrained("dinov2_vits14")
    assert not caplog.records
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_asked_once(status, hub, up, monkeypatch):
    hub.add("haiwen/loftup-clip", {"pytorch_model.bin": pickled(up.state_dict())})
    LoftUp.from_pretrained("clip_vitb16")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("waits to try again"))
    monkeypatch.setattr(hub, "resolve", lambda request, body: hub.reply(request, status, b""))
    assert same(LoftUp.from_pretrained("clip_vitb16"), up)
    with pytest.raises(LoftUpError, match=f"the Hub cannot be reached for .*{status}"):
        LoftUp.from_pretrained("dinov2_vits14")


def test_cache_dir_is_used(hub, up, tmp_path):
    hub.add("me/repo", {"pytorch_model.bin": pickled(up.state_dict())})
    LoftUp.from_pretrained("me/repo", cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("pytorch_model.bin"))


def test_the_environment_variable_of_the_client_is_honoured(hub, up, tmp_path):
    hub.add("haiwen/loftup-dinov2s", {"pytorch_model.bin": pickled(up.state_dict())})
    code = "from loftup import LoftUp; print(LoftUp.from_pretrained('dinov2_vits14').config.channels)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "24"


def test_pushed_weights_load_back(hub):
    up = LoftUp(LoftUpConfig(20, heads=2, backbone="mine")).to(torch.bfloat16).eval()
    assert up.push_to_hub("me/mine", token="hf_x").endswith("/me/mine/commit/abc")
    files = hub.repos["me/mine"]["main"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    card = files["README.md"].decode()
    assert 'LoftUp.from_pretrained("me/mine")' in card
    assert "library_name: loftup" in card
    loaded = LoftUp.from_pretrained("me/mine")
    assert same(loaded, up)
    assert loaded.config == up.config


def test_gated_repositories_and_invalid_ids(hub, up):
    hub.add("haiwen/loftup-dinov2s", {"pytorch_model.bin": pickled(up.state_dict())})
    hub.gated.add("haiwen/loftup-dinov2s")
    with pytest.raises(LoftUpError, match="'haiwen/loftup-dinov2s' is gated: ask for access on its page, then log in"):
        LoftUp.from_pretrained("dinov2_vits14")
    with pytest.raises(LoftUpError, match="'me/--mine' is not a valid Hub repository id"):
        LoftUp.from_pretrained("me/--mine")


def test_a_push_without_a_token_says_so(hub, up, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LoftUpError, match=r"pushing needs a Hub token: log in with `hf auth login` or pass token="):
        up.push_to_hub("me/mine")
    assert not hub.repos


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_backbone_object_finds_its_weights(hub, wrapped):
    up = LoftUp(LoftUpConfig(384, image_frequencies=4))
    hub.add("haiwen/loftup-dinov2s", {"pytorch_model.bin": pickled(up.state_dict())})
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", depth=1)
    loaded = LoftUp.from_pretrained(wrap(model) if wrapped else model)
    assert same(loaded, up)
    assert loaded.config.backbone == "dinov2_vits14"


def test_backbone_objects_without_published_weights(hub):
    for model, found in (
        (timm.create_model("test_vit"), "named 'test_vit.r160_in1k'"),
        (
            wrap(timm.create_model("vit_small_patch14_dinov2.lvd142m", depth=2), layer=0),
            "a Backbone without a recognised",
        ),
        (torch.nn.Linear(2, 2), "a Linear without a recognised name"),
    ):
        with pytest.raises(
            LoftUpError, match=rf"no published LoftUp weights for this backbone \({found}.*pass their path"
        ):
            LoftUp.from_pretrained(model, strict=True)
    assert not hub.requests


def test_a_refused_push_is_an_error(hub, up):
    hub.close()
    with pytest.raises(LoftUpError, match="pushing to the Hub repository 'me/mine' failed"):
        up.push_to_hub("me/mine", token="hf_x")
