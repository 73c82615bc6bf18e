"""`dimefm evaluate`: a model over sets, under one protocol or several, each result on disk as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas import Failure, Status, digest_of, to_plain
from cache_schemas.evaluation import (
    FEATURES,
    PREDICTIONS,
    TEXT_EMBEDDINGS,
    UNPACKED,
    EvaluationResult,
    Metric,
    SetDefinition,
)
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import open_set
from dimefm.datasets.own_sets import find_folder, open_folder
from dimefm.errors import DimefmError, SourceError
from dimefm.evaluation.config import ChosenSet, EvaluationConfig, choose_sets, default_name
from dimefm.evaluation.features import Features, compute_features, to_retry
from dimefm.evaluation.open_model import open_model
from dimefm.evaluation.predictions import PREDICTIONS_SUFFIX, file_name, write_predictions
from dimefm.evaluation.probe import few_shot_rows, probe
from dimefm.evaluation.results import Results
from dimefm.evaluation.scoring import REPORTED, Measurement, cosines, measure, measure_retrieval, probabilities
from dimefm.evaluation.text_embeddings import TextEmbeddings
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.store.failures import as_list
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.named_paths import allowing
from dimefm.system.versions import versions


@dataclass
class Evaluation:
    """What came of it: results in the order of the work, sets that are not there, and sets that could not be done."""

    folder: str
    results: list[EvaluationResult] = field(default_factory=list)
    missing: list[tuple[SetDefinition, str]] = field(default_factory=list)
    failed: list[tuple[str, DimefmError]] = field(default_factory=list)


def evaluate(config: EvaluationConfig, report: Callable[[EvaluationResult], None] | None = None) -> Evaluation:
    """Evaluate; `report` is told each result as it is there.

    A set that is not below `data`, or cannot be read, is listed and the rest goes on. Raises a DimefmError for a model
    that cannot be loaded, and where nothing of what was asked for exists.
    """
    chosen = choose_sets(config)
    config = replace(config, out=storage.local(config.out, "the folder of all evaluations"))
    folder = str(Path(config.out, config.name or default_name(config)))
    typed = [*config.folders, *filter(None, [config.data])]
    with allowing(typed), writing(folder), _opened(config) as clip:
        return _Evaluator(config, clip, folder, report or (lambda result: None)).run(chosen)


def _opened(config: EvaluationConfig) -> Any:
    return open_model(
        config.model,
        config.pretrained,
        trained=config.trained,
        checkpoint=config.checkpoint,
        weights=config.weights,
        precision=config.precision,
        device=config.device,
    )


class _Evaluator:
    def __init__(
        self, config: EvaluationConfig, clip: Clip, folder: str, report: Callable[[EvaluationResult], None]
    ) -> None:
        self._config, self._clip, self._folder, self._report = config, clip, folder, report
        self._results = Results(folder)
        self._results.require_model(clip.identity.weights)
        self._texts = TextEmbeddings(clip, storage.join(config.out, TEXT_EMBEDDINGS))
        self._model = _describe(clip, config.model)
        self._tried: set[str] = set()  # features of which what had failed was tried again by this command

    def run(self, chosen: list[ChosenSet]) -> Evaluation:
        done = Evaluation(self._folder)
        for one in chosen:
            try:
                for result in self._results_of(one, done):
                    done.results.append(result)
                    self._report(result)
            except SourceError as error:
                done.failed.append((one.name, error))
        if not done.results and not done.failed:
            raise _nothing_done(self._config, done)
        return done

    def _results_of(self, one: ChosenSet, done: Evaluation) -> Iterator[EvaluationResult]:
        test = self._open(one, "test")
        if test is None:
            assert one.definition is not None
            done.missing.append((one.definition, "test"))
            return
        job = _Job(one, test, _metric_of(one, test))
        if "zero-shot" in self._config.tasks:
            yield self._zero_shot(job)
        probes = [task for task in self._config.tasks if task != "zero-shot"]
        if not probes:
            return
        if test.captions is not None:
            if one.definition is None:  # of a suite, sets of captions have no probe
                what = f"{test.where} has captions, and {' and '.join(probes)} needs classes"
                raise SourceError(what, remedy="give --task zero-shot alone, which measures retrieval")
            return
        train = self._open(one, "train")
        if train is None:
            if one.definition is None:
                what = f"{test.where} has no training images for a probe"
                raise SourceError(what, remedy="put them below train/, as those of the test split are below test/")
            done.missing.append((one.definition, "train"))
            return
        if train.classnames != test.classnames:
            what = f"{train.where}: the classes of the training images are not those of the test images"
            raise SourceError(what, remedy="keep both splits in the same layout")
        if "linear-probe" in probes:
            yield self._probe(job, train, f"linear-probe/{self._label()}", np.arange(len(train.samples)), None)
        if "few-shot" in probes:
            for shots in self._config.shots:
                for seed in self._config.seeds:
                    rows = few_shot_rows(train.class_labels, shots, seed)
                    yield self._probe(job, train, f"few-shot-{shots}/{self._label()}/seed-{seed}", rows, seed)

    def _open(self, one: ChosenSet, split: str) -> ImageSet | None:
        if one.definition is None:
            return open_folder(one.folder) if split == "test" else find_folder(one.folder, split)
        assert self._config.data is not None
        return open_set(one.definition, self._config.data, split, storage.join(self._config.out, UNPACKED))

    def _label(self) -> str:
        """Which rule chose the hyperparameters, and by which solver."""
        rule = "elevater, test-selected" if self._config.selection == "elevater" else "honest"
        return rule if self._config.solver == "sgd" else f"{rule}, {self._config.solver}"

    def _features_of(self, one: ChosenSet, images: ImageSet) -> str:
        return storage.join(self._folder, f"{FEATURES}/{one.title}-{images.split}.zarr")

    def _features(self, one: ChosenSet, images: ImageSet) -> Features:
        path = self._features_of(one, images)
        retry = path not in self._tried  # once in a command, whatever number of protocols it has
        self._tried.add(path)
        found = compute_features(
            self._clip,
            images,
            path,
            squash=one.definition is not None and one.definition.resize == "squash",
            decoder=self._config.decoder,
            batch_size=self._config.batch_size,
            threads=self._config.threads,
            retry=retry,
        )
        if not found.readable.any():
            what = f"{images.where}: none of the {len(found):,} images has features{as_list(found.store)}"
            raise SourceError(what, remedy="mend the images, or the model where it gives NaN")
        return found

    def _zero_shot(self, job: _Job) -> EvaluationResult:
        if found := self._existing(job, "zero-shot", {}):
            return found
        began, images = time.monotonic(), job.test
        embedded = self._features(job.chosen, images)
        if images.captions is not None:
            texts_MD = self._texts.of_texts([text for texts in images.captions for text in texts])
            return self._add(job, "zero-shot", measure_retrieval(embedded, texts_MD, images), {}, embedded, began)
        classes_CD = self._texts.of_classes(images.classnames, images.prompts())
        scores_NC = probabilities(cosine_NC := cosines(embedded, classes_CD))
        ranked_NC = scores_NC if job.metric in ("roc_auc", "map_11_point") else cosine_NC
        if self._config.predictions:
            self._keep(job, "zero-shot", scores_NC, embedded)
        return self._add(job, "zero-shot", measure(ranked_NC, images, job.metric), {}, embedded, began)

    def _probe(
        self, job: _Job, train: ImageSet, protocol: str, rows: np.ndarray[Any, Any], seed: int | None
    ) -> EvaluationResult:
        settings: dict[str, object] = {"train": train.digest(), "seed": seed, "train_images": len(rows)}
        if found := self._existing(job, protocol, settings):
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
            heads_CD=self._texts.of_classes(train.classnames, train.prompts()),
            selection=self._config.selection,
            solver=self._config.solver,
            device=str(self._clip.device),
        )
        if self._config.predictions:
            self._keep(job, protocol, probed.scores_NC, test_features)
        measured = measure(probed.scores_NC, job.test, job.metric)
        notes = [f"training images: {note}" for note in train.notes]
        if lost := probed.settings["unreadable"]:
            notes.append(f"{lost} of {len(rows)} training images could not be read and are left out")
        return self._add(job, protocol, measured, {**settings, **probed.settings}, test_features, began, notes)

    def _kept(self, job: _Job, protocol: str) -> bool:
        """Whether predictions are there, or are not wanted."""
        path = Path(self._folder, PREDICTIONS, file_name(job.chosen.title, protocol) + PREDICTIONS_SUFFIX)
        return path.exists() or not self._config.predictions or job.test.captions is not None

    def _keep(self, job: _Job, protocol: str, scores_NC: np.ndarray[Any, Any], embedded: Features) -> None:
        path = storage.join(self._folder, f"{PREDICTIONS}/{file_name(job.chosen.title, protocol)}")
        write_predictions(path, scores_NC, job.test, embedded.failures())

    def _existing(self, job: _Job, protocol: str, settings: dict[str, object]) -> EvaluationResult | None:
        """The result that is there already, where it is wanted and of the same images, model and settings."""
        found = self._results.find(job.chosen.suite, job.test.name, protocol) if self._config.skip_existing else None
        said = {**settings, **self._settings(job)}
        if found is None or found.digests != _digests(job.test) or found.partial != job.test.partial:
            return None
        if found.model != self._model or not self._kept(job, protocol) or self._mended(job, found.unreadable):
            return None
        return found if all(found.settings.get(name) == value for name, value in said.items()) else None

    def _mended(self, job: _Job, unreadable: int) -> bool:
        """Whether some of the `unreadable` images of a result can be read since, or may be read now."""
        path = self._features_of(job.chosen, job.test)
        if not unreadable or not storage.exists(path):
            return False
        store = Store(path)
        return store.schema.rows - store.contents.good != unreadable or bool(to_retry(store, job.test, crashed=False))

    def _settings(self, job: _Job) -> dict[str, object]:
        squash = job.chosen.definition is not None and job.chosen.definition.resize == "squash"
        # Earlier intervals of recalls took the captions of an image as independent.
        intervals = {"intervals": "by image"} if job.test.captions is not None else {}
        return {
            **intervals,
            "decoder": self._config.decoder,
            "batch_size": self._config.batch_size,
            "preprocessing": to_plain(self._clip.identity.preprocessing),
            "resize": "squash" if squash else "model",
            "layout": job.test.layout,
        }

    def _add(
        self,
        job: _Job,
        protocol: str,
        measured: Measurement,
        settings: dict[str, object],
        embedded: Features,
        began: float,
        notes: Sequence[str] = (),
    ) -> EvaluationResult:
        definition, images = job.chosen.definition, job.test
        failures = embedded.failures()
        notes = [*images.notes, *_without_features(failures), *notes]
        result = EvaluationResult(
            set=images.name,
            suite=job.chosen.suite,
            protocol=protocol,
            metric=REPORTED[job.metric],
            metrics=measured.values,
            intervals=measured.intervals,
            images=len(images.samples),
            expected=definition.splits["test"] if definition else None,
            classes=len(images.classnames),
            unreadable=len(failures),
            partial=images.partial,
            model=self._model,
            digests=_digests(images),
            settings={**settings, **self._settings(job)},
            versions=versions(),
            device=str(self._clip.device),
            seconds=round(time.monotonic() - began, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=tuple(notes),
        )
        self._results.add(result)
        return result


@dataclass(frozen=True)
class _Job:
    chosen: ChosenSet
    test: ImageSet
    metric: Metric


def _without_features(failures: Sequence[Failure]) -> Iterator[str]:
    """What to note of images that count as wrong."""
    not_finite = [failure for failure in failures if failure.status == Status.NOT_FINITE.name]
    unread = [failure for failure in failures if failure.status != Status.NOT_FINITE.name]
    for what, those in (("could not be read", unread), ("have no finite features", not_finite)):
        if those:
            some = ", ".join(f"{f.key} ({f.reason})" for f in those[:3])
            yield f"{len(those)} images {what} and count as wrong: {some}"


def _metric_of(one: ChosenSet, images: ImageSet) -> Metric:
    if one.definition is not None:
        return one.definition.metric
    if images.captions is not None:
        return "recall"
    return "map_11_point" if images.class_labels.ndim == 2 else "accuracy"


def _digests(images: ImageSet) -> dict[str, str]:
    digests = {"images": images.digest()}
    if images.captions is None:
        digests |= {"classes": digest_of(images.classnames), "templates": digest_of(images.templates)}
    return digests


def _nothing_done(config: EvaluationConfig, done: Evaluation) -> SourceError:
    missing = [definition.name for definition, split in done.missing if split == "train"]
    remedy = "dimefm sets NAME says where to get them"
    if missing or not done.missing:
        lacks = f"{', '.join(missing)}: no training images" if missing else "sets of captions alone"
        return SourceError(f"{lacks} below {config.data}: nothing for {' and '.join(config.tasks)}", remedy=remedy)
    return SourceError(f"none of the sets is below {config.data}", remedy=remedy)


def _describe(clip: Clip, name: str) -> dict[str, object]:
    facts, model = clip.identity, clip.model
    return {
        "name": name,
        "pretrained": facts.pretrained,
        "weights": facts.weights,
        "text_tower": clip.text_digest(),
        "precision": facts.precision,
        "embed_dim": facts.embed_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_parameters": sum(p.numel() for p in model.visual.parameters()),
    }
