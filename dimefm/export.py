"""A trained student as an open_clip folder: its image tower beside the teacher's text tower."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cache_schemas import Run, StudentSpec
from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.clip import Clip, load_clip
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.hub import require_here
from dimefm.run import read_run
from dimefm.student import tokenizer_of
from dimefm.validate import student_preprocessing

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


def export(
    run: str,
    out: str,
    *,
    checkpoint: str = "last",
    weights: str = "model",
    teacher: str | None = None,
    pretrained: str | None = None,
) -> str:
    """Write the student of `run` to `out`, for ``open_clip.create_model_and_transforms("local-dir:OUT")``.

    `checkpoint` is "last", "best" or the number of a step; `weights` "model", or "ema" for their moving average.
    `teacher` and `pretrained` say where the teacher is now, if not where the run recorded it; its weights must be the
    same; a student with a text tower of its own needs none. The folder appears whole or not at all; one with the same
    bytes already there is left as it is. Raises StoreError for a run without a checkpoint, MismatchError for another
    teacher, OutputExistsError.
    """
    out = storage.local(out, "an export")
    document = read_run(run)
    state = Checkpoints(run).load(checkpoint)
    if state is None:
        raise StoreError(f"{run} has no {checkpoint} checkpoint", remedy="dimefm info RUN lists them")
    image = {f"visual.{name}": value for name, value in _chosen(run, state["image"], weights).items()}
    if document.text_student:
        require_here(document.text_student.name, run)
        text = {f"text.{name}": value for name, value in _chosen(run, state["text"], weights).items()}
        preprocessing = asdict(student_preprocessing(document.student))
        config = {"model_cfg": _own_config(document), "preprocess_cfg": preprocessing}
        scale = torch.tensor(math.log(_logit_scale(document, state["image"])))
        tokenizer = tokenizer_of(document.text_student)
        publish_folder(Path(out), config, {**text, **image, "logit_scale": scale}, tokenizer)
        return out
    name, tag = teacher or document.teacher.name, pretrained or document.teacher.pretrained
    if not teacher:
        require_here(name, run)
    clip = load_clip(name, tag, known=document.teacher, precision="fp32", device="cpu")
    differences = document.teacher.differences(clip.identity, ignore=("precision",))
    if differences:
        what = f"{clip.identity.name} is not the teacher of {run}: {'; '.join(differences)}"
        raise MismatchError(what, remedy="name the teacher with --teacher and --pretrained")
    config, text = beside_text_tower(clip, document.student)
    if (learned := state["image"]["objective"].get("log_scale")) is not None:
        text["logit_scale"] = learned.to(text["logit_scale"])
    publish_folder(Path(out), config, {**text, **image}, clip.tokenizer)
    return out


def beside_text_tower(clip: Clip, spec: StudentSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's config of a model with this image tower and the text tower of `clip`, and the latter's weights."""
    model_cfg = {**copy.deepcopy(clip.model_cfg), "vision_cfg": spec.vision_cfg}
    text = {name: value for name, value in clip.model.state_dict().items() if not name.startswith("visual.")}
    return {"model_cfg": model_cfg, "preprocess_cfg": asdict(student_preprocessing(spec))}, text


def _chosen(run: str, tower: dict[str, Any], weights: str) -> dict[str, Any]:
    """The weights of a tower that are asked for."""
    if weights == "model":
        return tower["model"]  # type: ignore[no-any-return]
    if tower["ema"] is None:
        raise StoreError(
            f"{run} has no moving average of its weights", remedy="train with --ema, or leave --weights out"
        )
    return tower["ema"]["weights"]  # type: ignore[no-any-return]


def _own_config(document: Run) -> dict[str, Any]:
    """The model of a student with both towers of its own, as open_clip describes one."""
    assert document.text_student
    return {
        "embed_dim": document.student.embed_dim,
        "quick_gelu": document.student.activation == "quick_gelu",
        "custom_text": True,
        "vision_cfg": document.student.vision_cfg,
        "text_cfg": document.text_student.text_cfg,
    }


def _logit_scale(document: Run, image: dict[str, Any]) -> float:
    """What the student learned, else that of its teacher."""
    learned = image["objective"].get("log_scale")
    return math.exp(float(learned)) if learned is not None else document.teacher.logit_scale


def publish_folder(out: Path, config: dict[str, Any], weights: dict[str, Any], tokenizer: Any) -> None:
    """Write an open_clip folder, whole or not at all; one with the same bytes already there is left as it is. Raises
    OutputExistsError for anything else at `out`, StoreError where it cannot be written."""
    with storage.publishing(str(out)) as temporary:
        with storage.writing_to(str(out)), _named_cause():
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            if hasattr(tokenizer, "save_pretrained"):  # one of Hugging Face: open_clip looks for its files there
                tokenizer.save_pretrained(str(temporary))
            whole = {name: value.contiguous().clone() for name, value in weights.items()}
            save_file(whole, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        if out.exists():
            same = all(
                (out / name).exists() and (out / name).read_bytes() == (temporary / name).read_bytes()
                for name in (CONFIG_FILE, WEIGHTS_FILE)
            )
            if not same:
                what = f"{out} exists and holds something else"
                raise OutputExistsError(what, remedy="give another --out, or delete it")
            shutil.rmtree(temporary)


@contextmanager
def _named_cause() -> Iterator[None]:
    """For the block, an error of the system that a library in Rust has put into words is an OSError."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
