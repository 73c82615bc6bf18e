"""What the paper's job will cost, before anything is run: rows, bytes and shards by count, GPU hours by rates.

Rates that were measured are used where they exist. The others are upper bounds (system.gpu_rates), so their hours are
lower bounds.
"""

from __future__ import annotations

from cache_schemas.rates import MeasuredRates
from dimefm.errors import DimefmError
from dimefm.system.gpu_rates import AT_BEST, WIDTH
from dimefm.system.progress import amount

PAPER_IMAGES, PAPER_TEXTS, PAPER_EPOCHS, SHARD_ROWS = 40_000_000, 28_400_000, 100, 65536


def paper_cost_table(images: tuple[str, ...], texts: tuple[str, ...], rates: MeasuredRates | None) -> str:
    """A table of the costs for the rows of these sources; for the paper's numbers of rows if no source is given."""
    image_rows, image_from = _rows("image", images, PAPER_IMAGES)
    text_rows, text_from = _rows("text", texts, PAPER_TEXTS)
    seen = PAPER_EPOCHS * image_rows
    image, text, exact, step, online = (
        _Cost(count, name, rates)
        for count, name in zip((image_rows, text_rows, image_rows * text_rows, seen, seen), AT_BEST, strict=True)
    )
    costs = (image, text, exact, step, online)
    lines = [f"{'stage':<22}{'rows':>14}{'shards':>8}{'written':>10}{'GPU hours':>11}  {'hours by':<13}rows from"]
    for name, count, cost, source in (
        ("images", image_rows, image, image_from),
        ("texts", text_rows, text, text_from),
    ):
        shards, written = -(-count // SHARD_ROWS), amount(count * (2 * WIDTH + 1))
        lines.append(f"{'cache-' + name:<22}{count:>14,}{shards:>8,}{written:>10}{cost}  {source}")
    shards, pairs = -(-image_rows // SHARD_ROWS), amount(image_rows * 16 * 6)
    lines.append(f"{'retrieve, exact':<22}{image_rows:>14,}{shards:>8,}{pairs:>10}{exact}".rstrip())
    lines.append(f"{'train-student':<22}{seen:>14,}{'':>8}{'':>10}{step}  100 epochs")
    cached = image.hours + text.hours + step.hours
    lines += ["", f"with the teacher online instead of cached: {online.hours:,.0f} GPU hours against {cached:,.0f}"]
    if rates is not None:
        lines.append(f"measured on one {rates.card}, {rates.date}, by: {rates.command}")
    if not all(cost.measured for cost in costs):
        what = "other GPU hours" if any(cost.measured for cost in costs) else "GPU hours"
        lines += [
            f"{what} are floors by arithmetic at 788 TFLOP/s in bf16 and 4.3 TB/s (one H200-class card), not",
            "measurements; a well-fed card reaches a third to two thirds of that.",
        ]
    return "\n".join(lines)


class _Cost:
    """The GPU hours for `count` rows, or scores, by the measured rate of this name, or else by arithmetic."""

    def __init__(self, count: int, name: str, rates: MeasuredRates | None) -> None:
        rate = getattr(rates, name, None)
        self.measured = rate is not None
        self.hours = count / (rate or AT_BEST[name]) / 3600

    def __str__(self) -> str:
        return f"{self.hours:>11.2f}  {'measurement' if self.measured else 'arithmetic':<11}"


def _rows(kind: str, sources: tuple[str, ...], papers: int) -> tuple[int, str]:
    """The number of rows, and where it comes from."""
    if not sources:
        return papers, "the paper"
    try:
        from dimefm.caching.plan import PlanRequest, count_rows
    except ImportError as error:
        raise DimefmError(f"counting rows needs the pipeline package: {error}") from error
    request = PlanRequest(kind="image" if kind == "image" else "text", arguments=sources)
    return count_rows(request), "counted"
