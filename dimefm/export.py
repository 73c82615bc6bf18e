"""A trained student as an open_clip folder: its image tower beside the teacher's text tower."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.clip import Clip, load_clip
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.run import read_run
from dimefm.validate import student_preprocessing

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


def export(
    run: str, out: str, *, checkpoint: str = "last", teacher: str | None = None, pretrained: str | None = None
) -> str:
    """Write the student of `run` to `out`, for ``open_clip.create_model_and_transforms("local-dir:OUT")``.

    `teacher` and `pretrained` say where the teacher is now, if not where the run recorded it; its weights must be the
    same. The folder appears whole or not at all; one with the same bytes already there is left as it is. Raises
    StoreError for a run without a checkpoint, MismatchError for another teacher, OutputExistsError.
    """
    out = storage.local(out, "an export")
    document = read_run(run)
    state = Checkpoints(run).load(checkpoint)
    if state is None:
        raise StoreError(f"{run} has no {checkpoint} checkpoint", remedy="let dimefm train-student write one")
    name, tag = teacher or document.teacher.name, pretrained or document.teacher.pretrained
    clip = load_clip(name, tag, precision="fp32", device="cpu")
    differences = document.teacher.differences(clip.identity, ignore=("precision",))
    if differences:
        what = f"{clip.identity.name} is not the teacher of {run}: {'; '.join(differences)}"
        raise MismatchError(what, remedy="name the teacher with --teacher and --pretrained")
    config = {
        "model_cfg": {**copy.deepcopy(clip.model_cfg), "vision_cfg": document.student.vision_cfg},
        "preprocess_cfg": asdict(student_preprocessing(document.student)),
    }
    _publish(Path(out), config, _weights(clip, state["model"]), clip.tokenizer)
    return out


def _weights(clip: Clip, student: dict[str, Any]) -> dict[str, Any]:
    text = {name: value for name, value in clip.model.state_dict().items() if not name.startswith("visual.")}
    image = {f"visual.{name}": value for name, value in student.items()}
    return {name: value.contiguous().clone() for name, value in {**text, **image}.items()}


def _publish(out: Path, config: dict[str, Any], weights: dict[str, Any], tokenizer: Any) -> None:
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if hasattr(tokenizer, "save_pretrained"):  # one of Hugging Face: open_clip looks for its files in the folder
        tokenizer.save_pretrained(str(temporary))
    save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    if out.exists():
        same = all(
            (out / name).exists() and (out / name).read_bytes() == (temporary / name).read_bytes()
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
        shutil.rmtree(temporary)
        if not same:
            raise OutputExistsError(f"{out} exists and holds something else", remedy="give another --out, or delete it")
        return
    temporary.rename(out)
