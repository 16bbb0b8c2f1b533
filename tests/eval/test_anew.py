"""Upsamplers that take the features anew: of shifted views, or of a larger picture."""

import json

import pytest
import torch
import torch.nn.functional as F
from layouts import pairs
from small import mean_colours
from torch import nn

from loftup import LoftUp, LoftUpError, wrap
from loftup.cli import main
from loftup.eval.tasks.efficiency import EfficiencyConfig, efficiency
from loftup.eval.tasks.segmentation import METRICS
from loftup.eval.upsamplers import create, register, registry
from loftup.eval.upsamplers.access import at_pixels, with_head
from loftup.eval.upsamplers.anew import between


def inputs(count=1, size=(16, 24)):
    backbone, image = mean_colours(cell=4), torch.rand(count, 3, *size)
    return backbone, image, torch.full((count, 3, size[0] // 4, size[1] // 4), torch.nan)


@pytest.mark.parametrize("views", [1, 4, 9, 16])
def test_views_are_upsampled_bilinearly_unless_said_otherwise(views):
    backbone, image, nothing = inputs(2)
    finer = backbone.with_views(views)(image)
    expected = F.interpolate(finer, (16, 24), mode="bilinear", align_corners=False)
    for spec in (f"views:{views}", f"views:{views}:bilinear"):
        torch.testing.assert_close(create(spec, backbone)(nothing, image, (16, 24)), expected)
    assert not hasattr(create("views:4", backbone), "at")
    assert not getattr(create("views:4:lowres", backbone), "native", False)
    assert backbone.views == 1


def test_views_of_a_backbone_that_has_views_are_as_many_as_named():
    backbone, image, nothing = inputs()
    for own in (1, 4):
        made = create("views:9:nearest", backbone.with_views(own))(nothing, image, (12, 18))
        torch.testing.assert_close(made, F.interpolate(backbone.with_views(9)(image), (12, 18), mode="nearest-exact"))


def test_larger_pictures_by_fractions_and_with_another_upsampler():
    backbone, image, nothing = inputs()
    large = F.interpolate(image, (24, 36), mode="bicubic", align_corners=False).clamp(0, 1)
    finer = F.avg_pool2d(large, 4)
    made = create("large_input:1.5", backbone)(nothing, image, (16, 24))
    torch.testing.assert_close(made, F.interpolate(finer, (16, 24), mode="bilinear", align_corners=False))
    made = create("large_input:1.5:loftup:any", backbone)(nothing, image, (16, 24))
    torch.testing.assert_close(made, LoftUp.from_pretrained("any")(finer, image, size=(16, 24)))
    assert made.isfinite().all()


@pytest.mark.parametrize("spec", ["views:4:loftup:any", "large_input:2:loftup:any"])
def test_points_and_heads_go_through_the_inner_stream(spec):
    backbone, image, nothing = inputs(2)
    up, inner = create(spec, backbone), LoftUp.from_pretrained("any")
    large = F.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    finer = backbone.with_views(4)(image) if spec.startswith("views") else backbone(large)
    dense = inner(finer, image, size=(16, 24))
    torch.testing.assert_close(up(nothing, image, (16, 24)), dense)
    pixels = torch.tensor([[[0, 23], [15, 0]], [[3, 4], [5, 6]]])
    found = at_pixels(up, nothing, image, (16, 24), pixels)
    expected = torch.stack([d[:, p[:, 0], p[:, 1]].mT for d, p in zip(dense, pixels, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    head = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        made = with_head(up, nothing, image, (16, 24), head)
        torch.testing.assert_close(made, head(dense), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in up.parameters()) == sum(p.numel() for p in inner.parameters())
    assert up.at(nothing.half(), image, pixels.flip(-1), (16, 24)).dtype == torch.float16


def test_two_views_on_the_diagonal():
    backbone, image, nothing = inputs()
    four = backbone.with_views(4)(image)
    finer = torch.full_like(four, torch.nan)
    finer[:, :, ::2, ::2], finer[:, :, 1::2, 1::2] = four[:, :, ::2, ::2], four[:, :, 1::2, 1::2]
    h, w = finer.shape[2:]
    for row in range(h):
        for column in range(w):
            if (row + column) % 2:
                around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
                there = [finer[:, :, r, c] for r, c in around if 0 <= r < h and 0 <= c < w]
                finer[:, :, row, column] = torch.stack(there).mean(0)
    made = create("views:diagonal:lowres", backbone)(nothing, image, (h, w))
    torch.testing.assert_close(made, finer)
    odd = torch.rand(1, 3, 15, 25)
    larger = F.interpolate(odd, (16, 24), mode="bilinear", align_corners=False)
    expected = create("views:diagonal", backbone)(nothing, larger, (9, 9))
    torch.testing.assert_close(create("views:diagonal", backbone.with_views(4))(nothing, odd, (9, 9)), expected)


def test_what_lies_between_one_cell_and_its_neighbour():
    made = between(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0))
    assert made[0, 0].tolist() == [[2, 3], [3, 4]]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("views", "'views' must be 1, 4, 9, 16 or 'diagonal', got ''; write views:4"),
        ("views:2", "must be 1, 4, 9, 16 or 'diagonal', got '2'"),
        ("views:04", "got '04'"),
        ("views:4:bilinaer", "no upsampler 'bilinaer'; did you mean 'bilinear'"),
        ("views:4:nearest:2", "takes no argument, got nearest:2"),
        ("large_input:0.5", "must be a number above 1, got '0.5'"),
        ("large_input:inf", "must be a number above 1, got 'inf'"),
        ("large_input:2:xyz", "no upsampler 'xyz'"),
    ],
)
def test_other_arguments_are_refused(spec, text):
    with pytest.raises(LoftUpError, match=text):
        create(spec, mean_colours())


def test_code_of_others_is_trusted_inside_as_outside(monkeypatch):
    for name in ("_FACTORIES", "_REMOTE"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))

    @register("theirs", remote="github.com/x/y at 1")
    def theirs(backbone, argument):
        return lambda features, image, size: features

    with pytest.raises(LoftUpError, match="runs code of github.com/x/y at 1"):
        create("views:4:theirs", mean_colours())
    backbone, image, nothing = inputs()
    up = create("views:4:theirs", backbone, trust_remote_code=True)
    torch.testing.assert_close(up(nothing, image, (1, 1)), backbone.with_views(4)(image))


def test_the_time_with_the_backbone_counts_it_once():
    backbone = mean_colours()
    seen = []
    run = backbone.features
    backbone.features = lambda image: seen.append(len(image)) or run(image)
    up = create("views:4", backbone)
    result = efficiency(backbone, up, EfficiencyConfig(size=[16, 16], output=[16, 16], rounds=1))
    rounds = 2 * 2 * 4 + 4 * ("memory" in result.metrics)
    assert len(seen) == 1 + rounds


SMALL = ["--set", "size=[32,32]", "--set", "training=samples", "--set", "points=50", "--set", "pictures=1"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs of the command in one folder, with a backbone of mean colours."""
    pairs(tmp_path / "camvid", "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))

    def backbone_of(arguments):
        return mean_colours(cell=8).with_views(arguments.views)

    monkeypatch.setattr("loftup.cli.models.backbone_of", backbone_of)
    common = ["eval", "segmentation", "--dataset", f"camvid:{tmp_path / 'camvid'}", "--backbone", "x", "--seeds", "1"]

    def call(*arguments, folder="out"):
        return main([*common, *SMALL, "-o", str(tmp_path / folder), *map(str, arguments)])

    call.folder = tmp_path
    return call


def rows(table, folder="out"):
    return json.loads((table.folder / folder / "results.json").read_text())


def test_one_table_holds_one_view_and_four(table):
    probes = ["--set", 'probes=["upsampled","lowres"]']
    assert table("--upsampler", "bilinear,four=views:4,five=views:4:loftup:any,half=views:diagonal", *probes) == 0
    results = rows(table)
    assert [row["upsampler"] for row in results["upsamplers"].values()] == [
        "bilinear", "views:4", "views:4:loftup:any", "views:diagonal",
    ]  # fmt: skip
    metrics = {label: row["metrics"] for label, row in results["upsamplers"].items()}
    assert set(metrics["four"]) == set(METRICS)
    assert metrics["four"]["miou"] != metrics["bilinear"]["miou"]
    assert results["upsamplers"]["four"]["parameters"] == 0
    assert results["upsamplers"]["five"]["parameters"] > 30_000
    # A backbone of four views is another row of upsampled features, and the same as the wrapper's.
    assert table("--upsampler", "bilinear", "--views", 4, folder="four") == 0
    assert rows(table, "four")["upsamplers"]["bilinear"]["metrics"]["miou"] == metrics["four"]["miou"]


def test_results_of_other_views_are_refused(table, capsys):
    assert table("--upsampler", "bilinear") == 0
    assert "views" not in rows(table)["backbone"]
    assert table("--upsampler", "nearest", "--views", 4) == 2
    assert "was made with other settings (backbone.views None, now 4); give another -o" in capsys.readouterr().err
    assert table("--upsampler", "bilinear", "--views", 9, folder="nine") == 0
    assert rows(table, "nine")["backbone"]["views"] == 9
    assert "Backbone: views 9." in (table.folder / "nine" / "results.md").read_text()
    assert table("--upsampler", "nearest", folder="nine") == 2
    assert "(backbone.views 9, now None)" in capsys.readouterr().err


def test_the_oracle_has_one_view(tmp_path, capsys):
    oracle = ["eval", "segmentation", "--dataset", "synthetic", "--backbone", "oracle", "--views", "4"]
    assert main([*oracle, "--upsampler", "bilinear", "-o", str(tmp_path)]) == 2
    assert "--views 4 with --backbone oracle, which knows pictures as they are" in capsys.readouterr().err


def test_featups_network_is_fitted_to_shifted_views_too():
    backbone = mean_colours(cell=6)
    image = torch.rand(1, 3, 24, 24)
    for views in (1, 4, 9):
        several = backbone.with_views(views)
        up = create("featup_implicit:2", several)
        assert up(several(image), image, (24, 24)).shape == (1, 3, 24, 24)
        assert len(up.losses) == 2


def test_overlapping_patches_are_those_of_shifted_views_for_a_patch_embedding_alone():
    # Without position embeddings and blocks a cell says what its patch shows, wherever that lies.
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, dynamic_img_size=True)
    with torch.no_grad():
        model.pos_embed.zero_()
    model.blocks[0] = nn.Identity()
    backbone = wrap(model.eval(), check=False)
    image = torch.rand(1, 3, 64, 96)
    nothing = torch.full((1, 192, 4, 6), torch.nan)
    made = create("overlapping", backbone).look(image)
    expected = backbone.with_views(4)(backbone.normalise(image))
    assert made.shape == (1, 192, 8, 12)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert model.patch_embed.proj.stride == (16, 16)
    upsampled = create("overlapping:loftup:any", backbone)(nothing, image, (64, 96))
    torch.testing.assert_close(upsampled, LoftUp.from_pretrained("any")(made, image, size=(64, 96)))


def test_overlapping_patches_want_a_plain_transformer():
    message = "'overlapping' halves the stride of a plain vision transformer's patches"
    with pytest.raises(LoftUpError, match=message):
        create("overlapping", mean_colours(cell=4))
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this transformers has no DINOv3")
    with pytest.raises(LoftUpError, match="without rotary embeddings; got"):
        create("overlapping", wrap(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**small)).eval()))
