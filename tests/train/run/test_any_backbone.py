"""Training one upsampler for every backbone: config, plan, and runs that are stopped and resumed."""

import csv
import dataclasses
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_config import configured
from small_run import make_material, small_config, steps_of
from torch import nn

from loftup import LoftUp, LoftUpError, UniversalConfig
from loftup.train.config import BackboneConfig, TrainConfig, check, load_config, to_yaml
from loftup.train.data.loader import loader
from loftup.train.data.plan import Cells, check_geometry, make_plan
from loftup.train.objective.standardise import standardisation
from loftup.train.run import engine
from loftup.train.run.build import build_backbones, build_upsampler, check_paths
from loftup.train.run.checkpoint import differences
from loftup.train.run.engine import train
from loftup.train.run.validation import Validation, mean_losses

SEVERAL = (
    "data: {path: [photos]}\nmodel: {architecture: any}\nobjective: {high_resolution: {weight: 1}}\n"
    "backbones: [{name: one, layer: 3}, {name: other, options: {output_stride: 16}}]\n"
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material, tmp_path):
    """Two layers, of 32 channels with patches of 8 and of 48 with patches of 16."""
    made = small_config(material, tmp_path / "run")
    made.backbones = [dataclasses.replace(made.backbone, layer=layer) for layer in (2, 3)]
    made.backbone, made.window = BackboneConfig(), None
    made.model.architecture, made.model.heads, made.model.radius = "any", 2, 1
    made.model.code_width, made.model.encoder_width, made.model.channel_dropout = 4, 8, 0.5
    made.data.sizes, made.data.ratios = [32, 48], [0.5]
    made.objective.mask_bicubic.weight, made.objective.high_resolution.weight = 0.0, 1.0
    made.objective.high_resolution.factors = [2]
    return made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "several.yaml"
    path.write_text(SEVERAL)
    return path


class TestConfig:
    def test_a_list_is_read_and_written(self, file, tmp_path):
        made = load_config(file)
        assert made.backbones == [
            BackboneConfig("one", layer=3),
            BackboneConfig("other", options={"output_stride": 16}),
        ]
        (tmp_path / "again.yaml").write_text(to_yaml(made))
        assert load_config(tmp_path / "again.yaml") == made

    def test_overrides_change_one_or_all(self, file):
        made = load_config(file, ["backbones[0].layer=4.0", "backbones[1].options.pad_type=same"])
        assert made.backbones[0] == BackboneConfig("one", layer=4)
        assert made.backbones[1] == BackboneConfig("other", options={"output_stride": 16, "pad_type": "same"})
        made = load_config(file, ["backbones=[{name: tiny}, {name: x, weights: a b.safetensors}]"])
        assert made.backbones == [BackboneConfig("tiny"), BackboneConfig("x", weights="a b.safetensors")]
        assert load_config(file, ["backbones=[]"]).backbones == []

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("backbones[2].layer=1", r"changes backbones\[2\], but there are 2, counted from 0; give the whole list"),
            (
                "backbones[0].laier=1",
                r"unknown key 'backbones\[0\].laier' in the command line; did you mean 'backbone.lay",
            ),
            (
                "backbones[0]=x",
                r"'backbones\[0\]' in the command line holds 'x', expected keys and values such as name",
            ),
            (
                "backbones=[{nam: x}]",
                r"unknown key 'backbones\[0\].nam' .* Keys of 'backbones\[0\]': name, weights, layer",
            ),
            ("backbones={name: x}", r"backbones is {'name': 'x'} in .*, expected a list such as \[{name: ...}\]"),
            ("backbones=x", r"backbones is 'x' in the command line, expected a list"),
            (
                "backbones[1].mean=[1]",
                r"backbones\[1\].mean is \[1\] in .*, expected a list of at least 3 items, not 1",
            ),
            (
                "backbone.name=z",
                r"both backbone \(z\) and backbones \(one, other\) are given; put all .* backbones=\[\]",
            ),
            (
                "model.architecture=loftup",
                "2 backbones with model.architecture=loftup.* set model.architecture=any, or give",
            ),
            (
                "model.architecture=raw",
                "model.architecture is 'raw' in .*, expected 'loftup', 'any', 'featup_jbu', 'lift'",
            ),
            ("model.architecture=lift", "2 backbones with model.architecture=lift.* set model.architecture=any"),
            (
                "model.values=features",
                "unknown key 'model.values' in the command line; Keys of 'model': architecture, p",
            ),
            ("model.channel_dropout=1", "model.channel_dropout is 1 in .*, expected below 1"),
            ("model.radius=0", "model.radius is 0 in .*, expected at least 1"),
            ("model.code_width=0", "model.code_width is 0 in .*, expected at least 1"),
            ("model.encoder_width=1", "model.encoder_width is 1 in .*, expected at least 2"),
        ],
    )
    def test_refuses(self, file, override, message):
        with pytest.raises(LoftUpError, match=message):
            load_config(file, [override])

    def test_a_projected_network_keeps_all_channels(self):
        made = TrainConfig()
        made.data.path, made.objective.mask_bicubic.weight, made.model.channel_dropout = ["photos"], 1.0, 0.5
        with pytest.raises(
            LoftUpError, match=r"model.channel_dropout=0.5 with model.architecture=loftup.*channel_dropout=0"
        ):
            check(made)

    def test_what_has_no_effect_is_not_refused(self):
        """A window with batch statistics, and the interpolator without the sine code, are the projected network's."""
        made = TrainConfig(window=48)
        made.data.path, made.objective.high_resolution.weight = ["photos"], 1.0
        made.model.start, made.model.position_code = "interpolator", "learnable"
        with pytest.raises(LoftUpError):
            check(made)
        made.model.architecture = "any"
        check(made)

    def test_paths_of_weights(self, config):
        config.backbones[1].weights = "none.safetensors"
        with pytest.raises(LoftUpError, match=r"backbones\[1\].weights names none.safetensors, which is no file"):
            check_paths(config)

    def test_the_ready_one_fits_its_backbones(self):
        made = load_config("any")
        vit, mobilenet = "dinov2_vits14", "mobilenetv2_100"
        assert [(each.name, each.layer, each.views) for each in made.backbones] == [
            (vit, 10, 1), (vit, 8, 1), (vit, 5, 1), (vit, 9, 1), (mobilenet, 3, 1), (mobilenet, 4, 1),
            ("tiny", None, 1), ("tiny", None, 4),
        ]  # fmt: skip
        grids = [14, 14, 14, 14, 16, 16, 16, Cells(16, 2)]
        check_geometry(made, grids)
        made.objective.imitation.weight = 1.0
        check_geometry(made, grids)

    def test_weights_may_move_and_nothing_else(self, config):
        before = dataclasses.asdict(config)
        config.backbones[1].weights = "moved.safetensors"
        assert differences(before, dataclasses.asdict(config)) == []
        config.backbones[1].layer = 4
        assert differences(before, dataclasses.asdict(config)) == ["backbones[1].layer: 3, now 4"]
        config.backbones.pop()
        (found,) = differences(before, dataclasses.asdict(config))
        assert found.startswith("backbones: [{'name': 'test_efficientnet'")


class TestPlan:
    def test_every_backbone_is_drawn_and_decides_about_cells_alone(self):
        made = configured(TrainConfig(), window=64, data__sizes=[96, 160])
        made.objective.high_resolution.weight, made.objective.high_resolution.factors = 1.0, [2]
        sizes = (16, 32)
        check_geometry(made, sizes)
        plans = [make_plan(made, sizes, step) for step in range(100)]
        assert 30 < sum(plan.backbone for plan in plans) < 70
        for step, plan in enumerate(plans):
            alone = make_plan(made, sizes[plan.backbone], step)
            assert plan == dataclasses.replace(alone, backbone=plan.backbone)
        found = {(plan.backbone, plan.region[2] * sizes[plan.backbone] // 2) for plan in plans}
        assert found == set(itertools.product((0, 1), (96, 160)))

    def test_seed_and_step_decide(self):
        made = TrainConfig()
        drawn = [make_plan(made, [14, 14, 14], step).backbone for step in range(20)]
        assert [make_plan(made, [14, 14, 14], step).backbone for step in range(20)] == drawn
        assert [make_plan(TrainConfig(seed=1), [14, 14, 14], step).backbone for step in range(20)] != drawn

    def test_sizes_must_fit_all(self):
        made = configured(TrainConfig(), data__sizes=[224, 240])
        check_geometry(made, 16)
        with pytest.raises(
            LoftUpError, match="data.sizes holds 240; .* of the backbones' patch sizes 16, 32, such as 224 or 256"
        ):
            check_geometry(made, [32, 16])

    def test_factors_must_fit_all(self):
        made = configured(TrainConfig(), data__ratios=[0.125], objective__high_resolution__weight=1.0)
        check_geometry(made, 32)
        with pytest.raises(LoftUpError, match="factors holds 4, a target finer than the output, which has 2 pixels"):
            check_geometry(made, [32, 16])


def test_a_run_from_beginning_to_end(config, tmp_path, capsys):
    config.validation.path, config.validation.pictures, config.validation.every = config.data.path, 1, 2
    config.validation.probe, config.validation.probe_classes = config.data.path[0], 3
    config.steps, config.checkpointing = 4, True
    folder = train(config)
    said = capsys.readouterr().err
    assert "backbone   test_efficientnet.r160_in1k, 32 channels, patch 8\n" in said
    assert "backbone   test_efficientnet.r160_in1k, 48 channels, patch 16\n" in said
    assert "M trained parameters, for any backbone, anew\n" in said
    up = LoftUp.from_pretrained(folder)
    assert up.config == UniversalConfig(heads=2, radius=1, code_width=4, encoder_width=8)
    for channels in (32, 48, 7):
        with torch.inference_mode():
            assert up(torch.randn(1, channels, 3, 3), torch.rand(1, 3, 24, 24)).shape == (1, channels, 24, 24)
    with (folder / "validation.csv").open() as stream:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    assert [row["step"] for row in rows] == [2, 4]
    totals = []
    for backbone in build_backbones(config):
        totals.append(Validation(config, backbone).measure(up))
    for name, value in mean_losses(totals).items():
        assert rows[-1][name] == pytest.approx(value, rel=1e-4), name
    assert rows[-1]["miou"] >= 0
    assert (folder / "pictures" / "step_000004.png").exists()
    card = (folder / "README.md").read_text()
    weights = "weights='backbone.safetensors'"
    assert (
        f"| backbones | `load_backbone('test_efficientnet', {weights}, layer=2)`, "
        f"`load_backbone('test_efficientnet', {weights}, layer=3)` |"
    ) in card
    assert f"backbone = load_backbone('test_efficientnet', {weights}, layer=2)  # weights: your file\n" in card
    assert "`ratio_0` and so on: of every backbone alone; `miou`" in card
    assert "None, h, w" not in card
    assert "| start |" not in card
    assert str(tmp_path) not in card
    assert "backbones:\n- name: test_efficientnet\n  weights: backbone.safetensors\n" in card


def test_attention_in_triton_changes_no_loss_but_by_rounding(config):
    """In the interpreter, or on a GPU."""
    config.steps, losses = 2, []
    for config.triton in (False, True):
        config.output = f"{config.output}_again"
        with (train(config) / "log.csv").open() as stream:
            losses.append([float(row["loss"]) for row in csv.DictReader(stream)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_triton_is_for_any_alone_and_needs_a_gpu(config, monkeypatch):
    config.triton = True
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(
            LoftUpError, match=r"triton=true cannot run here: Triton kernels need CUDA tensors, .* set triton=false"
        ):
            train(config)
    config.model.architecture, config.model.channel_dropout, config.backbones = "loftup", 0.0, []
    with pytest.raises(LoftUpError, match="triton=true is for model.architecture=any, not loftup; set triton=false"):
        check(config)


def test_batches_follow_the_draw(config):
    config.steps = 8
    backbones = build_backbones(config)
    batches = list(loader(config, backbones))
    drawn = [make_plan(config, [8, 16], step).backbone for step in range(8)]
    assert [batch.backbone for batch in batches] == drawn
    assert set(drawn) == {0, 1}
    for batch in batches:
        patch = (8, 16)[batch.backbone]
        assert batch.region[2] * patch == 2 * batch.image.shape[-1] == batch.large.shape[-1]


def test_a_stopped_run_ends_as_an_unbroken_one(config, material, tmp_path):
    """Bit for bit, with teacher, cache, worker process and channel dropout; the weights' files may move."""
    config.steps, config.batch, config.data.workers, config.data.views = 6, 1, 1, 2
    config.data.cache = str(tmp_path / "cache")
    config.objective.self_distillation.weight, config.objective.self_distillation.every = 1.0, 2
    config.objective.mask_bicubic.weight = 1.0
    whole = train(dataclasses.replace(config, output=str(tmp_path / "whole")))
    train(dataclasses.replace(config, steps=3))
    moved = [dataclasses.replace(each, weights=str(tmp_path / "moved.safetensors")) for each in config.backbones]
    shutil.copy(config.backbones[0].weights, tmp_path / "moved.safetensors")
    broken = train(dataclasses.replace(config, backbones=moved), resume=True)
    assert steps_of(broken / "log.csv") == [1, 2, 3, 4, 5, 6]
    assert (broken / "log.csv").read_text() == (whole / "log.csv").read_text()
    first = build_first(config)
    expected = LoftUp.from_pretrained(whole).state_dict()
    for key, value in LoftUp.from_pretrained(broken).state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert any(not torch.equal(value, first[key]) for key, value in expected.items())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    config.backbones[1].layer = 4
    with pytest.raises(LoftUpError, match=r"backbones\[1\].layer: 3, now 4"):
        train(config, resume=True)


def build_first(config):
    """The weights that a run begins with."""
    from loftup.train.run.build import build_upsampler

    torch.manual_seed(config.seed)
    backbones = build_backbones(config)
    return build_upsampler(config, backbones[0]).state_dict()


def test_going_on_from_weights(config, material, tmp_path, capsys):
    config.steps = 1
    first = train(config)
    second = dataclasses.replace(config, output=str(tmp_path / "second"), backbones=config.backbones[1:])
    second.model = dataclasses.replace(config.model, pretrained=str(first))
    up = LoftUp.from_pretrained(train(second))
    assert up.config == LoftUp.from_pretrained(first).config
    assert f"for any backbone, from {first}\n" in capsys.readouterr().err
    assert "| start | from run |" in (tmp_path / "second" / "README.md").read_text()
    projected = small_config(material, tmp_path / "third")
    projected.model.pretrained = str(first)
    message = "holds architecture=any, the config says model.architecture=loftup; set model.architecture=any, or"
    with pytest.raises(LoftUpError, match=message):
        train(projected)
    projected.model.pretrained, projected.steps = None, 1
    second.model.pretrained, second.output = str(train(projected)), str(tmp_path / "fourth")
    with pytest.raises(LoftUpError, match="holds architecture=loftup, the config says model.architecture=any"):
        train(second)


def test_a_single_backbone_and_windows(config, tmp_path):
    config.backbone, config.backbones, config.window, config.steps = config.backbones[0], [], 8, 2
    assert LoftUp.from_pretrained(train(config)).config.channels is None


def test_a_compiled_network_keeps_its_keys(config, monkeypatch):
    """The compiler itself is torch's affair: here it calls the function as it is, and counts."""
    compiled = []
    plain = train(dataclasses.replace(config, output=f"{config.output}_plain"))
    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: (compiled.append(type(self)), original(self, backend="eager"))
    )
    config.compile = True
    up = LoftUp.from_pretrained(train(config))
    assert [kind.__name__ for kind in compiled] == ["GuidanceEncoder"]
    for key, value in LoftUp.from_pretrained(plain).state_dict().items():
        torch.testing.assert_close(up.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_the_validation_measures_standardised_features(config):
    config.validation.path, config.objective.mask_bicubic.alpha = config.data.path, 0.0  # the target: plain bicubic
    (backbone, _), up = build_backbones(config), LoftUp.from_pretrained(train(config))
    validation, expected = Validation(config, backbone), []
    for case in validation._cases.cases:
        scale = standardisation(case.features)
        with torch.inference_mode():
            student = up(case.features, case.image)
        bicubic = nn.functional.interpolate(case.features, (32, 32), mode="bicubic")
        expected.append(float((scale(student) - scale(bicubic)).square().mean()))
    own, bicubic, count = validation.measure(up).tolist()
    assert own == pytest.approx(sum(expected), rel=1e-3)
    assert (bicubic, count) == (0, 5)


def test_losses_of_several_backbones():
    one, other = torch.tensor([2.0, 4.0, 2.0]), torch.tensor([3.0, 2.0, 1.0])
    assert mean_losses([one]) == {"loss": 1.0, "bicubic": 2.0, "ratio": 0.5}
    assert mean_losses([one, other]) == {"loss": 2.0, "bicubic": 2.0, "ratio": 1.0, "ratio_0": 0.5, "ratio_1": 1.5}


class TestParts:
    """Parts of the universal network that pretrained weights lack."""

    @pytest.fixture
    def weights(self, config, tmp_path):
        up = build_upsampler(config, None)
        up.save_pretrained(tmp_path / "weights")
        return up

    def test_they_begin_as_nothing(self, config, weights, tmp_path):
        grown = configured(
            config, model__pretrained=str(tmp_path / "weights"), model__quarter_width=6, model__local=True
        )
        features, image = torch.randn(1, 5, 4, 4), torch.rand(1, 3, 16, 16)
        up = build_upsampler(grown, None)
        assert up.config == dataclasses.replace(weights.config, quarter_width=6, local=True)
        torch.testing.assert_close(up(features, image), weights(features, image))
        grown.model.oversampling = 2
        assert build_upsampler(grown, None).config.oversampling == 2

    def test_what_is_there_stays(self, config, tmp_path):
        larger = configured(config, model__quarter_width=6, model__local=True, model__oversampling=2)
        up = build_upsampler(larger, None)
        up.save_pretrained(tmp_path / "weights")
        same = configured(config, model__pretrained=str(tmp_path / "weights"), model__quarter_width=0)
        assert build_upsampler(same, None).config == up.config
        with pytest.raises(LoftUpError, match=r"has quarter_width=6, the config says model.quarter_width=8"):
            build_upsampler(configured(same, model__quarter_width=8), None)
        with pytest.raises(LoftUpError, match=r"averages 2 pixels of the image .* set model.oversampling=2"):
            build_upsampler(configured(same, model__oversampling=1), None)


def test_the_log_takes_a_terms_mean_over_the_steps_that_have_it(config, monkeypatch):
    import loftup.train.objective.imitation as imitation

    class Teacher(nn.Module):
        def forward(self, features, image, size):
            return torch.nn.functional.interpolate(features, size)

    monkeypatch.setattr(imitation, "load_foreign", lambda spec, channels: Teacher())
    term = {"weight": 1.0, "upsampler": "anyup:w@c", "trust_code": True, "backbones": [1]}
    for name, value in term.items():
        configured(config, **{f"objective__imitation__{name}": value})
    config.objective.segments.weight, config.log_every, config.steps = 1.0, 1, 6
    train(config)
    rows = list(csv.DictReader((Path(config.output) / "log.csv").open()))
    with_it = [row["imitation"] != "" for row in rows]
    assert with_it == [make_plan(config, [8, 16], step).backbone == 1 for step in range(6)]
    assert any(with_it)
    assert not all(with_it)


def test_the_classes_probes_are_for_one_process(config):
    config.objective.classes.weight = 1.0
    with pytest.raises(LoftUpError, match="which 2 processes cannot do together; start one process, or set objective"):
        engine._Run(config, SimpleNamespace(world=2), False)
