"""Read what a run has logged, without the libraries that write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache_schemas.run import METRICS_FILE


def read_metrics(out: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_lines(Path(out) / METRICS_FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none if there is no file. A line that a kill cut off is left out."""
    return whole_lines(path)[0]


def whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines as `read_lines` has them, and how many were left out."""
    lines, cut = [], 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            cut += 1
    return lines, cut


def last_validation(out: str) -> dict[str, float]:
    """The scores of a run's last validation; empty if there was none."""
    lines = [line for line in read_metrics(out) if line["event"] == "validation"]
    return {k: v for k, v in lines[-1].items() if k not in ("event", "step")} if lines else {}
