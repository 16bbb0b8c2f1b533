"""Reading configs: strict about keys, types and values, with overrides."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loftup import LoftUpError
from loftup.train.config import TrainConfig, check, load_config, ready_configs, schema, to_yaml

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
    expected = {
        "paper_stage1",
        "paper_stage2",
        "quick_cpu",
        "quick_cpu_stage2",
        "quick_smoke",
        "gpu_25min",
        "gpu_25min_stage2",
        "gpu_8min",
        "any",
        "fit",
    }
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
        (
            "",
            ["data.path[0]=3"],
            r"config in the command line: it changes data.path\[0\], but there are 0, .*: data.path=\[...\]",
        ),
        (
            "steps: many\n",
            [],
            r"steps is 'many' in .*run.yaml, expected a valid integer.*; set it as steps=",
        ),
        (
            "",
            ["steps=1.5"],
            r"steps is 1.5 in the command line, expected a valid integer, got a number with a fraction",
        ),
        ("", ["data.sizes=big"], r"data.sizes is 'big' in the command line, expected a list such as \[a, b\]"),
        ("data: photos\n", [], r"'data' in .*run.yaml holds 'photos', expected keys and values such as path"),
        ("- a\n", [], r"run.yaml: it holds \['a'\], expected keys and values such as backbone"),
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
    with pytest.raises(LoftUpError, match=r"no config '.*none.yaml'.*Ready configs: any, fit, gpu_25min"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.start", "zero", "model.start is 'zero', expected 'interpolator' or 'random'; set it as model.start="),
        ("model.position_code", "cosine", "expected 'sine' or 'learnable'"),
        ("model.batch_norm", "none", "expected 'frozen' or 'batch'"),
        ("data.kind", "coco", "expected 'auto', 'sa1b', 'shards', 'labels' or 'images'"),
        ("validation.kind", "coco", "expected 'auto', 'sa1b', 'shards', 'labels' or 'images'"),
        ("precision", "float16", "expected 'float32' or 'bfloat16'"),
        ("optimizer.schedule", "linear", "expected 'cosine' or 'constant'"),
        ("objective.self_distillation.distance", "l1", "expected 'affinity', 'l2' or 'cosine'"),
        ("objective.high_resolution.distance", "l1", "expected 'affinity', 'l2' or 'cosine'"),
        ("steps", 0, "steps is 0, expected at least 1"),
        ("validation.pictures", -1, "validation.pictures is -1, expected at least 0"),
        ("steps", 10**30, "steps is 10+, expected below 2147483648"),
        ("seed", -1, "seed is -1, expected at least 0"),
        ("seed", 2**32, "seed is 4294967296, expected below 4294967296"),
        ("output", "", "output is '', expected a text that is not empty"),
        ("model.pretrained", "", "model.pretrained is '', expected a text that is not empty"),
        ("data.path", [""], r"data.path\[0\] is '', expected a text that is not empty"),
        (
            "backbone.options",
            {"layer": 3},
            "backbone.options holds 'layer', no option of timm's but.*; set backbone.layer",
        ),
        (
            "backbone.options",
            {"views": 4},
            "backbone.options holds 'views', no option of timm's but.*; set backbone.views",
        ),
        ("backbone.views", 3, "backbone.views is 3, expected 1, 4, 9 or 16"),
        ("data.workers", -1, "data.workers is -1, expected at least 0"),
        ("objective.mask_bicubic.weight", -0.5, "weight is -0.5, expected at least 0"),
        ("objective.mask_bicubic.weight", float("nan"), "weight is nan, expected a finite number"),
        ("data.flip", 1.5, "data.flip is 1.5, expected at most 1"),
        ("optimizer.rate", 0.0, "optimizer.rate is 0.0, expected above 0"),
        ("optimizer.clip", float("inf"), "optimizer.clip is inf, expected a finite number"),
        ("window", 0, "window is 0, expected at least 1"),
        ("objective.self_distillation.border", 0.5, "border is 0.5, expected below 0.5"),
        ("objective.multi_view.zoom", 0.5, "zoom is 0.5, expected at least 1"),
        ("optimizer.betas", [0.9], r"optimizer.betas is \[0.9\], expected a list of at least 2 items"),
        ("data.sizes", [], r"data.sizes is \[\], expected a list of at least 1 item, not 0"),
        ("objective.high_resolution.factors", [0], r"factors\[0\] is 0, expected at least 1"),
        ("data.ratios", [1.0, 0.0], r"data.ratios\[1\] is 0.0, expected above 0"),
        (
            "data.scale",
            [0.9, 0.5],
            r"data.scale is \[0.9, 0.5\], expected two numbers \[least, greatest\]",
        ),
        (
            "objective.self_distillation.zoom",
            [0.5, 2.0],
            r"zoom\[0\] is 0.5, expected at least 1",
        ),
        ("backbone.std", [1.0], r"backbone.std is \[1.0\], expected a list of at least 3 items, not 1"),
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
    """Each field has a comment on its line or above, unless its class says it all or it is one of several alike."""
    alike = {"name", "std", "distance", "kind", "weight", "betas"}
    lines = inspect.getsource(schema).splitlines()
    for above, line in itertools.pairwise(lines):
        if match := re.match(r"    (\w+): .* = ", line):
            section = "field(default_factory=" in line and "Config)" in line
            commented = "#" in line or above.startswith("    #")
            assert commented or section or match[1] in alike, line


@pytest.mark.parametrize(
    ("key", "value"), [("steps", True), ("optimizer.rate", False), ("batch", "many"), ("hub", 1.5j)]
)
def test_values_of_another_kind(key, value):
    config = valid()
    *sections, name = key.split(".")
    setattr(getattr(config, sections[0]) if sections else config, name, value)
    with pytest.raises(LoftUpError, match=f"{key} is {value!r}, expected "):
        check(config)


def test_checking_leaves_the_config_alone():
    config = valid()
    config.steps, config.data.path = 1e3, "photos"
    checked = check(config)
    assert (checked.steps, checked.data.path) == (1000, ["photos"])
    assert type(checked.steps) is int
    assert (config.steps, config.data.path) == (1e3, "photos")


def test_an_entry_of_a_list_and_an_interpolation(write):
    file = write(SMALLEST + "steps: 20\nsave_every: ${steps}\n")
    config = load_config(file, ["data.sizes=[32,64]", "data.sizes[1]=96", "steps=30", "output=2024"])
    assert (config.data.sizes, config.save_every, config.output) == ([32, 96], 30, "2024")


def test_missing_omegaconf_is_said(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(LoftUpError, match=r'need omegaconf: pip install "loftup\[train\]"'):
        load_config(write(SMALLEST))


def test_pydantic_is_for_configs_alone():
    """Masks, and what the evaluation takes from training, do without."""
    script = """
import subprocess
import sys
sys.modules["pydantic"] = None
from loftup import LoftUpError
import loftup.train.baselines, loftup.train.masks.command, loftup.train.objective.multi_view, loftup.train.run.probe
try:
    import loftup.train.config
except LoftUpError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == 'training configs need pydantic: pip install "loftup[train]"\n'


def test_another_backbone_forgets_what_the_file_says_of_its_own():
    assert load_config("quick_cpu").backbone.layer == 3
    assert load_config("quick_cpu", ["backbone.name=mobilenetv2_100"]).backbone.layer == 3
    assert load_config("quick_cpu", ["backbone.name=tiny"]).backbone.layer is None
    assert load_config("quick_cpu", ["backbone.name=tiny", "backbone.layer=1"]).backbone.layer == 1
    first, second = load_config("any", ["backbones[0].name=tiny"]).backbones[:2]
    assert (first.layer, first.share, second.layer) == (None, 5, 8)


def test_the_smallest_config_runs_by_the_package_alone():
    config = load_config("quick_smoke")
    (folder,) = config.data.path
    assert (Path(folder) / "photo.jpg").is_file()
    assert config.validation.path == [folder]
    assert config.backbone.name == "tiny"
