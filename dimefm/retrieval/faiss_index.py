"""A FAISS index in memory: made, filled, merged, written, searched. `retrieval.index_merge` alone imports faiss, too.

`retrieval.build_index` makes one step by step, `retrieval.index_search` searches a finished one. Shapes: Q queries, N
rows, D width, L lists, P lists probed, C candidates.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dimefm.errors import StoreError
from dimefm.retrieval.faiss_errors import OTHER_FACTORY, factory_error, lacks_gpu_memory, reason, training_error
from dimefm.retrieval.index_sidecar import REBUILD
from dimefm.store.embedding_store import Store
from dimefm.system import storage

_BLOCK_ROWS = 16384
_library: Any = faiss  # its type stubs lack some of what it has


class FaissIndex:
    """An index for inner products, which knows its vectors by their rows of the store.

    `inner` is FAISS's own index; its file has no place for `spread`, which is `IndexSidecar.spread`. `factory` names
    the index in messages about its training.
    """

    def __init__(self, inner: Any, *, factory: str = "", spread: str = "") -> None:
        self.inner, self.spread, self._factory = inner, spread, factory

    @staticmethod
    def from_factory(factory: str, dim: int) -> FaissIndex:
        """An index without rows, by its FAISS factory string.

        Raises StoreError where FAISS does not know the string, or it does not fit the width.
        """
        try:
            index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
            codes = index.index if isinstance(index, faiss.IndexPreTransform) else index
            if not isinstance(faiss.downcast_index(codes), faiss.IndexIVF):  # only inverted lists keep row numbers
                index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
        except MemoryError:
            raise StoreError(f"--factory {factory} takes more memory than there is", remedy=OTHER_FACTORY) from None
        except RuntimeError as error:
            raise factory_error(factory, dim, error) from None
        lists = faiss.try_extract_index_ivf(index)
        if lists is not None and not lists.nlist:
            raise StoreError(f"--factory {factory} has no centroid", remedy=OTHER_FACTORY)
        if isinstance(lists, (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)):
            lists.by_residual = True  # for inner products FAISS codes the vectors themselves, which finds far fewer
        return FaissIndex(index, factory=factory)

    @staticmethod
    def read(path: Path, spread: str = "", *, mapped: bool = False) -> FaissIndex:
        """The index in a file; `mapped` leaves inverted lists in it, where `lists_stay_in_file`, to be searched alone.

        Raises StoreError where FAISS cannot read it.
        """
        try:
            return FaissIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0), spread=spread)
        except RuntimeError as error:
            raise StoreError(f"{path} is damaged: {reason(error)}", remedy=REBUILD) from None

    def write(self, path: Path) -> None:
        """Write a file, atomically. Raises StoreError where it cannot be written.

        FAISS writes through a file object of ours: where the disk is full, its own file prints an error as it is
        closed, and raises none.
        """
        failed: list[OSError] = []

        def put(data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        with storage.writing_to(str(path)), storage.writing_atomically(str(path)) as file:
            try:
                _library.write_index(self.inner, _library.PyCallbackIOWriter(put))
            except RuntimeError:
                if failed:
                    raise failed[0] from None
                raise

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def needs_training(self) -> bool:
        """Whether `train` must come before rows."""
        return not self.inner.is_trained

    def train(self, vectors_ND: np.ndarray[Any, Any], seed: int) -> None:
        """Find the centroids, the codes and the spread of the lists, by vectors of unit norm; on GPUs where FAISS sees
        any.

        Raises StoreError where there are too few rows, a transform makes the vectors wider than they are, or the GPUs
        have too little memory.
        """
        ivf = faiss.try_extract_index_ivf(self.inner)
        if ivf is not None and len(vectors_ND) < ivf.nlist:
            rows = f"more than the {len(vectors_ND):,} training rows"
            what = f"--factory {self._factory} has {ivf.nlist:,} centroids, {rows}"
            raise StoreError(what, remedy="give a factory with fewer, more --memory, or neither")
        lent: AbstractContextManager[None] = nullcontext()
        if ivf is not None:
            ivf.cp.spherical, ivf.cp.seed = True, seed + 1
            if gpus():
                lent = _lent_to_gpus(ivf, "clustering_index", faiss.IndexFlatIP(ivf.d))
        try:
            with lent:
                self.inner.train(vectors_ND)
        except RuntimeError as error:
            raise training_error(self._factory, len(vectors_ND), str(error)) from None
        self.spread = self._spread_of_lists(vectors_ND)

    def _spread_of_lists(self, vectors_ND: np.ndarray[Any, Any]) -> str:
        """`IndexSidecar.spread`; empty for an index without lists, and where the lists are not of the vectors
        themselves or are found through a graph."""
        index = self.inner
        if not isinstance(index, faiss.IndexIVF) or not _has_flat_centroids(index):
            return ""
        with self._lists_on_gpus():
            near_N1, list_N1 = index.quantizer.search(vectors_ND[:: max(1, len(vectors_ND) // (16 * index.nlist))], 1)
        count_L = np.bincount(list_N1[:, 0], minlength=index.nlist)
        # The mean of unit vectors has a length r; their variance about it is 1 - r^2.
        length_L = np.bincount(list_N1[:, 0], near_N1[:, 0], minlength=index.nlist) / np.maximum(count_L, 1)
        spread_L = np.sqrt(np.clip(1 - length_L**2, 0, 1))
        spread_L[count_L == 0] = np.median(spread_L[count_L > 0])
        return base64.b64encode(spread_L.astype(np.float16).tobytes()).decode()

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return int(self.inner.ntotal)

    def add_rows(self, store: Store, ranges: Sequence[tuple[int, int]], *, use_gpus: bool = True) -> int:
        """Add the rows of these ranges; return how many were skipped because they have no usable embedding.

        Raises StoreError for a kind of index that cannot be added to, or where the GPUs have too little memory.
        """
        skipped = 0
        with self._lists_on_gpus() if use_gpus else nullcontext():
            for first, last in ranges:
                for start in range(first, last, _BLOCK_ROWS):
                    stop = min(start + _BLOCK_ROWS, last)
                    rows_N, embedding_ND = store.valid_rows(start, stop)
                    try:
                        self.inner.add_with_ids(embedding_ND.astype(np.float32), rows_N)
                    except RuntimeError as error:  # of a kind that is built at once, such as NSG
                        if lacks_gpu_memory(error):
                            raise
                        raise StoreError(f"FAISS cannot add rows: {reason(error)}", remedy=OTHER_FACTORY) from None
                    skipped += stop - start - len(rows_N)
        return skipped

    def remove_rows(self, start: int, stop: int) -> None:
        """Remove the rows start..stop-1. Raises StoreError for a kind of index that cannot."""
        try:
            self.inner.remove_ids(faiss.IDSelectorRange(start, stop))
        except RuntimeError:
            what = "rows of the store were written again, and this kind of index cannot drop rows"
            raise StoreError(what, remedy=REBUILD) from None

    def remove_all_rows(self) -> None:
        """Keep the centroids and codes alone."""
        ivf = faiss.try_extract_index_ivf(self.inner)
        if ivf is not None and self.lists_stay_in_file:  # and so they may be mapped, and cannot be changed
            lists = _library.ArrayInvertedLists(ivf.nlist, ivf.code_size)
            ivf.replace_invlists(lists, True)
            lists.this.disown()
        self.inner.reset()

    @property
    def can_merge(self) -> bool:
        """Whether parts of it can be built apart and merged; graphs cannot."""
        codes = faiss.downcast_index(self.inner.index) if isinstance(self.inner, faiss.IndexIDMap) else self.inner
        try:
            codes.check_compatible_for_merge(codes)
        except RuntimeError:
            return False
        return True

    def merge(self, part: FaissIndex) -> None:
        """Take the rows of `part`, which loses them. An index that cannot merge has a single part, and becomes it."""
        if not self.rows and not self.can_merge:
            self.inner = part.inner
        else:
            self.inner.merge_from(part.inner, 0)

    @contextmanager
    def _lists_on_gpus(self) -> Iterator[None]:
        """For the block, GPUs find the list of each row, where FAISS sees any: it is most of the work of adding rows.
        Graphs of centroids stay where they are."""
        ivf = faiss.try_extract_index_ivf(self.inner)
        if ivf is None or not gpus() or not _has_flat_centroids(ivf):
            yield
            return
        with _lent_to_gpus(ivf, "quantizer", ivf.quantizer):
            yield

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def lists_stay_in_file(self) -> bool:
        """Whether it is searched in the inverted lists of its file, of which memory holds what a search needs. FAISS
        can do so but with the blocks of codes of fast scans (PQ...x4fs), and with an index without lists."""
        ivf: Any = faiss.try_extract_index_ivf(self.inner)
        return ivf is not None and not isinstance(
            faiss.downcast_InvertedLists(ivf.invlists), _library.BlockInvertedLists
        )

    def row_bytes(self) -> int:
        """The least that a row takes, by its code, its number, and its links in a graph."""
        index: Any = faiss.try_extract_index_ivf(self.inner) or self.inner
        while isinstance(index, (faiss.IndexIDMap, faiss.IndexPreTransform)):
            index = faiss.downcast_index(index.index)
        links, codes = 0, index
        if isinstance(index, faiss.IndexHNSW):
            graph: Any = index.hnsw
            links, codes = 4 * graph.nb_neighbors(0), faiss.downcast_index(index.storage)
        return links + int(getattr(codes, "code_size", 0)) + 8

    # -- search -------------------------------------------------------------------------------------------------------

    @property
    def lists(self) -> int:
        """How many inverted lists it has, 0 where it has none."""
        ivf = faiss.try_extract_index_ivf(self.inner)
        return 0 if ivf is None else int(ivf.nlist)

    def list_sizes(self) -> np.ndarray[Any, Any]:
        """Rows of each list, int64 (L,), of an index that is inverted lists and nothing before them."""
        return np.array([self.inner.invlists.list_size(number) for number in range(self.inner.nlist)])

    def centroids(self) -> np.ndarray[Any, Any]:
        """The centroid of each list, float32 (L, D), of an index that is inverted lists and nothing before them."""
        return faiss.downcast_index(self.inner.quantizer).reconstruct_n(0, self.inner.nlist)  # type: ignore[no-any-return]

    def search(self, queries_QD: np.ndarray[Any, Any], count: int, probes: int) -> tuple[Any, Any]:
        """The `count` best rows of each query by the index's own scores: scores and rows (Q, C), -1 where there are
        fewer. FAISS chooses the `probes` lists with the nearest centroids; 0 for an index without lists."""
        if probes:
            faiss.extract_index_ivf(self.inner).nprobe = probes
        return self.inner.search(queries_QD, count)  # type: ignore[no-any-return]

    def search_lists(self, queries_QD: np.ndarray[Any, Any], count: int, list_QP: Any, near_QP: Any) -> tuple[Any, Any]:
        """`search` in the lists `list_QP`; `near_QP` is each query's inner product with their centroids."""
        self.inner.nprobe = list_QP.shape[1]
        return self.inner.search_preassigned(queries_QD, count, list_QP, near_QP)  # type: ignore[no-any-return]


def inner_products(
    queries_QD: np.ndarray[Any, Any], vectors_ND: np.ndarray[Any, Any], place_QC: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The inner product of each query with each of the vectors at its places, float32 (Q, C); both are float32."""
    place_QC = np.ascontiguousarray(place_QC, np.int64)
    scores_QC = np.empty(place_QC.shape, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (scores_QC, queries_QD, vectors_ND, place_QC)]
    sizes = (queries_QD.shape[1], *place_QC.shape)
    faiss.fvec_inner_products_by_idx(*pointers, *sizes)  # type: ignore[attr-defined]
    return scores_QC


# -- the machine and the library --------------------------------------------------------------------------------------


def gpus() -> int:
    """How many GPUs FAISS sees."""
    return int(faiss.get_num_gpus())


def use_threads(count: int) -> None:
    """Have FAISS compute on this number of threads."""
    faiss.omp_set_num_threads(count)


def faiss_version() -> str:
    """The installed package and its version."""
    for name in ("faiss-gpu", "faiss-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return str(faiss.__version__)


def _on_gpus(index: Any) -> Any:
    """A copy of an index on every GPU that FAISS sees."""
    return faiss.index_cpu_to_all_gpus(index)


@contextmanager
def _lent_to_gpus(ivf: Any, field: str, index: Any) -> Iterator[None]:
    """For the block, `field` of `ivf` is a copy of `index` on the GPUs; after it, what it was before.

    What is assigned to a field is no longer Python's to free. `ivf` frees its quantizer when it is freed itself, as it
    does with the one that is put back here; nobody would free the copy, and with it gigabytes of each GPU.
    """
    before = getattr(ivf, field)
    try:
        copy = _on_gpus(index)
        setattr(ivf, field, copy)
        try:
            yield
        finally:
            setattr(ivf, field, before)
            copy.thisown = True
    except RuntimeError as error:
        if not lacks_gpu_memory(error):
            raise
        remedy = (
            "free the GPUs of others, give fewer --workers, or do without: CUDA_VISIBLE_DEVICES= dimefm build-index"
        )
        raise StoreError(f"FAISS has too little memory on a GPU: {reason(error)}", remedy=remedy) from None


def _has_flat_centroids(ivf: Any) -> bool:
    """Whether all centroids are compared with a row, rather than reached through a graph."""
    return isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)
