"""What `dimefm evaluate` prints: a line per result, the means of the suites, what is missing and where to get it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from cache_schemas.evaluation import EvaluationResult
from dimefm.evaluation import metrics
from dimefm.evaluation.evaluate import Evaluation
from dimefm.evaluation.results import pool
from dimefm.evaluation.suite_means import measured_suites
from dimefm.system.inert_text import line

_OTHERS = {"top1": "top-1", "top5": "top-5", "mean_per_class": "per class", "roc_auc": "ROC AUC"}
_NAMES = {**_OTHERS, "map_11_point": "11-point mAP", "mean_recall@1": "R@1"}


def result_line(result: EvaluationResult) -> str:
    """The set, the protocol, the reported metric with its interval, the other metrics, and what differs from the
    published set."""
    low, high = result.interval
    value = f"{_NAMES[result.metric]} {result.value:6.1%} [{low:.1%}, {high:.1%}]"
    others = [f"{_NAMES[name]} {result.metrics[name]:.1%}" for name in _OTHERS if name in result.metrics]
    others = [text for text in others if not text.startswith(_NAMES[result.metric])]
    if result.metric == "mean_recall@1":
        ways = (("image to text", "text"), ("text to image", "image"))
        others = [f"{name} {'/'.join(_recalls(result, way))}" for name, way in ways]
    size = f"{result.images:,} images" + (f", {result.classes} classes" if result.classes else "")
    partial = [f"partial: {', '.join(result.partial)}"] if result.partial else []
    text = f"{line(result.title):<18} {line(result.protocol):<12} {value}  {'  '.join([*others, size])}"
    return "".join([text, *(f"\n    {line(note)}" for note in (*partial, *result.notes))])


def _recalls(result: EvaluationResult, way: str) -> list[str]:
    return [f"{result.metrics[f'{way}_retrieval_recall@{k}']:.1%}" for k in (1, 5, 10)]


def summary_text(done: Evaluation) -> str:
    """What follows the lines of the results: means, missing sets and failures."""
    lines = [f"{name:<31} {text}" for name, text in suite_means(done.results)]
    for definition, split in done.missing:
        lines.append(f"{definition.name}: {split} images not found. Get it from {definition.get}")
    lines += [f"{line(name)}: FAILED: {error}" for name, error in done.failed]
    return "\n".join([*lines, *([f"written: {done.folder}/results.jsonl"] if done.results else [])])


def suite_means(results: Sequence[EvaluationResult]) -> list[tuple[str, str]]:
    """A name and a text for the mean of each suite under each protocol, and for effective robustness."""
    found = []
    for one in measured_suites(pool(results)):
        low, high = one.interval
        text = f"{one.mean:6.1%} [{low:.1%}, {high:.1%}]  mean of {len(one.sets)} of {one.total} sets"
        found.append(
            (f"{one.suite} {one.protocol}", text + (f", {one.partial} of them partial" if one.partial else ""))
        )
    partial_sets = {r.title for r in results if r.partial and r.protocol == "zero-shot"}
    for name, value in robustness(results).items():
        used = partial_sets if name == "mean" else partial_sets & {name, "imagenet1k"}
        note = f", of a part of {', '.join(sorted(used))}" if used else ""
        if name == "mean" and used:
            note = ", of partial sets"
        found.append((f"effective robustness, {name}", f"{round(100 * value, 1) + 0.0:+5.1f} points{note}"))
    return found


def robustness(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """Effective robustness per shift: zero-shot top-1 above that expected of models trained on ImageNet alone with the
    same ImageNet top-1. It needs the result of imagenet1k. Their mean is added if all shifts were measured."""
    top1 = {r.title: r.metrics["top1"] for r in results if r.protocol == "zero-shot" and "top1" in r.metrics}
    if "imagenet1k" not in top1:
        return {}
    text = (resources.files("dimefm.evaluation") / "baseline.json").read_text(encoding="utf-8")
    lines: dict[str, dict[str, float]] = json.loads(text)["fit"]
    found = {
        name: metrics.effective_robustness(top1[name], top1["imagenet1k"], line["slope"], line["intercept"])
        for name, line in lines.items()
        if name in top1
    }
    return found | {"mean": sum(found.values()) / len(found)} if len(found) == len(lines) else found
