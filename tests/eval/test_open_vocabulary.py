"""Proxy attention against plain loops, texts and their cache, CLIPs of open_clip, perfect features."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small import mean_colours

import loftup
from loftup import LoftUpError
from loftup.eval.colour import label_picture, palette
from loftup.eval.datasets import Dataset, SegmentationSample
from loftup.eval.datasets.synthetic import CLASSES, synthetic
from loftup.eval.oracle import Oracle
from loftup.eval.tasks import open_vocabulary as module
from loftup.eval.tasks.open_vocabulary import METRICS, OpenVocabularyConfig, open_vocabulary, proxy_attention
from loftup.eval.text import OpenClip, embed, templates
from loftup.eval.upsamplers.simple import Interpolation


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFTUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


class Words:
    """A CLIP whose texts are the axes of the words that it knows, and whose dense features are given."""

    def __init__(self, words, dense, name="words"):
        self.words, self.dense, self.name = list(words), dense, name
        self.asked = []

    def texts(self, texts):
        self.asked.append(list(texts))
        found = [next(index for index, word in enumerate(self.words) if word in text) for text in texts]
        return 3 * F.one_hot(torch.tensor(found), len(self.words)).float()


def plain_attention(queries, keys, values, beta, gamma):
    """One picture, one query at a time."""
    keys = F.interpolate(keys[None], values.shape[-2:], mode="bilinear")[0].flatten(1)
    values = values.flatten(1)
    cosines = torch.stack([F.cosine_similarity(query[:, None], keys, dim=0) for query in queries.flatten(1).unbind(1)])
    averaged = []
    for row in (cosines - beta * cosines.mean()) * gamma:
        looked_at = row >= 0 if (row >= 0).any() else row == row.max()
        averaged.append(values[:, looked_at] @ row[looked_at].softmax(0))
    return torch.stack(averaged, 1).view(-1, *queries.shape[-2:])


@pytest.mark.parametrize(("beta", "gamma"), [(1.2, 3.0), (0.5, 20.0), (5.0, 3.0)])
def test_attention_is_that_of_a_plain_loop(beta, gamma, monkeypatch):
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)  # of 54
    queries, keys = torch.rand(2, 5, 6, 9).double(), torch.rand(2, 5, 3, 4).double()
    values = torch.randn(2, 4, 2, 5).double()
    found = proxy_attention(queries, keys, values, beta, gamma)
    expected = [plain_attention(*each, beta, gamma) for each in zip(queries, keys, values, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=1e-5)


def test_a_pixel_takes_the_values_of_the_cells_it_resembles():
    keys = torch.eye(3).view(1, 3, 1, 3)
    queries = torch.tensor([[0.0, 0, 1], [2, 0, 0]]).T.reshape(1, 3, 1, 2)
    values = torch.tensor([10.0, 20, 30]).view(1, 1, 1, 3)
    # Cosines are 0 and 1, their mean 1/3: only what is alike is above 1.2 of it.
    assert proxy_attention(queries, keys, values).flatten().tolist() == [30, 10]


def test_texts_are_means_of_unit_vectors_over_sentences_and_synonyms(cache):
    vectors = {"a cat": [3.0, 0], "cat!": [0, 5.0], "a dog": [0, 1.0], "dog!": [0, 2.0], "a hound": [1.0, 0]}
    vectors["hound!"] = [7.0, 0]
    clip = SimpleNamespace(name="n", texts=lambda texts: torch.tensor([vectors[text] for text in texts]))
    found = embed(clip, ["cat", "dog, hound", "dog"], ["a {}", "{}!"])
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.5**0.5, 0.5**0.5], [0, 1]]))
    assert len(list(cache.iterdir())) == 1


def test_texts_are_kept_by_model_classes_and_sentences(tmp_path):
    clip = Words(["cat", "dog"], None)
    first = embed(clip, ["cat", "dog"], ["a {}"], tmp_path)
    asked = len(clip.asked)
    assert torch.equal(embed(clip, ["cat", "dog"], ["a {}"], tmp_path), first)
    assert len(clip.asked) == asked == 2
    embed(clip, ["dog", "cat"], ["a {}"], tmp_path)
    embed(clip, ["cat", "dog"], ["{}"], tmp_path)
    embed(Words(["cat", "dog"], None, "another"), ["cat", "dog"], ["a {}"], tmp_path)
    assert len(clip.asked) == 6
    assert len(list((tmp_path / "texts").iterdir())) == 4


@pytest.mark.parametrize("sentences", [[], ["a {}", "a photo"]])
def test_sentences_must_have_a_place_for_the_name(sentences):
    with pytest.raises(ValueError, match=r"expected sentences with a \{\} for the class name, got \["):
        embed(Words(["cat"], None), ["cat"], sentences)


def test_templates_have_one_place_for_the_name():
    assert len(templates()) > 10
    assert all(sentence.count("{}") == 1 for sentence in templates())
    assert len(set(templates())) == len(templates())


def test_perfect_proxies_score_100_on_rendered_scenes_and_bilinear_ones_do_not():
    everything = synthetic("open_vocabulary", train=0, val=20, size=128)
    oracle = Oracle(everything, "open_vocabulary", patch_size=8)
    kept = []
    for sample in everything.val:
        # Every class that is seen must have cells of its own for the CLIP to know it by.
        own = (oracle.backbone(sample.image[None] / 255)[0] > 0.99).sum((1, 2)) >= 4
        if own[sample.labels.unique()].all():
            kept.append(sample)
    rendered = Dataset("kept", [], kept[:4], CLASSES)
    oracle = Oracle(rendered, "open_vocabulary", patch_size=8)

    def dense(image):
        return F.one_hot(oracle.backbone(image).argmax(1), len(CLASSES)).movedim(-1, 1)

    config, clip = OpenVocabularyConfig(size=[128, 128], pictures=1), Words(CLASSES, dense)
    perfect = open_vocabulary(oracle.backbone, oracle.upsampler, rendered, config, clip=clip)
    assert len(rendered.val) > 2
    assert list(perfect.metrics) == list(METRICS)
    assert perfect.metrics == {name: [100.0] for name in METRICS}
    assert perfect.pictures[0]["ours"].tobytes() == perfect.pictures[0]["truth"].tobytes()
    assert perfect.details["classes"]["ground"] == {"iou": 100}
    bilinear = open_vocabulary(oracle.backbone, Interpolation("bilinear"), rendered, config, clip=clip)
    assert bilinear.metrics["miou"][0] < 95
    assert bilinear.metrics["boundary_miou"][0] < 85


LABELS = torch.tensor([0, 1]).repeat_interleave(8).expand(16, 16)
IMAGE = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)[LABELS].movedim(-1, 0)
HALVES = Dataset("halves", [], [SegmentationSample("a", IMAGE, LABELS.clone())], ("red", "blue"))


def test_every_pixel_gets_the_class_whose_text_is_nearest_to_its_average():
    seen = []

    def upsampler(features, image, size):
        seen.append(size)
        return F.interpolate(image, size, mode="nearest-exact")

    def dense(image):
        # The cells left of the middle hold what is called blue, and the longer vectors do not win for their length.
        return torch.tensor([[0.1, 9.0], [0.9, 1.0]]).view(1, 2, 1, 2).half()

    config = OpenVocabularyConfig(size=[16, 16], factor=2)
    result = open_vocabulary(mean_colours(4), upsampler, HALVES, config, clip=Words(["red", "blue"], dense))
    assert seen == [(8, 8)]
    assert result.metrics["accuracy"] == [0]
    swapped = label_picture(1 - LABELS, palette(2))
    assert result.pictures[0]["ours"].tobytes() == swapped.tobytes()
    assert result.pictures[0]["truth"].tobytes() == label_picture(LABELS, palette(2)).tobytes()


def test_the_configured_clip_is_loaded(monkeypatch):
    made = []

    def load(name, device):
        made.append((name, device))
        return Words(["red", "blue"], lambda image: torch.ones(1, 2, 2, 2))

    monkeypatch.setattr(module, "OpenClip", load)
    config = OpenVocabularyConfig(size=[16, 16], factor=2, clip="A/b", pictures=0)
    result = open_vocabulary(mean_colours(4), Interpolation("nearest"), HALVES, config)
    assert made == [("A/b", "cpu")]
    assert result.metrics["accuracy"] == [50]
    assert result.pictures == []


def test_an_empty_split_and_nameless_classes_are_refused():
    with pytest.raises(ValueError, match="halves has no validation pictures"):
        open_vocabulary(mean_colours(4), Interpolation("nearest"), replace(HALVES, val=[]))
    with pytest.raises(ValueError, match="halves names no classes"):
        open_vocabulary(mean_colours(4), Interpolation("nearest"), replace(HALVES, classes=()))


@pytest.mark.parametrize(("settings", "got"), [({"size": [336]}, r"\[336\] and 8"), ({"factor": 0}, r"336\] and 0")])
def test_settings_are_checked(settings, got):
    with pytest.raises(ValueError, match=r"size must be \[height, width\] and factor at least 1, got .*" + got):
        OpenVocabularyConfig(**settings)


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip, which makes a small CLIP of random weights instead of loading one."""
    package = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
    text = {"width": 16, "heads": 2, "layers": 1}
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return package.CLIP(24, package.CLIPVisionCfg(**vision), package.CLIPTextCfg(**text), quick_gelu=True)

    monkeypatch.setattr(package, "create_model", create_model)
    return asked


def test_a_clip_of_open_clip(open_clip):
    clip = OpenClip("ViT-B-16/openai")
    assert open_clip == [("ViT-B-16", {"pretrained": "openai", "force_quick_gelu": True})]
    assert clip.name == "ViT-B-16/openai"
    assert not clip.model.training
    image = torch.rand(2, 3, 32, 48)
    dense, backbone = clip.dense(image), loftup.wrap(clip.model)
    assert dense.shape == (2, 24, 2, 3)
    torch.testing.assert_close(dense, backbone(backbone.normalise(image)).detach())
    texts = clip.texts(["a cat", "a dog"])
    assert texts.shape == (2, 24)
    assert not texts.requires_grad
    assert not dense.requires_grad
    torch.testing.assert_close(clip.texts(["a dog"])[0], texts[1])
    assert not torch.allclose(texts[0], texts[1])


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(answers, open_clip, monkeypatch):
    import open_clip as package
    from huggingface_hub import constants

    seen = []

    def create_model(name, **options):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("not there")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("loftup.weights.hub.Repository.answers", lambda self, file: answers)
    monkeypatch.setattr(package, "create_model", create_model)
    with pytest.raises(LoftUpError, match="cannot load the CLIP 'ViT-B-16/openai' of open_clip: not there"):
        OpenClip("ViT-B-16/openai")
    assert seen == [not answers]
    assert constants.HF_HUB_OFFLINE is False


def test_another_clip_keeps_its_activation(open_clip):
    OpenClip("ViT-B-16/laion2b_s34b_b88k")
    assert open_clip[0][1] == {"pretrained": "laion2b_s34b_b88k", "force_quick_gelu": False}


def test_clips_that_cannot_be_loaded(monkeypatch):
    pytest.importorskip("open_clip")
    with pytest.raises(LoftUpError, match="expected a CLIP as MODEL/PRETRAINED, got 'ViT-B-16'; write ViT-B-16/openai"):
        OpenClip("ViT-B-16")
    with pytest.raises(LoftUpError, match="cannot load the CLIP 'no-such-clip/openai' of open_clip: .*no-such-clip"):
        OpenClip("no-such-clip/openai")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(LoftUpError, match=r'texts need open_clip: pip install "loftup\[text\]"'):
        OpenClip("ViT-B-16/openai")
