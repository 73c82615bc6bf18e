"""The config of a training run. Written into the run folder as it is, and read back from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cache_schemas import parse_dataclass, to_plain
from cache_schemas.identity import Activation, Precision
from dimefm.errors import TrainingError

MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights, temperatures and switches; the defaults are the paper's released recipe.

    Weights: `vl`, `pvl`, `udist` are the paper's; `cosine` is plain regression of the cached embedding, `centred` the
    same after the mean of the teacher's image embeddings is taken off both sides; `contrastive` is CLIP's own loss with
    each image's best retrieved sentence, and needs pairs.

    Switches, off by default:
    `logit_scale`: "fixed" is `scale` for teacher and student; "teacher" is the scale that the teacher was trained with;
    "learned" is a parameter for the student's logits beside a fixed teacher, begun at `scale` and held within
    [1, 100] as CLIP's (Radford et al. 2021).
    `square_temperature` multiplies vl, pvl and udist by T^2, so that their gradients do not shrink with the temperature
    (Hinton et al. 2015, arXiv:1503.02531).
    `mask_diagonal` takes an image's own embedding out of pvl and udist. At T = 3 and a mean cosine of 0.5 it has
    0.99996 of the target's mass.
    `queue` rows of earlier steps, teacher's and student's, stand beside the batch in vl, pvl and udist (He et al. 2020,
    arXiv:1911.05722): as many more images to tell apart, at the price of students a few steps old.
    """

    WEIGHTS: ClassVar[tuple[str, ...]] = ("vl", "pvl", "udist", "cosine", "centred", "contrastive")

    vl: float = 0.7
    pvl: float = 0.3
    udist: float = 0.0
    cosine: float = 0.0
    centred: float = 0.0
    contrastive: float = 0.0
    vl_temperature: float = 1.0
    pvl_temperature: float = 3.0
    udist_temperature: float = 7.0
    scale: float = 100.0
    logit_scale: Literal["fixed", "teacher", "learned"] = "fixed"
    square_temperature: bool = False
    mask_diagonal: bool = False
    queue: int = 0

    def problems(self) -> list[str]:
        """What makes no sense, in words."""
        wrong = [f"loss.scale must be {MAX_SCALE:g} at most to be learned, found {self.scale:g}"] * (
            self.logit_scale == "learned" and not 1 <= self.scale <= MAX_SCALE
        )
        wrong += [f"loss.{name} must not be below 0" for name in (*self.WEIGHTS, "queue") if getattr(self, name) < 0]
        for name in ("vl_temperature", "pvl_temperature", "udist_temperature", "scale"):
            if getattr(self, name) <= 0:
                wrong.append(f"loss.{name} must be above 0, found {getattr(self, name)}")
        if not any(getattr(self, name) for name in self.WEIGHTS):
            wrong.append("every loss has weight 0")
        scores = self.vl or self.pvl or self.udist
        if not scores:
            wrong += [f"loss.{n} needs vl, pvl or udist" for n in ("square_temperature", "queue") if getattr(self, n)]
        if self.mask_diagonal and not (self.pvl or self.udist):
            wrong.append("loss.mask_diagonal needs pvl or udist")
        if self.logit_scale != "fixed" and not (scores or self.contrastive):
            wrong.append("loss.logit_scale needs vl, pvl, udist or contrastive")
        return wrong


@dataclass(frozen=True, kw_only=True)
class TextMix:
    """Shares of a text batch: any sentence, a visually grounded one (of the selection, or retrieved by some image), one
    that was retrieved for an image of the same batch. They add up to 1."""

    WEIGHTS: ClassVar[tuple[str, ...]] = ("random", "selected", "retrieved")

    random: float = 1.0
    selected: float = 0.0
    retrieved: float = 0.0

    def counts(self, total: int) -> tuple[int, int, int]:
        """How many of `total` texts come from each; the random ones take up what rounding leaves."""
        selected, retrieved = round(self.selected * total), round(self.retrieved * total)
        return total - selected - retrieved, selected, retrieved


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

    `init` is where the image tower's first weights come from, see models.first_weights; `init_mean`, `init_std` and
    `init_activation` are what they were trained with, where they do not say it. `accumulate` splits each step into so
    many passes, with the loss and gradient of the whole batch (training.tower_trainer). `clip_grad` is the largest norm
    of the whole gradient. `ema` is the decay of the moving average of the weights (training.moving_average).
    `checkpoint_every` is in steps, None for every ten minutes.

    What is left to the machine (training.machine_settings) is decided when a run begins, and kept by it: `precision`
    "auto"; `threads`, those that torch computes with on a CPU, on which sums depend to the last bit. `workers` are the
    processes of each training process that read images, None for as many as it has use for. `accept_slow` trains from
    Parquet files without pixels in the store all the same (dimefm.training.feed).

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
    precision: Literal["auto", Precision] = "auto"
    threads: int | None = None
    pairs: str | None = None
    selection: str | None = None
    init: str | None = None
    init_mean: tuple[float, float, float] | None = None
    init_std: tuple[float, float, float] | None = None
    init_activation: Activation | None = None
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
