"""The term of shifted views: its target at every pixel, with both ways of upsampling it, and the cache."""

import pytest
import torch
import torch.nn.functional as F
from small_objective import PATCH, SIZE, backbone, batch, close, cut, features_config, scale, seen, upsampler

from loftup import LoftUp, LoftUpError
from loftup.train.config import BackboneConfig, ShiftedConfig, check
from loftup.train.objective.objective import Objective
from loftup.train.objective.shifted import make_teacher


def views_of(term, image, count=3):
    """The grid of count * count views, one cell at a time: what the backbone says of a patch anywhere."""
    offsets = [(2 * i - count + 1) * PATCH // (2 * count) for i in range(count)]
    pad, rows = PATCH, []
    padded = F.pad(image, (pad, pad, pad, pad), mode="reflect")
    for down in offsets:
        moved = [padded[..., pad + down :, pad + right :][..., :SIZE, :SIZE] for right in offsets]
        rows.append(torch.stack([seen(term, each) for each in moved]))
    grid = torch.stack(rows)  # (n, n, B, C, h, w)
    return grid.permute(2, 3, 4, 0, 5, 1).reshape(*grid.shape[2:4], grid.shape[4] * count, grid.shape[5] * count)


@pytest.mark.parametrize("window", [None, (8, 4, 20, 16)])
@pytest.mark.parametrize("name", ["any", None])
def test_the_target_is_the_upsampled_grid_of_views(name, window):
    made = features_config("shifted", objective__shifted__upsampler=name)
    term, data = Objective(made, upsampler(), backbone()), batch(window=window)
    low = seen(term, data.image)
    views = scale(views_of(term, data.image), low)
    with torch.no_grad():
        student = scale(term.up.upsampler(low, data.guidance), low)
        if name:
            target = LoftUp.from_pretrained("any").upsampler(views, data.guidance)
        else:
            target = F.interpolate(views, (SIZE, SIZE), mode="bilinear")
    close(term(data)[0], (cut(student, window) - cut(target, window)).square().mean())


def test_the_teacher_is_frozen_and_in_no_checkpoint():
    term = Objective(features_config("shifted"), upsampler(), backbone())
    assert len(term.state_dict()) == len(upsampler().state_dict())
    term(batch())[0].backward()
    assert all(parameter.grad is not None for parameter in term.up.upsampler.parameters())
    with torch.enable_grad():
        assert not term._upsamplers[0](torch.rand(1, 8, 6, 6), torch.rand(1, 3, 24, 24), None).requires_grad


def test_cached_views_are_not_made_again(tmp_path):
    made = features_config("shifted", data__cache=str(tmp_path), data__views=2)
    model = backbone()
    term, data = Objective(made, upsampler(), model), batch()
    data.keys = [term.caches[0].key(image) for image in data.image]
    data.features = [None, None]
    first = term(data)[0]
    calls = len(model.model.seen)
    assert calls == 2 * (1 + 9)
    data.features = [term.caches[0].read(key) for key in data.keys]
    assert term(data)[0].equal(first)
    assert len(model.model.seen) == calls
    assert term.finer_caches[0].folder != term.caches[0].folder


def test_a_target_that_is_no_finer_is_refused():
    made = features_config("shifted")
    made.backbones = [BackboneConfig(), BackboneConfig(views=9)]
    made.data.path = ["pictures"]
    with pytest.raises(LoftUpError, match=r"shifted.views=9 is no finer than the views of backbones\[1\]; give more"):
        check(made)
    made.objective.shifted.views = 16
    check(made)


@pytest.mark.parametrize("factor", [2, 3])
def test_the_teacher_sees_the_image_as_finely_as_it_can(factor):
    """The student's guidance has factor x factor pixels for one of the output, ``any`` looks at 2 x 2 at most."""
    teacher = make_teacher(ShiftedConfig(), torch.device("cpu"))
    image, features = torch.rand(1, 3, SIZE, SIZE), torch.randn(1, 8, 6, 6)
    output = SIZE // factor
    found = teacher(features, F.pixel_unshuffle(image, factor), (2, 0, 6, 4))
    if factor > 2:
        image = F.interpolate(image, (output, output), mode="area")
    expected = LoftUp.from_pretrained("any")(features, image, size=output)
    close(found, cut(expected, (2, 0, 6, 4)))
