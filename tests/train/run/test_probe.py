"""The linear probe and its scores against counting by hand."""

import math

import pytest
import torch

from loftup.train.run.probe import boundary_band, fit_probe, score


def separable(count=600, classes=3, channels=8):
    labels = torch.arange(count) % classes
    centres = 3 * torch.eye(classes, channels)
    return centres[labels] + 0.3 * torch.randn(count, channels), labels


class TestFitProbe:
    def test_separable_classes_are_separated(self):
        features, labels = separable()
        probe = fit_probe(features, labels, 3, batch=50)
        with torch.no_grad():
            predicted = probe(features).argmax(1)
        assert predicted.equal(labels)
        scores = score([(predicted.view(1, 20, 30), labels.view(1, 20, 30))], 3)
        assert (scores.miou, scores.accuracy, scores.boundary_miou) == (100, 100, 100)

    def test_scale_and_offset_of_the_features_do_not_matter(self):
        features, labels = separable()
        probe, moved = fit_probe(features, labels, 3), fit_probe(1000 * features + 500, labels, 3)
        with torch.no_grad():
            torch.testing.assert_close(moved(1000 * features + 500), probe(features), rtol=0, atol=0.02)

    def test_a_seed_decides_and_the_global_state_does_not(self):
        features, labels = separable()
        first = fit_probe(features, labels, 3, seed=1, epochs=2)
        state = torch.get_rng_state()
        torch.rand(5)
        again = fit_probe(features, labels, 3, seed=1, epochs=2)
        other = fit_probe(features, labels, 3, seed=2, epochs=2)
        assert first.weight.equal(again.weight)
        assert first.bias.equal(again.bias)
        assert not first.weight.equal(other.weight)
        torch.set_rng_state(state)
        fit_probe(features, labels, 3, epochs=1)
        assert torch.get_rng_state().equal(state)

    def test_a_constant_channel_is_ignored_later_too(self):
        features, labels = separable()
        features[:, 7] = 2.0
        probe = fit_probe(features, labels, 3)
        assert probe.weight.isfinite().all()
        assert probe.weight[:, 7].abs().max() == 0

    def test_half_precision_features(self):
        features, labels = separable()
        probe = fit_probe(features.bfloat16(), labels, 3, batch=50)
        assert probe.weight.dtype == torch.float32
        with torch.no_grad():
            assert probe(features).argmax(1).equal(labels)

    def test_one_step_equals_adamw_by_hand(self):
        features, labels = torch.randn(10, 4), (torch.arange(10) > 6).long()
        probe = fit_probe(features, labels, 2, seed=3, epochs=1, batch=10, rate=0.1, weight_decay=0.5)
        start = 0.01 * torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
        x = (features - features.mean(0)) / features.std(0)
        error = (x @ start.T).softmax(1) - torch.nn.functional.one_hot(labels)
        gradient, bias_gradient = error.T @ x / 10, error.mean(0)
        weight = start * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
        bias = -0.1 * bias_gradient / (bias_gradient.abs() + 1e-8)
        torch.testing.assert_close(probe.weight.detach(), weight / features.std(0), rtol=1e-4, atol=1e-6)
        folded = bias - weight / features.std(0) @ features.mean(0)
        torch.testing.assert_close(probe.bias.detach(), folded, rtol=1e-4, atol=1e-5)


class TestBoundaryBand:
    @pytest.mark.parametrize("radius", [0, 1, 3])
    def test_equals_the_loop(self, radius):
        labels = torch.zeros(2, 11, 13, dtype=torch.int64)
        labels[0, 4:, 5:] = 2
        labels[0, 9, 12] = 255
        labels[1, 0, 0] = 1
        band = boundary_band(labels, radius)
        for b in range(2):
            for y in range(11):
                for x in range(13):
                    around = labels[b, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
                    assert band[b, y, x] == bool((around != labels[b, y, x]).any()), (b, y, x)

    def test_one_label_has_no_edge(self):
        assert not boundary_band(torch.full((1, 9, 9), 7)).any()

    def test_labels_below_zero(self):
        labels = torch.tensor([[[-1, -1, 5, 5, 5, 5]]])
        assert boundary_band(labels, 1).tolist() == [[[False, True, True, False, False, False]]]


class TestScore:
    def test_by_hand(self):
        # Label 0 is taken for 0 three times and for 1 once, label 1 for 1 twice and for 2 once.
        label = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 255, -1]]])
        prediction = torch.tensor([[[0, 0, 0, 1, 1, 1, 2, 0, 1]]])
        scores = score([(prediction, label)], 4, radius=1)
        assert scores.per_class[:3] == pytest.approx((75.0, 50.0, 0.0))
        assert math.isnan(scores.per_class[3])
        assert scores.miou == pytest.approx((75 + 50 + 0) / 3)
        assert scores.accuracy == pytest.approx(100 * 5 / 7)
        # The band: columns 3 and 4 at the edge of 0 and 1, column 6 beside what does not count.
        assert scores.boundary_miou == pytest.approx((0 + 100 / 3 + 0) / 3)

    def test_pairs_add_up(self):
        labels, predictions = torch.randint(4, (3, 6, 7)), torch.randint(4, (3, 6, 7))
        together = score([(predictions, labels)], 4)
        apart = score([(predictions[i : i + 1], labels[i : i + 1]) for i in range(3)], 4)
        assert together == apart
        total = sum(int(((predictions == c) & (labels == c)).sum()) for c in range(4))
        assert together.accuracy == pytest.approx(100 * total / labels.numel())
        for c in range(4):
            union = int(((predictions == c) | (labels == c)).sum())
            expected = 100 * int(((predictions == c) & (labels == c)).sum()) / union
            assert together.per_class[c] == pytest.approx(expected)

    def test_a_class_that_is_only_predicted_counts_as_wrong(self):
        scores = score([(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]))], 3)
        assert scores.per_class[0] == 50
        assert scores.per_class[2] == 0
        assert scores.miou == 25

    def test_nothing_labelled(self):
        scores = score([(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255))], 3)
        assert math.isnan(scores.miou)
        assert math.isnan(scores.accuracy)
        assert math.isnan(scores.boundary_miou)

    def test_refuses(self):
        zeros = torch.zeros(1, 2, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match="predictions from 0 to 3, expected classes from 0 to 2"):
            score([(torch.tensor([[[0, 3]]]), torch.zeros(1, 1, 2, dtype=torch.int64))], 3)
        with pytest.raises(ValueError, match="predictions from -1 to 0"):
            score([(zeros - torch.eye(2, dtype=torch.int64), zeros)], 3)
        with pytest.raises(ValueError, match=r"predictions \(1, 2, 2\) for labels \(1, 2, 3\)"):
            score([(zeros, torch.zeros(1, 2, 3, dtype=torch.int64))], 3)
