"""The FAISS index over a store: chosen by size, searched at a measured recall. The only importer of faiss.

Shapes: Q queries, N vectors of a block, D width, K neighbours.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cache_schemas import IndexSidecar, Recall, Selection, Status
from cache_schemas.index import INDEX_FILE, SIDECAR_FILE
from dimefm import storage
from dimefm.commits import versions
from dimefm.errors import MismatchError, OutputExistsError, RecallError, StoreError
from dimefm.exact import exact_search, valid_blocks
from dimefm.pairs import retrieve
from dimefm.progress import Progress
from dimefm.store import Store, require_same_teacher

_TRAIN_PER_CENTROID = 64
_RECALL_K, _RECALL_QUERIES = 10, 1000
_RESCORE_BATCH = 256  # queries whose candidates are in memory at once


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How to build an index. `factory` None: chosen from the number of rows; `queries` an image store whose
    embeddings the recall is measured with, beside held-out rows of the store itself."""

    store: str
    out: str
    factory: str | None = None
    recall_target: float = 0.95
    accept: bool = False
    queries: str | None = None
    seed: int = 0


def choose_factory(rows: int, dim: int) -> tuple[str, int]:
    """FAISS factory string and the re-scoring factor for that many rows, by measured speed and recall.

    Exact up to 100k rows; fp16 inverted lists to 2M; beyond that product codes, whose best candidates are scored
    again from the store itself (codes alone never reach 0.95).
    """
    if rows <= 100_000:
        return "Flat", 1
    if rows <= 2_000_000:
        return f"IVF{1 << round(math.log2(4 * math.sqrt(rows)))},SQfp16", 1
    centroids = "IVF65536" if rows <= 50_000_000 else "IVF262144_HNSW32"
    return f"{centroids},PQ{dim // 4}x4fs", 10


class Index:
    """An index on disk with the store it is over."""

    def __init__(self, path: str) -> None:
        """Open an index. Raises StoreError where it is missing or damaged, SchemaError where its sidecar is."""
        self.path = storage.local(path, "an index")
        where = storage.join(self.path, SIDECAR_FILE)
        if not storage.exists(where):
            raise StoreError(f"{path} is not a dimefm index", remedy="make it with dimefm build-index")
        self.sidecar = IndexSidecar.parse(storage.read_json(where), where)
        file = Path(self.path) / INDEX_FILE
        size = file.stat().st_size if file.exists() else 0
        if size != self.sidecar.bytes:
            what = f"{file} has {size:,} bytes, its sidecar says {self.sidecar.bytes:,}"
            raise StoreError(what, remedy="it is damaged: delete the folder and build the index again")
        self._faiss = faiss.read_index(str(file))
        _set_parameters(self._faiss, self.sidecar.search_parameters)
        self._rescore = self.sidecar.rescore

    def search(
        self, queries_QD: np.ndarray[Any, Any], k: int, store: Store
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows of `store` int64 (Q, K), best first; -1 where fewer than k were found."""
        return _search(self._faiss, np.asarray(queries_QD, np.float32), k, self._rescore, store)


def build_index(config: IndexConfig) -> IndexSidecar:
    """Build an index over a finished store, tune it to the recall target and measure it.

    The folder appears whole or not at all. Where it is there already and was made by the same settings, nothing is
    done. Raises OutputExistsError where it was made by others, RecallError below the target unless `accept`.
    """
    config = replace(config, out=storage.local(config.out, "an index"))
    store = Store(config.store)
    store.require_complete()
    rows = int((store.status() == Status.OK).sum())
    if rows == 0:
        raise StoreError(f"{store.path} has no embedding at all", remedy="see dimefm info for what failed")
    factory, rescore = choose_factory(rows, store.schema.dim)
    if config.factory:
        factory, rescore = config.factory, 10 if "PQ" in config.factory else 1
    if storage.exists(config.out):
        return _require_same(config, store, factory)
    queries = _queries(config, store)
    began = time.monotonic()
    index, train_rows = _build(store, factory, rows, config.seed)
    parameters, recall = _tune(index, store, queries, rescore, config.recall_target)
    return _publish(
        index,
        IndexSidecar(
            store=store.path,
            store_identity=store.schema.identity,
            kind=store.schema.kind,
            rows=int(index.ntotal),
            skipped=store.schema.rows - int(index.ntotal),
            dim=store.schema.dim,
            teacher=store.schema.teacher,
            factory=factory,
            search_parameters=parameters,
            rescore=rescore,
            recall=tuple(recall),
            recall_target=config.recall_target,
            bytes=0,
            digest="",
            train_rows=train_rows,
            seconds=round(time.monotonic() - began, 3),
            seed=config.seed,
            versions={**versions(), "faiss": _faiss_version()},
        ),
        config,
    )


def _build(store: Store, factory: str, rows: int, seed: int) -> tuple[Any, int]:
    """The index with every valid row added under its row number, and how many rows it was trained on."""
    dim, metric = store.schema.dim, faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dim, factory, metric)
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is None:  # only inverted lists keep row numbers themselves
            index = faiss.index_factory(dim, f"IDMap,{factory}", metric)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0].rpartition(": ")[2]
        raise StoreError(f"--factory {factory}: {reason}", remedy="see FAISS's list of index factory strings") from None
    train_rows = 0
    if not index.is_trained:
        centroids = ivf.nlist if ivf is not None else 256
        sample = min(rows, max(_TRAIN_PER_CENTROID * centroids, 10_000))
        valid = np.flatnonzero(store.status() == Status.OK)
        chosen = np.sort(np.random.default_rng(seed).choice(valid, sample, replace=False))
        train_rows = len(chosen)
        if train_rows < centroids:
            what = f"--factory {factory} has {centroids:,} centroids, more than the {train_rows:,} rows of {store.path}"
            raise StoreError(what, remedy="give a factory with fewer, or none")
        if ivf is not None:
            ivf.cp.spherical = True
        index.train(store.gather(chosen).astype(np.float32))
    for rows_N, embedding_ND in valid_blocks(store):
        index.add_with_ids(embedding_ND, rows_N)
    return index, train_rows


def _search(index: Any, queries_QD: Any, k: int, rescore: int, store: Store) -> tuple[Any, Any]:
    scores_QK, rows_QK = index.search(queries_QD, k * rescore)
    if rescore == 1:
        return scores_QK, rows_QK
    exact_QK = np.concatenate(
        [
            _exact_scores(queries_QD[at : at + _RESCORE_BATCH], rows_QK[at : at + _RESCORE_BATCH], store)
            for at in range(0, len(rows_QK), _RESCORE_BATCH)
        ]
    )
    order = np.argsort(-exact_QK, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(exact_QK, order, 1), np.take_along_axis(rows_QK, order, 1)


def _exact_scores(queries_QD: Any, rows_QK: Any, store: Store) -> Any:
    unique, position = np.unique(rows_QK, return_inverse=True)
    vectors = store.gather(np.maximum(unique, 0)).astype(np.float32)
    candidates_QKD = vectors[position.reshape(rows_QK.shape)]
    return np.where(rows_QK >= 0, np.einsum("qd,qkd->qk", queries_QD, candidates_QKD), -np.inf)


@dataclass(frozen=True)
class _Queries:
    """Query vectors, and for queries that are rows of the store itself which row each is (-1: none)."""

    source: str
    vectors_QD: np.ndarray[Any, Any]
    own_row_Q: np.ndarray[Any, Any]


def _queries(config: IndexConfig, store: Store) -> list[_Queries]:
    """Held-out queries: a random sample of the store's own rows, each of which is left out of its own result, and
    of another store's rows if one is given."""
    rng = np.random.default_rng(config.seed + 1)
    found = []
    if config.queries:
        Store(config.queries).require_complete()
    for path in [config.store, *([config.queries] if config.queries else [])]:
        other = Store(path)
        require_same_teacher(other, store)
        valid = np.flatnonzero(other.status() == Status.OK)
        chosen = np.sort(rng.choice(valid, min(len(valid), _RECALL_QUERIES), replace=False))
        own = chosen if path == config.store else np.full(len(chosen), -1)
        found.append(_Queries(other.schema.kind, other.gather(chosen).astype(np.float32), own))
    return found


def _tune(
    index: Any, store: Store, queries: list[_Queries], rescore: int, target: float
) -> tuple[dict[str, int], list[Recall]]:
    """The least nprobe, doubling, at which every kind of query reaches the target; its recall by kind of query."""
    truth = [exact_search(store, q.vectors_QD, _RECALL_K + 1) for q in queries]
    lists = faiss.try_extract_index_ivf(index)
    probes = [1 << p for p in range(int(math.log2(lists.nlist)) + 1)] if lists is not None else [0]
    parameters, recall = {}, []
    for probe in probes:
        parameters = {"nprobe": probe} if probe else {}
        _set_parameters(index, parameters)
        recall = [
            Recall(
                k=_RECALL_K,
                queries=len(q.vectors_QD),
                source=q.source,
                value=round(measure_recall(q, t, _search(index, q.vectors_QD, _RECALL_K + 1, rescore, store)), 4),
            )
            for q, t in zip(queries, truth, strict=True)
        ]
        if all(r.value >= target for r in recall):
            break
    return parameters, recall


def measure_recall(queries: _Queries, truth: tuple[Any, Any], found: tuple[Any, Any]) -> float:
    """Mean share of the exact top 10 that was found, a query that is itself a row left out of both.

    Rows with the same embedding are worth the same: of those that tie with the tenth, any counts.
    """
    shares = []
    for own, true_scores, true_rows, scores, rows in zip(queries.own_row_Q, *truth, *found, strict=True):
        others = (true_rows != own) & (true_rows >= 0)
        if not others.any():
            continue
        expected, least = set(true_rows[others][:_RECALL_K].tolist()), float(true_scores[others][:_RECALL_K].min())
        got = [(r, s) for r, s in zip(rows.tolist(), scores.tolist(), strict=True) if r not in (own, -1)][:_RECALL_K]
        hits = sum(r in expected or abs(s - least) < 1e-6 for r, s in got)
        shares.append(min(hits, len(expected)) / len(expected))
    return float(np.mean(shares)) if shares else 1.0


def _publish(index: Any, sidecar: IndexSidecar, config: IndexConfig) -> IndexSidecar:
    short = [r for r in sidecar.recall if r.value < config.recall_target]
    if short and not config.accept:
        worst = min(short, key=lambda r: r.value)
        reached = f"{sidecar.factory} reaches recall@{worst.k} {worst.value:.3f} for {worst.source} queries"
        what = f"{reached}, below {config.recall_target}"
        raise RecallError(what, remedy="give another --factory or a lower --recall, or --accept this one")
    out = Path(storage.absolute(config.out))
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    faiss.write_index(index, str(temporary / INDEX_FILE))
    with (temporary / INDEX_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sidecar = replace(sidecar, bytes=(temporary / INDEX_FILE).stat().st_size, digest=digest)
    storage.write_json(str(temporary / SIDECAR_FILE), sidecar.to_json())
    temporary.rename(out)
    return sidecar


def _require_same(config: IndexConfig, store: Store, factory: str) -> IndexSidecar:
    sidecar = Index(config.out).sidecar
    asked = [Store(config.queries).schema.kind] if config.queries else []
    pairs = (
        ("store", sidecar.store_identity, store.schema.identity),
        ("factory", sidecar.factory, factory),
        ("seed", sidecar.seed, config.seed),
        ("recall_target", sidecar.recall_target, config.recall_target),
        ("queries", [r.source for r in sidecar.recall[1:]], asked),
    )
    differences = [f"{name}: {mine} != {theirs}" for name, mine, theirs in pairs if mine != theirs]
    if differences:
        what = f"{config.out} exists and differs: {'; '.join(differences)}"
        raise OutputExistsError(what, remedy="give another --out, or delete it")
    return sidecar


def retrieve_with_index(images: str, texts: str, index: str, *, top_k: int, out: str) -> Selection:
    """`dimefm.pairs.retrieve` over stores and an index on disk, checked against each other.

    Raises MismatchError where the teachers differ or the index is over another store.
    """
    image_store, text_store, opened = Store(images), Store(texts), Index(index)
    for store, kind in ((image_store, "image"), (text_store, "text")):
        store.require_kind(kind)
        store.require_complete()
    require_same_teacher(image_store, text_store)
    if opened.sidecar.store_identity != text_store.schema.identity:
        what = f"{index} was built over {opened.sidecar.store}, not over {text_store.path}"
        raise MismatchError(what, remedy="build an index over this store")
    with Progress("retrieving", image_store.schema.rows, "image") as progress:
        return retrieve(
            image_store,
            text_store,
            lambda queries_QD, k: opened.search(queries_QD, k, text_store),
            index=opened.path,
            index_digest=opened.sidecar.digest,
            top_k=min(top_k, opened.sidecar.rows),
            out=out,
            progress=progress.at,
        )


def _set_parameters(index: Any, parameters: dict[str, int]) -> None:
    for name, value in parameters.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def _faiss_version() -> str:
    for name in ("faiss-gpu", "faiss-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return str(faiss.__version__)
