"""``torch.compile`` with dynamic sizes makes one graph for all of them."""

import pytest
import torch
from material import SINE, new_compiler, randomised, universal
from torch._dynamo.utils import counters

from loftup import LoftUp

SIZES = (((8, 9), (112, 144)), ((16, 16), (224, 224)), ((5, 7), (64, 150)), ((12, 20), (168, 280)), ((10, 6), (99, 61)))


@new_compiler
@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(lambda: randomised(SINE), 2e-3), (universal, 5e-5), (lambda: LoftUp.from_pretrained("any"), 5e-5)],
    ids=["loftup", "any at first", "any"],
)
def test_one_graph_for_five_sizes(make, tolerance):
    torch._dynamo.reset()
    counters.clear()
    up = make().requires_grad_(False)
    compiled = torch.compile(up, dynamic=True, backend="eager", fullgraph=True)
    for (h, w), (height, width) in SIZES:
        features, image = torch.randn(2, 24, h, w), torch.rand(2, 3, height, width)
        with torch.no_grad():
            assert (compiled(features, image) - up(features, image)).abs().max() < tolerance
    assert counters["stats"]["unique_graphs"] == 1
