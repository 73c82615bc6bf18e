"""The metadata at the head of a model card, which the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cache_schemas.evaluation import EvaluationResult
from cache_schemas.export import Export, ExportFormat
from dimefm.evaluation.results import pool
from dimefm.evaluation.summary import METRIC_NAMES
from dimefm.export.card_words import repository
from dimefm.system.inert_text import line

RESULTS = "model-index"
"""The key of the results: written anew each time, while a user's own values of all other keys stay."""

_LIBRARIES: dict[ExportFormat, str] = {"open_clip": "open_clip", "onnx": "onnx", "transformers": "transformers"}
_TYPES = {"top1": "accuracy", "mean_per_class": "mean_per_class_accuracy", "mean_recall@1": "recall"}
"""The type of a metric on the Hub, where it is not the name that dimefm has for it."""


def metadata(document: Export, results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """What the Hub is told, in the order of the card."""
    origin = document.origin
    tags = ["clip", "dimefm", *(["knowledge-distillation"] if origin else [])]
    tags += ["onnx"] if document.format == "onnx" else []
    found: dict[str, Any] = {
        "library_name": _LIBRARIES[document.format],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": tags,
    }
    if name := repository(origin):
        found["base_model"] = name
    if results:
        found[RESULTS] = _model_index(document, results)
    return found


def _model_index(document: Export, results: Sequence[EvaluationResult]) -> Any:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    metrics = {(result.title, result.protocol.partition("/seed-")[0]): result.metric for result in results}
    listed = []
    for one in pool(results):
        metric = metrics[one.title, one.protocol]
        name = f"{line(METRIC_NAMES.get(metric, metric))}, 95 % interval {one.interval[0]:.4f} to {one.interval[1]:.4f}"
        listed.append(
            EvalResult(
                task_type=_task(one.protocol, metric),
                dataset_type=re.sub(r"[^\w.-]+", "-", one.title, flags=re.ASCII).strip("-.") or "own",
                dataset_name=line(one.title) or "(no name)",
                dataset_config=line(one.protocol),
                dataset_split="test",
                metric_type=_TYPES.get(metric, line(metric)),
                metric_name=name,
                metric_value=one.value,
            )
        )
    return eval_results_to_model_index(line(document.model.name), listed)


def _task(protocol: str, metric: str) -> str:
    if metric == "mean_recall@1":
        return "image-text-retrieval"
    return "zero-shot-image-classification" if protocol == "zero-shot" else "image-classification"
