"""Training the upsamplers that LoftUp is compared with."""

import pytest
import torch
from small_run import make_material, small_config

from loftup import LoftUpError
from loftup.train.baselines import ARCHITECTURES, build
from loftup.train.config import load_config
from loftup.train.run.engine import train

NAMES = list(ARCHITECTURES)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_trained_stopped_and_resumed_as_loftup_is(name, material, tmp_path, capfd):
    config = small_config(material, tmp_path / "run")
    config.model.architecture, config.steps = name, 2
    folder = train(config)
    assert f"create('{name}:{folder}', backbone)" in capfd.readouterr().err
    card = (folder / "README.md").read_text()
    assert f'up = create("{name}:./run", backbone)' in card
    assert "| start |" not in card
    trained = ARCHITECTURES[name].from_pretrained(folder)
    first = build(trained.config)
    assert any(
        not torch.equal(a, b) for a, b in zip(trained.parameters(), first.parameters(), strict=True) if a.requires_grad
    )
    again = load_config(folder / "train.yaml")
    again.steps = 3
    resumed = ARCHITECTURES[name].from_pretrained(train(again, resume=True))
    assert resumed.config == trained.config
    config.output, config.steps = str(tmp_path / "unbroken"), 3
    unbroken = ARCHITECTURES[name].from_pretrained(train(config))
    features, image = torch.randn(1, trained.config.channels, 3, 3), torch.rand(1, 3, 24, 24)
    assert torch.equal(resumed(features, image), unbroken(features, image))
    assert not torch.equal(resumed(features, image), trained(features, image))


def test_other_objectives_train_them_too(material, tmp_path):
    config = small_config(material, tmp_path / "run")
    config.model.architecture, config.steps = "lift", 2
    config.objective.high_resolution.weight = 1.0
    config.objective.multi_view.weight = config.objective.self_distillation.weight = 1.0
    config.window = None
    config.data.ratios = [1.0]
    assert ARCHITECTURES["lift"].from_pretrained(train(config)).config.channels > 0


def test_settings_that_are_loftups_alone_are_refused(material, tmp_path):
    config = small_config(material, tmp_path / "run")
    config.model.architecture, config.model.pretrained = "lift", "somewhere"
    with pytest.raises(LoftUpError, match=r"model.pretrained=somewhere with model.architecture=lift"):
        train(config)
    config.model.pretrained, config.compile = None, True
    with pytest.raises(LoftUpError, match="compile=true knows LoftUp alone, not lift"):
        train(config)
    config.model.architecture, config.compile = "unet", False
    with pytest.raises(LoftUpError, match="model.architecture is 'unet', expected 'loftup', 'any', 'featup_jbu'"):
        train(config)
