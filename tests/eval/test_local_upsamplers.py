"""AnyUp and JAFAR from local files: stand-ins of the same signatures, the real ones where they are, and failures."""

import os
import sys
from pathlib import Path

import pytest
import torch
from material import shared
from small import mean_colours

from loftup import LoftUpError
from loftup.eval.upsamplers import create as create_any

ANYUP = """
import torch.nn.functional as F
from torch import nn
from .where import HERE

class AnyUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(3, 1, 1)

    def forward(self, image, features, output_size=None):
        self.seen = image, features, HERE
        return F.interpolate(features, output_size) + 0 * self.scale(image).mean()
"""
JAFAR = """
import torch.nn.functional as F
from torch import nn
from src.layers import encoder
from utils.img import create_coordinate

class JAFAR(nn.Module):
    def __init__(self, input_dim=3, qk_dim=128, v_dim=384, kernel_size=1):
        super().__init__()
        self.image_encoder = encoder(input_dim, qk_dim, kernel_size)
        self.key_features_encoder = encoder(v_dim, qk_dim, 1)

    def forward(self, image, features, output_size):
        self.seen = image, create_coordinate(2, 3)
        return F.interpolate(features, output_size)
"""
LAYERS = """
from torch import nn

def encoder(channels, width, kernel):
    return nn.Sequential(nn.Conv2d(channels, width, kernel))
"""
COORDINATES = """
import torch

def create_coordinate(h, w, device="cuda"):
    return torch.zeros(1, h * w, 2, device=device)
"""
JAFAR_STATE = {
    "image_encoder.0.weight": torch.ones(8, 3, 3, 3),
    "image_encoder.0.bias": torch.ones(8),
    "key_features_encoder.0.weight": torch.ones(8, 3, 1, 1),
    "key_features_encoder.0.bias": torch.ones(8),
}
ANYUP_STATE = {"scale.weight": torch.ones(1, 3, 1, 1), "scale.bias": torch.ones(1)}
IMAGE = torch.rand(1, 3, 32, 48)
FEATURES = torch.randn(1, 3, 2, 3)


def create(spec, backbone=None):
    return create_any(spec, backbone or mean_colours(), trust_remote_code=True)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def anyup(tmp_path):
    """Stands for AnyUp's weights and code; the argument that names them."""
    write(tmp_path / "anyup_code/anyup/__init__.py", "")
    write(tmp_path / "anyup_code/anyup/model.py", ANYUP)
    write(tmp_path / "anyup_code/anyup/where.py", "HERE = 'first'")
    torch.save(ANYUP_STATE, tmp_path / "anyup.pth")
    return f"anyup:{tmp_path / 'anyup.pth'}@{tmp_path / 'anyup_code'}"


@pytest.fixture
def jafar(tmp_path):
    """Stands for JAFAR's, whose code has no __init__ files here."""
    write(tmp_path / "jafar_code/src/upsampler/jafar.py", JAFAR)
    write(tmp_path / "jafar_code/src/layers.py", LAYERS)
    write(tmp_path / "jafar_code/utils/img.py", COORDINATES)
    torch.save({"jafar": JAFAR_STATE}, tmp_path / "jafar.pth")
    return f"jafar:{tmp_path / 'jafar.pth'}@{tmp_path / 'jafar_code'}"


def test_anyup_is_called_as_its_authors_do(anyup):
    up = create(anyup)
    assert up(FEATURES, IMAGE, (20, 30)).shape == (1, 3, 20, 30)
    image, features, _ = up.network.seen
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(image, (IMAGE - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert features is FEATURES
    assert torch.equal(up.network.scale.weight, ANYUP_STATE["scale.weight"])
    assert not up.network.scale.weight.requires_grad
    assert not up.network.training
    assert up.code == ANYUP


def test_jafar_takes_its_widths_from_the_weights_and_its_coordinates_from_the_device(jafar):
    up = create(jafar)
    assert up(FEATURES, IMAGE, (20, 30)).shape == (1, 3, 20, 30)
    assert up.network.seen[1].device.type == "cpu"
    assert up.network.image_encoder[0].kernel_size == (3, 3)


def test_the_state_dict_may_lie_bare_in_the_file(jafar, tmp_path):
    torch.save(JAFAR_STATE, tmp_path / "jafar.pth")
    assert create(jafar).network.key_features_encoder[0].weight.shape == (8, 3, 1, 1)


def test_two_folders_do_not_mix_and_nothing_stays_behind(anyup, jafar, tmp_path, monkeypatch):
    mine = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    before, path = set(sys.modules), list(sys.path)
    one = create(anyup)
    write(tmp_path / "other/anyup/model.py", ANYUP)
    write(tmp_path / "other/anyup/where.py", "HERE = 'second'")
    two = create(f"anyup:{tmp_path / 'anyup.pth'}@{tmp_path / 'other'}")
    create(jafar)
    for up in (one, two):
        up(FEATURES, IMAGE, (4, 4))
    assert (one.network.seen[2], two.network.seen[2]) == ("first", "second")
    assert sys.modules["utils"] is mine
    assert sys.path == path
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("anyup", "src", "utils")}


@pytest.mark.parametrize("argument", ["x", "@x", "x@", ""])
def test_the_form_of_the_argument(argument):
    match = "'jafar' needs its weights and a folder with its code; write jafar:WEIGHTS@FOLDER, where FOLDER holds src/"
    with pytest.raises(LoftUpError, match=match):
        create(f"jafar:{argument}")


def test_what_is_not_there_is_named(anyup, jafar, tmp_path):
    with pytest.raises(LoftUpError, match="the folder of anyup's code is not there: .*nowhere"):
        create(f"anyup:{tmp_path / 'anyup.pth'}@{tmp_path / 'nowhere'}")
    with pytest.raises(LoftUpError, match="expected the code of anyup at .*anyup/model.py, found nothing"):
        create(f"anyup:{tmp_path / 'anyup.pth'}@{tmp_path / 'jafar_code'}")
    with pytest.raises(LoftUpError, match="expected the weights of anyup at .*none.pth, found nothing"):
        create(f"anyup:{tmp_path / 'none.pth'}@{tmp_path / 'anyup_code'}")
    (tmp_path / "jafar_code/utils/img.py").unlink()
    with pytest.raises(LoftUpError, match="jafar's code in .* is not whole: it lacks utils/img; check out all"):
        create(jafar)
    write(tmp_path / "jafar_code/utils/img.py", "import no_such_package")
    with pytest.raises(LoftUpError, match="needs the package 'no_such_package', .* pip install no_such_package"):
        create(jafar)
    write(tmp_path / "jafar_code/utils/img.py", "1 / 0")
    with pytest.raises(LoftUpError, match=r"cannot import src.upsampler.jafar from .*: division by zero"):
        create(jafar)


def test_another_class(anyup, tmp_path):
    file = tmp_path / "anyup_code/anyup/model.py"
    for text in ("class Other: pass", "AnyUp = 3\nclass Other: pass", "class Other: pass\nclass AnyUp: pass"):
        file.write_text(text)
        with pytest.raises(LoftUpError, match="expected the class AnyUp, a torch.nn.Module, in .*model.py; it has Oth"):
            create(anyup)
    file.write_text(ANYUP.replace("def __init__(self)", "def __init__(self, width)"))
    with pytest.raises(LoftUpError, match=r"cannot make AnyUp\(\) of .*'width'"):
        create(anyup)


def test_weights_of_another_network(anyup, jafar, tmp_path):
    torch.save({"scale.weight": torch.ones(1, 3, 2, 2), **{f"k{i}": torch.ones(1) for i in range(8)}}, tmp_path / "w")
    match = (
        r"the weights in .*w are not those of this AnyUp: missing: scale.bias; unexpected: k0, k1, k2, k3, k4, k5 and "
        r"2 more; of another shape: scale.weight \(1, 3, 2, 2\) for \(1, 3, 1, 1\)"
    )
    with pytest.raises(LoftUpError, match=match):
        create(f"anyup:{tmp_path / 'w'}@{tmp_path / 'anyup_code'}")
    with pytest.raises(LoftUpError, match="the weights in .* are not those of this JAFAR: missing: image_encoder.0"):
        create(f"jafar:{tmp_path / 'anyup.pth'}@{tmp_path / 'jafar_code'}")
    with pytest.raises(LoftUpError, match="was trained for 3 channels, the backbone has 6"):
        create(jafar, mean_colours(channels=6))
    torch.save([1], tmp_path / "w")
    with pytest.raises(LoftUpError, match="expected a state dict in .*w, found a list"):
        create(f"anyup:{tmp_path / 'w'}@{tmp_path / 'anyup_code'}")
    torch.save({"epoch": 1}, tmp_path / "w")
    with pytest.raises(
        LoftUpError, match="expected a state dict, or one under 'jafar' in .*w, found a dict with epoch"
    ):
        create(f"jafar:{tmp_path / 'w'}@{tmp_path / 'jafar_code'}")
    torch.save(Path("code"), tmp_path / "w")
    with pytest.raises(LoftUpError, match="cannot read weights from .*w: "):
        create(f"anyup:{tmp_path / 'w'}@{tmp_path / 'anyup_code'}")


def test_their_code_is_run_only_where_it_is_asked_for(anyup, jafar):
    for spec, named in ((anyup, "or of the folder that you name"), (jafar, "the folder that you name")):
        with pytest.raises(LoftUpError, match=f"runs code of .*{named}.* give --trust-remote-code"):
            create_any(spec, mean_colours())


@pytest.mark.parametrize(
    ("name", "weights", "variable"),
    [("anyup", "anyup_paper.pth", "LOFTUP_ANYUP_CODE"), ("jafar", "jafar_dinov2_vits14.pth", "LOFTUP_JAFAR_CODE")],
)
def test_the_real_ones(name, weights, variable):
    file, code = shared(f"weights/peers/{weights}"), os.environ.get(variable)
    if not code:
        pytest.skip(f"needs a checkout of {name}'s code, named by {variable}")
    features = torch.nn.functional.interpolate(torch.randn(1, 384, 4, 4), (8, 8), mode="bicubic")
    dense = create(f"{name}:{file}@{code}", mean_colours(channels=384))(features, torch.rand(1, 3, 112, 112), (50, 40))
    assert dense.shape == (1, 384, 50, 40)
    # Both mix cells of the input by weights that sum to 1.
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert ((dense > low - 1e-3) & (dense < high + 1e-3)).all()
    assert dense.std() > 0.3 * features.std()
