"""What evaluation reads and writes: the definition of a labelled set, and the results of a model.

EVALUATIONS/
  NAME/results.jsonl                    one EvaluationResult per line; the last one of a set and protocol counts
  NAME/features/SET-SPLIT.zarr          an embedding store of float32: each image encoded once
  NAME/predictions/SET.PROTOCOL.parquet key, label, prediction, correct and scores of each image, with --predictions
  text_embeddings/DIGEST.safetensors    of class names or captions, per text tower: shared by models
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
    """One labelled set, as it was published: a file in dimefm/datasets/sets.

    `suite` is the published table that it belongs to, "more" if there is none. `splits` has the number of images of
    each split; `metric` is the one that is reported. The class names, in the order of the labels, are `classes`, or
    those that open_clip ships for ImageNet (`classes_from`): all of them, or those of the WordNet ids in `subset`.
    `folders` are the names of the class folders in the same order, if these are not the class names; `folders_from`
    "wnid" stands for ImageNet's ids. {c} in a template stands for the class name. `aliases` are other names that the
    set's folder may have, `layouts` are those that are read. `resize` is "squash" if the aspect ratio is given up,
    "model" for the model's own preprocessing. `get` says where to get the set; `sources` says where classes, templates
    and sizes were taken from. `elevater` is the set's name on ELEVATER's leaderboard, `elevater_columns` the labels in
    the order of the columns there, if it is another.
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
        """Problems that the types cannot express."""
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
            found.append(Problem("templates", "give either templates or templates_from"))
        found += [Problem("templates", f"{t!r} has no {{c}}") for t in self.templates if "{c}" not in t]
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Document):
    """The result of one set under one protocol.

    `metrics` are in [0, 1], `intervals` are their 95% intervals, and `metric` names the one that is reported. `images`
    is the number that was scored, `expected` the published one; `partial` says in words how the images differ from the
    published set. `model` has the name, the tag and the digests of weights and text tower; `digests` are those of the
    images and labels, the class names and the templates; `settings` are what else decides the numbers.
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
        """Problems that the types cannot express."""
        return [] if self.metric in self.metrics else [Problem("metrics", f"lacks {self.metric!r}")]

    @property
    def key(self) -> tuple[str, str, str]:
        """A later result with the same key replaces this one."""
        return self.suite, self.set, self.protocol

    @property
    def title(self) -> str:
        """The set's name. The title of a user's own set differs from that of a known set with the same name."""
        return f"{self.suite}-{self.set}" if self.suite == OWN else self.set

    @property
    def value(self) -> float:
        """The metric that is reported."""
        return self.metrics[self.metric]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `value`."""
        return self.intervals.get(self.metric, (self.value, self.value))
