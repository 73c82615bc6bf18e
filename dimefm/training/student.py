"""The student of a run as an open_clip model: its image tower with its own text tower, or with the teacher's."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schemas import Run
from cache_schemas.export import EXPORT_FILE
from cache_schemas.run import RUN_FILE
from dimefm.errors import StoreError, TeacherError
from dimefm.models.exported import format_of, read_export
from dimefm.models.names import CONFIGURED
from dimefm.system.near_names import did_you_mean_path
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.run_folder import read_run


def require_checkpoint(run: str, checkpoint: str) -> int:
    """The step of a checkpoint. Raises StoreError for a run without it."""
    step = Checkpoints(run).step(checkpoint)
    if step is None:
        raise StoreError(f"{run} has no checkpoint {checkpoint}", remedy="dimefm info RUN lists them")
    return step


def distilled_from(model: str) -> str | None:
    """The digest of the weights of the teacher that a run or an exported folder was distilled from; None for a model
    that does not say it. Raises StoreError where there is neither."""
    if (Path(model) / RUN_FILE).exists():
        return read_run(model).teacher.weights
    if format_of(model) is None:
        remedy = did_you_mean_path(model, "give a run, or what dimefm export made of one")
        raise StoreError(f"{model} is neither a run nor an exported model", remedy=remedy)
    if not Path(model, EXPORT_FILE).is_file():
        return None
    origin = read_export(model).origin
    return origin.teacher_weights if origin else None


def write_student(
    run: str,
    out: str,
    *,
    checkpoint: str = "last",
    weights: str = "model",
    teacher: str | None = None,
    pretrained: str | None = None,
) -> None:
    """Write the student of `run` to `out` as an open_clip folder. The arguments are those of
    `export.export_student.export`, and so are the errors."""
    import torch

    from dimefm.models.clip import load_clip, require_teacher
    from dimefm.models.hub import require_cached
    from dimefm.models.open_clip_folder import beside_text_tower, publish_folder
    from dimefm.models.towers import student_preprocessing, tokenizer_of

    require_checkpoint(run, checkpoint)
    document, state = read_run(run), Checkpoints(run).load(checkpoint)
    assert state is not None
    image = {f"visual.{name}": value for name, value in _chosen(run, state["image"], weights).items()}
    if document.text_student:
        if teacher or pretrained:
            what = f"{run} has a text tower of its own: {'--teacher' if teacher else '--pretrained'} has no effect"
            raise TeacherError(what, remedy="leave it out")
        require_cached(document.text_student.name, run)
        text = {f"text.{name}": value for name, value in _chosen(run, state["text"], weights).items()}
        preprocessing = asdict(student_preprocessing(document.student))
        config = {"model_cfg": _own_config(document), "preprocess_cfg": preprocessing}
        scale = torch.tensor(math.log(_logit_scale(document, state["image"])))
        tokenizer = tokenizer_of(document.text_student)
        publish_folder(Path(out), config, {**text, **image, "logit_scale": scale}, tokenizer)
        return
    name, tag = teacher or document.teacher.name, pretrained or document.teacher.pretrained
    if pretrained and name.startswith(CONFIGURED):
        raise TeacherError(
            f"--pretrained has no effect with {name}, which has weights of its own", remedy="leave it out"
        )
    if not teacher:
        require_cached(name, run)
    remedy = "name the teacher with --teacher and --pretrained"
    try:
        clip = load_clip(name, tag, known=document.teacher, precision="fp32", device="cpu")
    except TeacherError as error:
        if teacher:
            raise
        raise TeacherError(f"the teacher of {run} cannot be loaded: {error.what}", remedy=remedy) from error
    require_teacher(clip, document.teacher, run, remedy=remedy, any_precision=True)
    config, text = beside_text_tower(clip, document.student)
    if (learned := state["image"]["objective"].get("log_scale")) is not None:
        text["logit_scale"] = learned.to(text["logit_scale"])
    publish_folder(Path(out), config, {**text, **image}, clip.tokenizer)


def _chosen(run: str, tower: dict[str, Any], weights: str) -> dict[str, Any]:
    """The weights of a tower, or their moving average."""
    if weights == "model":
        return tower["model"]  # type: ignore[no-any-return]
    if tower["ema"] is None:
        raise StoreError(
            f"{run} has no moving average of its weights", remedy="train with --ema, or leave --weights out"
        )
    return tower["ema"]["weights"]  # type: ignore[no-any-return]


def _own_config(document: Run) -> dict[str, Any]:
    """open_clip's config of a student with two towers of its own."""
    assert document.text_student
    return {
        "embed_dim": document.student.embed_dim,
        "quick_gelu": document.student.activation == "quick_gelu",
        "custom_text": True,
        "vision_cfg": document.student.vision_cfg,
        "text_cfg": document.text_student.text_cfg,
    }


def _logit_scale(document: Run, image: dict[str, Any]) -> float:
    """The logit scale that the student learned, else its teacher's."""
    learned = image["objective"].get("log_scale")
    return math.exp(float(learned)) if learned is not None else document.teacher.logit_scale
