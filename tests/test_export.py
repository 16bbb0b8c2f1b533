"""Exported graphs against eager PyTorch, in onnxruntime and by torch.export's own loader."""

import json
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from loftup import Backbone, LoftUp, LoftUpError, Upsampled, wrap
from loftup.cli import main
from loftup.graphs import write_graph

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def run(path, **inputs):
    session = runtime.InferenceSession(str(path))
    assert [each.name for each in session.get_inputs()] == list(inputs)
    (result,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(result)


def largest(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


def facts(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


# Batch, channels, grid, image: several aspects; patches of no whole number of pixels; fewer pixels than cells.
SIZES = [
    (2, 32, 8, 9, 112, 144),
    (1, 384, 16, 12, 224, 168),
    (1, 7, 5, 3, 33, 50),
    (3, 20, 2, 14, 28, 190),
    (1, 8, 16, 16, 9, 10),
]


@pytest.mark.parametrize("shape", SIZES)
def test_any_as_onnx_equals_eager_at_every_size_and_channel_count(any_graph, shape):
    batch, channels, h, w, height, width = shape
    features, image = torch.randn(batch, channels, h, w), torch.rand(batch, 3, height, width)
    expected = LoftUp.from_pretrained("any")(features, image)
    assert largest(run(any_graph, features=features, image=image), expected) < 1e-4


def test_an_onnx_file_says_what_it_holds(any_graph):
    model = onnx.load(any_graph)
    assert model.opset_import[0].version >= 18
    assert facts(any_graph)["upsampler_licence"] == "CC-BY-4.0"
    assert json.loads(facts(any_graph)["upsampler"])["heads"] == 3
    named = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input]
    assert named == [["batch", "channels", "rows", "columns"], ["batch", 3, "height", "width"]]
    assert [d.dim_param for d in model.graph.output[0].type.tensor_type.shape.dim] == [
        "batch",
        "channels",
        "height",
        "width",
    ]


def test_the_published_architecture_equals_eager_but_for_its_fourier_code(tmp_path):
    torch.manual_seed(0)
    up = LoftUp(32).eval().requires_grad_(False)
    path = up.export(tmp_path / "up.onnx")
    assert up.export(tmp_path / "up.pt2")
    graph = torch.export.load(str(tmp_path / "up.pt2")).module()
    for batch, h, w, height, width in ((2, 8, 9, 112, 144), (1, 7, 5, 33, 50), (3, 2, 14, 28, 190), (1, 4, 4, 64, 64)):
        features, image = torch.randn(batch, 32, h, w), torch.rand(batch, 3, height, width)
        expected = up(features, image)
        # Its frequencies reach e^10, which makes last bits of coordinates visible.
        assert largest(run(path, features=features, image=image), expected) < 2e-3 * float(expected.abs().max())
        assert largest(graph(features, image), expected) < 2e-3 * float(expected.abs().max())


BACKBONES = {
    "dinov2": lambda: wrap(timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=224)),  # 16x16 positions
    "eight": lambda: wrap(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=128)),  # 8x8 positions
    "views": lambda: wrap(timm.create_model("vit_tiny_patch16_224", depth=1), views=4, views_at_once=4),
    "same": lambda: wrap(timm.create_model("mobilenetv2_100", pad_type="same"), layer=2),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_equal_eager_at_every_size(tmp_path, name):
    backbone = BACKBONES[name]()
    path = backbone.export(tmp_path / "backbone.onnx")
    step = backbone.multiple
    assert json.loads(facts(path)["multiple"]) == step
    assert json.loads(facts(path)["mean"]) == list(backbone.mean)
    for batch, h, w in ((2, 8, 9), (1, 16, 16), (3, 2, 5), (1, 14, 20), (1, 20, 3)):
        image = torch.randn(batch, 3, h * step, w * step)
        expected = backbone(image)
        assert largest(run(path, image=image), expected) < 1e-4 * max(1, float(expected.abs().max())), (h, w)


def test_weights_of_fewer_bits(tmp_path):
    resnet = wrap(timm.create_model("resnet18"), layer=3)
    image = torch.randn(1, 3, 96, 160)
    path = resnet.export(tmp_path / "int8.onnx", store="int8")
    assert path.stat().st_size < 0.3 * sum(4 * each.numel() for each in resnet.model.layer3.parameters()) + 2e6
    assert torch.cosine_similarity(run(path, image=image), resnet(image), dim=1).mean() > 0.999


def test_image_to_dense_features_in_one_graph(tmp_path):
    both = Upsampled(wrap(timm.create_model("vit_tiny_patch16_224", depth=1)), LoftUp(192))
    path = both.export(tmp_path / "both.onnx", store="float16")
    assert {"mean", "upsampler", "licence", "upsampler_licence"} <= set(facts(path))
    assert facts(path)["channels"] == "192"
    for h, w in ((8, 9), (3, 14)):
        image = torch.randn(1, 3, 16 * h, 16 * w)
        assert largest(run(path, image=image), both.eval()(image)) < 2e-2


def test_a_pt2_takes_every_size_the_models_own_among_them(tmp_path):
    backbone = wrap(timm.create_model("vit_tiny_patch16_224", depth=1))
    graph = torch.export.load(str(backbone.export(tmp_path / "vit.pt2"))).module()
    for h, w in ((14, 14), (14, 6), (5, 14), (8, 9)):
        image = torch.randn(2, 3, 16 * h, 16 * w)
        assert largest(graph(image), backbone(image)) < 1e-4


def test_one_size(tmp_path):
    backbone = wrap(timm.create_model("vit_tiny_patch16_224", depth=1))
    path = backbone.export(tmp_path / "one.pt2", size=(64, 96))
    extra = {"metadata.json": ""}
    graph = torch.export.load(str(path), extra_files=extra).module()
    image = torch.randn(3, 3, 64, 96)
    assert largest(graph(image), backbone(image)) < 1e-4
    assert json.loads(extra["metadata.json"])["stride"] == "16"
    with pytest.raises(ValueError, match=r"takes \(64, 96\) pixels, got size=\(65, 96\)"):
        backbone.export(tmp_path / "one.onnx", size=(65, 96))


def test_the_model_stays_as_it_was(tmp_path):
    up = LoftUp(16).to(torch.bfloat16).train()
    before = {key: value.clone() for key, value in up.state_dict().items()}
    path = up.export(tmp_path / "up.onnx", size=32)
    up.export(path, size=32)  # its own file is replaced
    for _ in range(2):
        up.export(tmp_path / "up.pt2", size=32)
    assert up.training
    assert up.dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in up.state_dict().items())
    assert run(path, features=torch.randn(1, 16, 4, 4), image=torch.rand(1, 3, 32, 32)).isfinite().all()


class Unexportable(nn.Module):
    def forward(self, image):
        x = nn.functional.avg_pool2d(image, 8)
        return x * (2 if float(image.sum()) > 0 else 1)


class FixedGrid(nn.Module):
    def forward(self, image):
        return nn.functional.avg_pool2d(image, 8) + torch.zeros(1, 3, 8, 9)


class OtherwiseInGraphs(nn.Module):
    def forward(self, image):
        return nn.functional.avg_pool2d(image, 8) * (2 if torch.compiler.is_compiling() else 1)


def test_refusals(tmp_path, monkeypatch):
    up = LoftUp(16).eval()
    with pytest.raises(LoftUpError, match=r"ends in neither .onnx .* nor .pt2"):
        up.export(tmp_path / "up.pt")
    with pytest.raises(ValueError, match=r"store must be one of float32, float16, int8, got 'int4'"):
        up.export(tmp_path / "up.onnx", store="int4")
    with pytest.raises(LoftUpError, match=r"stores the weights as float32; leave int8 out"):
        up.export(tmp_path / "up.pt2", store="int8")
    (tmp_path / "theirs.onnx").write_text("somebody's")
    with pytest.raises(LoftUpError, match="theirs"):
        up.export(tmp_path / "theirs.onnx")
    model = Unexportable()
    backbone = Backbone(model, model, channels=3, patch_size=8, check=False)
    with pytest.raises(LoftUpError, match=r"no graph of this model for any size .*give one size: size=\(H, W\)"):
        backbone.export(tmp_path / "model.onnx")
    fixed = FixedGrid()
    backbone = Backbone(fixed, fixed, channels=3, patch_size=8, check=False)
    with pytest.raises(LoftUpError, match=r"no graph of this model for any size .*give one size"):
        backbone.export(tmp_path / "model.onnx")
    other = OtherwiseInGraphs()
    backbone = Backbone(other, other, channels=3, patch_size=8, check=False)
    with pytest.raises(LoftUpError, match=r"it differs from the model at inputs of \(1, 3, 88, 40\)"):
        backbone.export(tmp_path / "model.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("loftup.graphs.OLDEST", (99, 0))
        with pytest.raises(LoftUpError, match=r"export needs torch 99.0 or newer, got"):
            up.export(tmp_path / "up.onnx")
    several = wrap(timm.create_model("vit_tiny_patch16_224", depth=2), layer=[0, 1])
    with pytest.raises(LoftUpError, match=r"layers \[0, 1\] as a list"):
        several.export(tmp_path / "several.onnx")
    with pytest.raises(LoftUpError, match="only a LoftUp is exported"):
        Upsampled(backbone, nn.Identity()).export(tmp_path / "both.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LoftUpError, match=r"need the package onnxscript: pip install 'loftup\[export\]'"):
        up.export(tmp_path / "up.onnx")


def test_the_old_exporter_is_refused_in_a_sentence(tmp_path):
    pytest.importorskip("onnxscript")
    arguments = (torch.randn(1, 16, 4, 4), torch.rand(1, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LoftUpError, match=r"old exporter \(dynamo=False\).*up.export"):
            torch.onnx.export(LoftUp(16).eval(), arguments, str(tmp_path / "old.onnx"), dynamo=False)


def test_weights_beyond_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("loftup.graphs.LARGEST", 1000)
    path = LoftUp(16).eval().export(tmp_path / "up.onnx", size=(32, 32))
    LoftUp(16).eval().export(path, size=(32, 32))  # its own files are replaced
    assert (tmp_path / "up.onnx.data").is_file()
    assert facts(path)["channels"] == "16"
    with pytest.raises(LoftUpError, match="stored as float32 alone, not as int8"):
        LoftUp(16).eval().export(tmp_path / "int8.onnx", size=(32, 32), store="int8")
    assert run(path, features=torch.randn(1, 16, 4, 4), image=torch.rand(1, 3, 32, 32)).isfinite().all()


def test_the_command_writes_upsampler_backbone_and_whole(tmp_path, capsys):
    (tmp_path / "up").mkdir()
    LoftUp(192).save_pretrained(tmp_path / "up")
    command = ["export", str(tmp_path / "up"), "--backbone", "tiny", "--format", "pt2", "--size", "32", "48"]
    assert main([*command, "-o", str(tmp_path / "graphs")]) == 0
    assert capsys.readouterr().out.count(".pt2: ") == 3
    image = torch.rand(2, 3, 32, 48)
    graphs = {
        name: torch.export.load(str(tmp_path / "graphs" / f"{name}.pt2")).module() for name in ("backbone", "whole")
    }
    assert graphs["backbone"](image).shape == (2, 192, 2, 3)
    assert graphs["whole"](image).shape == (2, 192, 32, 48)
    assert main(["export", "any", "--parts", "whole", "-o", str(tmp_path)]) == 2
    assert "needs --backbone NAME" in capsys.readouterr().err


def test_positions_resampled_as_matrix_products_equal_interpolation():
    from loftup.backbones.vit import ANTIALIASED, WITH_OFFSET, cubic_weights

    table = torch.randn(1, 5, 37, 37, dtype=torch.float64)
    for how in (ANTIALIASED, WITH_OFFSET):
        for new in ((16, 16), (10, 60), (37, 20), (1, 5), (50, 37)):
            scale = tuple((side + how.offset) / 37 for side in new)
            target = {"scale_factor": scale} if how.offset else {"size": new}
            expected = nn.functional.interpolate(table, **target, mode="bicubic", antialias=how.antialias)
            rows, columns = (cubic_weights(37, side, how, table) for side in new)
            assert np.allclose(torch.einsum("hm,wn,bdmn->bdhw", rows, columns, table), expected, atol=1e-12)


def test_write_graph_takes_what_it_is_given(tmp_path):
    from loftup.graphs import Input

    inputs = [Input("x", torch.randn(2, 3), {0: ("batch", torch.export.Dim("batch"))})]
    path = write_graph(
        nn.Linear(3, 4).eval(), inputs, ("y", {0: "batch"}), tmp_path / "linear.onnx", "int8", {"a": [1]}
    )
    assert facts(path)["a"] == "[1]"
    assert run(path, x=torch.randn(5, 3)).shape == (5, 4)
