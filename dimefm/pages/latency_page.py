"""Sections about measurements of latency, and accuracy against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache_schemas.latency import Latency, ModelLatency, Timing
from dimefm.errors import DimefmError
from dimefm.evaluation.speed import points
from dimefm.inspection.describe_latency import where
from dimefm.latency.record import describe_machine, read_latency
from dimefm.latency.table import noise
from dimefm.pages.cells import Row, count, measure
from dimefm.pages.charts import Bar, Line, bar_chart, line_chart, scatter_chart
from dimefm.pages.evaluated import comparison, open_models
from dimefm.pages.page import Block, Facts, Section, Table, Words
from dimefm.system.progress import amount
from dimefm.system.wording import three_digits

_WIDE = 5.0  # from the quickest to the slowest, beyond which an axis is logarithmic


def latency_sections(paths: Sequence[str], evaluations: Sequence[str]) -> list[Section]:
    """What was measured in each file, and accuracy against it where results of the same models are at hand."""
    return [Section(f"Speed: {path}", list(_blocks(read_latency(path), evaluations))) for path in paths]


def _blocks(latency: Latency, evaluations: Sequence[str]) -> Iterator[Block]:
    versions = dict(pair for one in latency.models for pair in one.versions.items())
    yield Facts([
        ("machine", describe_machine(latency.machine)),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ])  # fmt: skip
    if noisy := noise(latency.machine, latency.models):
        yield Words(noisy, warning=True)
    if evaluations:
        yield _accuracy(latency, evaluations)
    yield _facts(latency)
    for tower, timings, noun in _towers(latency):
        first = min(timing.batch for of in timings for timing in of)
        bars = [next((_bar(one) for one in of if one.batch == first), None) for of in timings]
        yield bar_chart(
            f"{tower}: one call of {first}", [_name(one, latency) for one in latency.models],
            [("", bars)], f"ms per {noun}, median; whiskers to the 95th percentile",
        )  # fmt: skip
        if any(len(of) > 1 for of in timings):
            lines = [
                Line(_name(one, latency), [(float(timing.batch), timing.per_second) for timing in of])
                for one, of in zip(latency.models, timings, strict=True)
            ]
            yield line_chart(f"{tower}: throughput", lines, "batch", f"{noun}s per second", log_across=True, zero=True)
    yield _timings(latency)


def _towers(latency: Latency) -> Iterator[tuple[str, list[tuple[Timing, ...]], str]]:
    for tower, timings, noun in (
        ("Image tower", [one.image for one in latency.models], "image"),
        ("Text tower", [one.text for one in latency.models], "sentence"),
    ):
        if any(timings):
            yield tower, timings, noun


def _name(one: ModelLatency, latency: Latency) -> str:
    """The model, and how it was run where that is not the same for all."""
    return f"{one.name}, {where(one)}" if len({where(other) for other in latency.models}) > 1 else one.name


def _bar(timing: Timing) -> Bar:
    return Bar(timing.median_ms, three_digits(timing.median_ms), (timing.median_ms, timing.p95_ms))


def _accuracy(latency: Latency, evaluations: Sequence[str]) -> Block:
    """Accuracy against milliseconds, or why it cannot be drawn."""
    try:
        table = comparison([one for one in open_models(evaluations) if one.results], latency)
        found = points(table, latency)
    except DimefmError as error:
        return Words(f"Accuracy against latency cannot be drawn: {error.what}; {error.remedy}")
    ms, drawn = [one.ms for one in found.points], {one.name for one in found.points}
    untimed = [column.name for column in table.models if column.name not in drawn]
    return scatter_chart(
        "Accuracy against latency", [(one.name, one.ms, 100 * one.accuracy) for one in found.points],
        found.across, found.along, log_across=max(ms) > _WIDE * min(ms),
        note=f"The speed of {', '.join(untimed)} was not measured." if untimed else "",
    )  # fmt: skip


def _facts(latency: Latency) -> Table:
    head = ("model", "run by", "parameters", "image tower", "GFLOP/image", "GFLOP/text", "on disk", "memory")
    rows: list[Row] = []
    for one in latency.models:
        flops = [measure(n and n / 1e9, three_digits((n or 0) / 1e9)) for n in (one.image_flops, one.text_flops)]
        memory = measure(one.memory, amount(one.memory or 0))
        parameters = count(one.parameters), count(one.image_parameters)
        rows.append([one.name, where(one), *parameters, *flops, measure(one.bytes, amount(one.bytes)), memory])
    return Table(head, rows, "llrrrrrr", "Models")


def _timings(latency: Latency) -> Table:
    head = ("model", "run by", "tower", "batch", "ms each", "95th percentile", "spread", "per second", "calls")
    rows: list[Row] = []
    for one in latency.models:
        for tower, timing in (*(("image", t) for t in one.image), *(("text", t) for t in one.text)):
            times = (timing.median_ms, timing.p95_ms)
            rows.append([
                one.name, where(one), tower, count(timing.batch), *(measure(ms, three_digits(ms)) for ms in times),
                measure(timing.spread, f"±{timing.spread:.0%}"),
                measure(timing.per_second, three_digits(timing.per_second)), count(timing.calls),
            ])  # fmt: skip
    return Table(head, rows, "lllrrrrrr", "Timings, per image or sentence")
