"""Builds the parts of an index on Ray: each part is one task, which is done again where its worker is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import WorkerCrashedError

from dimefm.errors import StoreError
from dimefm.retrieval.index_parts import PartRunner, PartTask, build_part
from dimefm.system.machine import choose_device, cpus
from pipeline.ray_cluster import cluster, fetch, gpu_share

_TRIES = 3


def on_ray(workers: int, address: str | None = None) -> PartRunner:
    """Have `retrieval.build_index.build_index` build its parts on Ray, `workers` at a time: on a cluster that sees the
    same files, or on a local Ray of this command.

    Each part has its share of Ray's GPUs, where there are some. Otherwise every part would put its centroids and
    FAISS's working memory on all GPUs at once.
    """

    def run(parts: Sequence[PartTask]) -> Iterator[PartTask]:
        if not parts:
            return
        count = min(workers, len(parts))
        with cluster(address, count, choose_device(None)):
            threads, gpus = max(1, cpus() // count), gpu_share(count, "cuda")
            task: Any = ray.remote(build_part)
            task = task.options(num_cpus=1, num_gpus=gpus, max_retries=_TRIES - 1)
            waiting, flying = list(reversed(parts)), list[Any]()
            while waiting or flying:
                while waiting and len(flying) < count:
                    flying.append(task.remote(waiting.pop(), threads, gpus > 0))
                ready, flying = ray.wait(flying)
                for reference in ready:
                    yield _get(reference)

    return run


def _get(reference: Any) -> PartTask:
    try:
        return fetch(reference)  # type: ignore[no-any-return]
    except WorkerCrashedError:
        remedy = "see Ray's log, mend the cause (often memory: fewer --workers), and run again; finished parts are kept"
        raise StoreError(f"a part lost its worker {_TRIES} times", remedy=remedy) from None
