"""Reading and writing LoftUp weights: every layout in circulation, from a file, a folder or a Hub repository."""

import functools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoftUpError, one_line, translate
from ..files import write_atomically
from ..networks import build_network, build_norm
from ..networks.config import Config, UniversalConfig, read_config
from ..pictures import IMAGE_SUFFIXES
from ..version import __version__
from .catalogue import PUBLISHED
from .hub import Repository, upload
from .names import CONFIG, PICKLE, SAFETENSORS, WeightsName

__all__ = ["StateDict", "StoredWeights", "check_fit", "model_card", "push", "read_state", "read_weights", "save"]

METADATA_KEY = "loftup_config"
UNIVERSAL_KEY = "upsampler.gate.weight"  # only the universal network has it, and that has no channel norm
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that the networks compute in
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class StoredWeights:
    """Weights as a file has them."""

    config: Config  # of the network
    state: StateDict  # keys upsampler.* and channelnorm.*, not yet compared with the network's
    file: Path  # that they come from


def read_weights(
    source: WeightsName,
    *,
    revision: str | None = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    channel_norm: Literal["identity"] | None = None,
) -> StoredWeights:
    """Read the weights that a name stands for; arguments and errors are those of :meth:`LoftUp.from_pretrained`."""
    if channel_norm not in (None, "identity"):
        raise ValueError(f'channel_norm must be None or "identity", got {channel_norm!r}')
    checkpoint, path = source.checkpoint, source.path
    if checkpoint is not None and checkpoint.in_package:
        if revision is not None:
            reason = "comes with the package and has no revisions"
            raise LoftUpError(f"{checkpoint.name!r} {reason}, got revision={revision!r}; leave it out")
        path = checkpoint.folder
    if source.path is not None:
        if revision is not None:
            raise LoftUpError(
                f"{source.path} is a local {'folder' if source.path.is_dir() else 'file'}, which has no revisions, got "
                f"revision={revision!r}; leave it out"
            )
        if source.path.is_file():
            return _first_complete([source.path], None, channel_norm)
        if not source.path.is_dir():
            raise LoftUpError(f"{source.path} is neither a file nor a folder, but a device, pipe or socket")
    if path is not None:
        where = f"the installed folder {path}" if source.path is None else str(path)
        files, config = _candidates(lambda file: path / file if (path / file).is_file() else None, where)
        return _first_complete(files, config, channel_norm)
    repo = source.repo if checkpoint is None else checkpoint.repo
    assert repo is not None
    hub = Repository(repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if checkpoint is None:
        files, config = _candidates(functools.partial(_fetch, hub), f"the Hub repository {repo!r}")
        return _first_complete(files, config, channel_norm)
    if (file := hub.fetch(checkpoint.file)) is None:
        raise LoftUpError(f"{hub} holds no {checkpoint.file!r}; is the revision right?")
    return _first_complete([file], None, channel_norm, checkpoint.name)


def _fetch(hub: Repository, file: str) -> Path | None:
    """``hub.fetch`` for what might have been meant as a folder."""
    try:
        return hub.fetch(file)
    except LoftUpError as error:
        raise type(error)(f"{error}; and there is no local folder of that name") from None


def _candidates(fetch: Callable[[str], Path | None], where: str) -> tuple[Iterator[Path], dict[str, Any] | None]:
    """Weight files of a folder or repository, fetched one by one as they are asked for, and its config."""
    config: dict[str, Any] | None = None
    if (config_file := fetch(CONFIG)) is not None:
        config = _read_json(config_file)
        if not isinstance(config, dict):
            raise LoftUpError(f"{config_file} holds a {type(config).__name__}, expected a JSON object")
        if "model_type" in config or "architecture" in config:
            kind = config.get("model_type") or config.get("architecture")
            published = f"published LoftUp weights: {', '.join(PUBLISHED)}"
            raise LoftUpError(f"{where} holds a {kind!r} model, not LoftUp weights; {published}")

    def files() -> Iterator[Path]:
        empty = True
        for file in filter(None, map(fetch, (SAFETENSORS, PICKLE))):
            empty = False
            yield file
        if empty:
            raise LoftUpError(f"{where} holds neither {SAFETENSORS} nor {PICKLE}")

    return files(), config


def _read_json(file: Path) -> Any:
    """The content of a JSON file; LoftUpError where it is none."""
    # ValueError: also text that is not UTF-8, and whole numbers of thousands of digits.
    failures = (ValueError, RecursionError, OSError)
    with translate(failures, lambda error: f"{file} is not valid JSON ({error}); fetch or write it anew"):
        return json.loads(file.read_text("utf-8"))


def _first_complete(
    files: Iterable[Path],
    config: dict[str, Any] | None,
    channel_norm: Literal["identity"] | None,
    backbone: str = "",
) -> StoredWeights:
    """Take the first file that has (or, on request, lacks) the channel norm."""
    others = []
    for file in files:
        state, in_header = read_state(file)
        settings = in_header or ({} if config is None else _described(config, f"the {CONFIG} beside {file}"))
        if settings.get("values") == "features" or UNIVERSAL_KEY in state:
            if channel_norm:
                got = f"got channel_norm={channel_norm!r}"
                raise LoftUpError(f"{file} is of a network without a channel norm, {got}; leave it out")
            return _stored(state, settings, file, backbone)
        norm = channel_norm or settings.get("channel_norm", "layer")
        if any(key.startswith("channelnorm.") for key in state) == (norm == "layer"):
            return _stored(state, {**settings, "channel_norm": norm}, file, backbone)
        others.append(str(file))
    if channel_norm == "identity":
        raise LoftUpError(f'{", ".join(others)} has a channel norm; leave channel_norm="identity" out')
    raise LoftUpError(
        f"{', '.join(others)} lacks the channel norm (channelnorm.norm.weight and .bias): it holds the inner module "
        f"alone, and loading it would give wrong features without an error. Use the repository's {PICKLE}; or, if your "
        'features are normalised already, say channel_norm="identity"'
    )


def _described(values: Any, where: str) -> dict[str, Any]:
    """All architecture fields, from those that a file holds beside what :func:`save` adds."""
    try:
        fields = {key: value for key, value in values.items() if key not in ("library_name", "loftup_version")}
        return read_config(fields).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise LoftUpError(f"{where} does not describe a LoftUp network: {error}") from error


def read_state(file: Path) -> tuple[StateDict, dict[str, Any] | None]:
    """Read any layout in circulation into the keys ``upsampler.*`` and ``channelnorm.*``.

    Returns:
        The state dict, and the config that our own safetensors files and checkpoints carry (None for others).

    Raises:
        LoftUpError: the file is truncated, damaged, unsafe, a picture, or not a state dict of plain tensors.
    """
    if file.suffix.lower() in IMAGE_SUFFIXES:
        raise LoftUpError(
            f"{file} is a picture, not LoftUp weights; load the weights by name or path, then call up(features, image)"
        )
    config: dict[str, Any] | None = None
    if file.suffix == ".safetensors":
        state, config = _read_safetensors(file)
    else:
        state = _read_pickle(file)
        if METADATA_KEY in state:
            config = _described(state[METADATA_KEY], f"the config in {file}")
    if isinstance(state.get("state_dict"), dict):
        # A training checkpoint also holds the backbone (model.0.*), losses and downsamplers: not ours to load.
        entries = {key: value for key, value in state["state_dict"].items() if isinstance(key, str)}
        renamed = {re.sub(r"^model\.1\.norm\.", "channelnorm.norm.", key): value for key, value in entries.items()}
        state = {key: value for key, value in renamed.items() if key.startswith(("upsampler.", "channelnorm."))}
        if not state:
            kind = "a training checkpoint without upsampler.* entries"
            raise LoftUpError(f"{file} is {kind}; its keys begin {_some(entries)}")
    if strangers := [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise LoftUpError(f"{file} is not a state dict of tensors: {_some(strangers)} hold other things")
    _check_tensors(state, file)
    if state and not any(key.startswith(("upsampler.", "channelnorm.")) for key in state):
        state = {f"upsampler.{key}": value for key, value in state.items()}
    return state, config


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        # The last two: a name that is not UTF-8, a dtype that this PyTorch does not have.
        raise LoftUpError(_unreadable(file, error)) from error
    if METADATA_KEY not in metadata:
        return state, None
    with translate((ValueError, RecursionError), lambda error: f"the config in {file} is damaged: {error}"):
        values = json.loads(metadata[METADATA_KEY])
    return state, _described(values, f"the config in {file}")


def _read_pickle(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            _check_sums(stream)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LoftUpError(
            f"{file} ({file.stat().st_size} bytes) is truncated or holds more than tensors; loftup never unpickles "
            "arbitrary objects. Fetch it anew, or save its tensors alone: torch.save(model.state_dict(), ...) "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise LoftUpError(_unreadable(file, error)) from error
    if not isinstance(state, dict):
        raise LoftUpError(f"{file} holds a {type(state).__name__}, expected a state dict")
    return state


def _check_sums(stream: IO[bytes]) -> None:
    """Raise BadZipFile where content differs from its checksum, which PyTorch does not read."""
    if stream.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # 0: PyTorch was told to write none
                    with archive.open(entry) as content:
                        while content.read(2**20):
                            pass
    stream.seek(0)


def _check_tensors(state: StateDict, where: "str | Path") -> None:
    """Raise LoftUpError unless all tensors are plain ones with memory of their own."""
    for key, value in state.items():
        kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        kind = "meta" if value.is_meta else "nested" if value.is_nested else kind
        if kind != "strided":
            raise LoftUpError(f"{key} in {where} is a {kind} tensor, expected a dense one; save the weights as such")
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.numel() * value.itemsize for value in state.values()) > sum(storages.values()):
        raise LoftUpError(f"tensors of {where} are expanded or share their memory; save value.clone() of each")


def _unreadable(file: Path, error: Exception) -> str:
    size = file.stat().st_size if file.exists() else 0
    return f"cannot read {file} ({size} bytes): truncated or damaged ({one_line(error)}); fetch or save it anew"


def _some(keys: Any, most: int = 8) -> str:
    keys = list(keys)
    return ", ".join(map(str, keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def infer_config(state: StateDict) -> dict[str, Any]:
    """Read the architecture off the tensors' shapes; heads cannot be seen and stay at the published 4.

    Of the universal network heads can be seen, but not the radius, which stays at the default. KeyError: tensors that
    tell are missing.
    """
    if UNIVERSAL_KEY in state:
        heads, codes = state[UNIVERSAL_KEY].shape
        width = len(state["upsampler.encoder.down.weight"])
        return {"values": "features", "heads": heads, "code_width": codes // (1 + heads), "encoder_width": width}
    channels, width = state["upsampler.ca_transformer.layers.0.1.net.1.weight"].shape
    blocks = {match[1] for key in state if (match := re.match(r"upsampler\.ca_transformer\.layers\.(\d+)\.", key))}
    frequencies = state["upsampler.fourier_feat.1.biases"].shape[-1]
    fields: dict[str, Any] = {"channels": channels, "blocks": len(blocks), "image_frequencies": frequencies}
    if "upsampler.lr_pe" in state:
        return {**fields, "position_code": "learnable", "lr_size": round(state["upsampler.lr_pe"].shape[1] ** 0.5)}
    return {**fields, "position_code": "sine", "feature_frequencies": (width - channels) // 4}


def _stored(state: StateDict, settings: dict[str, Any], file: Path, backbone: str) -> StoredWeights:
    try:
        found = infer_config(state)
        config = read_config({**found, **settings})
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise LoftUpError(
            f"{file} does not hold a LoftUp network ({error}); its keys are {_some(state) or 'none at all'}"
        ) from error
    # Before a network is built: one of 20 000 blocks takes a minute and gigabytes.
    said = config.to_dict()
    if wrong := [f"{name}={said[name]}, tensors for {seen}" for name, seen in found.items() if said[name] != seen]:
        raise LoftUpError(f"{file} does not fit this LoftUp network: its config says {'; '.join(wrong)}")
    return StoredWeights(replace(config, backbone=backbone) if backbone else config, state, file)


def check_fit(state: StateDict, expected: StateDict, where: "str | Path") -> None:
    """Raise LoftUpError unless the weights are finite ones in one dtype for a network with the state ``expected``."""
    differences = {"missing": set(expected) - set(state), "unexpected": set(state) - set(expected)}
    problems = [f"{name}: {_some(sorted(keys))}" for name, keys in differences.items() if keys]
    for key in expected:
        if key in state and state[key].shape != expected[key].shape:
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}")
    if problems:
        raise LoftUpError(f"{where} does not fit this LoftUp network: {'; '.join(problems)}")
    dtypes = {value.dtype for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise LoftUpError(
            f"{where} holds tensors of {', '.join(sorted(map(str, dtypes)))}, expected one floating dtype for all but "
            "num_batches_tracked, of 16, 32 or 64 bits; convert them, for example with up.to(torch.float32), and save "
            "anew"
        )
    for key, value in state.items():
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise LoftUpError(f"{key} in {where} holds {count} values that are not finite; use weights from before")
        if key.endswith("running_var") and bool((value < 0).any()):  # whose root would not be finite
            raise LoftUpError(f"{key} in {where} holds variances below 0; use weights from before")


def save(config: Config, state: StateDict, folder: "str | os.PathLike[str]") -> None:
    """Write ``model.safetensors``, with the config in its header, and ``config.json``, each whole or not at all.

    The same tensors give the same bytes. Raises as :meth:`loftup.LoftUp.save_pretrained` does.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder).expanduser()
    fields = config.to_dict()
    with torch.device("meta"):
        network = nn.ModuleDict({"upsampler": build_network(config), "channelnorm": build_norm(config)})
    expected = network.state_dict()
    if state.keys() != expected.keys():
        raise LoftUpError(
            f"modules of this LoftUp were replaced ({_some(sorted(state.keys() ^ expected.keys()), 2)}), and their "
            "weights could not be loaded; merge the LoRA first (peft: merge_and_unload()), or put the modules back"
        )
    _check_tensors(state, "this LoftUp")
    check_fit(state, expected, "this LoftUp")
    _check_replaceable(folder)
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    # One entry of metadata: safetensors writes several in any order.
    write_atomically(folder / SAFETENSORS, to_bytes(plain, {METADATA_KEY: json.dumps(fields)}))
    content = {**fields, "library_name": "loftup", "loftup_version": __version__}
    write_atomically(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def _check_replaceable(folder: Path) -> None:
    """Raise LoftUpError where a folder holds weights or a config that are neither loftup's nor LoftUp weights."""
    for file in filter(os.path.lexists, (folder / CONFIG, folder / SAFETENSORS)):
        with translate(LoftUpError, f"{file} is not loftup's, and is not replaced; name another folder, or remove it"):
            if file.name == SAFETENSORS:
                read_weights(WeightsName("", path=file))
                continue
            values = _read_json(file)
            if isinstance(values, dict) and values.get("library_name") == "loftup":
                return
            _described(values, "")


def push(config: Config, state: StateDict, repo: str, *, private: bool, token: str | None, commit_message: str) -> str:
    """Upload weights, config and a model card to the Hub; see :meth:`loftup.LoftUp.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save(config, state, folder)
        write_atomically(Path(folder) / "README.md", model_card(config, repo).encode())
        return upload(folder, repo, private=private, token=token, commit_message=commit_message)


def model_card(config: Config, repo: str) -> str:
    """README.md of a Hub repository: what the weights are for and how to use them."""
    universal = isinstance(config, UniversalConfig)
    backbone = config.backbone or ("any vision backbone" if universal else "a vision backbone")
    channels = "C" if universal else str(config.channels)
    width = "any C" if universal else f"C = {channels}"
    return f"""---
library_name: loftup
pipeline_tag: image-feature-extraction
tags: [feature-upsampling, loftup]
---

# LoftUp for {backbone}

Upsamples features of {backbone} ({width}) to any resolution, guided by the image.

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
