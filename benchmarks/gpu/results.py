"""What the kit found, kept on disk as it comes: results.json for programs, results.md to read, rates.json
to forecast by.

Each file is replaced as a whole whenever something is added, so that it is good at any moment.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from benchmarks.measure import machine
from dimefm.system.markdown_table import markdown_table

Verdict = Literal["", "met", "MISSED", "right", "WRONG"]


@dataclass(frozen=True)
class Line:
    """One measurement: what it is of, its value and unit, under which conditions, and the limit it is held against.

    A limit is a bar, which is met or MISSED, or a check of correctness, which is right or WRONG.
    """

    what: str
    value: float | str
    unit: str = ""
    at: str = ""
    limit: str = ""
    verdict: Verdict = ""


@dataclass
class Step:
    """What came of one step. `state`: running, done, failed (with its traceback), or stopped at the end of its time."""

    letter: str
    name: str
    state: str = "running"
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)
    traceback: str = ""

    @property
    def passed(self) -> bool:
        """Whether it came to its end with no wrong number."""
        return self.state == "done" and not any(line.verdict == "WRONG" for line in self.lines)


class Results:
    """The results in `folder`. `known` are numbers that steps leave to later ones."""

    def __init__(self, folder: Path, command: str, minutes: float) -> None:
        self._folder, self._command, self._minutes = folder, command, minutes
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._rates: dict[str, float] = {}
        self.card, self.steps, self.known = "", list[Step](), dict[str, float]()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def passed(self) -> bool:
        """Whether every step did."""
        return all(step.passed for step in self.steps)

    def begin(self, step: Step) -> None:
        """A step that runs from now on."""
        self.steps.append(step)
        self.write()

    def take(self, kind: str, content: object) -> None:
        """What the running step sent: a line, a rate, a number for later steps, the card's name, its traceback."""
        step = self.steps[-1]
        if kind == "line":
            assert isinstance(content, dict)
            step.lines.append(Line(**content))
        elif kind == "rate":
            assert isinstance(content, tuple)
            self._rates[content[0]] = round(content[1], 2)
        elif kind == "known":
            assert isinstance(content, tuple)
            self.known[content[0]] = content[1]
        elif kind == "card":
            self.card = str(content)
        else:
            step.state, step.traceback = "failed", f"{step.traceback}{content}\n"
        self.write()

    def write(self) -> None:
        """All files anew."""
        head = {"card": self.card, "date": self._date, "command": self._command}
        steps = [{**asdict(step), "passed": step.passed} for step in self.steps]
        whole = {**head, "machine": machine(), "minutes": self._minutes, "passed": self.passed, "steps": steps}
        _replace(self._folder / "results.json", json.dumps(whole, indent=1) + "\n")
        _replace(self._folder / "results.md", self.markdown())
        if self._rates:
            _replace(self._folder / "rates.json", json.dumps({**head, **self._rates}, indent=1) + "\n")

    def summary(self) -> str:
        """What is wrong, and the bars."""
        parts = [f"# {self.card or platform.node()}", f"`{self._command}`, {self._date}; {machine()}"]
        parts.append(f"Every step passed: {'yes' if self.passed else 'NO'}.")
        failed = [s for s in self.steps if s.state in ("failed", "stopped")]
        parts += [f"**{s.letter}. {s.name}: {s.state} after {s.seconds:.0f} s**" for s in failed]
        for heading, verdicts in (("Wrong", ("WRONG",)), ("Bars", ("met", "MISSED"))):
            rows = [(s.letter, *_cells(line)) for s in self.steps for line in s.lines if line.verdict in verdicts]
            if rows:
                parts += [f"## {heading}", "\n".join(markdown_table([("", *_HEAD), *rows]))]
        return "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        """The summary, then all that was measured, step by step."""
        parts = [self.summary().strip()]
        for step in self.steps:
            parts.append(f"## {step.letter}. {step.name} ({step.state}, {step.seconds:.0f} s)")
            if step.lines:
                # Without padding: some cells are long, and the end of the output may be all that one gets.
                parts.append("\n".join(markdown_table([_HEAD, *map(_cells, step.lines)])))
            if step.traceback:
                parts.append(f"```\n{step.traceback.strip()}\n```")
        return "\n\n".join(parts) + "\n"


_HEAD = ("what", "value", "with", "limit")


def _cells(line: Line) -> tuple[str, ...]:
    value = line.value if isinstance(line.value, str) else _number(line.value)
    return line.what, f"{value} {line.unit}".strip(), line.at, f"{line.limit}: {line.verdict}" if line.verdict else ""


def _number(value: float) -> str:
    """Four digits or so, whatever the size."""
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def _replace(path: Path, text: str) -> None:
    half = path.with_name(f".{path.name}")
    half.write_text(text, encoding="utf-8")
    half.replace(path)
