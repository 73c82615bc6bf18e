"""Validation while training: zero-shot on labelled sets, with class embeddings looked up in a cached text store."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cache_schemas import Preprocessing, Status, StudentSpec
from dimefm.errors import MismatchError
from dimefm.labelled import open_sets
from dimefm.preprocess import Preprocess, normalise
from dimefm.store import Store
from dimefm.zeroshot import class_embeddings, zero_shot


def student_preprocessing(spec: StudentSpec) -> Preprocessing:
    """How a student's images are prepared for evaluation, and what is written into its exported folder."""
    return Preprocessing(
        size=(spec.image_size, spec.image_size),
        mean=spec.mean,
        std=spec.std,
        interpolation="bicubic",
        resize_mode="shortest",
    )


class Validation:
    """Labelled sets with their class embeddings, ready to score a student."""

    def __init__(self, sets: tuple[str, ...], texts: Store, spec: StudentSpec) -> None:
        """Raises MismatchError where a prompt of a set is not in `texts`."""
        self._spec = spec
        self._preprocess = Preprocess(student_preprocessing(spec))
        texts.require_kind("text")
        self._sets = open_sets(sets)
        wanted = {text for labelled in self._sets for class_prompts in labelled.prompts() for text in class_prompts}
        self._vectors = _look_up(wanted, texts)
        self._classes = [class_embeddings(labelled.prompts(), self._embed_texts) for labelled in self._sets]

    def run(self, model: Any, device: torch.device) -> dict[str, float]:
        """Top-1 by set. The model is left in training mode."""
        model.eval()

        def embed(pixels_B3HW: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                images = normalise(pixels_B3HW.to(device), self._spec.mean, self._spec.std)
                return F.normalize(model(images).float(), dim=-1).cpu()

        pairs = zip(self._sets, self._classes, strict=True)
        scores = {s.name: zero_shot(s, classes_CD, embed, self._preprocess).top1 for s, classes_CD in pairs}
        model.train()
        return scores

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self._vectors[text] for text in texts])


def _look_up(wanted: set[str], store: Store) -> dict[str, torch.Tensor]:
    """The embeddings of these sentences, found by their text in the store's plan."""
    found: dict[str, torch.Tensor] = {}
    for shard in range(store.schema.shards):
        start, stop = store.schema.shard_range(shard)
        texts = store.plan(shard)["text"].to_pylist()
        rows = [start + i for i, text in enumerate(texts) if text in wanted]
        good = store.status(start, stop)
        rows = [row for row in rows if good[row - start] == Status.OK]
        vectors = torch.from_numpy(store.gather(np.array(rows, np.int64))).float()
        found.update({texts[row - start]: vector for row, vector in zip(rows, vectors, strict=True)})
    missing = wanted - found.keys()
    if missing:
        what = f"{store.path} lacks {len(missing)} of {len(wanted)} prompts of the --val sets, such as {min(missing)!r}"
        raise MismatchError(what, remedy="dimefm cache-texts SET... --out PROMPTS.zarr, and --val-texts PROMPTS.zarr")
    return found
