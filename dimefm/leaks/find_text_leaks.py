"""`leaks` of a text store: which training sentences are captions of test images.

The teacher encodes the captions. The training sentences nearest to each are candidates; those that have nearly the same
words are leaks.

Shapes: M captions, K sentences near to each, D embedding width.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache_schemas import digest_of
from cache_schemas.leaks import LEAKED, LEAKED_FILE, LEAKS_FILE, LeakedSet, Leaks, LookedFor
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import SourceError
from dimefm.evaluation.config import ChosenSet
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import differing, require_only, require_same
from dimefm.store.parquet_tables import write_table
from dimefm.system import storage
from dimefm.system.progress import Progress

_WORD = re.compile(r"\w+")
_BLOCK = 512
_Array = np.ndarray[Any, Any]


class Caption(NamedTuple):
    """A caption of a test image: the image's place in its set, its key, and the words."""

    row: int
    key: str
    text: str


def require_captions(opened: list[tuple[ChosenSet, ImageSet]]) -> None:
    """Raises SourceError for a set without captions."""
    for one, test in opened:
        if test.captions is None:
            what = f"{one.name} has classes and no captions: its test images are no sentences"
            raise SourceError(what, remedy="give an image store, or sets of captions, such as coco_captions")


def existing_text_leaks(out: str, texts: Store, asked: LookedFor) -> Leaks | None:
    """What an earlier run of the same command has found. Raises OutputExistsError where `out` holds anything else."""
    require_only(out, "leaks of a text store", {LEAKED_FILE, LEAKS_FILE})
    where = storage.join(out, LEAKS_FILE)
    if not storage.exists(where):
        return None
    found = Leaks.parse(storage.read_json(where), where)
    own = {"texts_identity": found.store_identity, "texts_data": found.store_data, **found.looked_for.facts()}
    new = {"texts_identity": texts.schema.identity, "texts_data": texts.contents.digest, **asked.facts()}
    require_same(out, differing(own, new))
    return found


def find_text_leaks(
    asked: LookedFor, out: str, texts: Store, opened: list[tuple[ChosenSet, ImageSet]], clip: Any, device: str
) -> Leaks:
    """Compare the captions of each set with the sentences of the store, and write what was found."""
    from dimefm.retrieval.exact_search import ExactSearch

    search, tables, sets = ExactSearch(texts, device=device), [LEAKED.empty_table()], list[LeakedSet]()
    for one, test in opened:
        captions = _captions(test)
        table = _pairs(one.title, asked, texts, search, captions, clip)
        tables.append(table)
        leaked = table.filter(table["leak"])["test_key"].unique()
        sets.append(
            LeakedSet(
                title=one.title, suite=one.suite, digest=test.digest(), tested=len(captions), leaked=len(leaked),
                candidates=len(table), unread=0,
            )
        )  # fmt: skip
    found = pa.concat_tables(tables)
    document = Leaks(
        kind="text", store=texts.path, store_identity=texts.schema.identity, store_data=texts.contents.digest,
        asked=_digest(texts, asked), cosine=asked.cosine, similarity=asked.similarity, nearest=asked.nearest,
        sets=tuple(sets),
        rows=len(found.filter(found["leak"])["row"].unique()),
        digest=write_table(storage.join(out, LEAKED_FILE), found),
    )  # fmt: skip
    with storage.writing_to(out):
        storage.write_json(storage.join(out, LEAKS_FILE), document.to_json())
    return document


def _digest(texts: Store, asked: LookedFor) -> str:
    """That of what was looked for, in what."""
    store, sets = [texts.schema.identity, texts.contents.digest], list(map(list, asked.sets.items()))
    return digest_of([store, sets, asked.cosine, asked.similarity, asked.nearest])


def _captions(test: ImageSet) -> list[Caption]:
    assert test.captions is not None
    return [
        Caption(row, f"{sample.key}#{number}", text)
        for row, (sample, texts) in enumerate(zip(test.samples, test.captions, strict=True))
        for number, text in enumerate(texts)
    ]


def _pairs(title: str, asked: LookedFor, texts: Store, search: Any, captions: list[Caption], clip: Any) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in LEAKED.names}
    with Progress(f"comparing {title}", len(captions), "caption") as progress:
        for at in range(0, len(captions), _BLOCK):
            block = captions[at : at + _BLOCK]
            caption_MD = clip.encode_texts([one.text for one in block]).cpu().numpy()
            score_MK, row_MK = search.search(caption_MD, asked.nearest)
            near_MK = (row_MK >= 0) & (score_MK >= asked.cosine)
            sentences = {one["row"]: one for one in texts.samples(np.unique(row_MK[near_MK]))}
            for place, rank in zip(*np.nonzero(near_MK), strict=True):
                caption, sentence = block[place], sentences[int(row_MK[place, rank])]
                alike = same_words(caption.text, sentence["text"])
                values = (title, caption.row, caption.key, sentence["row"], sentence["key"],
                          float(score_MK[place, rank]), alike, alike >= asked.similarity)  # fmt: skip
                for name, value in zip(LEAKED.names, values, strict=True):
                    columns[name].append(value)
            progress.at(at + len(block))
    return pa.table(columns, schema=LEAKED)


def same_words(one: str, other: str) -> float:
    """The share of words that two sentences have in common in the same order, twice over both lengths (Ratcliff and
    Obershelp): 1 for the same sentence, whatever its capitals and punctuation."""
    mine, theirs = (_WORD.findall(text.casefold()) for text in (one, other))
    return SequenceMatcher(None, mine, theirs, autojunk=False).ratio() if mine and theirs else float(mine == theirs)
