"""--limit: a store of the first rows, which is an ordinary one; what follows them is neither read nor forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cache_schemas.plan import SourceFile
from dimefm.caching.plan import PlanRequest, choose_shard_rows, forecast, open_or_plan
from dimefm.caching.sentences import SentenceRules, tidy
from dimefm.cli import cli
from dimefm.errors import MismatchError
from dimefm.models.clip import Clip
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, TextSample
from dimefm.store.embedding_store import Store
from tests.exchange.test_import_embeddings import write_folder


class Endless:
    """A source without an end, which counts what is taken from it."""

    def __init__(self, kind: str, repeats: int = 1) -> None:
        self._kind, self._repeats, self.taken = kind, repeats, 0

    def files(self) -> list[SourceFile]:
        return []

    def samples(self, account: Account) -> Iterator[Any]:
        for number in count():
            self.taken += 1
            text = f"sentence {number // self._repeats}"
            yield ImageSample(f"{number}", "/x", 0, 1) if self._kind == "image" else TextSample(f"{number}", text)


def plan_of(store: Store) -> list[dict[str, Any]]:
    return [row for shard in range(store.schema.shards) for row in store.plan(shard).to_pylist()]


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_rows_are_the_first_and_planning_stops_behind_them(kind: Any, tmp_path: Path, clip: Clip) -> None:
    source = Endless(kind)
    request = PlanRequest(kind=kind, arguments=(source,), limit=10, shard_rows=4)
    store = open_or_plan(request, str(tmp_path / "s.zarr"), clip.identity)
    assert [row["key"] for row in plan_of(store)] == [str(number) for number in range(10)]
    assert store.schema.rows == 10
    assert store.schema.source.settings == {"limit": 10}
    assert source.taken <= 40
    assert forecast(request, clip.identity).schema.rows == 10


def test_the_limit_is_part_of_the_same_command(image_tar: Path, tmp_path: Path, clip: Clip) -> None:
    out = str(tmp_path / "s.zarr")
    request = PlanRequest(kind="image", arguments=(str(image_tar),), limit=10)
    first = open_or_plan(request, out, clip.identity)
    assert open_or_plan(request, out, clip.identity).schema == first.schema
    for other, shown in ((None, "limit: 10 != None"), (11, "limit: 10 != 11")):
        with pytest.raises(MismatchError, match=shown):
            open_or_plan(PlanRequest(kind="image", arguments=(str(image_tar),), limit=other), out, clip.identity)


def test_a_store_without_a_limit_is_planned_as_ever(image_tar: Path) -> None:
    assert PlanRequest(kind="image", arguments=(str(image_tar),)).settings() == {}


def test_the_limit_counts_sentences_that_are_kept_and_shuffling_comes_after() -> None:
    texts = ["a", "a b", "c d", "a b", "e f", "x", "g h", "i j"]

    class Given:
        def files(self) -> list[SourceFile]:
            return []

        def samples(self, account: Account) -> Iterator[TextSample]:
            return (TextSample(str(place), text) for place, text in enumerate(texts))

    def found(limit: int | None, shuffle: int | None) -> tuple[list[str], dict[str, int]]:
        account = Account()
        kept = list(tidy(Given(), SentenceRules(min_words=2, shuffle=shuffle), account, limit=limit))
        return [text for _, text in kept], {one.reason: one.count for one in account.skipped()}

    short, repeated = "sentences shorter than --min-words", "repeated sentences"
    assert found(3, None) == (["a b", "c d", "e f"], {short: 1, repeated: 1})
    for seed in range(5):
        kept, skipped = found(3, seed)
        assert sorted(kept) == ["a b", "c d", "e f"]
        assert skipped == {short: 1, repeated: 1}
    assert found(100, None) == found(None, None)


def test_where_most_are_left_out_more_is_read_until_there_are_enough() -> None:
    source = Endless("text", repeats=50)
    kept = list(tidy(source, SentenceRules(), Account(), limit=5))
    assert [text for _, text in kept] == [f"sentence {number}" for number in range(5)]


def test_shards_follow_the_rows_that_there_may_be() -> None:
    huge = 40_000_000 * 16_000
    assert choose_shard_rows(huge, "image") == 65_536
    assert choose_shard_rows(huge, "image", 100) == 512
    assert choose_shard_rows(huge, "image", 400_000) == 8192
    assert choose_shard_rows(1000, "image", 400_000) == choose_shard_rows(1000, "image")


def test_the_command_says_what_it_left_and_info_shows_the_limit(
    image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    words = ["cache-images", image_tar, "--teacher", teacher_name, "--device", "cpu", "--limit", 5]
    result = run(*words, "--out", tmp_path / "s.zarr")
    assert result.exit_code == 0, result.output
    left = "5 rows; what follows in the sources was not read"
    assert f"limit: {left}\n" in result.stderr
    assert "OK 5" in result.stdout
    assert "  limit " in result.stdout
    assert f"{left}\n" in run(*words, "--out", tmp_path / "d.zarr", "--dry-run").stdout
    all_of_it = run(*words[:-1], 1000, "--out", tmp_path / "all.zarr")
    assert "was not read" not in all_of_it.stderr


def test_an_import_takes_the_first_rows_and_counts_the_others(
    text_store: Store, teacher_name: str, tmp_path: Path
) -> None:
    rows = text_store.schema.rows
    captions = [entry["text"] for entry in text_store.samples(np.arange(rows))]
    folder = write_folder(tmp_path / "in", "text", text_store.read(0, rows), {"caption": captions}, ("0", "1", "2"))
    limit = rows // 2 + 1  # ends within the second file
    out = tmp_path / "s.zarr"
    words = ["import-embeddings", folder, "--out", out, "--kind", "text", "--teacher", teacher_name]
    result = run(*words, "--limit", limit)
    assert result.exit_code == 0, result.output
    store = Store(str(out))
    assert store.schema.rows == limit
    assert [row["text"] for row in plan_of(store)] == captions[:limit]
    assert np.array_equal(store.read(0, limit), text_store.read(0, limit))
    assert f"rows behind --limit: {rows - limit:,}, such as row {limit}" in result.stdout
    assert run(*words, "--limit", limit).exit_code == 0
    assert "limit: " in run(*words).stderr
