"""What the paper's job costs, before anything is run: rows, bytes and shards by count, GPU hours by a stated rate.

The rates are floors by arithmetic for one GPU of 788 TFLOP/s in bf16 (measured matrix products of an H200-class card):
ViT-L/14 at 224 px 162 GFLOP an image, its text tower about 4 GFLOP for a sentence of typical length, ViT-B/32 forward
and backward 26 GFLOP an image.
"""

from __future__ import annotations

from dimefm.errors import DimefmError
from dimefm.progress import amount

PAPER_IMAGES, PAPER_TEXTS, PAPER_EPOCHS, WIDTH, SHARD_ROWS = 40_000_000, 28_400_000, 100, 768, 65536
_FLOPS = 788e12
_IMAGE, _TEXT, _STEP = 162e9, 4e9, 26e9


def paper_forecast(images: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """A table for these sources, counted, or for the paper's own numbers of rows where none is given."""
    image_rows, image_from = _rows("image", images, PAPER_IMAGES)
    text_rows, text_from = _rows("text", texts, PAPER_TEXTS)
    hours = 1 / _FLOPS / 3600
    exact = 2 * image_rows * text_rows * WIDTH
    online = PAPER_EPOCHS * image_rows * (_STEP + _IMAGE)
    cached = PAPER_EPOCHS * image_rows * _STEP + image_rows * _IMAGE + text_rows * _TEXT
    lines = [
        ("images", image_rows, image_rows * _IMAGE * hours, image_from),
        ("texts", text_rows, text_rows * _TEXT * hours, text_from),
    ]
    rows = [f"{'stage':<22}{'rows':>14}{'shards':>8}{'written':>10}{'GPU hours':>11}  rows from"]
    for name, count, cost, source in lines:
        shards = -(-count // SHARD_ROWS)
        written = amount(count * (2 * WIDTH + 1))
        rows.append(f"{'cache-' + name:<22}{count:>14,}{shards:>8,}{written:>10}{cost:>11.2f}  {source}")
    pairs = amount(image_rows * 16 * 6)
    shards = -(-image_rows // SHARD_ROWS)
    rows.append(f"{'retrieve, exact':<22}{image_rows:>14,}{shards:>8,}{pairs:>10}{exact * hours:>11.2f}")
    seen = PAPER_EPOCHS * image_rows
    rows.append(f"{'train-student':<22}{seen:>14,}{'':>8}{'':>10}{seen * _STEP * hours:>11.2f}  100 epochs")
    rows += [
        "",
        f"with the teacher online instead of cached: {online * hours:,.0f} GPU hours against {cached * hours:,.0f}",
        "GPU hours are floors by arithmetic at 788 TFLOP/s in bf16 (one H200-class card), not measurements;",
        "a well-fed card reaches a third to two thirds of that.",
    ]
    return "\n".join(rows)


def _rows(kind: str, sources: tuple[str, ...], stated: int) -> tuple[int, str]:
    if not sources:
        return stated, "the paper"
    try:
        from pipeline.plan import PlanRequest, count_rows
    except ImportError as error:
        raise DimefmError(f"counting rows needs the pipeline package: {error}") from error
    request = PlanRequest(kind="image" if kind == "image" else "text", arguments=sources)
    return count_rows(request), "counted"
