"""int8: what is quantized and how, on which images, and what is left where it loses too much."""

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from cache_schemas import Preprocessing
from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX
from dimefm.errors import DimefmError
from dimefm.export.calibration import calibration_pixels
from dimefm.export.config import ExportConfig
from dimefm.export.export_student import export
from dimefm.export.int8 import static
from dimefm.models.clip import load_clip
from dimefm.models.exported import read_export
from dimefm.store.embedding_store import Store
from dimefm.training.train import train
from tests.tiny_clip import write_clip
from tests.tiny_training import tiny_config

FACTS = Preprocessing(
    size=(16, 16), mean=(0.5, 0.25, 0.5), std=(0.5, 0.5, 0.25), interpolation="bicubic", resize_mode="shortest"
)


def write_convolutions(path: Path) -> None:
    """A graph of a convolution, a depthwise one, a 1x1 one and a Gemm, with random weights and one large weight in each
    channel, as trained ones have."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "pointwise": (16, 8, 1, 1), "gemm": (6, 16)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for weight in weights.values():
        weight.reshape(len(weight), -1)[:, 0] *= 5
    nodes = [
        helper.make_node("Conv", ["pixels", "conv"], ["a"], name="n1"),
        helper.make_node("Relu", ["a"], ["b"], name="n2"),
        helper.make_node("Conv", ["b", "depthwise"], ["c"], name="n3", group=8),
        helper.make_node("Relu", ["c"], ["d"], name="n4"),
        helper.make_node("Conv", ["d", "pointwise"], ["e"], name="n5"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], name="n6"),
        helper.make_node("Flatten", ["f"], ["g"], name="n7"),
        helper.make_node("Gemm", ["g", "gemm"], ["out"], name="n8", transB=1),
    ]
    values = (("pixels", ("batch", 3, 16, 16)), ("out", ("batch", 6)))
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values]
    tensors = [numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "out", ends[:1], ends[1:], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    helper.set_model_props(model, {"preprocessing": "{}"})
    onnx.save(model, path)


def test_no_pair_of_products_exceeds_16_bits(tmp_path: Path) -> None:
    """On a CPU without VNNI it would saturate; depthwise convolutions, which do not, have all 8 bits. Quantized twice,
    a graph has the same bytes."""
    pixels = np.random.default_rng(1).normal(size=(40, 3, 16, 16)).astype(np.float32)
    for name in ("before", "one", "two"):
        write_convolutions(tmp_path / name)
    for name in ("one", "two"):
        static(tmp_path / name, pixels)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"before", "one", "two"}

    after = onnx.load(tmp_path / "one")
    assert [(one.key, one.value) for one in after.metadata_props] == [("preprocessing", "{}")]
    kept = {one.name: numpy_helper.to_array(one) for one in after.graph.initializer}
    quantized = {name.removesuffix("_quantized"): value for name, value in kept.items() if value.dtype == np.int8}
    weights = {name: value.reshape(len(value), -1).astype(int) for name, value in quantized.items() if value.ndim > 1}
    assert weights.keys() == {"conv", "depthwise", "pointwise", "gemm"}
    for name, weight_CK in weights.items():
        sorted_CK = np.sort(weight_CK, axis=1)
        worst = max(sorted_CK[:, -2:].sum(axis=1).max(), -sorted_CK[:, :2].sum(axis=1).min())
        if name == "depthwise":
            assert np.abs(weight_CK).max(axis=1).tolist() == [127] * 8
        else:
            assert 255 * worst <= 2**15 - 1
            assert np.abs(weight_CK).max() > 80, "7 bits would have given up more than is needed"

    outputs = [
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"pixels": pixels})[0] for name in ("before", "one")
    ]
    cosines = (outputs[0] * outputs[1]).sum(axis=1) / np.prod([np.linalg.norm(one, axis=1) for one in outputs], axis=0)
    assert cosines.min() > 0.98


def test_ranges_are_measured_on_images_of_the_run(
    image_store: Store, text_store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And on those of the sample where they are gone, however the loss is measured."""
    shutil.copytree(image_store.path, tmp_path / "images.zarr")
    train(tiny_config(Store(str(tmp_path / "images.zarr")), text_store, tmp_path / "run", max_steps=1, epochs=1))
    config = ExportConfig(source=str(tmp_path / "run"), out="out", format="onnx", int8=True)
    capfd.readouterr()
    run = calibration_pixels(FACTS, config)
    assert run.shape == (96, 3, 16, 16)
    assert run.dtype == np.float32
    assert "on 96 images of the run" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "images.zarr")
    other = calibration_pixels(FACTS, config)
    assert other.shape == (128, 3, 16, 16)
    assert "cannot be read now" in (err := capfd.readouterr().err)
    assert "on 128 images of the shipped sample" in err


@pytest.mark.slow
def test_a_model_that_loses_more_leaves_nothing(
    tmp_path: Path, cifar10: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_clip(tmp_path / "clip", scale=3)
    options = {"format": "onnx", "int8": True, "check_on": (cifar10,), "max_loss": -100.0}
    with pytest.raises(DimefmError, match=r"--int8 loses .* points, more than -100: top-1 (?s:.*)remedy: .*--accept"):
        export(source, str(tmp_path / "out"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    err = capfd.readouterr().err
    assert re.search(r"int8: vision_model.onnx [\d.]+ MB -> [\d.]+ MB, dynamic int8\n", err)
    assert re.search(r"int8: top-1 .* on cifar10 \(200 images, each 0.5 points; .* points, 95% interval ", err)


@pytest.mark.slow
def test_a_quantized_model_is_loaded_as_any(tmp_path: Path, cifar10: str) -> None:
    source = write_clip(tmp_path / "clip", scale=3)
    export(source, str(tmp_path / "out"), format="onnx", int8=True, check_on=(cifar10,), max_loss=-100.0, accept=True)
    document = read_export(str(tmp_path / "out"))
    assert document.onnx is not None
    assert document.onnx.quantized == {IMAGE_ONNX: "dynamic int8", TEXT_ONNX: "dynamic int8"}
    assert (tmp_path / "out" / TEXT_ONNX).stat().st_size < 1.2e6  # its table of tokens alone is 3.2 MB in float32
    one, other = (load_clip(f"local-dir:{tmp_path / name}", device="cpu") for name in ("clip", "out"))
    texts = ["a cat", "a photo of two dogs"]
    assert (one.encode_texts(texts) * other.encode_texts(texts)).sum(dim=1).min() > 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accept": True}, "--accept has no effect without --int8"),
        ({"max_loss": 2.0}, "--max-loss has no effect without --int8"),
        ({"int8": True, "precision": "fp16"}, "--int8 quantizes float32"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DimefmError, match=message):
        ExportConfig(source="run", out="out", format="onnx", **options)  # type: ignore[arg-type]
