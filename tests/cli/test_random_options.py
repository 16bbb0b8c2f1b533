"""Random options: a command runs, or is refused with exit status 2 and a line that says why; never a traceback."""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import drawn_scene

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("eval", "train")]
from layouts import pairs
from small_run import make_material

from loftup.cli import main
from loftup.eval.catalogue import TASKS

NUMBERS = [
    "", "0", "-1", "1", "2", "7", "nan", "NaN", "inf", "-inf", "1e999", "1.5", "1e-320", "0.5", "true", "null", "x",
    "٣", "²", " 4 ", "1_000", "9" * 5000, "[1,2]", "[1.5,2]", "[]", "{}", '"3"', "[[1]]", "[" * 3000, "=", "a=b",
]  # fmt: skip
USUAL = st.sampled_from(["1", "2", "0.5", "32"])
TEXTS = USUAL | st.sampled_from(NUMBERS) | st.text(st.characters(blacklist_characters="\0/", codec="utf-8"), max_size=8)
NAMES = ["", "any", "tiny", "resnet5", ".", "..", "~", "\udcff", "-", "--", "cpu", "x:1"]
WORDS = st.just("cpu") | st.sampled_from(NAMES) | TEXTS
LAYERS = st.sampled_from(["0", "1", "-1", "3"]) | st.integers(-(10**25), 10**25).map(str)
MODEL = {
    "--layer": st.tuples(LAYERS),
    "--option": st.tuples(st.builds("{}={}".format, st.sampled_from(["layer", "mean", "x", "img_size", ""]), TEXTS)),
    "--mean": st.tuples(TEXTS, TEXTS, TEXTS) | st.just(("0", "0", "0")),
    "--std": st.tuples(TEXTS, TEXTS, TEXTS) | st.just(("1", "1", "2e-9")),
    "--device": st.tuples(WORDS),
    "--views": st.tuples(st.sampled_from(["1", "4"]) | TEXTS),
    "--backbone-weights": st.tuples(WORDS),
}
FEATURES = {
    **MODEL,
    "--weights": st.tuples(WORDS),
    "--size": st.tuples(TEXTS, TEXTS) | st.just(("1", "3")),
    "--input": st.tuples(st.sampled_from(["1", "17", "40"]) | TEXTS),
    "--dtype": st.tuples(st.sampled_from(["bfloat16", "float16", "int8"])),
    "--strict": st.just(()),
    "--overwrite": st.just(()),
}
MATCH = {
    **{name: values for name, values in FEATURES.items() if name != "--overwrite"},
    "--points": st.tuples(TEXTS | st.sampled_from(["3,4", "-1,2", "29,19", "0,"])),
    "--most": st.tuples(TEXTS),
    "--step": st.tuples(TEXTS),
    "--csv": st.tuples(WORDS),
    "--json": st.tuples(WORDS),
}
MASKS = {
    "--scales": st.lists(TEXTS, max_size=2).map(tuple) | st.tuples(st.sampled_from(["1e-9", "1e300"])),
    "--sigma": st.tuples(TEXTS | st.sampled_from(["0.8", "100", "1e300"])),
    "--min-size": st.tuples(TEXTS | st.just("99999")),
    "--side": st.tuples(TEXTS),
    "--sam": st.tuples(st.sampled_from(["", "."])),
    "--points-per-side": st.tuples(TEXTS),
    "--device": st.tuples(WORDS),
    "--overwrite": st.just(()),
}
RANDOM = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def options(table):
    """Some of the options, each with its values."""
    named = st.sampled_from(sorted(table)).flatmap(lambda name: table[name].map(lambda values: (name, *values)))
    return st.lists(named, max_size=2).map(lambda chosen: [word for each in chosen for word in each])


def check(words):
    """Run a command in a folder of its own."""
    out, err = io.StringIO(), io.StringIO()
    words = [*words[:2], *(["-o", "out"] if words[0] != "train" else []), *words[2:]]
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    said = err.getvalue()
    assert status in (0, 1, 2), said
    assert "Traceback" not in said
    if status:
        assert said.splitlines()[-1].startswith("loftup") or status == 1, said
        assert "rror" in said or "ailed" in said or " of 1 " in said, said


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    drawn_scene(20, 30).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camvid")
    pairs(folder, "{split}/{name}.jpg", "{split}/{name}.png", ("train", "val"))
    return f"camvid:{folder}"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@RANDOM
@given(options(FEATURES))
def test_features(photos, chosen):
    check(["features", str(photos), "--backbone", "tiny", "--size", "4", "6", "--input", "32", *chosen])


SEGMENT = {
    **FEATURES,
    "-k": st.tuples(TEXTS | st.sampled_from(["1", "3", "256"])),
    "--method": st.tuples(st.sampled_from(["kmeans", "gaussian", "ward"])),
    "--seed": st.tuples(TEXTS),
    "--fit": st.tuples(TEXTS),
    "--each": st.just(()),
    "--overlay": st.just(()),
}


@settings(RANDOM, max_examples=8)
@given(options(SEGMENT))
def test_segment(photos, chosen):
    check(["segment", str(photos), "--backbone", "tiny", "--size", "4", "6", "-k", "2", "--input", "32", *chosen])


@RANDOM
@given(options(MATCH))
def test_match(photos, chosen):
    picture = str(photos / "a.png")
    small = ["--backbone", "tiny", "--size", "4", "6", "--input", "32", "-o", "out.png"]
    check(["match", picture, picture, *small, *chosen])


@RANDOM
@given(options(MASKS))
def test_masks(photos, chosen):
    check(["masks", str(photos), *chosen])


EVAL = {
    "efficiency": ["size", "output", "rounds", "device"],
    "segmentation": ["size", "output", "seeds", "pictures", "epochs", "batch", "rate", "points", "probes", "boundary"],
}
QUICK = {
    "efficiency": ["--set", "size=[16,16]", "--set", "output=[16,16]", "--set", "rounds=1"],
    "segmentation": ["--set", "size=[16,16]", "--set", "training=samples", "--set", "points=9", "--seeds", "1"],
}
SETTINGS = st.sampled_from([(task, name) for task, names in EVAL.items() for name in names])


@RANDOM
@given(
    SETTINGS, st.sampled_from(["1", "[8,9]", "0.25"]) | TEXTS, options({**MODEL, "--seeds": st.tuples(TEXTS)}), WORDS
)
def test_eval(camvid, setting, value, chosen, label):
    task, name = setting
    data = ["--dataset", camvid] if TASKS[task].data else []
    upsampler = ["--upsampler", f"{label.replace(',', '')}=bilinear"]
    words = ["eval", task, *data, "--backbone", "tiny", *upsampler, *QUICK[task], "--set", f"{name}={value}"]
    check([*words, *chosen])


KEYS = [
    *(f"backbone.{key}" for key in ("layer", "weights", "mean", "views", "options")),
    *(f"model.{key}" for key in ("heads", "pretrained", "start", "lr_size", "architecture")),
    *(f"data.{key}" for key in ("kind", "sizes", "ratios", "scale", "flip", "cache")),
    *(f"objective.{key}.weight" for key in ("mask_bicubic", "self_distillation")),
    *(f"optimizer.{key}" for key in ("rate", "warmup", "betas", "clip")),
    *(f"validation.{key}" for key in ("path", "size", "probe")),
    *("output", "steps", "batch", "window", "precision", "seed", "save_every", "log_every", "hub", "x", "backbones"),
]
ODD = [".nan", "''", "{a: 1}", "{layer: 1}", "[32]", "[1, 1]", "???", "${seed}", "!!python/x"]
VALUES = USUAL | TEXTS | st.sampled_from(ODD)


@RANDOM
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2))
def test_train(material, chosen):
    small = ["steps=1", "batch=1", "window=16", "backbone.name=test_efficientnet", "backbone.layer=2", "output=out"]
    files = [f"backbone.weights={material}/backbone.safetensors", f"data.path=[{material}/data]", "data.kind=labels"]
    quick = ["data.sizes=[32]", "data.ratios=[1.0]", "data.workers=0", "validation.path=[]", "validation.probe=null"]
    check(["train", "quick_cpu", *small, *files, *quick, *(f"{key}={value}" for key, value in chosen.items())])
