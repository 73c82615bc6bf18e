"""What `dimefm evaluate` prints: a line per result, the means of the suites, what is missing and where to get it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from cache_schemas.evaluation import RESULTS_FILE, EvaluationResult
from dimefm.evaluation.evaluate import Evaluation
from dimefm.evaluation.results import pool
from dimefm.evaluation.suite_means import measured_suites
from dimefm.system.inert_text import line
from dimefm.system.wording import counted, hanging

_OTHERS = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean of the classes", "roc_auc": "ROC AUC"}
METRIC_NAMES = {**_OTHERS, "map_11_point": "11-point mAP", "mean_recall@1": "recall@1"}
"""The metrics that are reported, for people."""
_RECALLS = "recall@1, @5, @10"
_EFFECTIVE = "effective robustness"


def result_text(result: EvaluationResult) -> str:
    """The set, the protocol and the reported metric with its interval; below, indented, the other metrics, what differs
    from the published set, and the notes. No line is longer than 80 characters, but for names that are."""
    low, high = result.interval
    head = f"{line(result.title):<18} {line(result.protocol):<12} "
    value = f"{METRIC_NAMES[result.metric]} {result.value:6.1%} [{low:.1%}, {high:.1%}]"
    others = [f"{_OTHERS[name]} {result.metrics[name]:.1%}" for name in _OTHERS if name in result.metrics]
    others = [text for text in others if not text.startswith(METRIC_NAMES[result.metric])]
    if result.metric == "mean_recall@1":
        ways = (("image to text", "text"), ("text to image", "image"))
        others = [f"{_RECALLS} from {name} {', '.join(_recalls(result, way))}" for name, way in ways]
    size = counted(result.images, "image") + (f", {counted(result.classes, 'class', 'classes')}" * bool(result.classes))
    partial = [f"partial: {', '.join(result.partial)}"] if result.partial else []
    below = ["; ".join([*others, size]), *map(line, (*partial, *result.notes))]
    first = head + value if len(head + value) <= 80 else f"{head.rstrip()}\n    {value}"
    return "\n".join([first, *(hanging("    ", text) for text in below)])


def _recalls(result: EvaluationResult, way: str) -> list[str]:
    return [f"{result.metrics[f'{way}_retrieval_recall@{k}']:.1%}" for k in (1, 5, 10)]


def summary_text(done: Evaluation) -> str:
    """What follows the lines of the results: means, missing sets and failures, and what the brackets mean."""
    lines = [hanging(f"{name:<23} ", text) for name, text in suite_means(done.results)]
    if any(name.startswith(_EFFECTIVE) for name, _ in suite_means(done.results)):
        words = "top-1 above that of models which were trained on ImageNet alone and have the same top-1 there"
        lines.append(hanging(f"{_EFFECTIVE}: ", words))
    for definition, split in done.missing:
        lines.append(hanging(f"{definition.name}: ", f"{split} images not found. Get it from {definition.get}"))
    lines += [f"{line(name)}: FAILED: {error}" for name, error in done.failed]
    if done.results:
        lines += ["[low, high] is the 95% interval", f"written: {_results_file(done)}"]
    return "\n".join(lines)


def as_document(done: Evaluation) -> dict[str, Any]:
    """The outcome for JSON: the results as results.jsonl has them, means, what is missing and what failed."""
    means = [
        {"suite": one.suite, "protocol": one.protocol, "value": one.mean, "interval": one.interval,
         "sets": len(one.sets), "total": one.total, "partial": one.partial}
        for one in measured_suites(pool(done.results))
    ]  # fmt: skip
    return {
        "results_file": _results_file(done),
        "results": [result.to_json() for result in done.results],
        "means": means,
        "effective_robustness": robustness(done.results),
        "missing": [{"set": one.name, "split": split, "get": one.get} for one, split in done.missing],
        "failed": [{"set": name, "what": error.what, "remedy": error.remedy} for name, error in done.failed],
    }


def _results_file(done: Evaluation) -> str:
    return f"{done.folder}/{RESULTS_FILE}"


def suite_means(results: Sequence[EvaluationResult]) -> list[tuple[str, str]]:
    """A name and a text for the mean of each suite under each protocol, and for effective robustness."""
    found = []
    for one in measured_suites(pool(results)):
        low, high = one.interval
        text = f"{one.mean:6.1%} [{low:.1%}, {high:.1%}]  mean of {len(one.sets)} of {one.total} sets"
        found.append((f"{one.suite} {one.protocol}", text + (f", {one.partial} partial" if one.partial else "")))
    partial_sets = {r.title for r in results if r.partial and r.protocol == "zero-shot"}
    measured = robustness(results)
    for name, value in measured.items():
        used = partial_sets & {"imagenet1k", *(measured if name == "mean" else [name])}
        note = f", of a part of {', '.join(sorted(used))}" if used else ""
        if name == "mean" and used:
            note = ", of partial sets"
        found.append((f"{_EFFECTIVE}, {name}", f"{round(100 * value, 1) + 0.0:+5.1f} points{note}"))
    return found


def robustness(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """Effective robustness per shift: zero-shot top-1 above that expected of models trained on ImageNet alone with the
    same ImageNet top-1. It needs the result of imagenet1k. Their mean is added if all shifts were measured."""
    top1 = {r.title: r.metrics["top1"] for r in results if r.protocol == "zero-shot" and "top1" in r.metrics}
    if "imagenet1k" not in top1:
        return {}
    from dimefm.evaluation.metrics import effective_robustness  # imports torch and scipy

    text = (resources.files("dimefm.evaluation") / "baseline.json").read_text(encoding="utf-8")
    lines: dict[str, dict[str, float]] = json.loads(text)["fit"]
    found = {
        name: effective_robustness(top1[name], top1["imagenet1k"], line["slope"], line["intercept"])
        for name, line in lines.items()
        if name in top1
    }
    return found | {"mean": sum(found.values()) / len(found)} if len(found) == len(lines) else found
