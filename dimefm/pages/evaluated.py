"""The models whose results a page shows, and their comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache_schemas.evaluation import PREDICTIONS, EvaluationResult
from cache_schemas.latency import Latency
from dimefm.evaluation.compare import Comparison, compare
from dimefm.evaluation.predictions import PREDICTIONS_SUFFIX, file_name
from dimefm.evaluation.results import read_results
from dimefm.inspection.kinds import folders_with_results

REFERENCE = "teacher"


@dataclass(frozen=True)
class Model:
    """A folder of results; no two have the same `name`."""

    name: str
    folder: str
    results: Sequence[EvaluationResult]

    def predictions(self, title: str, protocol: str) -> str | None:
        """The file of predictions of a set under a protocol, None where there is none."""
        path = Path(self.folder, PREDICTIONS, file_name(title, protocol) + PREDICTIONS_SUFFIX)
        return str(path) if path.is_file() else None


def open_models(paths: Sequence[str]) -> list[Model]:
    """The models in folders EVALUATIONS, or in folders of one model. The reference comes first: the one that is called
    teacher, or else the first. Raises as read_results does."""
    folders = list(dict.fromkeys(str(Path(folder)) for path in paths for folder in folders_with_results(path)))
    count = Counter(Path(folder).name for folder in folders)
    models = [Model(Path(one).name if count[Path(one).name] == 1 else one, one, read_results(one)) for one in folders]
    return sorted(models, key=lambda model: Path(model.folder).name != REFERENCE)


def comparison(models: Sequence[Model], latency: Latency | None = None) -> Comparison:
    """The models beside each other under their names, whether or not they have a set in common. Raises StoreError for
    one without a result."""
    found = compare([one.folder for one in models], published=False, latency=latency, require_common=False)
    columns = [replace(column, name=model.name) for column, model in zip(found.models, models, strict=True)]
    return replace(found, models=columns)
