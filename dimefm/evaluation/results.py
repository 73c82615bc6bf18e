"""results.jsonl: the results of a model, a line per set and protocol. Where there are several, the last one counts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from cache_schemas.evaluation import RESULTS_FILE, EvaluationResult
from dimefm.errors import MismatchError, StoreError
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean, did_you_mean_path, near_names


class Results:
    """The results of one model, in a folder of their own."""

    def __init__(self, folder: str) -> None:
        """Raises SchemaError for a line that is no result. A last line that was cut short is ignored."""
        self.path = Path(folder, RESULTS_FILE)
        self._found = {result.key: result for result in read_results(folder)} if self.path.exists() else {}

    def require_model(self, weights: str) -> None:
        """Raises MismatchError if the folder has results of other weights."""
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
            storage.make_folder(str(self.path.parent))
            # O_NOFOLLOW: in a folder that others can write to, a link could lead anywhere.
            with os.fdopen(
                os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+b"
            ) as file:
                file.truncate(_whole_lines(self.path))
                file.write(line.encode())
                file.flush()
                storage.flush(str(self.path))
        self._found[result.key] = result


@dataclass(frozen=True)
class Pooled:
    """The results of a set under a protocol, over its seeds: the mean `value` in [0, 1], the mean of the intervals, and
    the standard deviation over seeds (None for a single result). `digests` are of the images and texts measured on;
    `conditions`, by a name for people, must be equal for two numbers to be compared."""

    title: str
    suite: str
    protocol: str
    value: float
    interval: tuple[float, float]
    deviation: float | None
    partial: tuple[str, ...]
    digests: dict[str, str]
    conditions: dict[str, object]


def pool(results: Sequence[EvaluationResult]) -> list[Pooled]:
    """The results, with the seeds of each few-shot protocol taken together."""
    groups: dict[tuple[str, str], list[EvaluationResult]] = {}
    for result in results:
        groups.setdefault((result.title, result.protocol.partition("/seed-")[0]), []).append(result)
    return [_pooled(protocol, group) for (_, protocol), group in groups.items()]


def _pooled(protocol: str, group: list[EvaluationResult]) -> Pooled:
    values = [result.value for result in group]
    return Pooled(
        title=group[0].title,
        suite=group[0].suite,
        protocol=protocol,
        value=fmean(values),
        interval=(fmean(r.interval[0] for r in group), fmean(r.interval[1] for r in group)),
        deviation=stdev(values) if len(values) > 1 else None,
        partial=group[0].partial,
        digests=group[0].digests,
        conditions={
            "decoder": group[0].settings.get("decoder"),
            "resizing": group[0].settings.get("resize"),
            "precision": group[0].model.get("precision"),
            "training images": group[0].settings.get("train"),
            "seeds": sorted(str(result.settings.get("seed")) for result in group),
        },
    )


def read_results(folder: str) -> list[EvaluationResult]:
    """The last result of each set and protocol in a folder (or a results.jsonl), in the order of their first lines.
    Raises StoreError for a file that does not exist or is damaged, SchemaError for a line that is no result."""
    path = Path(folder) if folder.endswith(".jsonl") else Path(folder, RESULTS_FILE)
    if not path.exists():
        raise StoreError(f"{path} does not exist", remedy=_meant(folder))
    found: dict[tuple[str, str, str], EvaluationResult] = {}
    for number, line in enumerate(path.read_bytes()[: _whole_lines(path)].splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            raw = json.loads(line)
        except ValueError:
            raise StoreError(f"{where} is damaged", remedy="delete the line and evaluate that set again") from None
        result = EvaluationResult.parse(raw, where)
        found[result.key] = result
    return list(found.values())


def _meant(folder: str) -> str:
    """A remedy where there are no results: what is called so below evaluations/, or like it beside the folder."""
    usual = Path("evaluations", folder)
    if (usual / RESULTS_FILE).exists():
        return f"did you mean {str(usual)!r}?"
    remedy = "dimefm evaluate MODEL SET... writes it; name its folder, such as evaluations/STUDENT"
    if "/" not in folder.rstrip("/"):
        beside = [path.parent.name for path in sorted(Path("evaluations").glob(f"*/{RESULTS_FILE}"))]
        if near := near_names(folder, beside):
            return did_you_mean(str(usual), [f"evaluations/{name}" for name in near])
    return did_you_mean_path(folder, remedy)


def _whole_lines(path: Path) -> int:
    """The number of bytes up to the end of the last complete line: an evaluation may have been stopped in the next."""
    return path.read_bytes().rfind(b"\n") + 1
