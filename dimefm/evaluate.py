"""Zero-shot evaluation of any CLIP: a teacher by name, an exported folder, or a run folder of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schemas.run import RUN_FILE
from dimefm import storage
from dimefm.clip import Clip, Precision, load_clip
from dimefm.export import CONFIG_FILE, export
from dimefm.labelled import LabelledSet, open_sets
from dimefm.preprocess import Preprocess
from dimefm.zeroshot import ZeroShot, class_embeddings, zero_shot


def evaluate(
    model: str,
    sets: list[str],
    *,
    pretrained: str | None = None,
    checkpoint: str = "last",
    weights: str = "model",
    precision: Precision = "fp32",
    device: str | None = None,
) -> dict[str, ZeroShot]:
    """Zero-shot accuracy on each labelled set, by name. Class embeddings: the mean over the set's templates.

    `model` is a run folder (its `checkpoint` and `weights` as for `dimefm.export.export`), an open_clip folder, or an
    open_clip name with its `pretrained` tag. Raises a DimefmError for a model or set that cannot be read.
    """
    opened = open_sets(tuple(sets))
    with open_model(model, pretrained, checkpoint, precision, device, weights) as clip:
        return {labelled.name: _evaluate_one(clip, labelled) for labelled in opened}


def _evaluate_one(clip: Clip, labelled: LabelledSet) -> ZeroShot:
    classes_CD = class_embeddings(labelled.prompts(), clip.encode_texts)
    return zero_shot(labelled, classes_CD, clip.encode_images, Preprocess(clip.identity.preprocessing))


@contextmanager
def open_model(
    model: str,
    pretrained: str | None,
    checkpoint: str,
    precision: Precision,
    device: str | None,
    weights: str = "model",
) -> Iterator[Clip]:
    """The model that `model` names; see `evaluate`."""
    folder = Path(model)
    if (folder / RUN_FILE).exists():
        with tempfile.TemporaryDirectory() as temporary:
            exported = export(model, f"{temporary}/student", checkpoint=checkpoint, weights=weights)
            yield load_clip(f"local-dir:{exported}", precision=precision, device=device)
        return
    name = f"local-dir:{model}" if (folder / CONFIG_FILE).exists() else model
    yield load_clip(name, pretrained, precision=precision, device=device)


def write_results(path: str, model: str, results: dict[str, ZeroShot]) -> None:
    """Results as JSON, with the prediction of every image in the order of its set."""
    sets: dict[str, Any] = {name: asdict(result) for name, result in results.items()}
    storage.write_json(path, {"model": model, "protocol": "zero-shot", "sets": sets})
