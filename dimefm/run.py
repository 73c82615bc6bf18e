"""The folder of a training run: made by the first start, checked by every later one."""

from __future__ import annotations

from pathlib import Path

from cache_schemas import Run
from cache_schemas.run import RUN_FILE
from dimefm import storage
from dimefm.commits import versions
from dimefm.config import TrainConfig
from dimefm.errors import MismatchError, OutputExistsError, StoreError
from dimefm.pairs import Pairs
from dimefm.selected import SelectedTexts
from dimefm.store import Store
from dimefm.student import student_spec


def read_run(path: str) -> Run:
    """The run.json of a run folder. Raises StoreError where there is none, SchemaError where it is not valid."""
    where = str(Path(path) / RUN_FILE)
    if not Path(where).exists():
        raise StoreError(f"{path} is not a run folder: it has no {RUN_FILE}", remedy="give the --out of train-student")
    return Run.parse(storage.read_json(where), where)


def open_run(
    config: TrainConfig,
    images: Store,
    texts: Store,
    pairs: Pairs | None,
    selection: SelectedTexts | None,
    steps: int,
    *,
    write: bool,
) -> Run:
    """The run document of `config`, written if this is the first start and `write`.

    Raises MismatchError where the folder holds a run with another config or other stores, and names the fields;
    OutputExistsError where it holds something else.
    """
    teacher = images.schema.teacher
    run = Run(
        config=config.to_json(),
        student=student_spec(config.student, teacher, config.image_size),
        teacher=teacher,
        images_identity=images.schema.identity,
        images_chunk_rows=images.schema.chunk_rows,
        texts_identity=texts.schema.identity,
        pairs_digest=pairs.selection().digest if pairs else None,
        selection_digest=selection.document.digest if selection else None,
        steps=steps,
        versions=versions(),
    )
    path = Path(config.out) / RUN_FILE
    if path.exists():
        _require_same(config, read_run(config.out), run)
    elif storage.listing(config.out):
        what = f"{config.out} exists and is not a run folder (it holds {storage.listing(config.out)[0]!r})"
        raise OutputExistsError(what, remedy="give another --out")
    elif write:
        storage.write_json(str(path), run.to_json())
    return run


def _require_same(config: TrainConfig, old: Run, new: Run) -> None:
    differences = TrainConfig.parse(old.config, f"{config.out}/{RUN_FILE}").differences(config)
    for name in ("images_identity", "images_chunk_rows", "texts_identity", "pairs_digest", "selection_digest", "steps"):
        mine, theirs = getattr(old, name), getattr(new, name)
        if mine != theirs:
            differences.append(f"{name}: {mine} != {theirs}")
    if differences:
        lines = "".join(f"\n  - {d}" for d in differences)
        what = f"{config.out} holds a run that differs from this command (its own != this one's):{lines}"
        raise MismatchError(what, remedy="give another --out, or repeat the command that began it")
