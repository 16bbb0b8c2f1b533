"""Means within regions, summed on the way: equal to those over the dense map, whatever is cut where."""

import copy
import os

import pytest
import torch
from material import FARSIGHTED, LEARNABLE, SINE, inputs, randomised, universal

from loftup import LoftUp, LoftUpError, Upsampled, load_backbone
from loftup.inference import regions as module
from loftup.inference.canvas import Canvas

MIB = 2**20
MAKERS = {
    "loftup": lambda: randomised(SINE),
    "learnable": lambda: randomised(LEARNABLE),
    "any": universal,
    "farsighted": lambda: universal(heads=3, radius=3, **FARSIGHTED),
}
MAKE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def means(dense, masks):
    """Over a dense map (B, C, H, W), in float64."""
    masks = masks.double().expand(len(dense), *masks.shape[-3:])
    sums = torch.einsum("bchw,bnhw->bnc", dense.double(), masks)
    return sums / masks.sum((-2, -1))[..., None]


def scattered(*shape, share=0.3):
    """Masks of pixels here and there, and one of a single pixel."""
    masks = torch.rand(*shape) < share
    masks[..., 0, :, :] = False
    masks[..., 0, -1, -1] = True
    return masks


@MAKE
@pytest.mark.parametrize("size", [None, (20, 57), (70, 46)])
@pytest.mark.parametrize("memory", [None, 4 * MIB])
def test_they_are_the_means_over_the_dense_map(make, size, memory):
    up, (features, image) = make(), inputs(2)
    masks = scattered(2, 4, *(size or (33, 46)))
    with torch.inference_mode():
        dense = up(features, image, size)
        for given in (masks, masks.float() * torch.rand(masks.shape)):
            found = up.regions(features, image, given, memory=memory)
            assert found.shape == (2, 4, 24)
            assert (found - means(dense, given)).abs().max() < 1e-5


@MAKE
def test_several_bands_and_threads_give_the_same(make, monkeypatch):
    up, (features, image) = make(), inputs(1, (6, 8), (150, 131))
    masks, boxes = scattered(1, 3, 150, 131), []
    paint = module.Regions.paint
    monkeypatch.setattr(module.Regions, "paint", lambda self, *rest: boxes.append(rest[1]) or paint(self, *rest))
    monkeypatch.setattr(module, "AT_ONCE", 5000)  # regions one after another
    threads = torch.get_num_threads()
    with torch.inference_mode():
        expected = means(up(features, image), masks)
        for count, memory in ((1, 8 * MIB), (2, None)):
            torch.set_num_threads(count)
            try:
                boxes.clear()
                found = up.regions(features, image, masks, memory=memory)
            finally:
                torch.set_num_threads(threads)
            assert (found - expected).abs().max() < 1e-5
            assert len(boxes) > 1


@MAKE
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16, torch.uint16])
def test_labels_are_masks_of_their_own(make, dtype):
    up, (features, image) = make(), inputs(2)
    labels = torch.randint(0, 6, (2, 33, 46))
    labels[labels == 3] = 0  # nobody's
    labels[:, :4] = 255 if dtype == torch.uint8 else 5
    with torch.inference_mode():
        found = up.regions(features, image, labels.to(dtype))
        expected = means(up(features, image), labels[:, None] == torch.arange(6)[:, None, None])
        assert found.shape == (2, 6, 24)
        assert found[:, 3].isnan().all()
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5, equal_nan=True)
        more = up.regions(features, image, labels.to(dtype), count=8)
        assert more.shape == (2, 8, 24)
        assert more[:, 6:].isnan().all()


def test_negative_labels_and_one_map_for_all():
    up, (features, image) = universal(), inputs(2)
    labels = torch.randint(-3, 4, (33, 46))
    with torch.inference_mode():
        found = up.regions(features, image, labels)
        expected = means(up(features, image), (labels == torch.arange(4)[:, None, None])[None])
        assert (found - expected).abs().max() < 1e-5
        assert up.regions(features, image, torch.full((33, 46), -1)).shape == (2, 0, 24)
        masks = scattered(3, 33, 46)
        assert (up.regions(features, image, masks) - means(up(features, image), masks[None])).abs().max() < 1e-5


def test_masks_of_another_size_are_brought_to_the_map():
    up, (features, image) = universal(), inputs()
    labels = torch.randint(0, 3, (1, 66, 92))
    with torch.inference_mode():
        dense = up(features, image)
        masks = labels[:, None] == torch.arange(3)[:, None, None]
        found = up.regions(features, image, masks, (33, 46))
        quarters = masks.float().view(1, 3, 33, 2, 46, 2).mean((3, 5))
        assert (found - means(dense, quarters)).abs().max() < 1e-5
        found = up.regions(features, image, labels, size=(33, 46))
        assert (found - means(dense, masks[..., 1::2, 1::2])).abs().max() < 1e-5


@MAKE
def test_dtypes_and_what_is_no_inference_tensor(make):
    up, (features, image) = make(), inputs()
    masks = scattered(1, 2, 33, 46)
    with torch.inference_mode():
        expected = means(up(features, image), masks)
        half = up.regions(features.half(), image, masks)
        wide = up.regions(features.double(), image, masks)
    assert half.dtype == torch.float16
    assert wide.dtype == torch.float64
    assert not half.is_inference()
    assert (half - expected).abs().max() < 0.02
    assert (wide - expected).abs().max() < 1e-5


@MAKE
def test_bfloat16(make):
    up, (features, image) = make(), inputs()
    masks = scattered(1, 2, 33, 46)
    with torch.inference_mode():
        expected = means(up.bfloat16()(features, image), masks)
        assert (up.regions(features, image, masks) - expected).abs().max() < 1e-5


def test_networks_with_hooks_or_replaced_parts():
    for make in (MAKERS["loftup"], MAKERS["any"]):
        up, (features, image) = make(), inputs()
        seen = []
        next(up.upsampler.children()).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        masks = scattered(1, 2, 33, 46)
        with torch.inference_mode():
            expected = means(up(features, image), masks)
            assert (up.regions(features, image, masks) - expected).abs().max() < 1e-5
        assert seen


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="needs Triton's interpreter, or a GPU")
@pytest.mark.parametrize("make", [MAKERS["loftup"], MAKERS["any"]], ids=["loftup", "any"])
def test_triton(make):
    pytest.importorskip("triton")
    up, (features, image) = make(), inputs(1, (2, 3), (8, 10))
    masks = scattered(1, 2, 8, 10)
    with torch.inference_mode():
        expected = means(up(features, image, backend="triton"), masks)
        assert (up.regions(features, image, masks, backend="triton") - expected).abs().max() < 1e-5


def test_the_map_never_exists_and_empty_boxes_are_not_computed(monkeypatch):
    up, (features, image) = randomised(SINE), inputs(1, (6, 8), (150, 131))
    monkeypatch.setattr(Canvas, "_open", lambda *_: pytest.fail("a map was made"))
    written = []
    paint = module.Regions.paint

    def counted(self, index, box, write, arithmetic):
        paint(self, index, box, lambda target: (written.append(box), write(target)), arithmetic)

    monkeypatch.setattr(module.Regions, "paint", counted)
    masks = torch.zeros(1, 1, 150, 131, dtype=torch.bool)
    masks[..., 70:72, 60:64] = True
    with torch.inference_mode():
        up.regions(features, image, masks, memory=4 * MIB)
    assert written
    assert sum((bottom - top) * (right - left) for top, left, bottom, right in written) < 150 * 131 / 3


def test_empty_batches_and_no_masks():
    up, (features, image) = universal(), inputs(0)
    assert up.requires_grad_(False).regions(features, image, torch.zeros(0, 3, 8, 8).bool()).shape == (0, 3, 24)
    features, image = inputs()
    assert up.regions(features, image, torch.zeros(1, 0, 8, 8).bool()).shape == (1, 0, 24)
    assert up.regions(features, image, torch.zeros(1, 2, 8, 8)).isnan().all()


def test_refusals():
    up, (features, image) = universal().requires_grad_(False), inputs(2)
    for masks, text in (
        (torch.zeros(5, 2, 8, 8), r"expected masks \(B, N, H, W\) or \(N, H, W\) with B = 2, got .* of \(5, 2, 8, 8\)"),
        (torch.zeros(8, 8), r"of \(8, 8\); for a single mask: masks\[None\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"expected labels .* for masks of 0 and 1: masks.bool\(\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"expected labels \(B, H, W\) or \(H, W\) with B = 2"),
        (-torch.ones(3, 8, 8), r"negative or not finite; for logits: masks > 0"),
        (torch.zeros(3, 0, 8).bool(), "expected masks"),
    ):
        with pytest.raises(ValueError, match=text):
            up.regions(features, image, masks)
    with pytest.raises(TypeError, match=r"masks must be a tensor, got ndarray; for an array: torch.from_numpy"):
        up.regions(features, image, torch.zeros(3, 8, 8).numpy())
    with pytest.raises(TypeError, match="bool, float weights or integer labels, got torch.complex64"):
        up.regions(features, image, torch.zeros(3, 8, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="labels reach 7, expected less than count=5"):
        up.regions(features, image, torch.full((8, 8), 7), count=5)
    with pytest.raises(ValueError, match="count must be a number of labels, got 1.5"):
        up.regions(features, image, torch.full((8, 8), 7), count=1.5)
    with pytest.raises(ValueError, match=r"count=5 is for a map of labels, but there are 3 masks"):
        up.regions(features, image, torch.zeros(3, 8, 8), count=5)
    with pytest.raises(ValueError, match=r"memory=10 bytes do not hold the smallest piece"):
        up.regions(features, image, torch.zeros(3, 8, 8), memory=10)
    with pytest.raises(ValueError, match=r"up.regions is for inference, but the module is in training mode"):
        copy.deepcopy(up).train().regions(features, image, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="masks require a gradient"):
        up.regions(features, image, torch.zeros(3, 8, 8, requires_grad=True))


def test_backbone_and_upsampler_in_one():
    both = Upsampled(load_backbone("tiny"), LoftUp.from_pretrained("any"))
    image, labels = torch.rand(1, 3, 64, 80), torch.randint(0, 3, (1, 64, 80))
    found = both.regions(image, labels)
    assert (found - both.up.regions(both.backbone(image), image, labels)).abs().max() < 1e-5
    assert found.shape == (1, 3, 192)
    with pytest.raises(LoftUpError, match="up is a Identity; only a LoftUp averages over regions"):
        Upsampled(both.backbone, torch.nn.Identity()).regions(image, labels)
