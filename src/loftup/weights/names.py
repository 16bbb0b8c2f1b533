"""The meaning of a name: the one place that turns it into weights of the catalogue, a file, or a Hub repository."""

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoftUpError, translate
from ..files import stamp
from ..pictures import IMAGE_SUFFIXES
from .aliases import TIMM_NAMES, is_open_clip
from .catalogue import ANY, CATALOGUE, IN_PACKAGE, PUBLISHED, Checkpoint, find_checkpoint, known_names

__all__ = ["CONFIG", "PICKLE", "SAFETENSORS", "WeightsName", "in_package", "resolve", "resolve_backbone"]

SAFETENSORS, PICKLE, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"


@dataclass(frozen=True)
class WeightsName:
    """The weights that a name stands for: of the catalogue, or a local path, or a Hub repository."""

    asked: str  # the name as it was given
    checkpoint: Checkpoint | None = None  # of the catalogue
    path: Path | None = None  # of a file or folder
    repo: str | None = None  # id of a Hub repository
    # A sentence that says that "any" takes the place of missing weights, and why; "" where it does not.
    substitute: str = ""
    shadowed: str = ""  # a sentence that says that a local folder hides the Hub repository of its name; or ""

    def identity(self) -> str:
        """Tell these weights from others, for metadata: a name as it is, files with size and time."""
        if self.checkpoint is not None and self.checkpoint.in_package:
            note = " for want of its own" if self.substitute else ""
            return f"{self.checkpoint.name} {in_package(self.checkpoint.folder)}{note}"
        if self.path is None:
            return self.asked
        files = [self.path / name for name in (SAFETENSORS, PICKLE, CONFIG)] if self.path.is_dir() else [self.path]
        return " ".join([self.path.resolve().name, *(stamp(file) for file in files if file.exists())])


def in_package(folder: Path) -> str:
    """Tell weights in the package from those of another version, as text."""
    return f"in the package, {hashlib.sha256((folder / SAFETENSORS).read_bytes()).hexdigest()[:12]}"


def resolve(source: "str | os.PathLike[str]", strict: bool = False) -> WeightsName:
    """Find what a name or path means; names win over paths, paths over the Hub, a ``Path`` is never a name.

    Args:
        source: a name of the catalogue or of a backbone in it, the name of another backbone in timm, torch.hub or
            open_clip (for which "any" takes the place of weights of its own), a Hub repository id, or a path.
        strict: refuse where "any" would take the place of weights.

    Raises:
        LoftUpError: none of these; or ``strict`` refuses.
        TypeError: neither a string nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"expected a name, a path, or a backbone object (torch.nn.Module), got {type(source).__name__}")
    name, path = os.fspath(source), Path(source)
    if not name:
        raise LoftUpError("the name of the weights is empty; pass one such as 'any', or a path ('.' for this folder)")
    with translate(RuntimeError, f"no such file or folder: {name}: there is no such home folder"):
        path = path.expanduser()
    exists, repository = os.path.exists(path), re.fullmatch(r"[\w.-]+/[\w.-]+", name)  # also for names too long
    if isinstance(source, str):
        if checkpoint := find_checkpoint(name):
            return WeightsName(name, checkpoint=checkpoint)
        if not exists and _is_backbone(name):
            return _any_for(name, f"named {name!r}", strict)
    if exists:
        hidden = isinstance(source, str) and repository and not _looks_like_path(name)
        sentence = f"{name!r} is the local path of that name, not the Hub repository; write './{name}' to say so"
        return WeightsName(name, path=path, shadowed=sentence if hidden else "")
    if not isinstance(source, str) or _looks_like_path(name):
        raise LoftUpError(f"no such file or folder: {name}")
    if repository:
        return WeightsName(name, repo=name)
    raise LoftUpError(_unknown(name))


def resolve_backbone(name: str | None, kind: str, usable: bool, strict: bool = False) -> WeightsName:
    """Find the weights for a backbone object by its name, None where it cannot be known; ``kind`` is its class.

    LoftUpError: there are none, and "any" must not take their place, by ``strict`` or as the object is not ``usable``.
    """
    if name is not None and (checkpoint := find_checkpoint(name)):
        return WeightsName(name, checkpoint=checkpoint)
    subject = f"named {name!r}" if name else f"a {kind} without a recognised name"
    return _any_for(name or kind, subject, strict or not usable)


def _any_for(asked: str, subject: str, strict: bool) -> WeightsName:
    if strict:
        raise LoftUpError(
            f"no published LoftUp weights for this backbone ({subject}); there are weights for "
            f"{', '.join(PUBLISHED)}. If it is one of these under another name, pass that name; for weights of your "
            f"own, pass their path; {ANY!r} is an upsampler for features of any backbone"
        )
    sentence = (
        f"no LoftUp weights of its own for this backbone ({subject}): using {ANY!r}, which takes features of any "
        "backbone. strict=True refuses instead; to train weights for this one, see `loftup train --help`"
    )
    return WeightsName(asked, checkpoint=CATALOGUE[ANY], substitute=sentence)


def _is_backbone(name: str) -> bool:
    """Tell whether a name that is not in the catalogue is that of a backbone: timm's, torch.hub's, open_clip's."""
    if name.startswith(("hf-hub:", "hf_hub:")) or name in TIMM_NAMES:
        return True
    if is_open_clip(name):
        # Where some weights of the model have an upsampler, the tag has to be said.
        return not any(known.startswith(f"{name}/") for known in known_names())
    bare = name.removeprefix("timm/")
    if "/" in bare or _looks_like_path(name):
        return False
    import timm

    architecture, _, tag = bare.partition(".")
    # A tag that timm does not know is a misspelt one, or of a version of timm that is not here.
    return bool(timm.is_model(architecture)) and (not tag or bare in timm.list_pretrained(f"{architecture}.*"))


def _looks_like_path(name: str) -> bool:
    """Tell whether a string can only be meant as a file or folder."""
    suffixes = (".bin", ".safetensors", ".pt", ".pth", ".ckpt", *IMAGE_SUFFIXES)
    return name.lower().endswith(suffixes) or name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1


def _unknown(name: str) -> str:
    import timm

    names = {name.lower(): name for name in [*timm.list_models(), *known_names()]}
    near = [names[match] for match in difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.6)]
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"unknown LoftUp weights {name!r}; {meant}In the package: {', '.join(IN_PACKAGE)} ({ANY!r} takes features of "
        f"any backbone). Published: {', '.join(PUBLISHED)}. A Hub repository is written 'user/repo', a local folder "
        "'./folder'"
    )
