"""The results that a model card shows: those of an evaluation of exactly these weights, kept beside the card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cache_schemas.evaluation import OWN, RESULTS_FILE, EvaluationResult
from cache_schemas.export import Export
from dimefm.errors import MismatchError
from dimefm.evaluation.results import Pooled, pool, read_results
from dimefm.evaluation.summary import METRIC_NAMES
from dimefm.export.card_words import code, points, words
from dimefm.export.origin import public
from dimefm.system import storage
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import counted

_PATH = re.compile(r"(?<![\w.)\]-])(~?/|\w+://|[A-Za-z]:\\)")


def add_results(folder: Path, document: Export, evaluations: Sequence[str]) -> list[EvaluationResult]:
    """The results in `folder`, after those of `evaluations` were added to its results.jsonl, which holds no path of
    this machine. Raises MismatchError for a result of other weights; nothing is written then."""
    path = folder / RESULTS_FILE
    found = {}
    for place in [*([str(folder)] if path.exists() else []), *evaluations]:
        for result in read_results(place):
            _require_weights(result, document, place)
            found[result.key] = _public(result, document)
    if evaluations:
        lines = [json.dumps(result.to_json(), sort_keys=True, allow_nan=False) + "\n" for result in found.values()]
        with storage.writing_to(str(path)):
            storage.write_atomic(str(path), "".join(lines).encode())
    return list(found.values())


def results_section(document: Export, results: Sequence[EvaluationResult]) -> list[str]:
    """The lines of the section: a row for each set and protocol, then what a reader of the numbers must know."""
    if not results:
        return ["## Results", "", "None has been measured with dimefm yet."]
    metrics = {(result.title, result.protocol.partition("/seed-")[0]): result.metric for result in results}
    images = {result.title: result.images for result in results}
    rows = [["set", "protocol", "metric", "value (%)", "95 % interval", "images"]]
    for one in pool(results):
        metric, deviation = metrics[one.title, one.protocol], one.deviation
        value = points(one.value) + (f" (standard deviation over seeds {points(deviation)})" if deviation else "")
        interval = f"{points(one.interval[0])} to {points(one.interval[1])}"
        rows.append(
            [
                _title(one),
                words(one.protocol),
                words(METRIC_NAMES.get(metric, metric)),
                value,
                interval,
                f"{images[one.title]:,}",
            ]
        )
    about = f"Measured with dimefm on exactly these weights (sha256 {code(document.model.weights[:16])}); "
    about += f"[{RESULTS_FILE}]({RESULTS_FILE}) has every number, and the digests of images, classes and prompts."
    notes = [note for result in results for note in _notes(result)]
    return ["## Results", "", *markdown_table(rows, "lllrrr"), "", about, "", *dict.fromkeys(notes)]


def _title(one: EvaluationResult | Pooled) -> str:
    """A set of dimefm's by its name; a user's own without the prefix that tells it from one of these."""
    return f"{code(one.title.removeprefix(f'{OWN}-'))} (own set)" if one.suite == OWN else code(one.title)


def _notes(result: EvaluationResult) -> list[str]:
    head = f"- {_title(result)}, {words(result.protocol.partition('/seed-')[0])}: "
    notes = [f"partial: {one}" for one in result.partial]
    if result.unreadable:
        notes.append(f"{counted(result.unreadable, 'image')} without features, counted as wrong")
    if (decoder := result.settings.get("decoder")) not in (None, "pillow"):
        notes.append(f"images decoded by {decoder}, not exactly as open_clip does")
    return [head + words(note) for note in (*notes, *result.notes)]


def _require_weights(result: EvaluationResult, document: Export, place: str) -> None:
    found, expected = str(result.model.get("weights")), document.model.weights
    if found != expected:
        what = f"{place} has results of other weights ({found[:12]}...) than the model ({expected[:12]}...)"
        remedy = "measure the folder itself: dimefm evaluate FOLDER SET..., and give what that writes"
        raise MismatchError(what, remedy=remedy)


def _public(result: EvaluationResult, document: Export) -> EvaluationResult:
    """The result as it may be published: the model by the name of its folder, and no paths."""
    return replace(
        result,
        model={**result.model, "name": document.model.name, "pretrained": None},
        partial=tuple(map(_without_paths, result.partial)),
        notes=tuple(map(_without_paths, result.notes)),
        settings=public(result.settings),
    )


def _without_paths(note: str) -> str:
    """The words up to the first path: where that ends nobody can tell, since it may have spaces."""
    found = _PATH.search(note)
    return f"{note[: found.start()].rstrip()} ..." if found else note
