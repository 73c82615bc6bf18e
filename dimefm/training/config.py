"""The config of a training run. It is written into run.json as it is, and read back from there.

The line below a field says what it is; the options of `dimefm train-student` take their help from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar, Literal

from cache_schemas import parse_dataclass, to_plain
from cache_schemas.identity import Activation, Precision
from cache_schemas.views import Augment
from dimefm.errors import TrainingError
from dimefm.training.ranges import out_of_range

MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights, temperatures and switches of the losses (training.losses); the defaults are the paper's released recipe.

    `logit_scale`: a learned scale stands beside a fixed one of the teacher (Radford et al. 2021).
    `square_temperature` is from Hinton et al. 2015, `queue` from He et al. 2020: as many more images to tell apart, at
    the price of students that are a few steps old.
    `mask_diagonal`: at T = 3 and a mean cosine of 0.5 an image's own embedding has 0.99996 of the target's mass.
    Losses in `OF_TEXTS` need sentences.
    """

    WEIGHTS: ClassVar[tuple[str, ...]] = ("vl", "pvl", "udist", "cosine", "centred", "contrastive")
    OF_TEXTS: ClassVar[tuple[str, ...]] = ("vl", "contrastive")

    vl: float = 0.7
    """Weight of the paper's vision-language loss: KL of the teacher's and the student's scores, over texts for each
    image and over images for each text."""
    pvl: float = 0.3
    """Weight of the paper's pseudo vision-language loss: as vl, with the teacher's embeddings of images in place of
    sentences."""
    udist: float = 0.0
    """Weight of the paper's uni-modal distance loss: KL of the teacher's and the student's scores between images."""
    cosine: float = 0.0
    """Weight of plain regression of the cached embedding, 1 - cosine."""
    centred: float = 0.0
    """Weight of the same regression after the mean of the teacher's image embeddings is taken off both sides."""
    contrastive: float = 0.0
    """Weight of CLIP's own loss between each image and one of its `captions`, or else its best sentence of `pairs`."""
    vl_temperature: float = 1.0
    """Temperature of both softmaxes in vl."""
    pvl_temperature: float = 3.0
    """Temperature of both softmaxes in pvl."""
    udist_temperature: float = 7.0
    """Temperature of both softmaxes in udist."""
    scale: float = 100.0
    """Factor between cosines and logits, for teacher and student."""
    logit_scale: Literal["fixed", "teacher", "learned"] = "fixed"
    """Scale of the logits. fixed: `scale`; teacher: the scale that the teacher was trained with; learned: a parameter
    for the student's logits, begun at `scale` and held within [1, 100] as CLIP's."""
    square_temperature: bool = False
    """Multiply vl, pvl and udist by T^2, so that a higher temperature does not shrink their gradients
    (arXiv:1503.02531)."""
    mask_diagonal: bool = False
    """Take an image's own embedding out of pvl and udist, where it has nearly all of the target's mass."""
    queue: int = 0
    """Rows of earlier steps, teacher's and student's, that stand beside the batch in vl, pvl and udist
    (arXiv:1911.05722)."""

    def problems(self) -> list[str]:
        """Settings that make no sense, in words."""
        temperatures = ("vl_temperature", "pvl_temperature", "udist_temperature", "scale")
        numbers = out_of_range(self, above_0=temperatures, not_below_0=(*self.WEIGHTS, "queue"))
        wrong = [f"loss.{problem}" for problem in numbers]
        if self.logit_scale == "learned" and not 1 <= self.scale <= MAX_SCALE:
            wrong.append(f"loss.scale must be from 1 to {MAX_SCALE:g} to be learned, found {self.scale:g}")
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
    """Shares of the sentences of a step, by where they are drawn from. They add up to 1."""

    WEIGHTS: ClassVar[tuple[str, ...]] = ("random", "selected", "retrieved", "captions")

    random: float = 1.0
    """Share drawn from all sentences of the text store."""
    selected: float = 0.0
    """Share drawn from the visually grounded ones: those of `selection`, else those retrieved for some image."""
    retrieved: float = 0.0
    """Share drawn from sentences that were retrieved for an image of the same batch."""
    captions: float = 0.0
    """Share drawn from the captions of the images of the same batch."""

    def problems(self) -> list[str]:
        """Shares that make no sense, in words."""
        wrong = [f"text_mix.{problem}" for problem in out_of_range(self, above_0=(), not_below_0=self.WEIGHTS)]
        if not wrong and abs(sum(vars(self).values()) - 1) > 1e-6:
            typed = ",".join(f"{kind}={share:g}" for kind, share in vars(self).items() if share) or "of no share"
            wrong.append(f"the text mix {typed} does not add up to 1")
        return wrong

    def counts(self, total: int) -> tuple[int, int, int, int]:
        """How many of `total` texts come from each; the random ones take up what rounding leaves."""
        selected, retrieved, captions = (
            round(share * total) for share in (self.selected, self.retrieved, self.captions)
        )
        return total - selected - retrieved - captions, selected, retrieved, captions


MAY_DIFFER = ("images", "texts", "more_images", "more_texts", "pairs", "captions", "selection", "image_selection",
              "out", "val", "val_texts", "workers", "log_every", "log_to", "log_project", "device", "checkpoint_every",
              "keep", "accept_slow", "cache_dir", "cache_size", "gradient_checkpointing")  # fmt: skip
"""Fields in which a resumed run may differ from its start: they say where things are, how fast and how often, not what
is computed."""

NEVER_DIFFER = ("student", "image_size", "text_student", "init", "init_mean", "init_std", "init_activation",
                "batch_size", "text_batch_size", "optimizer", "layer_decay")  # fmt: skip
"""Fields that --allow-changes cannot name: a checkpoint has these towers' weights, the state of this optimizer for the
parameters in these groups, and counts in these batches."""

NEVER_DIFFER_IN_LOSS = ("queue", "logit_scale")
"""The same within `loss` and `text_loss`: a checkpoint has this state."""


_TEXT_LOSS, _TEXT_BATCH = LossConfig(vl=0.0, pvl=0.0, cosine=1.0), 256


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a student. A store of views brings its own crops, flips and operations.

    `text_loss` and `text_batch_size` are for a `text_student`. What is left to the machine, precision "auto" and
    `threads` None, is decided when a run begins and kept by it (training.machine_settings).
    """

    images: str
    """Image store: embeddings of the images to train on. Several of one teacher: A.zarr::B.zarr. Of several teachers: a
    store each, of the same images."""
    texts: str | None
    """Text store: embeddings of the sentences to train with; not needed by losses without sentences. Of several
    teachers: a store each, in the order of `images`; teachers without one come last."""
    out: str
    """Run folder to write."""
    student: str
    """Image tower: an open_clip model such as ViT-B-32, a timm model such as resnet18, or NAME.json: a file with a
    config as open_clip's models have."""
    epochs: float
    """Length of the run in passes over the images; may be a fraction."""
    batch_size: int
    """Images per step, of all processes together."""
    texts_per_step: int
    """Sentences per step that the vl loss compares images with; may be far more than the images."""
    lr: float
    """Learning rate at its peak, after the warm-up."""
    min_lr: float
    """Learning rate that the cosine ends with."""
    warmup_lr: float
    """Learning rate that the warm-up begins with."""
    warmup_epochs: float
    """Epochs in which the learning rate rises to its peak."""
    weight_decay: float
    """Weight decay; vectors, biases and embeddings of positions and tokens have none."""
    loss: LossConfig
    """Weights of the losses, such as vl=0.7,pvl=0.3; others are 0. The student learns its teacher's scores of images
    with sentences (vl), with the teacher's images (pvl) or with its own (udist); the embeddings themselves (cosine, or
    centred: less their mean); or each image's own sentence, a caption or the best retrieved one (contrastive)."""
    text_mix: TextMix
    """Shares of the sentences of a step that are random, selected, retrieved and captions of its images, such as
    random=0.5,captions=0.5; they add up to 1."""
    crop_scale: tuple[float, float]
    """Smallest and largest share of an image's area in a random crop; for images that were cached whole."""
    more_images: tuple[str, ...] = ()
    """Image stores of further teachers, of the same images as `images`."""
    more_texts: tuple[str, ...] = ()
    """Text stores of further teachers, in the order of `more_images`. A teacher without one has only those losses that
    need no sentences."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each teacher's losses, in the order of their stores, such as [1,0.5]. Default: 1 each."""
    teacher_scales: tuple[float, ...] = ()
    """Factor between cosines and logits for each teacher, in the order of their stores. Default: `loss.scale` for
    all."""
    precision: Literal["auto", Precision] = "auto"
    """Number format of matrix products. auto: bf16 on CPUs with AMX and on recent GPUs; else fp32 on a CPU, fp16 on a
    GPU."""
    threads: int | None = None
    """Threads of torch in each process; on a CPU sums depend on them to the last bit. Default: its cores, or
    OMP_NUM_THREADS."""
    image_weights: tuple[float, ...] = ()
    """How often the images of each of several stores are shown in an epoch, such as 1::2. Default: once."""
    pairs: str | None = None
    """Nearest sentences of each image, from retrieve; for retrieved sentences, for selected ones without `selection`,
    and for the contrastive loss."""
    captions: str | None = None
    """Captions of the images, from cache-images; for captions in the text mix, and for the contrastive loss, for which
    one of each image is drawn anew in each step."""
    selection: str | None = None
    """Selection, from select-texts; for selected sentences and for `text_student`."""
    image_selection: str | None = None
    """Selection, from select-images or leaks: only its images are trained on."""
    init: str | None = None
    """First weights of the image tower: an open_clip tag, timm, a file, or an open_clip folder. Default: random."""
    init_mean: tuple[float, float, float] | None = None
    """Mean colour, from 0 to 1, that the first weights were trained with, where they do not say it."""
    init_std: tuple[float, float, float] | None = None
    """Standard deviation of colours that the first weights were trained with, where they do not say it."""
    init_activation: Activation | None = None
    """Activation that the first weights were trained with, where they do not say it."""
    text_student: str | None = None
    """Distil the text tower of this open_clip model too. Default: the student keeps the teacher's text tower."""
    text_batch_size: int = _TEXT_BATCH
    """Sentences per step for the text tower, of all processes together."""
    text_loss: LossConfig = _TEXT_LOSS
    """Losses of the text tower, with the fields of loss; images and texts are in each other's place."""
    val: tuple[str, ...] = ()
    """Labelled set to validate on."""
    val_texts: str | None = None
    """Text store that has all prompts of the `val` sets. Default: the one of `texts`."""
    val_every: float = 1.0
    """Epochs between validations; may be a fraction."""
    image_size: int | None = None
    """Side of the images that the student sees, in pixels. Default: the model's own."""
    flip: bool = True
    """Flip half of the images from left to right; for images that were cached whole."""
    augment: Augment = "crop"
    """What is done to images that were cached whole. crop: a random crop, and a flip; strong: then operations of
    RandAugment and changes of brightness, contrast and colour, as in strong views."""
    optimizer: str = "adamw"
    """AdamW, or an optimizer of timm such as lion or lamb, with the rest as timm has it: an SGD has momentum 0.9."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one before it, such as 0.75; the projection has all of it.
    Default: all layers have."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimizer's two moving averages. Another than AdamW has its own in place of 0.9,0.999."""
    eps: float = 1e-8
    """Epsilon of the optimizer. Another than AdamW has its own in place of 1e-8."""
    accumulate: int = 1
    """Passes that each step is split into, to save memory; loss and gradient stay those of the whole batch."""
    gradient_checkpointing: bool = False
    """Compute the inside of the towers' blocks again in the backward pass, in place of keeping it in memory; the
    student stays the same."""
    patch_dropout: float = 0.0
    """Share of an image's patches that a vision transformer leaves out in training, such as 0.5; a step takes about as
    much less time and memory."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; a larger one is scaled down. Default: no limit."""
    batch_norm: Literal["sync", "local", "frozen"] | None = None
    """Statistics of batch norm. sync: of the images of all processes, so that the student does not depend on their
    number; local: each process normalises by its own images; frozen: those of the first weights. Default: sync."""
    ema: float | None = None
    """Decay per step of a moving average of the weights, such as 0.9998. Default: no average."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    seed: int = 0
    """Seed of every random choice: first weights, order of rows, crops, sentences."""
    max_steps: int | None = None
    """Length of the run in steps, if `epochs` would be longer."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: one every ten minutes."""
    keep: int = 2
    """Number of latest checkpoints to keep, beside the best."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    log_to: Literal["trackio", "wandb"] | None = None
    """Tracker that gets what metrics.jsonl gets, as one run through all resumes: pip install "dimefm[wandb]" or
    "dimefm[trackio]". Default: none."""
    log_project: str | None = None
    """Project of the tracker that the run is shown in. Default: dimefm."""
    workers: int | None = None
    """Processes per training process that decode images; 0: it decodes them itself. Default: by cores and memory."""
    cache_dir: str | None = None
    """Folder on a local disk that keeps what is read of stores at URLs, ahead of need; processes and runs of a machine
    may share it. Default: none."""
    cache_size: int | None = None
    """Bytes that `cache_dir` may have; what was not used for the longest time goes first. Default: what leaves a tenth
    of the disk free."""
    device: str | None = None
    """Where the student trains. Default: cuda if there is a GPU, else cpu."""
    accept_slow: bool = False
    """Train from Parquet files without pixels in the store, although that is slow."""

    def __post_init__(self) -> None:
        wrong = self._values_out_of_range() + self.loss.problems() + self.text_mix.problems() + self._text_problems()
        wrong = wrong or self._teacher_problems()
        wrong += self._options_without_effect()
        if wrong:
            raise TrainingError("; ".join(wrong), remedy="change the named options; train-student --fields lists all")

    def _values_out_of_range(self) -> list[str]:
        wrong = out_of_range(
            self,
            above_0=("epochs", "batch_size", "texts_per_step", "text_batch_size", "lr", "accumulate", "keep",
                     "checkpoint_every", "log_every", "val_every", "image_size", "clip_grad", "max_steps", "eps",
                     "threads", "init_std", "cache_size", "image_weights", "teacher_weights", "teacher_scales"),
            not_below_0=("min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "workers", "seed", "init_mean",
                         "patch_dropout"),
        )  # fmt: skip
        if any(" must be a number" in problem for problem in wrong):
            return wrong  # the rest compares numbers
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            wrong.append(f"crop_scale must be 0 < low <= high <= 1, found {self.crop_scale}")
        if not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"betas must be 0 <= beta < 1, found {self.betas}")
        for name in ("ema", "layer_decay"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                wrong.append(f"{name} must lie between 0 and 1, found {value}")
        if self.patch_dropout >= 1:
            wrong.append(f"patch_dropout must be below 1, found {self.patch_dropout}")
        if self.seed >= 2**63:
            wrong.append(f"seed must be below 2^63, found {self.seed}")
        if self.log_project is not None and not re.fullmatch(r"[\w-]{1,100}", self.log_project, re.ASCII):
            wrong.append(f"log_project may have letters, digits, - and _, found {self.log_project!r}")
        wrong += [
            f"{name} is in parts of 1, found {value}: divide by 255"
            for name, value in (("init_mean", self.init_mean), ("init_std", self.init_std))
            if value and max(value) > 1
        ]
        return wrong

    def _options_without_effect(self) -> list[str]:
        idle = []
        if self.val_texts and self.text_student:
            idle.append("val_texts has no effect with a text_student")
        elif self.val_texts and not self.val:
            idle.append("val_texts has no effect without val")
        given = [name for name in ("init_mean", "init_std", "init_activation") if getattr(self, name) is not None]
        if given and not self.init:
            idle.append(f"{', '.join(given)}: no effect without init")
        if self.batch_norm == "frozen" and not self.init:
            idle.append("batch_norm frozen needs init: random weights have no statistics")
        mix = self.text_mix
        selected_by_pairs = mix.selected and not self.selection  # then all that were retrieved are the selected ones
        by_pairs = self.loss.contrastive and not self.captions  # which take the place of the best retrieved sentence
        if self.pairs and not (mix.retrieved or selected_by_pairs or by_pairs):
            uses = "--text-mix retrieved=..., --text-mix selected=... without a selection, or --loss contrastive=..."
            idle.append(f"pairs are given, but neither the text mix nor the loss draws from them; {uses} would")
        if self.captions and not (mix.captions or self.loss.contrastive):
            uses = "--text-mix captions=... or --loss contrastive=..."
            idle.append(f"captions are given, but neither the text mix nor the loss draws from them; {uses} would")
        if self.selection and not (mix.selected or self.text_student):
            uses = "--text-mix selected=... or --text-student"
            idle.append(f"a selection is given, but the text mix draws nothing from it; {uses} would")
        stores = len(self.images.split("::"))
        if self.image_selection and stores > 1:
            idle.append("image_selection is of one image store, and there are several: leave it out, or cache one")
        if self.image_weights and len(self.image_weights) != stores:
            idle.append(f"image_weights are one for each image store: {len(self.image_weights)} for {stores}")
        if self.image_weights and stores == 1:
            idle.append("image_weights have no effect with one image store")
        for name in ("pairs", "captions"):
            if getattr(self, name) and stores > 1:
                idle.append(
                    f"{name} are of one image store, and there are several: leave {name} out, or cache one store"
                )
        if self.cache_size and not self.cache_dir:
            idle.append("cache_size has no effect without cache_dir")
        if self.log_project and not self.log_to:
            idle.append("log_project has no effect without log_to")
        return idle

    def _text_problems(self) -> list[str]:
        if self.text_student is None:
            changed = self.text_loss != _TEXT_LOSS or self.text_batch_size != _TEXT_BATCH
            return ["text_loss and text_batch_size have no effect without text_student"] if changed else []
        wrong = [f"text_{problem}" for problem in self.text_loss.problems()]
        if self.text_loss.contrastive:
            wrong.append("text_loss.contrastive: a text tower has no pairs to learn from")
        return wrong

    def _teacher_problems(self) -> list[str]:
        """Settings of teachers, and of those without sentences, that make no sense."""
        count, wrong = 1 + len(self.more_images), []
        if len(self.more_texts) >= count or (self.more_texts and self.texts is None):
            wrong.append(f"there are more text stores than image stores ({count}): give one of images for each")
        for name in ("teacher_weights", "teacher_scales"):
            values: tuple[float, ...] = getattr(self, name)
            if values and (count == 1 or len(values) != count):
                wrong.append(f"{name} is one number for each of several teachers; {count} here, found {len(values)}")
        if count > 1 and any("::" in path for path in (self.images, *self.more_images)):
            wrong.append("images: several stores of one teacher, A.zarr::B.zarr, do not go with several teachers")
        if self.teacher_scales and self.loss.logit_scale == "teacher":
            wrong.append("teacher_scales have no effect with loss.logit_scale=teacher: each teacher has its own")
        if self.loss.logit_scale == "learned" and not all(1 <= scale <= MAX_SCALE for scale in self.teacher_scales):
            wrong.append(f"teacher_scales must be from 1 to {MAX_SCALE:g} to be learned, found {self.teacher_scales}")
        if count > 1 and self.captions:
            wrong.append("captions are encoded by one teacher, and there are several: leave captions out")
        if count > 1 and self.text_student:
            wrong.append("text_student: a text tower is distilled from one teacher, and there are several")
        if self.texts is None:
            users = [name for name in ("pairs", "captions", "selection", "text_student") if getattr(self, name)]
            users += ["val without val_texts"] if self.val and not self.val_texts else []
            wrong += [f"{name} needs the sentences of texts" for name in users]
        for number, loss in enumerate(self.teacher_losses(), 1):
            if any(getattr(self.loss, name) for name in LossConfig.WEIGHTS) and loss is None:
                needing = " and ".join(name for name in LossConfig.OF_TEXTS if getattr(self.loss, name))
                which = f"teacher {number} has no text store" if count > 1 else "there is no text store"
                wrong.append(
                    f"{which}, and the loss {needing} needs sentences: give texts, or --loss cosine=1 or another"
                )
        return wrong

    @property
    def teachers(self) -> list[tuple[str, str | None]]:
        """The image store and the text store of each teacher."""
        texts = [*([] if self.texts is None else [self.texts]), *self.more_texts]
        return list(zip_longest((self.images, *self.more_images), texts))

    def teacher_losses(self) -> list[LossConfig | None]:
        """The losses of each teacher: `loss` with its own scale, and without those that it has no sentences for; None
        if nothing is left."""
        found: list[LossConfig | None] = []
        for number, (_, texts) in enumerate(self.teachers):
            changes: dict[str, float] = {} if texts is not None else dict.fromkeys(LossConfig.OF_TEXTS, 0.0)
            if number < len(self.teacher_scales):
                changes["scale"] = self.teacher_scales[number]
            loss = replace(self.loss, **changes) if changes else self.loss  # type: ignore[arg-type]
            found.append(loss if any(getattr(loss, name) for name in LossConfig.WEIGHTS) else None)
        return found

    def steps(self, per_epoch: int) -> int:
        """Length of the run, with so many steps in an epoch."""
        return min(round(self.epochs * per_epoch), self.max_steps or 2**62)

    def warmup_steps(self, per_epoch: int) -> int:
        """Steps of the warm-up."""
        return round(self.warmup_epochs * per_epoch)

    def validation_steps(self, per_epoch: int) -> int:
        """Steps between validations."""
        return max(1, round(self.val_every * per_epoch))

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in run.json."""
        return to_plain(self)  # type: ignore[no-any-return]

    @staticmethod
    def parse(raw: object, where: str) -> TrainConfig:
        """The config in a run.json. Raises SchemaError with every problem."""
        return parse_dataclass(TrainConfig, raw, where)

    def differences(self, other: TrainConfig) -> dict[str, str]:
        """The fields that decide the result and that differ in `other`, each with ``mine != theirs``."""
        mine, theirs = ({**it.to_json(), "batch_norm": it.batch_norm or "local"} for it in (self, other))
        unknown = {"threads"} if self.threads is None else set()  # a run from before they were recorded
        names = [name for name in mine if name not in {*MAY_DIFFER, *unknown} and mine[name] != theirs[name]]
        return {name: " != ".join(_what_differs(mine[name], theirs[name])) for name in names}


def _what_differs(mine: Any, theirs: Any) -> tuple[str, str]:
    """Two values of a field in words; of a loss, or the mix, its parts that differ: `vl=0.7,pvl=0.3`."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return str(mine), str(theirs)
    names = [name for name in mine if mine[name] != theirs[name]]
    first, second = (",".join(f"{name}={values[name]}" for name in names) for values in (mine, theirs))
    return first, second
