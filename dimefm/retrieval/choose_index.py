"""Chooses an index by the number of rows, their width and the memory. This is arithmetic alone, without FAISS.

The rules come from measurements (benchmarks/RESULTS.md, `python -m benchmarks retrieval`). Up to 100,000 rows exact
search is as fast as any index. Beyond that: inverted lists of 4-bit product codes of the residuals, scanned with SIMD
look-ups, whose best candidates are scored again from the store itself. Codes alone never reach a recall of 0.95.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dimefm.errors import DimefmError
from dimefm.system.progress import amount
from dimefm.system.wording import counted, hanging

EXACT_ROWS = 100_000
RESCORE = (10, 20, 50, 100)
"""How many times k candidates are scored again: the values to try, where an index has coarse codes."""

TRAIN_PER_CENTROID = 64
_LEAST_PER_CENTROID = 39  # below it FAISS warns that clusters are too few points
_KMEANS_ROUNDS = 10
_MANY_LISTS, _MOST_LISTS = 65536, 262144
PROGRAM = 700_000_000
"""Bytes of the process itself and its libraries."""
_SEARCH = 500_000_000  # bytes that a search takes beside the index: products with centroids, candidates scored again
_PARTS, _PART_ROWS = 8, (65_536, 2_000_000)


@dataclass(frozen=True)
class IndexPlan:
    """The index to build: its FAISS factory string, the number of rows to train it on, its size in bytes (0: not
    known), and the number of rows in each part."""

    factory: str
    train_rows: int
    bytes: int
    part_rows: int


def plan_index(rows: int, dim: int, memory: int, factory: str | None = None) -> IndexPlan:
    """The index for this number of rows, within `memory` bytes for the whole process; or `factory`, if one is given.

    Raises DimefmError where no choice fits, saying how much memory would do.
    """
    room = memory - PROGRAM
    part_rows = min(max(rows // _PARTS, _PART_ROWS[0]), _PART_ROWS[1])
    if factory:
        centroids = _centroids_of(factory)
        return IndexPlan(factory, _train_rows(rows, dim, centroids, room), 0, part_rows)
    if rows <= EXACT_ROWS and rows * dim * 4 <= room / 2:
        return IndexPlan("Flat", 0, rows * dim * 4, part_rows)
    lists = min(1 << int(math.log2(4 * math.sqrt(rows))), _MANY_LISTS)
    if rows > 50_000_000:
        lists = _MOST_LISTS
    while lists > 16 and _LEAST_PER_CENTROID * lists * dim * 4 > room / 2:
        lists //= 2
    smallest = 0
    for dims_per_byte in (4, 8, 16):
        codes = _codes(dim, 2 * dim // dims_per_byte)  # of half a byte each
        smallest = rows * (math.ceil(codes / 2) + 8) + lists * dim * 4
        if smallest + _SEARCH <= room:
            graph = "_HNSW32" if lists == _MOST_LISTS else ""
            name = f"IVF{lists}{graph},PQ{codes}x4fs"
            return IndexPlan(name, _train_rows(rows, dim, lists, room), smallest, part_rows)
    needed = amount(smallest + _SEARCH + PROGRAM)
    what = f"no index over {rows:,} rows of width {dim} fits into {amount(memory)}: the smallest takes {needed}"
    raise DimefmError(what, remedy="give more --memory, or search exactly, without an index")


def most_part_rows(memory: int, row_bytes: int) -> int:
    """How many rows a part may have: FAISS takes twice the bytes of a list as it grows."""
    return max(1, (memory - PROGRAM) // 2 // row_bytes)


def _codes(dim: int, most: int) -> int:
    """The largest number of equal parts that vectors of this width can be cut into, `most` or fewer."""
    return next(codes for codes in range(max(most, 1), 0, -1) if dim % codes == 0)


def has_coarse_codes(factory: str) -> bool:
    """Whether an index's own scores are too coarse, so that the store must score its candidates again."""
    return any(code in factory for code in ("PQ", "RaBitQ", "SQ4", "SQ6", "SQ8", "RQ", "LSQ", "PCA", "ITQ"))


def breakeven_queries(rows: int, plan: IndexPlan) -> int:
    """The number of queries for which exact search takes as many products as building the index."""
    return round(build_products(rows, plan) / rows)


def build_products(rows: int, plan: IndexPlan) -> int:
    """Products of a row with a centroid: k-means over the training rows, and finding the list of every row."""
    return _centroids_of(plan.factory) * (rows + _KMEANS_ROUNDS * plan.train_rows)


@dataclass(frozen=True)
class BuildPreview:
    """What `retrieval.build_index.build_index` would build, within how much memory in bytes; the number of queries at
    which exact search takes as much work as the building; and how many queries there will be, if that is known."""

    rows: int
    dim: int
    memory: int
    plan: IndexPlan
    breakeven: int
    queries: int | None

    @property
    def exact_is_cheaper(self) -> bool:
        """Whether it is for the known number of queries."""
        return self.queries is not None and self.queries <= self.breakeven

    def facts(self) -> dict[str, Any]:
        """What `build-index --dry-run` prints, for a program."""
        return {**asdict(self), "exact_is_cheaper": self.exact_is_cheaper, "advice": self.advice()}

    def show(self) -> str:
        """What `build-index --dry-run` prints."""
        plan = self.plan
        size = f"{amount(plan.bytes)}, " if plan.bytes else ""
        return "\n".join(
            [
                f"rows     {self.rows:,}, {self.dim} wide",
                f"factory  {plan.factory}, {_training(plan.train_rows)}",
                hanging("size     ", f"{size}built in parts of {plan.part_rows:,} rows within {amount(self.memory)}"),
                hanging("exact    ", self.advice()),
            ]
        )

    def advice(self) -> str:
        """When to do without an index."""
        if not self.breakeven:
            return "the index holds all rows as they are and compares with each: it only saves reading the store"
        least = f"up to {self.breakeven:,} queries take less work than the building"
        if self.queries is None:
            return f"{least}: dimefm retrieve without --index"
        verdict = "exact search is cheaper: dimefm retrieve without --index" if self.exact_is_cheaper else "build it"
        return f"{least}; for the {self.queries:,} of --queries, {verdict}"


def _training(rows: int) -> str:
    return f"trained on {counted(rows, 'row')}" if rows else "which needs no training"


def _centroids_of(factory: str) -> int:
    for word in factory.replace("_", ",").split(","):
        if word.startswith("IVF") and word[3:].isdigit():
            return int(word[3:])
    return 0


def _train_rows(rows: int, dim: int, centroids: int, room: float) -> int:
    wanted = max(TRAIN_PER_CENTROID * centroids, 10_000)
    return min(rows, wanted, max(int(room / 2) // (dim * 4), 1000))
