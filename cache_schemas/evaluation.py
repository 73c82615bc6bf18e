"""What evaluation reads and writes: the definition of a set, shipped with the package, and the results of a model.

EVALUATIONS/
  NAME/results.jsonl                    one EvaluationResult a line; the last of a set and protocol counts
  NAME/features/SET-SPLIT.zarr          an embedding store of float32: every image encoded once
  NAME/predictions/SET.PROTOCOL.parquet key, label, prediction, correct and scores of every image, where kept
  text_embeddings/DIGEST.safetensors    of class names or captions, by text tower: shared by models
  unpacked/SET-SPLIT-DIGEST/test.tar    sets that are published as raw arrays
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cache_schemas.document import Document
from cache_schemas.problems import Problem

Suite = Literal["imagenet", "robustness", "elevater", "retrieval", "more"]
"""The published table that a set belongs to. A set of "more" belongs to none, and counts in no mean of a suite."""
EvaluationTask = Literal["zero-shot", "linear-probe", "few-shot"]
ProbeSelection = Literal["honest", "elevater"]
"""What chooses a probe's hyperparameters: validation images alone, or also, as ELEVATER's code does, the best epoch on
the test images."""
Solver = Literal["sgd", "lbfgs"]
"""What fits a probe: ELEVATER's SGD, or the logistic regression of CLIP's paper."""

OWN = "own"  # the suite of sets that no definition describes
RESULTS_FILE, FEATURES, PREDICTIONS = "results.jsonl", "features", "predictions"
TEXT_EMBEDDINGS, UNPACKED = "text_embeddings", "unpacked"

Metric = Literal["accuracy", "mean_per_class", "roc_auc", "map_11_point", "recall"]
Layout = Literal["webdataset", "folders", "torchvision", "original", "parquet"]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class SetDefinition:
    """One evaluation set, as published.

    `splits` has the images of each split, `metric` is the one that is reported. Class names in the order of the labels
    are `classes`, or those that open_clip ships for ImageNet (`classes_from`), all or those of the WordNet ids in
    `subset`. `folders` are the names of the class folders, in the same order, where they are not the class names;
    ``wnid`` for ImageNet's ids. {c} in a template stands for the class name. `aliases` are other names that the set's
    folder goes by, `layouts` those that are read. `resize` is "squash" where the aspect ratio is given up, "model" for
    the model's own preprocessing. `sources` says where classes, templates and sizes were taken from.
    """

    name: str
    title: str
    suite: Suite
    task: Literal["classification", "multilabel", "retrieval"]
    metric: Metric
    splits: dict[str, int]
    class_count: int
    licence: str
    get: str
    layouts: tuple[Layout, ...]
    sources: dict[str, str]
    classes: tuple[str, ...] = ()
    classes_from: Literal["open_clip"] | None = None
    subset: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    folders_from: Literal["wnid"] | None = None
    templates: tuple[str, ...] = ()
    templates_from: Literal["open_clip"] | None = None
    resize: Literal["model", "squash"] = "model"
    aliases: tuple[str, ...] = ()
    elevater: str | None = None
    elevater_columns: tuple[int, ...] = ()

    def problems(self) -> list[Problem]:
        """What the types cannot say."""
        found = [Problem("splits", f"unknown split {name!r}") for name in self.splits if name not in SPLITS]
        if "test" not in self.splits:
            found.append(Problem("splits", "has no test split"))
        if self.task == "retrieval":
            return found
        counts: list[tuple[str, tuple[str, ...], bool]] = [
            ("classes", self.classes, self.classes_from is None),
            ("subset", self.subset, bool(self.subset)),
            ("folders", self.folders, bool(self.folders)),
        ]
        for name, values, wanted in counts:
            if wanted and len(values) != self.class_count:
                found.append(Problem(name, f"has {len(values)} entries, but class_count is {self.class_count}"))
            if len(set(values)) != len(values) and name != "classes":
                found.append(Problem(name, "has an entry twice"))
        if self.elevater_columns and sorted(self.elevater_columns) != list(range(self.class_count)):
            found.append(Problem("elevater_columns", "does not have each label once"))
        if bool(self.templates) == bool(self.templates_from):
            found.append(Problem("templates", "give them, or where they are from"))
        found += [Problem("templates", f"{t!r} has no {{c}}") for t in self.templates if "{c}" not in t]
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Document):
    """One set under one protocol.

    `metrics` are in [0, 1], `metric` names the one that is reported, `intervals` are their 95% intervals.
    `images` were scored, `expected` is the published number; `partial` says every difference from the published set in
    words. `model` has name, tag and digests of weights and text tower; `digests` those of the images and labels, the
    class names and the templates; `settings` what else decides the numbers.
    """

    SCHEMA: ClassVar[str] = "dimefm.evaluation-result"

    set: str
    suite: str
    protocol: str
    metric: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    images: int
    expected: int | None
    classes: int
    unreadable: int
    partial: tuple[str, ...]
    model: dict[str, object]
    digests: dict[str, str]
    settings: dict[str, object]
    versions: dict[str, str]
    device: str
    seconds: float
    finished: str
    notes: tuple[str, ...] = field(default_factory=tuple)

    def problems(self) -> list[Problem]:
        """What the types cannot say."""
        return [] if self.metric in self.metrics else [Problem("metrics", f"lacks {self.metric!r}")]

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later result replaces."""
        return self.suite, self.set, self.protocol

    @property
    def title(self) -> str:
        """The set's name; a user's own set is told from a known one that is called the same."""
        return f"{self.suite}-{self.set}" if self.suite == OWN else self.set

    @property
    def value(self) -> float:
        """The metric that is reported."""
        return self.metrics[self.metric]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `value`."""
        return self.intervals.get(self.metric, (self.value, self.value))
