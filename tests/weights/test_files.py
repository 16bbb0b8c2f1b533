"""Names, local files in every layout, strictness, saving."""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from material import randomised, shared
from safetensors.torch import save, save_file

from loftup import LoftUp, LoftUpConfig, LoftUpError, list_pretrained
from loftup.files import write_atomically
from loftup.weights.catalogue import PUBLISHED, find_checkpoint


@pytest.fixture
def up():
    return LoftUp(24).eval()


def same(first: LoftUp, second: LoftUp) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("variant", ["loftup_sine_d24", "loftup_learnable_d24"])
@pytest.mark.parametrize("file", ["", "/pytorch_model.bin"])
def test_published_layouts_load_from_a_folder_or_file(variant, file):
    folder = shared(f"golden/{variant}")
    loaded = LoftUp.from_pretrained(f"{folder}{file}")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_hubs_safetensors_without_channel_norm_is_refused():
    file = shared("golden/loftup_sine_d24/model.safetensors")
    with pytest.raises(LoftUpError, match=r"model.safetensors lacks the channel norm.*wrong features"):
        LoftUp.from_pretrained(file)
    assert LoftUp.from_pretrained(file, channel_norm="identity").config.channel_norm == "identity"


def test_identity_norm_is_refused_for_complete_files(up, tmp_path):
    up.save_pretrained(tmp_path)
    with pytest.raises(LoftUpError, match='has a channel norm; leave channel_norm="identity" out'):
        LoftUp.from_pretrained(tmp_path, channel_norm="identity")
    with pytest.raises(ValueError, match=r"channel_norm must be None or .identity., got 'none'"):
        LoftUp.from_pretrained(tmp_path, channel_norm="none")


def test_identity_norm_survives_saving(tmp_path):
    LoftUp(LoftUpConfig(24, channel_norm="identity")).save_pretrained(tmp_path)
    assert LoftUp.from_pretrained(tmp_path).config.channel_norm == "identity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LoftUpConfig(24, backbone="mine"),
        LoftUpConfig(21, "learnable", lr_size=5, heads=3, blocks=1, image_frequencies=7),
    ],
)
def test_saving_and_loading_is_bit_exact(config, dtype, tmp_path):
    up = LoftUp(config).to(dtype).eval()
    up.save_pretrained(tmp_path / "new" / "folder")
    for source in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "model.safetensors"):
        loaded = LoftUp.from_pretrained(source)
        assert loaded.config == config
        assert loaded.dtype == dtype
        assert same(loaded, up)
    features, image = torch.randn(1, config.channels, 3, 4).to(dtype), torch.rand(1, 3, 9, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(features, image), up(features, image))


def test_dtype_and_training_mode(up, tmp_path):
    up.train().save_pretrained(tmp_path)
    loaded = LoftUp.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded = LoftUp.from_pretrained(tmp_path, trainable=True)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="floating dtype"):
        LoftUp.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype such as torch.bfloat16, got 'bfloat16'"):
        LoftUp.from_pretrained(tmp_path, dtype="bfloat16")


def test_other_types_than_names_paths_and_modules():
    for wrong in (None, 3, b"dinov2_vits14"):
        with pytest.raises(
            TypeError, match=rf"expected a name, a path, or a backbone object .*got {type(wrong).__name__}"
        ):
            LoftUp.from_pretrained(wrong)


def test_a_loaded_module_does_not_depend_on_its_file(up, tmp_path):
    up.save_pretrained(tmp_path)
    loaded = LoftUp.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.write(b"\xff" * size)
    assert same(loaded, up)
    with open(file, "r+b") as stream:
        stream.truncate(10)
    assert same(loaded, up)


def test_tensors_must_share_a_floating_dtype(up, tmp_path):
    for convert, text in (
        (lambda tensor: tensor.half(), r"tensors of torch\.float16, torch\.float32, expected one floating dtype"),
        (lambda tensor: tensor.int(), r"tensors of torch\.float32, torch\.int32, expected one"),
    ):
        state = up.state_dict()
        state["upsampler.final_conv.0.bias"] = convert(state["upsampler.final_conv.0.bias"])
        torch.save(state, tmp_path / "mixed.pt")
        with pytest.raises(LoftUpError, match=rf"mixed.pt holds {text}"):
            LoftUp.from_pretrained(tmp_path / "mixed.pt")
    torch.save({key: value.int() for key, value in up.state_dict().items()}, tmp_path / "whole.pt")
    with pytest.raises(LoftUpError, match=r"holds tensors of torch.int32, expected"):
        LoftUp.from_pretrained(tmp_path / "whole.pt")


def test_heads_are_assumed_for_a_bare_file_and_kept_in_ours(tmp_path):
    up = LoftUp(LoftUpConfig(24, heads=2))
    up.save_pretrained(tmp_path / "ours")
    torch.save(up.state_dict(), tmp_path / "bare.pt")
    assert LoftUp.from_pretrained(tmp_path / "bare.pt").config.heads == 4
    (tmp_path / "ours" / "config.json").unlink()
    assert LoftUp.from_pretrained(tmp_path / "ours").config.heads == 2
    assert LoftUp.from_pretrained(tmp_path / "ours" / "model.safetensors").config.heads == 2


def test_a_save_that_fails_leaves_the_old_file(up, tmp_path, monkeypatch):
    up.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="No space left"):
        LoftUp(24).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_written_files_follow_the_umask(tmp_path):
    import os

    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def training_checkpoint(up: LoftUp) -> dict:
    renamed = {key.replace("channelnorm.", "model.1."): value for key, value in up.state_dict().items()}
    return {"epoch": 1, "state_dict": {**renamed, "model.0.patch_embed.weight": torch.zeros(3)}}


def test_training_checkpoints_load(up, tmp_path):
    torch.save(training_checkpoint(up), tmp_path / "last.ckpt")
    assert same(LoftUp.from_pretrained(tmp_path / "last.ckpt"), up)
    torch.save({"state_dict": {"model.0.x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(LoftUpError, match="without upsampler.* entries; its keys begin model.0.x"):
        LoftUp.from_pretrained(tmp_path / "other.ckpt")


def test_our_checkpoints_carry_the_config(tmp_path):
    up = randomised(LoftUpConfig(24, heads=2, feature_frequencies=4))
    torch.save({"state_dict": up.state_dict(), "loftup_config": up.config.to_dict(), "step": 3}, tmp_path / "step.pt")
    loaded = LoftUp.from_pretrained(tmp_path / "step.pt")
    assert loaded.config == up.config
    assert same(loaded, up)


class Danger:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickles_are_never_executed(tmp_path, capsys):
    with open(tmp_path / "pytorch_model.bin", "wb") as stream:
        pickle.dump({"upsampler.x": Danger()}, stream)
    with pytest.raises(LoftUpError, match="never unpickles arbitrary objects"):
        LoftUp.from_pretrained(tmp_path)
    torch.save({"upsampler.x": Danger()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoftUpError, match="never unpickles arbitrary objects"):
        LoftUp.from_pretrained(tmp_path)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_named(up, tmp_path, kind, keep):
    file = tmp_path / kind
    if kind.endswith("bin"):
        torch.save(up.state_dict(), file)
    else:
        save_file(up.state_dict(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(LoftUpError, match=rf"{kind} .*bytes\).* truncated"):
        LoftUp.from_pretrained(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01u",  # no end
        b"\x80\x02]q\x00)R.",  # a call of a list
        b"\x80\x02h\x07.",  # what was never stored
        b"(((((t.",
        b"PK\x03\x04" + bytes(40),
        b"\x80\x02\x85\x85.",
        b"\x00",
        b"",
    ],
)
def test_damaged_pickles_are_named(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(LoftUpError, match=rf"x.pt .*\({len(content)} bytes\).* (truncated|expected a state dict)"):
        LoftUp.from_pretrained(tmp_path / "x.pt")


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes checksums")
@pytest.mark.parametrize("sums", [True, False])
def test_a_flipped_bit_is_found_by_the_checksum(sums, up, tmp_path):
    torch.serialization.set_crc32_options(sums)
    try:
        torch.save(up.state_dict(), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(LoftUp.from_pretrained(tmp_path / "x.pt"), up)
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    if sums:
        with pytest.raises(LoftUpError, match="x.pt .* damaged .*Bad CRC-32"):
            LoftUp.from_pretrained(tmp_path / "x.pt")


BIAS, WEIGHT = "upsampler.final_conv.0.bias", "upsampler.final_conv.0.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, up, tmp_path):
    state = up.state_dict()
    state[BIAS][3] = value
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(LoftUpError, match=f"{BIAS} in .*x.safetensors holds 1 values that are not finite"):
        LoftUp.from_pretrained(tmp_path / "x.safetensors")
    with pytest.raises(LoftUpError, match=f"{BIAS} in this LoftUp holds 1 values that are not finite"):
        up.save_pretrained(tmp_path / "new")


def test_variances_below_0_are_refused(up, tmp_path):
    state = up.state_dict()
    key = next(key for key in state if key.endswith("running_var"))
    state[key][1] = -1
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(LoftUpError, match=f"{key} in .*x.safetensors holds variances below 0"):
        LoftUp.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda state: {**state, BIAS: torch.nested.nested_tensor([state[BIAS]])},
            f"{BIAS} in .* is a nested tensor, expected a dense one",
        ),
        (lambda state: {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, "tensors of torch.float8_e4m3fn, exp"),
        (
            lambda state: {k: v.to(torch.complex64) for k, v in state.items()},
            "tensors of torch.complex64, expected one",
        ),
        (
            lambda state: {**state, WEIGHT: state[WEIGHT].flatten(1).to_sparse()},
            f"{WEIGHT} in .* is a sparse_coo tensor",
        ),
        (
            lambda state: {**state, WEIGHT: state[WEIGHT].to("meta")},
            f"{WEIGHT} in .* is a meta tensor, expected a dense",
        ),
        (
            lambda state: {**state, WEIGHT: torch.quantize_per_tensor(state[WEIGHT], 0.1, 0, torch.qint8)},
            f"{WEIGHT} in .* is a quantised tensor",
        ),
        (
            lambda state: {**state, WEIGHT: torch.zeros(1, 1, 1, 1).expand(24, 44, 1, 1)},
            r"are expanded or share their memory; save value.clone\(\) of each",
        ),
        (lambda state: {k: torch.zeros(10**4).expand(10**5, 10**4)[:4] for k in state}, "are expanded or share"),
        (lambda state: {**state, BIAS: state["upsampler.final_conv.1.bias"]}, "are expanded or share their memory"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_loads_but_cannot_run_is_refused(change, text, up, tmp_path):
    torch.save(change({key: value.clone() for key, value in up.state_dict().items()}), tmp_path / "x.pt")
    with pytest.raises(LoftUpError, match=text):
        LoftUp.from_pretrained(tmp_path / "x.pt")


def test_parts_of_one_storage_are_taken_apart(up, tmp_path):
    state = {key: value.clone() for key, value in up.state_dict().items()}
    flat = torch.randn(48)
    state[BIAS], state["upsampler.final_conv.1.bias"] = flat.split(24)
    torch.save(state, tmp_path / "x.pt")
    loaded = LoftUp.from_pretrained(tmp_path / "x.pt")
    storages = [parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()]
    assert len(storages) == len(set(storages))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_refused_and_never_read(up, tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(LoftUpError, match="pipe.bin is neither a file nor a folder"):
        LoftUp.from_pretrained(tmp_path / "pipe.bin")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(LoftUpError, match="holds neither model.safetensors nor"):
        LoftUp.from_pretrained(tmp_path)
    with pytest.raises(LoftUpError, match="model.safetensors is not loftup's, and is not replaced"):
        up.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["\udcff.pt", "\udcff.safetensors"])
def test_file_names_that_are_not_utf8(name, tmp_path):
    try:
        (tmp_path / name).write_bytes(b"x")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    with pytest.raises(LoftUpError, match="cannot read|is truncated"):
        LoftUp.from_pretrained(tmp_path / name)


def test_the_same_weights_give_the_same_bytes(up, tmp_path):
    contents = set()
    for _ in range(8):
        up.save_pretrained(tmp_path)
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_replaced_modules_are_not_saved(up, tmp_path):
    linear = up.upsampler.ca_transformer.layers[0][1].net[1]
    up.upsampler.ca_transformer.layers[0][1].net[1] = torch.nn.Sequential(linear, torch.nn.Linear(24, 24))
    with pytest.raises(LoftUpError, match=r"modules of this LoftUp were replaced \(.*net.1.*merge the LoRA first"):
        up.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_could_not_be_loaded_is_not_saved(up, tmp_path):
    with pytest.raises(LoftUpError, match="in this LoftUp is a meta tensor, expected a dense one"):
        LoftUp(24).to("meta").save_pretrained(tmp_path)
    with pytest.raises(LoftUpError, match="this LoftUp holds tensors of torch.float8_e5m2, expected"):
        LoftUp(24).to(torch.float8_e5m2).save_pretrained(tmp_path)
    up.upsampler.final_conv[1].bias = up.upsampler.final_conv[1].weight
    with pytest.raises(LoftUpError, match="tensors of this LoftUp are expanded or share their memory; save"):
        up.save_pretrained(tmp_path)


def test_somebody_elses_files_are_not_replaced(up, tmp_path):
    cases = {
        "config.json": (b'{"model_type": "dinov2"}', b"not json", b"[]"),
        "model.safetensors": (save({"x": torch.zeros(1)}), b""),
    }
    for name, contents in cases.items():
        for content in contents:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(LoftUpError, match=f"{name} is not loftup's, and is not replaced; name another folder"):
                up.save_pretrained(tmp_path)
            assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, content)]
        (tmp_path / name).unlink()
    up.save_pretrained(tmp_path)
    LoftUp(28).save_pretrained(tmp_path)  # our own are
    (tmp_path / "config.json").unlink()
    up.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 24, "lr_pe_type": "sine", "lr_size": 16}')  # so is a published one
    up.save_pretrained(tmp_path)
    assert same(LoftUp.from_pretrained(tmp_path), up)


def test_missing_unexpected_and_misshapen_keys_are_listed(up, tmp_path):
    state = up.state_dict()
    bias = state.pop("upsampler.first_conv.1.bias")
    state["upsampler.extra"] = bias
    state["upsampler.final_conv.0.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoftUpError) as caught:
        LoftUp.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "missing: upsampler.first_conv.1.bias" in text
    assert "unexpected: upsampler.extra" in text
    assert "upsampler.final_conv.0.bias has shape (7,), expected (24,)" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"conv.weight": torch.zeros(2), "channelnorm.norm.weight": torch.zeros(2)}, "does not hold a LoftUp network"),
        ({"upsampler.x": 3, "channelnorm.y": "z"}, "is not a state dict of tensors: upsampler.x, channelnorm.y"),
        ([1, 2], "holds a list, expected a state dict"),
        ({3: torch.zeros(2)}, "is not a state dict of tensors: 3 hold other things"),
        ({"state_dict": {3: torch.zeros(2)}}, "a training checkpoint without upsampler"),
        ({"upsampler.gate.weight": torch.zeros(2)}, "does not hold a LoftUp network"),
        (
            {"upsampler.lr_pe": torch.zeros(2), "channelnorm.norm.weight": torch.zeros(2)},
            "does not hold a LoftUp network",
        ),
        ({}, "lacks the channel norm"),
    ],
)
def test_other_files_are_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(LoftUpError, match=text):
        LoftUp.from_pretrained(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"dim": 24, "depth": 3}', r"does not describe a LoftUp network: unknown keys \['depth'\]"),
        ('{"architecture": "resnet50"}', "holds a 'resnet50' model, not LoftUp weights"),
        ('{"dim": 28}', r"does not fit this LoftUp network: its config says channels=28, tensors for 24"),
        ("[" * 100_000, "is not valid JSON"),
        ("9" * 5_000, "is not valid JSON"),
        ('{"dim": 24, "backbone": []}', "LoftUpConfig.backbone must be a string, got \\[\\]"),
    ],
)
def test_bad_config_files(up, tmp_path, config, text):
    torch.save(up.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(LoftUpError, match=text):
        LoftUp.from_pretrained(tmp_path)


def test_a_config_that_is_not_utf8_is_refused(up, tmp_path):
    torch.save(up.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(b'{"backbone": "\xff"}')
    with pytest.raises(LoftUpError, match="is not valid JSON"):
        LoftUp.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"blocks": 20_000}, {"channels": 9_000}, {"image_frequencies": 10**9}, {"position_code": "learnable"}],
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_config_is_compared_with_the_tensors_before_anything_is_built(fields, kind, up, tmp_path, monkeypatch):
    (save_file if kind.endswith("s") else torch.save)(up.state_dict(), tmp_path / kind)
    (tmp_path / "config.json").write_text(json.dumps({**up.config.to_dict(), **fields}))
    monkeypatch.setattr("loftup.model.build_network", lambda config: pytest.fail("built"))
    name, value = next(iter(fields.items()))
    with pytest.raises(LoftUpError, match=f"{kind} does not fit this LoftUp network: its config says {name}={value}, "):
        LoftUp.from_pretrained(tmp_path)


def test_a_bad_header_is_refused(up, tmp_path):
    for damaged in ("{", "[" * 100_000, "9" * 5_000):
        save_file(up.state_dict(), tmp_path / "model.safetensors", {"loftup_config": damaged})
        with pytest.raises(LoftUpError, match="the config in .* is damaged"):
            LoftUp.from_pretrained(tmp_path)
    save_file(up.state_dict(), tmp_path / "model.safetensors", {"loftup_config": json.dumps({"channels": 24, "a": 1})})
    with pytest.raises(LoftUpError, match=r"the config in .* unknown keys \['a'\]"):
        LoftUp.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dinov2_vits15", "unknown LoftUp weights 'dinov2_vits15'; did you mean 'dinov2_vits14'"),
        ("DINOv2_ViTS14", "did you mean 'dinov2_vits14'"),
        ("ViT-B-16", "'ViT-B-16/openai'"),
        ("vit_small_patch14_dinov2.lvd142n", "did you mean .*'vit_small_patch14_dinov2.lvd142m'"),
        ("vit_base_patch16_clip_224.opanai", "did you mean .*'vit_base_patch16_clip_224.openai'"),
        ("entirely-different", "Published: dinov2_vits14.*'user/repo'.*'./folder'"),
        ("./nowhere", "no such file or folder: ./nowhere"),
        ("nowhere.bin", "no such file or folder: nowhere.bin"),
        ("a/b/c", "no such file or folder: a/b/c"),
        ("", "the name of the weights is empty; pass one such as 'any', or a path"),
        ("~nobody-of-this-name/x", "no such file or folder: ~nobody-of-this-name/x: there is no such home folder"),
        ("x" * 300, "unknown LoftUp weights 'xxx"),
        ("photo.JPG", "no such file or folder: photo.JPG"),
    ],
)
def test_unknown_names(name, text):
    with pytest.raises(LoftUpError, match=text):
        LoftUp.from_pretrained(name)


def test_a_picture_is_called_one(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(
        LoftUpError, match="photo.jpg is a picture, not LoftUp weights; load the weights by name or path"
    ):
        LoftUp.from_pretrained(str(tmp_path / "photo.jpg"))


def test_local_weights_have_no_revisions(up, tmp_path):
    up.save_pretrained(tmp_path)
    for path, kind in ((tmp_path, "folder"), (tmp_path / "model.safetensors", "file")):
        with pytest.raises(
            LoftUpError, match=f"is a local {kind}, which has no revisions, got revision='v1'; leave it"
        ):
            LoftUp.from_pretrained(path, revision="v1")


def test_a_folder_that_hides_a_repository_is_taken_with_a_warning(up, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    up.save_pretrained("me/mine")
    with pytest.warns(
        UserWarning, match="'me/mine' is the local path of that name, not the Hub repo.*'./me/mine'"
    ) as w:
        assert same(LoftUp.from_pretrained("me/mine"), up)
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in ("./me/mine", Path("me/mine"), str(tmp_path / "me/mine")):
            assert same(LoftUp.from_pretrained(plain), up)


@pytest.mark.parametrize("name", ["timm/any", "hf-hub:any", "timm/dinov2_vits14", "hf_hub:timm/tiny", "timm/tiny_v1"])
def test_our_own_names_take_no_prefix(name):
    assert find_checkpoint(name) is None


@pytest.mark.parametrize("name", ["dinov2_vits14", "me/mine", "nowhere"])
def test_a_path_is_never_a_name_or_repository(name, tmp_path, monkeypatch, up):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoftUpError, match=f"no such file or folder: {name}"):
        LoftUp.from_pretrained(Path(name))
    up.save_pretrained(name)
    assert same(LoftUp.from_pretrained(Path(name)), up)


def test_the_table_is_consistent():
    checkpoints = list_pretrained()
    assert [c.name for c in checkpoints] == list(PUBLISHED)
    assert len(checkpoints) == 7
    for checkpoint in checkpoints:
        for alias in (
            checkpoint.name,
            checkpoint.repo,
            checkpoint.timm,
            f"timm/{checkpoint.timm}",
            *checkpoint.backbones,
        ):
            assert find_checkpoint(alias) is checkpoint
    assert find_checkpoint("vit_large_patch14_dinov2.lvd142m") is None


def test_the_table_agrees_with_timm():
    import timm

    for checkpoint in list_pretrained():
        model = timm.create_model(checkpoint.timm.partition(".")[0], pretrained=False, num_classes=0, depth=1)
        assert checkpoint.timm in timm.list_pretrained()
        assert model.patch_embed.patch_size == (checkpoint.patch_size,) * 2
        assert checkpoint.channels in (model.num_features, 512)
