"""How fast one GPU is at each stage: as `python -m benchmarks gpu` has measured it (dimefm/measured.json, if there is
one), or at best, by arithmetic for one H200-class card.

On that card 788 TFLOP/s in bf16 and 4.3 TB/s were measured. ViT-L/14 at 224 px takes 162 GFLOP per image, its text
tower about 4 GFLOP per sentence of typical length, ViT-B/32 forward and backward 26 GFLOP per image. Exact search takes
a product over the width for each score, which is then written and read once.
"""

from __future__ import annotations

import json
from importlib import resources

from cache_schemas.problems import Problem, SchemaError
from cache_schemas.rates import RATES_FILE, MeasuredRates, parse_rates

WIDTH = 768
_FLOPS, _BYTES = 788e12, 4.3e12
_IMAGE, _TEXT, _STEP = 162e9, 4e9, 26e9
_SCORE_BYTES = 8

AT_BEST = {
    "teacher_images_per_second": _FLOPS / _IMAGE,
    "teacher_texts_per_second": _FLOPS / _TEXT,
    "exact_scores_per_second": 1 / (2 * WIDTH / _FLOPS + _SCORE_BYTES / _BYTES),
    "student_images_per_second": _FLOPS / _STEP,
    "online_student_images_per_second": _FLOPS / (_STEP + _IMAGE),
}


def measured_rates() -> MeasuredRates | None:
    """The rates that ship with the package; None if none were measured yet. Raises SchemaError if they are not
    valid."""
    file = resources.files("dimefm") / RATES_FILE
    return read_rates(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def read_rates(text: str, where: str) -> MeasuredRates:
    """The rates in `text`, the JSON of the file `where`. Raises SchemaError."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(where, MeasuredRates.__name__, [Problem("", f"not JSON: {error}")]) from error
    return parse_rates(raw, where)
