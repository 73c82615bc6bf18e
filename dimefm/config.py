"""The config of a training run. Written into the run folder as it is, and read back from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cache_schemas import parse_dataclass, to_plain
from dimefm.errors import TrainingError
from dimefm.objective import LossConfig
from dimefm.textbank import TextMix

MAY_DIFFER = ("images", "texts", "pairs", "selection", "out", "val", "val_texts", "workers", "log_every", "device",
              "checkpoint_every", "keep", "accept_slow")  # fmt: skip
"""Fields in which a resumed run may differ from its start: where things are, how fast and how often, not what is
computed."""

NEVER_DIFFER = ("student", "image_size", "text_student", "init", "init_mean", "init_std", "init_activation",
                "batch_size", "text_batch_size")  # fmt: skip
"""Fields that --allow-changes cannot name: a checkpoint has these towers' weights and counts in these batches."""

NEVER_DIFFER_IN_LOSS = ("queue", "logit_scale")
"""The same of `loss` and `text_loss`: a checkpoint has this state."""


_TEXT_LOSS, _TEXT_BATCH = LossConfig(vl=0.0, pvl=0.0, cosine=1.0), 256


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a student. Paths are those of the stores; sizes in images, texts, pixels, epochs.

    `batch_size` is of all processes together, and so is `text_batch_size`. `val` lists labelled sets, whose prompts
    must all be in the text store `val_texts` (default: `texts`). Selected texts of the mix are drawn from `selection`,
    without one from those that `pairs` has for an image or more; a text tower learns from the selection too.
    `crop_scale` and `flip` are for images cached whole: a store of views brings its own crops and flips.

    `init` is where the image tower's first weights come from, see dimefm.initial; `init_mean`, `init_std` and
    `init_activation` are what they were trained with, where they do not say it. `accumulate` splits each step into so
    many passes, with the loss and gradient of the whole batch (dimefm.learner). `clip_grad` is the largest norm of the
    whole gradient. `ema` is the decay of the moving average of the weights (dimefm.average). `checkpoint_every` is in
    steps, None for every ten minutes.

    What is left to the machine (dimefm.machine_settings) is decided when a run begins, and kept by it: `precision`
    "auto"; `threads`, those that torch computes with on a CPU, on which sums depend to the last bit. `workers` are the
    processes of each training process that read images, None for as many as it has use for. `accept_slow` trains from
    Parquet files without pixels in the store all the same (dimefm.feed).

    `text_student` is the open_clip model whose text tower is distilled too, from `text_batch_size` sentences a step and
    their cached embeddings, by `text_loss`, in which images and texts change places; None keeps the teacher's text
    tower.
    """

    images: str
    texts: str
    out: str
    student: str
    epochs: float
    batch_size: int
    texts_per_step: int
    lr: float
    min_lr: float
    warmup_lr: float
    warmup_epochs: float
    weight_decay: float
    loss: LossConfig
    text_mix: TextMix
    crop_scale: tuple[float, float]
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: int | None = None
    pairs: str | None = None
    selection: str | None = None
    init: str | None = None
    init_mean: tuple[float, float, float] | None = None
    init_std: tuple[float, float, float] | None = None
    init_activation: Literal["gelu", "quick_gelu"] | None = None
    text_student: str | None = None
    text_batch_size: int = _TEXT_BATCH
    text_loss: LossConfig = _TEXT_LOSS
    val: tuple[str, ...] = ()
    val_texts: str | None = None
    val_every: float = 1.0
    image_size: int | None = None
    flip: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    accumulate: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    compile: bool = False
    seed: int = 0
    max_steps: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    log_every: int = 50
    workers: int | None = None
    device: str | None = None
    accept_slow: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be above 0, found {getattr(self, name)}"
            for name in ("epochs", "batch_size", "texts_per_step", "text_batch_size", "lr", "accumulate", "keep",
                         "checkpoint_every", "log_every", "val_every", "image_size", "clip_grad", "max_steps", "eps",
                         "threads")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]  # fmt: skip
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            wrong.append(f"crop_scale must be 0 < low <= high <= 1, found {self.crop_scale}")
        if not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"betas must be 0 <= beta < 1, found {self.betas}")
        if self.workers is not None and self.workers < 0:
            wrong.append(f"workers must not be below 0, found {self.workers}")
        if self.val_texts and (self.text_student or not self.val):
            wrong.append("val_texts has no effect " + ("with a text_student" if self.text_student else "without val"))
        if self.ema is not None and not 0 < self.ema < 1:
            wrong.append(f"ema must lie between 0 and 1, found {self.ema}")
        said = [name for name in ("init_mean", "init_std", "init_activation") if getattr(self, name) is not None]
        if said and not self.init:
            wrong.append(f"{', '.join(said)}: no effect without init")
        wrong += self.loss.problems() + self._text_problems()
        drawn = self.text_mix.retrieved or (self.text_mix.selected and not self.selection) or self.loss.contrastive
        if self.pairs and not drawn:
            wrong.append("pairs are given, but neither the text mix nor the loss draws from them")
        if self.selection and not (self.text_mix.selected or self.text_student):
            wrong.append("a selection is given, but the text mix draws nothing from it")
        if wrong:
            raise TrainingError("; ".join(wrong), remedy="change the named options")

    def _text_problems(self) -> list[str]:
        if self.text_student is None:
            changed = self.text_loss != _TEXT_LOSS or self.text_batch_size != _TEXT_BATCH
            return ["text_loss and text_batch_size have no effect without text_student"] if changed else []
        wrong = [f"text_{problem}" for problem in self.text_loss.problems()]
        if self.text_loss.contrastive:
            wrong.append("text_loss.contrastive: a text tower has no pairs to learn from")
        return wrong

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in run.json."""
        return to_plain(self)  # type: ignore[no-any-return]

    @staticmethod
    def parse(raw: object, where: str) -> TrainConfig:
        """The config in a run.json. Raises SchemaError with every problem."""
        return parse_dataclass(TrainConfig, raw, where)

    def differences(self, other: TrainConfig) -> dict[str, str]:
        """The fields that decide the result and in which `other` differs, with what: ``mine != theirs``."""
        mine, theirs = self.to_json(), other.to_json()
        unknown = {"threads"} if self.threads is None else set()  # a run from before they were recorded
        names = [name for name in mine if name not in {*MAY_DIFFER, *unknown} and mine[name] != theirs[name]]
        return {name: f"{mine[name]} != {theirs[name]}" for name in names}
