"""`leaks`: which training images, or sentences, stand in a test set.

The test images are encoded by the teacher of the store. For each, the training images nearest to it are candidates;
those whose pixels are alike too are leaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Status, digest_of
from cache_schemas.evaluation import FEATURES, UNPACKED
from cache_schemas.image_selection import DROPPED_FILE, ImageSelection, ImageSelectionPlan
from cache_schemas.leaks import LEAKED, LEAKED_FILE, LEAKS_FILE, LeakedSet, Leaks, LookedFor
from cache_schemas.text_selection import PLAN_FILE, REPORT_FILE, ROWS_FILE, SELECTION_FILE
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import open_set
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import SelectionError, SourceError, UnreadableError
from dimefm.evaluation.config import ChosenSet
from dimefm.leaks.find_text_leaks import existing_text_leaks, find_text_leaks, require_captions
from dimefm.leaks.image_pairs import image_pairs
from dimefm.selection.image_plan import begin_or_continue, remove_begun
from dimefm.selection.narrow import Narrowed, Outcome
from dimefm.selection.select_images import finish_selection
from dimefm.store.embedding_store import Store
from dimefm.store.leaked_rows import read_leaks
from dimefm.store.parquet_tables import parquet_bytes, write_table
from dimefm.system import storage
from dimefm.system.checked_file import read_checked, write_checked
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.wording import counted

_PAIRS = "pairs"  # of each set, until all are compared
_RESULT = {PLAN_FILE, ROWS_FILE, DROPPED_FILE, REPORT_FILE, SELECTION_FILE, LEAKS_FILE, LEAKED_FILE}
_OURS = {*_RESULT, FEATURES, UNPACKED, _PAIRS}
_ALIKE = {"image": 0.75, "text": 0.9}  # sentences of one form differ in the one word that matters
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class LeaksConfig:
    """What to compare, and from where on two images are one."""

    store: str
    """Store whose images, or sentences, must not stand in a test set."""
    out: str
    """Folder to write, such as LEAKS.selection: for images it is a selection of all others."""
    cosine: float = 0.6
    """Least cosine of the teacher's embeddings from which on two images, or sentences, are compared."""
    similarity: float | None = None
    """Least similarity, from 0 to 1, from which on they are the same: of images the correlation of their pixels,
    aligned; of sentences the share of words in common. Default: 0.75 for images, 0.9 for sentences."""
    nearest: int = 20
    """Rows of the store that each test image, or caption, is compared with."""


def find_leaks(
    config: LeaksConfig,
    sets: list[ChosenSet],
    data: str | None,
    load: Callable[[Store], Any],
    device: str | None = None,
    *,
    named: bool = True,
) -> Leaks:
    """Compare the test images of `sets` with those of the store, and write a selection of all images but the leaks; or
    of a text store compare their captions. `load` loads the teacher of the store. Sets that are not below `data` are
    left out, with a note, unless the user has `named` them.

    A run that was stopped goes on; test images are encoded once. Raises SourceError for a set that cannot be read,
    OutputExistsError where `config.out` is something else or was made of other sets, StoreError for an unfinished
    store, SelectionError where no image is left.
    """
    require_name(config.out, "a selection", ".selection")
    out = storage.local(config.out, "the result of leaks")
    images = Store(config.store)
    images.require_complete()
    typed = [*(one.folder for one in sets if one.definition is None), *filter(None, [data])]
    with allowing(typed), writing(out, of_use=lambda files: files - {PLAN_FILE}):
        opened = _open_all(sets, data, storage.join(out, UNPACKED), named=named)
        alike = _ALIKE[images.schema.kind] if config.similarity is None else config.similarity
        sets_of = {one.title: test.digest() for one, test in opened}
        asked = LookedFor(cosine=config.cosine, similarity=alike, nearest=config.nearest, sets=sets_of)
        if images.schema.kind == "text":
            return _of_texts(asked, out, images, opened, load, device)
        plan = ImageSelectionPlan(
            images=images.path,
            images_identity=images.schema.identity,
            images_data=images.contents.digest,
            settings=None,
            leaks=digest_of([list(map(list, sets_of.items())), config.cosine, alike, config.nearest]),
            looked_for=asked,
        )
        begin_or_continue(out, plan, _OURS, "leaks")
        if storage.exists(storage.join(out, SELECTION_FILE)):
            return read_leaks(out)
        storage.remove_leftovers(out)
        note("loading the teacher ...")
        clip = load(images)
        try:
            return _compare(asked, out, plan, images, opened, clip, device)
        except SelectionError:
            remove_begun(out, _RESULT)
            raise


def _of_texts(
    asked: LookedFor, out: str, texts: Store, opened: list[tuple[ChosenSet, ImageSet]], load: Callable[[Store], Any],
    device: str | None,
) -> Leaks:  # fmt: skip
    require_captions(opened)
    if (found := existing_text_leaks(out, texts, asked)) is not None:
        return found
    note("loading the teacher ...")
    return find_text_leaks(asked, out, texts, opened, load(texts), choose_device(device))


def _open_all(
    sets: list[ChosenSet], data: str | None, unpacked: str, *, named: bool
) -> list[tuple[ChosenSet, ImageSet]]:
    """The test images of the sets. Raises SourceError for one that is not there and was named, and if none is."""
    found, missing = list[tuple[ChosenSet, ImageSet]](), list[str]()
    for one in sets:
        if one.definition is None:
            found.append((one, open_folder(one.folder)))
            continue
        assert data is not None
        test = open_set(one.definition, data, "test", unpacked)
        if test is None:
            missing.append(one.name)
        else:
            found.append((one, test))
    if missing and (named or not found):
        what = f"{', '.join(missing)}: not below {data}"
        raise SourceError(what, remedy="dimefm sets NAME says where to get it")
    if missing:
        note(f"not below {data}, and so not looked at: {', '.join(missing)}")
    return found


def _compare(
    asked: LookedFor, out: str, plan: ImageSelectionPlan, images: Store, opened: list[tuple[ChosenSet, ImageSet]],
    clip: Any, device: str | None,
) -> Leaks:  # fmt: skip
    from dimefm.evaluation.features import compute_features
    from dimefm.retrieval.exact_search import ExactSearch

    search, tables, sets = ExactSearch(images, device=choose_device(device)), [LEAKED.empty_table()], list[LeakedSet]()
    for one, test in opened:
        features = compute_features(clip, test, storage.join(out, f"{FEATURES}/{one.title}.zarr"), decoder="fast")
        kept = storage.join(out, f"{_PAIRS}/{one.title}")
        if (data := read_checked(kept)) is not None:
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        else:
            table = image_pairs(one.title, images, test, search, features, asked)
            write_checked(kept, parquet_bytes(table))
        tables.append(table)
        leaked = table.filter(table["leak"])["test_row"].unique()
        sets.append(
            LeakedSet(
                title=one.title, suite=one.suite, digest=test.digest(), tested=len(test.samples), leaked=len(leaked),
                candidates=len(table), unread=table["similarity"].null_count,
                unreadable=dict(Counter(failure.status for failure in features.failures())),
            )
        )  # fmt: skip
    found = pa.concat_tables(tables)
    if len(found) and found["similarity"].null_count == len(found):
        storage.remove_folder(storage.join(out, _PAIRS))
        what = f"not one of {counted(len(found), 'pair')} can be compared: the images of {images.path}, or of the sets,"
        raise UnreadableError(f"{what} cannot be read", remedy="put the files back, and run the same command again")
    rows = found.filter(found["leak"])["row"].unique().to_numpy()
    document = Leaks(
        kind="image",
        store=images.path,
        store_identity=images.schema.identity,
        store_data=images.contents.digest,
        asked=plan.leaks or "",
        cosine=asked.cosine,
        similarity=asked.similarity,
        nearest=asked.nearest,
        sets=tuple(sets),
        rows=len(rows),
        digest=write_table(storage.join(out, LEAKED_FILE), found),
    )
    with storage.writing_to(out):
        storage.write_json(storage.join(out, LEAKS_FILE), document.to_json())
        storage.remove_folder(storage.join(out, _PAIRS))
    _finish(out, plan, images, rows)
    return document


def _finish(out: str, plan: ImageSelectionPlan, images: Store, rows: _Array) -> ImageSelection:
    """Write the selection of all images but these rows."""
    outcome_T = np.full(images.schema.rows, Outcome.NO_EMBEDDING, np.uint8)
    outcome_T[images.status() == Status.OK] = Outcome.KEPT
    outcome_T[rows] = Outcome.LEAKED
    none = np.empty(0, np.int64)
    scores_T = np.full(images.schema.rows, np.nan, np.float32)
    return finish_selection(out, plan, images, outcome_T, scores_T, (none, none), Narrowed((none, none), None, None))
