"""What `info` knows of a training run and of a model in an open_clip folder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from cache_schemas.document import to_plain
from cache_schemas.run import CONFIG_FILE, WEIGHTS_FILE, Change
from dimefm.errors import StoreError
from dimefm.inspection.description import Description, Rows
from dimefm.models.teacher_rows import teacher_rows
from dimefm.system import storage
from dimefm.system.progress import amount
from dimefm.system.wording import rate
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import LossConfig, TrainConfig
from dimefm.training.read_metrics import last_validation, read_metrics
from dimefm.training.run_folder import read_run

_HEADER = 100_000_000  # the most bytes of a safetensors header, by its format
_STORES = ("images", "texts", "more_images", "more_texts", "pairs", "captions", "selection", "image_selection")
_WEIGHTS = ("image_weights", "teacher_weights", "teacher_scales")
_COUNTS = ("running_mean", "running_var", "num_batches_tracked")  # of a batch norm: not parameters


def describe_run(path: str) -> Description:
    """A training run, finished or not."""
    run, checkpoints = read_run(path), Checkpoints(path)
    config = as_written(run.config)
    usual = {**vars(LossConfig()), **dict.fromkeys(LossConfig.WEIGHTS, 0)}  # a weight is shown unless it is 0
    train = [line for line in read_metrics(path) if line["event"] == "train"]
    last = {name: train[-1].get(name) for name in ("step", "loss", "images_per_second")} if train else None
    facts = {
        "artefact": "run",
        "path": storage.absolute(path),
        "finished": (checkpoints.step() or 0) >= run.steps,
        "student": {name: getattr(run.student, name) for name in ("name", "image_size", "embed_dim")},
        "text_student": run.text_student.name if run.text_student else None,
        "steps_done": checkpoints.step() or 0,
        "steps": run.steps,
        "batch_size": config["batch_size"],
        "loss": {name: value for name, value in config["loss"].items() if value != usual[name]},
        "machine": run.machine,
        "precision": config["precision"],
        "threads": config["threads"],
        "teacher": to_plain(run.teacher),
        "more_teachers": [to_plain(one.teacher) for one in run.more_teachers],
        **{name: config[name] for name in (*_STORES, *_WEIGHTS)},
        "last": last,
        "validation": last_validation(path),
        "checkpoints": checkpoints.steps(),
        "best_checkpoint": checkpoints.step("best"),
        "changes": list(map(_change, run.changes)),
    }
    return Description(f"{Path(path)}: training run", facts, _run(facts))


def as_written(config: dict[str, Any]) -> dict[str, Any]:
    """The config in a run.json, with the defaults of fields that it lacks. Nothing is refused: an older dimefm may have
    taken what `TrainConfig` does not take."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {**defaults, **config, "loss": {**vars(LossConfig()), **config.get("loss", {})}}


def _listed(stores: str | list[str]) -> str:
    return stores if isinstance(stores, str) else ", ".join(stores)


def _change(change: Change) -> dict[str, Any]:
    before, _, after = change.values.partition(" != ")
    return {"step": change.step, "field": change.field, "before": before, "after": after}


def _run(facts: dict[str, Any]) -> Rows:
    student, last, best = facts["student"], facts["last"], facts["best_checkpoint"]
    where = f"{facts['machine']}, {facts['precision']}, torch threads {facts['threads']}"
    rows = [
        ("student", f"{student['name']} at {student['image_size']} px, {student['embed_dim']} wide"),
        *([("text student", facts["text_student"])] if facts["text_student"] else []),
        ("steps", f"{facts['steps_done']:,} of {facts['steps']:,}, batches of {facts['batch_size']:,}"),
        ("loss", ", ".join(f"{name} {value}" for name, value in facts["loss"].items())),
        *([("machine", where)] if facts["machine"] else []),
        *teacher_rows(facts["teacher"]),
        *(row for one in facts["more_teachers"] for row in teacher_rows(one)),
        *((name.replace("_", " "), _listed(facts[name])) for name in _STORES if facts[name]),
        *(
            (name.replace("_", " "), ", ".join(f"{value:g}" for value in facts[name]))
            for name in _WEIGHTS
            if facts[name]
        ),
    ]
    if last:
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        rows.append(("last", f"loss {loss}, {rate(last['images_per_second'] or 0, 1, 'image')}"))
    rows += [("validation", f"{name} top-1 {score:.3f}") for name, score in facts["validation"].items()]
    steps = ", ".join(f"{step:,}{' (best)' if step == best else ''}" for step in facts["checkpoints"])
    rows.append(("checkpoints", f"after step {steps}" if steps else "none yet"))
    for change in facts["changes"]:
        values = f"from {change['before']} to {change['after']}"
        rows.append(("allowed", f"{change['field']} changed {values} after step {change['step']:,}"))
    return rows


def describe_model(path: str) -> Description:
    """A model in an open_clip folder: what `export` and `convert-checkpoint` write. Its weights are not loaded."""
    where = storage.join(path, CONFIG_FILE)
    config = storage.read_json(where)
    try:
        model, image, text = config["model_cfg"], config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
        width = int(model["embed_dim"])
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"{where} is no config of open_clip", remedy="write the folder again") from None
    facts = {
        "artefact": "model",
        "path": storage.absolute(path),
        "finished": True,
        "image_tower": _tower(image, "timm_model_name"),
        "text_tower": _tower(text, "hf_model_name"),
        "embed_dim": width,
        "preprocessing": config.get("preprocess_cfg") or {},
        **_weights(path),
        "load": f"local-dir:{storage.absolute(path)}",
    }
    return Description(f"{path}: open_clip model", facts, _model(facts, image))


def _tower(config: dict[str, Any], name: str) -> str:
    """A tower by its name, or else by its sizes."""
    sizes = ", ".join(f"{size} {config[size]}" for size in ("layers", "width", "heads", "patch_size") if size in config)
    return str(config.get(name) or f"open_clip's own: {sizes.replace('_', ' ')}")


def _weights(path: str) -> dict[str, Any]:
    """The file of the weights, its bytes, and the numbers of parameters by its header; None where it has another
    format than safetensors."""
    file = storage.join(path, WEIGHTS_FILE)
    if not storage.exists(file):
        return {"weights": None, "bytes": None, "parameters": None, "image_parameters": None}
    length = int.from_bytes(storage.read_bytes(file, 0, 8), "little")
    try:
        header = json.loads(storage.read_bytes(file, 8, min(length, _HEADER)))
        names = [name for name in header if name != "__metadata__" and not name.endswith(_COUNTS)]
        sizes = {name: math.prod(header[name]["shape"]) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{file} is damaged: it has no header of safetensors", remedy="write it again") from None
    image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    known = {"parameters": sum(sizes.values()), "image_parameters": image}
    return {"weights": WEIGHTS_FILE, "bytes": storage.size(file), **known}


def _model(facts: dict[str, Any], image: dict[str, Any]) -> Rows:
    pre = facts["preprocessing"]
    size = pre.get("size") or image.get("image_size") or "not known"
    pixels = " x ".join(map(str, size)) if isinstance(size, list) else str(size)
    ways = ", ".join(str(pre[name]) for name in ("resize_mode", "interpolation") if name in pre)
    rows = [
        ("image tower", facts["image_tower"]),
        ("text tower", facts["text_tower"]),
        ("images", f"{pixels} px{', ' if ways else ''}{ways}"),
        ("embeddings", f"{facts['embed_dim']} wide"),
    ]
    if facts["weights"]:
        parameters = f"{facts['parameters']:,}, of the image tower {facts['image_parameters']:,}"
        rows += [("parameters", parameters), ("weights", f"{facts['weights']}, {amount(facts['bytes'])}")]
    else:
        rows.append(("weights", f"no {WEIGHTS_FILE} here"))
    loads = f'open_clip.create_model_and_transforms("{facts["load"]}")'
    return [*rows, ("load with", loads), ("measure with", f"dimefm evaluate {facts['path']} SET")]
