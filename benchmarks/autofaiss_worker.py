"""What autofaiss does, in an environment of its own that has numpy, faiss and autofaiss.

`PYTHON autofaiss_worker.py FOLDER build SIZE` builds its index over FOLDER/vectors/*.npy within SIZE,
`PYTHON autofaiss_worker.py FOLDER search` searches it.
"""

import json
import sys
import time
from pathlib import Path

import faiss
import numpy as np

K, TURNS = 10, 3


def build(folder: Path, size: str) -> None:
    from autofaiss import build_index

    build_index(
        str(folder / "vectors"),
        index_path=str(folder / "autofaiss.index"),
        index_infos_path=str(folder / "autofaiss.json"),
        metric_type="ip",
        max_index_memory_usage=size,
        current_memory_available="12GB",
    )


def search(folder: Path) -> None:
    index, queries = faiss.read_index(str(folder / "autofaiss.index")), np.load(folder / "queries.npy")
    infos = json.loads((folder / "autofaiss.json").read_text())
    faiss.ParameterSpace().set_index_parameters(index, infos["index_param"])  # what autofaiss has tuned
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        _, rows = index.search(queries, K)
        seconds.append(time.perf_counter() - began)
    np.save(folder / "autofaiss-found.npy", rows)
    name = f"{infos['index_key']}, {infos['index_param']}"
    print(json.dumps({"name": name, "queries_per_second": len(queries) / sorted(seconds)[TURNS // 2]}))


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[3]) if sys.argv[2] == "build" else search(Path(sys.argv[1]))
