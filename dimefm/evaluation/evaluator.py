"""Measures a model on sets, by one task or several. Each result is on disk as soon as it is known.

Shapes: N images, C classes, M captions, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cache_schemas.evaluation import TEXT_EMBEDDINGS, UNPACKED, EvaluationResult, Metric
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import open_set
from dimefm.datasets.own_sets import find_folder
from dimefm.errors import SourceError
from dimefm.evaluation.clean_images import CleanImages
from dimefm.evaluation.config import ChosenSet, EvaluationConfig
from dimefm.evaluation.evaluate import Evaluation, none_below, require_text
from dimefm.evaluation.features import Features, compute_features
from dimefm.evaluation.recorder import Job, Recorder
from dimefm.evaluation.scoring import Measurement, cosines, measure, measure_retrieval, probabilities
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.models.clip import Clip
from dimefm.store.failures import as_list
from dimefm.system import storage


class Evaluator:
    """One model on all sets: `run` goes from set to set, `_results_of` from task to task."""

    def __init__(
        self,
        config: EvaluationConfig,
        clip: Clip,
        done: Evaluation,
        report: Callable[[EvaluationResult], None],
        clean: CleanImages | None = None,
    ) -> None:
        self._config, self._clip, self._done, self._report, self._clean = config, clip, done, report, clean
        require_text(config, clip.identity.has_text)
        self._recorder = Recorder(config, clip, done.folder, clean.digest if clean else None)
        self._texts = TextEmbeddings(clip, storage.join(config.out, TEXT_EMBEDDINGS))
        self._retried: set[str] = set()  # features whose failed images this command has tried again

    def run(self, chosen: list[ChosenSet], opened: dict[str, ImageSet]) -> Evaluation:
        """Measure each set, in order. `opened` has the test images of own sets; without them a set has failed."""
        self._opened = opened
        for one in chosen:
            if one.definition is None and one.folder not in opened:
                continue
            try:
                for result in self._results_of(one):
                    self._done.results.append(result)
                    self._report(result)
            except SourceError as error:
                self._done.failed.append((one.name, error))
        if not self._done.results and not self._done.failed:
            raise _nothing_done(self._config, self._done)
        return self._done

    def _results_of(self, one: ChosenSet) -> Iterator[EvaluationResult]:
        test = self._open(one, "test")
        if test is None:
            return
        job = Job(one, test, _metric_of(one, test))
        if "zero-shot" in self._config.tasks:
            yield self._zero_shot(job)
        probes = [task for task in self._config.tasks if task != "zero-shot"]
        train = self._training_images(job, probes) if probes else None
        if train is None:
            return
        if "linear-probe" in probes:
            yield self._probe(job, train, f"linear-probe/{self._rule()}", np.arange(len(train.samples)), None)
        if "few-shot" in probes:
            from dimefm.evaluation.probe import few_shot_rows  # imports scikit-learn

            for shots in self._config.shots:
                for seed in self._config.seeds:
                    rows = few_shot_rows(train.class_labels, shots, seed)
                    yield self._probe(job, train, f"few-shot-{shots}/{self._rule()}/seed-{seed}", rows, seed)

    def _open(self, one: ChosenSet, split: str) -> ImageSet | None:
        """A split of a set; None if it does not exist, which is noted for a known set."""
        if one.definition is None:
            return self._opened.pop(one.folder) if split == "test" else find_folder(one.folder, split)
        assert self._config.data is not None
        unpacked = storage.join(self._config.out, UNPACKED)
        images = open_set(one.definition, self._config.data, split, unpacked)
        if images is None:
            self._done.missing.append((one.definition, split))
        return images

    def _training_images(self, job: Job, probes: Sequence[str]) -> ImageSet | None:
        """The images that a probe is trained on; None for a known set without any, or with captions. Raises SourceError
        for an own set of that kind, which the user has named, and if the two splits differ in their classes."""
        own, test = job.chosen.definition is None, job.test
        if test.captions is not None:
            if own:
                what = f"{test.where} has captions, and {' and '.join(probes)} needs classes"
                raise SourceError(what, remedy="give --task zero-shot alone, which measures retrieval")
            return None
        train = self._open(job.chosen, "train")
        if train is None:
            if own:
                what = f"{test.where} has no training images for a probe"
                raise SourceError(what, remedy="put them below train/, as those of the test split are below test/")
            return None
        if train.classnames != test.classnames:
            what = f"{train.where}: the classes of the training images are not those of the test images"
            raise SourceError(what, remedy="keep both splits in the same layout")
        return train

    def _rule(self) -> str:
        """The part of a protocol's name that says by which rule, and by which solver, a probe was tuned."""
        rule = "elevater, test-selected" if self._config.selection == "elevater" else "honest"
        return rule if self._config.solver == "sgd" else f"{rule}, {self._config.solver}"

    def _features(self, one: ChosenSet, images: ImageSet) -> Features:
        path = self._recorder.features_path(one, images)
        retry = path not in self._retried  # once per command, however many protocols it has
        self._retried.add(path)
        found = compute_features(
            self._clip,
            images,
            path,
            squash=one.squash,
            decoder=self._config.decoder,
            batch_size=self._config.batch_size,
            threads=self._config.threads,
            retry=retry,
        )
        if not found.readable.any():
            what = f"{images.where}: none of the {len(found):,} images has features{as_list(found.store)}"
            raise SourceError(what, remedy="mend the images, or the model if it gives NaN")
        return found

    def _zero_shot(self, job: Job) -> EvaluationResult:
        if found := self._recorder.find(job, "zero-shot", {}):
            return found
        began, images, scored = time.monotonic(), job.test, None
        embedded = self._features(job.chosen, images)
        if images.captions is not None:
            texts_MD = self._texts.of_texts([text for texts in images.captions for text in texts])
            measurement = measure_retrieval(embedded, texts_MD, images)
        else:
            classes_CD = self._texts.of_classes(images.classnames, images.prompts())
            cosines_NC = cosines(embedded, classes_CD)
            scores_NC = probabilities(cosines_NC)
            self._recorder.keep_predictions(job, "zero-shot", scores_NC, embedded)
            ranks_images = job.metric in ("roc_auc", "map_11_point")  # by probability, as ELEVATER does
            scored = scores_NC if ranks_images else cosines_NC
            measurement = measure(scored, images, job.metric)
        measurement, notes = self._on_clean(measurement, scored, job)
        return self._recorder.add(job, "zero-shot", measurement, {}, embedded, began, notes)

    def _on_clean(
        self, measurement: Measurement, scores_NC: np.ndarray[Any, Any] | None, job: Job
    ) -> tuple[Measurement, list[str]]:
        """The measurement with that on images which are not trained on, where leaks are given; and notes on it."""
        return self._clean.add(measurement, scores_NC, job.test, job.metric) if self._clean else (measurement, [])

    def _probe(
        self, job: Job, train: ImageSet, protocol: str, rows: np.ndarray[Any, Any], seed: int | None
    ) -> EvaluationResult:
        from dimefm.evaluation.probe import SEARCH_EPOCHS, note_on_few, probe, search_epochs  # imports scikit-learn

        settings: dict[str, object] = {"train": train.digest(), "seed": seed, "train_images": len(rows)}
        epochs = search_epochs(train.class_labels[rows], self._config.selection, self._config.solver)
        if epochs != SEARCH_EPOCHS:  # as earlier versions had for all: their results are measured again
            settings["search_epochs"] = epochs
        if found := self._recorder.find(job, protocol, settings):
            return found
        began = time.monotonic()
        train_features, test_features = self._features(job.chosen, train), self._features(job.chosen, job.test)
        probed = probe(
            train_features,
            train.class_labels,
            rows,
            test_features,
            job.test,
            job.metric,
            heads_CD=self._heads(train),
            selection=self._config.selection,
            solver=self._config.solver,
            epochs=epochs,
            device=str(self._clip.device),
        )
        self._recorder.keep_predictions(job, protocol, probed.scores_NC, test_features)
        measurement = measure(probed.scores_NC, job.test, job.metric)
        measurement, notes = self._on_clean(measurement, probed.scores_NC, job)
        notes += [f"training images: {note}" for note in train.notes if note not in job.test.notes]
        if lost := probed.settings["unreadable"]:
            notes.append(f"{lost} of {len(rows)} training images could not be read and are left out")
        notes += note_on_few(probed.settings, job.metric)
        settings |= probed.settings
        return self._recorder.add(job, protocol, measurement, settings, test_features, began, notes)

    def _heads(self, train: ImageSet) -> torch.Tensor:
        """What a probe starts from, float32 (C, D): the class embeddings, or zeros for a model without a text tower."""
        if not self._clip.identity.has_text:
            return torch.zeros(len(train.classnames), self._clip.identity.embed_dim)
        return self._texts.of_classes(train.classnames, train.prompts())


def _metric_of(one: ChosenSet, images: ImageSet) -> Metric:
    """The metric that is reported: the definition's, or what the labels of an own set allow."""
    if one.definition is not None:
        return one.definition.metric
    if images.captions is not None:
        return "recall"
    return "map_11_point" if images.class_labels.ndim == 2 else "accuracy"


def _nothing_done(config: EvaluationConfig, done: Evaluation) -> SourceError:
    """The error of an evaluation without a result and without a failure: all that was asked for is missing."""
    remedy = "dimefm sets NAME says where to get them"
    no_training = [definition.name for definition, split in done.missing if split == "train"]
    if no_training or not done.missing:
        lacks = f"{', '.join(no_training)}: no training images" if no_training else "only sets of captions"
        return SourceError(f"{lacks} below {config.data}: nothing for {' and '.join(config.tasks)}", remedy=remedy)
    return none_below(config)
