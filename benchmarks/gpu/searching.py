"""Exact search against the limits of the device: the products that it must make, the rows that it must read."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.gpu.kit import Kit
from benchmarks.gpu.timing import copy_speed, peak, seconds
from benchmarks.simulated import simulate
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.store.embedding_store import Store

_K = 16


def searching(kit: Kit) -> None:
    """Queries/s over stores of random rows, smallest first."""
    width, queries = kit.sizes.width, kit.sizes.queries
    query_QD = np.random.default_rng(0).standard_normal((queries, width), dtype=np.float32)
    query_QD /= np.linalg.norm(query_QD, axis=1, keepdims=True)
    for rows in kit.sizes.rows:
        if not kit.enough(5 + rows / 4e5, f"search of {rows:,} rows"):
            return
        path = kit.inputs.folder / f"search-{rows}.zarr"
        simulate(path, "text", rows, width, [])
        began = time.perf_counter()
        search = ExactSearch(Store(str(path)), device=kit.device.type)
        at = f"{rows:,} x {width}, files warm"
        kit.line("exact search: rows to the device", rows / (time.perf_counter() - began), "rows/s", at)
        for count in (queries // 16, queries):
            spent = seconds([lambda s=search, n=count: s.search(query_QD[:n], _K)], kit.device, repeats=2)
            operations, read = 2 * count * rows * width, rows * width * 2
            halves, tf32 = (operations / spent / peak(kit, precision) for precision in ("fp16", "tf32"))
            at = f"{rows:,} rows, {count:,} queries: {operations / spent / 1e12:,.0f} TFLOP/s, {halves:.0%} of the "
            at += f"peak in fp16, {tf32:.0%} in tf32; reading the rows once would take "
            at += f"{read / copy_speed(kit) / spent:.1%} of the time"
            kit.line("exact search", count / spent, "queries/s", at)
        kit.rate("exact_scores_per_second", count * rows / spent)
        del search
