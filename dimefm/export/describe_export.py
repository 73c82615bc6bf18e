"""What the user is told of an exported folder: its size, how it was checked, how to load it."""

from __future__ import annotations

from pathlib import Path

from cache_schemas.export import IMAGE_ONNX, TEXT_ONNX, TRANSFORMERS_WEIGHTS, Export, ExportFormat
from cache_schemas.run import WEIGHTS_FILE
from dimefm.models.exported import read_export
from dimefm.system.progress import amount
from dimefm.system.wording import counted

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


def checked(figures: dict[str, float]) -> list[str]:
    """Lines about the check after writing."""
    compared = [
        f"{counted(int(figures[f'{kind}s']), word)}, smallest cosine {_cosine(figures[f'{kind}_cosine'])}"
        for kind, word in (("image", "image"), ("text", "sentence"))
    ]
    lines = [f"checked against PyTorch on {'; '.join(compared)}"]
    for name, after in figures.items():
        if name.startswith("top1/"):
            title = name.removeprefix("top1/")
            before, images = figures[f"pytorch_top1/{title}"], counted(int(figures[f"images/{title}"]), "image")
            same = "as PyTorch" if after == before else f"PyTorch {100 * before:.2f}%"
            lines.append(f"top-1 accuracy on {images} of {title}: {100 * after:.2f}%, {same}")
    return lines


def _cosine(value: float) -> str:
    """As much as differs from 1, since six digits of nine say nothing."""
    return f"1 - {max(0.0, 1 - value):.0e}" if value > 0.9999 else f"{value:.5f}"


def _use(export: Export, typed: str) -> str:
    if export.format == "open_clip":
        return f"load it with open_clip as local-dir:{typed}"
    if export.format == "transformers":
        return f"load it with transformers: AutoModel.from_pretrained({typed!r})"
    return f"load {IMAGE_ONNX} and {TEXT_ONNX} with onnxruntime, or use it here: dimefm evaluate {typed} SET"
