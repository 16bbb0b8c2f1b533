"""Finding, reading and writing LoftUp weights: the Hub, local files, every layout in circulation."""

import difflib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import LoftUpError
from ..files import write_atomically
from ..model import LoftUp
from ..networks.config import Config, UniversalConfig, read_config
from .bundled import ANY, BUNDLED
from .catalogue import PUBLISHED, Checkpoint, find_checkpoint, known_names, list_pretrained
from .hub import Repository, upload
from .names import any_for, looks_like_path, name_of, stands_in

__all__ = ["PUBLISHED", "Checkpoint", "find_checkpoint", "list_pretrained", "load_pretrained", "save_pretrained"]

SAFETENSORS, PICKLE, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
METADATA_KEY = "loftup_config"
UNIVERSAL_KEY = "upsampler.gate.weight"  # only networks with values="features" have it, and these have no channel norm
StateDict = dict[str, Tensor]


def load_pretrained(
    name_or_path: "str | os.PathLike[str] | nn.Module",
    *,
    revision: str | None = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype | None = None,
    channel_norm: Literal["identity"] | None = None,
    strict: bool = False,
) -> LoftUp:
    """See :meth:`loftup.LoftUp.from_pretrained`."""
    if channel_norm not in (None, "identity"):
        raise ValueError(f'channel_norm must be None or "identity", got {channel_norm!r}')
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, got {dtype}")
    if isinstance(name_or_path, nn.Module):
        name_or_path = name_of(name_or_path, strict)
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"expected a name, a path, or a backbone object (torch.nn.Module), got {type(name_or_path).__name__}"
        )
    name = os.fspath(name_or_path)
    only_path = not isinstance(name_or_path, str)
    checkpoint = None if only_path else find_checkpoint(name)

    def repository(repo: str) -> Repository:
        return Repository(repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)

    if not only_path and stands_in(name):
        name = any_for(f"named {name!r}", strict, stacklevel=4)
    if not only_path and name in BUNDLED:
        if revision is not None:
            raise LoftUpError(
                f"{name!r} comes with the package and has no revisions, got revision={revision!r}; leave it out"
            )
        folder = BUNDLED[name]
        candidates, config = _candidates(_reader(folder), f"the installed folder {folder}")
        dtype = dtype or torch.float32  # stored as float16 to keep the package small
    elif checkpoint:
        source = repository(checkpoint.repo)
        if (file := source.fetch(checkpoint.file)) is None:
            raise LoftUpError(f"{source} holds no {checkpoint.file!r}; is the revision right?")
        candidates, config = iter([file]), None
    elif (path := Path(name).expanduser()).is_file():
        candidates, config = iter([path]), None
    elif path.is_dir():
        candidates, config = _candidates(_reader(path), str(path))
    elif only_path or looks_like_path(name):
        raise LoftUpError(f"no such file or folder: {name}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        candidates, config = _candidates(_or_no_folder(repository(name)), f"the Hub repository {name!r}")
    else:
        raise LoftUpError(_unknown(name))
    up = _first_complete(candidates, config, channel_norm, checkpoint.name if checkpoint else "")
    return up.to(device=device, dtype=dtype).eval()


def _reader(folder: Path) -> Callable[[str], Path | None]:
    return lambda file: folder / file if (folder / file).is_file() else None


def _or_no_folder(repository: Repository) -> Callable[[str], Path | None]:
    """``repository.fetch`` for what might have been meant as a folder."""

    def fetch(file: str) -> Path | None:
        try:
            return repository.fetch(file)
        except LoftUpError as error:
            raise type(error)(f"{error}; and there is no local folder of that name") from error

    return fetch


def _unknown(name: str) -> str:
    import timm

    lowered = {known.lower(): known for known in [*timm.list_models(), *known_names(), *BUNDLED]}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.6)]
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"unknown LoftUp weights {name!r}; {meant}In the package: {', '.join(BUNDLED)} ({ANY!r} takes features of any "
        "backbone). "
        f"Published: {', '.join(PUBLISHED)}. A Hub repository is written 'user/repo', a local folder './folder'"
    )


def _candidates(fetch: Callable[[str], Path | None], where: str) -> tuple[Iterator[Path], dict[str, Any] | None]:
    """Weight files of a folder or repository, fetched one by one as they are asked for, and its config."""
    config: dict[str, Any] | None = None
    if (config_file := fetch(CONFIG)) is not None:
        try:
            config = json.loads(config_file.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise LoftUpError(f"{config_file} is not valid JSON ({error}); fetch or write it anew") from error
        if not isinstance(config, dict):
            raise LoftUpError(f"{config_file} holds a {type(config).__name__}, expected a JSON object")
        if "model_type" in config or "architecture" in config:
            kind = config.get("model_type") or config.get("architecture")
            raise LoftUpError(
                f"{where} holds a {kind!r} model, not LoftUp weights; published LoftUp weights: {', '.join(PUBLISHED)}"
            )

    def files() -> Iterator[Path]:
        found = False
        for name in (SAFETENSORS, PICKLE):
            if (file := fetch(name)) is not None:
                found = True
                yield file
        if not found:
            raise LoftUpError(f"{where} holds neither {SAFETENSORS} nor {PICKLE}")

    return files(), config


def _first_complete(
    files: Iterator[Path], config: dict[str, Any] | None, channel_norm: Literal["identity"] | None, backbone: str
) -> LoftUp:
    """Build the module from the first file that has (or, on request, lacks) the channel norm."""
    refused = []
    for file in files:
        state, own_config = read_state(file)
        settings = own_config or _settings(config, file)
        if settings.get("values") == "features" or UNIVERSAL_KEY in state:
            if channel_norm:
                raise LoftUpError(
                    f"{file} is of a network without a channel norm, got channel_norm={channel_norm!r}; leave it out"
                )
            return _build(state, settings, file, backbone)
        wanted = channel_norm or settings.get("channel_norm", "layer")
        has_norm = any(key.startswith("channelnorm.") for key in state)
        if has_norm == (wanted == "layer"):
            return _build(state, {**settings, "channel_norm": wanted}, file, backbone)
        refused.append(str(file))
    if channel_norm == "identity":
        raise LoftUpError(f'{", ".join(refused)} has a channel norm; leave channel_norm="identity" out')
    raise LoftUpError(
        f"{', '.join(refused)} lacks the channel norm (channelnorm.norm.weight and .bias): it holds the inner module "
        f"alone, and loading it would give wrong features without an error. Use the repository's {PICKLE}; or, if your "
        'features are normalised already, say channel_norm="identity"'
    )


def _settings(config: dict[str, Any] | None, file: Path) -> dict[str, Any]:
    """Architecture fields of a config.json, without what other programs may have added."""
    if config is None:
        return {}
    try:
        fields = {key: value for key, value in config.items() if key not in ("library_name", "loftup_version")}
        return read_config(fields).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise LoftUpError(f"the {CONFIG} beside {file} does not describe a LoftUp network: {error}") from error


def read_state(file: Path) -> tuple[StateDict, dict[str, Any] | None]:
    """Read any layout in circulation into the keys ``upsampler.*`` and ``channelnorm.*``.

    Returns:
        The state dict, and the config that our own safetensors files and checkpoints carry (None for others).

    Raises:
        LoftUpError: the file is truncated, unsafe, or not a state dict.
    """
    config: dict[str, Any] | None = None
    if file.suffix == ".safetensors":
        state, config = _read_safetensors(file)
    else:
        state = _read_pickle(file)
        if METADATA_KEY in state:
            config = _own_config(state[METADATA_KEY], file)
    if isinstance(state.get("state_dict"), dict):
        # A training checkpoint also holds the backbone (model.0.*), losses and downsamplers: not ours to load.
        nested: dict[str, Any] = state["state_dict"]
        renamed = {re.sub(r"^model\.1\.norm\.", "channelnorm.norm.", key): value for key, value in nested.items()}
        state = {key: value for key, value in renamed.items() if key.startswith(("upsampler.", "channelnorm."))}
        if not state:
            raise LoftUpError(
                f"{file} is a training checkpoint without upsampler.* entries; its keys begin {_some(nested)}"
            )
    if strangers := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise LoftUpError(f"{file} is not a state dict of tensors: {_some(strangers)} hold other things")
    if state and not any(key.startswith(("upsampler.", "channelnorm.")) for key in state):
        state = {f"upsampler.{key}": value for key, value in state.items()}
    return state, config


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            # Cloned, because the tensors are views of the mapped file, which may be replaced while they live.
            state = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoftUpError(_unreadable(file, error)) from error
    if METADATA_KEY not in metadata:
        return state, None
    try:
        return state, _own_config(json.loads(metadata[METADATA_KEY]), file)
    except json.JSONDecodeError as error:
        raise LoftUpError(f"the config in {file} is damaged: {error}") from error


def _own_config(values: Any, file: Path) -> dict[str, Any]:
    try:
        return read_config(values).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise LoftUpError(f"the config in {file} does not describe a LoftUp network: {error}") from error


def _read_pickle(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoftUpError(
            f"{file} ({file.stat().st_size} bytes) is truncated or holds more than tensors; loftup never unpickles "
            "arbitrary objects. Fetch it anew, or save its tensors alone: torch.save(model.state_dict(), ...) "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise LoftUpError(_unreadable(file, error)) from error
    if not isinstance(state, dict):
        raise LoftUpError(f"{file} holds a {type(state).__name__}, expected a state dict")
    return state


def _unreadable(file: Path, error: Exception) -> str:
    size = file.stat().st_size if file.exists() else 0
    return f"cannot read {file} ({size} bytes): truncated or damaged ({error}); fetch or save it anew"


def _some(keys: Any, most: int = 8) -> str:
    keys = list(keys)
    return ", ".join(map(str, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def infer_config(state: StateDict) -> dict[str, Any]:
    """Read the architecture off the tensors' shapes; heads cannot be seen and stay at the published 4.

    With ``values="features"`` heads can be seen, but not the radius, which stays at the default.

    Raises:
        KeyError: the state dict lacks the tensors that tell.
    """
    if UNIVERSAL_KEY in state:
        heads, codes = state[UNIVERSAL_KEY].shape
        width = len(state["upsampler.encoder.down.weight"])
        return {"values": "features", "heads": heads, "code_width": codes // (1 + heads), "encoder_width": width}
    channels, width = state["upsampler.ca_transformer.layers.0.1.net.1.weight"].shape
    blocks = {match[1] for key in state if (match := re.match(r"upsampler\.ca_transformer\.layers\.(\d+)\.", key))}
    fields: dict[str, Any] = {
        "channels": channels,
        "blocks": len(blocks),
        "image_frequencies": state["upsampler.fourier_feat.1.biases"].shape[-1],
    }
    if "upsampler.lr_pe" in state:
        return {**fields, "position_code": "learnable", "lr_size": round(state["upsampler.lr_pe"].shape[1] ** 0.5)}
    return {**fields, "position_code": "sine", "feature_frequencies": (width - channels) // 4}


def _build(state: StateDict, settings: dict[str, Any], file: Path, backbone: str) -> LoftUp:
    try:
        told = "channels" in settings or settings.get("values") == "features"
        fields = settings if told else {**infer_config(state), **settings}
        if backbone:
            fields = {**fields, "backbone": backbone}
        up = LoftUp(read_config(fields))
    except (KeyError, ValueError) as error:
        raise LoftUpError(
            f"{file} does not hold a LoftUp network ({error}); its keys are {_some(state) or 'none at all'}"
        ) from error
    expected = up.state_dict()
    problems = [
        f"missing: {_some(sorted(set(expected) - set(state)))}" if set(expected) - set(state) else "",
        f"unexpected: {_some(sorted(set(state) - set(expected)))}" if set(state) - set(expected) else "",
        *(
            f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ),
    ]
    if any(problems):
        raise LoftUpError(f"{file} does not fit this LoftUp network: {'; '.join(filter(None, problems))}")
    dtypes = {value.dtype for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise LoftUpError(
            f"{file} holds tensors of {', '.join(sorted(map(str, dtypes)))}, expected one floating dtype for all but "
            "num_batches_tracked; convert them, for example with up.to(torch.float32), and save anew"
        )
    up.load_state_dict(state, assign=True)
    return up


def save_pretrained(up: LoftUp, folder: "str | os.PathLike[str]") -> None:
    """See :meth:`loftup.LoftUp.save_pretrained`."""
    from safetensors.torch import save

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    config = up.config.to_dict()
    state = {key: value.detach().cpu().contiguous() for key, value in up.state_dict().items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    write_atomically(folder / SAFETENSORS, save(state, metadata))
    described = {**config, "library_name": "loftup", "loftup_version": __version__}
    write_atomically(folder / CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def push_to_hub(up: LoftUp, repo: str, *, private: bool, token: str | None, commit_message: str) -> str:
    """See :meth:`loftup.LoftUp.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(up, folder)
        write_atomically(Path(folder) / "README.md", model_card(up.config, repo).encode())
        return upload(folder, repo, private=private, token=token, commit_message=commit_message)


def model_card(config: Config, repo: str) -> str:
    """README.md of a Hub repository: what the weights are for and how to use them."""
    universal = isinstance(config, UniversalConfig)
    backbone = config.backbone or ("any vision backbone" if universal else "a vision backbone")
    channels = "C" if universal else str(config.channels)
    described = "any C" if universal else f"C = {channels}"
    return f"""---
library_name: loftup
pipeline_tag: image-feature-extraction
tags: [feature-upsampling, loftup]
---

# LoftUp for {backbone}

Upsamples features of {backbone} ({described}) to any resolution, guided by the image.

```python
from loftup import LoftUp

up = LoftUp.from_pretrained("{repo}")

# (B, {channels}, h, w) and (B, 3, H, W) to (B, {channels}, H, W)
features = up(low_resolution, image, size=(H, W))
```

Architecture: {json.dumps(config.to_dict())}

LoftUp: Huang et al., *LoftUp: Learning a Coordinate-Based Feature Upsampler for Vision Foundation Models*, ICCV 2025,
arXiv 2504.14032. Written by loftup {__version__}.
"""
