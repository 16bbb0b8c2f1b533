"""The backbones that come with the package."""

import pytest
import timm
import torch

from loftup import LoftUpError, load_backbone
from loftup.backbones import identify
from loftup.weights.catalogue import TINY_BACKBONES

BLOCKS = {"tiny": 2, "tiny_v1": 6}


@pytest.fixture(scope="module", params=list(TINY_BACKBONES))
def backbone(request):
    return load_backbone(request.param)


def test_it_needs_no_network_and_takes_any_size(backbone, hub):
    again = load_backbone(backbone.name)
    assert not hub.requests
    assert (backbone.channels, backbone.patch_size, backbone.stride) == (192, 16, 16)
    image = backbone.preprocess(torch.randint(0, 255, (3, 96, 160), dtype=torch.uint8))
    with torch.inference_mode():
        features = backbone(image)
        assert torch.equal(again(image), features)
    assert features.shape == (1, 192, 6, 10)
    assert features.dtype == torch.float32
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert identify(backbone) == backbone.name


def test_it_is_small(backbone):
    assert sum(p.numel() for p in backbone.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in TINY_BACKBONES[backbone.name].iterdir()) <= 6_000_000


def test_it_knows_edges_from_flat_ground(backbone):
    """Its weights are trained ones: cells of one side of an edge are alike, those across it are not."""
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    image[0, :, :112], image[1, :, 112:] = 200, 160
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(backbone(backbone.preprocess(image))[0, :, 7], dim=0)  # (C, 14)
    same, across = rows[:, 2] @ rows[:, 4], rows[:, 2] @ rows[:, 11]
    assert same > across + 0.05


def test_it_takes_options_of_its_own(backbone):
    name, last = backbone.name, BLOCKS[backbone.name] - 1
    random = load_backbone(name, weights=False, mean=(0, 0, 0), layer=last)
    assert random.mean == (0, 0, 0)
    assert random.std == (0.5, 0.5, 0.5)
    assert random.layer == last
    with pytest.raises(LoftUpError, match=f"layer {last + 1} is out of range: .* has {last + 1} layers"):
        load_backbone(name, weights=False, layer=last + 1)
    copied = load_backbone(name, weights=TINY_BACKBONES[name] / "model.safetensors")
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(copied(image), backbone(image))


def test_its_blocks_end_where_the_backbone_does(backbone):
    image = torch.rand(1, 3, 64, 96)
    last = load_backbone(backbone.name, layer=-1)
    with torch.inference_mode():
        assert torch.equal(last(image), load_backbone(backbone.name, layer=BLOCKS[backbone.name] - 1)(image))
        assert last(image).shape == backbone(image).shape == (1, 192, 4, 6)


def test_the_one_does_not_take_the_others_weights():
    for name, other in (("tiny", "tiny_v1"), ("tiny_v1", "tiny")):
        with pytest.raises(LoftUpError, match="does not hold weights for"):
            load_backbone(name, weights=TINY_BACKBONES[other] / "model.safetensors")


def test_tiny_is_two_blocks_on_mobilenets_convolutions():
    model = load_backbone("tiny", weights=False).model
    trunk = timm.create_model("mobilenetv2_100", pretrained=False).state_dict()
    convolutions = model.patch_embed.backbone.network.state_dict()
    assert len(model.blocks) == 2
    assert model.pos_embed is None  # positions come from the convolutions' borders
    assert all(trunk[key].shape == value.shape for key, value in convolutions.items())
