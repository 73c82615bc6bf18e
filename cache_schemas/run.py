"""The folder of a training run.

RUN/
  run.json                    this document, written once when the run starts
  metrics.jsonl               one JSON object per line: training steps and validations
  events.out.tfevents.*       the same for TensorBoard
  checkpoints/step-*.pt       weights, optimiser, position; last.json and best.json name one of them
  logged-to.jsonl             with log_to: the run's name in trackio or wandb, and the last step that was logged there
  wandb/                      wandb's own files
  stopped-at.json             number, rows and values of a step whose loss or gradient was not finite
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache_schemas.document import Document
from cache_schemas.identity import Activation, TeacherIdentity

Weights = Literal["model", "ema"]  # of a checkpoint: those that were trained, or their moving average

REPORT_FILE = "stopped-at.json"  # of a step that was not finite
RUN_FILE, METRICS_FILE, CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"
LOGGED_TO_FILE = "logged-to.jsonl"

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
"""What an export consists of, as any open_clip model: in a folder, or in a repository of the Hub."""


@dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """An image tower as open_clip describes one: enough to build it again and to export it.

    `vision_cfg` is open_clip's own vision config (a timm_model_name, or a ViT or ResNet of open_clip). `image_size` is
    in pixels; `mean` and `std` are of RGB in [0, 1]. `activation` is that of the teacher too, since an open_clip config
    has one for both towers. `resize_mode` is for evaluation; training sees crops.
    """

    name: str
    vision_cfg: dict[str, object]
    embed_dim: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: Activation
    resize_mode: Literal["shortest", "squash"] = "shortest"


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """A text tower as open_clip describes one, by its own text config. Its output is projected to `embed_dim`."""

    name: str
    text_cfg: dict[str, object]
    embed_dim: int
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class Change:
    """A field of the config that the user changed after `step` steps; `values` are ``before != after``."""

    step: int
    field: str
    values: str


@dataclass(frozen=True, kw_only=True)
class FurtherTeacher:
    """What a run has of a teacher beside its first one: as the fields of Run. One without sentences has no
    `texts_identity`."""

    teacher: TeacherIdentity
    images_identity: str
    images_data: str
    texts_identity: str | None = None
    texts_data: str | None = None


@dataclass(frozen=True, kw_only=True)
class Run(Document):
    """What a run was started with.

    `config` is the training config as it is now; training.config parses it. The order of the rows depends on
    `images_chunk_rows` beside the seed. Without a `text_student` the student has its teacher's text tower. `machine` is
    the kind of CPU or the GPU that the run began on, `processes` the number of processes that torchrun started,
    `images_data` and `texts_data` are the digests of the embeddings that it is trained on; all None in older runs. So
    are `captions_identity` and `captions_data` of the store of captions, where none is used.

    `order` of the rows (training.row_order) and `undecayed`, the parameters without weight decay (training.optimizer),
    are those that the run began with, as is `centred_on`: the rows whose mean the loss `centred` takes off, those that
    are drawn or all that are stored. The defaults are those of older runs.

    With `more_teachers` the student's `embed_dim` is the sum of all teachers' widths: its tower ends in a projection
    for each, side by side, that of `teacher` first.
    """

    SCHEMA: ClassVar[str] = "dimefm.run"
    VERSION: ClassVar[int] = 2

    config: dict[str, object]
    student: StudentSpec
    teacher: TeacherIdentity
    images_identity: str
    images_chunk_rows: int
    texts_identity: str | None
    pairs_digest: str | None
    steps: int
    versions: dict[str, str]
    selection_digest: str | None = None
    image_selection_digest: str | None = None
    text_student: TextSpec | None = None
    machine: str | None = None
    processes: int | None = None
    order: Literal["chunks", "blocks"] = "chunks"
    undecayed: Literal["named", "listed"] = "named"
    centred_on: Literal["stored", "drawn"] = "stored"
    changes: tuple[Change, ...] = ()
    images_data: str | None = None
    texts_data: str | None = None
    more_teachers: tuple[FurtherTeacher, ...] = ()
    captions_identity: str | None = None
    captions_data: str | None = None

    @property
    def teachers(self) -> tuple[TeacherIdentity, ...]:
        """All teachers, in the order of their stores."""
        return self.teacher, *(one.teacher for one in self.more_teachers)
