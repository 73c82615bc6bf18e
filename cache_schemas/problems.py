"""The only error of this package: a document does not follow its schema. It lists every problem."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a document: `path` is where in it (``teacher.preprocessing.size``), `what` is what."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path or '(document)'}: {self.what}"


class SchemaError(ValueError):
    """A document does not follow its schema. `problems` are all that were found, not just the first."""

    def __init__(self, where: str, schema: str, problems: list[Problem]) -> None:
        self.where = where
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {p}" for p in problems)
        super().__init__(f"{where} is not a valid {schema} document:{lines}")
