"""What 8 bits cost a student in accuracy, and what they save in size and time; and why weights are scaled as they are.

Each model is exported to ONNX in float32, float16 and int8, with the check that every export has: its accuracy and its
cosines to the PyTorch model are those of the check. A tower of convolutions is also quantized in other ways.
"""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization

from benchmarks.measure import machine, median, rounds, table
from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX
from dimefm.evaluation.open_model import open_model
from dimefm.export.calibration import calibration_pixels
from dimefm.export.config import ExportConfig
from dimefm.export.export_student import export
from dimefm.export.int8 import STATIC, Batches, static
from dimefm.export.onnx_format import ImageGraph
from dimefm.export.onnx_graph import write_graph
from dimefm.models.exported import read_export
from dimefm.models.onnx_towers import OnnxTowers
from dimefm.sample import sample_dir

KINDS: dict[str, dict[str, Any]] = {
    "float32": {}, "float16": {"precision": "fp16"}, "int8": {"int8": True, "accept": True},
}  # fmt: skip
HEAD = ("model", "weights", "top-1", "image cosine", "text cosine", "image tower", "text tower", "ms per image")
ROUNDS = 15


@click.command()
@click.argument("models", nargs=-1)
@click.option("--check-on", multiple=True, help="Labelled sets. Default: those of export.")
@click.option("--schemes", is_flag=True, help="Instead, other ways to quantize the convolutions of each model.")
def int8(models: tuple[str, ...], check_on: tuple[str, ...], schemes: bool) -> None:
    """Students in float32, float16 and int8, on one thread.

    MODELS: runs or open_clip folders; none: the teacher of the sample. Nothing is drawn at random.
    """
    logging.disable(logging.WARNING)  # onnxruntime's quantizer asks for a preparation that brings nothing here
    rows = list[tuple[str, ...]]()
    for model in models or (str(sample_dir() / "teacher"),):
        with tempfile.TemporaryDirectory() as scratch:
            if schemes:
                rows += _schemes(model, Path(scratch))
                continue
            for kind, options in KINDS.items():
                export(model, f"{scratch}/{kind}", format="onnx", check_on=check_on, **options)
            milliseconds = _milliseconds([f"{scratch}/{kind}" for kind in KINDS])
            rows += [_row(model, Path(scratch, kind), time) for kind, time in zip(KINDS, milliseconds, strict=True)]
    head = ("model", "weights of convolutions", "mean cosine", "smallest", "ms per image") if schemes else HEAD
    click.echo(f"\n{table(head, rows)}\n\n{machine()}")


def _row(model: str, folder: Path, milliseconds: float) -> tuple[str, ...]:
    document = read_export(str(folder))
    checks = document.checks or {}
    top1 = [f"{kind.partition('/')[2]} {100 * value:.1f}" for kind, value in checks.items() if kind.startswith("top1/")]
    cosines = (f"{checks[f'{tower}_cosine']:.5f}" for tower in ("image", "text"))
    sizes = (f"{(folder / file).stat().st_size / 1e6:.2f} MB" for file in (IMAGE_ONNX, TEXT_ONNX))
    return (Path(model).name, folder.name, ", ".join(top1), *cosines, *sizes, f"{milliseconds:.2f}")


def _milliseconds(folders: list[str]) -> list[float]:
    """Of one image in a batch of its own, on one thread; the towers in turn."""
    calls: dict[str, Callable[[], object]] = {}
    for folder in folders:
        towers = OnnxTowers(folder, threads=1)
        pixels = np.zeros((1, 3, *towers.export.model.preprocessing.size), np.uint8)
        calls[folder] = partial(towers.encode_images, pixels)
    return [1000 * median(seconds) for seconds in rounds(calls, ROUNDS).values()]


def _schemes(model: str, scratch: Path) -> list[tuple[str, ...]]:
    """The image tower in several schemes, against float32, on images that were not used to measure ranges."""
    whole, path, rows = scratch / "whole.onnx", scratch / "scheme.onnx", list[tuple[str, ...]]()
    with open_model(model, device="cpu") as clip:
        facts = clip.identity.preprocessing
        tower, names = ImageGraph(clip.model, facts, "float32"), ("pixel_values", "image_embeds")
        write_graph(tower, torch.zeros(2, 3, *facts.size), whole, names=names, facts={}, half=False)
    pixels = calibration_pixels(facts, ExportConfig(source=model, out="none", format="onnx"))
    measured, unseen = pixels[::2], pixels[1::2]
    right = _embed(whole, unseen)
    plain = {"per_channel": True, "weight_type": quantization.QuantType.QInt8}
    for scheme, options in {
        "as exported": None,
        "8 bits (saturates without VNNI)": {**plain},
        "7 bits": {**plain, "reduce_range": True},
        "7 bits, one scale for all channels": {**plain, "per_channel": False, "reduce_range": True},
        "8 bits, unsigned": {**plain, "weight_type": quantization.QuantType.QUInt8},
    }.items():
        path.write_bytes(whole.read_bytes())
        if options is None:
            static(path, measured)
        else:
            batches = Batches(measured, "pixel_values")
            operations = list(STATIC)
            quantization.quantize_static(
                whole, path, batches, op_types_to_quantize=operations,
                activation_type=quantization.QuantType.QUInt8, **options,
            )  # fmt: skip
        cosine_N = (_embed(path, unseen) * right).sum(axis=1)
        session = _open(path)
        calls: dict[str, Callable[[], object]] = {"one": partial(session.run, None, {"pixel_values": unseen[:1]})}
        time = 1000 * median(rounds(calls, ROUNDS)["one"])
        rows.append((Path(model).name, scheme, f"{cosine_N.mean():.4f}", f"{cosine_N.min():.4f}", f"{time:.2f}"))
    return rows


def _open(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _embed(path: Path, pixels_N3HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = _open(path)
    parts = [session.run(None, {"pixel_values": part})[0] for part in np.array_split(pixels_N3HW, 4)]
    found: np.ndarray[Any, Any] = np.concatenate(parts)
    return found
