"""Results on disk: write one for each measurement, and find the earlier one that still holds (`--skip-existing`).

Shapes: N images, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas import Failure, Status, digest_of, to_plain
from cache_schemas.evaluation import FEATURES, PREDICTIONS, EvaluationResult, Metric
from dimefm.datasets.image_set import ImageSet
from dimefm.evaluation.config import ChosenSet, EvaluationConfig
from dimefm.evaluation.features import Features, to_retry
from dimefm.evaluation.predictions import PREDICTIONS_SUFFIX, file_name, write_predictions
from dimefm.evaluation.results import Results
from dimefm.evaluation.scoring import REPORTED, Measurement
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.versions import versions


@dataclass(frozen=True)
class Job:
    """A set that was asked for, its test images, and the metric that is reported for it."""

    chosen: ChosenSet
    test: ImageSet
    metric: Metric


class Recorder:
    """Results of one model in its folder of an evaluation."""

    def __init__(self, config: EvaluationConfig, clip: Clip, folder: str, leaks: str | None = None) -> None:
        """`leaks` is the digest of the leaks without which is measured, too. Raises MismatchError if the folder has
        results of other weights."""
        self._config, self._clip, self._folder, self._leaks = config, clip, folder, leaks
        self._results = Results(folder)
        self._results.require_model(clip.identity.weights)
        self._model = _describe(clip, config.model)

    def features_path(self, chosen: ChosenSet, images: ImageSet) -> str:
        """Where the features of these images are kept."""
        return storage.join(self._folder, f"{FEATURES}/{chosen.title}-{images.split}.zarr")

    def find(self, job: Job, protocol: str, settings: dict[str, object]) -> EvaluationResult | None:
        """The earlier result if --skip-existing was given and it still holds: it is of the same images, model and
        settings, its predictions are on disk if they are asked for, and none of its unreadable images can be read now.
        """
        if not self._config.skip_existing:
            return None
        found = self._results.find(job.chosen.suite, job.test.name, protocol)
        if found is None or found.digests != _digests(job.test) or found.partial != job.test.partial:
            return None
        wanted = {**settings, **self._settings(job)}
        if found.model != self._model or any(found.settings.get(name) != value for name, value in wanted.items()):
            return None
        if self._lacks_predictions(job, protocol) or self._may_read_more(job, found.unreadable):
            return None
        return found

    def keep_predictions(self, job: Job, protocol: str, scores_NC: np.ndarray[Any, Any], embedded: Features) -> None:
        """Write the prediction for every image, if predictions are asked for."""
        if self._config.predictions:
            path = storage.join(self._folder, f"{PREDICTIONS}/{file_name(job.chosen.title, protocol)}")
            write_predictions(path, scores_NC, job.test, embedded.failures())

    def add(
        self,
        job: Job,
        protocol: str,
        measurement: Measurement,
        settings: dict[str, object],
        embedded: Features,
        began: float,
        notes: Sequence[str] = (),
    ) -> EvaluationResult:
        """Write and return the result of a measurement that `began` at this time.monotonic()."""
        definition, images = job.chosen.definition, job.test
        failures = embedded.failures()
        result = EvaluationResult(
            set=images.name,
            suite=job.chosen.suite,
            protocol=protocol,
            metric=REPORTED[job.metric],
            metrics=measurement.values,
            intervals=measurement.intervals,
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
            notes=(*images.notes, *_failure_notes(failures), *notes),
        )
        self._results.add(result)
        return result

    def _lacks_predictions(self, job: Job, protocol: str) -> bool:
        """Whether predictions are asked for and not on disk; a set of captions has none."""
        path = Path(self._folder, PREDICTIONS, file_name(job.chosen.title, protocol) + PREDICTIONS_SUFFIX)
        return self._config.predictions and job.test.captions is None and not path.exists()

    def _may_read_more(self, job: Job, unreadable: int) -> bool:
        """Whether some of the `unreadable` images of a result were read since, or may be readable now."""
        path = self.features_path(job.chosen, job.test)
        if not unreadable or not storage.exists(path):
            return False
        store = Store(path)
        return store.schema.rows - store.contents.good != unreadable or bool(to_retry(store, job.test, crashed=False))

    def _settings(self, job: Job) -> dict[str, object]:
        """What else decides the numbers of a result."""
        # Earlier versions took the captions of an image as independent in the intervals of recalls.
        intervals = {"intervals": "by image"} if job.test.captions is not None else {}
        return {
            **intervals,
            **({"leaks": self._leaks} if self._leaks else {}),
            "decoder": self._config.decoder,
            "batch_size": self._config.batch_size,
            "preprocessing": to_plain(self._clip.identity.preprocessing),
            "resize": "squash" if job.chosen.squash else "model",
            "layout": job.test.layout,
        }


def _failure_notes(failures: Sequence[Failure]) -> Iterator[str]:
    """A note for each kind of image that counts as wrong because it has no features."""
    not_finite = [failure for failure in failures if failure.status == Status.NOT_FINITE.name]
    unread = [failure for failure in failures if failure.status != Status.NOT_FINITE.name]
    for what, those in (("could not be read", unread), ("have no finite features", not_finite)):
        if those:
            some = ", ".join(f"{f.key} ({f.reason})" for f in those[:3])
            yield f"{len(those)} images {what} and count as wrong: {some}"


def _digests(images: ImageSet) -> dict[str, str]:
    digests = {"images": images.digest()}
    if images.captions is None:
        digests |= {"classes": digest_of(images.classnames), "templates": digest_of(images.templates)}
    return digests


def _describe(clip: Clip, name: str) -> dict[str, object]:
    """The facts about the model that a result records."""
    identity, (parameters, image_parameters) = clip.identity, clip.parameter_counts()
    return {
        "name": name,
        "pretrained": identity.pretrained,
        "weights": identity.weights,
        "text_tower": clip.text_digest(),
        "precision": identity.precision,
        "embed_dim": identity.embed_dim,
        "parameters": parameters,
        "image_parameters": image_parameters,
    }
