"""Sentence hygiene at plan time: repeats and sentences that are too short or too long are left out, the order is
shuffled where asked. The sentences themselves are never all in memory: 8 to 24 bytes of each are.
"""

from __future__ import annotations

import errno
import json
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dimefm.errors import SourceError, StoreError
from dimefm.machine import open_files
from dimefm.sources.account import Account
from dimefm.sources.base import Source, TextSample
from pipeline.repeats import as_array, repeats

_BUCKETS = 256
_BLOCK = 65536
_MOST_WORDS = 65535
_REPEATED = "repeated sentences"


@dataclass(frozen=True, kw_only=True)
class SentenceRules:
    """Which sentences to keep, by their number of words, and the seed of their order; None: any, as they come."""

    min_words: int | None = None
    max_words: int | None = None
    shuffle: int | None = None

    def settings(self) -> dict[str, object]:
        """Those that are set."""
        names = ("min_words", "max_words", "shuffle")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def against(self, words: int) -> str | None:
        """Why a sentence of so many words is left out; None where it is not."""
        if words < (self.min_words or 0):
            return "sentences shorter than --min-words"
        return "sentences longer than --max-words" if words > (self.max_words or _MOST_WORDS) else None


def tidy(source: Source[TextSample], rules: SentenceRules, account: Account) -> Iterator[TextSample]:
    """The sentences to keep; those that are left out are counted in `account`.

    Reads the source twice: once to know the repeats by a 64-bit hash, once for the sentences.
    """
    keep = _wanted(source, rules)
    chosen = _kept(source.samples(account), keep, rules, account)
    return chosen if rules.shuffle is None else _shuffled(chosen, int(keep.sum()), rules.shuffle)


def _kept(
    samples: Iterator[TextSample], keep: np.ndarray[Any, Any], rules: SentenceRules, account: Account
) -> Iterator[TextSample]:
    """Those to keep; the others are counted. Raises SourceError where there are not as many samples as there were."""
    for sample, wanted in zip_longest(samples, _each(keep)):
        if sample is None or wanted is None:
            what = f"the sentences have changed while they were read: there are no longer {len(keep):,}"
            raise SourceError(what, remedy="run the same command again once nothing writes to their files")
        if wanted:
            yield sample
        else:
            account.skip(rules.against(_words(sample.text)) or _REPEATED, f"{sample.key}: {sample.text[:80]}")


def _wanted(source: Source[TextSample], rules: SentenceRules) -> np.ndarray[Any, Any]:
    """True for each sentence to keep. Of those that are equal, the first is kept."""
    hashes, words = array("q"), array("H")
    for sample in source.samples(Account()):
        hashes.append(hash(sample.text))
        words.append(_words(sample.text))
    count = np.frombuffer(words, np.uint16) if len(words) else np.empty(0, np.uint16)
    short, long = count < (rules.min_words or 0), count > (rules.max_words or _MOST_WORDS)
    keep = ~(short | long)
    for places in repeats(as_array(hashes), keep.copy()):
        keep[places] = False
    return keep


def _words(text: str) -> int:
    return min(text.count(" ") + 1, _MOST_WORDS)


def _shuffled(samples: Iterator[TextSample], count: int, seed: int) -> Iterator[TextSample]:
    """A random order by `seed`: each sentence is written to the bucket of its new place, then each bucket is sorted."""
    place = np.random.default_rng(seed).permutation(count)
    with tempfile.TemporaryDirectory(prefix="dimefm-shuffle-") as folder:
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
    """Its numbers one by one: all at once, as objects, they would take five times the memory."""
    return chain.from_iterable(place[at : at + _BLOCK].tolist() for at in range(0, len(place), _BLOCK))
