"""`retrieve --dry-run`: how long it would take, by an index and exactly, on CPUs and on a GPU."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.open_search import require_search
from dimefm.store.embedding_store import Store, require_same_teacher
from dimefm.system import storage
from dimefm.system.gpu_rates import AT_BEST, WIDTH, measured_rates
from dimefm.system.progress import duration
from dimefm.system.wording import counted, hanging

_QUERIES, _ROWS = 1024, 16384  # of the products that are timed


@dataclass(frozen=True)
class RetrieveCost:
    """Sizes, and rates per second: images by the index, as was measured when it was built (None: without an index, or
    unknown); scores of exact search on this machine's CPU, measured now, and on a GPU. A score is one image with one
    sentence. `workers` share the images, each on a machine, or a GPU, of its own; `device`: where exact search
    computes, if that is decided."""

    images: int
    texts: int
    dim: int
    index_images_per_second: float | None
    cpu_scores_per_second: float
    gpu_scores_per_second: float
    gpu: str
    workers: int
    device: str | None

    @property
    def seconds(self) -> dict[str, float]:
        """By way to search, the seconds that it takes."""
        images = self.images / self.workers
        found = {}
        if self.device != "cuda":
            found["exact"] = images * self.texts / self.cpu_scores_per_second
        if self.device != "cpu":
            found["exact on a GPU"] = images * self.texts / self.gpu_scores_per_second
        if self.index_images_per_second:
            found["index"] = images / self.index_images_per_second
        return found

    def advice(self) -> str:
        """What to do."""
        seconds = self.seconds
        if "index" not in seconds:
            return "dimefm build-index --dry-run --queries IMAGES.zarr says whether an index is cheaper on CPUs"
        cheaper = "the index" if seconds["index"] < seconds["exact"] else "exact search, without --index,"
        sooner = "is done sooner" if seconds["exact on a GPU"] < seconds["index"] else "takes longer"
        return f"on CPUs {cheaper} is cheaper; exact search on one such GPU {sooner} than the index on this machine"

    def facts(self) -> dict[str, Any]:
        """What `retrieve --dry-run` prints, for a program."""
        return {**asdict(self), "seconds": self.seconds, "advice": self.advice()}

    def show(self) -> str:
        """What `retrieve --dry-run` prints."""
        seconds, rate = self.seconds, self.index_images_per_second
        lines = [f"images    {self.images:,}; {counted(self.texts, 'sentence')}, {self.dim} wide"]
        many = f"{self.workers:,} machines, each" if self.workers > 1 else ""
        if rate:
            of = f"{many or 'one machine,'} at {rate:,.0f} images/s, measured when it was built"
            lines.append(hanging("index     ", f"{duration(seconds['index'])} of {of}"))
        if "exact" in seconds:
            of = f"{f'the CPUs of {many}' if many else 'the CPU of this machine,'} at {self.cpu_scores_per_second:.2g}"
            lines.append(hanging("exact     ", f"{duration(seconds['exact'])} of {of} scores/s, measured here and now"))
        if "exact on a GPU" in seconds:
            of = f"{counted(self.workers, 'GPU') if many else 'one GPU'}, exactly, {self.gpu}"
            lines.append(hanging("on a GPU  ", f"{duration(seconds['exact on a GPU'])} of {of}"))
        return "\n".join([*lines, hanging("so        ", self.advice())])


def retrieve_cost(
    images: str, texts: str, index: str | None, *, workers: int = 1, device: str | None = None
) -> RetrieveCost:
    """The cost for these stores, whose shards need not be done."""
    image_store, text_store = Store(images), Store(texts)
    image_store.require_kind("image")
    text_store.require_kind("text")
    require_same_teacher(image_store, text_store)
    require_search(text_store, index)
    rate = None if index is None else read_sidecar(storage.absolute(index)).queries_per_second or None
    dim, rates = text_store.schema.dim, measured_rates()
    on_gpu, gpu = AT_BEST["exact_scores_per_second"], "at best: by arithmetic for one of H200's class, not measured"
    if rates and rates.exact_scores_per_second:
        on_gpu, gpu = rates.exact_scores_per_second, f"as measured on one {rates.card}"
    sizes = image_store.schema.rows, text_store.schema.rows, dim
    return RetrieveCost(*sizes, rate, _measured(dim), on_gpu * WIDTH / dim, gpu, workers, device)


def _measured(dim: int) -> float:
    """Scores per second of exact search on this CPU, with all of its threads."""
    import torch

    from dimefm.retrieval.exact_search import block_top

    queries_QD, block_ND = torch.rand(_QUERIES, dim), torch.rand(_ROWS, dim)
    block_top(queries_QD[:64], block_ND, 16)  # libraries begin
    began = time.perf_counter()
    block_top(queries_QD, block_ND, 16)
    return _QUERIES * _ROWS / (time.perf_counter() - began)
