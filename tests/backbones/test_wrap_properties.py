"""Random models and arguments: wrap finds the map that was put there, or refuses with a sentence."""

import pytest
import torch
from torch import nn

from loftup import LoftUpError, wrap

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
few = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


class Model(nn.Module):
    """A map of random convolutions, kept in a random order among random company."""

    def __init__(self, stride, channels, order, front, behind, inside, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, channels, stride, stride)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.front, self.behind = (nn.Parameter(torch.randn(1, n, channels)) for n in (front, behind))
        self.order, self.inside, self.out = order, inside, nn.Identity()
        self.head = nn.Linear(channels, 5)

    def map(self, image):
        return self.mix(self.stem(image).relu())

    def forward(self, image):
        x = self.map(image)
        if self.order == "nhwc":
            x = x.permute(0, 2, 3, 1)
        elif self.order != "nchw":
            tokens = x.flatten(2).mT
            ends = (part.expand(len(tokens), -1, -1) for part in (self.front, self.behind))
            first, last = ends
            x = torch.cat([first, tokens, last], 1)
            x = x.transpose(0, 1) if self.order == "nbc" else x
        x = self.out(x)
        if not self.inside:
            return {"features": x} if self.order == "nhwc" else x
        return self.head(x.flatten(1).mean(1, keepdim=True).expand(-1, self.head.in_features))


@few
@hypothesis.given(
    stride=st.sampled_from([4, 7, 8, 14, 16, 32]),
    channels=st.integers(3, 9),
    order=st.sampled_from(["nchw", "nhwc", "bnc", "nbc"]),
    front=st.integers(0, 6),
    behind=st.integers(0, 6),
    inside=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_map_is_found_in_whatever_order(stride, channels, order, front, behind, inside, seed):
    model = Model(stride, channels, order, front, behind, inside, seed).eval()
    backbone = wrap(model)
    assert (backbone.channels, backbone.patch_size) == (channels, stride)
    image = torch.randn(2, 3, 5 * stride, 6 * stride)
    torch.testing.assert_close(backbone(image), model.map(image).detach(), atol=1e-5, rtol=1e-4)


@few
@hypothesis.given(
    layer=st.one_of(
        st.none(),
        st.integers(-9, 9),
        st.text("abc.012", max_size=6),
        st.lists(st.integers(-4, 4), max_size=3),
        st.floats(),
    ),
    join=st.booleans(),
    max_side=st.one_of(st.none(), st.integers(-2, 99), st.floats(allow_nan=False), st.booleans()),
    space=st.sampled_from([None, "text", "image", 3]),
    mean=st.one_of(st.none(), st.lists(st.floats(), min_size=2, max_size=4)),
)
def test_arguments_work_or_are_refused(layer, join, max_side, space, mean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 6, 2, 2), nn.Conv2d(6, 6, 1)).eval()
    try:
        backbone = wrap(model, layer=layer, join=join, max_side=max_side, space=space, mean=mean)
    except (LoftUpError, TypeError, ValueError):
        return
    maps = backbone(torch.rand(1, 3, 40, 56))
    for each in maps if isinstance(maps, list) else [maps]:
        assert each.ndim == 4
        assert each.isfinite().all()
