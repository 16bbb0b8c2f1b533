"""A small objective, batches for it, and what its parts make, written out."""

import torch
from material import randomised
from small_config import configured
from torch import nn

from loftup import Backbone, LoftUp, LoftUpConfig, UniversalConfig
from loftup.train.config import TrainConfig
from loftup.train.data.views import Batch, Crop
from loftup.train.objective.multi_view import draw_motions
from loftup.train.objective.objective import Objective

PATCH, CHANNELS, SIZE = 4, 8, 24


def config(*on, **settings):
    made = TrainConfig(batch=2)
    made.data.sizes, made.model.batch_norm = [SIZE], "frozen"
    for index, name in enumerate(on):
        getattr(made.objective, name).weight = 1.0 + index
    return configured(made, **settings)


class Patches(nn.Module):
    """A backbone that counts its calls."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.seen = []

    def forward(self, image):
        self.seen.append(image)
        return self.convolution(image)


def backbone(**options):
    model = Patches()
    settings = {"channels": CHANNELS, "patch_size": PATCH, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), **options}
    made = Backbone(model, model, **settings).eval()
    model.seen.clear()  # of the check's calls
    return made


def batch(size=SIZE, output=SIZE, count=2, **parts):
    image = torch.rand(count, 3, size, size)
    guidance = image if output == size else torch.rand(count, 3, output, output)
    masks = [torch.rand(3, output, output) < 0.3 for _ in range(count)]
    return Batch(step=3, names=["a", "b"][:count], image=image, guidance=guidance, masks=masks, **parts)


def crops(boxes, count=2, size=SIZE):
    masks = [torch.rand(2, size, size) < 0.4 for _ in range(count)]
    return [Crop(image=torch.rand(count, 3, size, size), masks=masks, box=box) for box in boxes]


def objective(made, up=None, model=None):
    return Objective(made, up or randomised(LoftUpConfig(CHANNELS)), model or backbone())


def normalised(term, image):
    """What the backbone gives for images in [0, 1], behind the channel norm, written out."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        return term.up.channelnorm(term.backbones[0].model.convolution((image - mean) / std))


def whole(term, batch):
    """The student's whole output in the mode of use."""
    with torch.no_grad():
        return term.up.upsampler(normalised(term, batch.image), batch.guidance)


def motions(made, step):
    """The views of the multi-view term in a step."""
    term = made.objective.multi_view
    return draw_motions(made.seed, step, term.views, term.zoom, term.shift, term.flip)


def cut(x, box):
    return x if box is None else x[..., box[0] : box[2], box[1] : box[3]]


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


ALL = {"factor": 2, "region": (0, 0, 12, 12)}


def full_batch(count=2, **parts):
    return batch(count=count, crops=crops([(2, 3, 12, 13)], count), large=torch.rand(count, 3, 48, 48), **ALL, **parts)


# Of the universal network


def upsampler():
    """A small universal network whose every weight matters."""
    up = LoftUp(UniversalConfig(heads=2, radius=1, code_width=4, encoder_width=8))
    with torch.no_grad():
        for parameter in up.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return up


def features_config(*on, **settings):
    return configured(config(*on), model__architecture="any", **settings)


def seen(term, image, number=0):
    """The backbone's features of images in [0, 1]."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        return term.backbones[number].model.convolution((image - mean) / std)


def scale(features, like):
    """Features mapped by the means and deviations of ``like``, written out."""
    cells = like.flatten(2)
    return (features - cells.mean(2)[..., None, None]) / cells.std(2, correction=0)[..., None, None]
