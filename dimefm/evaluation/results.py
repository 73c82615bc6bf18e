"""results.jsonl: what was measured of a model, a line a set and protocol; the last one counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cache_schemas.evaluation import RESULTS_FILE, EvaluationResult
from dimefm import storage
from dimefm.errors import MismatchError, StoreError


class Results:
    """The results of one model, in a folder of their own."""

    def __init__(self, folder: str) -> None:
        """Raises SchemaError for a line that is no result; a last line that was cut short is passed over."""
        self.path = Path(folder, RESULTS_FILE)
        self._found = {result.key: result for result in read_results(folder)} if self.path.exists() else {}

    def require_model(self, weights: str) -> None:
        """Raises MismatchError where there are results of other weights."""
        for result in self._found.values():
            if result.model["weights"] != weights:
                what = f"{self.path} has results of other weights ({str(result.model['weights'])[:12]}...)"
                raise MismatchError(what, remedy="give this model another --name, or delete the folder")

    def find(self, suite: str, name: str, protocol: str) -> EvaluationResult | None:
        """The last result of a set under a protocol."""
        return self._found.get((suite, name, protocol))

    def add(self, result: EvaluationResult) -> None:
        """Append a result. It is on disk when this returns."""
        line = json.dumps(result.to_json(), sort_keys=True, allow_nan=False) + "\n"
        with storage.writing_to(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.truncate(_whole_lines(self.path))
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        self._found[result.key] = result


def read_results(folder: str) -> list[EvaluationResult]:
    """The results in a folder (or a results.jsonl itself), the last of each set and protocol, in the order of their
    first. Raises StoreError where there are none, SchemaError for a line that is no result."""
    path = Path(folder) if folder.endswith(".jsonl") else Path(folder, RESULTS_FILE)
    if not path.exists():
        raise StoreError(f"{path} does not exist", remedy="dimefm evaluate MODEL writes it; name its folder")
    found: dict[tuple[str, str, str], EvaluationResult] = {}
    for number, line in enumerate(path.read_bytes()[: _whole_lines(path)].splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            raw = json.loads(line)
        except ValueError:
            raise StoreError(f"{where} is damaged", remedy="delete the line, and evaluate that set again") from None
        result = EvaluationResult.parse(raw, where)
        found[result.key] = result
    return list(found.values())


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that was written whole: an evaluation may have been stopped in the next."""
    return path.read_bytes().rfind(b"\n") + 1
