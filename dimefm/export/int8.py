"""ONNX graphs in integers of 8 bits, by onnxruntime's quantizer.

A tower of convolutions is quantized statically: the range of what flows between its layers is measured once, on images
(export/calibration.py). A tower of matrix products is quantized dynamically: ranges are those of each batch, and the
embedding of an image then depends a little on the others of its batch.

Weights have a scale for each output channel. CPUs without VNNI instructions add two products of a byte and a weight in
16 bits, which would saturate: 255 * (127 + 127) is more than 32,767. So that every kind of CPU computes the same, a
static scale is such that the two largest weights of one sign, the worst case of a channel, sum to 128 at most, and
dynamic weights have 7 bits. Depthwise convolutions are computed in 32 bits everywhere and keep all 8 bits of their
weights, which they need most. `python -m benchmarks int8` shows what each of these is worth.

Shapes: N images, C output channels of a weight, K its other axes, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime import quantization

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, Quantization
from dimefm.export.calibration import calibration_pixels
from dimefm.export.config import ExportConfig
from dimefm.export.onnx_graph import DATA
from dimefm.models.clip import Clip
from dimefm.models.towers import has_convolutions
from dimefm.system.notes import note

_BATCH = 16
STATIC = ("Conv", "Gemm", "MatMul", "Clip", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")
"""What is computed in integers; activations other than these, and norms, stay in float32."""
_DYNAMIC = ("MatMul", "Gather")  # Gemm becomes MatMul; ConvInteger of a patch embedding is slow


def quantize(folder: Path, clip: Clip, config: ExportConfig) -> dict[str, Quantization]:
    """Quantize both graphs in `folder`, each in place and in the way that it is fit for, which is given by file."""
    of_image: Quantization = "static int8" if has_convolutions(clip.model.visual) else "dynamic int8"
    ways: dict[str, Quantization] = {IMAGE_ONNX: of_image, TEXT_ONNX: "dynamic int8"}
    for file, way in ways.items():
        path = folder / file
        before = _bytes(path)
        if way == "static int8":
            static(path, calibration_pixels(clip.identity.preprocessing, config))
        else:
            dynamic(path)
        note(f"int8: {file} {before / 1e6:.1f} MB -> {_bytes(path) / 1e6:.1f} MB, {way}")
    return ways


def static(path: Path, inputs_N3HW: np.ndarray[Any, Any]) -> None:
    """Quantize a graph in place, by the ranges that are measured on these inputs."""
    model = onnx.load(path)
    with _quiet():
        quantization.quantize_static(
            path,
            _beside(path),
            Batches(inputs_N3HW, model.graph.input[0].name),
            op_types_to_quantize=list(STATIC),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"TensorQuantOverrides": _weight_ranges(model), "MatMulConstBOnly": True},
        )
    _replace(path, model)


def dynamic(path: Path) -> None:
    """Quantize the matrix products of a graph in place, and its tables of embeddings."""
    with _quiet():
        quantization.quantize_dynamic(
            path, _beside(path), op_types_to_quantize=list(_DYNAMIC), per_channel=True, reduce_range=True
        )
    _replace(path, onnx.load(path, load_external_data=False))


def _weight_ranges(model: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """For each weight, by its name, the range of every output channel that becomes -127 to 127."""
    weights, found = {one.name: one for one in model.graph.initializer}, dict[str, list[dict[str, Any]]]()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        if weight.ndim < 2:
            continue
        given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        axis = 0 if node.op_type == "Conv" or given.get("transB") else 1
        weight_CK = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        depthwise = node.op_type == "Conv" and given.get("group", 1) == len(weight) and weight.shape[1] == 1
        limits_C = np.abs(weight_CK).max(axis=1) if depthwise else _limits(weight_CK)
        found[node.input[1]] = [{"axis": axis, "rmin": -limit, "rmax": limit} for limit in limits_C]
    return found


def _limits(weight_CK: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each row float32 (C,), the least limit, not below its largest weight, so that any two weights of one sign,
    scaled by 127 / limit and rounded, sum to 128 at most."""
    sorted_CK = np.sort(np.pad(weight_CK, ((0, 0), (0, 2))), axis=1)  # two zeros: a pair may lack a partner
    pairs_C2 = np.stack([sorted_CK[:, -2:].sum(axis=1), -sorted_CK[:, :2].sum(axis=1)], axis=1)
    limit_C: np.ndarray[Any, Any] = pairs_C2.max(axis=1).astype(np.float32)
    return limit_C


class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]
    """The inputs of a graph, a few at a time."""

    def __init__(self, inputs: np.ndarray[Any, Any], name: str) -> None:
        self._batches = ({name: inputs[at : at + _BATCH]} for at in range(0, len(inputs), _BATCH))

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._batches, None)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.int8")


def _replace(path: Path, before: onnx.ModelProto) -> None:
    """Put the quantized graph at its place, with the metadata of the one `before`."""
    after = onnx.load(_beside(path))
    for field in ("metadata_props", "producer_name", "producer_version"):
        after.ClearField(field)  # the quantizer's
    after.metadata_props.extend(before.metadata_props)
    after.producer_name, after.graph.name = before.producer_name, before.graph.name
    onnx.save(after, path)
    _beside(path).unlink()
    path.with_name(f"{path.name}{DATA}").unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}{DATA}")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block nothing is logged: onnxruntime's quantizer asks for a preparation that brings nothing here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
