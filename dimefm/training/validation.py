"""Validation while training: zero-shot on labelled sets. Class embeddings are looked up in a cached text store, or come
from the student's own text tower if it has one.

This is a quick measure: a plain argmax, for several towers at once and without files. `dimefm evaluate` measures
exactly, with intervals, and breaks ties as CLIP_benchmark does (evaluation/metrics.py).

Shapes: N images of a set, B of a batch, C classes, D embedding width, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cache_schemas import Status, StudentSpec
from cache_schemas.run import Run
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folders
from dimefm.errors import MismatchError, SourceError
from dimefm.images.preprocess import Preprocess, normalise
from dimefm.models.towers import student_preprocessing, tokenizer_of
from dimefm.store.embedding_store import Store
from dimefm.system.machine import cpus, processes_here
from dimefm.system.wording import counted
from dimefm.training.config import TrainConfig
from dimefm.training.distributed import Place, add_up, from_first
from dimefm.training.run_folder import Inputs

_FEW = 100  # images, of which one is a point of accuracy or more


class Validation:
    """Labelled sets ready to score a student. Each process of a run takes an equal part of the images."""

    def __init__(
        self,
        sets: tuple[str, ...],
        texts: Store | None,
        spec: StudentSpec,
        place: Place,
        dtype: torch.dtype,
        tokenizer: Any = None,
    ) -> None:
        """`texts` has the embeddings of the prompts. It is None for a student with a text tower, whose `tokenizer` is
        then needed. Towers compute in `dtype`.

        Raises MismatchError if a prompt of a set is not in `texts`, SourceError for a set of which no image can be
        read.
        """
        self._spec, self._tokenizer, self._place, self._dtype = spec, tokenizer, place, dtype
        self._preprocess = Preprocess(student_preprocessing(spec))
        self._sets = open_folders(sets)
        self._require_classes()
        for images in self._sets:
            images.require_readable(self._preprocess)
        self._notes = [f"--val {images.name}: {note}" for images in self._sets for note in images.notes]
        if (total := sum(len(images.samples) for images in self._sets)) <= _FEW:
            what = f"the best checkpoint is chosen by {counted(total, 'image')}"
            self._notes.append(f"--val: {what}, too few to tell checkpoints apart that are nearly as good")
        self._counted = False
        if texts is not None:
            self._classes = from_first(self._look_up_classes(texts) if place.first else [], place)

    def run(self, towers: dict[str, tuple[Any, Any]]) -> dict[str, float]:
        """Top-1 by set and pair of towers: an image tower, and its text tower or None. The name of a score is that of
        the set followed by that of the pair. Images are decoded once for all pairs. All towers keep their mode."""
        modules = [tower for pair in towers.values() for tower in pair if tower is not None]
        modes = [(part, part.training) for tower in modules for part in tower.modules()]
        for tower in modules:
            tower.train()  # LeViT's kind caches what it computed from its weights until then; an average would for ever
            tower.eval()
        classes = [self._classes if text is None else self._embed_classes(text) for _, text in towers.values()]
        counts = []
        for number, images in enumerate(self._sets):
            mine = slice(self._place.rank, None, self._place.world)
            share = replace(images, samples=images.samples[mine], labels=images.class_labels[mine])
            answers = [
                partial(self._answers, image, classes[i][number].to(self._place.device))
                for i, (image, _) in enumerate(towers.values())
            ]
            size = 256 if self._place.device.type == "cuda" else 64
            right, readable = count_correct(share, answers, self._preprocess, size)
            counts += [*right, readable]
        for part, was in modes:  # each by itself: frozen batch norms stay so within a tower that trains
            part.training = was
        names = [(images, name) for images in self._sets for name in (*towers, None)]
        found = list(zip(names, add_up(counts, self._place), strict=True))
        self._note_unread({images.name: (n, len(images.samples)) for (images, name), n in found if name is None})
        return {f"{images.name}{name}": n / len(images.samples) for (images, name), n in found if name is not None}

    def take_notes(self) -> list[str]:
        """Notes on the sets that were not taken before: what is not used, and what cannot be read."""
        notes, self._notes = self._notes, []
        return notes

    def _note_unread(self, readable: dict[str, tuple[int, int]]) -> None:
        if not self._counted:
            self._notes += [
                f"--val {name}: {total - count:,} of {total:,} images cannot be read, and count as wrong"
                for name, (count, total) in readable.items()
                if count < total
            ]
        self._counted = True

    def _answers(self, tower: Any, classes_CD: torch.Tensor, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """The class of the largest cosine (B,)."""
        images = normalise(pixels_B3HW.to(self._place.device), self._spec.mean, self._spec.std)
        return (self._embed(tower, images) @ classes_CD.T).argmax(dim=1)

    def _embed(self, tower: Any, inputs: torch.Tensor) -> torch.Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(self._place.device.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            features = tower(inputs)
        return F.normalize(features.float(), dim=-1)

    def _embed_classes(self, tower: Any) -> list[torch.Tensor]:
        def embed(prompts: list[str]) -> torch.Tensor:
            return self._embed(tower, self._tokenizer(prompts).to(self._place.device))

        return [class_embeddings(labelled.prompts(), embed) for labelled in self._sets]

    def _look_up_classes(self, texts: Store) -> list[torch.Tensor]:
        texts.require_kind("text")
        wanted = set[str]()
        for labelled in self._sets:
            wanted.update(*labelled.prompts())
        vectors = _look_up(wanted, texts)

        def embed(prompts: Sequence[str]) -> torch.Tensor:
            return torch.stack([vectors[text] for text in prompts])

        return [class_embeddings(labelled.prompts(), embed) for labelled in self._sets]

    def _require_classes(self) -> None:
        for images in self._sets:
            if images.labels is None or images.labels.ndim == 2:
                what = f"--val {images.where} does not have one label per image"
                raise SourceError(what, remedy="give sets with classnames.txt and a label in each KEY.cls")


def class_embeddings(prompts: list[list[str]], embed: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """For each class the mean of its prompts' unit-norm embeddings, normalised again: (C, D).

    `embed` gives unit-norm embeddings (P, D) of the P prompts of one class.
    """
    return F.normalize(torch.stack([embed(texts).float().mean(dim=0) for texts in prompts]), dim=-1)


def count_correct(
    images: ImageSet,
    answers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    preprocess: Callable[[bytes], torch.Tensor],
    batch_size: int,
) -> tuple[list[int], int]:
    """For each of `answers`, functions from images uint8 (B, 3, H, W) to classes (B,): how many images it gives the
    right class. And how many images can be read; others count as wrong."""
    labels_N, counts, readable = torch.from_numpy(images.class_labels), [0] * len(answers), 0
    for pixels_B3HW, places_B in images.batches(preprocess, batch_size, max(2, cpus() // processes_here())):
        readable += len(places_B)
        for i, answer in enumerate(answers):
            counts[i] += int((answer(pixels_B3HW).cpu() == labels_N[places_B]).sum())
    return counts, readable


def open_validation(
    config: TrainConfig, run: Run, inputs: Inputs, place: Place, dtype: torch.dtype
) -> Validation | None:
    """The validation of a run, if its config names a set. Raises as `Validation` does."""
    if not config.val:
        return None
    if run.text_student:
        return Validation(config.val, None, run.student, place, dtype, tokenizer_of(run.text_student))
    texts = Store(config.val_texts) if config.val_texts else inputs.texts
    assert texts
    return Validation(config.val, texts, run.student, place, dtype)


def _look_up(wanted: set[str], store: Store) -> dict[str, torch.Tensor]:
    """The embeddings of these sentences, which are found by their text in the store's plan."""
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
