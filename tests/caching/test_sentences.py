"""Sentence hygiene: what is left out and counted, the order by seed, and the rows that come of it."""

from __future__ import annotations

import errno
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from open_clip.tokenizer import SimpleTokenizer

from cache_schemas import Status
from cache_schemas.plan import SourceFile
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.sentences import SentenceRules, tidy, words
from dimefm.cli import cli
from dimefm.errors import MismatchError, StoreError
from dimefm.models.clip import Clip
from dimefm.models.tokenizer import canonical
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.store.embedding_store import Store
from tests.conftest import cached


class Sentences:
    """A source of these sentences, which counts how often it is read through."""

    def __init__(self, texts: Callable[[], Iterator[str]]) -> None:
        self._texts, self.passes = texts, 0

    def files(self) -> list[SourceFile]:
        return []

    def samples(self, account: Account) -> Iterator[TextSample]:
        self.passes += 1
        account.problem("one line is broken")
        return (TextSample(f"k{i}", text) for i, text in enumerate(self._texts()))


SHORT, LONG = "sentences shorter than --min-words", "sentences longer than --max-words"


def tidied(
    texts: list[str], canonical: Callable[[str], str] | None = None, **rules: int
) -> tuple[list[TextSample], dict[str, int]]:
    account = Account()
    found = list(tidy(Sentences(lambda: iter(texts)), SentenceRules(**rules), account, canonical))
    return found, {one.reason: one.count for one in account.skipped()}


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def texts_of(store: Store) -> list[str]:
    return [row["text"] for shard in range(store.schema.shards) for row in store.plan(shard).to_pylist()]


# -- what is left out -------------------------------------------------------------------------------------------------


def test_of_equal_sentences_the_first_is_kept() -> None:
    found, dropped = tidied(["b", "a", "b", "A", "a", "b"])
    assert found == [TextSample("k0", "b"), TextSample("k1", "a"), TextSample("k3", "A")]
    assert dropped == {"repeated sentences": 3}


def test_sentences_are_kept_within_both_limits_and_each_reason_is_counted() -> None:
    found, dropped = tidied(
        ["one", "one two", "one two three", "a b c d", "one", "e f", "e f"], min_words=2, max_words=3
    )
    assert [sample.text for sample in found] == ["one two", "one two three", "e f"]
    assert dropped == {SHORT: 2, LONG: 1, "repeated sentences": 1}


def test_a_sentence_of_more_words_than_any_limit_is_kept_where_there_is_none() -> None:
    long = " ".join(["word"] * 70_000)
    assert [sample.text for sample in tidied([long, "short"])[0]] == [long, "short"]
    assert tidied([long, "short"], max_words=50) == (
        [TextSample("k1", "short")],
        {LONG: 1},
    )


def test_nothing_to_keep_is_no_sentence_at_all() -> None:
    assert tidied([], shuffle=1) == ([], {})
    assert tidied(["one"], min_words=2, shuffle=1) == ([], {SHORT: 1})


def test_the_first_sentence_that_is_left_out_is_the_example_of_its_reason() -> None:
    account = Account()
    list(tidy(Sentences(lambda: iter(["a", "b c", "a", "b c"])), SentenceRules(min_words=2), account))
    assert account.lines()[:2] == [f"{SHORT}: 2, such as k0: a", "repeated sentences: 1, k3: b c"]


def test_two_passes_report_a_problem_once() -> None:
    source, account = Sentences(lambda: iter(["a", "b"])), Account()
    assert len(list(tidy(source, SentenceRules(shuffle=3), account))) == 2
    assert source.passes == 2
    assert account.problems == ["one line is broken"]


@pytest.mark.parametrize("shuffle", [None, 5])
def test_the_sentences_are_never_all_in_memory(shuffle: int | None) -> None:
    count, length = 20_000, 1_000
    source = Sentences(lambda: (f"{i:0{length}d}" for i in range(count)))
    tracemalloc.start()
    seen = sum(1 for _ in tidy(source, SentenceRules(shuffle=shuffle), Account()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == count
    assert peak < count * length / 4


# -- languages without spaces, and what a tokenizer cannot tell -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("A red bus on a bridge.", 6),
        ("Ein Bär schläft – dort", 5),
        ("猫が窓辺で寝ている。", 5),
        ("一只猫", 2),
        ("这是 iPhone 15, 新手机。", 5),
        ("แมวนอนอยู่ริมหน้าต่าง", 6),
        ("강아지가 잔디에서 놀고 있다", 4),
        ("ဆားငန်ရေကူးကန်", 4),
    ],
)
def test_words_are_counted_in_languages_without_spaces_too(text: str, count: int) -> None:
    assert words(text) == count
    assert len(tidied([text], min_words=count, max_words=count)[0]) == 1
    assert tidied([text], min_words=count + 1) == ([], {SHORT: 1})


NOTHING = "sentences of which the tokenizer leaves nothing"
SAME = "sentences that the tokenizer cannot tell from one that is kept"


def test_sentences_that_have_the_same_tokens_or_none_are_left_out_and_counted() -> None:
    lower = SimpleTokenizer()
    found, dropped = tidied(["A cat", "a cat", "A cat", "&nbsp;", "Été", "été", "a cat.", "!"], canonical(lower))
    assert [sample.text for sample in found] == ["A cat", "Été", "été", "a cat.", "!"]
    assert dropped == {SAME: 1, "repeated sentences": 1, NOTHING: 1}
    strict = SimpleTokenizer(clean="canonicalize")
    found, dropped = tidied(["A cat", "a cat.", "!", "”", "…", "🦓", "a_cat"], canonical(strict))
    assert [sample.text for sample in found] == ["A cat", "…", "🦓"]
    assert dropped == {SAME: 2, NOTHING: 2}


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_what_is_left_out_has_no_tokens_or_those_of_another(clean: str) -> None:
    tokenizer = SimpleTokenizer(clean=clean)
    texts = ["A cat", "a cat", "a  cat.", "-", "_", "&amp;", "&nbsp;", "“”", "Été", "été", "it's", "IT'S", "a&b", "A&B"]
    of = canonical(tokenizer)
    assert of is not None
    tokens = [tuple(row) for row in tokenizer(texts).tolist()]
    empty = tuple(tokenizer([""])[0].tolist())
    for one, its in zip(texts, tokens, strict=True):
        assert (of(one) == "") == (its == empty)
        for other, others in zip(texts, tokens, strict=True):
            assert of(one) != of(other) or its == others


# -- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 3000])
def test_a_shuffle_is_a_permutation_in_which_keys_stay_with_their_texts(count: int) -> None:
    texts = [f"sentence {i}" for i in range(count)]
    found, _ = tidied(texts, shuffle=7)
    assert Counter(found) == Counter(tidied(texts)[0])


def test_a_shuffle_is_the_same_for_a_seed_and_another_for_another() -> None:
    texts = [f"sentence {i}" for i in range(1000)]
    first, second, third = (tidied(texts, shuffle=seed)[0] for seed in (7, 7, 8))
    assert first == second
    assert first != third


def test_a_shuffle_moves_sentences_over_the_whole_length() -> None:
    found, _ = tidied([str(i) for i in range(2000)], shuffle=0)
    place = np.array([int(sample.text) for sample in found])
    assert abs(np.corrcoef(place, np.arange(2000))[0, 1]) < 0.1
    assert np.abs(place - np.arange(2000)).mean() == pytest.approx(2000 / 3, rel=0.1)
    assert (np.diff(place) > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_text_that_json_escapes_survives_a_shuffle() -> None:
    texts = ['"quoted"', "back\\slash", "line\u2028separator", "\ud83d lone surrogate", "日本語"]
    assert Counter(sample.text for sample in tidied(texts, shuffle=1)[0]) == Counter(texts)


def test_a_full_temporary_folder_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(value: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dimefm.caching.sentences.json.dumps", full)
    with pytest.raises(StoreError, match=r"(?s)dimefm-shuffle-.* cannot be written: No space left.*TMPDIR"):
        tidied(["a", "b"], shuffle=1)


# -- stores -----------------------------------------------------------------------------------------------------------


def request(*sources: Path, **rules: Any) -> PlanRequest:
    return PlanRequest(
        kind="text", arguments=tuple(map(str, sources)), shard_rows=16, batch_size=4, sentences=SentenceRules(**rules)
    )


def test_the_plan_holds_what_is_kept_and_counts_what_is_not(tmp_path: Path, clip: Clip) -> None:
    source = written(tmp_path / "a.txt", "one", "one two", "one  two", "one two three", "a b c d")
    store = open_or_plan(request(source, min_words=2, max_words=3), str(tmp_path / "s.zarr"), clip.identity)
    assert texts_of(store) == ["one two", "one two three"]
    summary = store.schema.source
    assert {one.reason: one.count for one in summary.skipped} == {SHORT: 1, LONG: 1, "repeated sentences": 1}
    assert summary.settings == {"min_words": 2, "max_words": 3}


def test_prompts_that_a_tokenizer_cannot_tell_apart_are_all_there(tmp_path: Path, clip: Clip) -> None:
    """Two classes may differ in their case alone, and their prompts are looked up as they are written."""
    written(tmp_path / "classnames.txt", "Cardigan", "cardigan")
    written(tmp_path / "templates.txt", "a {c}")
    prompts, of = request(tmp_path), canonical(clip.tokenizer)
    store = open_or_plan(replace(prompts, canonical=of), str(tmp_path / "p.zarr"), clip.identity)
    assert texts_of(store) == ["a Cardigan", "a cardigan"]
    captions = request(written(tmp_path / "captions.txt", "a Cardigan", "a cardigan"))
    store = open_or_plan(replace(captions, canonical=of), str(tmp_path / "c.zarr"), clip.identity)
    assert texts_of(store) == ["a Cardigan"]


def test_repeats_over_several_files_are_dropped(tmp_path: Path, clip: Clip) -> None:
    sources = [written(tmp_path / f"{n}.txt", "shared", f"own {n}") for n in "abc"]
    store = open_or_plan(request(*sources), str(tmp_path / "s.zarr"), clip.identity)
    assert texts_of(store) == ["shared", "own a", "own b", "own c"]
    assert [(one.reason, one.count) for one in store.schema.source.skipped] == [("repeated sentences", 2)]


def test_a_shuffled_store_is_the_same_bytes_again(text_file: Path, tmp_path: Path, clip: Clip) -> None:
    for name in ("one", "two"):
        open_or_plan(request(text_file, shuffle=3), str(tmp_path / f"{name}.zarr"), clip.identity)
    one, two = (sorted(p for p in (tmp_path / f"{n}.zarr").rglob("*") if p.is_file()) for n in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_embeddings_of_a_shuffled_store_are_those_of_its_rows(
    text_file: Path, text_store: Store, tmp_path: Path, clip: Clip
) -> None:
    store = cached("text", text_file, tmp_path / "s.zarr", clip, sentences=SentenceRules(shuffle=11))
    texts, lines = texts_of(store), texts_of(text_store)
    assert texts != lines
    assert sorted(texts) == sorted(lines)
    place = [lines.index(text) for text in texts]
    assert (store.status() == Status.OK).all()
    shuffled, plain = store.read(0, 200).astype(np.float32), text_store.read(0, 200).astype(np.float32)
    np.testing.assert_allclose(shuffled, plain[place], atol=1e-3)
    assert np.abs(shuffled - plain).max() > 0.01
    np.testing.assert_allclose(shuffled[:20], clip.encode_texts(texts[:20]).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("rules", "difference"),
    [
        ({"min_words": 3, "max_words": 9, "shuffle": 1}, "min_words: 2 != 3"),
        ({"min_words": 2, "shuffle": 1}, "max_words: 9 != None"),
        ({"min_words": 2, "max_words": 9, "shuffle": 2}, "shuffle: 1 != 2"),
        ({"min_words": 2, "max_words": 9}, "shuffle: 1 != None"),
    ],
)
def test_another_rule_is_refused_by_its_name(
    text_file: Path, tmp_path: Path, clip: Clip, rules: dict[str, int], difference: str
) -> None:
    out = str(tmp_path / "s.zarr")
    first = open_or_plan(request(text_file, min_words=2, max_words=9, shuffle=1), out, clip.identity)
    assert (
        open_or_plan(request(text_file, min_words=2, max_words=9, shuffle=1), out, clip.identity).schema == first.schema
    )
    with pytest.raises(MismatchError) as caught:
        open_or_plan(request(text_file, **rules), out, clip.identity)
    assert difference in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


def test_another_order_is_another_identity(text_file: Path, tmp_path: Path, clip: Clip) -> None:
    schemas = [
        open_or_plan(request(text_file, shuffle=seed), str(tmp_path / f"{seed}.zarr"), clip.identity).schema
        for seed in (1, 2)
    ]
    assert schemas[0].identity != schemas[1].identity


def test_info_says_what_was_dropped_and_by_what_rules(tmp_path: Path, clip: Clip) -> None:
    source = written(tmp_path / "a.txt", "one", "two words", "two words", "three words here")
    rules = SentenceRules(min_words=2, shuffle=4)
    store = cached("text", source, tmp_path / "s.zarr", clip, sentences=rules)
    result = CliRunner().invoke(cli, ["info", store.path])
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert f"skipped {SHORT}: 1, a.txt:1: one" in lines
    assert "skipped repeated sentences: 1, a.txt:3: two words" in lines
    assert {"min words 2", "shuffle 4"} <= set(lines)
