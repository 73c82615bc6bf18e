"""The submission file of the ELEVATER leaderboard: one zipped JSON with the class probabilities of every set.

Its format is described in the toolkit's submission_file_readme.md: {"data": [{"model_name", "dataset_name",
"num_trainable_params", "num_params", "num_visual_params", "num_backbone_params", "n_shot", "rnd_seeds",
"predictions"}]}, where predictions have the shape (seeds, test images, classes) and six digits. The file in the zip is
all_predictions.json. Classes are in the leaderboard's order. Images are in the order of your copy of the set, unless
lists of images give the leaderboard's.

Shapes: N images, C classes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cache_schemas import digest_of
from cache_schemas.evaluation import PREDICTIONS, EvaluationResult
from dimefm.datasets.definitions import class_names, load_definitions
from dimefm.errors import StoreError
from dimefm.evaluation.predictions import PREDICTIONS_SUFFIX, file_name, read_keys, read_scores
from dimefm.evaluation.results import read_results
from dimefm.system import storage

_INSIDE = "all_predictions.json"
_LABEL = re.compile(r"\s+[\d,]+\s*$")


def write_submission(
    folder: str, out: str, protocol: str = "zero-shot", order: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Write the zip with the results that `folder` (written by `dimefm evaluate ... --predictions`) has under
    `protocol`: ``zero-shot``, ``linear-probe/honest``, ``few-shot-5/honest`` with all its seeds, ... Return the sets in
    it, each with what differs from the published set. An image that could not be read gets equal probabilities.

    `order` is a folder with the toolkit's lists of test images, DATASET_NAME.txt, one line per image: a path, perhaps
    after ARCHIVE@, and perhaps followed by a label. Raises StoreError if there is no result, if predictions were not
    kept, or if a list does not name the images of the set.
    """
    chosen = _by_set(read_results(folder), protocol)
    if not chosen:
        remedy = "dimefm evaluate --suite elevater --predictions writes some"
        raise StoreError(f"{folder} has no result of an ELEVATER set under {protocol}", remedy=remedy)
    heads = sum(_head_parameters(results[0]) for results in chosen.values()) // len(chosen)
    entries = {name: _entry(folder, results, order, heads) for name, results in chosen.items()}
    with (
        storage.writing_to(out),
        storage.writing_atomically(storage.absolute(out)) as sink,
        zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(_INSIDE, "w") as file,
    ):
        for part in _json(entries.values()):
            file.write(part.encode())
    return {name: results[0].partial for name, results in chosen.items()}


def _by_set(results: list[EvaluationResult], protocol: str) -> dict[str, list[EvaluationResult]]:
    """The results of each set by ELEVATER's name for it: one, or one per seed."""
    known = load_definitions()
    found: dict[str, list[EvaluationResult]] = {}
    for result in results:
        name = known[result.set].elevater if result.suite == "elevater" else None
        if name and result.protocol.partition("/seed-")[0] == protocol:
            found.setdefault(name, []).append(result)
    return dict(sorted(found.items()))


def _head_parameters(result: EvaluationResult) -> int:
    """The number of parameters of a linear classifier for a set."""
    return (int(str(result.model["embed_dim"])) + 1) * result.classes


def _entry(
    folder: str, results: list[EvaluationResult], order: str | None, heads: int
) -> tuple[dict[str, object], list[np.ndarray[Any, Any]]]:
    """The entry of a set without its predictions, and its scores for each seed. `heads` is the mean, over all sets, of
    the parameters of a linear classifier."""
    first = results[0]
    model, protocol = first.model, first.protocol
    shots = 0 if protocol == "zero-shot" else -1
    if protocol.startswith("few-shot-"):
        shots = int(protocol.removeprefix("few-shot-").partition("/")[0])
    definition = load_definitions()[first.set]
    if first.digests["classes"] != digest_of(class_names(definition)):
        what = f"{folder}: {first.set} was measured with other class names than the leaderboard's"
        raise StoreError(what, remedy="evaluate a copy of the set whose classes are the definition's")
    columns = list(definition.elevater_columns) or list(range(first.classes))
    facts: dict[str, object] = {
        "model_name": Path(folder).name,
        "dataset_name": definition.elevater,
        "num_trainable_params": _head_parameters(first) if shots else 0,
        "num_params": int(str(model["parameters"])) + (heads if shots else 0),
        "num_visual_params": model["image_parameters"],
        "num_backbone_params": model["parameters"],
        "n_shot": shots,
        "rnd_seeds": [result.settings.get("seed") or 0 for result in results],
    }
    scores = []
    for result in results:
        path = Path(folder, PREDICTIONS, file_name(result.title, result.protocol) + PREDICTIONS_SUFFIX)
        if not path.exists():
            remedy = "run the same dimefm evaluate again with --predictions"
            raise StoreError(f"{path} does not exist: predictions were not kept", remedy=remedy)
        rows = _rows(order, str(definition.elevater), str(path))
        scores_NC = read_scores(str(path))[rows][:, columns]
        scores_NC[~scores_NC.any(axis=1)] = 1 / first.classes
        scores.append(scores_NC)
    return facts, scores


def _rows(order: str | None, name: str, predictions: str) -> Any:
    """The rows of a file of predictions, in the leaderboard's order."""
    if order is None:
        return slice(None)
    path = Path(order, f"{name}.txt")
    if not path.exists():
        raise StoreError(f"{path} does not exist", remedy="leave --order out, or put the list of test images there")
    listed = path.read_text(encoding="utf-8").splitlines()
    lines = [_LABEL.sub("", line.split("@")[-1]) for line in listed if line.strip()]
    keys = read_keys(predictions)
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key.rpartition("/")[2], []).append(place)
    found = [_match(line.rpartition(".")[0] or line, keys, places) for line in lines]
    if None in found or len(found) != len(keys) or len(set(found)) != len(keys):
        unmatched = [line for line, row in zip(lines, found, strict=True) if row is None]
        which = next(iter(unmatched or lines), "none")
        what = f"{path} does not name the {len(keys):,} images of {predictions}, such as {which}"
        raise StoreError(what, remedy="evaluate the copy of the set that the list describes")
    return np.array(found)


def _match(line: str, keys: list[str], places: dict[str, list[int]]) -> int | None:
    """The place of the image whose key ends as the line does; None if there is none, or several."""
    candidates = places.get(line.rpartition("/")[2], [])
    if len(candidates) > 1:
        candidates = [p for p in candidates if f"/{line}".endswith(f"/{keys[p]}") or f"/{keys[p]}".endswith(f"/{line}")]
    return candidates[0] if len(candidates) == 1 else None


def _json(entries: Any) -> Iterator[str]:
    """The document, one row of probabilities at a time: as a whole it may be larger than memory."""
    yield '{"data": ['
    for place, (facts, scores) in enumerate(entries):
        yield (", " if place else "") + json.dumps(facts)[:-1] + ', "predictions": ['
        for number, scores_NC in enumerate(scores):
            yield (", " if number else "") + "["
            for row, values in enumerate(scores_NC.tolist()):
                yield (", " if row else "") + "[" + ", ".join(f"{value:.6g}" for value in values) + "]"
            yield "]"
        yield "]}"
    yield "]}"
