"""The model that an evaluation names: a run, an exported folder, or any of open_clip's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_schemas import Run
from cache_schemas.identity import Precision, TeacherIdentity
from cache_schemas.run import RUN_FILE
from dimefm.models.clip import Clip, load_clip
from dimefm.models.exported import format_of
from dimefm.models.hub import require_cached
from dimefm.models.joined_clip import JoinedClip
from dimefm.models.trained import Trained
from dimefm.system.machine import choose_device
from dimefm.training.config import TrainConfig
from dimefm.training.run_folder import read_run
from dimefm.training.student import ALL, load_vision_student, number_of_teacher, write_student


@contextmanager
def open_model(
    model: str,
    pretrained: str | None = None,
    *,
    trained: Trained | None = None,
    known: TeacherIdentity | None = None,
    checkpoint: str = "last",
    weights: str = "model",
    teacher: str | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
) -> Iterator[Clip]:
    """Load the model from a run folder (`checkpoint` and `weights` as for `export.export_student.export`), an exported
    folder of any format, or an open_clip name: with a `pretrained` tag or file (`trained` and `known` say how a file
    was trained), hf-hub:ORG/MODEL or local-dir:FOLDER. Raises a DimefmError if it cannot.

    Of a run with several teachers it has the text tower of the one that has the number `teacher`, from 1; by default of
    the first with a text tower. "all": those of all that have one, two or more, as one model.
    """
    if (Path(model) / RUN_FILE).exists():
        document = read_run(model)
        places = [place for place, one in enumerate(document.teachers) if one.has_text]
        if teacher != ALL:
            places = [number_of_teacher(document, model, teacher)]
        with tempfile.TemporaryDirectory() as temporary:
            chosen = {"checkpoint": checkpoint, "weights": weights}
            clips = []
            for place in places:
                if not document.teachers[place].has_text:
                    on = choose_device(device)
                    clips.append(load_vision_student(model, place, **chosen, precision=precision, device=on))
                    continue
                exported = f"{temporary}/student-{place}"
                write_student(model, exported, **chosen, teacher=str(place + 1) if document.more_teachers else None)
                require_cached(f"local-dir:{exported}", model)  # its towers are those that the run describes
                clips.append(load_clip(f"local-dir:{exported}", trained=trained, precision=precision, device=device))
            yield clips[0] if len(clips) == 1 else JoinedClip(clips, _weights(document, places), model)
        return
    name = f"local-dir:{model}" if format_of(model) else model
    yield load_clip(name, pretrained, trained=trained, known=known, precision=precision, device=device)


def _weights(document: Run, places: list[int]) -> list[float]:
    """The weights of the losses of some teachers of a run."""
    given = TrainConfig.parse(document.config, "run.json").teacher_weights
    return [given[place] if given else 1.0 for place in places]
