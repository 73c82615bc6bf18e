"""`dimefm evaluate`: measure a model on sets. All that is named is looked at before torch is imported and the model is
loaded; evaluation.evaluator measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cache_schemas.embedding_store import COMMITS
from cache_schemas.evaluation import RESULTS_FILE, EvaluationResult, SetDefinition
from cache_schemas.run import RUN_FILE
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import find_sets
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import DimefmError, SourceError, TeacherError
from dimefm.evaluation.clean_images import CleanImages
from dimefm.evaluation.config import ChosenSet, EvaluationConfig, choose_sets, default_name
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.named_paths import allowing
from dimefm.system.notes import note
from dimefm.system.output_names import require_name
from dimefm.system.wording import counted
from dimefm.training.run_folder import read_run
from dimefm.training.student import ALL, number_of_teacher, require_checkpoint


@dataclass
class Evaluation:
    """The outcome: results in the order of the work, the splits that do not exist, and the sets that failed."""

    folder: str
    results: list[EvaluationResult] = field(default_factory=list)
    missing: list[tuple[SetDefinition, str]] = field(default_factory=list)
    failed: list[tuple[str, DimefmError]] = field(default_factory=list)


def evaluate(config: EvaluationConfig, report: Callable[[EvaluationResult], None] | None = None) -> Evaluation:
    """Evaluate a model; `report` is called with each result as soon as it is on disk.

    A set that is not below `data`, or cannot be read, is listed in the outcome, and the others go on. Raises a
    DimefmError for a model that cannot be loaded, and if not one of the sets exists.
    """
    chosen = choose_sets(config)
    config = replace(config, out=storage.local(config.out, "the folder of all evaluations"))
    require_name(config.out, "a folder of evaluations")
    folder = str(Path(config.out, config.name or default_name(config)))
    typed = [*config.folders, *filter(None, [config.data])]
    done = Evaluation(folder)
    with allowing(typed), writing(folder, of_use=_has_results):
        opened = _look_at_sets(config, chosen, done)
        if len(done.failed) == len(chosen):
            return done
        if (Path(config.model) / RUN_FILE).exists():
            require_checkpoint(config.model, config.checkpoint)
            _require_teacher(config)
        clean = CleanImages(config.leaks, config.model) if config.leaks else None
        note(f"{config.model}, {counted(len(chosen), 'set')}: loading the model ...")
        from dimefm.evaluation.evaluator import Evaluator  # imports torch, and what loads a model open_clip
        from dimefm.evaluation.open_model import open_model

        with open_model(
            config.model,
            config.pretrained,
            trained=config.trained,
            checkpoint=config.checkpoint,
            weights=config.weights,
            teacher=config.teacher,
            precision=config.precision,
            device=config.device,
        ) as clip:
            return Evaluator(config, clip, done, report or (lambda result: None), clean).run(chosen, opened)


def _require_teacher(config: EvaluationConfig) -> None:
    """Raises TeacherError for a teacher that the run does not have, and for zero-shot of one without a text tower."""
    document = read_run(config.model)
    everyone = config.teacher == ALL
    place = number_of_teacher(document, config.model, None if everyone else config.teacher)
    which = "" if len(document.teachers) == 1 else f"teacher {place + 1} of "
    require_text(config, document.teachers[place].has_text, which)
    texts = sum(one.has_text for one in document.teachers)
    if everyone and texts < 2:
        what = f"{config.model} has {counted(texts, 'teacher')} with a text tower: --teacher all has no effect"
        raise TeacherError(what, remedy="leave it out")


def require_text(config: EvaluationConfig, has_text: bool, which: str = "") -> None:
    """Raises TeacherError for zero-shot of a model without a text tower; `which` says which teacher of a run it is."""
    if "zero-shot" in config.tasks and not has_text:
        what = f"{which}{config.model} has no text tower to measure zero-shot with: it gives embeddings of images alone"
        raise TeacherError(what, remedy="give --task linear-probe or --task few-shot")


def _has_results(files: set[str]) -> bool:
    """Whether a folder has a result, or features of a shard of images."""
    return RESULTS_FILE in files or any(f"/{COMMITS}/" in name for name in files)


def _look_at_sets(config: EvaluationConfig, chosen: list[ChosenSet], done: Evaluation) -> dict[str, ImageSet]:
    """The test images of own sets, by folder; those that cannot be read go to `done.failed`. Raises SourceError if all
    sets are known ones, and none of them is below `data`."""
    opened: dict[str, ImageSet] = {}
    for one in chosen:
        if one.definition is None:
            try:
                opened[one.folder] = open_folder(one.folder)
            except SourceError as error:
                done.failed.append((one.name, error))
    known = tuple(one.name for one in chosen if one.definition)
    here = config.data and not storage.is_url(config.data)
    if here and len(known) == len(chosen) and not find_sets(known, config.data)[1]:
        raise none_below(config)
    return opened


def none_below(config: EvaluationConfig) -> SourceError:
    """The error of an evaluation without any of its sets."""
    return SourceError(f"none of the sets is below {config.data}", remedy="dimefm sets NAME says where to get them")
