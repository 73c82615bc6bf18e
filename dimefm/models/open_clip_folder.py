"""A model as a folder that open_clip loads: its config, its weights and its tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schemas import StudentSpec
from cache_schemas.run import CONFIG_FILE, WEIGHTS_FILE
from dimefm.errors import OutputExistsError, TeacherError
from dimefm.models.clip import Clip
from dimefm.models.towers import student_preprocessing
from dimefm.models.weights_file import write_weights
from dimefm.system import storage


def beside_text_tower(clip: Clip, spec: StudentSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model with this image tower and the text tower of `clip`: its open_clip config, and the weights of all but the
    image tower. Raises TeacherError for a `clip` that is not a model of open_clip."""
    if "text_cfg" not in clip.model_cfg:
        what = f"{clip.identity.name} is not in the format of open_clip, in which students are written"
        raise TeacherError(what, remedy="name the same model as an open_clip folder or by its name in open_clip")
    model_cfg = {**copy.deepcopy(clip.model_cfg), "vision_cfg": spec.vision_cfg}
    text = {name: value for name, value in clip.model.state_dict().items() if not name.startswith("visual.")}
    return {"model_cfg": model_cfg, "preprocess_cfg": asdict(student_preprocessing(spec))}, text


def publish_folder(out: Path, config: dict[str, Any], weights: dict[str, Any], tokenizer: Any) -> None:
    """Write an open_clip folder, whole or not at all. If one with the same bytes is there, it is left as it is. Raises
    OutputExistsError if anything else is at `out`, StoreError if it cannot be written."""
    with storage.publishing(str(out)) as temporary:
        with storage.writing_to(str(out)):
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            if hasattr(tokenizer, "save_pretrained"):  # one of Hugging Face: open_clip looks for its files here
                tokenizer.save_pretrained(str(temporary))
            write_weights(temporary / WEIGHTS_FILE, weights)
        if out.exists():
            same = all(
                (out / name).exists() and (out / name).read_bytes() == (temporary / name).read_bytes()
                for name in (CONFIG_FILE, WEIGHTS_FILE)
            )
            if not same:
                what = f"{out} exists and holds something else"
                or_delete = ", or delete it" if (out / CONFIG_FILE).exists() else ""  # never a folder of another kind
                raise OutputExistsError(what, remedy=f"give another --out{or_delete}")
            shutil.rmtree(temporary)
