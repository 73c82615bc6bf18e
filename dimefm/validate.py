"""Validation while training: zero-shot on labelled sets. Class embeddings are looked up in a cached text store, or come
from the student's own text tower where it has one.

Shapes: N images of a set, B of a batch, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cache_schemas import Preprocessing, Status, StudentSpec
from dimefm.errors import MismatchError, SourceError
from dimefm.evaluation.imageset import ImageSet
from dimefm.evaluation.own_sets import open_folders
from dimefm.preprocess import Preprocess, normalise
from dimefm.store import Store


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
    """Labelled sets ready to score a student."""

    def __init__(self, sets: tuple[str, ...], texts: Store | None, spec: StudentSpec, tokenizer: Any = None) -> None:
        """`texts` has the prompts' embeddings; None for a student with a text tower, whose `tokenizer` is then wanted.

        Raises MismatchError where a prompt of a set is not in `texts`.
        """
        self._spec, self._tokenizer = spec, tokenizer
        self._preprocess = Preprocess(student_preprocessing(spec))
        self._sets = open_folders(sets)
        self._require_classes()
        if texts is None:
            return
        texts.require_kind("text")
        wanted = {text for labelled in self._sets for class_prompts in labelled.prompts() for text in class_prompts}
        vectors = _look_up(wanted, texts)
        self._classes = self._embed_classes(lambda prompts: torch.stack([vectors[text] for text in prompts]))

    def run(self, model: Any, text_model: Any, device: torch.device) -> dict[str, float]:
        """Top-1 by set. The models are left in the mode that they are in."""
        towers = [tower for tower in (model, text_model) if tower is not None]
        training = [tower.training for tower in towers]
        for tower in towers:
            tower.eval()

        def embed(pixels_B3HW: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                images = normalise(pixels_B3HW.to(device), self._spec.mean, self._spec.std)
                return F.normalize(model(images).float(), dim=-1).cpu()

        def embed_texts(prompts: list[str]) -> torch.Tensor:
            with torch.inference_mode():
                return F.normalize(text_model(self._tokenizer(prompts).to(device)).float(), dim=-1).cpu()

        classes = self._classes if text_model is None else self._embed_classes(embed_texts)
        pairs = zip(self._sets, classes, strict=True)
        scores = {s.name: top1(s, classes_CD, embed, self._preprocess) for s, classes_CD in pairs}
        for tower, was in zip(towers, training, strict=True):
            tower.train(was)
        return scores

    def _require_classes(self) -> None:
        for images in self._sets:
            if images.labels is None or images.labels.ndim == 2:
                what = f"--val {images.where} does not have one label an image"
                raise SourceError(what, remedy="give sets with classnames.txt and a label in each KEY.cls")

    def _embed_classes(self, embed: Callable[[list[str]], torch.Tensor]) -> list[torch.Tensor]:
        return [class_embeddings(labelled.prompts(), embed) for labelled in self._sets]


def class_embeddings(prompts: list[list[str]], embed: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """Unit-norm (C, D): the mean over templates of each class's unit-norm prompt embeddings, normalised again.

    `embed` gives unit-norm embeddings (P, D) of the P prompts of one class.
    """
    return F.normalize(torch.stack([embed(texts).float().mean(dim=0) for texts in prompts]), dim=-1)


def top1(
    images: ImageSet,
    classes_CD: torch.Tensor,
    embed: Callable[[torch.Tensor], torch.Tensor],
    preprocess: Callable[[bytes], torch.Tensor],
    batch_size: int = 64,
) -> float:
    """The share of images whose class has the largest cosine; one that cannot be read is wrong. `embed` takes uint8
    (B, 3, H, W) to unit-norm (B, D)."""
    labels_N, correct = torch.from_numpy(images.classes), 0
    for pixels_B3HW, places_B in images.batches(preprocess, batch_size):
        best_B = (embed(pixels_B3HW).float() @ classes_CD.T).argmax(dim=1).cpu()
        correct += int((best_B == labels_N[places_B]).sum())
    return correct / len(labels_N)


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
