"""`leaks`: which training images, or sentences, stand in a test set.

The test images are encoded by the teacher of the store. For each, the training images nearest to it are candidates;
those whose pixels are alike too are leaks.

Shapes: N test images, K training images near to each, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schemas import Status, digest_of
from cache_schemas.evaluation import FEATURES, UNPACKED
from cache_schemas.image_selection import DROPPED_FILE, ImageSelection, ImageSelectionPlan
from cache_schemas.leaks import LEAKED, LEAKED_FILE, LEAKS_FILE, LeakedSet, Leaks
from cache_schemas.text_selection import PLAN_FILE, REPORT_FILE, ROWS_FILE, SELECTION_FILE
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import open_set
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import DimefmError, SelectionError, SourceError, UnreadableError
from dimefm.evaluation.config import ChosenSet
from dimefm.images.decode import DecodeError
from dimefm.leaks.alike import Look, similarity
from dimefm.leaks.find_text_leaks import asked_of, existing_text_leaks, find_text_leaks, require_captions
from dimefm.selection.narrow import Narrowed, Outcome
from dimefm.selection.select_images import begin_or_continue, finish_selection, remove_begun
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.store.embedding_store import Store
from dimefm.store.leaked_rows import read_leaks
from dimefm.store.parquet_tables import write_table
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device, cpus
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.wording import counted

_PAIRS = "pairs"  # of each set, until all are compared
_RESULT = {PLAN_FILE, ROWS_FILE, DROPPED_FILE, REPORT_FILE, SELECTION_FILE, LEAKS_FILE, LEAKED_FILE}
_OURS = {*_RESULT, FEATURES, UNPACKED, _PAIRS}
_ALIKE = {"image": 0.75, "text": 0.9}  # sentences of one form differ in the one word that matters
_LOOKS, _TESTED, _BLOCK = 512, 32, 4096  # looks, of 0.5 MB, that are kept: of training and of test images; pairs
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
    if config.similarity is None:
        config = replace(config, similarity=_ALIKE[images.schema.kind])
    typed = [*(one.folder for one in sets if one.definition is None), *filter(None, [data])]
    with allowing(typed), writing(out, of_use=lambda files: files - {PLAN_FILE}):
        opened = _open_all(sets, data, storage.join(out, UNPACKED), named=named)
        if images.schema.kind == "text":
            return _of_texts(config, out, images, opened, load, device)
        facts = [[one.title, test.digest()] for one, test in opened]
        plan = ImageSelectionPlan(
            images=images.path,
            images_identity=images.schema.identity,
            images_data=images.contents.digest,
            settings=None,
            leaks=digest_of([facts, config.cosine, config.similarity, config.nearest]),
        )
        begin_or_continue(out, plan, _OURS, "leaks")
        if storage.exists(storage.join(out, SELECTION_FILE)):
            return read_leaks(out)
        storage.remove_leftovers(out)
        note("loading the teacher ...")
        clip = load(images)
        try:
            return _compare(config, out, plan, images, opened, clip, device)
        except SelectionError:
            remove_begun(out, _RESULT)
            raise


def _of_texts(
    config: LeaksConfig, out: str, texts: Store, opened: list[tuple[ChosenSet, ImageSet]], load: Callable[[Store], Any],
    device: str | None,
) -> Leaks:  # fmt: skip
    require_captions(opened)
    asked = asked_of(texts, opened, config)
    if (found := existing_text_leaks(out, asked)) is not None:
        return found
    note("loading the teacher ...")
    return find_text_leaks(config, out, asked, texts, opened, load(texts), choose_device(device))


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
    config: LeaksConfig, out: str, plan: ImageSelectionPlan, images: Store, opened: list[tuple[ChosenSet, ImageSet]],
    clip: Any, device: str | None,
) -> Leaks:  # fmt: skip
    from dimefm.evaluation.features import compute_features
    from dimefm.retrieval.exact_search import ExactSearch

    search, tables, sets = ExactSearch(images, device=choose_device(device)), [LEAKED.empty_table()], list[LeakedSet]()
    for one, test in opened:
        features = compute_features(clip, test, storage.join(out, f"{FEATURES}/{one.title}.zarr"), decoder="fast")
        kept = storage.join(out, f"{_PAIRS}/{one.title}.parquet")
        if storage.exists(kept):
            table = pq.read_table(kept)
        else:
            pairs = _candidates(search, features.all(), features.readable, config)
            table = _table(one.title, images, test, pairs, _similarities(images, test, pairs), config)
            write_table(kept, table)
        tables.append(table)
        lost = int((~features.readable).sum())
        if lost:
            note(f"{counted(lost, 'image')} of {one.name} cannot be read, and so cannot be looked for")
        leaked = table.filter(table["leak"])["test_row"].unique()
        sets.append(
            LeakedSet(
                title=one.title, suite=one.suite, digest=test.digest(), tested=len(test.samples), leaked=len(leaked),
                candidates=len(table), unread=table["similarity"].null_count,
            )
        )  # fmt: skip
    found = pa.concat_tables(tables)
    if len(found) and found["similarity"].null_count == len(found):
        storage.remove_folder(storage.join(out, _PAIRS))
        what = f"not one of {counted(len(found), 'pair')} can be compared: the images of {images.path}, or of the sets,"
        raise UnreadableError(f"{what} cannot be read", remedy="put the files back, and run the same command again")
    rows = found.filter(found["leak"])["row"].unique().to_numpy()
    assert config.similarity is not None
    document = Leaks(
        kind="image",
        store=images.path,
        store_identity=images.schema.identity,
        store_data=images.contents.digest,
        asked=plan.leaks or "",
        cosine=config.cosine,
        similarity=config.similarity,
        nearest=config.nearest,
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


def _candidates(
    search: Any, feature_ND: _Array, readable_N: _Array, config: LeaksConfig
) -> list[tuple[int, int, float]]:
    """Test row, training row and cosine of each pair that is to be looked at."""
    rows_N = np.flatnonzero(readable_N)
    score_NK, row_NK = search.search(feature_ND[rows_N], config.nearest)
    near_NK = (row_NK >= 0) & (score_NK >= config.cosine)
    places, ranks = np.nonzero(near_NK)
    found = zip(rows_N[places].tolist(), row_NK[places, ranks].tolist(), score_NK[places, ranks].tolist(), strict=True)
    return list(found)


def _similarities(images: Store, test: ImageSet, pairs: list[tuple[int, int, float]]) -> Iterator[float | None]:
    """The similarity of the pixels of each pair; None where one of the two cannot be read."""
    rows = np.unique(np.array([row for _, row, _ in pairs], np.int64))
    places = dict(zip(rows.tolist(), _places(images, rows), strict=True))

    @lru_cache(_LOOKS)
    def trained(row: int) -> Look | None:
        return _look(places[row])

    @lru_cache(_TESTED)
    def tested(row: int) -> Look | None:
        sample = test.samples[row]
        return _look(ImagePlace(sample.file, sample.offset, sample.size))

    def compare(pair: tuple[int, int, float]) -> float | None:
        one, other = tested(pair[0]), trained(pair[1])
        return None if one is None or other is None else similarity(one, other)

    with ThreadPoolExecutor(cpus()) as pool, Progress(f"comparing {test.name}", len(pairs), "pair") as progress:
        for at in range(0, len(pairs), _BLOCK):
            for done, value in enumerate(pool.map(compare, pairs[at : at + _BLOCK]), at + 1):
                progress.at(done)
                yield value


def _places(images: Store, rows_N: _Array) -> list[ImagePlace]:
    if images.schema.pixels:
        return [ImagePlace(*place) for place in images.pixel_places(rows_N)]
    fields = ImagePlace._fields
    return [ImagePlace(**{name: one[name] for name in fields}) for one in images.samples(rows_N, fields)]


def _look(place: ImagePlace) -> Look | None:
    try:
        return Look(read_encoded(place)) if place.file else None
    except (DimefmError, DecodeError, OSError):
        return None


def _table(
    title: str, images: Store, test: ImageSet, pairs: list[tuple[int, int, float]], alike: Iterator[float | None],
    config: LeaksConfig,
) -> pa.Table:  # fmt: skip
    rows = np.array([row for _, row, _ in pairs], np.int64)
    keys = [one["key"] for one in images.samples(rows, ("key",))]
    values, least = list(alike), config.similarity or 0.0
    columns = {
        "set": [title] * len(pairs),
        "test_row": [test_row for test_row, _, _ in pairs],
        "test_key": [test.samples[test_row].key for test_row, _, _ in pairs],
        "row": rows,
        "key": keys,
        "cosine": [cosine for _, _, cosine in pairs],
        "similarity": values,
        "leak": [value is not None and value >= least for value in values],
    }
    return pa.table(columns, schema=LEAKED)
