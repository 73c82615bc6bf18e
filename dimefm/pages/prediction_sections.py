"""Sections about predictions: for a set, which classes are recognised, what is taken for what, and wrong images.

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cache_schemas.evaluation import EvaluationResult
from dimefm.evaluation.predicted import Predicted, read_predicted
from dimefm.pages.cells import Row, count, percent
from dimefm.pages.charts import Bar, bar_chart, shade_chart
from dimefm.pages.evaluated import Model
from dimefm.pages.page import Block, Card, Gallery, Section, Table, Words
from dimefm.pages.set_pictures import pictures_of
from dimefm.system.wording import counted

FEW_SHOT = re.compile(r"few-shot-(?P<shots>\d+)/(?P<rule>.+?)(/seed-(?P<seed>\d+))?$")
_FEW = 20  # classes that are drawn; more are in a table
_MOST_ROWS, _MOST_CONFUSED, _MOST_CARDS = 2000, 20, 24


@dataclass(frozen=True)
class _Sheet:
    """The predictions of one model."""

    model: Model
    predicted: Predicted

    @property
    def name(self) -> str:
        return self.model.name


def without_predictions(models: Sequence[Model]) -> Iterator[Words]:
    """How to get the predictions that are not there, and which of those of few-shot are not shown."""
    for one in models:
        lack: dict[str, dict[str, None]] = {}
        for result in one.results:
            if result.classes and one.predictions(result.title, result.protocol) is None:
                lack.setdefault(re.sub(r"(-\d+)?/.*", "", result.protocol), {})[result.title] = None
        for task, sets in lack.items():
            command = f"dimefm evaluate {one.results[0].model.get('name', 'MODEL')} SET --task {task} --predictions"
            what = f"{one.name} has no predictions of {task} on {', '.join(sets)}"
            yield Words(f"{what}; {command} keeps them, for a look at each class.")
    kept = {protocol for _, protocol in _kept(models)}
    left = {r.protocol for one in models for r in one.results if one.predictions(r.title, r.protocol)} - kept
    if left:
        yield Words("Of few-shot, the predictions with the most shots and the first seed are shown.")


def prediction_sections(models: Sequence[Model]) -> Iterator[Section]:
    """A section for each set and protocol of which a model has predictions; models that were measured on other images
    of it have one of their own."""
    for title, protocol in _kept(models):
        files = [(one, path) for one in models if (path := one.predictions(title, protocol))]
        groups: list[list[_Sheet]] = []
        for one, path in files:
            sheet = _Sheet(one, read_predicted(path))
            alike = [group for group in groups if group[0].predicted.same_images(sheet.predicted)]
            alike[0].append(sheet) if alike else groups.append([sheet])
        for group in groups:
            of = f" ({', '.join(sheet.name for sheet in group)})" if len(groups) > 1 else ""
            yield Section(f"{title}: {protocol}{of}", list(_blocks(title, protocol, group)))


def _kept(models: Sequence[Model]) -> list[tuple[str, str]]:
    """The sets and protocols of which there are predictions; of few-shot those of the most shots and the first seed."""
    found = {(r.title, r.protocol) for one in models for r in one.results if one.predictions(r.title, r.protocol)}
    best: dict[tuple[str, str], tuple[int, int, str]] = {}
    for title, protocol in found:
        if match := FEW_SHOT.match(protocol):
            key = title, match["rule"]
            best[key] = max(best.get(key, (0, 0, "")), (int(match["shots"]), -int(match["seed"] or 0), protocol))
    few = {(title, protocol) for (title, _), (_, _, protocol) in best.items()}
    order = {(r.title, r.protocol): None for one in models for r in one.results}
    return [key for key in order if key in found and (key in few or not FEW_SHOT.match(key[1]))]


def _blocks(title: str, protocol: str, sheets: Sequence[_Sheet]) -> Iterator[Block]:
    first = sheets[0].predicted
    yield Words(f"{counted(len(first.keys), 'image')} of {counted(len(first.classes), 'class', 'classes')}.")
    for sheet in sheets:
        yield from _stale(sheet, title, protocol)
    if first.multilabel:
        yield Words(
            "An image may have several labels here: it is right if the class with the best score is one of them."
        )
    drawn = [*_classes(sheets), *(() if first.multilabel else _confused(sheets))]
    yield from sorted(drawn, key=lambda block: isinstance(block, Table))  # charts stand beside each other
    if len(sheets) > 1:
        yield _agreement(sheets)
    yield from _wrong_images(title, sheets)


def _stale(sheet: _Sheet, title: str, protocol: str) -> Iterator[Words]:
    """A warning where predictions are older than the result, which was then measured without --predictions."""
    result: EvaluationResult = next(r for r in sheet.model.results if (r.title, r.protocol) == (title, protocol))
    predicted = sheet.predicted
    top1 = result.metrics.get("top1", float(predicted.correct_N.mean()))
    if result.images != len(predicted.keys) or abs(top1 - float(predicted.correct_N.mean())) > 0.005:
        what = f"the predictions of {sheet.name} are not those of its result ({top1:.1%} right)"
        yield Words(f"{what}: evaluate again with --predictions", warning=True)


def _classes(sheets: Sequence[_Sheet]) -> Iterator[Block]:
    """How many images of each class are right."""
    first = sheets[0].predicted
    found = []
    for label, name in enumerate(first.classes):
        if images := int((those_N := first.has_class(label)).sum()):
            found.append((name, images, [float(sheet.predicted.correct_N[those_N].mean()) for sheet in sheets]))
    if len(first.classes) <= _FEW:
        series = [(sheet.name, [_bar(right[n]) for _, _, right in found]) for n, sheet in enumerate(sheets)]
        yield bar_chart("Right, by class", [name for name, _, _ in found], series, "% of the images of a class")
    found.sort(key=lambda row: sum(row[2]))
    rows: list[Row] = [[name, count(images), *map(percent, right)] for name, images, right in found[:_MOST_ROWS]]
    caption = "Right, by class"
    if len(found) > _MOST_ROWS:
        caption += f": the {_MOST_ROWS:,} that are recognised least"
    if absent := len(first.classes) - len(found):
        caption += f" ({counted(absent, 'class', 'classes')} without an image left out)"
    yield Table(("class", "images", *(sheet.name for sheet in sheets)), rows, "lr" + "r" * len(sheets), caption)


def _bar(share: float) -> Bar:
    return Bar(100 * share, f"{100 * share:.0f}")


def _confused(sheets: Sequence[_Sheet]) -> Iterator[Block]:
    """What is taken for what: drawn for a few classes, and the most frequent pairs of many."""
    names, labels_N = sheets[0].predicted.classes, sheets[0].predicted.labels
    total = np.bincount(labels_N, minlength=len(names))
    if len(names) <= _FEW:
        for sheet in sheets:
            shares = np.zeros((len(names), len(names)))
            for (label, taken), times in _pairs(sheet.predicted).items():
                shares[label, taken] = times / total[label]
            unread = int((sheet.predicted.prediction_N < 0).sum())
            note = f"{counted(unread, 'image')} could not be read." if unread else ""
            yield shade_chart(f"{sheet.name}: what is taken for what", names, names, shares.tolist(), "are taken for",
                              "images of a class", note=note)  # fmt: skip
        return
    wrong = [{pair: times for pair, times in _pairs(sheet.predicted).items() if pair[0] != pair[1]} for sheet in sheets]
    kept = [pair for one in wrong for pair in sorted(one, key=lambda pair: -one[pair])[:_MOST_CONFUSED]]
    kept = sorted(dict.fromkeys(kept), key=lambda pair: -max(one.get(pair, 0) for one in wrong))
    rows: list[Row] = []
    for label, taken in kept:
        images, found = int(total[label]), [one.get((label, taken), 0) for one in wrong]
        rows.append([names[label], names[taken], count(images), *(count(n, n / images) for n in found)])
    head = ("is", "is taken for", "images", *(sheet.name for sheet in sheets))
    caption = f"What is taken for what: the {_MOST_CONFUSED} most frequent pairs of each model"
    yield Table(head, rows, "llr" + "r" * len(sheets), caption)


def _pairs(predicted: Predicted) -> dict[tuple[int, int], int]:
    """How many images of a class are taken for another, or for it. Images that could not be read are left out."""
    read_N, classes = predicted.prediction_N >= 0, len(predicted.classes)
    codes, counts = np.unique(
        predicted.labels[read_N] * classes + predicted.prediction_N[read_N], return_counts=True
    )  # fmt: skip
    return {divmod(code, classes): times for code, times in zip(codes.tolist(), counts.tolist(), strict=True)}


def _agreement(sheets: Sequence[_Sheet]) -> Table:
    """Each model beside each other one."""
    head = (
        "model",
        "and",
        "same class",
        "both right",
        "only the first",
        "only the other",
        "both wrong",
        "of these alike",
    )
    rows: list[Row] = []
    for one, other in combinations(sheets, 2):
        a, b = one.predicted, other.predicted
        same_N = (a.prediction_N == b.prediction_N) & (a.prediction_N >= 0)
        wrong_N = ~a.correct_N & ~b.correct_N
        shares = [same_N, a.correct_N & b.correct_N, a.correct_N & ~b.correct_N, ~a.correct_N & b.correct_N, wrong_N]
        alike = float(same_N[wrong_N].mean()) if wrong_N.any() else 0.0
        means = [*(float(those_N.mean()) for those_N in shares), alike]
        rows.append([one.name, other.name, *map(percent, means)])
    return Table(head, rows, "llrrrrrr", "Agreement: the share of images")


def _wrong_images(title: str, sheets: Sequence[_Sheet]) -> Iterator[Block]:
    """Pictures that no model gets right, and those that the first one does and another does not, the surest first."""
    read_N = np.logical_and.reduce([sheet.predicted.prediction_N >= 0 for sheet in sheets])
    wrong_N = np.logical_and.reduce([~sheet.predicted.correct_N for sheet in sheets]) & read_N
    who = "every model is wrong" if len(sheets) > 1 else f"{sheets[0].name} is wrong"
    chosen = [(f"Where {who}", _surest(wrong_N, sheets), int(wrong_N.sum()), sheets)]
    for other in sheets[1:]:
        lost_N = sheets[0].predicted.correct_N & ~other.predicted.correct_N & read_N
        pair = [sheets[0], other]
        caption = f"Where {sheets[0].name} is right and {other.name} is wrong"
        chosen.append((caption, _surest(lost_N, pair), int(lost_N.sum()), pair))
    rows = [row for _, those, _, _ in chosen for row in those]
    pictures, notes = pictures_of([sheet.model.folder for sheet in sheets], title, sheets[0].predicted.keys, rows)
    yield from notes
    for caption, those, images, shown in chosen:
        of = f"the surest {len(those)} of {images:,}" if images > len(those) else counted(images, "image")
        cards = [_card(pictures.get(row), row, shown) for row in those]
        yield Gallery(cards, f"{caption}: {of}") if cards else Words(f"{caption}: no image.")


def _surest(those_N: np.ndarray[Any, Any], sheets: Sequence[_Sheet]) -> list[int]:
    """The images of which the least sure of the models is surest."""
    (rows,) = np.nonzero(those_N)
    least = np.min([sheet.predicted.score_N[rows] for sheet in sheets], axis=0)
    found: list[int] = rows[np.argsort(-least, kind="stable")[:_MOST_CARDS]].tolist()
    return found


def _card(picture: str | None, row: int, sheets: Sequence[_Sheet]) -> Card:
    lines = []
    for sheet in sheets:
        one = sheet.predicted
        words = f"{sheet.name}: {one.classes[one.prediction_N[row]]} {one.score_N[row]:.0%}"
        lines.append(words if one.correct_N[row] else f"{words} (true class {one.own_N[row]:.0%})")
    key = sheets[0].predicted.keys[row].as_py()
    return Card(picture, sheets[0].predicted.label_names(row), [*lines, key], "bad")
