"""The term of the classes' probes: which learns from what, the losses written out, labels in batches, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from material import drawn_scene
from PIL import Image
from small_config import configured
from small_objective import CHANNELS, SIZE, backbone, batch, close, cut, features_config, scale, seen, upsampler

from loftup import LoftUpError
from loftup.train.config import check
from loftup.train.data.loader import loader
from loftup.train.data.regions import LabelMap
from loftup.train.objective.maps import near_outlines, soft_overlap
from loftup.train.objective.objective import Objective


def with_classes(**settings):
    made = configured(features_config("classes"), data__path=["a", "b"], data__classes=[3, 0])
    return configured(made, **settings)


def labelled(labels, **parts):
    data = batch(**parts)
    data.labels, data.sources = labels, [0 if each is not None else 1 for each in labels]
    return data


def some_labels():
    labels = torch.randint(-1, 3, (SIZE // 4, SIZE // 4)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels[0, :3] = torch.tensor([0, 1, 2])
    return labels


def randomise(term):
    with torch.no_grad():
        for parameter in term.classes.parameters():
            parameter.normal_()


def entropy(logits, labels, weight):
    losses = F.cross_entropy(logits[None], labels[None], reduction="none", ignore_index=-1)[0]
    return (losses * weight).sum() / weight.sum()


@pytest.mark.parametrize("window", [None, (8, 4, 20, 16)])
@pytest.mark.parametrize(("edges", "overlap"), [(0.0, 0.0), (4.0, 0.5)])
def test_both_probes_are_judged_on_the_output(window, edges, overlap):
    made = with_classes(objective__classes__edges=edges, objective__classes__overlap=overlap)
    term = Objective(made, upsampler(), backbone())
    randomise(term)
    labels = some_labels()
    data = labelled([labels, None], window=window)
    low = seen(term, data.image)
    standard = scale(low, low)
    probes = term.classes.probes["0_0"]
    counts = torch.bincount(labels[labels >= 0], minlength=3).float()
    weights = (counts.sum() / 3 / (counts + 0.002 * counts.sum())) ** 0.6
    known = cut(labels, window)
    each = torch.stack([known == number for number in range(3)])
    weight = weights[known.clamp(min=0)] * (known >= 0) * (1 + edges * near_outlines(each))
    expected = F.cross_entropy(
        torch.einsum("kc,chw->khw", probes.cells.weight, standard[0])[None] + probes.cells.bias.view(1, -1, 1, 1),
        F.interpolate(labels[None, None].double(), low.shape[-2:], mode="nearest-exact")[0].long(),
        ignore_index=-1,
    )
    with torch.no_grad():
        dense = term.up.upsampler(standard, data.guidance)[0]
    for layer in (probes.cells, probes.output):
        logits = cut(torch.einsum("kc,chw->khw", layer.weight, dense) + layer.bias.view(-1, 1, 1), window)
        expected = expected + entropy(logits, known, weight)
        there = each.flatten(1).any(1)
        shares = (logits.softmax(0) * (known >= 0)).flatten(1)[there]
        expected = expected + overlap * (1 - soft_overlap(shares, each.flatten(1)[there].float()))
    loss, parts = term(data)
    assert parts.keys() == {"classes"}
    close(loss, expected / 2)


def test_the_first_probe_learns_from_the_cells_alone():
    made = with_classes()
    term = Objective(made, upsampler(), backbone())
    randomise(term)
    data = labelled([some_labels(), some_labels()])
    term(data)[0].backward()
    probes = term.classes.probes["0_0"]
    gradient = probes.cells.weight.grad.clone()
    # Whatever the upsampler makes, the first probe learns the same.
    other = Objective(made, upsampler(), term.backbones[0])
    other.classes.load_state_dict(term.classes.state_dict())
    other(data)[0].backward()
    close(other.classes.probes["0_0"].cells.weight.grad, gradient)
    assert not torch.allclose(other.classes.probes["0_0"].output.weight.grad, probes.output.weight.grad)
    assert all(parameter.grad is not None for parameter in term.up.upsampler.encoder.parameters())


def test_pictures_without_labels_cost_nothing():
    term = Objective(with_classes(), upsampler(), backbone())
    loss, _ = term(labelled([None, None]))
    assert loss == 0
    loss.backward()


def test_probes_are_kept_with_the_run_and_count_in_training_alone():
    term = Objective(with_classes(), upsampler(), backbone())
    assert {key for key in term.state_dict() if key.startswith("classes.")} == {
        f"classes.probes.0_0.{name}"
        for name in ("counts", "cells.weight", "cells.bias", "output.weight", "output.bias")
    }
    data = labelled([some_labels(), None])
    term.eval()(data)
    counts = term.classes.probes["0_0"].counts
    assert counts.sum() == 0
    term.train()(data)
    assert counts.sum() == (data.labels[0] >= 0).sum()
    assert term.classes.probes["0_0"].cells.weight.shape == (3, CHANNELS)


def test_the_overlap_of_equal_masks_is_one():
    masks = torch.eye(3).repeat_interleave(4, 1)
    assert soft_overlap(masks, masks) == 1
    close(soft_overlap(masks, 1 - masks), torch.tensor(1 / 13))


def test_batches_carry_classes(tmp_path):
    import numpy as np

    values = np.zeros((48, 48), np.uint8)
    values[:, :24], values[:8], values[40:] = 2, 255, 7
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        drawn_scene(48, 48).save(tmp_path / folder / "x.jpg")
        Image.fromarray(values).save(tmp_path / folder / "x.png")
    made = with_classes(
        data__path=[str(tmp_path / "a"), str(tmp_path / "b")], data__void=255, data__workers=0, data__flip=1.0,
        data__scale=[1.0, 1.0], steps=1,
    )  # fmt: skip
    (data,) = loader(made, backbone())
    assert sorted(data.sources) == [0, 1]
    labels, nothing = (data.labels[data.sources.index(source)] for source in (0, 1))
    assert nothing is None
    assert labels.shape == (SIZE, SIZE)
    assert labels[:4].unique().tolist() == [-1]  # void
    assert labels[20:].unique().tolist() == [-1]  # beyond the classes
    assert labels[8, :12].unique().tolist() == [0]  # mirrored
    assert labels[8, 12:].unique().tolist() == [2]
    assert data.to("cpu").labels[data.sources.index(0)].equal(labels)


def test_labels_of_a_map():
    labels = LabelMap(torch.tensor([[0, 1], [5, 255]]).numpy(), void=1).classes((0, 0, 2, 2), (2, 2), 6)
    assert labels.tolist() == [[0, -1], [5, -1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__classes": [3]}, r"data.classes=\[3\] for 2 of data.path; objective.classes needs the number"),
        ({"data__classes": [0, 0]}, r"data.classes=\[0, 0\] for 2 of data.path"),
        ({"model__architecture": "loftup"}, r"objective.classes.weight=1 with model.architecture=loftup"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(LoftUpError, match=message):
        check(with_classes(**settings))
    check(with_classes())
