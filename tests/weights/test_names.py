"""The weights that come with the package, and what stands in for a backbone without weights of its own."""

import warnings

import pytest
import timm
import torch
from material import universal

from loftup import Backbone, LoftUp, LoftUpError, list_pretrained, load_backbone, wrap
from loftup.weights.catalogue import IN_PACKAGE, PUBLISHED, TINY_BACKBONES
from loftup.weights.names import resolve

STAND_IN = (
    r"no LoftUp weights of its own for this backbone \({}\): using 'any', which takes features of any backbone. "
    "strict=True refuses instead; to train weights for this one, see `loftup train --help`"
)


@pytest.fixture
def bundled(tmp_path, monkeypatch, hub):
    """Random weights as the bundled ``any``, and a Hub that nothing may ask."""
    up = universal()
    up.save_pretrained(tmp_path / "bundled" / "any")
    monkeypatch.setattr("loftup.weights.catalogue.FOLDER", tmp_path / "bundled")
    yield up
    assert not hub.requests


def same(first: LoftUp, second: LoftUp) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["any", "tiny", "tiny_v1"])
def test_names_read_the_package(name, strict, bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # names win over folders
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LoftUp.from_pretrained(name, strict=strict)
    assert same(loaded, bundled)
    assert loaded.config == bundled.config
    assert not loaded.training
    assert LoftUp.from_pretrained(name, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "vit_tiny_patch16_224"],
)
def test_a_backbone_name_without_weights_gets_any_with_a_warning(name, bundled):
    with pytest.warns(UserWarning, match=STAND_IN.format(f"named '{name}'")) as caught:
        loaded = LoftUp.from_pretrained(name)
    assert same(loaded, bundled)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(LoftUpError, match=rf"no published LoftUp weights for this backbone \(named '{name}'\); there"):
        LoftUp.from_pretrained(name, strict=True)


def test_backbone_objects_without_weights_get_any_with_a_warning(bundled):
    own = Backbone(torch.nn.Identity(), lambda image: image[..., ::8, ::8], channels=3, patch_size=8)
    for backbone, found in (
        (timm.create_model("test_vit"), "named 'test_vit.r160_in1k'"),
        (wrap(timm.create_model("test_vit")), "named 'test_vit.r160_in1k'"),
        (load_backbone("tiny", weights=False, layer=0), "a Backbone without a recognised name"),
        (own, "a Backbone without a recognised name"),
    ):
        with pytest.warns(UserWarning, match=STAND_IN.format(found)) as caught:
            loaded = LoftUp.from_pretrained(backbone)
        assert same(loaded, bundled)
        assert [warning.filename for warning in caught] == [__file__]
        with pytest.raises(LoftUpError, match=rf"no published LoftUp weights for this backbone \({found}\)"):
            LoftUp.from_pretrained(backbone, strict=True)


@pytest.mark.parametrize("name", list(TINY_BACKBONES))
def test_the_backbones_in_the_package_go_with_any(name, bundled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (name, load_backbone(name, weights=False)):
            for strict in (False, True):
                assert same(LoftUp.from_pretrained(source, strict=strict), bundled)
    assert resolve(name, strict=True).identity() == resolve("any").identity()  # one name for the same weights


def test_what_is_no_backbone_is_refused(bundled):
    with pytest.raises(
        LoftUpError, match="unknown LoftUp weights 'tinny'; did you mean 'tiny'.*In the package: any \\("
    ):
        LoftUp.from_pretrained("tinny")
    with pytest.raises(LoftUpError, match="unknown LoftUp weights 'ayn'; did you mean 'any'"):
        LoftUp.from_pretrained("ayn")
    with pytest.raises(LoftUpError, match="unknown LoftUp weights 'resnett18'; did you mean .*'resnet18'"):
        LoftUp.from_pretrained("resnett18")
    with pytest.raises(LoftUpError, match="this backbone \\(a Linear without a recognised name\\)"):
        LoftUp.from_pretrained(torch.nn.Linear(2, 2))


def test_a_folder_wins_over_a_backbones_name(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    up = LoftUp(24)
    up.save_pretrained("resnet18")
    assert same(LoftUp.from_pretrained("resnet18"), up)


def test_the_published_ones_stay_the_list():
    assert [checkpoint.name for checkpoint in list_pretrained()] == list(PUBLISHED)
    assert set(IN_PACKAGE) == {"any"}
    assert not {*IN_PACKAGE, *TINY_BACKBONES} & set(PUBLISHED)
