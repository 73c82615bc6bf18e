"""The student of a run as an open_clip model: its image tower with its own text tower, or with the teacher's."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schemas import Run, StudentSpec, TeacherIdentity
from cache_schemas.export import EXPORT_FILE
from cache_schemas.identity import Precision
from cache_schemas.run import RUN_FILE
from dimefm.errors import StoreError, TeacherError
from dimefm.models.exported import format_of, read_export
from dimefm.models.names import CONFIGURED
from dimefm.system.near_names import did_you_mean_path
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.run_folder import read_run

if TYPE_CHECKING:
    from dimefm.models.clip import Clip

ALL = "all"
"""In place of a teacher's number: all of them."""


def require_checkpoint(run: str, checkpoint: str) -> int:
    """The step of a checkpoint. Raises StoreError for a run without it."""
    step = Checkpoints(run).step(checkpoint)
    if step is None:
        raise StoreError(f"{run} has no checkpoint {checkpoint}", remedy="dimefm info RUN lists them")
    return step


def distilled_from(model: str) -> str | None:
    """The digest of the weights of the teacher that a run or an exported folder was distilled from, of several the one
    whose text tower it has; None for a model that does not say it. Raises StoreError where there is neither."""
    if (Path(model) / RUN_FILE).exists():
        document = read_run(model)
        return document.teachers[number_of_teacher(document, model, None)].weights
    if format_of(model) is None:
        remedy = did_you_mean_path(model, "give a run, or what dimefm export made of one")
        raise StoreError(f"{model} is neither a run nor an exported model", remedy=remedy)
    if not Path(model, EXPORT_FILE).is_file():
        return None
    origin = read_export(model).origin
    return origin.teacher_weights if origin else None


def number_of_teacher(document: Run, run: str, teacher: str | None) -> int:
    """The place, from 0, of the teacher of a run that has the number `teacher`, from 1; by default of the first one
    with a text tower, else of the first. Raises TeacherError if there is none of that number, or just one."""
    teachers = document.teachers
    if teacher is None:
        return next((place for place, one in enumerate(teachers) if one.has_text), 0)
    if len(teachers) == 1:
        raise TeacherError(f"{run} has one teacher: --teacher {teacher} has no effect", remedy="leave it out")
    if not (teacher.isdecimal() and 1 <= int(teacher) <= len(teachers)):
        listed = "".join(f"\n  {number}: {one.name}" for number, one in enumerate(teachers, 1))
        raise TeacherError(
            f"{run} has no teacher {teacher}; its teachers are:{listed}", remedy="give one of these numbers"
        )
    return int(teacher) - 1


def write_student(
    run: str,
    out: str,
    *,
    checkpoint: str = "last",
    weights: str = "model",
    teacher: str | None = None,
    pretrained: str | None = None,
) -> TeacherIdentity:
    """Write the student of `run` to `out` as an open_clip folder. The arguments are those of
    `export.export_student.export`, and so are the errors. Returns its teacher, of several the one whose text tower it
    has."""
    import torch

    from dimefm.models.open_clip_folder import beside_text_tower, publish_folder
    from dimefm.models.towers import student_preprocessing, tokenizer_of

    document, state = _load(run, checkpoint)
    if document.text_student:
        from dimefm.models.hub import require_cached

        if teacher or pretrained:
            what = f"{run} has a text tower of its own: {'--teacher' if teacher else '--pretrained'} has no effect"
            raise TeacherError(what, remedy="leave it out")
        require_cached(document.text_student.name, run)
        image = {f"visual.{name}": value for name, value in _chosen(run, state["image"], weights).items()}
        text = {f"text.{name}": value for name, value in _chosen(run, state["text"], weights).items()}
        preprocessing = asdict(student_preprocessing(document.student))
        config = {"model_cfg": _own_config(document), "preprocess_cfg": preprocessing}
        scale = torch.tensor(math.log(_logit_scale(document, state["image"])))
        tokenizer = tokenizer_of(document.text_student)
        publish_folder(Path(out), config, {**text, **image, "logit_scale": scale}, tokenizer)
        return document.teacher
    clip, place = _text_tower(document, run, teacher, pretrained)
    spec = _spec_beside(document, place, run)
    tower = _of_teacher(document, _chosen(run, state["image"], weights), place)
    config, text = beside_text_tower(clip, spec)
    if (learned := _learned_scale(document, state["image"], place)) is not None:
        text["logit_scale"] = learned.to(text["logit_scale"])
    image = {f"visual.{name}": value for name, value in tower.items()}
    publish_folder(Path(out), config, {**text, **image}, clip.tokenizer)
    return document.teachers[place]


def load_vision_student(
    run: str, place: int, *, checkpoint: str, weights: str, precision: Precision, device: str
) -> Clip:
    """The student of a run without a text tower: its embeddings as learned from the teacher at `place`. Raises
    StoreError as `write_student` does."""
    from dimefm.models.towers import build_student, student_preprocessing
    from dimefm.models.vision_clip import vision_clip

    document, state = _load(run, checkpoint)
    spec = replace(document.student, embed_dim=document.teachers[place].embed_dim)
    tower = build_student(spec)
    tower.load_state_dict(_of_teacher(document, _chosen(run, state["image"], weights), place))
    preprocessing = student_preprocessing(spec)
    return vision_clip(tower, run, None, preprocessing, spec.embed_dim, precision=precision, device=device)


def _load(run: str, checkpoint: str) -> tuple[Run, dict[str, Any]]:
    require_checkpoint(run, checkpoint)
    state = Checkpoints(run).load(checkpoint)
    assert state is not None
    return read_run(run), state


def _text_tower(document: Run, run: str, teacher: str | None, pretrained: str | None) -> tuple[Clip, int]:
    """The teacher whose text tower the student gets, and its place among the teachers of the run. `teacher` is its
    number, or where it is now. Raises TeacherError for one without, MismatchError for a model that is none of them."""
    from dimefm.models.clip import load_clip, require_teacher
    from dimefm.models.hub import require_cached

    if teacher == ALL:
        what = (
            "open_clip has one text tower in a model: the text towers of several teachers cannot be side by side there"
        )
        raise TeacherError(
            what, remedy=f"export one of them; dimefm evaluate {run} SET --teacher all measures them together"
        )
    moved = teacher if teacher and not teacher.isdecimal() else None
    place = number_of_teacher(document, run, None if moved else teacher)
    known = document.teachers[place]
    name, tag = moved or known.name, pretrained or known.pretrained
    if not moved and not known.has_text:
        what = f"teacher {place + 1} of {run}, {name}, has no text tower, and a model of open_clip has one"
        others = any(one.has_text for one in document.teachers)
        remedy = "export it with another --teacher" if others else "train with a CLIP teacher beside it to export it"
        raise TeacherError(what, remedy=f"{remedy}; dimefm evaluate measures it by --task linear-probe")
    if pretrained and name.startswith(CONFIGURED):
        raise TeacherError(
            f"--pretrained has no effect with {name}, which has weights of its own", remedy="leave it out"
        )
    if not moved:
        require_cached(name, run)
    remedy = "name the teacher with --teacher and --pretrained"
    try:
        clip = load_clip(name, tag, known=known, precision="fp32", device="cpu")
    except TeacherError as error:
        if moved:
            raise
        raise TeacherError(f"the teacher of {run} cannot be loaded: {error.what}", remedy=remedy) from error
    if moved:
        same = [not one.differences(clip.identity, ignore=("precision",)) for one in document.teachers]
        place = same.index(True) if True in same else place
    require_teacher(clip, document.teachers[place], run, remedy=remedy, any_precision=True)
    return clip, place


def _spec_beside(document: Run, place: int, run: str) -> StudentSpec:
    """The image tower as it stands beside the text tower of the teacher at `place`. Raises TeacherError where open_clip
    would give it another activation than it was trained with."""
    from dimefm.models.towers import has_activation

    teacher, spec = document.teachers[place], document.student
    if teacher.activation != spec.activation and has_activation(spec):
        what = f"the image tower of {run} was trained with {spec.activation}, and the text tower of {teacher.name} has"
        what += f" {teacher.activation}: a model of open_clip has one activation for both"
        raise TeacherError(what, remedy="export it with another --teacher, or train a tower of timm, which has its own")
    return replace(spec, embed_dim=teacher.embed_dim, activation=teacher.activation)


def _of_teacher(document: Run, weights: dict[str, Any], place: int) -> dict[str, Any]:
    """The weights of the image tower with the projection for one teacher."""
    from dimefm.models.towers import of_columns

    if not document.more_teachers:
        return weights
    widths = [one.embed_dim for one in document.teachers]
    return of_columns(weights, document.student, sum(widths[:place]), widths[place])


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


def _learned_scale(document: Run, image: dict[str, Any], place: int) -> Any:
    """The logarithm of the logit scale that the student learned beside the teacher at `place`; None if it did not."""
    name = f"objectives.{place}.log_scale" if document.more_teachers else "log_scale"
    return image["objective"].get(name)


def _logit_scale(document: Run, image: dict[str, Any]) -> float:
    """The logit scale that the student learned, else its teacher's."""
    learned = _learned_scale(document, image, 0)
    return math.exp(float(learned)) if learned is not None else document.teacher.logit_scale
