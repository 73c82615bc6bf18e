"""How fast the models of a job are: the table of its report, and the points of its plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cache_schemas.latency import LATENCY_FILE, ModelLatency
from dimefm.evaluation.speed import MS, Point, Points, chosen, quantities
from dimefm.latency.record import read_latency
from dimefm.reproduce.tables import JobTable


def read_speeds(out: Path, weights: Mapping[str, set[str]]) -> dict[str, ModelLatency]:
    """The measurements in the folder of a job, by the names of its models. `weights` are the digests of each; a model
    that was not measured is left out."""
    found = chosen(read_latency(str(out / LATENCY_FILE)), list(weights.values()))
    return {name: one for name, one in zip(weights, found, strict=True) if one is not None}


def speed_table(speeds: Mapping[str, ModelLatency]) -> JobTable:
    """A row for each model: its size, and how fast it is."""
    found = {name: dict(quantities(one)) for name, one in speeds.items()}
    head = ("speed", *dict.fromkeys(title for row in found.values() for title in row))
    rows = [(name, *(str(row.get(title, "")) for title in head[1:])) for name, row in found.items()]
    return JobTable("Speed", [head, *rows])


def speed_points(speeds: Mapping[str, ModelLatency], accuracy: Mapping[str, float]) -> Points:
    """Milliseconds per image, and the accuracy in [0, 1] of each model."""
    points = []
    for name, one in speeds.items():
        first = min(one.image, key=lambda timing: timing.batch)
        points.append(Point(name, first.median_ms, accuracy[name]))
    return Points(points, f"{MS}, one at a time", "mean zero-shot top-1, %")
