"""Proxy attention and texts, with a CLIP that knows the truth of every cell."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loftup import LoftUpError
from loftup.eval.datasets import Dataset
from loftup.eval.synthetic import CLASSES, Oracle, synthetic
from loftup.eval.tasks.open_vocabulary import OpenVocabularyConfig, open_vocabulary, proxy_attention
from loftup.eval.text import OpenClip, embed, templates
from loftup.eval.upsamplers import create

SIZE = 128


class Clip:
    """Gives every cell of 8 pixels the class that most of its pixels have; texts are those classes."""

    name = "stand-in"

    def __init__(self, oracle):
        self.oracle, self.asked = oracle, []

    def dense(self, image):
        means = F.avg_pool2d(self.oracle.upsampler(None, image, tuple(image.shape[-2:])), 8)
        return F.one_hot(means.argmax(1), len(CLASSES)).movedim(-1, 1)

    def texts(self, texts):
        self.asked += texts
        words = [text.replace(".", "").split() for text in texts]
        return torch.stack([F.one_hot(torch.tensor([name in w for name in CLASSES]).int().argmax(), 8) for w in words])


@pytest.fixture
def scenes():
    """Scenes all of whose classes have a cell of their own."""
    everything = synthetic("open_vocabulary", train=0, val=30, size=SIZE)
    oracle = Oracle(everything, "open_vocabulary", patch_size=8)
    kept = []
    for sample in everything.val:
        cells = oracle.backbone(sample.image[None] / 255)
        own = [i for i in range(len(CLASSES)) if (cells[0, i] > 0.99).sum() >= 4]
        if set(sample.labels.unique().tolist()) <= set(own):
            kept.append(sample)
    return Dataset("kept", [], kept[:5], CLASSES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFTUP_CACHE", str(tmp_path / "cache"))


def test_perfect_proxies_score_100_and_bilinear_ones_do_not(scenes):
    oracle = Oracle(scenes, "open_vocabulary", patch_size=8)
    config = OpenVocabularyConfig(size=[SIZE, SIZE], factor=8)
    best = open_vocabulary(oracle.backbone, oracle.upsampler, scenes, config, clip=Clip(oracle))
    assert best.metrics["miou"] == [100.0]
    assert best.metrics["boundary_miou"] == [100.0]
    assert set(best.details["classes"]) == set(CLASSES)
    assert len(best.pictures) == 4
    bilinear = create("bilinear", oracle.backbone)
    worse = open_vocabulary(oracle.backbone, bilinear, scenes, config, clip=Clip(oracle))
    assert worse.metrics["miou"][0] < 95
    assert worse.metrics["boundary_miou"][0] < 85


def test_attention_is_the_formula(monkeypatch):
    monkeypatch.setattr("loftup.eval.tasks.open_vocabulary.QUERIES_AT_ONCE", 5)
    queries, keys, values = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 3), torch.randn(2, 5, 2, 3)
    made = proxy_attention(queries, keys, values, 1.2, 3.0)
    q, k = F.normalize(queries, dim=1).flatten(2), F.normalize(keys, dim=1).flatten(2)
    similarity = torch.einsum("bcn,bcm->bnm", q, k)
    scaled = 3 * (similarity - 1.2 * similarity.mean((1, 2), keepdim=True))
    lonely = (scaled < 0).all(-1)
    weights = scaled.masked_fill(scaled < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("bnm,bdm->bdn", weights, values.flatten(2))
    nearest = values.flatten(2).gather(2, similarity.argmax(-1)[:, None].expand(-1, 5, -1))
    expected = torch.where(lonely[:, None], nearest, expected).view(2, 5, 4, 4)
    assert torch.allclose(made, expected, atol=1e-5)
    assert made.isfinite().all()


def test_texts_are_averaged_and_kept(tmp_path):
    class Counting:
        name, calls = "counting", 0

        def texts(self, texts):
            self.calls += 1
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    clip = Counting()
    made = embed(clip, ["cat, kitten", "dog"], ["a {}", "{}"], tmp_path)
    unit = F.normalize(torch.tensor([[float(len(t)), 1.0] for t in ("a cat", "cat", "a kitten", "kitten")]), dim=-1)
    assert torch.allclose(made[0], F.normalize(unit.mean(0), dim=0))
    assert torch.equal(embed(clip, ["cat, kitten", "dog"], ["a {}", "{}"], tmp_path), made)
    assert clip.calls == 2
    embed(clip, ["cat"], ["a {}", "{}"], tmp_path)
    assert clip.calls == 3
    assert all("{}" in sentence for sentence in templates())
    assert len(templates()) > 10


def test_an_open_clip_and_what_is_missing(monkeypatch):
    pytest.importorskip("open_clip")
    import open_clip

    model = open_clip.CLIP(
        16,
        {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        quick_gelu=True,
    )
    tokens = lambda texts: torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]] * len(texts))  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, force_quick_gelu: model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: tokens)
    clip = OpenClip("ViT-Small/openai")
    assert clip.dense(torch.rand(1, 3, 32, 48)).shape == (1, 16, 4, 6)
    assert clip.texts(["a", "b"]).shape == (2, 16)
    with pytest.raises(LoftUpError, match="expected a CLIP as MODEL/PRETRAINED, got 'ViT-B-16'"):
        OpenClip("ViT-B-16")

    def fail(*arguments, **options):
        raise RuntimeError("no such model")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(LoftUpError, match="cannot load the CLIP 'ViT-Z/openai' of open_clip: no such model"):
        OpenClip("ViT-Z/openai")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(LoftUpError, match=r'texts need open_clip: pip install "loftup\[eval\]"'):
        OpenClip("ViT-B-16/openai")


def test_settings_and_empty_splits(scenes, monkeypatch):
    with pytest.raises(ValueError, match="factor at least 1"):
        OpenVocabularyConfig(factor=0)
    with pytest.raises(ValueError, match="kept has no validation pictures"):
        open_vocabulary(nn.Identity(), nn.Identity(), Dataset("kept", [], []))

    def fail(name, device):
        raise LoftUpError(f"asked for {name}")

    monkeypatch.setattr("loftup.eval.tasks.open_vocabulary.OpenClip", fail)
    with pytest.raises(LoftUpError, match="asked for ViT-B-16/openai"):
        open_vocabulary(nn.Identity(), nn.Identity(), scenes)
