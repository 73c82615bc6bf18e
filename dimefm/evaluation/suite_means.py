"""The means of suites, from results: of plain numbers, so that `dimefm compare` imports nothing that computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dimefm.datasets.definitions import load_definitions
from dimefm.evaluation.results import Pooled

Interval = tuple[float, float]


@dataclass(frozen=True)
class SuiteMean:
    """The mean of a suite under a protocol, over the `sets` that were measured; the suite has `total` sets, and
    `partial` of those measured are not the whole published set."""

    suite: str
    protocol: str
    sets: list[Pooled]
    total: int
    partial: int
    mean: float
    interval: tuple[float, float]


def measured_suites(pooled: Sequence[Pooled]) -> Iterator[SuiteMean]:
    """The mean of each suite under each protocol, for the suites of which means are published."""
    for suite in ("elevater", "robustness"):
        total = sum(d.suite == suite for d in load_definitions().values())
        for protocol in dict.fromkeys(one.protocol for one in pooled):
            if sets := [one for one in pooled if (one.suite, one.protocol) == (suite, protocol)]:
                mean, interval = mean_of([one.value for one in sets], [one.interval for one in sets])
                partial = sum(bool(one.partial) for one in sets)
                yield SuiteMean(suite, protocol, sets, total, partial, mean, interval)


def mean_of(values: Sequence[float], intervals: Sequence[Interval]) -> tuple[float, Interval]:
    """The mean of the scores of several sets, and its interval, cut to [0, 1]. The sets are taken as independent and
    normal: the half width of the mean's interval is the root of the sum of the squared half widths, divided by their
    number. Raises ValueError if there is no value, not one interval for each, or a value outside [0, 1]."""
    if not values or len(values) != len(intervals) or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"a mean of values in [0, 1] with an interval each: {values}, {len(intervals)} intervals")
    mean = float(np.mean(values))
    half = float(np.linalg.norm([(high - low) / 2 for low, high in intervals])) / len(values)
    return mean, (max(0.0, mean - half), min(1.0, mean + half))
