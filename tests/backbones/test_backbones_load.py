"""Building backbones by name: options, local files, the Hub."""

import io
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from material import shared
from safetensors.torch import load_file, save, save_file
from small_backbones import randomised
from torch import nn

from loftup import LoftUpError
from loftup.backbones import load_backbone, wrap


@pytest.mark.parametrize(
    ("name", "near"),
    [("dino_vits14", "dinov2_vits14"), ("resnet_18", "resnet18"), ("resnet18.a1_in2k", "resnet18.a1_in1k")],
)
def test_unknown_names_are_refused_with_the_near_misses(name, near):
    with pytest.raises(
        LoftUpError,
        match=f"unknown backbone '{name}'; did you mean .*'{near}'.*Known are tiny, tiny_v1, dinov2_vits14,",
    ):
        load_backbone(name, weights=False)
    with pytest.raises(LoftUpError, match="unknown backbone '%%%'; Known are"):
        load_backbone("%%%", weights=False)


def test_options_that_timm_refuses():
    with pytest.raises(LoftUpError, match=r"cannot build 'test_resnet' with the options {'colour': 3}: .*'colour'"):
        load_backbone("test_resnet", weights=False, colour=3)
    with pytest.raises(LoftUpError, match=r"cannot build 'test_resnet' with the options {'output_stride': 7}"):
        load_backbone("test_resnet", weights=False, output_stride=7)
    with pytest.raises(LoftUpError, match=r"with the options {'pos_embed': 'odd'}"):
        load_backbone("test_vit", weights=False, pos_embed="odd")
    assert load_backbone("test_vit", weights=False, dynamic_img_size=False).model.dynamic_img_size is False


def test_real_weights():
    path = shared("weights/mobilenetv2_100.safetensors")
    half = (0.5, 0.5, 0.5)
    backbone = load_backbone("mobilenetv2_100", weights=path, layer=3, pad_type="same", mean=half, std=half)
    image = backbone.preprocess(shared("data/photos/n01440764_tench.jpg"), size=(224, 288))
    with torch.inference_mode():
        features = backbone(image)
        assert features.shape == (1, 96, 14, 18)
        model = timm.create_model("mobilenetv2_100", pad_type="same", features_only=True, out_indices=(3,)).eval()
        missing, _ = model.load_state_dict(load_file(path), strict=False)
        assert not missing
        torch.testing.assert_close(features, model(image)[0])
        whole = load_backbone("mobilenetv2_100", weights=path, pad_type="same", mean=half, std=half)
        # Class 0 of ImageNet is the tench.
        assert whole.model(whole.preprocess(shared("data/photos/n01440764_tench.jpg"), size=224)).argmax() == 0


@pytest.fixture
def resnet():
    return randomised(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("safetensors", "same"),
        ("pickle", "none"),
        ("nested", "other"),
        ("distributed", "same"),
        ("safetensors", "other"),
    ],
)
def test_local_files(resnet, tmp_path, kind, heads):
    state = resnet.state_dict()
    if heads == "none":
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    elif heads == "other":
        state["fc.weight"], state["fc.bias"] = torch.zeros(7, 96), torch.zeros(7)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "distributed":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save({"model": state} if kind == "nested" else state, path)
    image = torch.randn(1, 3, 64, 64)
    for weights in (path, str(path)):
        backbone = load_backbone("test_resnet", weights=weights)
        torch.testing.assert_close(backbone(image), wrap(resnet)(image))
    assert "state_dict" not in backbone.model.pretrained_cfg
    without = load_backbone("test_resnet", weights=path, num_classes=0)
    torch.testing.assert_close(without(image), wrap(resnet)(image))
    maps = load_backbone("test_resnet", weights=path, features_only=True, out_indices=(2,))
    torch.testing.assert_close(maps(image), wrap(resnet, layer=2)(image))


def test_the_official_dinov2_file():
    path = shared("golden/dinov2_vit_d48/official_state_dict.safetensors")
    options = {"embed_dim": 48, "depth": 3, "num_heads": 2}
    cases = load_file(path.parent / "cases.safetensors")
    backbone = load_backbone("dinov2_vits14", weights=path, **options)
    error = (backbone(cases["1.image"]) - cases["1.features"]).abs()
    assert error.max() <= 2e-4
    assert backbone.mean == (0.485, 0.456, 0.406)
    path = shared("golden/dinov2_reg_vit_d48/official_state_dict.safetensors")
    cases = load_file(path.parent / "cases.safetensors")
    error = (load_backbone("dinov2_vits14_reg", weights=path, **options)(cases["1.image"]) - cases["1.features"]).abs()
    assert error.max() <= 2e-4
    with pytest.raises(
        LoftUpError, match=r"official_state_dict.safetensors does not hold weights for .*register_tokens"
    ):
        load_backbone("dinov2_vits14", weights=path, **options)


def test_wrong_files_are_refused(resnet, tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(LoftUpError, match=r"no such weights file: .*weights.safetensors"):
        load_backbone("test_resnet", weights=path)
    with pytest.raises(LoftUpError, match="no such weights file"):
        load_backbone("test_resnet", weights=tmp_path)
    with pytest.raises(TypeError, match="weights must be a path, None .*got True"):
        load_backbone("test_resnet", weights=True)
    save_file({key: value for key, value in resnet.state_dict().items() if "layer2" not in key}, path)
    for options in ({}, {"num_classes": 0}, {"features_only": True}):
        with pytest.raises(
            LoftUpError, match=r"weights.safetensors does not hold weights for 'test_resnet': .*layer2\.0\."
        ):
            load_backbone("test_resnet", weights=path, **options)
    save_file({"something": torch.zeros(2)}, path)
    with pytest.raises(LoftUpError, match=r"does not hold weights for .*siglip_gap_224.*missing pos_embed"):
        load_backbone("vit_base_patch16_siglip_gap_224", weights=path, embed_dim=48, depth=1, num_heads=2)
    path.write_bytes(b"not safetensors")
    with pytest.raises(LoftUpError, match=r"cannot read .*weights.safetensors: .*Expected safetensors, or a pickle of"):
        load_backbone("test_resnet", weights=path)
    other = tmp_path / "weights.pth"
    for content in ([torch.zeros(1)], {}):
        torch.save(content, other)
        with pytest.raises(
            LoftUpError, match=r"weights.pth holds a (list|dict), expected a non-empty dict|cannot read"
        ):
            load_backbone("test_resnet", weights=other)


def test_a_lacking_layer_is_seen_without_any_log(resnet, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in resnet.state_dict().items() if "layer2" not in key}, path)
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(LoftUpError, match=r"does not hold weights for 'test_resnet': missing layer2\.0\.conv1"):
            load_backbone("test_resnet", weights=path, num_classes=0)
    finally:
        logging.disable(logging.NOTSET)


def test_threads_do_not_hear_of_each_others_missing_layers(resnet, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(resnet.state_dict(), good)
    save_file({key: value for key, value in resnet.state_dict().items() if "layer2" not in key}, bad)
    both_inside = threading.Barrier(2)

    def load(path):
        both_inside.wait(60)
        try:
            load_backbone("test_resnet", weights=path, num_classes=0)
        except LoftUpError:
            return "refused"
        return "loaded"

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            assert list(pool.map(load, [good, bad])) == ["loaded", "refused"]


def test_names_are_strings(resnet):
    with pytest.raises(TypeError, match=r"takes the name of a backbone, got ResNet; for a model object: wrap\(model\)"):
        load_backbone(resnet)
    for other in (3, None):
        with pytest.raises(TypeError, match=f"takes the name of a backbone, got {type(other).__name__}"):
            load_backbone(other)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_never_run(tmp_path):
    path = tmp_path / "weights.pth"
    for write in (lambda: torch.save({"conv1.weight": Trap()}, path), lambda: path.write_bytes(pickle.dumps(Trap()))):
        write()
        with pytest.raises(LoftUpError, match=r"cannot read .*weights.pth"):
            load_backbone("test_resnet", weights=path)


def test_torchscript_archives_name_the_conversion(tmp_path):
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(LoftUpError, match=r"cannot read .*archive.pt.*torch.jit.load\(path, 'cpu'\).state_dict\(\)"):
        load_backbone("test_resnet", weights=path)


def test_weights_from_the_hub(hub, resnet):
    hub.add("timm/test_resnet.r160_in1k", {"model.safetensors": save(resnet.state_dict())})
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_backbone("test_resnet.r160_in1k")(image), wrap(resnet)(image))


def test_hub_without_the_weights_and_no_hub(hub):
    text = (
        r"could not load timm's weights for 'test_resnet' from the Hub .*load_backbone\(name, weights=path\) or --backb"
    )
    with pytest.raises(LoftUpError, match=text):
        load_backbone("test_resnet")
    hub.close()
    with pytest.raises(LoftUpError, match=text):
        load_backbone("test_resnet")
    with pytest.raises(LoftUpError, match="could not load timm's weights for 'mobilenetv2_035' from the Hub"):
        load_backbone("mobilenetv2_035")  # timm has none


def test_hub_repositories_of_timm_models(hub, resnet):
    config = (
        b'{"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {"tag": "mine", "num_classes": 1000}}'
    )
    hub.add("me/resnet", {"model.safetensors": save(resnet.state_dict()), "config.json": config})
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_backbone("hf-hub:me/resnet")(image), wrap(resnet)(image))


def test_state_dicts_in_memory_files_are_not_paths():
    with pytest.raises(TypeError, match="weights must be a path"):
        load_backbone("test_resnet", weights=io.BytesIO())
