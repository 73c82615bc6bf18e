"""What `info` knows of an embedding store."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from cache_schemas import Commit, EmbeddingStore, Failure, Skipped, Status
from cache_schemas.document import to_plain
from cache_schemas.embedding_store import EMBEDDING
from cache_schemas.pairs import CAPTION_PAIRS, HITS_COMMIT
from dimefm.inspection.description import Description, Rows
from dimefm.models.teacher_rows import teacher_rows
from dimefm.sources.account import describe_skipped, first_lines
from dimefm.store.added_views import planned_additions
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system import storage
from dimefm.system.progress import amount
from dimefm.system.wording import counted, rate

_FAILURES = 10


def describe_store(path: str) -> Description:
    """A store, finished or not."""
    store = Store(path)
    facts = _facts(store)
    return Description(f"{store.path}: {facts['kind']} embeddings", facts, [*_counts(facts), *_source(facts)])


def _facts(store: Store) -> dict[str, Any]:
    schema = store.schema
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    done, seconds = 0, 0.0
    for commit in store.commits():
        counts.update(_status(store, commit))
        failures += islice(_failures(store, commit), _FAILURES - len(failures))
        done, seconds = done + 1, seconds + commit.seconds
    added = planned_additions(Store(store.path, additions=0))
    seconds += sum(commit.seconds for one in added for commit in one.commits())
    return {
        "artefact": "store",
        "path": store.path,
        "finished": done == schema.shards,
        "kind": schema.kind,
        "rows": schema.rows,
        "shards": schema.shards,
        "shards_done": done,
        "shard_rows": schema.shard_rows,
        "status": dict(sorted(counts.items())),
        "embeddings": {"dtype": schema.dtype, "shape": list(schema.arrays()[EMBEDDING].shape), "bytes": _bytes(schema)},
        "teacher": to_plain(schema.teacher),
        "identity": schema.identity,
        "views": to_plain(schema.views),
        "added_views": [_addition(one) for one in added],
        "pixels": schema.pixels,
        "source": to_plain(schema.source),
        "captions": _captions(store),
        "failures": to_plain(failures),
        "worker_seconds": seconds,
    }


def _captions(store: Store) -> dict[str, Any] | None:
    """Of a store of captions: whose they are, as far as that is known."""
    path = storage.join(store.path, CAPTION_PAIRS)
    if store.schema.kind != "text" or not storage.exists(storage.join(path, "zarr.json")):
        return None
    pairs = Pairs(path)
    facts = {"images_store": pairs.schema.images, "rows": pairs.schema.rows, "most": pairs.schema.top_k}
    if not storage.exists(storage.join(path, HITS_COMMIT)):
        return {**facts, "finished": False}
    counts = pairs.hit_counts()
    return {**facts, "finished": True, "images": counts.images, "mean_score": counts.mean_score}


def _status(store: Store, commit: Commit) -> dict[str, int]:
    """The rows of a shard by status, with the views that were added."""
    if not store.additions:
        return commit.counts
    failed = Counter(failure.status for failure in _failures(store, commit))
    return {Status.OK.name: commit.stop - commit.start - failed.total(), **failed}


def _failures(store: Store, commit: Commit) -> Iterator[Failure]:
    """The rows of a shard without an embedding in each of their views."""
    if not store.additions:
        return store.failures(commit)
    found = store.failures_in(commit.shard)
    return (found[row] for row in sorted(found))


def _addition(added: Store) -> dict[str, Any]:
    """What there is to say of views that were added."""
    views, done = added.made.views, len(added.committed())
    assert views is not None
    facts = {"first": views.first, "count": views.count, "shards_done": done}
    return {**facts, "finished": done == added.schema.shards, "bytes": _bytes(added.schema)}


def _views(views: dict[str, Any]) -> str:
    low, high = views["crop_scale"]
    words = f"{views['count']} per image, crops of {low:g} to {high:g} of its area"
    if strong := views.get("strong"):
        words += f", {counted(strong['operations'], 'operation')} of magnitude {strong['magnitude']} and colour jitter"
    return words + (f", mixed by Beta({views['mixup']:g})" if views.get("mixup") else "")


def _bytes(schema: EmbeddingStore) -> int:
    return math.prod(schema.arrays()[EMBEDDING].shape) * schema.item_bytes


def _counts(facts: dict[str, Any]) -> Rows:
    source, embeddings, done = facts["source"], facts["embeddings"], sum(facts["status"].values())
    shape = ", ".join(f"{n:,}" for n in embeddings["shape"])
    rows = [
        ("rows", f"{facts['rows']:,}, from {counted(source['files'], 'file')} of {amount(source['bytes'])}"),
        ("shards", f"{facts['shards_done']:,} of {facts['shards']:,} done, {facts['shard_rows']:,} rows each"),
        ("status", ", ".join(f"{name} {count:,}" for name, count in facts["status"].items()) or "nothing done yet"),
        ("embeddings", f"{embeddings['dtype']} ({shape}), {amount(embeddings['bytes'])}"),
        *teacher_rows(facts["teacher"]),
        ("identity", f"{facts['identity'][:16]} (indexes, pairs and runs refer to it)"),
    ]
    if facts["views"]:
        rows.append(("views", _views(facts["views"])))
    for one in facts["added_views"]:
        which = counted(one["count"], "view") + f" from number {one['first']} on"
        unread = f", not read yet: {one['shards_done']:,} of {facts['shards']:,} shards done"
        rows.append(("added", which + ("" if one["finished"] else unread)))
    if captions := facts["captions"]:
        rows.append(("captions of", _show_captions(captions)))
    if facts["pixels"]:
        rows.append(("pixels", f"JPEGs of short side {facts['pixels']}, which train-student reads"))
    if seconds := facts["worker_seconds"]:
        shown = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"
        rows.append(("worker time", f"{shown} s, {rate(done, seconds, 'row')} per worker"))
    return rows


def _show_captions(captions: dict[str, Any]) -> str:
    if not captions["finished"]:
        return f"{captions['images_store']}, unfinished: the same cache-images goes on there"
    images = f"{captions['images']:,} of {captions['rows']:,} images, up to {captions['most']:,} each"
    return f"{captions['images_store']}: {images}; mean cosine {captions['mean_score']:.4f}"


def _source(facts: dict[str, Any]) -> Rows:
    source, failures = facts["source"], facts["failures"]
    rows = [(name.replace("_", " "), str(value)) for name, value in source["settings"].items()]
    if source["repeated_keys"]:
        rows.append(("repeated keys", f"{source['repeated_keys']:,}; each keeps its own row"))
    rows += [("skipped", describe_skipped(Skipped(**one))) for one in source["skipped"]]
    rows += [("skipped", f"{reason}: {count:,}") for reason, count in source["dropped"].items() if count]
    rows += [("problem", problem) for problem in first_lines(source["problems"])]
    rows += [("failed", f"row {f['row']}, {f['key']}: {f['status']}, {f['reason']}") for f in failures]
    failed = sum(count for name, count in facts["status"].items() if name != Status.OK.name)
    if failed > len(failures):
        rows.append(("", f"and {failed - len(failures):,} more: dimefm info STORE --failures"))
    return rows


def failures_of(path: str) -> Iterator[dict[str, Any]]:
    """Each row of a store without an embedding: `row`, `key`, `status`, `file`, `reason`."""
    store = Store(path)
    for commit in store.commits():
        for failure in _failures(store, commit):
            yield {name: getattr(failure, name) for name in ("row", "key", "status", "file", "reason")}
