"""The LoftUp network: pixels ask, low-resolution features answer (paper section 3.1, figure 3)."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import LoftUpError
from .graphs import Input, write_graph
from .inference.canvas import Canvas, Head, apply_head, as_head
from .inference.choose import compute_dtype, open_stream
from .inference.regions import Regions, read_masks
from .inputs import (
    Size,
    capturing,
    check_inputs,
    check_options,
    check_out,
    check_points,
    output_size,
    refuse_names,
    resize_guidance,
)
from .networks import build_network, build_norm
from .networks.config import Config, LoftUpConfig, UniversalConfig
from .typed import as_in
from .weights.catalogue import ANY, CATALOGUE

if TYPE_CHECKING:
    import numpy as np

    from .weights.names import WeightsName

__all__ = ["LoftUp"]


class LoftUp(nn.Module):
    """Upsample the features of a frozen vision backbone to any size, guided by the image.

    Examples:
        >>> up = LoftUp.from_pretrained("dinov2_vits14")            # doctest: +SKIP
        >>> up(features, image).shape                               # (B, 384, h, w), (B, 3, H, W)  # doctest: +SKIP
        torch.Size([B, 384, H, W])

    Args:
        config: a :class:`LoftUpConfig`, or the channel count C for the published architecture; a
            :class:`UniversalConfig` for the network behind "any". Weights are random: use :meth:`from_pretrained` for
            trained ones.

    Attributes:
        activation_checkpointing: save memory in training by computing activations twice.
        check_values: whether every call looks for values that are not finite or overflow, for an image without
            contrast, and whether the weights are those that were folded, for which a GPU is waited for. With False it
            is not, and changes of weights that PyTorch does not count (fused optimizers, ``.data``) are missed.
    """

    check_values: bool = True

    def __init__(self, config: Config | int) -> None:
        super().__init__()
        if not isinstance(config, int | LoftUpConfig | UniversalConfig):
            raise TypeError(
                f"LoftUp takes a config or a number of channels, got {config!r}; for trained weights by name: "
                "LoftUp.from_pretrained(name)"
            )
        self.config: Config = LoftUpConfig(config) if isinstance(config, int) else config
        self.upsampler = build_network(self.config)
        self.channelnorm = build_norm(self.config)
        self.activation_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters, in which the network computes.

        The Fourier code stays float32; "any" computes everything in float32 at least.
        """
        return next(self.upsampler.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.upsampler.parameters()).device

    def forward(
        self,
        features: Tensor,
        image: Tensor,
        size: Size = None,
        *,
        head: Head | Tensor | None = None,
        out: "Tensor | np.ndarray[Any, Any] | None" = None,
        memory: int | None = None,
        backend: str | None = None,
        **others: NoReturn,
    ) -> Tensor:
        """Upsample backbone features to any output size.

        In inference (``eval()``, and no gradient wanted: inside ``torch.inference_mode()`` or ``torch.no_grad()``, or
        nothing requires one) the result is made in bands of rows, so that memory is the result plus a constant. When a
        gradient is wanted, in training mode and inside ``torch.compile`` the whole image is computed at once; set
        ``up.activation_checkpointing = True`` to save memory there by computing activations twice.

        Inference folds the weights that it knows. Where a module was replaced (LoRA, quantisation) or has forward
        hooks, it runs module by module, in bands all the same, and slower; :func:`loftup.explain` says so.

        Args:
            features: (B, C, h, w), straight from the backbone, any float dtype.
            image: (B, 3, H, W), the guidance; any per-channel affine scaling, so [0, 1], ImageNet-normalised or
                0..255. A channel that ranges over less than 1e-4 counts as flat; where all do, a warning says so. Each
                image is scaled by its own extremes: batch-mates never matter. Pass it in float32 whatever the dtype of
                the rest: the Fourier code's highest frequency is e^10, so that a bfloat16 image changes the published
                network's output by 1 % (11 % at worst), a float16 one by a part of that. float64 counts as float32.
            size: (H', W') of the result in pixels, or one int for a square; None means (H, W). Another size than the
                image's resizes the guidance bilinearly first.
            head: a pointwise function of features, applied band by band, so that the (B, C, H', W') map never exists:
                a matrix (K, C), such as one row for every text; an ``nn.Linear`` over C; or anything that maps
                (1, C, n, m) to (1, K, n, m) or (1, n, m) position by position (1x1 convolution, linear probe,
                similarity to texts, argmax). It sees the dtype of ``features``, and at first some of the pixels once
                more, in other company: one that mixes positions gives them other values and is refused. Where gradients
                of its own parameters are wanted, the map is kept for them. With "any" a matrix, an ``nn.Linear`` or 1x1
                ``nn.Conv2d`` is applied to the cells, to the same result.
            out: tensor or NumPy array to write the result into, of its shape and any device and memory layout (a
                ``numpy.memmap`` too), of a dtype that holds it: no whole numbers for features.
            memory: budget in bytes for our own buffers in inference, beside the tokens' keys and values and the
                libraries' scratch; None means 96 MiB on the CPU and 384 MiB on CUDA. With "any" it is also beside
                the guidance's codes at half resolution and some six times the features.
            backend: "cpu", "torch", "triton" or None to choose; see :func:`loftup.explain`.
            others: nothing; another name is refused, with the right one.

        Returns:
            (B, C, H', W') in the dtype of ``features``; with ``head`` (B, K, H', W') or (B, H', W') in the head's
            dtype; ``out`` where it is given.

        Raises:
            ValueError: C is not what these weights expect, or an argument is not a finite 4-d tensor (finiteness is
                not checked inside ``torch.compile`` and ``torch.export``); ``size`` is not positive; ``out`` has
                another shape or a dtype that does not hold the result, cannot be written to, has elements in one place
                of memory or shares it with an argument; ``memory`` does not hold the smallest band; there is no such
                ``backend``; or ``out``, ``memory`` or ``backend`` are given where the whole image is computed at once.
            TypeError: an argument is not a float tensor, or an option is of another type or name.
            LoftUpError: ``backend`` cannot run here; the head is not pointwise (a 3x3 convolution, pooling, a batch
                norm in training mode); features overflow in float16; or the call is inside ``torch.vmap``.
        """
        if others:
            refuse_names(others, ("size", "head", "out", "memory", "backend"))
        check_inputs(features, image, self.config.channels, self.device, self.config.backbone, values=self.check_values)
        function: Head | None = as_head(head, features)
        size, memory = output_size(size, image), check_options(function, memory, backend)
        reason = self._why_whole(features, image)
        if reason is None:
            stream = open_stream(self.upsampler, backend, self.check_values)
            canvas = Canvas(features, size, function, check_out(out, features, image))
            stream.upsample(self._normalise(features), image, canvas, memory)
            result = canvas.finish()
            return result if out is None else out  # type: ignore[return-value]
        for name, value in (("out", out), ("memory", memory), ("backend", backend)):
            if value is not None:
                raise ValueError(f"{name}= is for inference, but {reason}")
        guidance, normalised = resize_guidance(image, size, self.config.oversampling), self._normalise(features)
        dense = self.upsampler(normalised, guidance, checkpointing=self.activation_checkpointing).to(features.dtype)
        return dense if function is None else apply_head(function, dense)

    if TYPE_CHECKING:

        @as_in(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def _slow_forward(self, *arguments: Any, **options: Any) -> Any:
        # torch's way to forward in tracing; the old exporter passes it all options by position.
        if torch.onnx.is_in_onnx_export():
            raise LoftUpError(
                "torch.onnx's old exporter (dynamo=False) cannot write loftup's networks: call up.export('up.onnx') or "
                "torch.onnx.export(..., dynamo=True)"
            )
        return super()._slow_forward(*arguments, **options)  # type: ignore[no-untyped-call]

    def _check(self, features: Tensor, image: Tensor) -> None:
        """Raise what :meth:`at` and :meth:`regions` say of features and image that do not fit."""
        check_inputs(
            features,
            image,
            self.config.channels,
            self.device,
            self.config.backbone,
            stacklevel=4,
            values=self.check_values,
        )

    def _normalise(self, features: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and features.is_inference():
            features = features.clone()  # an ordinary tensor, which autograd can save
        normalised: Tensor = self.channelnorm(features).to(self.upsampler.dtype)
        if torch.compiler.is_compiling():
            return normalised
        dtype = compute_dtype(self.upsampler)
        narrower = torch.finfo(dtype).max < torch.finfo(features.dtype).max
        looks = self.check_values and not capturing(features.device)
        if narrower and looks and not bool(normalised.detach().to(dtype).isfinite().all()):
            raise LoftUpError(
                f"features up to {float(features.detach().abs().max()):.3g} overflow in {dtype}, in which this LoftUp "
                "computes; use a wider dtype: up.to(torch.float32)"
            )
        return normalised

    def at(
        self, features: Tensor, image: Tensor, points: Tensor, size: Size = None, *, backend: str | None = None
    ) -> Tensor:
        """Upsampled features at points alone; the cost grows with their number, not with the image's size.

        With "any" the whole image is looked at first, and from some percent of its pixels on the map costs less.

        At pixel centres these are the vectors of ``up(features, image, size)``; between them they are interpolated
        bilinearly, as ``grid_sample`` would from the full map. Inference only.

        Args:
            features: as for :meth:`forward`.
            image: as for :meth:`forward`.
            points: (B, N, 2), any float or integer dtype: (x, y) in pixels of the ``size`` grid, so that (0, 0) is the
                centre of the top left pixel and (W' - 1, H' - 1) that of the bottom right one.
            size: as for :meth:`forward`.
            backend: as for :meth:`forward`.

        Returns:
            (B, N, C) in the dtype of ``features``.

        Raises:
            ValueError: as for :meth:`forward`; points have another shape or lie outside the grid; or a gradient is
                wanted.
            TypeError: as for :meth:`forward`; or points are no real numbers.
            LoftUpError: as for :meth:`forward`.
        """
        self._check(features, image)
        height, width = output_size(size, image)
        check_options(None, None, backend)
        check_points(points, features, height, width)
        if reason := self._why_whole(features, image):
            raise ValueError(
                f"up.at is for inference, but {reason}. With gradients, sample the map: up(features, image, size)[..., "
                "y, x]"
            )
        stream = open_stream(self.upsampler, backend, self.check_values)
        with torch.inference_mode(False):
            vectors = features.new_empty(*points.shape[:2], features.shape[1])
        if vectors.numel():
            stream.at(self._normalise(features), image, (height, width), points, vectors)
        return vectors

    def regions(
        self,
        features: Tensor,
        image: Tensor,
        masks: Tensor,
        size: Size = None,
        *,
        count: int | None = None,
        memory: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Mean upsampled features within masks or labels, summed on the way: the (B, C, H', W') map never exists.

        The means over the map of ``up(features, image, size)``, within float32 rounding (1e-5 for outputs of unit
        scale). On a CPU what lies in no region costs LoftUp's published network little. Inference only.

        Args:
            features: as for :meth:`forward`.
            image: as for :meth:`forward`.
            masks: bool, or float weights that are not negative, (B, N, H', W'), or (N, H', W') for all images; or
                integer labels (B, H', W') or (H', W'), where region k is where the label is k. Negative labels, and 255
                in uint8, belong to no region.
            size: (H', W') of the map that is averaged; None means the masks' own, which need not be the image's. Masks
                of another size are averaged by area, labels taken from the nearest pixel.
            count: the number N of labels; None means the largest one and 1.
            memory: as for :meth:`forward`.
            backend: as for :meth:`forward`.

        Returns:
            (B, N, C) in the dtype of ``features``, summed in float32 and wider. An empty region gives NaN.

        Raises:
            ValueError: as for :meth:`forward`; masks have another shape or device, or negative weights; a label is
                ``count`` or more; or a gradient is wanted.
            TypeError: as for :meth:`forward`; or masks are neither bool, nor real numbers.
            LoftUpError: as for :meth:`forward`.
        """
        self._check(features, image)
        memory = check_options(None, memory, backend)
        weights, number = read_masks(masks, features, size, count, self.check_values)
        if reason := self._why_whole(features, image):
            raise ValueError(
                f"up.regions is for inference, but {reason}. With gradients, average the map: (up(features, image, "
                "size)[:, None] * masks[:, :, None]).sum((-2, -1)) / masks.sum((-2, -1))[..., None]"
            )
        stream, canvas = open_stream(self.upsampler, backend, self.check_values), Regions(features, weights, number)
        stream.upsample(self._normalise(features), image, canvas, memory)
        return canvas.finish()

    def _why_whole(self, features: Tensor, image: Tensor) -> str | None:
        """None for inference, else why the whole image is computed at once, and the way to inference."""
        if self.training:
            return "the module is in training mode: call up.eval()"
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return "the module is being compiled or exported"
        if any(module.training for module in self.modules() if isinstance(module, _BatchNorm)):
            return (
                "a batch norm inside is in training mode, and a band's statistics are not the image's: call up.eval()"
            )
        if torch.is_grad_enabled():
            inputs: dict[str, list[Tensor]] = {
                "features": [features],
                "image": [image],
                "weights": list(self.parameters()),
            }
            if names := [name for name, tensors in inputs.items() if any(x.requires_grad for x in tensors)]:
                return (
                    f"{' and '.join(names)} require a gradient: use torch.no_grad() or torch.inference_mode(), or "
                    "freeze them with .requires_grad_(False)"
                )
        # Asked first, as looking at every parameter takes a third of a millisecond.
        followed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        if followed and any(map(_has_tangent, (features, image, *self.parameters()))):
            return "a forward-mode derivative is wanted: call it outside torch.func.jvp and dual numbers"
        return None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: "str | os.PathLike[str] | nn.Module",
        *,
        revision: str | None = None,
        cache_dir: "str | os.PathLike[str] | None" = None,
        local_files_only: bool = False,
        device: "str | torch.device | None" = None,
        dtype: torch.dtype | None = None,
        channel_norm: Literal["identity"] | None = None,
        strict: bool = False,
        trainable: bool = False,
    ) -> "LoftUp":
        """Load trained weights by backbone name, backbone object, Hub repository, local folder or file.

        Args:
            name_or_path: "any", the upsampler for every backbone, which comes with the package; a name of
                :func:`loftup.list_pretrained` or that backbone's timm, torch.hub, open_clip or transformers name; a
                backbone object of one of these libraries or from :func:`loftup.wrap`; "tiny" or "tiny_v1", the
                backbones in the package, which go with "any"; a timm name of any other backbone, which gets "any" with
                a warning; a Hub repository id ("user/repo"); a folder or a file (``pytorch_model.bin``,
                ``.safetensors``, a training checkpoint with ``state_dict``). Names win over folders, and folders over
                the Hub, with a warning where they are written like a repository: write "./name" for those, or pass a
                ``Path``, which is never a name or a repository. A file without a config does not tell
                the number of attention heads: the published 4 are assumed (:meth:`save_pretrained` stores the number).
            revision: branch, tag or commit of the Hub repository; refused for a local file or folder.
            cache_dir: where downloads are kept; None means the Hub's default cache.
            local_files_only: take files from the cache and never ask the network.
            device: where to put the module; None means the CPU.
            dtype: floating dtype to convert the parameters to; None means as stored (float32 in the published weights),
                and float32 for those in the package.
            channel_norm: "identity" accepts a file that lacks the channel norm and passes features on as they come.
                Otherwise such a file is refused, because its results would be wrong without any sign of it.
            strict: refuse a backbone without weights of its own, in place of taking "any" with a warning.
            trainable: whether the parameters require gradients. They do not by default, so that the plain call
                ``up(features, image)`` streams; features that require a gradient get one all the same.

        Returns:
            The module in ``eval()`` mode.

        Raises:
            LoftUpError: the name is unknown (near misses are named), the Hub does not answer within seconds and the
                cache lacks the file, or a file is missing, truncated, damaged, incomplete, of another architecture, of
                mixed dtypes or with values that are not finite.
            TypeError: ``name_or_path`` or ``dtype`` is of another type.
        """
        from .weights.files import check_fit, read_weights

        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, got {dtype}")
        source = _resolve(name_or_path, strict)
        for sentence in filter(None, (source.substitute, source.shadowed)):
            warnings.warn(sentence, stacklevel=2)
        if source.checkpoint is not None and source.checkpoint.in_package:
            dtype = dtype or torch.float32  # stored as float16 to keep the package small
        # Ordinary parameters also when called inside torch.inference_mode().
        with torch.inference_mode(False):
            weights = read_weights(
                source,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                channel_norm=channel_norm,
            )
            with torch.device("meta"):
                up = cls(weights.config)
            check_fit(weights.state, up.state_dict(), weights.file)
            # Tensors of a file may be parts of a common storage.
            up.load_state_dict({key: value.detach().clone() for key, value in weights.state.items()}, assign=True)
            return up.to(device=device or "cpu", dtype=dtype).eval().requires_grad_(trainable)

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write ``model.safetensors`` and ``config.json`` that :meth:`from_pretrained` reads back bit for bit.

        The whole config is in the header of ``model.safetensors`` too, so that the file can travel alone.
        Each file appears whole or not at all: it is written under another name first and then renamed. The same weights
        give the same bytes.

        Raises:
            LoftUpError: modules were replaced (LoRA), or values are not finite or of several dtypes, so that the files
                could not be loaded; or the folder holds somebody else's files of these names.
        """
        from .weights.files import save

        save(self.config, self.state_dict(), folder)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Add LoftUp weights",
    ) -> str:
        """Create the Hub repository where needed and upload weights, config and a model card.

        Returns:
            The address of the commit.

        Raises:
            LoftUpError: the Hub refuses or cannot be reached.
        """
        from .weights.files import push

        state = self.state_dict()
        return push(self.config, state, repo, private=private, token=token, commit_message=commit_message)

    def export(self, path: "str | os.PathLike[str]", *, size: Size = None, store: str = "float32") -> Path:
        """Write the upsampler as a graph for other runtimes, without its Python code.

        Its inputs are "features" (batch, C, rows, columns) and "image" (batch, 3, height, width), float32, of any sizes
        from two rows and columns on; with "any" C is free too. Its output "upsampled" is (batch, C, height, width). The
        graph computes the whole image at once, without bands, and checks nothing.

        Args:
            path: ends in ".onnx" (opset 21, for ONNX Runtime and what reads ONNX) or ".pt2" (for torch.export.load).
            size: (height, width) in pixels that the graph takes alone, or an int for a square; None for any.
            store: how an ONNX file stores the weights: "float32"; "float16", half as large; "int8" with a scale for
                every 32 of them, 3.5 times smaller and less exact. The arithmetic stays float32.

        Returns:
            The path.

        Raises:
            LoftUpError: the path has another ending, the package onnx or onnxscript is missing
                (``pip install "loftup[export]"``), or modules were replaced by some that have no graph.
            ValueError: ``size`` is not positive, or there is no such ``store``.
        """
        batch = ("batch", torch.export.Dim("batch"))
        features = {0: batch, 2: ("rows", None), 3: ("columns", None)}
        if self.config.channels is None:
            features[1] = ("channels", None)
        guidance = torch.rand(2, 3, *(output_size(size, torch.empty(1, 3, 1, 1)) if size else (112, 144)))
        image = {0: batch} if size else {0: batch, 2: ("height", None), 3: ("width", None)}
        channels = self.config.channels or 32
        others = (torch.randn(1, channels, 5, 11), torch.rand(1, 3, 64, 150)) if size is None else (None, None)
        inputs = [Input("features", torch.randn(2, channels, 8, 9), features, others[0])]
        inputs.append(Input("image", guidance, image, others[1]))
        output = {0: "batch", **({1: "channels"} if 1 in features else {})}
        output |= {} if size else {2: "height", 3: "width"}
        return write_graph(self, inputs, ("upsampled", output), path, store, self.card())

    def card(self) -> dict[str, Any]:
        """Describe the upsampler, for exported files."""
        config = self.config
        known = CATALOGUE.get(ANY if isinstance(config, UniversalConfig) else config.backbone)
        facts = {"upsampler": dataclasses.asdict(config), "channels": config.channels or "any"}
        return facts | {"upsampler_licence": known.licence if known else "unknown"}

    def extra_repr(self) -> str:
        """Channels, width and backbone, for ``print(up)``."""
        return str(self.config)


def _has_tangent(x: Tensor) -> bool:
    """Tell whether forward-mode differentiation follows a tensor."""
    return torch._C._functorch.is_gradtrackingtensor(x) or forward_ad.unpack_dual(x).tangent is not None


def _resolve(source: "str | os.PathLike[str] | nn.Module", strict: bool) -> "WeightsName":
    from .weights.names import resolve, resolve_backbone

    if not isinstance(source, nn.Module):
        return resolve(source, strict)
    from .backbones import identify, wrap

    try:
        name, usable = identify(wrap(source, check=False)), True
    except LoftUpError:
        name, usable = None, False
    return resolve_backbone(name, type(source).__name__, usable, strict)
