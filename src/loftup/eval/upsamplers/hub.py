"""Upsamplers of other projects, through their own torch.hub entry points or from local files.

Nothing is loaded before it is asked for.
"""

from typing import Any

import torch

from ...backbones import Backbone
from ...errors import LoftUpError
from ...train.baselines.foreign import ForeignUpsampler, Order, load_foreign
from .registry import Upsampler, register
from .simple import no_argument

# What is run is what was there at these commits; later ones are taken by changing this table.
COMMITS = {
    "wimmerth/anyup": "351807a9c4287368732cc247f26c7c81c9139af4",
    "valeoai/NAF": "ad4e24d2ec32a2fbcccb3beaf7107bc3caa7038a",
    "mhamilton723/FeatUp": "6b5a6c0e91f75e69194807128dcbc39c3084a30d",
    "mwalmer-umd/UPLiFT": "85f09ee4512aacdb7ff194b5137fb65049e0dbe9",
    "andrehuang/loftup": "6620d9bcde4c1af5cddedde6b9aaed6d4174a799",
}


def _load(repository: str, entry: str, **options: Any) -> Any:
    pinned = f"{repository}:{COMMITS[repository]}"
    try:
        # torch.hub's validation looks for the commit among the ends of branches alone.
        return torch.hub.load(pinned, entry, trust_repo=True, skip_validation=True, **options)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        # torch.hub says "Missing dependencies: natten" in a RuntimeError.
        if isinstance(error, ImportError) or "issing dependencies" in str(error):
            remedy = "install NATTEN for your torch (natten.org)" if "natten" in str(error).lower() else "install it"
            raise LoftUpError(f"{entry} of {repository} needs a package that is missing: {error}; {remedy}") from error
        raise LoftUpError(
            f"cannot load {entry} of {repository}: {error}. torch.hub needs a network once; afterwards it takes the "
            f"copy in {torch.hub.get_dir()}"
        ) from error


def _register(name: str, repository: str, order: Order, example: str = "", local: bool = False, **options: Any) -> None:
    """Add an upsampler of torch.hub; with an example, the argument is the entry point, without, the name is.

    One that is also ``local`` takes WEIGHTS@FOLDER as its argument, and goes to torch.hub without.
    """
    pinned = f"github.com/{repository} at {COMMITS[repository][:10]}"

    @register(name, remote=f"{pinned}, or of the folder that you name" if local else pinned)
    def factory(backbone: Backbone, argument: str) -> Upsampler:
        if local and argument:
            return load_foreign(f"{name}:{argument}", backbone.channels)
        if example and not argument:
            raise LoftUpError(
                f"the upsampler {name!r} needs the name of an entry point of {repository}; write for example "
                f"{name}:{example}"
            )
        entry = argument if example else no_argument(name, argument, name)
        network = _load(repository, entry, pretrained=True, **options)
        if order == "uplift":
            network.enable_iterative(4)
        return ForeignUpsampler(network, order)


_register("anyup", "wimmerth/anyup", "anyup", local=True)
_register("anyup_multi_backbone", "wimmerth/anyup", "anyup")
_register("naf", "valeoai/NAF", "naf")
_register("featup", "mhamilton723/FeatUp", "featup", "dinov2")
_register("uplift", "mwalmer-umd/UPLiFT", "uplift", "uplift_dinov2_s14", include_extractor=False)
_register("loftup_published", "andrehuang/loftup", "loftup", "loftup_dinov2s")


@register("jafar", remote="the folder that you name (github.com/PaulCouairon/JAFAR)")
def _jafar(backbone: Backbone, argument: str) -> Upsampler:
    return load_foreign(f"jafar:{argument}", backbone.channels)
