"""The term that judges attention by a probe of every picture's masks."""

import pytest
import torch
from small_config import configured
from small_objective import backbone, batch, close, config, cut, full_batch
from test_universal_terms import scale, seen, upsampler

from loftup import LoftUpError
from loftup.train.config import check
from loftup.train.objective.maps import some
from loftup.train.objective.objective import Objective
from loftup.train.objective.segments import membership_loss, read_membership


def guesses(features, masks, ridge):
    """The ridge regression refitted for every cell without it, written out."""
    x = features.flatten(1).mT.double()
    h, w = features.shape[1:]
    cell = masks.shape[1] // h
    share = masks.double().unflatten(1, (h, cell)).unflatten(3, (w, cell)).mean((2, 4)).flatten(1).mT
    # All cells' mean and scale stay in use; only the cell's own error is left out of the sum.
    gram = x @ x.mT
    scale = gram.diagonal().mean()
    weights = ridge * torch.eye(x.shape[1], dtype=torch.float64) * scale
    made = []
    for left_out in range(len(x)):
        others = torch.arange(len(x)) != left_out
        a, b = x[others], share[others]
        # Features have mean 0 over all cells; the intercept is fitted with the rest.
        ones = torch.cat([a, torch.ones(len(a), 1)], 1)
        penalty = torch.block_diag(weights, torch.zeros(1, 1, dtype=torch.float64))
        solved = torch.linalg.solve(ones.mT @ ones + penalty, ones.mT @ b)
        made.append(torch.cat([x[left_out], torch.ones(1)]) @ solved)
    return torch.stack(made).mT.reshape(len(masks), h, w)


def test_membership_is_the_guess_of_a_probe_that_has_not_seen_the_cell():
    torch.manual_seed(0)
    features = torch.randn(5, 6, 4)
    features -= features.mean((1, 2), keepdim=True)
    masks = torch.rand(3, 24, 16) < torch.tensor([0.2, 0.5, 0.8])[:, None, None]
    close(read_membership(features, masks, 0.4), guesses(features, masks, 0.4).float(), 1e-5)


def test_membership_finds_what_the_features_tell():
    inside = torch.zeros(1, 32, 32, dtype=torch.bool)
    inside[:, :, 16:] = True
    telling = torch.where(torch.arange(8) < 4, -1.0, 1.0).expand(3, 8, 8) + 0.1 * torch.randn(3, 8, 8)
    read = read_membership(telling - telling.mean((1, 2), keepdim=True), inside, 0.01)
    assert read[0, :, :4].abs().max() < 0.3
    assert (read[0, :, 4:] - 1).abs().max() < 0.3
    silent = read_membership(torch.zeros(3, 8, 8), inside)  # the mean of the other cells is all there is to say
    assert (silent - 0.5).abs().max() < 0.02


def test_membership_loss_is_a_balanced_cross_entropy():
    # Pixels: in the first mask alone (three), in both, in none.
    masks = torch.tensor([[[1, 1, 1, 1, 0]], [[0, 0, 0, 1, 0]]], dtype=torch.bool)
    read = torch.tensor([[[0.5, 0.1, 0.0, 0.2, 9.0]], [[0.0, 0.4, 0.0, 0.7, 0.0]]])
    logits = (2 * read[:, 0, :4]).log_softmax(0)
    first, second = 4**-0.5, 1.0  # the weights of the masks
    total = first * (logits[0, :3].sum() + 0.5 * logits[0, 3]) + second * 0.5 * logits[1, 3]
    close(membership_loss(read, masks, 2.0), -total / (first * 3.5 + second * 0.5))
    assert membership_loss(read, masks & False) == 0
    assert membership_loss(read[:0], masks[:0]) == 0


def test_membership_loss_weighs_areas_outlines_and_overlap():
    masks = torch.zeros(2, 1, 9, dtype=torch.bool)
    masks[0, 0, :6], masks[1, 0, 6:8] = True, True  # the last pixel lies in none
    read = torch.rand(2, 1, 9)
    logits = read[:, 0].log_softmax(0)
    entropy = -torch.cat([logits[0, :6], logits[1, 6:8]])
    by_area = torch.tensor([6**-0.7] * 6 + [2**-0.7] * 2)
    near = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])  # an outline is between the fifth and the sixth, and before the last
    weights = by_area * (1 + 3 * near)
    plain = (entropy * weights).sum() / weights.sum()
    close(membership_loss(read, masks, 1.0, area=0.7, edges=3.0), plain)
    shares = logits.exp()[:, :8]
    both = torch.stack([shares[0, :6].sum(), shares[1, 6:].sum()])
    either = shares.sum(1) + torch.tensor([6.0, 2.0]) - both
    overlap = 1 - ((both + 1) / (either + 1)).mean()
    close(membership_loss(read, masks, 1.0, area=0.7, edges=3.0, overlap=0.5), plain + 0.5 * overlap)


@pytest.mark.parametrize("window", [None, (8, 4, 20, 16)])
def test_term(window):
    made = configured(config("segments"), model__architecture="any", objective__segments__masks=2)
    term, data = Objective(made, upsampler(), backbone()), batch(window=window)
    data.masks[1] = data.masks[1][:1]
    low = seen(term, data.image)
    standardised = scale(low, low)
    expected = []
    for index, masks in enumerate(data.masks):
        masks = masks[:2]
        values = read_membership(standardised[index], masks, 0.3)[None]
        with torch.no_grad():
            read = term.up.upsampler(low[index : index + 1], data.guidance[index : index + 1], values=values)
        expected.append(membership_loss(cut(read[0], window), cut(masks, window)))
    loss, parts = term(data)
    close(loss, torch.stack(expected).mean())
    assert parts.keys() == {"segments"}
    loss.backward()
    assert all(p.grad is not None for p in term.up.upsampler.encoder.parameters())


def test_pictures_without_masks_cost_nothing():
    made = configured(config("segments"), model__architecture="any")
    term, data = Objective(made, upsampler(), backbone()), batch()
    data.masks = [masks[:0] for masks in data.masks]
    loss, _ = term(data)
    assert loss == 0


def test_a_projected_network_is_refused(tmp_path):
    made = config("segments")
    made.data.path = [str(tmp_path)]
    with pytest.raises(
        LoftUpError, match=r"objective.segments.weight=1 with model.architecture=loftup.*architecture=any"
    ):
        check(made)


def test_two_terms_share_one_pass():
    made = configured(config("segments", "high_resolution"), model__architecture="any")
    seeing = backbone()
    term, data = Objective(made, upsampler(), seeing), full_batch()
    passes = []
    term.up.upsampler.register_forward_hook(lambda *_: passes.append(1))
    _, parts = term(data)
    assert len(passes) == 1
    alone = Objective(configured(config("segments"), model__architecture="any"), term.up, seeing)
    close(alone(data)[1]["segments"], parts["segments"])


def test_fewer_masks_than_another_term_takes_are_spread_over_them():
    masks = torch.arange(10)
    assert some(masks, 4).tolist() == [0, 2, 5, 7]
    assert some(masks, 10) is masks
