"""The file measured.json: the rates that one GPU was measured to reach, a copy of rates.json of `python -m benchmarks
gpu`. Forecasts use it (system.gpu_rates). A rate that was not measured is left out, or null.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from cache_schemas.document import parse_dataclass
from cache_schemas.problems import Problem, SchemaError

RATES_FILE = "measured.json"


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """The GPU, the day, the command that measured, and rates per second: images and sentences through a ViT-L/14;
    scores of exact search at a width of 768, one score per query and row; training images of a ViT-B/32 from the cache,
    and with the teacher in the loop."""

    card: str
    date: str
    command: str
    teacher_images_per_second: float | None = None
    teacher_texts_per_second: float | None = None
    exact_scores_per_second: float | None = None
    student_images_per_second: float | None = None
    online_student_images_per_second: float | None = None


def parse_rates(raw: object, where: str) -> MeasuredRates:
    """The rates in plain JSON data, read from `where`. Raises SchemaError with every problem."""
    rates = parse_dataclass(MeasuredRates, raw, where)
    values = {f.name: getattr(rates, f.name) for f in dataclasses.fields(rates) if f.name.endswith("_per_second")}
    problems = [
        Problem(name, f"expected a rate above 0, found {value}")
        for name, value in values.items()
        if value is not None and not 0 < value < math.inf
    ]
    problems += [Problem(name, "is empty") for name in ("card", "date", "command") if not getattr(rates, name).strip()]
    if problems:
        raise SchemaError(where, MeasuredRates.__name__, problems)
    return rates
