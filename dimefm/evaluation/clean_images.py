"""`evaluate --leaks`: the accuracy on the test images that no training image is a copy of, beside that on all.

Shapes: N test images, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_schemas.evaluation import Metric
from cache_schemas.export import EXPORT_FILE
from cache_schemas.leaks import Leaks
from cache_schemas.run import RUN_FILE
from dimefm.datasets.image_set import ImageSet
from dimefm.errors import MismatchError, SourceError
from dimefm.models.exported import format_of, read_export
from dimefm.store.leaked_rows import read_leaks, read_pairs
from dimefm.store.selected_images import SelectedImages
from dimefm.system.wording import counted
from dimefm.training.run_folder import read_run

if TYPE_CHECKING:
    from dimefm.evaluation.scoring import Measurement

CLEAN = "clean_"
"""How metrics on clean images begin."""


class CleanImages:
    """What `dimefm leaks` found in test sets, as far as a model was trained on it."""

    def __init__(self, path: str, model: str) -> None:
        """Read the folder `path`. Raises StoreError where it is none of `leaks`, MismatchError if `model` was trained
        on other images than those that were looked at, or on a selection of them that is no longer there."""
        self._document = read_leaks(path)
        self._where = _require_trained_on(self._document, path, model)
        found = read_pairs(path, self._document)
        self._leaks = found.filter(found["leak"])
        if (rows := _selected(model)) is not None:
            self._leaks = self._leaks.filter(pc.is_in(self._leaks["row"], pa.array(rows)))

    @property
    def digest(self) -> str:
        """That of the pairs, for the settings of a result."""
        return self._document.digest

    def add(
        self, measurement: Measurement, scores_NC: np.ndarray[Any, Any] | None, images: ImageSet, metric: Metric
    ) -> tuple[Measurement, list[str]]:
        """The measurement with the metrics on clean images, and what to say of them; without `scores_NC`, as for
        retrieval, only what there is to say."""
        from dimefm.evaluation.scoring import Measurement, measure  # imports torch

        known = next((one for one in self._document.sets if one.digest == images.digest()), None)
        if known is None:
            return measurement, [f"dimefm leaks did not look at these images of {images.name}"]
        rows = self._leaks.filter(pc.equal(self._leaks["set"], known.title))["test_row"].to_numpy()
        rows = np.unique(rows)
        said = f"{len(rows):,} of {counted(len(images.samples), 'image')} stand in {self._where}"
        if scores_NC is None or not len(rows):
            return measurement, [said]
        clean = np.setdiff1d(np.arange(len(images.samples)), rows)
        try:
            part = replace(images, samples=[images.samples[row] for row in clean], labels=images.class_labels[clean])
            found = measure(scores_NC[clean], part, metric) if len(clean) else None
        except SourceError as error:  # the metric is not defined on what is left
            return measurement, [f"{said}; on the others nothing can be measured: {error.what}"]
        if found is None:
            return measurement, [f"{said}: none is left to be measured on"]
        name = next(iter(found.values))
        said += f"; {name} on the other {len(clean):,}: {found.values[name]:.1%}, on all {measurement.values[name]:.1%}"
        values = {f"{CLEAN}{key}": value for key, value in found.values.items()}
        intervals = {f"{CLEAN}{key}": value for key, value in found.intervals.items()}
        return Measurement(measurement.values | values, measurement.intervals | intervals), [said]


def _require_trained_on(document: Leaks, path: str, model: str) -> str:
    """What the leaks are looked for in, in words. Raises MismatchError if the model says that it was trained on other
    images."""
    known, where = set[str | None](), "the images that it was trained on"
    if Path(model, RUN_FILE).exists():
        run = read_run(model)
        known = {run.images_data, *(one.images_data for one in run.more_teachers)}
    elif format_of(model) and Path(model, EXPORT_FILE).exists() and (origin := read_export(model).origin):
        known = {one.digest for one in origin.sources if one.kind == "image"}
        if origin.config.get("image_selection"):
            where = "the store of which it was trained on a selection"
    if not known or None in known:
        return f"the image store {Path(document.store).name}"
    if document.store_data not in known:
        what = f"{path} is about {document.store}, and {model} was trained on other images"
        raise MismatchError(what, remedy="run dimefm leaks over the image store of this run")
    return where


def _selected(model: str) -> np.ndarray[Any, Any] | None:
    """The rows that a run was trained on, None for all. Raises MismatchError where its selection is another one now,
    StoreError where it is not there."""
    if not Path(model, RUN_FILE).exists() or (digest := read_run(model).image_selection_digest) is None:
        return None
    selection = SelectedImages(str(read_run(model).config["image_selection"]))
    if selection.document.digest != digest:
        what = f"{selection.path} is another selection than the one that {model} was trained on"
        raise MismatchError(what, remedy="evaluate without --leaks, or select as before")
    return selection.rows()
