"""Speed beside accuracy: the lines that `dimefm compare --latency` adds, and the points of its plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from cache_schemas.latency import Latency, ModelLatency
from dimefm.errors import DimefmError
from dimefm.system.wording import counted, three_digits

if TYPE_CHECKING:
    from dimefm.evaluation.compare import Comparison

SPEED = "speed"
"""The protocol of these lines."""
_WAYS = ("onnx", "int8", "pytorch", "compiled")  # of one digest of weights there are the first two, or the others
MS = "ms per image"


@dataclass(frozen=True)
class Quantity:
    """A number that is no accuracy, and its text in a table."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


class Point(NamedTuple):
    """A model in the plot: milliseconds per image, and accuracy in [0, 1]."""

    name: str
    ms: float
    accuracy: float


class Points(NamedTuple):
    """The plot: its points, and what its two axes are."""

    points: list[Point]
    across: str
    along: str


def chosen(latency: Latency, models: Sequence[set[str]]) -> list[ModelLatency | None]:
    """The measurement of each model, which is given by the digests of its weights; None where there is none. They are
    of one device and one number of threads, those of which most models were measured with, if need be with more
    threads. Of several ways of running a model, an uncompiled one counts."""
    places = dict.fromkeys((one.device, one.threads) for one in latency.models)

    def of(weights: set[str], place: tuple[str, int]) -> list[ModelLatency]:
        found = [one for one in latency.models if one.weights in weights and (one.device, one.threads) == place]
        return sorted(found, key=lambda one: _WAYS.index(one.backend))

    ranked = sorted(places, key=lambda place: (sum(bool(of(one, place)) for one in models), place[1]), reverse=True)
    return [next((found[0] for place in ranked if (found := of(one, place))), None) for one in models]


def quantities(one: ModelLatency) -> Iterator[tuple[str, Quantity]]:
    """The lines of a model, by their titles."""
    first, largest = (pick(one.image, key=lambda timing: timing.batch) for pick in (min, max))
    yield "parameters", Quantity(one.parameters, f"{one.parameters / 1e6:,.1f} M")
    if one.image_flops is not None:
        yield "GFLOP per image", Quantity(one.image_flops / 1e9, three_digits(one.image_flops / 1e9))
    yield "MB on disk", Quantity(one.bytes / 1e6, f"{one.bytes / 1e6:,.1f}")
    yield f"{MS}, batch {first.batch}", Quantity(first.median_ms, three_digits(first.median_ms))
    yield f"images/s, batch {largest.batch}", Quantity(largest.per_second, three_digits(largest.per_second))


def speed_notes(latency: Latency, names: Sequence[str], found: Sequence[ModelLatency | None]) -> list[str]:
    """What a reader must know of these lines."""
    how: dict[str, list[str]] = {}
    for name, one in zip(names, found, strict=True):
        if one is None:
            words = "not measured"
        else:
            where = one.device if one.device != "cpu" else counted(one.threads, "thread")
            words = f"{one.way}, {where}"
        how.setdefault(words, []).append(name)
    machine = f"{latency.machine.processor}, {counted(latency.machine.cores, 'core')}"
    return [f"speed, on {machine}: " + "; ".join(f"{words}: {', '.join(of)}" for words, of in how.items())]


def points(table: Comparison, latency: Latency) -> Points:
    """Accuracy is top-1 on ImageNet, or else the mean of the sets on which all of the models were measured. Raises
    DimefmError where there is no such set, or no model with a speed."""
    timed = {
        column.name: (column, line) for column in table.models for line in column.cells if line.title.startswith(MS)
    }
    lines = [
        line
        for line in table.names()
        if (line.kind, line.protocol) == ("set", "zero-shot") and all(line in one.cells for one, _ in timed.values())
    ]
    if not timed or not lines:
        what = "no model has both a speed and a zero-shot result on a set that the others have, too"
        raise DimefmError(what, remedy="measure the same models with dimefm latency and dimefm evaluate")
    lines = [line for line in lines if line.title == "imagenet1k"] or lines
    along = f"zero-shot, {lines[0].title}" if len(lines) == 1 else f"zero-shot, mean of {len(lines)} sets"
    found = [
        Point(name, column.cells[line].value, fmean(column.cells[one].value for one in lines))
        for name, (column, line) in timed.items()
    ]
    (_, line), *_ = timed.values()
    return Points(found, f"{line.title}; {latency.machine.processor}", f"{along}, %")
