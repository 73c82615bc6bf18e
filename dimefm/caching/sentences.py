"""Clean sentences when they are planned: leave out repeats and those that are too short or too long, and shuffle them
if asked. The sentences are never all in memory, only 9 to 36 bytes for each.

Shapes: N sentences of the source.
"""

from __future__ import annotations

import errno
import json
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dimefm.caching.repeats import as_array, repeats
from dimefm.errors import SourceError, StoreError
from dimefm.sources.account import Account
from dimefm.sources.base import Source, TextSample
from dimefm.system.machine import open_files
from dimefm.system.stopping import holding

_BUCKETS = 256
_BLOCK = 65536
_KEPT, _SHORT, _LONG, _NOTHING, _REPEATED, _SAME = range(6)
_REASONS = {
    _SHORT: "sentences shorter than --min-words",
    _LONG: "sentences longer than --max-words",
    _NOTHING: "sentences of which the tokenizer leaves nothing",
    _REPEATED: "repeated sentences",
    _SAME: "sentences that the tokenizer cannot tell from one that is kept",
}
_EAST = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_SOUTH = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\uaa60-\uaa7f]")
_UNSPACED = re.compile(f"{_EAST.pattern}|{_SOUTH.pattern}")
_LETTER = re.compile(r"\w")
_EAST_LETTERS, _SOUTH_LETTERS = 2, 4  # of a word, about


@dataclass(frozen=True, kw_only=True)
class SentenceRules:
    """Which sentences to keep, by their number of words, and the seed that shuffles them; None for no limit and for
    the order of the source."""

    min_words: int | None = None
    max_words: int | None = None
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if self.min_words and self.max_words and self.min_words > self.max_words:
            what = f"--min-words {self.min_words} is more than --max-words {self.max_words}: no sentence has both"
            raise SourceError(what, remedy="change one of them")

    def settings(self) -> dict[str, object]:
        """The rules that are set, by name."""
        names = ("min_words", "max_words", "shuffle")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def tidy(
    source: Source[TextSample],
    rules: SentenceRules,
    account: Account,
    canonical: Callable[[str], str] | None = None,
    *,
    limit: int | None = None,
) -> Iterator[TextSample]:
    """The sentences to keep, with `limit` the first that many; those that are left out are counted in `account`.

    Reads the source twice: once to find the repeats by a 64-bit hash, once for the sentences. With `canonical` (see
    models.tokenizer), also leaves out sentences of which nothing remains for the teacher, and those that become equal
    to an earlier one: they would add no new embedding.
    """
    why = _reasons(source, rules, canonical) if limit is None else _first_reasons(source, rules, canonical, limit)
    chosen = _kept(islice(source.samples(account), None if limit is None else len(why)), why, account)
    return chosen if rules.shuffle is None else _shuffled(chosen, int((why == _KEPT).sum()), rules.shuffle)


def _kept(samples: Iterator[TextSample], why: np.ndarray[Any, Any], account: Account) -> Iterator[TextSample]:
    """The samples to keep; the others are counted. Raises SourceError where the second reading gives another number of
    samples than the first."""
    for sample, reason in zip_longest(samples, _each(why)):
        if sample is None or reason is None:
            what = f"the sentences have changed while they were read: there are no longer {len(why):,}"
            raise SourceError(what, remedy="run the same command again once nothing writes to their files")
        if reason == _KEPT:
            yield sample
        else:
            account.skip(_REASONS[reason], f"{sample.key}: {sample.text[:80]}")


def _first_reasons(
    source: Source[TextSample], rules: SentenceRules, canonical: Callable[[str], str] | None, limit: int
) -> np.ndarray[Any, Any]:
    """`_reasons` up to the sentence that is the last of `limit` to be kept. Twice as many are read, and again twice as
    many while too few of them are kept."""
    most = limit
    while True:
        most *= 2
        why = _reasons(source, rules, canonical, most)
        kept = np.flatnonzero(why == _KEPT)[:limit]
        if len(kept) == limit:
            return why[: kept[-1] + 1]
        if len(why) < most:
            return why


def _reasons(
    source: Source[TextSample], rules: SentenceRules, canonical: Callable[[str], str] | None, most: int | None = None
) -> np.ndarray[Any, Any]:
    """Why each of the first `most` sentences is left out, as uint8; _KEPT where it is not. The first of equal sentences
    is kept."""
    hashes, canonical_hashes, counts = array("q"), array("q"), array("I")
    limited = bool(rules.min_words or rules.max_words)
    for _, text in islice(source.samples(Account()), most):
        hashes.append(hash(text))
        if canonical is not None:
            canonical_hashes.append(hash(canonical(text)))
        if limited:
            counts.append(text.count(" ") + 1 if text.isascii() else words(text))
    why = np.full(len(hashes), _KEPT, np.uint8)
    if limited:
        words_N = np.array(counts, np.uint32)
        why[words_N > (rules.max_words or np.inf)] = _LONG
        why[words_N < (rules.min_words or 0)] = _SHORT
    if canonical is not None:
        why[(why == _KEPT) & (as_array(canonical_hashes) == hash(""))] = _NOTHING
    for reason, values in ((_REPEATED, hashes), (_SAME, canonical_hashes)):
        if len(values):
            for places in repeats(as_array(values), why == _KEPT):
                why[places] = reason
    return why


def words(text: str) -> int:
    """The number of words in a sentence, as separated by spaces. Chinese and Japanese are written without spaces: there
    two letters count as a word, and in Thai, Lao, Khmer and Burmese four, each kind rounded up. Numbers and words of
    other scripts between them count as words; punctuation does not."""
    if not _UNSPACED.search(text):
        return text.count(" ") + 1
    east, south = len(_EAST.findall(text)), len(_SOUTH.findall(text))
    others = sum(1 for word in _UNSPACED.sub(" ", text).split() if _LETTER.search(word))
    return others + -(-east // _EAST_LETTERS) + -(-south // _SOUTH_LETTERS)


def _shuffled(samples: Iterator[TextSample], count: int, seed: int) -> Iterator[TextSample]:
    """The samples in a random order: each is written to the bucket of its new place, then each bucket is sorted."""
    place = np.random.default_rng(seed).permutation(count)
    with holding(), tempfile.TemporaryDirectory(prefix="dimefm-shuffle-") as folder:
        buckets = min(_BUCKETS, count, max(1, open_files() // 2))  # the order is the same for any number of them
        paths = [Path(folder) / f"{bucket}.jsonl" for bucket in range(buckets)]
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
                for to, sample in zip(_each(place), samples, strict=True):
                    files[to * len(files) // count].write(json.dumps([to, *sample]) + "\n")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "set TMPDIR to a folder with room for all sentences"
            raise StoreError(f"{folder} cannot be written: {error.strerror}", remedy=remedy) from error
        for path in paths:
            with path.open(encoding="utf-8") as lines:
                bucket = sorted(map(json.loads, lines))
            path.unlink()
            yield from (TextSample(key, text) for _, key, text in bucket)


def _each(place: np.ndarray[Any, Any]) -> Iterator[int]:
    """The numbers one by one; all of them as Python objects would take five times the memory."""
    return chain.from_iterable(place[at : at + _BLOCK].tolist() for at in range(0, len(place), _BLOCK))
