"""The parts of a model card that come from the document of an export: what the model is and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from cache_schemas.export import Export, ExportOrigin, ExportSource
from dimefm.export.card_words import code, repository, words
from dimefm.models.checks import checked
from dimefm.models.exported import bytes_of_weights
from dimefm.models.names import FOLDER
from dimefm.system.markdown_table import markdown_table
from dimefm.system.progress import amount
from dimefm.training.config import LossConfig

_RECIPE = ("epochs", "batch_size", "texts_per_step", "lr", "weight_decay", "warmup_epochs", "crop_scale", "flip", "ema",
           "init", "clip_grad", "max_steps", "precision")  # fmt: skip
"""Fields of the training config that the card shows, where they are set; dimefm_export.json has all."""

_RESIZED = {
    "shortest": "resized by the shortest side",
    "longest": "resized by the longest side and padded",
    "squash": "squashed",
}


def summary(document: Export) -> list[str]:
    """The title, and what the model is in two sentences."""
    model, origin = document.model, document.origin
    whole, image = (f"{count / 1e6:.1f} million" for count in (document.parameters, document.image_parameters))
    text = f"A CLIP model with {whole} parameters, {image} of them in the image tower: it gives images and sentences "
    text += f"embeddings of {model.embed_dim} numbers that can be compared, for zero-shot classification and search."
    if origin:
        text += f" Its image tower, {code(origin.student)}, was distilled with dimefm from {_teacher(origin)}"
        text += "".join(f" and {name}" for name in _further(origin)) + "."
    return [f"# {words(model.name)}", "", text]


def origin_section(document: Export) -> list[str]:
    """What the model was distilled from and on."""
    origin = document.origin
    if origin is None:
        return ["## Training", "", "It is not recorded how this model was trained."]
    config = cast("dict[str, Any]", origin.config)
    text, shares = config.get("text_student"), config.get("teacher_weights")
    facts = [
        ("image tower", code(origin.student)),
        ("text tower", f"{code(text)}, distilled too" if text else "that of the teacher, unchanged"),
        ("teacher", f"{_teacher(origin)}, weights sha256 {code(origin.teacher_weights[:16])}"),
        *(("further teacher", name) for name in _further(origin)),
        *([("weights of teachers", ", ".join(f"{weight:g}" for weight in shares))] if shares else []),
        ("weights", f"after step {origin.step:,} of {origin.steps:,}" + ", moving average" * (origin.weights == "ema")),
        ("images seen", f"{origin.images_seen:,}"),
        (
            "losses",
            _losses(config.get("loss", {})) + (f"; text tower: {_losses(config.get('text_loss', {}))}" if text else ""),
        ),
        ("sentences", ", ".join(f"{kind} {share:g}" for kind, share in config.get("text_mix", {}).items() if share)),
        ("recipe", ", ".join(f"{name} {_plain(config[name])}" for name in _RECIPE if config.get(name) is not None)),
        ("seed", str(origin.seed)),
        ("versions", ", ".join(f"{words(name)} {words(version)}" for name, version in origin.versions.items())),
        *([("machine", words(origin.machine))] if origin.machine else []),
        *(("changed", f"{words(one.field)} after step {one.step:,}: {words(one.values)}") for one in origin.changes),
    ]
    about = "No teacher ran in training: its embeddings of these images and sentences were cached before."
    return ["## Training", "", *markdown_table([("", ""), *facts]), "", about, "", *_data(origin.sources)]


def _data(sources: tuple[ExportSource, ...]) -> list[str]:
    rows = [["data", "store", "made from", "rows", "sha256 of the embeddings"]]
    for one in sources:
        names = ", ".join(map(code, one.names)) or "not known"
        rows.append(
            [f"{one.kind}s", code(one.store), names, "not known" if one.rows is None else f"{one.rows:,}",
             code(one.digest[:16]) if one.digest else "not recorded"]
        )  # fmt: skip
    unknown = [f"{one.kind.capitalize()}s: {words(one.unknown)}." for one in sources if one.unknown]
    return [*markdown_table(rows, "lllrl"), *(["", *unknown] if unknown else [])]


def format_section(document: Export, folder: Path) -> list[str]:
    """The form that the model has, and how it was checked."""
    model, facts = document.model, document.model.preprocessing
    height, width = facts.size
    bias = "" if model.logit_bias is None else f", bias {model.logit_bias:.6g}"
    rows = [
        ("format", f"{document.format}, {amount(bytes_of_weights(str(folder)))} of weights, {document.number_format}"),
        ("images", f"{height} x {width} px, {_RESIZED[facts.resize_mode]}, {facts.interpolation}, mean "
                   f"{_plain(facts.mean)}, std {_plain(facts.std)}"),
        ("sentences", f"up to {model.context_length} tokens of {words(model.tokenizer)}; the rest is cut off"),
        ("logit scale", f"{model.logit_scale:.6g}{bias}"),
        ("weights", f"sha256 {code(model.weights)}"),
    ]  # fmt: skip
    if document.onnx:
        pixels = {"uint8": "uint8, 0 to 255", "float32": "float32, normalised before"}[document.onnx.image_input]
        rows.append(("graphs", f"opset {document.onnx.opset}, pixels {pixels}"))
        rows += [("quantized", f"{code(name)}: {way}") for name, way in document.onnx.quantized.items()]
    flops = {"image": document.image_flops, "sentence": document.text_flops}
    known = [f"{count / 1e9:.2f} GFLOPs per {item}" for item, count in flops.items() if count is not None]
    rows += [("work", ", ".join(known))] if known else []
    rows += [("check", words(line)) for line in checked(document.checks)] if document.checks else []
    return ["## Format", "", *markdown_table([("", ""), *rows])]


def limits_section(document: Export, measured: bool) -> list[str]:
    """What the model should not be trusted with, as far as that follows from what it is."""
    teacher = (
        "It has its teacher's errors and biases, and errors of its own: it imitates the teacher on the data above."
    )
    lines = [teacher] if document.origin else []
    sets = "The results hold for the sets above" if measured else "Nothing is known of its accuracy"
    lines += [
        f"{sets}; measure it on your own data before you rely on it.",
        "It gives every image the likeliest of the classes that it is asked about, also where none fits.",
        "It understands the languages that the sentences of its text tower had, which for most CLIP models is English.",
    ]
    return ["## Limits", "", *(f"- {line}" for line in lines)]


def licence_section(licence: str | None, data_licence: str | None) -> list[str]:
    """The licences of weights and data, as the author gives them."""
    unstated = "its author states none here"
    return [
        "## Licence",
        "",
        f"- Weights: {code(licence) if licence else unstated}",
        f"- Data that it was trained on: {words(data_licence) if data_licence else unstated}",
    ]


def _teacher(origin: ExportOrigin) -> str:
    if name := repository(origin):
        return f"[{name}](https://huggingface.co/{name})"
    return code(f"{origin.teacher.removeprefix(FOLDER)} {origin.pretrained or ''}")


def _further(origin: ExportOrigin) -> list[str]:
    return [code(name.removeprefix(FOLDER)) for name in origin.more_teachers]


def _losses(loss: dict[str, Any]) -> str:
    return ", ".join(f"{name} {loss[name]:g}" for name in LossConfig.WEIGHTS if loss.get(name))


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_plain, value)) if len(value) == 2 else ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else words(value)
