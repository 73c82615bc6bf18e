"""An ONNX export of a few thousand weights besides its vocabulary, written without torch's exporter, which takes
seconds. The image tower looks at the mean colours of 16 fields, the text tower at the tokens without their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from open_clip.tokenizer import SimpleTokenizer

from cache_schemas import Preprocessing
from cache_schemas.export import EXPORT_FILE, IMAGE_ONNX, TEXT_ONNX, Export, ExportOrigin, ExportSource, OnnxFacts
from dimefm.models.tokenizer_file import write_tokenizer
from dimefm.system import storage
from tests.stores import teacher_identity

SIDE, WIDTH, LENGTH = 32, 16, 32


def write_onnx(folder: Path, teacher: str | None = None, **changes: Any) -> str:
    """The folder of an export; its path. It says that it was distilled from a teacher whose weights have the digest
    `teacher`. `changes` are fields of its identity."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["wide"]),
    ]
    weight = rng.standard_normal((48, WIDTH)).astype(np.float32)
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    _write(folder / IMAGE_ONNX, image, pixels, "image_embeds", weight)
    text = [
        helper.make_node("Gather", ["weight", "input_ids"], ["each"]),
        helper.make_node("ReduceMean", ["each"], ["wide"], axes=[1], keepdims=0),
    ]
    weight = rng.standard_normal((49_408, WIDTH)).astype(np.float32)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", LENGTH])
    _write(folder / TEXT_ONNX, text, ids, "text_embeds", weight)
    write_tokenizer(SimpleTokenizer(), folder, LENGTH)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    facts = Preprocessing(size=(SIDE, SIDE), mean=mean, std=std, interpolation="bicubic", resize_mode="shortest")
    fields = {"name": folder.name, "preprocessing": facts, "context_length": LENGTH, "logit_scale": 20.0}
    identity = teacher_identity(**(fields | changes))
    files = {file.name: storage.digest_file(str(file)) for file in sorted(folder.iterdir())}
    document = Export(
        format="onnx", model=identity, text_tower="t", parameters=49_456 * WIDTH, image_parameters=48 * WIDTH,
        image_flops=None, text_flops=None, versions={},
        onnx=OnnxFacts(opset=17, image_input="float32", quantized={}), origin=_origin(teacher) if teacher else None,
        files=files,
    )  # fmt: skip
    storage.write_json(str(folder / EXPORT_FILE), document.to_json())
    return str(folder)


def _origin(teacher: str) -> ExportOrigin:
    return ExportOrigin(
        student="tiny", teacher="a teacher", teacher_weights=teacher, step=2, steps=2, weights="model", images_seen=64,
        seed=0, config={}, versions={},
        sources=(ExportSource(kind="image", store="images.zarr", names=("0.tar",), rows=32, digest="d" * 64),),
    )  # fmt: skip


def _write(path: Path, nodes: list[Any], given: Any, output: str, weight: np.ndarray[Any, Any]) -> None:
    nodes.append(helper.make_node("LpNormalization", ["wide"], [output], axis=-1, p=2))
    found = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", WIDTH])
    graph = helper.make_graph(nodes, path.stem, [given], [found], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
