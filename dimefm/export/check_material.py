"""What an exported model is checked on: real images and sentences, and labelled sets.

They come from --check-on; else from what the run was trained and validated on; else, for a model that no run made, from
the shipped sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas import SchemaError, Status
from cache_schemas.run import RUN_FILE
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folders
from dimefm.errors import DimefmError, SourceError
from dimefm.export.config import ExportConfig
from dimefm.images.decode import DecodeError
from dimefm.sample import sample_dir
from dimefm.sources.read_image import ImagePlace, read_image
from dimefm.store.embedding_store import Store
from dimefm.store.joined_store import open_images
from dimefm.system import storage
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.training.config import TrainConfig
from dimefm.training.run_folder import read_run

IMAGES, TEXTS = 64, 128
_MOST_IMAGES, _MOST_PROMPTS = 2000, 4000  # of each --val set; a set of --check-on is measured as a whole
_FEW_IMAGES, _FEW_PROMPTS = 200, 400  # of each set of the sample
_REMEDY = "give --check-on SET, a folder with labelled images to check the exported model on"


@dataclass(frozen=True)
class Material:
    """Encoded images, sentences, and labelled sets, which may be none."""

    images: tuple[bytes, ...]
    texts: tuple[str, ...]
    labelled: tuple[ImageSet, ...]


def find_material(config: ExportConfig) -> Material:
    """The material for the check of an export. It is the same whenever it is asked for. Raises a DimefmError, which
    names --check-on, where it cannot be read any more, and where `int8` has no labelled set."""
    run = (Path(config.source) / RUN_FILE).exists()
    if config.check_on:
        with allowing(config.check_on):
            found = _of_sets(open_folders(config.check_on))
    elif run:
        found = _of_run(config.source)
    else:
        note("checking on the shipped sample; --check-on SET checks on a labelled set of yours")
        folders = sorted(path for path in (sample_dir() / "eval").iterdir() if path.is_dir())
        sets = open_folders(tuple(map(str, folders)))
        found = _of_sets([_part(images, _FEW_IMAGES, _FEW_PROMPTS) for images in sets])
    if config.int8 and not found.labelled:
        what = f"--int8 measures the loss in top-1 accuracy, and {config.source} has no --val set"
        raise DimefmError(what, remedy=_REMEDY)
    if not found.labelled:
        note("top-1 accuracy is not compared, since the run has no --val set; --check-on SET compares it")
    return found


def _of_sets(sets: Sequence[ImageSet]) -> Material:
    for images in sets:
        if images.labels is None or images.labels.ndim == 2:
            what = f"{images.where} does not have one label per image"
            raise SourceError(what, remedy="check on a set that has")
    samples = [sample for images in sets for sample in images.samples]
    texts = [text for images in sets for prompts in images.prompts() for text in prompts]
    read = (read_image(samples[place]) for place in spread(len(samples), IMAGES))
    found = tuple(data for data in read if not isinstance(data, DecodeError))
    if not found:
        raise SourceError(f"no image of {', '.join(images.where for images in sets)} can be read", remedy=_REMEDY)
    return Material(found, tuple(texts[place] for place in spread(len(texts), TEXTS)), tuple(sets))


def _of_run(run: str) -> Material:
    document = read_run(run)
    config = TrainConfig.parse(document.config, run)
    try:
        encoded = _images_of(_images(run, config), IMAGES)
        texts = config.texts or config.val_texts
        if texts is None:
            raise SourceError("it was trained without sentences")
        sentences = _texts_of(Store(_place(run, texts)))
        val = tuple(_place(run, path) for path in config.val)
        with allowing(val):
            labelled = [_part(one, _MOST_IMAGES, _MOST_PROMPTS) for one in open_folders(val)]
    except (DimefmError, SchemaError, OSError) as error:
        reason = error.what if isinstance(error, DimefmError) else error
        what = f"{run}: the images and sentences that it was trained on cannot be read now: {reason}"
        raise DimefmError(what, remedy=_REMEDY) from error
    return Material(encoded, sentences, tuple(labelled))


def _place(run: str, path: str) -> str:
    """A path of a run's config: as it was typed, or in the nearest folder around the run that has it. The folder that
    the command was typed in is not recorded."""
    around = [Path(), *Path(run).resolve().parents]
    return path if storage.is_url(path) else next((str(one / path) for one in around if (one / path).exists()), path)


def images_of_run(run: str, count: int) -> tuple[bytes, ...]:
    """At most `count` of the encoded images that a run was trained on. Raises as reading its store does."""
    config = TrainConfig.parse(read_run(run).config, run)
    return _images_of(_images(run, config), count)


def _images(run: str, config: TrainConfig) -> Store:
    return open_images("::".join(_place(run, path) for path in config.images.split("::")))


def _images_of(store: Store, count: int) -> tuple[bytes, ...]:
    rows = _good_rows(store, count)
    if store.schema.pixels:
        return tuple(store.pixels(rows))
    entries = store.samples(rows, ImagePlace._fields)
    places = [ImagePlace(**{name: entry[name] for name in ImagePlace._fields}) for entry in entries]
    read = [read_image(place) if place.file else b"" for place in places]
    found = tuple(data for data in read if data and not isinstance(data, DecodeError))
    if not found:
        reason = next((str(data) for data in read if isinstance(data, DecodeError)), "they were imported without them")
        raise SourceError(f"{store.path}: {reason}")
    return found


def _texts_of(store: Store) -> tuple[str, ...]:
    return tuple(one["text"] for one in store.samples(_good_rows(store, TEXTS), ("text",)))


def _good_rows(store: Store, count: int) -> np.ndarray[Any, Any]:
    good_N = np.flatnonzero(store.status() == Status.OK)
    rows_N: np.ndarray[Any, Any] = good_N[spread(len(good_N), count)]
    return rows_N


def _part(images: ImageSet, most: int, most_prompts: int) -> ImageSet:
    """At most so many images of a set, and so many of its prompts, of every class alike."""
    places = spread(len(images.samples), most)
    templates = images.templates[: max(1, most_prompts // max(1, len(images.classnames)))]
    labels = None if images.labels is None else images.labels[places]
    return replace(images, samples=[images.samples[place] for place in places], labels=labels, templates=templates)


def spread(total: int, count: int) -> np.ndarray[Any, Any]:
    """At most `count` of `total` places, int64, at equal distances."""
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)
