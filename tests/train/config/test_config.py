"""Reading configs: strict about keys, types and values, with overrides."""

import dataclasses
import sys

import pytest

from loftup import LoftUpError
from loftup.train.config import TrainConfig, load_config, ready_configs, to_yaml
from loftup.train.config.check import check

SMALLEST = "data: {path: [photos]}\nobjective: {mask_bicubic: {weight: 1}}\n"


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return _write


def valid():
    config = TrainConfig()
    config.data.path = ["photos"]
    config.objective.mask_bicubic.weight = 1.0
    return config


def test_a_file_and_overrides_on_top_of_the_defaults(write):
    file = write(SMALLEST + "optimizer: {rate: 1e-3, betas: [9e-1, 0.95]}\nbackbone: {options: {output_stride: 16}}\n")
    expected = valid()
    expected.optimizer.rate, expected.optimizer.betas = 0.001, [0.9, 0.95]
    expected.backbone.options = {"output_stride": 16}
    assert load_config(file) == expected
    expected.optimizer.rate, expected.data.path, expected.optimizer.clip = 5e-4, ["a b", "c=d"], None
    expected.output, expected.compile, expected.backbone.options = (
        "a=b",
        True,
        {"output_stride": 16, "pad_type": "same"},
    )
    overrides = ["optimizer.rate=5e-4", "data.path=[a b, 'c=d']", "optimizer.clip=null", "output=a=b", "compile=true"]
    assert load_config(str(file), [*overrides, "backbone.options.pad_type=same"]) == expected


def test_written_and_read_back(write):
    config = valid()
    config.optimizer.rate, config.data.cache, config.backbone.mean = 1e-5, None, [0.1, 0.2, 0.3]
    config.backbone.options = {"a": [1, {"b": True}]}
    assert load_config(write(to_yaml(config))) == config


@pytest.mark.parametrize("name", ready_configs())
def test_ready_configs_are_whole_and_valid(name, tmp_path):
    config = load_config(name)
    assert config.data.path
    assert config.output == f"runs/{name}"
    path = tmp_path / "copy.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_ready_configs_are_those_promised():
    expected = {"paper_stage1", "paper_stage2", "quick_cpu", "quick_cpu_stage2", "gpu_25min", "gpu_25min_stage2", "any"}
    assert set(ready_configs()) == expected
    first, second = load_config("paper_stage1"), load_config("paper_stage2")
    for config in (first, second):
        assert (config.backbone.name, config.batch, config.steps) == ("dinov2_vits14", 8, 125_000)
        assert (config.window, config.model.batch_norm, config.optimizer.schedule) == (None, "batch", "constant")
    assert (first.optimizer.rate, second.optimizer.rate) == (1e-4, 1e-3)
    assert (first.model.start, first.model.pretrained, second.model.pretrained) == ("random", None, "runs/paper_stage1")
    objective = second.objective
    assert (objective.self_distillation.weight, objective.self_distillation.alpha) == (20, 0.5)
    assert (objective.total_variation.weight, objective.multi_view.weight > 0) == (0.05, True)
    assert second.data.sizes == [224, 336, 448, 518]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "rate: 1\n",
            [],
            r"unknown key 'rate' in .*run.yaml; did you mean 'optimizer.rate' or .*Keys of the top level: backb",
        ),
        (
            "optimizer: {raet: 1}\n",
            [],
            r"unknown key 'optimizer.raet' in .*did you mean 'optimizer.rate'.*Keys of 'opti",
        ),
        (
            "optimizer: {zzz: 1}\n",
            [],
            r"unknown key 'optimizer.zzz' in .*run.yaml; Keys of 'optimizer': rate, schedule",
        ),
        ("", ["setps=3"], r"unknown key 'setps' in the command line; did you mean 'steps'"),
        ("", ["data.path[0]=3"], "cannot use the config in the command line: Cannot merge incompatible"),
        (
            "steps: many\n",
            [],
            r"run.yaml: Value 'many' of type 'str' could not be converted to Integer at the key steps",
        ),
        ("", ["steps=1.5"], r"the command line: Value '1.5' of type 'float'.*at the key steps"),
        ("", ["data.sizes=big"], r"at the key data.sizes; a list is written \[a, b\]"),
        ("data: photos\n", [], r"'data' in .*run.yaml holds 'photos', expected keys and values such as path"),
        ("- a\n", [], r"run.yaml holds \['a'\], expected keys and values such as backbone"),
        ("steps: [\n", [], r"cannot use the config in .*run.yaml: .*line 2, column 1"),
        ("steps: 1\nsteps: 2\n", [], "found duplicate key steps"),
        ("output: ${nowhere}\n", [], "'nowhere' not found at the key output"),
        ("", ["steps"], r"override 'steps', expected key=value, such as optimizer.rate=1e-3"),
        ("", ["=3"], r"override '=3', expected key=value"),
    ],
)
def test_what_cannot_be_read(write, text, overrides, message):
    with pytest.raises(LoftUpError, match=message):
        load_config(write(text), overrides)


def test_values_of_another_type_that_mean_the_same(write):
    """A single path is a list of one, a whole number may be written as a float."""
    given = ["data.path=photos", "validation.path=val", "steps=1e3", "window=32.0", "data.sizes=[64.0]", "seed=7"]
    config = load_config(write(SMALLEST), ["model.batch_norm=frozen", *given])
    assert (config.data.path, config.validation.path) == (["photos"], ["val"])
    assert (config.steps, config.window, config.data.sizes, config.seed) == (1000, 32, [64], 7)


def test_no_such_file(tmp_path):
    with pytest.raises(LoftUpError, match=r"no config 'quick_cpo': there is no such file; did you mean 'quick_cpu'"):
        load_config("quick_cpo")
    with pytest.raises(LoftUpError, match=r"no config '.*none.yaml'.*Ready configs: any, gpu_25min"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.start", "zero", "model.start is 'zero', expected one of interpolator, random; set it as model.start="),
        ("model.position_code", "cosine", "expected one of sine, learnable"),
        ("model.batch_norm", "none", "expected one of frozen, batch"),
        ("data.kind", "coco", "expected one of auto, sa1b, shards, labels, images"),
        ("validation.kind", "coco", "expected one of auto, sa1b, shards, labels, images"),
        ("precision", "float16", "expected one of float32, bfloat16"),
        ("optimizer.schedule", "linear", "expected one of cosine, constant"),
        ("objective.self_distillation.distance", "l1", "expected one of affinity, l2, cosine"),
        ("objective.high_resolution.distance", "l1", "expected one of affinity, l2, cosine"),
        ("steps", 0, "steps is 0, expected at least 1"),
        ("validation.pictures", -1, "validation.pictures is -1, expected at least 0"),
        ("data.workers", -1, "data.workers is -1, expected at least 0"),
        ("objective.mask_bicubic.weight", -0.5, "weight is -0.5, expected at least 0"),
        ("objective.mask_bicubic.weight", float("nan"), "weight is nan, expected at least 0"),
        ("data.flip", 1.5, r"data.flip is 1.5, expected a number in \[0, 1\]"),
        ("optimizer.rate", 0.0, "optimizer.rate is 0.0, expected a finite number above 0"),
        ("optimizer.clip", float("inf"), "optimizer.clip is inf, expected a finite number above 0"),
        ("window", 0, "window is 0, expected at least 1"),
        ("objective.self_distillation.border", 0.5, r"border is 0.5, expected a number in \[0, 0.5\)"),
        ("objective.multi_view.zoom", 0.5, "zoom is 0.5, expected at least 1"),
        ("optimizer.betas", [0.9], r"optimizer.betas is \[0.9\], expected two numbers in \[0, 1\)"),
        ("data.sizes", [], r"data.sizes is \[\], expected one or more whole numbers of at least 1"),
        ("objective.high_resolution.factors", [0], r"factors is \[0\], expected one or more whole numbers"),
        ("data.ratios", [1.0, 0.0], r"data.ratios is \[1.0, 0.0\], expected one or more numbers above 0"),
        (
            "data.scale",
            [0.9, 0.5],
            r"data.scale is \[0.9, 0.5\], expected two numbers \[least, greatest\] above 0 between",
        ),
        (
            "objective.self_distillation.zoom",
            [0.5, 2.0],
            r"expected two numbers \[least, greatest\] above 0 of at least 1",
        ),
        ("backbone.std", [1.0], r"backbone.std is \[1.0\], expected three numbers"),
        ("data.path", [], "data.path is empty, expected folders or shards of pictures"),
        ("data.cache", "cache", "data.cache needs fixed crops.*set data.views"),
        (
            "objective.mask_bicubic.weight",
            0.0,
            "all weights of the objective are 0.*the terms are mask_bicubic, self_dist",
        ),
        ("window", 48, "model.batch_norm=batch with window=48.*Set model.batch_norm=frozen, or window=null"),
        ("validation.probe", "camvid", "validation.probe_classes is 0, expected the number of classes of the probe"),
    ],
)
def test_values_out_of_range(key, value, message):
    config = valid()
    check(config)
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
    with pytest.raises(LoftUpError, match=message):
        check(config)


def test_the_interpolator_needs_the_sine_code():
    config = valid()
    config.model.start, config.model.position_code = "interpolator", "learnable"
    with pytest.raises(LoftUpError, match=r"model.start=interpolator needs model.position_code=sine"):
        check(config)
    config.model.pretrained = "weights"
    check(config)


def test_reading_checks_values(write):
    with pytest.raises(LoftUpError, match="steps is 0"):
        load_config(write(SMALLEST), ["steps=0"])


def test_every_number_of_the_config_is_documented():
    """Each field of a section stands in its docstring, or is the single one of a term."""
    for kind in (TrainConfig, *(entry.type for entry in dataclasses.fields(TrainConfig))):
        if not dataclasses.is_dataclass(kind) or "Args:" not in (kind.__doc__ or ""):
            continue
        for entry in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(entry.type):
                assert f"        {entry.name}: " in kind.__doc__, (kind, entry.name)


def test_missing_omegaconf_is_said(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(LoftUpError, match=r'need omegaconf: pip install "loftup\[train\]"'):
        load_config(write(SMALLEST))
