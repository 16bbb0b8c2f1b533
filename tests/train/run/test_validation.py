"""Numbers and pictures of the validation, against plain computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import randomised
from PIL import Image
from small_run import make_material, small_config

from loftup import LoftUpConfig, LoftUpError
from loftup.train.run.build import build_backbones
from loftup.train.run.distributed import Processes
from loftup.train.run.probe import fit_probe
from loftup.train.run.validation import LinearProbe, Validation, open_validation, report, save_picture


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def config(material, tmp_path):
    config = small_config(material, tmp_path / "run")
    config.validation.path = [str(material / "val")]
    config.validation.probe, config.validation.probe_classes = str(material / "val"), 3
    return config


@pytest.fixture
def backbone(config):
    return build_backbones(config)[0]


UP = randomised(LoftUpConfig(32))


def crops(material, backbone):
    """Image (1, 3, 32, 32), features and labels of the centre crops, made by other means."""
    for index in range(4):
        picture = Image.open(material / "val" / f"p{index}.jpg").convert("RGB").crop((4, 0, 44, 40))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        image = F.interpolate(image, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
        labels = Image.open(material / "val" / f"p{index}.png").crop((4, 0, 44, 40)).resize((32, 32), Image.NEAREST)
        with torch.no_grad():
            yield image, backbone((image - mean) / std), torch.from_numpy(np.array(labels)).long()


def test_the_loss_is_that_of_stage_1(config, backbone, material):
    """Refined features by a loop over pixels of the one label map; masks in the order of their labels."""
    config.objective.mask_bicubic.alpha = 0.6
    expected = torch.zeros(2, dtype=torch.float64)
    for image, features, labels in crops(material, backbone):
        normalised = UP.channelnorm(features)
        bicubic = F.interpolate(normalised, (32, 32), mode="bicubic").detach()
        target = bicubic.clone()[0]
        for label in labels.unique():
            inside = labels == label
            target[:, inside] = 0.6 * target[:, inside].mean(1, keepdim=True) + 0.4 * target[:, inside]
        with torch.inference_mode():
            student = UP(features, image)[0]
        expected += torch.stack([(student - target).square().mean(), (bicubic[0] - target).square().mean()]).double()
    found = Validation(config, backbone).measure(UP)
    assert found[2] == 4
    torch.testing.assert_close(found[:2], expected, rtol=1e-4, atol=0)
    shares = [Validation(config, backbone, rank, 3).measure(UP) for rank in range(3)]
    assert [int(share[2]) for share in shares] == [2, 1, 1]
    torch.testing.assert_close(sum(shares), found)


def test_evenly_spread_pictures(config, backbone):
    config.validation.images = 2
    cases = Validation(config, backbone)._cases.cases
    assert [case.name for case in cases] == ["p0.jpg", "p2.jpg"]


def test_the_picture_has_a_row_for_every_image(config, backbone, tmp_path):
    config.validation.pictures = 2
    validation = Validation(config, backbone)
    plain, both = validation.picture(UP), validation.picture(UP, UP)
    assert plain.height == both.height == 2 * (32 + 2 * 12)
    assert (plain.width, both.width) == (4 * 36 - 4, 5 * 36 - 4)
    pixels = np.array(both)
    assert np.array_equal(pixels[24:56, 108:140], pixels[24:56, 144:176])
    assert not np.array_equal(pixels[24:56, 72:104], pixels[24:56, 108:140])
    save_picture(both, tmp_path / "pictures" / "x.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "pictures" / "x.png")), pixels)
    (tmp_path / "file").touch()
    with pytest.raises(LoftUpError, match=r"cannot write .*x.png"):
        save_picture(both, tmp_path / "file" / "x.png")


def test_the_probe_learns_on_one_half_and_is_judged_on_the_other(config, backbone, material, monkeypatch):
    monkeypatch.setattr("loftup.train.run.validation.POINTS", 32 * 32)  # all pixels: a probe that can be made anew
    dense = []
    for image, features, labels in crops(material, backbone):
        bilinear = F.interpolate(features, (32, 32), mode="bilinear")[0]
        with torch.no_grad():
            dense.append((UP(features, image)[0], bilinear, labels))
    probe = LinearProbe(config, backbone)
    for which, found in enumerate((probe.measure(UP), probe.bilinear())):
        x = torch.cat([maps[which].flatten(1).mT for maps in dense[::2]])
        y = torch.cat([maps[2].flatten() for maps in dense[::2]])
        linear = fit_probe(x, y, 3, epochs=20)
        right = [(linear(maps[which].movedim(0, -1)).argmax(-1) == maps[2]).float().mean() for maps in dense[1::2]]
        assert found["accuracy"] == pytest.approx(100 * float(sum(right) / 2), abs=3)
        assert set(found) == {"miou", "accuracy", "boundary_miou"}
        assert probe.measure(UP) == probe.measure(UP)


def test_labels_beyond_the_classes_do_not_count(config, backbone):
    config.validation.probe_classes = 2
    probe = LinearProbe(config, backbone)
    for _, label, chosen in probe._learn:
        assert set(label.unique().tolist()) == {-1, 0, 1}
        assert (label[chosen[:, 0], chosen[:, 1]] >= 0).all()
        assert len(chosen) == min(512, int((label >= 0).sum()))
        assert len(chosen.unique(dim=0)) == len(chosen)


def test_what_cannot_be_measured(config, backbone, material, tmp_path):
    config.validation.size = 30
    with pytest.raises(
        LoftUpError, match=r"validation.size is 30, expected a multiple of .* patch size 8, such as 24, 32"
    ):
        Validation(config, backbone)
    config.validation.size, config.validation.images = 32, 1
    with pytest.raises(LoftUpError, match=r"val has 1 readable pictures, of which 1 to learn from have labels in 0..2"):
        LinearProbe(config, backbone)
    (tmp_path / "p0.jpg").write_bytes((material / "val" / "p0.jpg").read_bytes()[:100])
    (tmp_path / "p0.png").write_bytes((material / "val" / "p0.png").read_bytes())
    config.validation.path = [str(tmp_path)]
    with pytest.raises(LoftUpError, match=r"no picture of validation.path can be read; the first: .*p0.jpg"):
        open_validation(config, backbone, Processes())
    assert Validation(config, backbone).picture(UP) is None


def test_other_processes_pictures_count(config, backbone, material, tmp_path):
    """The first process has none that can be read, the second one."""
    for file in (material / "val").glob("p[01].*"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "p0.jpg" else None])
    config.validation.path = [str(tmp_path)]
    other = Validation(config, backbone, 1, 2)

    class Two(Processes):
        def gather(self, value):
            return [value, (len(other), other.unreadable) if isinstance(value, tuple) else ""]

    processes = Two()
    processes.world = 2
    found = open_validation(config, backbone, processes)
    assert (len(found), len(other)) == (0, 1)
    assert found.measure(UP).tolist() == [0, 0, 0]


def test_masks_are_kept_packed(config, backbone):
    case = Validation(config, backbone)._cases.cases[0]
    assert (case.targets.dtype, case.targets.shape[1:]) == (torch.uint8, (32, 4))


def test_the_report_tells_percentages_from_losses():
    assert report({"loss": 0.5, "bicubic": 1.0, "ratio": 0.5}) == "loss 0.5, bicubic 1, ratio 0.5"
    scores = {"miou": 52.46, "accuracy": 70.0, "boundary_miou": 41.0}
    found = {**scores, **{f"bilinear_{name}": value - 5 for name, value in scores.items()}}
    assert report(found) == (
        "probe mIoU 52.5 (bilinear 47.5), accuracy 70.0 (bilinear 65.0), boundary mIoU 41.0 (bilinear 36.0) percent"
    )
