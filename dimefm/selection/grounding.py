"""Scores how well images ground a sentence: for every sentence of a store, from a sample of images.

Shapes: M images, N sentences of a block, T sentences, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache_schemas import Status
from cache_schemas.text_selection import GROUNDING, SCORES
from dimefm.errors import SelectionError
from dimefm.selection.scores import score_rows
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.shard_work import ShardRunner, run_here

NEAREST = 16
_SENTENCES = 16384  # in the sample that says how similar an image is to an ordinary sentence
_BLOCK = 1024  # with 16,384 images, 64 MiB of similarities


@dataclass(frozen=True)
class Grounding:
    """A sample of images, and how similar each is to an ordinary sentence.

    With s = cosine(sentence, image), the score of a sentence is standardised twice:

        z = (s - mean of s over a sample of sentences) / its deviation                        for each image
        score = (mean of the sentence's 16 largest z - mean of its z) / deviation of its z    over the sampled images

    that is, by how many deviations the images nearest to a sentence stand out from all others. The maximum of s alone
    would rank the teacher's habits: some images are near every sentence, some sentences near every image (hubs), and a
    text encoder whose embeddings lie in a narrow cone puts all sentences at nearly the same distance. This is the
    double centring of a two-way table; the aim is that of the local scaling in CSLS (Conneau et al. 2018,
    arXiv 1710.04087). benchmarks/selection.py compares it with other scores.
    """

    scaled_DM: torch.Tensor
    offset_M: torch.Tensor

    @staticmethod
    def sample(images: Store, texts: Store, count: int, *, seed: int, device: str) -> Grounding:
        """Draw up to `count` images and up to 16,384 sentences by `seed`. Raises SelectionError for fewer than two."""
        image_MD = draw_rows(images, count, (seed, 0)).to(device)
        text_ND = draw_rows(texts, _SENTENCES, (seed, 1)).to(device)
        for name, vectors, store in (("images", image_MD, images), ("sentences", text_ND, texts)):
            if len(vectors) < 2:
                what = f"{store.path} has {len(vectors)} {name} with an embedding; a score takes two or more"
                raise SelectionError(what, remedy="select by hits, or at random")
        sums_M = torch.zeros(len(image_MD), dtype=torch.float64, device=device)
        squares_M = sums_M.clone()
        for part_ND in text_ND.split(_BLOCK):
            similarity_NM = part_ND @ image_MD.T
            sums_M += similarity_NM.sum(dim=0, dtype=torch.float64)
            squares_M += similarity_NM.square().sum(dim=0, dtype=torch.float64)
        mean_M = sums_M / len(text_ND)
        deviation_M = (squares_M / len(text_ND) - mean_M.square()).clamp_min(1e-12).sqrt()
        return Grounding((image_MD / deviation_M[:, None].float()).T.contiguous(), (mean_M / deviation_M).float())

    def write(self, out: str) -> None:
        """Write the sample to `out`, where workers read it: a store is asked for its random rows only once."""
        parts = (self.offset_M[None], self.scaled_DM)
        data = b"".join(part.cpu().numpy().astype("<f4").tobytes() for part in parts)
        with storage.writing_to(out):
            storage.write_atomic(storage.join(out, GROUNDING), data)

    @staticmethod
    def read(out: str, *, width: int, device: str) -> Grounding:
        """What `write` wrote, of embeddings of this width."""
        values = np.frombuffer(storage.read_bytes(storage.join(out, GROUNDING)), "<f4").astype(np.float32)
        part_NM = torch.from_numpy(values.reshape(1 + width, -1)).to(device)
        return Grounding(part_NM[1:].contiguous(), part_NM[0].contiguous())

    def scores(self, embedding_ND: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The score of each sentence, float32 (N,), dimensionless."""
        return self._scores(torch.from_numpy(embedding_ND).to(self.offset_M.device)).cpu().numpy()

    def _scores(self, half_ND: torch.Tensor) -> torch.Tensor:
        found = [self.offset_M.new_empty(0)]
        images = len(self.offset_M)
        nearest = max(1, min(NEAREST, images // NEAREST))
        for part_ND in half_ND.split(_BLOCK):
            z_NM = part_ND.float() @ self.scaled_DM - self.offset_M
            deviation_N, mean_N = torch.std_mean(z_NM, dim=1, correction=0)
            top_N = z_NM.topk(nearest, dim=1).values.mean(dim=1)
            found.append((top_N - mean_N) / deviation_N.clamp_min(1e-6))
        return torch.cat(found)


def draw_rows(store: Store, count: int, seed: tuple[int, int]) -> torch.Tensor:
    """Embeddings of up to `count` random rows, float32, without those that are zero or not finite."""
    rows = np.flatnonzero(store.status() == Status.OK)
    chosen = np.sort(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False))
    embedding_ND = store.gather(chosen).astype(np.float32)
    return torch.from_numpy(embedding_ND[np.isfinite(embedding_ND).all(axis=1) & embedding_ND.any(axis=1)])


@dataclass(frozen=True)
class GroundingScorer:
    """Scores by the sample that is in the folder `out`."""

    out: str

    def load(self, width: int, device: str) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        """The scores of sentences of this width."""
        return Grounding.read(self.out, width=width, device=device).scores


def score_by_grounding(
    by: Store,
    store: Store,
    out: str,
    *,
    count: int,
    seed: int,
    device: str,
    earlier: str | None = None,
    run: ShardRunner = run_here,
) -> np.ndarray[Any, Any]:
    """How far the rows of `by` nearest to each row of `store` stand out, float32 (T,), NaN without an embedding; the
    scores of each shard are kept in `out`, as `scores.score_rows` says; `earlier` is the folder of another selection.

    Raises StoreError where `out` cannot be written, SelectionError as `Grounding.sample` does.
    """

    def prepare() -> None:
        if not storage.exists(storage.join(out, GROUNDING)):
            Grounding.sample(by, store, count, seed=seed, device=device).write(out)

    score_T = score_rows(
        store,
        storage.join(out, SCORES),
        GroundingScorer(out),
        device=device,
        prepare=prepare,
        earlier=storage.join(earlier, SCORES) if earlier else None,
        run=run,
    )
    storage.remove_file(storage.join(out, GROUNDING))
    return score_T
