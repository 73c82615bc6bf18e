"""Merges the parts of an index of inverted lists from file to file, some lists at a time: no file is in memory whole.

A file of FAISS is the index without its lists (centroids, codebooks), and then the lists, one after another. The first
has the same length in all parts of a build, which have it from one trained index. FAISS itself reads, joins and writes
the lists of a slice, so that how it packs codes is its own affair. Shapes: L lists.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

from dimefm.errors import StoreError
from dimefm.retrieval.faiss_index import FaissIndex
from dimefm.retrieval.index_sidecar import REBUILD
from dimefm.system import storage

_SLICE = 64 * 1024**2  # bytes of lists that are joined at once, of all parts together; a longer list comes alone
_ARRAYS, _BLOCKS = b"ilar", b"ilbl"
_library: Any = faiss  # its type stubs lack readers and writers


class ListMerge:
    """Merges files of indexes that were all made from `empty`, a trained index of inverted lists without rows."""

    def __init__(self, empty: FaissIndex) -> None:
        self._index = empty.inner
        self._ivf: Any = faiss.extract_index_ivf(self._index)
        self._before = len(_file_of(self._index)) - len(_section_of(self._ivf.invlists))

    @staticmethod
    def suits(empty: FaissIndex) -> bool:
        """Whether this kind of index has inverted lists, and its file ends with them in a form that is known here."""
        ivf: Any = faiss.try_extract_index_ivf(empty.inner)
        if ivf is None:
            return False
        section = _section_of(ivf.invlists)
        return section[:4] in (_ARRAYS, _BLOCKS) and _file_of(empty.inner).endswith(section)

    def write(
        self,
        sources: Sequence[Path],
        path: Path,
        dropped: Sequence[tuple[int, int]] = (),
        progress: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Write the index that has the rows of all `sources`, in their order, without the rows of the ranges `dropped`.

        Raises StoreError where a source is not of this index.
        """
        with ExitStack() as opened, storage.writing_to(str(path)), storage.writing_atomically(str(path)) as file:
            files = [_Lists.open(opened.enter_context(source.open("rb")), self._before, source) for source in sources]
            sizes_L = np.zeros(self._ivf.nlist, np.uint64)
            head = self._head(sizes_L, files[0])
            file.write(bytes(len(head)))  # it says how long the lists are, so that it is written last
            for start, stop in _slices(np.sum([np.diff(lists.places) for lists in files], axis=0)):
                with self._joined([lists.section(start, stop) for lists in files], dropped) as joined:
                    sizes_L[start:stop] = [joined.list_size(number) for number in range(stop - start)]
                    section = _section_of(joined)
                file.write(memoryview(section)[_Lists(io.BytesIO(section), 0).places[0] :])
                progress(int(sizes_L.sum()))
            file.seek(0)
            file.write(self._head(sizes_L, files[0]))

    @contextmanager
    def _joined(self, sections: Sequence[bytes], dropped: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """The lists of all sections, which are of the same numbers, as FAISS has them."""
        with _lists_of(sections[0]) as joined:
            aside = None
            if isinstance(joined, _library.BlockInvertedLists):
                joined.packer = self._ivf.get_CodePacker()
                aside = _SetAside(joined)
            for start, stop in dropped:
                _library.DirectMap().remove_ids(faiss.IDSelectorRange(start, stop), joined)
            for section in sections[1:]:
                if aside:
                    aside.take()
                with _lists_of(section) as lists:
                    joined.merge_from(lists, 0)
            if aside:
                aside.put_back()
            yield joined

    def _head(self, sizes_L: np.ndarray[Any, Any], like: _Lists) -> bytes:
        """What comes before the lists in a file: the index that has as many rows, and the head of the lists."""
        index = self._index
        while True:
            index.ntotal = int(sizes_L.sum())
            if not isinstance(index, faiss.IndexPreTransform):
                break
            index = faiss.downcast_index(index.index)
        return _file_of(self._index)[: self._before] + like.head(sizes_L)


class _SetAside:
    """Rows that are taken out of lists of blocks while others are added.

    FAISS (1.15.1) writes beyond a list to which it adds rows when that has a multiple of `block_size` rows, which is
    the bytes of a block (BlockInvertedLists::add_entries). So such a list lends its last row, which comes back last.
    """

    def __init__(self, joined: Any) -> None:
        self._joined, self._packer = joined, joined.packer
        self._rows: dict[int, list[tuple[int, np.ndarray[Any, Any]]]] = {}  # by list: id and code

    def take(self) -> None:
        """Take a row out of every list to which nothing may be added as it is."""
        for number in range(self._joined.nlist):
            self._take(number)

    def put_back(self) -> None:
        """Add the rows that were taken out."""
        for number, rows in self._rows.items():
            self._take(number)
            blocks = np.zeros(-(-len(rows) // self._packer.nvec) * self._packer.block_size, np.uint8)
            for place, (_, code) in enumerate(rows):
                self._packer.pack_1_c(faiss.swig_ptr(code), place, faiss.swig_ptr(blocks))
            ids = np.array([row for row, _ in rows], np.int64)
            self._joined.add_entries(number, len(rows), faiss.swig_ptr(ids), faiss.swig_ptr(blocks))
        self._rows.clear()

    def _take(self, number: int) -> None:
        size = self._joined.list_size(number)
        if not size or size % self._joined.block_size:
            return
        code = np.empty(self._packer.code_size, np.uint8)
        self._packer.unpack_1_c(self._joined.get_codes(number), size - 1, faiss.swig_ptr(code))
        self._rows.setdefault(number, []).append((self._joined.get_single_id(number, size - 1), code))
        self._joined.resize(number, size - 1)


class _Lists:
    """The inverted lists in a file, from `at` on: `places` are where each begins, and where the last one ends."""

    def __init__(self, file: BinaryIO, at: int) -> None:
        self._file = file
        file.seek(at)
        self._kind = file.read(4)
        self._numbers = self._read(4 if self._kind == _BLOCKS else 2)  # lists, bytes of a code, of blocks their size
        self._sizes_L = np.zeros(int(self._numbers[0]), np.uint64)
        if self._kind == _BLOCKS:
            self.places = self._walk()
            return
        sparse, values = file.read(4) == b"sprs", self._read(int(self._read(1)[0]))
        if sparse:
            self._sizes_L[values[::2].astype(np.int64)] = values[1::2]
        else:
            self._sizes_L[:] = values
        row_bytes = int(self._numbers[1]) + 8
        self.places = file.tell() + np.concatenate([[0], np.cumsum(self._sizes_L.astype(np.int64) * row_bytes)])

    @staticmethod
    def open(file: BinaryIO, at: int, path: Path) -> _Lists:
        """The lists in a file of FAISS. Raises StoreError where they do not begin at `at`, or do not fill the file."""
        try:
            lists = _Lists(file, at)
            whole = lists.places[-1] == path.stat().st_size
        except (ValueError, OverflowError, IndexError, MemoryError):
            whole = False
        if not whole:
            raise StoreError(f"{path} is not a part of this index, or is damaged", remedy=REBUILD)
        return lists

    def head(self, sizes_L: np.ndarray[Any, Any]) -> bytes:
        """What comes before lists of this kind with these sizes."""
        numbers = struct.pack(f"<{len(self._numbers)}Q", len(sizes_L), *self._numbers[1:].tolist())
        if self._kind == _BLOCKS:
            return self._kind + numbers
        return self._kind + numbers + b"full" + struct.pack("<Q", len(sizes_L)) + sizes_L.tobytes()

    def section(self, start: int, stop: int) -> bytes:
        """The lists start..stop-1 as FAISS would write them, were there no others."""
        self._file.seek(int(self.places[start]))
        body = self._file.read(int(self.places[stop] - self.places[start]))
        return self.head(self._sizes_L[start:stop]) + body

    def _read(self, count: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(self._file.read(8 * count), np.uint64, count)

    def _walk(self) -> np.ndarray[Any, Any]:
        """The places of lists of blocks: each has its numbers of rows and of bytes before the rows and the bytes."""
        places = [self._file.tell()]
        for _ in self._sizes_L:
            self._file.seek(8 * int(self._read(1)[0]), io.SEEK_CUR)
            self._file.seek(int(self._read(1)[0]), io.SEEK_CUR)
            places.append(self._file.tell())
        return np.array(places)


def _slices(bytes_L: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Lists in a row of which all files together have about _SLICE bytes, each as a start and a stop."""
    number_L = (np.cumsum(bytes_L) - bytes_L) // _SLICE
    starts = [0, *(np.flatnonzero(np.diff(number_L)) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(bytes_L)], strict=True))


@contextmanager
def _lists_of(section: bytes) -> Iterator[Any]:
    """FAISS's lists, which are freed after the block: Python does not own what FAISS has read."""
    reader = _library.VectorIOReader()
    _library.copy_array_to_vector(np.frombuffer(section, np.uint8), reader.data)
    lists = faiss.downcast_InvertedLists(_library.read_InvertedLists(reader))
    try:
        yield lists
    finally:
        _library.InvertedLists.__swig_destroy__(lists)


def _section_of(lists: Any) -> bytes:
    writer = _library.VectorIOWriter()
    _library.write_InvertedLists(lists, writer)
    return faiss.vector_to_array(writer.data).tobytes()


def _file_of(index: Any) -> bytes:
    data: bytes = _library.serialize_index(index).tobytes()
    return data
