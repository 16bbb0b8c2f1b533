"""``loftup fit``: end to end on drawn pictures, its errors by other means, and that nothing gets worse."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from loftup import LoftUp, LoftUpError
from loftup.cli import main
from loftup.networks.config import UniversalConfig
from loftup.train.config import load_config
from loftup.train.data.loader import open_parts
from loftup.train.fit import fit as fitting
from loftup.train.fit.criteria import CRITERIA, HeldOut, gains
from loftup.train.fit.fit import FitSettings, choose
from loftup.train.objective.segments import membership_loss, read_membership
from loftup.train.run.build import build_backbones

SIZE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(20):
        blocks = np.kron(random.integers(0, 255, (3, 4, 3)), np.ones((24, 24, 1)))
        noise = random.integers(-20, 20, blocks.shape)
        Image.fromarray((blocks + noise).clip(0, 255).astype(np.uint8)).save(folder / f"p{index:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fitting, "SIDE", SIZE)
    monkeypatch.setattr(fitting, "CELLS", 4)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def call(photos, folder, *words):
    return main(["fit", str(photos), "-o", str(folder), "--backbone", "tiny", "--device", "cpu", *words])


def held_out_of(photos, folder):
    config = fitting._configured(FitSettings(folder), {"name": "tiny"}, [str(photos)], folder)
    (backbone,) = build_backbones(config)
    fitting._fit_sizes(config, backbone)
    return config, backbone, HeldOut(config, backbone)


def same(first, second):
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


class TestTheCommand:
    def test_it_fits_refuses_to_begin_again_and_goes_on(self, photos, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "mine"
        monkeypatch.setattr(fitting, "_pace", lambda config, backbone, start, budget: 0.5)
        monkeypatch.setattr(fitting, "_steps_in", lambda seconds, pace: 3)
        assert call(photos, folder, "--minutes", "1", "--set", "batch=1") == 0
        said = capsys.readouterr().err
        assert all(caption in said for caption in CRITERIA.values())
        assert "gained: the weights after step " in said or "no gain: these are the weights of any" in said
        up = LoftUp.from_pretrained(folder)
        assert isinstance(up.config, UniversalConfig)
        card = (folder / "README.md").read_text()
        assert 'from_pretrained("./mine")' in card
        assert all(half in card for half in ("| choosing |", "| reporting |", "4 to choose by and 4 to report by"))
        with Image.open(folder / "comparison.png") as picture:
            assert picture.width > picture.height / 4
        last = load_file(folder / "run" / "model.safetensors")

        assert call(photos, folder, "--minutes", "1") == 2
        assert "holds a fit already" in (said := capsys.readouterr().err)
        assert "--resume, or write to another folder: -o DIR" in said

        # As if it had been killed after the first of the steps, whose number is kept.
        (folder / "run" / "checkpoints" / "step_000003.pt").unlink()
        (folder / "run" / "checkpoints" / "step_000002.pt").unlink()
        (folder / "model.safetensors").unlink()
        monkeypatch.setattr(fitting, "_pace", None)
        assert call(photos, folder, "--minutes", "1", "--set", "batch=1", "--resume") == 0
        assert "going on at step 1 of 3" in capsys.readouterr().err
        assert same(load_file(folder / "run" / "model.safetensors"), last)
        assert (folder / "model.safetensors").exists()

    def test_a_training_that_makes_it_worse_leaves_any_as_it_was(self, photos, tmp_path, monkeypatch, capsys):
        def spoil(folder, device):
            worse = LoftUp.from_pretrained("any")
            with torch.no_grad():
                for parameter in worse.parameters():
                    parameter.add_(torch.randn_like(parameter))
            return {"step_000001": worse}

        monkeypatch.setattr(fitting, "train", lambda config, resume: None)
        monkeypatch.setattr(fitting, "_candidates", spoil)
        assert call(photos, tmp_path / "mine", "--steps", "1") == 0
        assert "no gain: these are the weights of any" in capsys.readouterr().err
        made = LoftUp.from_pretrained(tmp_path / "mine").state_dict()
        assert same(made, LoftUp.from_pretrained("any").state_dict())
        assert "**No gain: these are the weights of `any`.**" in (tmp_path / "mine" / "README.md").read_text()

    def test_what_cannot_be_fitted_is_refused(self, photos, tmp_path, monkeypatch, capsys):
        few, theirs = tmp_path / "few", tmp_path / "theirs"
        few.mkdir()
        theirs.mkdir()
        shutil.copy(photos / "p00.png", few)
        (theirs / "README.md").write_text("my notes")
        for words, message in (
            ([few, tmp_path / "a"], "1 pictures, expected at least 20"),
            ([tmp_path / "none", tmp_path / "a"], "which is not there, expected a folder"),
            ([photos, theirs], "README.md exists and was not made by loftup"),
            ([photos, tmp_path / "a", "--set", "output=b"], "--set output: the command's own options say it"),
            ([photos, tmp_path / "a", "--set", "setps=1"], "unknown key 'setps'"),
            ([photos, tmp_path / "a", "--views", "16"], "shifted.views=16 is no finer"),
            ([photos, tmp_path / "a", "--device", "meta"], "--device meta: a training takes cpu or cuda"),
        ):
            assert call(*words) == 2
            assert message in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert call(photos, tmp_path / "a") == 2
        assert "a fit is one process, got 2" in capsys.readouterr().err
        assert (theirs / "README.md").read_text() == "my notes"
        assert not (tmp_path / "a").exists()


class TestTheNumberOfSteps:
    def test_it_is_what_the_time_allows(self):
        assert fitting._steps_in(60.0, 0.5) == 120
        assert fitting._steps_in(-5.0, 0.5) == 20

    def test_the_pace_is_measured(self, photos, tmp_path):
        config, backbone, _ = held_out_of(photos, tmp_path)
        config.batch = 1
        start = LoftUp.from_pretrained("any")
        before = {name: value.clone() for name, value in start.state_dict().items()}
        assert fitting._pace(config, backbone, start, 0.0) > 0
        assert same(start.state_dict(), before)


TABLE = {
    "any": [(1.0, 1.0), (1.0, 1.0)],
    "lopsided": [(0.1, 1.01), (0.1, 0.9)],
    "good": [(0.9, 0.9), (0.9, 0.9)],
    "best": [(0.7, 0.9), (0.8, 0.98)],
    "slight": [(0.6, 0.995), (0.6, 0.995)],
    "lucky": [(0.5, 0.5), (0.5, 1.1)],
    "broken": [(float("nan"), 0.1), (0.1, 0.1)],
}


class TestChoosing:
    """Upsamplers are strings here, whose errors on both halves a table holds."""

    @dataclasses.dataclass
    class Pictures:
        choosing: int = 0
        reporting: int = 1

        def errors(self, up, half):
            return dict(zip(CRITERIA, TABLE[up][half], strict=True))

    @pytest.mark.parametrize(
        ("names", "expected", "refused"),
        [
            (["good", "best", "lopsided"], "best", ""),
            (["lopsided", "broken", "slight"], "any", ""),
            (["good", "lucky"], "any", "lucky"),
            ([], "any", ""),
        ],
    )
    def test_it_must_gain_in_both(self, names, expected, refused):
        pictures = self.Pictures()
        errors = {half: {"any": pictures.errors("any", index)} for index, half in enumerate(("choosing", "reporting"))}
        outcome = choose("any", {name: name for name in names}, pictures, errors)
        assert (outcome.name, outcome.up, outcome.refused) == (expected, expected, refused)
        assert outcome.gained == (expected != "any")
        assert outcome.errors["reporting"]["fitted"] == pictures.errors(expected, 1)

    def test_gains(self):
        assert gains({"views": 0.5, "masks": 1.5}, {"views": 1.0, "masks": 1.0}) == {"views": 0.5, "masks": -0.5}


class TestHeldOutPictures:
    def test_errors_are_those_of_plain_computations(self, photos, tmp_path):
        _, backbone, held_out = held_out_of(photos, tmp_path)
        up = LoftUp.from_pretrained("any")
        views, masks = [], []
        for example in held_out.choosing:
            image = example.case.image
            features, finer = backbone(backbone.normalise(image)), backbone.with_views(9)(backbone.normalise(image))
            deviation, mean = torch.std_mean(features, (2, 3), correction=0, keepdim=True)
            deviation = deviation.maximum(0.1 * deviation.mean(1, keepdim=True))
            low, target = (features - mean) / deviation, (finer - mean) / deviation
            dense = up(low, image, size=SIZE // 2)
            views.append((F.adaptive_avg_pool2d(dense, target.shape[2:]) - target).square().mean())
            guess = read_membership(low[0], example.masks, 0.3)
            read = F.interpolate(guess[None], (SIZE // 2,) * 2, mode="bilinear")[0]
            masks.append(membership_loss(read, example.masks, area=0.7, edges=2.0, overlap=0.5))
        found = held_out.errors(up, held_out.choosing)
        assert found["views"] == pytest.approx(float(torch.stack(views).mean()), rel=2e-3)
        bilinear = held_out.bilinear(held_out.choosing)
        assert bilinear["masks"] == pytest.approx(float(torch.stack(masks).mean()), rel=1e-4)
        assert found["masks"] != bilinear["masks"]

    def test_they_are_in_neither_the_training_nor_twice(self, photos):
        config = load_config("fit", [f"data.path=[{photos}]", "data.held_out=8"])
        training, held_out = open_parts(config)
        assert sorted([*training.indices, *held_out.indices]) == list(range(20))
        assert len(held_out) == 8
        assert training.read(0, torch.Generator()).name == "p01.png"
        config.data.held_out = 20
        with pytest.raises(LoftUpError, match="data.held_out=20 of 20 pictures leaves none to train on"):
            open_parts(config)
