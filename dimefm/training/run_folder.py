"""The folder of a training run: made by the first start, checked by every later one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache_schemas import Run, StudentSpec
from cache_schemas.run import CHECKPOINTS, METRICS_FILE, REPORT_FILE, RUN_FILE, Change, FurtherTeacher
from dimefm.errors import MismatchError, StoreError
from dimefm.store.captions import Captions, open_captions
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.output_folder import ANOTHER_OUT, OWN_AND_NEW, differing, in_lines, require_only
from dimefm.store.pairs_store import Pairs, require_pairs_match
from dimefm.store.selected_images import SelectedImages
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.versions import versions
from dimefm.training.before_training import require_changeable
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import NEVER_DIFFER, NEVER_DIFFER_IN_LOSS, TrainConfig
from dimefm.training.teacher_stores import TeacherStores, open_teachers, require_same_sentences

_FOLLOWS = {"images_data": "images", "texts_data": "texts", "pairs_digest": "pairs", "selection_digest": "selection",
            "image_selection_digest": "image_selection",
            "captions_data": "captions", "more_images_data": "more_images",
            "more_texts_data": "more_texts"}  # fmt: skip
"""Facts about the content of a run's inputs, with the config field that names the input: if the field may change, the
content may."""


@dataclass(frozen=True)
class Inputs:
    """The finished stores of a run, checked against each other. `more` are those of further teachers."""

    images: Store
    texts: Store | None
    pairs: Pairs | None
    selection: SelectedTexts | None
    captions: Captions | None = None
    more: tuple[TeacherStores, ...] = ()
    image_selection: SelectedImages | None = None

    @property
    def teachers(self) -> tuple[TeacherStores, ...]:
        """The stores of all teachers."""
        return TeacherStores(self.images, self.texts), *self.more

    @property
    def all_pairs(self) -> list[Pairs]:
        """Those that were retrieved, and those of the captions, as far as they are given."""
        return [pairs for pairs in (self.pairs, self.captions and self.captions.pairs) if pairs]


def open_inputs(config: TrainConfig) -> Inputs:
    """Open the inputs that a config names. Raises StoreError for one that is unfinished or empty, MismatchError if they
    do not belong together."""
    first, *more = open_teachers(config)
    images, texts = first.images, first.texts
    pairs = Pairs(config.pairs, cached=True) if config.pairs else None
    selection = SelectedTexts(config.selection) if config.selection else None
    if texts and pairs:
        require_pairs_match(pairs, images, texts)
    if texts and selection:
        selection.require_stores(images, texts)
    if pairs or selection:
        require_same_sentences([one.texts for one in (first, *more) if one.texts])
    if config.val_texts:
        require_same_teacher(images, Store(config.val_texts))
    captions = open_captions(config.captions, images) if config.captions else None
    image_selection = SelectedImages(config.image_selection) if config.image_selection else None
    if image_selection:
        image_selection.require_store(images)
    return Inputs(images, texts, pairs, selection, captions, tuple(more), image_selection)


def read_run(path: str) -> Run:
    """The run.json of a run folder. Raises StoreError if there is none, SchemaError if it is not valid."""
    where = str(Path(path) / RUN_FILE)
    if not Path(where).exists():
        remedy = did_you_mean_path(path, "give the --out of train-student")
        raise StoreError(f"{path} is not a run folder: it has no {RUN_FILE}", remedy=remedy)
    return Run.parse(storage.read_json(where), where)


def has_begun(out: str, files: set[str]) -> bool:
    """Whether the run in `out`, with these files, got anywhere: to a line of its log, or to a step that failed."""
    logged = METRICS_FILE in files and (Path(out) / METRICS_FILE).stat().st_size > 0
    return logged or REPORT_FILE in files or any(name.startswith(f"{CHECKPOINTS}/") for name in files)


def require_run_folder(out: str) -> None:
    """Raises OutputExistsError if the folder holds something else than a run."""
    out = storage.local(out, "a run folder")
    if not (Path(out) / RUN_FILE).exists():
        require_only(out, "a run folder", ())


def run_to_resume(out: str) -> Run | None:
    """The document of the run in `out`, if it has a checkpoint to go on from."""
    return read_run(out) if Checkpoints(out, 1).step() else None


def choose_order(config: TrainConfig, inputs: Inputs) -> Literal["chunks", "blocks"]:
    """The order of a run's rows: the one that it began with; a new run has "blocks", or "chunks" if large stores are
    read at URLs. A chunk is one request there, and "blocks" would need one for every row (store/ranged_array.py)."""
    before = run_to_resume(config.out)
    if before:
        return before.order
    read: list[Store | Pairs] = [*(one.images for one in inputs.teachers), *inputs.all_pairs]
    read += [inputs.texts] if config.text_student and inputs.texts else []
    return "chunks" if any(store.by_chunks for store in read) else "blocks"


def plan_run(
    config: TrainConfig,
    inputs: Inputs,
    steps: int,
    *,
    machine: str,
    processes: int,
    order: Literal["chunks", "blocks"],
    allow_changes: tuple[str, ...],
    done: int,
) -> Run:
    """The run document of `config`. `write_run` writes it, after everything else has been checked.

    Raises MismatchError, which names the fields, if the folder holds a run with another config, other stores or other
    embeddings in them. Fields in `allow_changes` may differ: their change after `done` steps is recorded, as is another
    `machine` or number of `processes`. Before the first checkpoint anything may differ. Raises OutputExistsError if the
    folder holds something else.
    """
    from dimefm.models.towers import text_spec  # imports open_clip: a run is read without it

    require_changeable(allow_changes)
    images, pairs, selection = inputs.images, inputs.pairs, inputs.selection
    teacher = images.schema.teacher
    run = Run(
        config=config.to_json(),
        student=_student(config, inputs, done),
        teacher=teacher,
        images_identity=images.schema.identity,
        images_chunk_rows=images.schema.chunk_rows,
        texts_identity=inputs.texts.schema.identity if inputs.texts else None,
        pairs_digest=pairs.hit_counts().digest if pairs else None,
        selection_digest=selection.document.digest if selection else None,
        image_selection_digest=inputs.image_selection.document.digest if inputs.image_selection else None,
        steps=steps,
        versions=versions(),
        text_student=text_spec(config.text_student, teacher) if config.text_student else None,
        machine=machine,
        processes=processes,
        order=order,
        undecayed="listed",
        centred_on="drawn",
        images_data=images.contents.digest,
        texts_data=inputs.texts.contents.digest if inputs.texts else None,
        captions_identity=inputs.captions.texts.schema.identity if inputs.captions else None,
        captions_data=inputs.captions.texts.contents.digest if inputs.captions else None,
        more_teachers=tuple(map(_further, inputs.more)),
    )
    path = Path(config.out) / RUN_FILE
    if path.exists() and done:
        old = read_run(config.out)
        _require_same_views(config.out, old, inputs)
        run = replace(run, undecayed=old.undecayed, centred_on=old.centred_on, student=old.student)
        changes = _changes(config, old, run, allow_changes, done)
        if not changes:
            return old
        return replace(run, changes=(*old.changes, *changes))
    require_run_folder(config.out)
    return run


def _further(stores: TeacherStores) -> FurtherTeacher:
    images, texts = stores.images, stores.texts
    return FurtherTeacher(
        teacher=images.schema.teacher,
        images_identity=images.schema.identity,
        images_data=images.contents.digest,
        texts_identity=texts.schema.identity if texts else None,
        texts_data=texts.contents.digest if texts else None,
    )


def _student(config: TrainConfig, inputs: Inputs, done: int) -> StudentSpec:
    """The image tower. Before the first checkpoint it takes the preprocessing of its first weights."""
    from dimefm.models.first_weights import fit_to_first_weights
    from dimefm.models.towers import student_spec

    teachers = [one.images.schema.teacher for one in inputs.teachers]
    width = sum(one.embed_dim for one in teachers)
    spec = student_spec(config.student, teachers[0], config.image_size, embed_dim=width)
    if not config.init or done:
        return spec
    return fit_to_first_weights(
        spec, config.init, mean=config.init_mean, std=config.init_std, activation=config.init_activation
    )


def _require_same_views(out: str, old: Run, inputs: Inputs) -> None:
    """Raises MismatchError where views were added to a store of images since the run began: it has another identity."""
    identities = [old.images_identity, *(one.images_identity for one in old.more_teachers)]
    for identity, teacher in zip(identities, inputs.teachers, strict=False):
        images = teacher.images
        if len(images.parts) > 1:
            continue
        before = (Store(images.path, additions=most).schema for most in range(len(images.additions)))
        if views := next((schema.views for schema in before if schema.identity == identity), None):
            now = images.schema.views.count if images.schema.views else 0
            what = f"{out} was begun with {views.count} views of each image, and {images.path} has {now} by now"
            raise MismatchError(what, remedy="give another --out: a new run is trained on all of them")


def write_run(out: str, run: Run) -> None:
    """Write the document, unless the same one is there."""
    path = str(Path(out) / RUN_FILE)
    if not storage.exists(path) or storage.read_json(path) != run.to_json():
        with storage.writing_to(path):
            storage.write_json(path, run.to_json())


def _changes(config: TrainConfig, old: Run, new: Run, allowed: tuple[str, ...], done: int) -> list[Change]:
    """The differences between the document `old` and the `new` one that may be. Raises MismatchError for all others."""
    before = TrainConfig.parse(old.config, f"{config.out}/{RUN_FILE}")
    differences = before.differences(config)
    differences |= differing(_parts_of_losses(before), _parts_of_losses(config))
    names = ["images_identity", "images_chunk_rows", "texts_identity", "pairs_digest", "selection_digest",
             "image_selection_digest", "steps",
             "captions_identity", "captions_data"]  # fmt: skip
    # Older runs did not record what is in their stores.
    names += [name for name in ("images_data", "texts_data") if getattr(old, name) is not None]
    differences |= differing(_named(old, names) | _of_more(old), _named(new, names) | _of_more(new))
    follow = {name for name in differences if _input_of(name) in allowed}
    if {"epochs", "max_steps", "images", "image_weights"} & set(allowed):
        follow.add("steps")
    refused = {name: values for name, values in differences.items() if name not in {*allowed, *follow}}
    if refused:
        raise _refusal(config.out, refused, allowed)
    recorded = [name for name in ("machine", "processes") if getattr(old, name)]
    differences |= differing(_named(old, recorded), _named(new, recorded))
    return [Change(step=done, field=name, values=values) for name, values in differences.items()]


def _input_of(fact: str) -> str | None:
    """The config field that names the input of a fact in _FOLLOWS."""
    return _FOLLOWS.get(fact.partition(".")[0])


def _named(run: Run, names: list[str]) -> dict[str, object]:
    return {name: getattr(run, name) for name in names}


def _of_more(run: Run) -> dict[str, object]:
    """What a run records of its further teachers' stores, by name: that of the teacher's number, such as
    "more_images_data.2"."""
    return {
        f"more_{name}.{number}": getattr(one, name)
        for number, one in enumerate(run.more_teachers, 2)
        for name in ("images_identity", "images_data", "texts_identity", "texts_data")
    }


def _parts_of_losses(config: TrainConfig) -> dict[str, object]:
    """The parts of both losses that must never differ, by name, such as "text_loss.queue"."""
    names = ((loss, part) for loss in ("loss", "text_loss") for part in NEVER_DIFFER_IN_LOSS)
    return {f"{loss}.{part}": getattr(getattr(config, loss), part) for loss, part in names}


def _refusal(out: str, refused: dict[str, str], allowed: tuple[str, ...]) -> MismatchError:
    """The error for differences that are not allowed, with the option that would allow them if there is one."""
    what = f"{out} was begun by another command {OWN_AND_NEW}:{in_lines(refused)}"
    remedy = f"{ANOTHER_OUT}, or repeat the command that began it"
    if any("None" not in refused[name].split(" != ") for name in filter(_input_of, refused)):
        what += "\n  rows were encoded, retrieved or selected again since"
    named = {*allowed, *(_input_of(name) or name for name in refused)} - {"steps"}  # steps follow from other fields
    if named <= _may_change():
        remedy += f"; to go on with the change: --allow-changes {','.join(sorted(named))}"
    return MismatchError(what, remedy=remedy)


def _may_change() -> set[str]:
    return TrainConfig.__dataclass_fields__.keys() - set(NEVER_DIFFER)
