"""What the user is told of an exported folder: its size, how it was checked, how to load it."""

from __future__ import annotations

from pathlib import Path

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, TRANSFORMERS_WEIGHTS, Export, ExportFormat
from cache_schemas.run import WEIGHTS_FILE
from dimefm.models.checks import checked
from dimefm.models.exported import read_export
from dimefm.system.progress import amount

_WEIGHTS: dict[ExportFormat, tuple[str, ...]] = {
    "open_clip": (WEIGHTS_FILE,),
    "onnx": (IMAGE_ONNX, TEXT_ONNX),
    "transformers": (TRANSFORMERS_WEIGHTS,),
}


def describe_export(folder: str, typed: str) -> list[str]:
    """Lines about the export in `folder`, which the user calls `typed`."""
    export = read_export(folder)
    sizes = [
        f"{name} {amount(sum(file.stat().st_size for file in Path(folder).glob(f'{name}*')))}"
        for name in _WEIGHTS[export.format]
    ]
    lines = [f"{folder}: {_use(export, typed)}"]
    return (
        lines
        if export.checks is None
        else [*lines, *(f"  {line}" for line in (", ".join(sizes), *checked(export.checks)))]
    )


def _use(export: Export, typed: str) -> str:
    if export.format == "open_clip":
        return f"load it with open_clip as local-dir:{typed}"
    if export.format == "transformers":
        return f"load it with transformers: AutoModel.from_pretrained({typed!r})"
    return f"load {IMAGE_ONNX} and {TEXT_ONNX} with onnxruntime, or use it here: dimefm evaluate {typed} SET"
