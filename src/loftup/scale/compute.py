"""The networks, and what they make of a part's pictures: the rows of its shard."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import Backbone, load_backbone
from ..errors import FAILURES, LoftUpError, one_line, translate
from ..model import LoftUp
from ..pictures import encode
from ..upsampled import Upsampled
from ..weights.names import resolve
from .codec import encode_array
from .decode import Prepared
from .settings import Settings

__all__ = ["Extractor", "backbone_of", "fingerprint", "grid_points", "load_head"]

Row = dict[str, Any]
JPEG_QUALITY = 90


def backbone_of(settings: Settings) -> Backbone:
    """The backbone that settings name, on the CPU."""
    return load_backbone(
        settings.backbone,
        weights=settings.backbone_weights,
        layer=settings.layer,
        mean=settings.mean,
        std=settings.std,
        views=settings.views,
        **settings.options,
    )


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights, by their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_head(file: str) -> nn.Linear:
    """The linear head of a file in safetensors.

    Raises:
        LoftUpError: it holds other tensors than ``weight`` (K, C) or (K, C, 1, 1) and ``bias`` (K).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with translate(SafetensorError, lambda error: f"{file} is no safetensors file: {error}"):
        tensors = load(Path(file).expanduser().read_bytes())
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    weight = tensors.get("weight")
    weight = weight[..., 0, 0] if weight is not None and weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight
    bias = tensors.get("bias")
    if (
        weight is None
        or weight.ndim != 2
        or set(tensors) - {"weight", "bias"}
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise LoftUpError(f"a head is weight (K, C) or (K, C, 1, 1), and perhaps bias (K); {file} holds {found}")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return head.eval().requires_grad_(False)


def grid_points(rows: int, columns: int, height: int, width: int) -> Tensor:
    """Points (rows * columns, 2), (x, y) in pixels: the centres of equal rectangles of a picture, row by row."""
    y = (torch.arange(rows) + 0.5) * height / rows - 0.5
    x = (torch.arange(columns) + 0.5) * width / columns - 0.5
    grid = torch.stack(torch.meshgrid(y.clamp(0, height - 1), x.clamp(0, width - 1), indexing="ij"), -1)
    return grid.flip(-1).reshape(-1, 2)


class Extractor:
    """The networks of some settings on a device, which turn pictures into rows.

    Args:
        settings: of the extraction.
        device: to compute on.

    Attributes:
        networks: names and fingerprints of all weights, as manifests hold them.

    Raises:
        LoftUpError: see :func:`loftup.load_backbone`, :meth:`loftup.LoftUp.from_pretrained`, :func:`load_head`; or the
            networks do not fit each other.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        self.backbone: Backbone = backbone_of(settings).to(self.device)
        self.networks: dict[str, Any] = {"backbone": settings.backbone, "backbone_sha256": fingerprint(self.backbone)}
        self.networks |= {"mean": list(self.backbone.mean), "std": list(self.backbone.std)}
        self.up: LoftUp | None = None
        self.head: nn.Linear | None = None
        name = settings.weights or settings.backbone
        resolve(name, settings.strict)  # refused here; the reader loads it where nothing here upsamples
        self.networks["weights"] = name
        if settings.upsamples:
            dtype = getattr(torch, settings.dtype)
            self.up = LoftUp.from_pretrained(name, device=device, dtype=dtype, strict=settings.strict)
            Upsampled(self.backbone, self.up)  # refuses a pair that does not fit
            self.networks["weights_sha256"] = fingerprint(self.up)
        if settings.head is not None:
            self.head = load_head(settings.head).to(self.device)
            if self.head.in_features != self.backbone.channels:
                raise LoftUpError(
                    f"the head {settings.head} takes {self.head.in_features} channels, the backbone "
                    f"{settings.backbone!r} gives {self.backbone.channels}; give one that was trained on it"
                )
            self.networks["head_sha256"] = fingerprint(self.head)
        if not isinstance(self.backbone.channels, int):
            raise LoftUpError(f"layer={settings.layer!r} gives several maps; expected one layer")

    def rows(self, pictures: Sequence[Prepared]) -> tuple[list[Row], list[Row]]:
        """Rows of the pictures in their order, and rows (key, url, error) of those that failed."""
        results: dict[int, Row] = {}
        errors: dict[int, str] = {index: each.error for index, each in enumerate(pictures) if each.error}
        groups: dict[Any, list[int]] = {}
        for index, each in enumerate(pictures):
            if each.small is not None:
                groups.setdefault((each.small.shape, each.guidance is not None and each.guidance.shape), []).append(
                    index
                )
        for group in groups.values():
            for start in range(0, len(group), self.settings.batch):
                batch = group[start : start + self.settings.batch]
                try:
                    results |= zip(batch, self._batch([pictures[index] for index in batch]), strict=True)
                except FAILURES:  # of one picture, perhaps: each by itself
                    for index in batch:
                        try:
                            results[index] = self._batch([pictures[index]])[0]
                        except FAILURES as error:
                            errors[index] = one_line(error)
        failed = [
            {"key": pictures[index].place.key, "url": pictures[index].place.url, "error": errors[index]}
            for index in sorted(errors)
        ]
        return [results[index] for index in sorted(results)], failed

    @torch.inference_mode()
    def _batch(self, pictures: Sequence[Prepared]) -> list[Row]:
        settings = self.settings
        image = self._normal([each.small for each in pictures])
        features = self.backbone(image)
        arrays: dict[str, Tensor | list[Tensor]] = {"features": features}
        if "pooled" in settings.save:
            arrays["pooled"] = features.float().mean((2, 3))
        if self.up is not None:
            guidance = self._normal([each.guidance for each in pictures])
            self._upsampled(features, guidance, arrays)
        rows = []
        for index, each in enumerate(pictures):
            row: Row = {**each.place._asdict(), "height": each.size[0], "width": each.size[1]}
            for name in settings.save:
                if name == "regions":
                    row |= self._regions(features[index : index + 1], guidance[index : index + 1], each)
                    continue
                values = arrays[name][index].cpu()
                if name == "pooled":
                    row[name] = values.tolist()
                    continue
                array = values.numpy() if name == "labels" else values.float().numpy()
                row |= encode_array(name, array, settings.store)
            if settings.images:
                from PIL import Image

                assert each.guidance is not None
                picture = Image.fromarray(np.ascontiguousarray(each.guidance.transpose(1, 2, 0)))
                row["image"] = {"bytes": encode(picture, "JPEG", quality=JPEG_QUALITY), "path": None}
            rows.append(row)
        return rows

    def _normal(self, pictures: Sequence[Any]) -> Tensor:
        batch = torch.from_numpy(np.stack(pictures)).to(self.device)
        return self.backbone.normalise(batch.float() / 255)

    def _upsampled(self, features: Tensor, guidance: Tensor, arrays: dict[str, Any]) -> None:
        """Add what the upsampler makes of a batch."""
        assert self.up is not None
        settings, save = self.settings, self.settings.save
        if "dense" in save:
            arrays["dense"] = self.up(features, guidance)
        if "points" in save:
            assert settings.points is not None
            height, width = guidance.shape[2:]
            points = grid_points(*settings.points, height, width).to(self.device)
            arrays["points"] = self.up.at(features, guidance, points.expand(len(features), -1, -1))
        if {"logits", "labels"} & set(save):
            assert self.head is not None
            logits = self.up(features, guidance, head=self.head)
            labels = logits.argmax(1)
            arrays |= {"logits": logits, "labels": labels.to(torch.uint8 if logits.shape[1] <= 256 else torch.uint16)}

    def _regions(self, features: Tensor, guidance: Tensor, picture: Prepared) -> Mapping[str, Any]:
        """Mean features of a picture's regions, in the order of their labels."""
        assert self.up is not None
        assert picture.masks is not None
        labels, index, counts = np.unique(picture.masks, return_inverse=True, return_counts=True)
        first = int((labels < 0).sum())  # the void
        labels, counts = labels[first:], counts[first:]
        masks = torch.from_numpy(index.reshape(picture.masks.shape) - first).to(self.device)
        means = self.up.regions(features, guidance, masks[None], count=len(labels))[0]
        columns = encode_array("regions", means.cpu().float().numpy(), self.settings.store)
        return columns | {"regions_labels": labels.tolist(), "regions_pixels": counts.tolist()}
