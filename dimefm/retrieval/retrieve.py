"""`retrieve`: the nearest sentences of every image, and the hits of every sentence, written as PAIRS.zarr."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from cache_schemas import HitCounts, PairsStore
from cache_schemas.embedding_store import COMMITS
from cache_schemas.pairs import HITS, HITS_COMMIT, SCORE, TEXT_ROW
from dimefm.errors import OutputExistsError, StoreError
from dimefm.retrieval.open_search import name_of, note_search, open_in_seat, require_search, worker_bytes
from dimefm.retrieval.retrieve_shards import RetrieveShards, batches
from dimefm.store.count_hits import count_hits
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.output_folder import (
    ANOTHER_OUT,
    differing,
    in_lines,
    is_planned,
    require_only,
    require_same,
)
from dimefm.store.pairs_store import Pairs, pairs_schema
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.machine import choose_device
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.shard_work import Seat, ShardRunner, run_here
from dimefm.system.stopping import BEGINS_AGAIN, GOES_ON, holding
from dimefm.system.wording import counted

if TYPE_CHECKING:
    from dimefm.retrieval.exact_search import Search


def retrieve(
    images: str,
    texts: str,
    *,
    top_k: int,
    out: str,
    index: str | None = None,
    device: str | None = None,
    run: ShardRunner = run_here,
) -> HitCounts:
    """The `top_k` sentences of every image, by an index over `texts` or, without one, by exact search on `device`.

    `run` has the shards done; by default one after another in this process. Everything is checked before anything is
    written. Raises MismatchError where the teachers differ or the index is over another store, StoreError where a store
    is unfinished or has no embedding at all, or where no sentence is found for any image, and what `write_pairs`
    raises.
    """
    require_name(out, "pairs", ".zarr")
    image_store, text_store = Store(images, cached=False), Store(texts)
    for store, kind in ((image_store, "image"), (text_store, "text")):
        store.require_kind(kind)
        store.require_complete()
        require_embeddings(store)
    require_same_teacher(image_store, text_store)
    require_search(text_store, index)
    _require_ours(storage.absolute(out))
    if index is None and run is run_here:
        choose_device(device)  # raises where it is not there
    note_search(index, ["image"])
    name, digest = name_of(index)
    found = _write(
        image_store,
        pairs_schema(
            image_store, text_store, index=name, index_digest=digest, top_k=min(top_k, text_store.schema.rows)
        ),
        out,
        partial(open_in_seat, text_store, index, digest, device),
        run,
        memory=worker_bytes(index),
    )
    if not found.images:
        raise StoreError(
            f"{out}: no sentence is found for any image", remedy="build the index again, or search exactly"
        )
    return found


def write_pairs(
    images: Store, texts: Store, search: Search, *, index: str, index_digest: str, top_k: int, out: str
) -> HitCounts:
    """Write the `top_k` sentences of every image to `out`, by a `search` over `texts` that is open, and count the hits
    of each sentence. `index` and `index_digest` say in `out` what the search was.

    Images without a finite, non-zero embedding get no sentence and are counted. A run goes on where an earlier one
    stopped, and does those shards again whose images were encoded again since. Raises OutputExistsError where `out`
    holds something else or the texts have changed, StoreError where it cannot be written or another process writes to
    it.
    """
    schema = pairs_schema(images, texts, index=index, index_digest=index_digest, top_k=top_k)
    return _write(images, schema, out, lambda _: search, run_here)


def _write(
    images: Store,
    schema: PairsStore,
    out: str,
    open_search: Callable[[Seat], Search],
    run: ShardRunner,
    *,
    memory: int = 0,
) -> HitCounts:
    """What `write_pairs` does, by a search that each worker opens, of so many bytes."""
    out = storage.absolute(out)
    with writing(out, of_use=lambda files: any(name.startswith(f"{COMMITS}/") for name in files)):
        pairs = _open_or_create(out, schema)
        pending = pairs.pending(images)
        hits, done = storage.join(pairs.path, HITS_COMMIT), schema.rows - _rows(schema, pending)
        if pending:
            note(f"{counted(schema.rows, 'image')}, {counted(schema.text_rows, 'sentence')}: opening the search ...")
        with Progress("retrieving", schema.rows, "image", done) as progress:
            if not pending and storage.exists(hits):
                return pairs.hit_counts()
            storage.remove_leftovers(pairs.path)
            storage.remove_file(hits)  # it counts what changes now
            work = RetrieveShards(pairs, images, open_search)
            with holding(lambda: _kept(pairs, images)):
                for batch, _ in run(work, batches(schema, pending), progress.note, memory=memory):
                    done += _rows(schema, batch.pending)
                    progress.at(done)
        return count_hits(pairs)


def _rows(schema: PairsStore, shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in map(schema.shard_range, shards))


def _kept(pairs: Pairs, images: Store) -> str:
    shards = pairs.schema.shards
    done = shards - len(pairs.pending(images))
    return f"{done} of {shards} shards are kept in {pairs.path}; {GOES_ON}" if done else BEGINS_AGAIN


def _open_or_create(out: str, schema: PairsStore) -> Pairs:
    """The pairs that an earlier run of this command began in `out`, or new ones. Raises OutputExistsError where `out`
    holds something else."""
    _require_ours(out)
    if is_planned(out):
        pairs = Pairs(out)
        _require_same_search(pairs, schema)
        return pairs
    with storage.writing_to(out):
        return Pairs.create(out, schema)


def _require_ours(out: str) -> None:
    require_only(out, "a store of pairs", {"zarr.json", TEXT_ROW, SCORE, HITS, COMMITS})


def _require_same_search(pairs: Pairs, schema: PairsStore) -> None:
    """Raises OutputExistsError where `pairs` are those of other stores, another search or another top k."""
    names = ["images_identity", "texts_identity", "index_digest", "top_k", "shard_rows"]
    if pairs.schema.texts_data is not None:  # older pairs do not have it
        names.append("texts_data")
    own, new = ({name: getattr(one, name) for name in names} for one in (pairs.schema, schema))
    differences = differing(own, new)
    if differences.pop("index_digest", None):
        differences["--index"] = f"{_search_of(pairs.schema)} != {_search_of(schema)}"
    if "texts_data" in differences:
        what = f"{pairs.path} was retrieved from other embeddings of {schema.texts} than it has now:"
        what += in_lines(differences)
        raise OutputExistsError(what, remedy=f"{ANOTHER_OUT}, or delete it: all images must be searched again")
    require_same(pairs.path, differences)


def _search_of(schema: PairsStore) -> str:
    """The index that pairs are by, with its digest, for an index may be built again; or that there was none."""
    exact = schema.index == schema.index_digest
    return f"none ({schema.index})" if exact else f"{schema.index} ({schema.index_digest[:12]})"
