"""A module as an ONNX graph, by torch's exporter: the same bytes whenever and wherever it is exported.

Shapes: B images or sentences.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dimefm.errors import DimefmError

OPSET = 18
"""The first with antialiasing and ReduceL2 as torch exports them; runtimes of the last three years know it."""
DATA = ".data"
"""What the name of a graph's file is followed by in that of the file with its weights, if they are apart."""
_MOST_INSIDE = 2**31 - 2**25  # bytes of weights within a graph: a protobuf may have 2 GiB
_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def write_graph(
    module: nn.Module, example: torch.Tensor, path: Path, *, names: tuple[str, str], facts: dict[str, str], half: bool
) -> None:
    """Write `module`, of one tensor whose first axis is the batch, to `path`; weights of more than 2 GB go to a file
    beside it. `names` are those of the input and the output, `facts` the metadata of the model. With `half`, weights
    are kept in float16, and the graph computes in float32 all the same. Raises DimefmError for a module that torch
    cannot export."""
    import onnx_ir

    model = _exported(module, example, names)
    _forget_origin(model)
    if half:
        _halve(model)
    model.metadata_props.update(facts)
    model.producer_name, model.producer_version, model.graph.name = "dimefm", None, names[1]
    apart = sum(value.const_value.nbytes for value in _weights(model)) > _MOST_INSIDE
    onnx_ir.save(model, path, external_data=f"{path.name}{DATA}" if apart else None)


def _exported(module: nn.Module, example: torch.Tensor, names: tuple[str, str]) -> Any:
    """The graph, as onnx_ir's Model."""
    try:
        with torch.inference_mode(), _silent():
            program: Any = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # of a tower of two libraries, traced by a third
        raise DimefmError(f"torch cannot export it to ONNX: {_reason(error)}") from error
    return program.model


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block, the exporter's libraries warn of nothing: no user can mend what they say."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _forget_origin(model: Any) -> None:
    """Take out where in the source each node comes from: paths of this machine, and a third of a small file."""
    graphs = [model.graph, *model.functions.values()]
    for place in (model, *graphs):
        place.metadata_props.clear()
        place.doc_string = None
    for graph in graphs:
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _weights(model: Any) -> list[Any]:
    return [value for value in model.graph.initializers.values() if value.const_value is not None]


def _halve(model: Any) -> None:
    """Keep weights in float16, each followed by a cast to float32, which runtimes do once when they load the graph.
    Weights beyond float16, and single numbers, stay as they are."""
    import onnx_ir

    for value in _weights(model):
        weight = value.const_value
        if weight.dtype != onnx_ir.DataType.FLOAT or weight.size < 16:
            continue
        with np.errstate(over="ignore"):
            halved = weight.numpy().astype(np.float16)
        if not np.isfinite(halved).all():
            continue
        users = list(value.uses())
        name = f"{value.name}_float16"
        kept = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(halved, name=name))
        kept.shape, kept.dtype = value.shape, onnx_ir.DataType.FLOAT16
        cast = onnx_ir.node("Cast", [kept], {"to": onnx_ir.DataType.FLOAT.value}, name=f"{value.name}_cast")
        whole = cast.outputs[0]
        whole.name, whole.shape, whole.dtype = f"{value.name}_float32", value.shape, onnx_ir.DataType.FLOAT
        for node, place in users:
            node.replace_input_with(place, whole)
        model.graph.insert_before(model.graph[0], cast)
        model.graph.register_initializer(kept)
        del model.graph.initializers[value.name]
