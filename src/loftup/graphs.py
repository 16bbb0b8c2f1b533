"""Graphs for other runtimes: modules as ONNX files or torch.export's .pt2, with what they are inside."""

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoftUpError, one_line
from .files import MADE_BY, refuse_others, write_atomically

__all__ = ["Input", "image_input", "write_graph"]

OPSET = 21  # the first with scales for blocks of weights
BLOCK = 32  # weights that share a scale
STORES = ("float32", "float16", "int8")
OLDEST = (2, 9)  # of torch
FEWEST = 1024  # elements of a weight that is worth storing in fewer bits
LARGEST = 1_900_000_000  # bytes of weights that one ONNX file holds
CELLS = (8, 9)  # of the grid that a graph is traced with, height and width different

Axis = tuple[str, Any]  # name in the file, and torch.export's size: a Dim, a multiple of one, or None for any


@dataclass(frozen=True)
class Input:
    """One input of a graph."""

    name: str
    example: Tensor  # to trace with
    axes: Mapping[int, Axis]  # those whose size is free
    other: Tensor | None = None  # of other sizes, to try the graph with


def image_input(multiple: int, size: tuple[int, int] | None) -> Input:
    """The input "image" (B, 3, H, W) of a backbone that takes multiples of so many pixels; of one size, if given."""
    axes: dict[int, Axis] = {0: ("batch", torch.export.Dim("batch"))}
    height, width = size or (side * multiple for side in CELLS)
    if size is None:
        for axis, name in ((2, "height"), (3, "width")):
            cells = torch.export.Dim(f"{name}_cells", min=2)
            axes[axis] = (name, cells * multiple if multiple > 1 else cells)
    other = torch.rand(1, 3, 11 * multiple, 5 * multiple) if size is None else None
    return Input("image", torch.rand(2, 3, height, width), axes, other)


def write_graph(
    module: nn.Module,
    inputs: Sequence[Input],
    output: tuple[str, Mapping[int, str]],
    path: "str | os.PathLike[str]",
    store: str,
    metadata: Mapping[str, Any],
) -> Path:
    """Export a module and write the file.

    Args:
        module: stays as it is; a copy is exported where it is in training mode, not on the CPU or not float32.
        inputs: in the order of its arguments.
        output: name, and the names of its free axes.
        path: ends in ".onnx" or ".pt2".
        store: how an ONNX file stores the weights, one of STORES; the arithmetic stays float32.
        metadata: goes into the file, values as JSON where they are no strings.

    Raises:
        LoftUpError: the path has another ending, packages are missing, or the module has no graph for any size.
        ValueError: there is no such ``store``.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise LoftUpError(f"{path} ends in neither .onnx (ONNX) nor .pt2 (torch.export); give such a path")
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
    if path.suffix == ".pt2" and store != "float32":
        raise LoftUpError(f"a .pt2 file stores the weights as float32; leave {store} out, or write .onnx")
    refuse_others([path])
    _check_version()
    if path.suffix == ".onnx":
        _check_packages()
    as_needed = ("cpu", torch.float32)
    if any((each.device.type, each.dtype) != as_needed for each in module.parameters()) or _learns(module):
        module = copy.deepcopy(module).cpu().float().eval()
    program = _export(module, inputs)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    texts["made_by"] = MADE_BY
    if path.suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(texts)})
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = MADE_BY.encode()  # at the end, where refuse_others looks
        write_atomically(path, buffer.getvalue())
    else:
        _write_onnx(program, inputs, output, path, store, texts)
    return path


def _check_version() -> None:
    """Raise LoftUpError where torch is older than export is known to work with."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise LoftUpError(f"export needs torch {needed} or newer, got {torch.__version__}: pip install -U torch")


def _learns(module: nn.Module) -> bool:
    return any(each.training for each in module.modules())


def _check_packages() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LoftUpError(f"ONNX files need the package {name}: pip install 'loftup[export]'") from error


def _export(module: nn.Module, inputs: Sequence[Input]) -> torch.export.ExportedProgram:
    """The graph that torch.export traces."""
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({axis: free if size is None else size for axis, (_, size) in each.axes.items()} for each in inputs)
    try:
        with torch.no_grad(), _quiet():
            examples = tuple(each.example for each in inputs)
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
            others = [each.other for each in inputs if each.other is not None]
            if len(others) == len(inputs):
                _check_other_sizes(program, module, others)
            return program
    except Exception as error:
        sizes = any(axis > 1 for each in inputs for axis in each.axes)
        kind = f"{type(error).__name__}: {one_line(error)[:200]}"
        remedy = "; give one size: size=(H, W)" if sizes else ""
        raise LoftUpError(
            f"torch.export makes no graph of this model{' for any size' if sizes else ''} ({kind}){remedy}"
        ) from error


def _check_other_sizes(program: torch.export.ExportedProgram, module: nn.Module, others: Sequence[Tensor]) -> None:
    """Raise ValueError where the graph gives something else than the module at a size that it was not traced with.

    Constants of one size inside a model make such graphs without a word.
    """
    expected, found = module(*others), program.module()(*others)
    if found.shape != expected.shape or float((found - expected).abs().max()) > 0.01 * float(expected.abs().max()):
        raise ValueError(f"it differs from the model at inputs of {', '.join(str(tuple(x.shape)) for x in others)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own workings."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _write_onnx(
    program: torch.export.ExportedProgram,
    inputs: Sequence[Input],
    output: tuple[str, Mapping[int, str]],
    path: Path,
    store: str,
    metadata: Mapping[str, str],
) -> None:
    import onnx

    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[each.name for each in inputs],
                output_names=[output[0]],
                verbose=False,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise LoftUpError(f"torch.onnx cannot write this model: {one_line(cause)[:300]}; write a .pt2 file") from error
    assert converted is not None
    if sum(tensor.nbytes for tensor in program.state_dict.values()) > LARGEST:
        # Beyond what protobuf holds: weights in a file of their own, as they are.
        if store != "float32":
            raise LoftUpError(
                f"more than {LARGEST / 1e9:.1f} GB of weights are stored as float32 alone, not as {store}"
            )
        if not path.exists():  # else it is ours, and so is what lies beside it
            refuse_others([path.with_name(f"{path.name}.data")])
        converted.model.metadata_props.update(metadata)
        converted.save(path, external_data=True)
        return
    model = converted.model_proto
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    named = [{axis: name for axis, (name, _) in each.axes.items()} for each in inputs]
    for value, axes in zip([*model.graph.input, model.graph.output[0]], [*named, output[1]], strict=True):
        for axis, name in axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    if store != "float32":
        _narrow(model.graph, store)
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name, model.producer_version = "loftup", metadata["made_by"].rpartition(" ")[2]
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())


def _narrow(graph: Any, store: str) -> None:
    """Store large float32 weights as float16 or int8, and widen them again for what reads them.

    int8 is for convolutions and matrix products alone, with a scale for every :data:`BLOCK` input channels of every
    output channel: with one scale an output channel, the means of rectified inputs multiply the rounding. Other weights
    become float16.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    widened = []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < FEWEST:
            continue
        name, narrow = tensor.name, f"{tensor.name}.{store}"
        axes = {_input_axis(node, name) for node in readers.get(name, [])}
        axis = axes.pop() if len(axes) == 1 else None
        graph.initializer.remove(tensor)
        if store == "int8" and axis is not None and values.shape[axis] >= BLOCK:
            starts = range(0, values.shape[axis], BLOCK)
            scale = np.maximum.reduceat(np.abs(values), starts, axis).clip(np.finfo(np.float32).tiny) / np.float32(127)
            wide = np.repeat(scale, BLOCK, axis).take(range(values.shape[axis]), axis)
            stored = np.rint(values / wide).clip(-127, 127).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            node = helper.make_node("DequantizeLinear", [narrow, f"{name}.scale"], [name], axis=axis, block_size=BLOCK)
        else:
            stored = values.astype(np.float16)
            node = helper.make_node("Cast", [narrow], [name], to=helper.np_dtype_to_tensor_dtype(np.dtype("float32")))
        graph.initializer.append(numpy_helper.from_array(stored, narrow))
        widened.append(node)
    nodes = [*widened, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _input_axis(node: Any, name: str) -> int | None:
    """The axis of a weight that the input channels of an operator are on; None where it is no such operator."""
    if list(node.input).index(name) != 1:
        return None
    if node.op_type == "Gemm":
        return 1 if any(each.name == "transB" and each.i for each in node.attribute) else 0
    return {"Conv": 1, "MatMul": 0}.get(node.op_type)
