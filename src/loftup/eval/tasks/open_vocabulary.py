"""Open-vocabulary segmentation: a CLIP's dense features, averaged where upsampled features agree (paper table 4).

The proxy attention is that of Lan et al., *ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation*,
ECCV 2024.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...backbones import Backbone
from ...train.config.schema import Count, Real, Section, Sides, Text, Whole
from ...train.run.probe import Confusion
from ..colour import label_picture, palette, picture
from ..datasets.base import Dataset, SegmentationSample
from ..datasets.prepare import fit
from ..features import recall
from ..result import Result
from ..text import Clip, OpenClip, embed, templates
from ..upsamplers.registry import Upsampler
from .loops import walk
from .scores import METRICS, class_details, percentages

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "OpenVocabularyConfig", "open_vocabulary", "proxy_attention"]

QUERIES_AT_ONCE = 4096


@dataclass
class OpenVocabularyConfig(Section):
    """Protocol of open-vocabulary segmentation; the defaults are the paper's and ProxyCLIP's.

    Args:
        size: [height, width] that pictures are scaled to cover and cut to.
        factor: output grid, in cells of the backbone's features.
        clip: "MODEL/PRETRAINED" of open_clip.
        beta: share of the mean similarity below which a cell is not looked at.
        gamma: sharpness of the attention.
        boundary: pixels this close to a label edge count for the boundary scores.
        pictures: of the validation split, to show, evenly spread.
        device: to compute on.

    Raises:
        ValueError: a size or the factor is not positive.
    """

    size: Sides = field(default_factory=lambda: [336, 336])
    factor: Count = 8
    clip: Text = "ViT-B-16/openai"
    beta: Real = 1.2
    gamma: Real = 3.0
    boundary: Whole = 3
    pictures: Whole = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1 or self.factor < 1:
            raise ValueError(f"size must be [height, width] and factor at least 1, got {self.size} and {self.factor}")


@torch.no_grad()
def open_vocabulary(
    backbone: Backbone,
    upsampler: Upsampler,
    dataset: Dataset[SegmentationSample],
    config: OpenVocabularyConfig | None = None,
    *,
    clip: Clip | None = None,
) -> Result:
    """Segment the validation split by the names of its classes; nothing is trained.

    A CLIP's dense features are averaged by attention of every pixel's upsampled feature of ``backbone`` (the proxy) to
    the backbone's features on CLIP's grid; each pixel gets the class whose text is nearest. ProxyCLIP averages inside
    CLIP's last block, before its last projection; here the dense features come out of :func:`loftup.wrap` whole, and
    are averaged after it.

    Args:
        backbone: the proxy.
        upsampler: of its features.
        dataset: with classes, whose names are the texts (synonyms separated by commas).
        config: of the protocol.
        clip: to use instead of the config's.

    Returns:
        The metrics of METRICS, one value each as nothing is random; "classes" in the details.

    Raises:
        LoftUpError: the CLIP cannot be loaded.
        ValueError: the validation split is empty, or there are no classes.
    """
    config = config or OpenVocabularyConfig()
    if not len(dataset.val):
        raise ValueError(f"{dataset.name} has no validation pictures")
    dataset.check_classes()
    clip = clip or OpenClip(config.clip, config.device)
    texts = embed(clip, dataset.classes, templates()).to(config.device)
    confusion = Confusion(len(dataset.classes), config.boundary)
    colours = dataset.colours or palette(len(dataset.classes))
    pictures: list[dict[str, Image.Image]] = []
    for sample, show in walk(dataset.val, "segment", config.pictures):
        image, labels = fit(sample.image, sample.labels, size=(config.size[0], config.size[1]))
        image = image[None].to(config.device)
        low = recall(backbone, image)
        size = (low.shape[2] * config.factor, low.shape[3] * config.factor)
        values = clip.dense(image).float()
        mean = proxy_attention(upsampler(low, image, size), low, values, config.beta, config.gamma)
        logits = torch.einsum("bdhw,kd->bkhw", F.normalize(mean, dim=1), texts)
        logits = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
        prediction = logits.argmax(1).cpu()
        confusion.update(prediction, labels[None])
        if show:
            truth, ours = label_picture(labels, colours), label_picture(prediction[0], colours)
            pictures.append({"image": picture(image[0]), "truth": truth, "ours": ours})
    scores = confusion.scores()
    metrics = {name: [value] for name, value in percentages(scores).items()}
    return Result(metrics, {"classes": class_details(dataset.classes, [scores])}, pictures)


def proxy_attention(queries: Tensor, keys: Tensor, values: Tensor, beta: float = 1.2, gamma: float = 3.0) -> Tensor:
    """Average values over the cells that a pixel's feature resembles.

    Similarities are cosines less ``beta`` times their mean, times ``gamma``; what is negative is not looked at. A pixel
    that resembles no cell so much takes the one that it resembles most.

    Args:
        queries: (B, C, H, W), upsampled features of the proxy.
        keys: (B, C, h, w), the proxy's features; interpolated to the values' grid.
        values: (B, D, n, m), dense features of a CLIP.
        beta: see above.
        gamma: see above.

    Returns:
        (B, D, H, W), in float32.
    """
    keys = F.interpolate(keys.float(), values.shape[-2:], mode="bilinear", align_corners=False)
    q = rearrange(F.normalize(queries.float(), dim=1), "b c h w -> b (h w) c")
    k = rearrange(F.normalize(keys, dim=1), "b c n m -> b c (n m)")
    v = rearrange(values.float(), "b d n m -> b (n m) d")
    # The mean of all similarities is the product of the means.
    mean = q.mean(1, keepdim=True) @ k.mean(2, keepdim=True)
    means = []
    for part in q.split(QUERIES_AT_ONCE, dim=1):
        similarity = gamma * (part @ k - beta * mean)
        best = similarity >= similarity.amax(-1, keepdim=True)
        weights = similarity.masked_fill((similarity < 0) & ~best, -torch.inf).softmax(-1)
        means.append(weights @ v)
    return rearrange(torch.cat(means, 1), "b (h w) d -> b d h w", h=queries.shape[2])
