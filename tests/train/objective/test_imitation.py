"""The term that imitates another project's upsampler: its target in windows and at other sizes, the cache, refusals."""

import pytest
import torch
import torch.nn.functional as F
from small_config import configured
from small_objective import CHANNELS, SIZE, backbone, batch, close, cut, features_config, scale, seen, upsampler

from loftup import LoftUpError
from loftup.train.config import BackboneConfig, check
from loftup.train.data.plan import Cells, check_geometry
from loftup.train.objective import imitation as module
from loftup.train.objective.imitation import projection
from loftup.train.objective.objective import Objective


class Nearest(torch.nn.Module):
    """Stands for another project's network: doubles what it interpolates, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls, self.code = torch.nn.Parameter(torch.ones(2), requires_grad=False), 0, "first"

    def forward(self, features, image, size):
        self.calls += 1
        return 2 * F.interpolate(features, size) + image.mean((1, 2, 3), keepdim=True)


@pytest.fixture
def teacher(monkeypatch):
    network, asked = Nearest(), []
    monkeypatch.setattr(module, "load_foreign", lambda *given: asked.append(given) or network)
    network.asked = asked
    return network


def imitating(**settings):
    term = {"upsampler": "anyup:w@c", "trust_code": True, "ratio": 1.0}
    made = features_config("imitation", **{f"objective__imitation__{name}": value for name, value in term.items()})
    return configured(made, **settings)


def expected(term, data, teacher, side):
    """The student's and the teacher's output, projected, written out."""
    low = seen(term, data.image)
    directions = projection(CHANNELS, term.config.objective.imitation.channels)
    with torch.no_grad():
        student = term.up.upsampler(scale(low, low), data.guidance)
    target = scale(teacher(low, data.image, (side, side)), low)
    return (torch.einsum("bchw,ck->bkhw", x, directions) for x in (student, target))


@pytest.mark.parametrize("window", [None, (8, 4, 20, 16)])
@pytest.mark.parametrize("channels", [3, 64])
def test_the_target_is_the_teachers_output(teacher, window, channels):
    term = Objective(imitating(objective__imitation__channels=channels), upsampler(), backbone())
    data = batch(window=window)
    student, target = expected(term, data, teacher, SIZE)
    loss, parts = term(data)
    close(loss, (cut(student, window) - cut(target, window)).square().mean())
    assert parts.keys() == {"imitation"}
    assert teacher.asked == [("anyup:w@c", CHANNELS)]
    loss.backward()
    assert all(parameter.grad is not None for parameter in term.up.upsampler.encoder.parameters())


@pytest.mark.parametrize("window", [None, (8, 0, 24, 16)])
def test_a_student_finer_than_the_teacher_is_averaged(teacher, window):
    term = Objective(imitating(objective__imitation__ratio=0.5), upsampler(), backbone())
    data = batch(window=window)
    student, target = expected(term, data, teacher, SIZE // 2)
    half = None if window is None else tuple(edge // 2 for edge in window)
    close(term(data)[0], (F.avg_pool2d(cut(student, window), 2) - cut(target, half)).square().mean())


def test_a_teacher_finer_than_the_student_is_averaged(teacher):
    term = Objective(imitating(), upsampler(), backbone())
    data = batch(output=SIZE // 2, window=(2, 4, 8, 12))
    student, target = expected(term, data, teacher, SIZE)
    close(term(data)[0], (cut(student, data.window) - cut(F.avg_pool2d(target, 2), data.window)).square().mean())


def test_the_projection_keeps_directions_and_lengths():
    directions = projection(6, 64)
    close(directions.mT @ directions, torch.eye(6))
    assert projection(6, 4).shape == (6, 4)
    assert projection(6, 4).equal(projection(6, 4))


def test_cached_targets_are_not_made_again(teacher, tmp_path):
    made = imitating(data__cache=str(tmp_path), data__views=2)
    term, data = Objective(made, upsampler(), backbone()), batch()
    data.keys = [term.caches[0].key(image) for image in data.image]
    data.features = [None, None]
    first = term(data)[0]
    assert teacher.calls == 2
    assert term(data)[0].equal(first)
    assert teacher.calls == 2
    assert len({term.imitation.caches[0].folder, term.caches[0].folder}) == 2
    # Other weights and other code have other folders.
    folders = {term.imitation.caches[0].folder}
    teacher.weight += 1
    folders.add(Objective(made, upsampler(), backbone()).imitation.caches[0].folder)
    teacher.code = "second"
    folders.add(Objective(made, upsampler(), backbone()).imitation.caches[0].folder)
    assert len(folders) == 3


def test_it_counts_for_the_named_backbones_alone(teacher):
    made = imitating(objective__imitation__backbones=[1], objective__segments__weight=1.0)
    made.backbones = [BackboneConfig(), BackboneConfig()]
    term = Objective(made, upsampler(), [backbone(), backbone()])
    assert term(batch())[1].keys() == {"segments"}
    assert term(batch(backbone=1))[1].keys() == {"segments", "imitation"}


def test_channels_and_rotation_leave_the_target_as_it_is(teacher):
    term = Objective(imitating(model__channel_dropout=0.4, model__channel_mixing=1.0), upsampler(), backbone())
    assert torch.isfinite(term(batch())[0])
    assert teacher.calls == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective__imitation__trust_code": False}, r"upsampler=anyup:w@c runs the code in that folder; read it"),
        ({"objective__imitation__upsampler": None}, r"imitation.upsampler is null, expected whom to imitate"),
        ({"model__architecture": "loftup"}, r"imitation.weight=1 with model.architecture=loftup"),
        (
            {"objective__imitation__backbones": [0], "backbones": [BackboneConfig(), BackboneConfig()]},
            r"imitation is the only term and counts for some of the backbones",
        ),
        (
            {"objective__imitation__backbones": [1], "objective__segments__weight": 1.0},
            r"imitation.backbones holds 1, expected numbers below 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    made = imitating(**settings)
    made.data.path = ["pictures"]
    with pytest.raises(LoftUpError, match=message):
        check(made)


def test_every_backbone_may_be_named():
    made = imitating(objective__imitation__backbones=[0])
    made.data.path = ["pictures"]
    check(made)


def test_autocast_leaves_values_and_targets_as_wide_as_they_are(teacher, tmp_path):
    made = imitating(model__channel_mixing=1.0, data__guidance_jitter=1.0, data__cache=str(tmp_path), data__views=1)
    model = backbone()
    term, data = Objective(made, upsampler(), model), batch()
    data.keys = [term.caches[0].key(image) for image in data.image]
    data.features = list(seen(term, data.image))
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(data)[0]
    again = Objective(made, term.up, model)
    close(loss, again(data)[0], atol=1e-5)
    assert teacher.calls == 2


@pytest.mark.parametrize(("ratio", "ratios"), [(0.7, [1.0]), (1.0, [0.75]), (1.5, [1.0]), (0.001, [1.0])])
def test_outputs_that_do_not_divide_are_refused(ratio, ratios):
    made = imitating(objective__imitation__ratio=ratio, data__sizes=[96], data__ratios=ratios)
    with pytest.raises(LoftUpError, match=r"makes the teacher's output \d+ pixels wide for an input of 96"):
        check_geometry(made, 4)
    check_geometry(imitating(data__sizes=[96], data__ratios=[0.5, 2.0]), 4)
    # Of the backbones that it counts for alone.
    made = imitating(data__sizes=[96], objective__imitation__backbones=[0])
    check_geometry(made, [4, Cells(16, 3)])
    made.objective.imitation.backbones = [1]
    with pytest.raises(LoftUpError, match="and the features have 18 cells"):
        check_geometry(made, [4, Cells(16, 3)])


def test_only_some_projects_can_be_loaded_from_files():
    with pytest.raises(LoftUpError, match="no project 'naf' can be loaded from local files; write NAME:WEIGHTS@FOLDER"):
        module.load_foreign("naf:w@c", 8)
