"""What to evaluate, on what, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cache_schemas.embedding_store import CpuDecoder
from cache_schemas.evaluation import OWN, EvaluationTask, ProbeSelection, SetDefinition, Solver, Suite
from cache_schemas.identity import Precision
from cache_schemas.run import Weights
from dimefm.datasets.definitions import load_definitions
from dimefm.datasets.own_sets import require_folder, set_name
from dimefm.errors import SourceError
from dimefm.models.trained import Trained
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate, on what, and how. Results go to `out`/`name`."""

    model: str
    """Model to measure: a run folder, an exported folder of any format, or an open_clip name (also hf-hub:,
    local-dir:)."""
    folders: tuple[str, ...] = ()
    """Labelled sets of your own, a folder each."""
    suite: Literal[Suite, "all"] | None = None
    """Measure the sets of this suite that are found below `data`. all: every set that
    dimefm knows (see dimefm sets)."""
    data: str | None = None
    """Folder or URL that has a folder for each set."""
    sets: tuple[str, ...] = ()
    """Measure only these sets of the suite; or, without one, these sets or folders below `data`."""
    pretrained: str | None = None
    """Weights of a plain NAME: an open_clip tag or a file."""
    trained: Trained | None = None
    """What weights in a file do not say of themselves: their preprocessing and activation."""
    checkpoint: str = "last"
    """Checkpoint of a run: last, best or the number of a step."""
    weights: Weights = "model"
    """Weights of a run: those that were trained (model), or their moving average (ema)."""
    teacher: str | None = None
    """Of a run with several teachers: the number of the one to measure it by, or all for all that have a text tower
    together, their embeddings side by side. Default: the first that has one."""
    precision: Precision = "fp32"
    """Number format of the model's weights and matrix products."""
    device: str | None = None
    """Where the model runs. Default: cuda if there is a GPU, else cpu."""
    tasks: tuple[EvaluationTask, ...] = ("zero-shot",)
    """What to measure. linear-probe and few-shot train a probe, and need a train split."""
    selection: ProbeSelection = "honest"
    """How the settings of a probe are chosen. honest: by validation images alone, so that test images are looked at
    once. elevater: as the code of ELEVATER (a benchmark of 20 sets) does, by the best epoch on the test images too;
    its results are called test-selected."""
    solver: Solver = "sgd"
    """What trains a probe: sgd as ELEVATER does, or lbfgs, the logistic regression of CLIP's paper."""
    shots: tuple[int, ...] = (5, 20, 50)
    """Training images per class for few-shot."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds by which few-shot draws its images; each is measured."""
    decoder: CpuDecoder = "pillow"
    """How images are decoded. pillow: exactly open_clip's pixels; fast: within 2 of 255 of them, three
    times as fast."""
    batch_size: int = 64
    """Images per batch."""
    threads: int | None = None
    """Decoding threads. Default: one per CPU core."""
    out: str = "evaluations"
    """Folder of all evaluations."""
    name: str | None = None
    """Name of this model's folder below `out`. Default: the model's own name."""
    skip_existing: bool = False
    """Keep results of the same model, images and settings, instead of measuring again."""
    predictions: bool = False
    """Also keep each image's prediction and scores, with a summary."""
    leaks: str | None = None
    """What dimefm leaks found: also measure on the images that the training images have no copy of."""


def default_name(config: EvaluationConfig) -> str:
    """The name of the results' folder: the model's own name, with tag, checkpoint, weights and teacher if they are not
    the defaults."""
    model = config.model.removeprefix("local-dir:").removeprefix("hf-hub:").rstrip("/")
    parts = [model if "/" not in model else model.rpartition("/")[2], config.pretrained or ""]
    parts += [config.checkpoint if config.checkpoint != "last" else "", "ema" if config.weights == "ema" else ""]
    parts += [f"teacher-{config.teacher}" if config.teacher else ""]
    return re.sub(r"[^\w.-]+", "-", "-".join(part for part in parts if part)).strip("-.") or "model"


@dataclass(frozen=True)
class ChosenSet:
    """A known set, with its `definition`, or an own set, with its `folder`."""

    name: str
    definition: SetDefinition | None = None
    folder: str = ""

    @property
    def suite(self) -> str:
        """The suite of its results."""
        return self.definition.suite if self.definition else OWN

    @property
    def title(self) -> str:
        """The name of its files, as EvaluationResult.title: an own set may be called as a known one."""
        return self.name if self.definition else f"{OWN}-{self.name}"

    @property
    def squash(self) -> bool:
        """Whether its images are resized without keeping the aspect ratio."""
        return self.definition is not None and self.definition.resize == "squash"


def choose_sets(config: EvaluationConfig) -> list[ChosenSet]:
    """The sets that the config names. Raises SourceError for what is neither a known set nor a folder, for two sets of
    one name, and if no set is named."""
    known = load_definitions()
    if (config.suite or config.sets) and not config.data:
        raise SourceError("the folder that holds the sets is not given", remedy="give --data ROOT")
    chosen = [ChosenSet(set_name(path), folder=path) for path in config.folders]
    named = config.sets or tuple(n for n, d in known.items() if config.suite in ("all", d.suite))
    for name in named:
        aliases = {alias: d.name for d in known.values() for alias in d.aliases}
        definition = known.get(name) or known.get(aliases.get(name, ""))
        if definition is None and not storage.listing(storage.join(config.data or "", name)):
            what = f"{name} is neither a known set nor a folder of {config.data}"
            names = [*known, *(one for one in storage.listing(config.data or "") if "." not in one)]
            raise SourceError(what, remedy=did_you_mean(name, names, "dimefm sets lists the known ones"))
        if definition is not None and config.suite not in (None, "all", definition.suite):
            what = f"{name} is a set of the suite {definition.suite}, not of {config.suite}"
            raise SourceError(what, remedy="leave --suite out, or give --suite all")
        folder = "" if definition else storage.join(config.data or "", name)
        chosen.append(ChosenSet(definition.name if definition else name, definition, folder))
    titles = [one.title for one in chosen]
    repeated = next((one.name for one in chosen if titles.count(one.title) > 1), None)
    if repeated is not None:
        raise SourceError(f"two sets are called {repeated!r}", remedy="give folders with different names")
    if not chosen:
        what = f"no known set has the suite {config.suite}" if config.suite else "no set is chosen"
        raise SourceError(what, remedy="name a folder, or give another --suite, or --sets, with --data")
    for path in (*config.folders, *filter(None, [config.data])):
        require_folder(path)
    return chosen
