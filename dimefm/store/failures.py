"""The rows of a store that failed, by status, for messages; and the error where every row failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cache_schemas import Commit, Failure, Status
from dimefm.errors import StoreError
from dimefm.store.embedding_store import Store
from dimefm.system.inert_text import line

_REASON = 200  # characters of a reason that are shown


def failures_by_status(store: Store) -> list[str]:
    """A line for each status of rows without an embedding: `UNDECODABLE: 6, such as row 0 (0 in /a.tar): no bytes`."""
    counts: Counter[str] = Counter()
    examples: dict[str, Failure] = {}
    for commit in store.commits():
        found = failed_counts(commit)
        counts.update(found)
        if wanted := found.keys() - examples.keys():
            examples |= _examples(store.failures(commit), wanted)
    return [_line(status, count, examples.get(status)) for status, count in counts.most_common()]


def failed_counts(commit: Commit) -> dict[str, int]:
    """By status, how many rows of a shard have no embedding."""
    return {status: count for status, count in commit.counts.items() if status != Status.OK.name}


def require_embeddings(store: Store, remedy: str = "mend the cause, and write the store again") -> None:
    """Raises StoreError where shards are done and not one row of them has an embedding. Reads every commit."""
    found = store.contents
    if found.good or not found.shards:
        return
    rows = sum(stop - start for start, stop in map(store.schema.shard_range, map(int, found.shards)))
    what = f"{store.path}: none of its {rows:,} {store.schema.kind}s has an embedding{as_list(store)}"
    raise StoreError(what, remedy=f"{remedy}; {listed(store)}")


def listed(store: Store) -> str:
    """The end of a remedy: how to list all failures, and that they are kept."""
    return f"dimefm info {store.path} --failures lists all, and what was written is kept"


def as_list(store: Store) -> str:
    """`failures_by_status` as the end of an error's message."""
    return "".join(f"\n  - {text}" for text in failures_by_status(store))


def _examples(failures: Iterable[Failure], wanted: set[str]) -> dict[str, Failure]:
    """The first failure of each status that is `wanted`."""
    found: dict[str, Failure] = {}
    for failure in failures:
        if failure.status in wanted:
            found.setdefault(failure.status, failure)
        if len(found) == len(wanted):
            break
    return found


def _line(status: str, count: int, example: Failure | None) -> str:
    if example is None:
        return f"{status}: {count:,}"
    reason = example.reason if len(example.reason) <= _REASON else f"{example.reason[:_REASON]}..."
    where = f"{example.key} in {example.file}" if example.file else example.key
    return line(f"{status}: {count:,}, {'such as ' if count > 1 else ''}row {example.row} ({where}): {reason}")
