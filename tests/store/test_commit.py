"""Commits whatever has failed: many failures are a table beside the commit, which costs nothing until it is read."""

import json
import typing
from pathlib import Path

import numpy as np
import pytest

from cache_schemas import Commit, Failure, Status, document
from cache_schemas.commit import MOST_FAILURES
from cache_schemas.embedding_store import commit_path, failures_path
from dimefm.errors import StoreError
from dimefm.inspection.info import describe, list_failures
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.retrieval.retrieve import retrieve
from dimefm.store import commit as commit_module
from dimefm.store.commit import make_commit
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from tests.stores import random_store

SHARD, MANY = 128, MOST_FAILURES + 1


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of three shards the first has no failure, the second one too many for its commit, the third as many as go in."""
    failed = (*range(SHARD, SHARD + MANY), *range(2 * SHARD, 2 * SHARD + MOST_FAILURES))
    return random_store(tmp_path / "s.zarr", rows=3 * SHARD, shard_rows=SHARD, failed=failed)[0]


def table(store: Store, shard: int = 1) -> Path:
    return Path(store.path) / failures_path(shard)


def problems(store: Store) -> list[str]:
    """What verify finds; but for the table of files, which these stores do not have."""
    report = verify(VerifyConfig(store=store.path))
    found = [problem for shard in report.bad.values() for problem in shard] + report.faults
    return [problem for problem in found if not problem.endswith("files.parquet is missing")]


def write(store: Store, shard: int, failed: int) -> Commit:
    """The shard again, with only its first `failed` rows without an embedding."""
    start, stop = store.schema.shard_range(shard)
    vector_ND = np.eye(stop - start, 16, dtype=np.float16)
    vector_ND[:, 0] = vector_ND[:, 0] + (vector_ND.sum(axis=1) == 0)
    status_N = np.full(stop - start, Status.OK, np.uint8)
    vector_ND[:failed], status_N[:failed] = 0, Status.EMPTY
    failures = [Failure(row=start + i, key=f"k{start + i}", file="f", status="EMPTY", reason="") for i in range(failed)]
    return store.write_shard(shard, {"embedding": vector_ND, "status": status_N}, failures, device="cpu", seconds=1)


def test_many_failures_are_in_a_table_and_few_in_the_commit(store: Store) -> None:
    assert [table(store, shard).exists() for shard in range(3)] == [False, True, False]
    listed = [(len(commit.failures), len(list(store.failures(commit)))) for commit in store.commits()]
    assert listed == [(0, 0), (0, MANY), (MOST_FAILURES, MOST_FAILURES)]
    second = store.commit(1)
    assert second is not None
    assert second.counts == {"OK": SHARD - MANY, "UNDECODABLE": MANY}
    assert next(store.failures(second)) == Failure(
        row=SHARD, key=f"k{SHARD}", file="f", status="UNDECODABLE", reason="made so"
    )
    assert len(list(list_failures(store.path))) == MANY + MOST_FAILURES
    assert f"row {SHARD}, k{SHARD}: UNDECODABLE, made so" in describe(store.path)
    assert problems(store) == []


def test_counts_are_read_without_the_table(store: Store) -> None:
    table(store).unlink()
    assert store.contents.good == 3 * SHARD - MANY - MOST_FAILURES


@pytest.mark.parametrize("damage", ["missing", "flipped", "of another shard"])
def test_a_table_that_is_damaged_is_found_and_mended(store: Store, damage: str) -> None:
    path = table(store)
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(path.read_bytes().replace(b"made so", b"made it", 1)[:-1] + b"0")
    else:
        write(store, 2, MANY)
        path.write_bytes(table(store, 2).read_bytes())
    commit = store.commit(1)
    assert commit is not None
    with pytest.raises(StoreError, match=rf"{path.name} is (missing|damaged)"):
        list(store.failures(commit))
    assert list(verify(VerifyConfig(store=store.path, repair=True)).bad) == [1]
    assert store.commit(1) is None
    assert not path.exists()
    write(store, 1, MANY)
    assert problems(store) == []


def test_a_shard_that_is_written_again_leaves_no_table_of_before(store: Store) -> None:
    write(store, 1, 2)
    assert not table(store).exists()
    assert problems(store) == []


def test_a_kill_between_table_and_commit_leaves_a_shard_that_is_not_done(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(commit_module.storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(store, 2, MANY)
    assert table(store, 2).exists()
    assert store.committed() == {0, 1}
    write(store, 2, 1)
    assert problems(store) == []


def test_reasons_for_other_rows_than_those_that_failed_are_found(store: Store) -> None:
    arrays, commit = store.shard_arrays(1), store.commit(1)
    assert commit is not None
    wrong = [*list(store.failures(commit))[1:], Failure(row=SHARD + MANY, key="k", file="f", status="EMPTY", reason="")]
    store.write_shard(1, arrays, wrong, device="cpu", seconds=1)
    assert problems(store) == ["the rows that failed are not those that its commit gives reasons for"]


def test_images_without_an_embedding_are_a_table_of_pseudo_texts_too(store: Store, tmp_path: Path) -> None:
    texts, _ = random_store(tmp_path / "t.zarr", rows=20, shard_rows=32, kind="text")
    pairs = str(tmp_path / "p.zarr")
    retrieve(store.path, texts.path, top_k=2, out=pairs, device="cpu")
    path = tmp_path / "p.zarr" / commit_path(1)
    commit = Commit.parse(json.loads(path.read_text()), str(path))
    assert (commit.failures, commit.counts["UNDECODABLE"]) == ((), MANY)
    found = list(commit_module.read_failures(pairs, commit))
    assert [(f.row, f.status) for f in found] == [(row, "UNDECODABLE") for row in range(SHARD, SHARD + MANY)]
    assert Pairs(pairs).committed() == {0, 1, 2}


def test_a_commit_of_before_has_all_in_it_and_hints_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To work out the type hints of a class takes 50 microseconds: for 65,536 failures 3.5 s."""
    failures = [Failure(row=row, key="k", file="f", status="EMPTY", reason="r") for row in range(1000)]
    commit = make_commit(0, 0, np.full(1000, Status.EMPTY, np.uint8), failures, digest="d", device="cpu", seconds=1)
    raw = commit.to_json()
    raw = {name: value for name, value in raw.items() if name not in ("table", "images", "checksum")}
    raw["checksum"] = document.digest_of(raw)
    worked_out, really = [], typing.get_type_hints
    monkeypatch.setattr(document.typing, "get_type_hints", lambda cls: (worked_out.append(cls), really(cls))[1])
    document._fields.cache_clear()
    assert Commit.parse(raw, "here.json") == commit
    assert worked_out == [Commit, Failure]
