"""Training on grids of shifted views: the geometry, the cache, the card, and what a run goes on with."""

import dataclasses

import pytest
import torch
from small_run import make_material, small_config, steps_of

from loftup import LoftUp, LoftUpError, load_backbone
from loftup.train.config import load_config
from loftup.train.data.loader import backbone_list, loader
from loftup.train.objective.objective import Objective
from loftup.train.run.build import build_backbones, build_upsampler
from loftup.train.run.checkpoint import latest_checkpoint
from loftup.train.run.engine import train


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material, tmp_path):
    """Every term whose cells count, on four views of patches of 8."""
    made = small_config(material, tmp_path / "run")
    made.backbone.views, made.steps, made.save_every = 4, 2, 1
    made.objective.high_resolution.weight, made.objective.high_resolution.factors = 1.0, [2]
    made.objective.self_distillation.weight = 1.0
    return made


def test_the_student_gets_the_finer_grid_of_what_it_sees(config, monkeypatch):
    (backbone,) = build_backbones(config)
    assert (backbone.views, backbone.patch_size, backbone.stride) == (4, 8, 4)
    up = build_upsampler(config, backbone)
    term, grids = Objective(config, up, backbone), []
    normalise = Objective._normalise
    monkeypatch.setattr(Objective, "_normalise", lambda self, x: grids.append(x) or normalise(self, x))
    batch = next(iter(loader(config, backbone)))
    assert batch.large.shape == (2, 3, 64, 64)
    assert batch.region == (0, 0, 16, 16)
    loss, terms = term(batch)
    assert loss.isfinite()
    assert set(terms) == {"mask_bicubic", "bicubic", "high_resolution", "self_distillation"}
    one = load_backbone(config.backbone.name, weights=config.backbone.weights, layer=2)
    low, high = (one.with_views(4)(one.normalise(image)) for image in (batch.image, batch.large))
    assert [tuple(each.shape[2:]) for each in (low, high)] == [(8, 8), (16, 16)]
    torch.testing.assert_close(grids[0], low)
    torch.testing.assert_close(grids[1], high)


def test_multi_view_downsamples_to_the_finer_cells(config):
    config.objective.multi_view.weight, config.window = 1.0, None
    (backbone,) = build_backbones(config)
    term = Objective(config, build_upsampler(config, backbone), backbone)
    assert term.downsampler.cell == 4
    assert term(next(iter(loader(config, backbone))))[0].isfinite()


def test_a_backbone_of_other_views_than_the_configs_is_refused(config):
    (backbone,) = build_backbones(config)
    with pytest.raises(
        ValueError, match=r"got a backbone with views=1, backbone.views of the config is 4; give .*s\(4\)"
    ):
        backbone_list(config, backbone.with_views(1))


def test_a_run_with_a_cache_ends_in_weights_and_a_card_and_resumes_with_these_views_alone(config, tmp_path, capsys):
    config.data.views, config.data.cache = 1, str(tmp_path / "cache")
    folder = train(config)
    assert "8 channels, patch 8, 4 shifted views" in capsys.readouterr().err.replace("32 channels", "8 channels")
    assert LoftUp.from_pretrained(folder).config.channels == 32
    assert "views=4)" in (folder / "README.md").read_text()
    assert load_config(folder / "train.yaml") == config
    config.steps = 3
    with pytest.raises(LoftUpError, match=r"made with another config: backbone.views: 4, now 1\. Resume with"):
        train(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, views=1)), resume=True)
    train(config, resume=True)
    assert steps_of(folder / "log.csv") == [1, 2, 3]


def test_a_run_from_before_there_were_views_goes_on_with_one(config):
    config.backbone.views = 1
    folder = train(config)
    file = latest_checkpoint(folder / "checkpoints")
    state = torch.load(file, weights_only=False)
    del state["config"]["backbone"]["views"]
    torch.save(state, file)
    config.steps = 3
    with pytest.raises(LoftUpError, match=r"made with another config: backbone.views: 1, now 4\."):
        train(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, views=4)), resume=True)
    train(config, resume=True)
    assert steps_of(folder / "log.csv") == [1, 2, 3]
