"""The FAISS index over a store: what is done to one, and searching it. The only importer of faiss.

`retrieval.build_index` puts these steps together. Shapes: Q queries, N rows of a block, D width, L lists, P lists
probed, C candidates, K neighbours.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from cache_schemas import IndexSidecar
from cache_schemas.index import SIDECAR_FILE
from dimefm.errors import MismatchError, StoreError
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.named_paths import named


@dataclass(frozen=True)
class SearchParameters:
    """How many lists are probed (0: there are no lists), and how many times k candidates are scored again."""

    probes: int
    rescore: int


_BLOCK_ROWS = 16384
_CHOICE_QUERIES = 1024  # whose products with all centroids are in memory at once
_RESCORE_QUERIES, _RESCORE_JOBS = 1024, 4  # queries share candidates, each of which is read once
_RESCORE_BYTES = 128 * 1024**2  # of candidates in float32, for each job
_OTHER_FACTORY = "give another --factory, from FAISS's list of index factory strings, or none"
DAMAGED = "delete the folder and build the index again"


class IndexSearch:
    """An index in memory and the store that it is over, which its best candidates are scored again from."""

    batch = 4096
    device = "cpu"

    def __init__(self, inner: Any, store: Store, setting: SearchParameters, spread: str = "") -> None:
        self._faiss, self._store, self._setting = inner, store, setting
        self._bonus_L = _bonus(inner, spread) if spread else None
        if self._bonus_L is not None:
            self._centroid_LD = torch.from_numpy(faiss.downcast_index(inner.quantizer).reconstruct_n(0, inner.nlist))

    @staticmethod
    def open(path: str, store: Store | None = None) -> IndexSearch:
        """Open an index; its store is where the sidecar says, or `store`.

        Raises StoreError where it is missing, damaged or lacks rows of the store, SchemaError where its sidecar is not
        valid, MismatchError where it is over another store.
        """
        folder = storage.local(path, "an index")
        sidecar = read_sidecar(folder)
        store = store or Store(named(sidecar.store, storage.join(folder, SIDECAR_FILE)))
        if sidecar.store_identity != store.schema.identity:
            what = f"{path} was built over {sidecar.store}, not over {store.path}"
            raise MismatchError(what, remedy="build an index over this store")
        lacking = {shard for shard, digest in store.contents.shards.items() if sidecar.shards.get(shard) != digest}
        if lacking:
            what = f"{path} lacks {len(lacking)} shards of {store.path} that were written since it was built"
            raise StoreError(what, remedy="run the same dimefm build-index again: it adds them")
        probes = sidecar.search_parameters.get("nprobe", 0)
        return IndexSearch(read_file(folder, sidecar), store, SearchParameters(probes, sidecar.rescore), sidecar.spread)

    def search(self, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Scores float32 (Q, K) and rows of the store int64 (Q, K), best first; -1 where fewer than k were found.

        Fastest with a thousand queries or more at once.
        """
        return self.search_with(self._setting, queries_QD, k)

    def probes(self) -> Sequence[int]:
        """Numbers of lists worth trying, ascending: powers of two and what is half between; (0,) without lists."""
        ivf = faiss.try_extract_index_ivf(self._faiss)
        if ivf is None:
            return (0,)
        steps = {n for p in range(int(math.log2(ivf.nlist)) + 1) for n in (1 << p, 3 << p >> 1) if n <= ivf.nlist}
        return sorted(steps | {ivf.nlist})

    def search_with(self, setting: SearchParameters, queries_QD: np.ndarray[Any, Any], k: int) -> tuple[Any, Any]:
        """`search` with other parameters than those the index was opened with."""
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        candidates = min(k * setting.rescore, max(k, self._faiss.ntotal))
        scores_QC, rows_QC = self._candidates(queries_QD, candidates, setting.probes)
        if setting.rescore == 1:
            return scores_QC, rows_QC
        parts = [slice(at, at + _RESCORE_QUERIES) for at in range(0, len(rows_QC), _RESCORE_QUERIES)]
        with ThreadPoolExecutor(min(_RESCORE_JOBS, torch.get_num_threads())) as pool:
            found = list(pool.map(lambda part: _rescore(self._store, queries_QD[part], rows_QC[part], k), parts))
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def _candidates(self, queries_QD: Any, count: int, probes: int) -> tuple[Any, Any]:
        """The index's own best rows, (Q, C)."""
        if self._bonus_L is None:
            if probes:
                faiss.extract_index_ivf(self._faiss).nprobe = probes
            return self._faiss.search(queries_QD, count)  # type: ignore[no-any-return]
        self._faiss.nprobe, found = probes, []
        for at in range(0, len(queries_QD), _CHOICE_QUERIES):
            part_QD = queries_QD[at : at + _CHOICE_QUERIES]
            near_QL = torch.from_numpy(part_QD) @ self._centroid_LD.T
            list_QP = (near_QL + self._bonus_L).topk(probes, dim=1).indices
            near_QP = near_QL.gather(1, list_QP)
            found.append(self._faiss.search_preassigned(part_QD, count, list_QP.numpy(), near_QP.numpy()))
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def _bonus(ivf: Any, spread: str) -> torch.Tensor:
    """What a list's best row is expected to score above its centroid, float32 (L,).

    A list of n rows, of standard deviation s about its centroid, projected on a query: the expected maximum of n normal
    values, s sqrt(2 ln n / D). Without it tight lists are probed before wide ones that hold better rows, the more so
    the further the queries are from all rows, as images are from sentences.
    """
    size_L = np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)])
    spread_L = np.frombuffer(base64.b64decode(spread), np.float16).astype(np.float32)
    return torch.from_numpy(spread_L * np.sqrt(2 * np.log(np.maximum(size_L, 2)) / ivf.d).astype(np.float32))


def _rescore(store: Store, queries_QD: Any, rows_QC: Any, k: int) -> tuple[Any, Any]:
    """The k best of each query's candidates, by the inner product with their rows of the store."""
    (queries, width), candidates = queries_QD.shape, rows_QC.shape[1]
    rows_N, place_QC = np.unique(rows_QC, return_inverse=True)
    if len(rows_N) * width * 4 > _RESCORE_BYTES and queries > 1:
        halves = (slice(0, queries // 2), slice(queries // 2, queries))
        found = [_rescore(store, queries_QD[half], rows_QC[half], k) for half in halves]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])
    embedding_ND = torch.from_numpy(store.gather(np.maximum(rows_N, 0))).float().numpy()
    place_QC = np.ascontiguousarray(place_QC.reshape(rows_QC.shape), np.int64)
    scores_QC = np.empty(rows_QC.shape, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (scores_QC, queries_QD, embedding_ND, place_QC)]
    faiss.fvec_inner_products_by_idx(*pointers, width, queries, candidates)  # type: ignore[attr-defined]
    scores_QC[rows_QC < 0] = -np.inf
    best_QK, at_QK = torch.from_numpy(scores_QC).topk(min(k, candidates), dim=1)
    return best_QK.numpy(), np.take_along_axis(rows_QC, at_QK.numpy(), axis=1)


# -- steps of a build -------------------------------------------------------------------------------------------------


def empty(factory: str, dim: int) -> Any:
    """An index by its FAISS factory string, for inner products, that takes row numbers with its vectors.

    Raises StoreError where FAISS does not know the string, or it does not fit the width.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        inner = index.index if isinstance(index, faiss.IndexPreTransform) else index
        if not isinstance(faiss.downcast_index(inner), faiss.IndexIVF):  # only inverted lists keep row numbers
            index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except MemoryError:
        raise StoreError(f"--factory {factory} takes more memory than there is", remedy=_OTHER_FACTORY) from None
    except RuntimeError as error:
        raise _unfit(factory, dim, _reason(error)) from None
    codes = faiss.try_extract_index_ivf(index)
    if codes is not None and not codes.nlist:
        raise StoreError(f"--factory {factory} has no centroid", remedy=_OTHER_FACTORY)
    if isinstance(codes, (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)):
        codes.by_residual = True  # for inner products FAISS codes the vectors themselves, which finds far fewer
    return index


def _unfit(factory: str, dim: int, reason: str) -> StoreError:
    """In words of ours where FAISS names neither the width nor what would do."""
    if "multiple of the number of subquantizers" in reason:
        divisors = ", ".join(str(number) for number in range(2, dim + 1) if dim % number == 0)
        what = f"--factory {factory}: the number after PQ does not divide the width of the vectors"
        return StoreError(what, remedy=f"the embeddings are {dim} wide: take one of {divisors}")
    if "METRIC_L2" in reason:
        reason = "FAISS has it for Euclidean distances alone, not for inner products"
    return StoreError(f"--factory {factory}: {reason}", remedy=_OTHER_FACTORY)


def emptied(index: Any) -> Any:
    """The index without its rows: the centroids and codes alone."""
    index.reset()
    return index


def needs_training(index: Any) -> bool:
    """Whether `train` must come before rows."""
    return not index.is_trained


def can_merge(index: Any) -> bool:
    """Whether parts of it can be built apart and merged; graphs cannot."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    try:
        inner.check_compatible_for_merge(inner)
    except RuntimeError:
        return False
    return True


def train(index: Any, factory: str, vectors_ND: np.ndarray[Any, Any], seed: int) -> None:
    """Find centroids and codes, on GPUs where FAISS sees any. Raises StoreError where there are too few rows, a
    transform makes the vectors wider than they are, or the GPUs have too little memory."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and len(vectors_ND) < ivf.nlist:
        what = f"--factory {factory} has {ivf.nlist:,} centroids, more than the {len(vectors_ND):,} training rows"
        raise StoreError(what, remedy="give a factory with fewer, more --memory, or neither")
    lent: AbstractContextManager[None] = nullcontext()
    if ivf is not None:
        ivf.cp.spherical, ivf.cp.seed = True, seed + 1
        if gpus():
            lent = _lent_to_gpus(ivf, "clustering_index", faiss.IndexFlatIP(ivf.d))
    try:
        with lent:
            index.train(vectors_ND)
    except RuntimeError as error:
        raise _untrained(factory, len(vectors_ND), str(error)) from None


def _untrained(factory: str, rows: int, said: str) -> StoreError:
    """What is wrong with a training, by the numbers in what FAISS says."""
    remedy = "give another --factory, or none: one is chosen then that fits the rows"
    if found := re.search(r"training points \((\d+)\) .* number of clusters \((\d+)\)", said):
        given, needed = map(int, found.groups())
        of_what = f"the {rows:,} training rows" if given == rows else f"the {given:,} points that it has"
        what = f"--factory {factory} takes {needed:,} points to train on, more than {of_what}"
        bits = f"codes of {needed.bit_length() - 1} bits each take {needed:,}, of 4 bits (PQ8x4, say) 16; "
        return StoreError(what, remedy=(bits if needed > 16 else "") + remedy)
    if found := re.search(r"cannot output (\d+) dimensions from (\d+)", said):
        wanted, width = map(int, found.groups())
        if wanted > width:
            what = f"--factory {factory} makes {wanted} dimensions of vectors that are {width} wide"
            return StoreError(what, remedy=f"write {width} or fewer after PCA")
        what = f"--factory {factory} takes {wanted:,} rows to find as many dimensions"
        return StoreError(f"{what}, more than the {rows:,} training rows", remedy=remedy)
    return StoreError(f"--factory {factory} cannot be trained: {said.strip().splitlines()[0]}", remedy=remedy)


def spread_of(index: Any, vectors_ND: np.ndarray[Any, Any]) -> str:
    """`IndexSidecar.spread`, by training vectors of unit norm; empty for an index without lists, or whose lists are not
    of the vectors themselves, or are found through a graph."""
    if not isinstance(index, faiss.IndexIVF) or not isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat):
        return ""
    with _assigning(index):
        near_N1, list_N1 = index.quantizer.search(vectors_ND[:: max(1, len(vectors_ND) // (16 * index.nlist))], 1)
    count_L = np.bincount(list_N1[:, 0], minlength=index.nlist)
    # Of unit vectors whose mean has length r, the variance about the mean is 1 - r^2.
    length_L = np.bincount(list_N1[:, 0], near_N1[:, 0], minlength=index.nlist) / np.maximum(count_L, 1)
    spread_L = np.sqrt(np.clip(1 - length_L**2, 0, 1))
    spread_L[count_L == 0] = np.median(spread_L[count_L > 0])
    return base64.b64encode(spread_L.astype(np.float16).tobytes()).decode()


def gpus() -> int:
    """The GPUs that FAISS sees."""
    return int(faiss.get_num_gpus())


def on_gpus(index: Any) -> Any:
    """A copy of an index on every GPU that FAISS sees."""
    return faiss.index_cpu_to_all_gpus(index)


def add_rows(index: Any, store: Store, ranges: Sequence[tuple[int, int]], *, use_gpus: bool = True) -> int:
    """Add the rows of those ranges under their row numbers; how many were skipped for want of a usable embedding.

    Raises StoreError for a kind of index that cannot be added to, or where the GPUs have too little memory.
    """
    skipped = 0
    with _assigning(index) if use_gpus else nullcontext():
        for first, last in ranges:
            for start in range(first, last, _BLOCK_ROWS):
                rows_N, embedding_ND = store.valid_rows(start, min(start + _BLOCK_ROWS, last))
                try:
                    index.add_with_ids(embedding_ND.astype(np.float32), rows_N)
                except RuntimeError as error:  # of a kind that is built at once, such as NSG
                    if _lacks_gpu_memory(error):
                        raise
                    raise StoreError(f"FAISS cannot add rows: {_reason(error)}", remedy=_OTHER_FACTORY) from None
                skipped += min(start + _BLOCK_ROWS, last) - start - len(rows_N)
    return skipped


@contextmanager
def _assigning(index: Any) -> Iterator[None]:
    """For the block, rows are assigned to their lists on GPUs, where FAISS sees any: it is most of the work. Graphs of
    centroids stay where they are."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or not gpus() or not isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat):
        yield
        return
    with _lent_to_gpus(ivf, "quantizer", ivf.quantizer):
        yield


@contextmanager
def _lent_to_gpus(ivf: Any, name: str, inner: Any) -> Iterator[None]:
    """For the block, the field `name` of `ivf` is a copy of `inner` on the GPUs; after it, what it was before.

    What is assigned to a field is no longer Python's to free. `ivf` frees its quantizer when it is freed itself, as it
    does with the one that is put back here; nobody would free the copy, and with it gigabytes of each GPU.
    """
    before = getattr(ivf, name)
    try:
        copy = on_gpus(inner)
        setattr(ivf, name, copy)
        try:
            yield
        finally:
            setattr(ivf, name, before)
            copy.thisown = True
    except RuntimeError as error:
        if not _lacks_gpu_memory(error):
            raise
        remedy = (
            "free the GPUs of others, give fewer --workers, or do without: CUDA_VISIBLE_DEVICES= dimefm build-index"
        )
        raise StoreError(f"FAISS has too little memory on a GPU: {_reason(error)}", remedy=remedy) from None


def _lacks_gpu_memory(error: RuntimeError) -> bool:
    """As FAISS words it: `StandardGpuResources: alloc fail`, `CUDA error 2 out of memory`."""
    return any(words in str(error) for words in ("alloc fail", "out of memory"))


def remove_rows(index: Any, start: int, stop: int) -> None:
    """Take the rows start..stop-1 out. Raises StoreError for a kind of index that cannot."""
    try:
        index.remove_ids(faiss.IDSelectorRange(start, stop))
    except RuntimeError:
        raise StoreError("rows of the store were written again, and this kind of index cannot drop rows",
                         remedy=DAMAGED) from None  # fmt: skip


def use_threads(count: int) -> None:
    """How many threads FAISS computes on."""
    faiss.omp_set_num_threads(count)


def merged(index: Any, part: Any) -> Any:
    """`index` with the rows of `part` moved into it."""
    if not index.ntotal and not can_merge(index):
        return part
    index.merge_from(part, 0)
    return index


def write(index: Any, path: Path) -> None:
    """Write a file, atomically. Raises StoreError where it cannot be written.

    Through a file of ours: FAISS's own, on a disk that is full, prints an error as it is closed and raises none.
    """
    failed: list[OSError] = []
    library: Any = faiss  # whose type stubs lack the writer

    def put(data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            failed.append(error)
            raise

    with storage.writing_to(str(path)), storage.writing_atomically(str(path)) as file:
        try:
            library.write_index(index, library.PyCallbackIOWriter(put))
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise


def read(path: Path) -> Any:
    """Read a file. Raises StoreError where FAISS cannot."""
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        reason = _reason(error)
        raise StoreError(f"{path} is damaged: {reason}", remedy=DAMAGED) from None


def _reason(error: RuntimeError) -> str:
    """What FAISS has to say, without where in its sources it says it."""
    return str(error).strip().split("\n")[0].rpartition(": ")[2]


# -- files ------------------------------------------------------------------------------------------------------------


def read_sidecar(folder: str) -> IndexSidecar:
    """index.json. Raises StoreError where there is none, SchemaError where it is not valid."""
    where = storage.join(folder, SIDECAR_FILE)
    if not storage.exists(where):
        raise StoreError(f"{folder} is not a dimefm index", remedy="make it with dimefm build-index")
    return IndexSidecar.parse(storage.read_json(where), where)


def read_file(folder: str, sidecar: IndexSidecar) -> Any:
    """The index itself. Raises StoreError unless it is whole."""
    file = Path(folder) / sidecar.file
    size = file.stat().st_size if file.exists() else 0
    if size != sidecar.bytes:
        what = f"{file} has {size:,} bytes, its sidecar says {sidecar.bytes:,}"
        raise StoreError(what, remedy=f"it is damaged: {DAMAGED}")
    if storage.digest_file(str(file)) != sidecar.digest:
        raise StoreError(f"{file} is damaged: its checksum does not fit", remedy=DAMAGED)
    return read(file)


def faiss_version() -> str:
    """The installed package and its version."""
    for name in ("faiss-gpu", "faiss-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return str(faiss.__version__)
