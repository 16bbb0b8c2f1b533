"""Parameters, time and memory."""

import pytest
import torch
from small import mean_colours
from torch import nn

from loftup.eval.tasks import efficiency as module
from loftup.eval.tasks.efficiency import EfficiencyConfig, efficiency
from loftup.eval.upsamplers import create


class Hungry(nn.Module):
    """Has 3 parameters and takes 64 MiB for a moment."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.calls = 0

    def forward(self, features, image, size):
        self.calls += 1
        torch.ones(16 * 2**20).sum()
        return torch.zeros(1, features.shape[1], *size)


def test_costs_are_told():
    up = Hungry()
    result = efficiency(mean_colours(), up, EfficiencyConfig(size=[32, 48], output=[16, 24], rounds=3))
    assert result.metrics["added_parameters"] == [3e-6]
    assert up.calls == 2 * 4 + ("memory" in result.metrics)
    assert list(result.details["rounds"]["seconds"]) == ["round 1", "round 2", "round 3"]
    middle = sorted(result.details["rounds"]["seconds"].values())[1]
    assert result.metrics["seconds"] == [middle]
    assert result.metrics["seconds_with_backbone"][0] > 0
    if "memory" in result.metrics:
        assert 60 < result.metrics["memory"][0] < 200


def test_memory_is_left_out_where_nothing_tells(monkeypatch):
    monkeypatch.setattr(module, "_memory", lambda call, device: None)
    result = efficiency(mean_colours(), create("bilinear", mean_colours()), EfficiencyConfig(size=[16, 16], rounds=1))
    assert "memory" not in result.metrics
    assert result.metrics["added_parameters"] == [0]


def test_settings_are_checked():
    for settings, expected in (({"size": [0, 1]}, "size must be"), ({"rounds": 0}, "rounds must be at least 1")):
        with pytest.raises(ValueError, match=expected):
            EfficiencyConfig(**settings)
