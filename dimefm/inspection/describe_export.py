"""What `info` knows of a folder that `export` wrote, in any format, by its document. Nothing is loaded."""

from __future__ import annotations

from typing import Any

from cache_schemas.document import to_plain
from cache_schemas.export import CARD_FILE, EXPORT_FILE, Export, ExportOrigin, ExportSource
from dimefm.inspection.describe_model import describe_model
from dimefm.inspection.description import Description, Rows
from dimefm.models.checks import checked
from dimefm.models.exported import read_export, require_whole
from dimefm.system import storage
from dimefm.system.progress import amount
from dimefm.system.wording import counted

_LOADS = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{path}")',
    "onnx": "onnxruntime and tokenizers: examples/zero_shot_with_onnx.py has the twenty lines",
    "transformers": 'transformers.AutoModel.from_pretrained("{path}")',
}
_FACTS = ("format", "model", "origin", "onnx", "image_flops", "text_flops", "checks", "versions")


def describe_export(path: str) -> Description:
    """An exported model. Raises StoreError where a file of it is missing or damaged."""
    export = read_export(path)
    require_whole(path, export)
    document, place = to_plain(export), storage.absolute(path)
    model = document["model"]
    facts = {
        "artefact": "model",
        "path": place,
        "finished": True,
        **{name: model[name] for name in ("embed_dim", "preprocessing")},
        "parameters": export.parameters,
        "image_parameters": export.image_parameters,
        "load": _LOADS[export.format].format(path=place),
        **(describe_model(path).facts if export.format == "open_clip" else {}),
        **{name: document[name] for name in _FACTS},
        "files": _sizes(path, export),
    }
    return Description(f"{path}: {export.format} model", facts, _rows(export, facts))


def _sizes(path: str, export: Export) -> dict[str, int]:
    """The bytes of each file that export wrote."""
    names = [*export.files, EXPORT_FILE, *([CARD_FILE] if CARD_FILE in storage.listing(path) else [])]
    return {name: storage.size(storage.join(path, name)) for name in sorted({*names})}


def _rows(export: Export, facts: dict[str, Any]) -> Rows:
    model, pre, path = export.model, export.model.preprocessing, facts["path"]
    height, width = pre.size
    by = f"sigmoid, logit bias {model.logit_bias:g}" if model.logit_bias is not None else "softmax"
    towers = [(name.replace("_", " "), facts[name]) for name in ("image_tower", "text_tower") if name in facts]
    rows = [
        *towers,
        *(_origin(export.origin) if export.origin else [("student", "not known: no run is named in its document")]),
        ("images", f"{height} x {width} px, {pre.resize_mode}, {pre.interpolation}"),
        ("sentences", f"{counted(model.context_length, 'token')}, {model.tokenizer}"),
        ("embeddings", f"{model.embed_dim} wide, logit scale {model.logit_scale:.4g} ({by})"),
        ("parameters", f"{export.parameters:,}, of the image tower {export.image_parameters:,}"),
        *_operations(export),
        ("precision", export.number_format),
        *_graphs(export),
        ("files", ", ".join(f"{name} {amount(size)}" for name, size in facts["files"].items())),
        ("weights", f"sha256 {model.weights[:16]}"),
    ]
    rows += [("check", line) for line in checked(export.checks or {})]
    return [
        *rows,
        ("load with", _LOADS[export.format].format(path=path)),
        ("use with", f"dimefm predict {path} IMAGE --classes A,B,..."),
        ("measure with", f"dimefm evaluate {path} SET"),
    ]


def _origin(origin: ExportOrigin) -> Rows:
    weights = "" if origin.weights == "model" else ", the moving average of its weights"
    seen = f"{origin.images_seen:,} images seen, seed {origin.seed}"
    teacher = f"{origin.teacher}{f' ({origin.pretrained})' if origin.pretrained else ''}"
    return [
        ("student", f"{origin.student} after step {origin.step:,} of {origin.steps:,}{weights}"),
        ("training", seen),
        ("teacher", f"{teacher}, sha256 {origin.teacher_weights[:16]}"),
        *(("and", name) for name in origin.more_teachers),
        *((f"{one.kind}s from", _source(one)) for one in origin.sources),
    ]


def _source(source: ExportSource) -> str:
    if source.unknown:
        return f"{source.store}: {source.unknown}"
    rows = "" if source.rows is None else f", {counted(source.rows, 'row')}"
    return f"{source.store}: {', '.join(source.names)}{rows}"


def _operations(export: Export) -> Rows:
    found = [
        f"{flops / 1e6:,.1f} million per {what}"
        for flops, what in ((export.image_flops, "image"), (export.text_flops, "sentence"))
        if flops is not None
    ]
    return [("operations", ", ".join(found))] if found else []


def _graphs(export: Export) -> Rows:
    if export.onnx is None:
        return []
    ways = [f"{file} in {way}" for file, way in export.onnx.quantized.items()]
    return [("graphs", ", ".join([f"opset {export.onnx.opset}, {export.onnx.image_input} pixels", *ways]))]
