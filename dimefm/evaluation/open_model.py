"""The model that an evaluation names: a run, an exported folder, or any of open_clip's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_schemas.identity import Precision, TeacherIdentity
from cache_schemas.run import RUN_FILE
from dimefm.models.clip import Clip, load_clip
from dimefm.models.exported import format_of
from dimefm.models.hub import require_cached
from dimefm.models.trained import Trained
from dimefm.training.student import write_student


@contextmanager
def open_model(
    model: str,
    pretrained: str | None = None,
    *,
    trained: Trained | None = None,
    known: TeacherIdentity | None = None,
    checkpoint: str = "last",
    weights: str = "model",
    precision: Precision = "fp32",
    device: str | None = None,
) -> Iterator[Clip]:
    """Load the model from a run folder (`checkpoint` and `weights` as for `export.export_student.export`), an exported
    folder of any format, or an open_clip name: with a `pretrained` tag or file (`trained` and `known` say how a file
    was trained), hf-hub:ORG/MODEL or local-dir:FOLDER. Raises a DimefmError if it cannot."""
    folder = Path(model)
    if (folder / RUN_FILE).exists():
        with tempfile.TemporaryDirectory() as temporary:
            exported = f"{temporary}/student"
            write_student(model, exported, checkpoint=checkpoint, weights=weights)
            require_cached(f"local-dir:{exported}", model)  # its towers are those that the run describes
            yield load_clip(f"local-dir:{exported}", trained=trained, precision=precision, device=device)
        return
    name = f"local-dir:{model}" if format_of(model) else model
    yield load_clip(name, pretrained, trained=trained, known=known, precision=precision, device=device)
