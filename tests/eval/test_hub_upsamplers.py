"""Other projects' upsamplers through torch.hub: how stand-ins of the same signatures are called, and failures."""

import pytest
import torch
from small import mean_colours
from torch import nn

from loftup import LoftUpError
from loftup.eval.upsamplers import create as create_any
from loftup.eval.upsamplers.hub import COMMITS

IMAGE = torch.rand(1, 3, 32, 48)
FEATURES = torch.randn(1, 3, 2, 3)


def create(spec, backbone):
    return create_any(spec, backbone, trust_remote_code=True)


class Recorder(nn.Module):
    """Stands for a published network; gives a map of a fixed size and keeps what it was called with."""

    def __init__(self, size):
        super().__init__()
        self.size, self.calls = size, []

    def forward(self, *arguments, **options):
        self.calls.append((arguments, options))
        return torch.ones(1, 3, *self.size)

    def enable_iterative(self, iterations):
        self.iterations = iterations


@pytest.fixture
def hub(monkeypatch):
    """Replaces torch.hub.load; returns what it gives and what it was asked for."""
    state = {"gives": None, "asked": []}

    def load(repository, entry, *, skip_validation, **options):
        repository, commit = repository.split(":")
        assert commit == COMMITS[repository]
        assert len(commit) == 40
        assert skip_validation
        state["asked"].append((repository, entry, options))
        if isinstance(state["gives"], Exception):
            raise state["gives"]
        return state["gives"]

    monkeypatch.setattr(torch.hub, "load", load)
    return state


def normalised(image):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize(
    ("spec", "repository", "entry"),
    [
        ("anyup", "wimmerth/anyup", "anyup"),
        ("anyup_multi_backbone", "wimmerth/anyup", "anyup_multi_backbone"),
    ],
)
def test_anyup_takes_the_image_first_and_names_the_size(hub, spec, repository, entry):
    network = hub["gives"] = Recorder((20, 30))
    up = create(spec, mean_colours())
    assert hub["asked"] == [(repository, entry, {"trust_repo": True, "pretrained": True})]
    assert up(FEATURES, IMAGE, (20, 30)).shape == (1, 3, 20, 30)
    ((image, features), options) = network.calls[0]
    assert torch.allclose(image, normalised(IMAGE))
    assert features is FEATURES
    assert options == {"output_size": (20, 30)}


def test_naf_takes_the_size_third(hub):
    network = hub["gives"] = Recorder((20, 30))
    create("naf", mean_colours())(FEATURES, IMAGE, (20, 30))
    assert hub["asked"][0][:2] == ("valeoai/NAF", "naf")
    (image, features, size), options = network.calls[0]
    assert torch.allclose(image, normalised(IMAGE))
    assert features is FEATURES
    assert (size, options) == ((20, 30), {})


def test_uplift_comes_without_its_backbone_and_doubles_four_times(hub):
    network = hub["gives"] = Recorder((32, 48))
    up = create("uplift:uplift_dinov2_s14", mean_colours())
    assert hub["asked"][0][1:] == (
        "uplift_dinov2_s14",
        {"trust_repo": True, "pretrained": True, "include_extractor": False},
    )
    assert network.iterations == 4
    assert up(FEATURES, IMAGE, (20, 30)).shape == (1, 3, 20, 30)
    (_, features, size), _ = network.calls[0]
    assert features is FEATURES
    assert size == (20, 30)


def test_featups_own_norm_and_stack_are_used_without_its_backbone(hub):
    whole = hub["gives"] = nn.Module()
    whole.model = nn.Sequential(nn.Identity(), nn.Threshold(0, 0))
    whole.upsampler = Recorder((32, 48))
    up = create("featup:dinov2", mean_colours())
    assert hub["asked"][0][:2] == ("mhamilton723/FeatUp", "dinov2")
    assert up(FEATURES, IMAGE, (20, 30)).shape == (1, 3, 20, 30)
    (features, image), _ = whole.upsampler.calls[0]
    assert torch.equal(features, FEATURES.clamp(min=0))
    assert torch.allclose(image, normalised(IMAGE))


def test_the_published_loftup_gets_the_image_at_output_size(hub):
    network = hub["gives"] = Recorder((20, 30))
    create("loftup_published:loftup_dinov2s", mean_colours())(FEATURES, IMAGE, (20, 30))
    assert hub["asked"][0][:2] == ("andrehuang/loftup", "loftup_dinov2s")
    (features, image), _ = network.calls[0]
    assert features is FEATURES
    assert image.shape == (1, 3, 20, 30)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("no route"), "cannot load naf of valeoai/NAF: no route. torch.hub needs a network once"),
        (RuntimeError("Missing dependencies: natten"), "needs a package that is missing: .*install NATTEN"),
        (ModuleNotFoundError("No module named 'natten'"), "needs a package that is missing: .*install NATTEN"),
        (ImportError("No module named 'plotly'"), "needs a package that is missing: .*plotly'; install it"),
    ],
)
def test_what_is_missing_is_named(hub, error, expected):
    hub["gives"] = error
    with pytest.raises(LoftUpError, match=expected):
        create("naf", mean_colours())


def test_arguments(hub):
    with pytest.raises(LoftUpError, match="'naf' takes no argument, got naf:x; write naf"):
        create("naf:x", mean_colours())
    with pytest.raises(LoftUpError, match="needs the name of an entry point of mwalmer-umd/UPLiFT; write for example"):
        create("uplift", mean_colours())
    assert not hub["asked"]


@pytest.mark.parametrize(
    "spec", ["anyup", "anyup_multi_backbone", "naf", "featup:dinov2", "uplift", "loftup_published"]
)
def test_code_of_others_is_run_only_where_it_is_asked_for(hub, spec):
    name = spec.partition(":")[0]
    match = rf"the upsampler '{name}' runs code of github.com/\S+/\S+ at [0-9a-f]{{10}}, .* give --trust-remote-code"
    with pytest.raises(LoftUpError, match=match):
        create_any(spec, mean_colours())
    assert not hub["asked"]
