"""`retrieve`: the nearest sentences of every image, and the hits of every sentence, written as PAIRS.zarr.

Shapes: N image rows of a shard, D width, K sentences per image, T sentences of the text store.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schemas import Failure, HitCounts, PairsStore, Status, digest_of
from cache_schemas.embedding_store import COMMITS
from cache_schemas.pairs import HITS, HITS_COMMIT, SCORE, TEXT_ROW
from dimefm.errors import OutputExistsError, StoreError
from dimefm.retrieval.open_search import open_search, require_search
from dimefm.store.commit import make_commit, remove_commit, write_commit
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.store.failures import require_embeddings
from dimefm.store.local_copy import bring
from dimefm.store.output_folder import (
    ANOTHER_OUT,
    differing,
    in_lines,
    is_planned,
    require_only,
    require_same,
)
from dimefm.store.pairs_store import Pairs
from dimefm.store.zarr_arrays import digest_arrays, write_rows
from dimefm.system import storage
from dimefm.system.lease import require_held
from dimefm.system.lock import writing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.progress import Progress
from dimefm.system.stopping import BEGINS_AGAIN, GOES_ON, holding
from dimefm.system.wording import counted

if TYPE_CHECKING:
    from dimefm.retrieval.exact_search import Search


def retrieve(
    images: str, texts: str, *, top_k: int, out: str, index: str | None = None, device: str | None = None
) -> HitCounts:
    """The `top_k` sentences of every image, by an index over `texts` or, without one, by exact search on `device`.

    Everything is checked before anything is written. Raises MismatchError where the teachers differ or the index is
    over another store, StoreError where a store is unfinished or has no embedding at all, or where no sentence is found
    for any image, and what `write_pairs` raises.
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
    note(
        f"{counted(image_store.schema.rows, 'image')}, {counted(text_store.schema.rows, 'sentence')}: "
        "opening the search ..."
    )
    bring(text_store)  # all of it is read for every batch of images
    search, name, digest = open_search(text_store, index, device)
    with Progress("retrieving", image_store.schema.rows, "image") as progress:
        found = write_pairs(
            image_store,
            text_store,
            search,
            index=name,
            index_digest=digest,
            top_k=min(top_k, text_store.schema.rows),
            out=out,
            progress=progress.at,
        )
    if not found.images:
        raise StoreError(
            f"{out}: no sentence is found for any image", remedy="build the index again, or search exactly"
        )
    return found


def write_pairs(
    images: Store,
    texts: Store,
    search: Search,
    *,
    index: str,
    index_digest: str,
    top_k: int,
    out: str,
    progress: Callable[[int], None] = lambda rows: None,
) -> HitCounts:
    """Write the `top_k` sentences of every image to `out`, a shard at a time, and count the hits of each sentence.

    `search` is over `texts`; `index` and `index_digest` say in `out` what it was. Images without a finite, non-zero
    embedding get no sentence and are counted. A run goes on where an earlier one stopped, and does those shards again
    whose images were encoded again since. Raises OutputExistsError where `out` holds something else or the texts have
    changed, StoreError where it cannot be written or another process writes to it.
    """
    out = storage.absolute(out)
    schema = PairsStore(
        images=images.path,
        images_identity=images.schema.identity,
        texts=texts.path,
        texts_identity=texts.schema.identity,
        index=index,
        index_digest=index_digest,
        top_k=top_k,
        rows=images.schema.rows,
        text_rows=texts.schema.rows,
        shard_rows=images.schema.shard_rows,
        texts_data=texts.contents.digest,
    )
    with writing(out, of_use=lambda files: any(name.startswith(f"{COMMITS}/") for name in files)):
        pairs = _open_or_create(out, schema)
        pending = _pending(pairs, images)
        hits = storage.join(pairs.path, HITS_COMMIT)
        if not pending and storage.exists(hits):
            progress(schema.rows)
            return pairs.hit_counts()
        storage.remove_leftovers(pairs.path)
        storage.remove_file(hits)  # it counts what changes now
        with holding(lambda: _kept(pairs, images)):
            for shard in range(schema.shards):
                if shard in pending:
                    _retrieve_shard(pairs, images, search, shard)
                progress(schema.shard_range(shard)[1])
        return _count_hits(pairs)


def _pending(pairs: Pairs, images: Store) -> set[int]:
    """The shards that are not done, or were done for other embeddings than the images have now."""
    now = images.contents.shards
    current = {shard for shard, digest in pairs.images_data().items() if digest in (None, now.get(shard))}
    return {shard for shard in range(pairs.schema.shards) if str(shard) not in current}


def _kept(pairs: Pairs, images: Store) -> str:
    shards = pairs.schema.shards
    done = shards - len(_pending(pairs, images))
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


def _retrieve_shard(pairs: Pairs, images: Store, search: Search, shard: int) -> None:
    """Find and write the sentences of a shard of images, and then its commit."""
    began = time.monotonic()
    start, stop = pairs.schema.shard_range(shard)
    # All of the images is read before anything is written: an error of reading must not be taken for one of writing.
    usable_N, embedding_ND = images.valid_rows(start, stop)
    row_NK, score_NK = _nearest(search, usable_N - start, embedding_ND, (stop - start, pairs.schema.top_k))
    status_N = images.status(start, stop)
    unusable_N = status_N == Status.OK
    unusable_N[usable_N - start] = False
    status_N[unusable_N] = Status.NOT_FINITE
    failures, images_digest = _without_embedding(images, shard, status_N), images.contents.shards[str(shard)]
    with storage.writing_to(pairs.path):
        remove_commit(pairs.path, shard)  # where a shard is done again
        for name, values in ((TEXT_ROW, row_NK), (SCORE, score_NK)):
            file = f"{name}/c/{shard}/0"
            storage.remove_file(storage.join(pairs.path, file))  # zarr would read what a stopped run left
            array = pairs.group[name].with_config({"write_empty_chunks": True})
            write_rows(pairs.path, file, array, start, values)
        commit = make_commit(
            shard,
            start,
            status_N,
            failures,
            digest=digest_arrays(row_NK, score_NK),
            device=search.device,
            seconds=time.monotonic() - began,
            images=images_digest,
        )
        write_commit(pairs.path, commit)


def _nearest(
    search: Search, places: np.ndarray[Any, Any], embedding_ND: np.ndarray[Any, Any], shape: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sentences int32 and scores float16, both (N, K), of a shard of images whose rows at `places` have embeddings;
    where there is no sentence -1 and NaN."""
    row_NK, score_NK = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float16)
    for at in range(0, len(places), search.batch):
        part = slice(at, at + search.batch)
        scores, rows = search.search(embedding_ND[part], shape[1])
        row_NK[places[part]], score_NK[places[part]] = rows, np.where(rows >= 0, scores, np.nan)
    return row_NK, score_NK


def _without_embedding(images: Store, shard: int, status_N: np.ndarray[Any, Any]) -> list[Failure]:
    """The images of a shard that get no sentence, as failures of its commit."""
    places = np.flatnonzero(status_N != Status.OK)
    if not len(places):
        return []
    rows = images.plan(shard).take(places).select(["row", "key", "file"]).to_pylist()
    names, reason = [Status(code).name for code in status_N[places]], "the image has no embedding"
    return [Failure(**row, status=name, reason=reason) for row, name in zip(rows, names, strict=True)]


def _count_hits(pairs: Pairs) -> HitCounts:
    schema = pairs.schema
    hits_T = np.zeros(schema.text_rows, np.uint32)
    images, total = 0, 0.0
    for shard in range(schema.shards):
        row_NK = pairs.text_rows(*schema.shard_range(shard))
        used = row_NK[row_NK >= 0]
        hits_T += np.bincount(used, minlength=schema.text_rows).astype(np.uint32)
        images += int((row_NK[:, 0] >= 0).sum())
        total += float(np.nansum(pairs.scores(*schema.shard_range(shard)).astype(np.float64)))
    with storage.writing_to(pairs.path):
        storage.remove_folder(storage.join(pairs.path, f"{HITS}/c"))  # as with the shards
        pairs.group[HITS][:] = hits_T
        storage.flush_tree(storage.join(pairs.path, HITS))
    made_from = pairs.images_data()
    counts = HitCounts(
        images=images,
        skipped=schema.rows - images,
        selected=int((hits_T > 0).sum()),
        text_rows=schema.text_rows,
        mean_score=round(total / max(1, int(hits_T.sum())), 6),
        digest=digest_arrays(hits_T),
        images_data=None if None in made_from.values() else digest_of(made_from),
    )
    with storage.writing_to(pairs.path):
        require_held(pairs.path)
        storage.write_json(storage.join(pairs.path, HITS_COMMIT), counts.to_json())
    return counts
