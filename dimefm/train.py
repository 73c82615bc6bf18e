"""Stage 2: train a student from cached teacher embeddings. No teacher, no Ray and no FAISS in this process.

Shapes: B images of this process, G images of all, T texts, D embedding width, H height, W width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.config import TrainConfig
from dimefm.data import Augmentation, Batch, batches, training_loader
from dimefm.distributed import Place, gather_batch, join_group, leave_group, require_same, wait_for_all
from dimefm.errors import TrainingError
from dimefm.losses import distillation_loss
from dimefm.optim import adamw, learning_rate
from dimefm.order import steps_per_epoch
from dimefm.pairs import Pairs, require_pairs_match
from dimefm.preprocess import normalise
from dimefm.run import open_run
from dimefm.runlog import RunLog, last_validation
from dimefm.selected import SelectedTexts
from dimefm.store import Store, require_same_teacher
from dimefm.student import build_student, has_convolutions
from dimefm.textbank import TextBank
from dimefm.validate import Validation

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MEAN_ROWS = 65536


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its steps, and the last validation's top-1 by set."""

    out: str
    steps: int
    validation: dict[str, float]


def train(config: TrainConfig) -> Result:
    """Train to the end, or go on from the last checkpoint of the same run in `config.out`.

    Raises TrainingError, MismatchError or StoreError for what the user can mend; checkpoints stay.
    """
    config = replace(config, out=storage.local(config.out, "a run folder"))
    place = join_group(config.device)
    try:
        return _Trainer(config, place).run()
    finally:
        leave_group(place)


class _Trainer:
    def __init__(self, config: TrainConfig, place: Place) -> None:
        self.config, self.place = config, place
        self.images, self.texts, self.pairs, self.selection = _open_stores(config)
        self.per_epoch = _steps_per_epoch(config, self.images, place)
        self.steps = min(round(config.epochs * self.per_epoch), config.max_steps or 2**62)
        if self.steps < 1:
            raise TrainingError(
                f"{config.epochs:g} epochs of {self.per_epoch} steps are none", remedy="give more --epochs"
            )
        if not place.first:
            wait_for_all(place)
        document = open_run(config, self.images, self.texts, self.pairs, self.selection, self.steps, write=place.first)
        if place.first:
            wait_for_all(place)
        self.spec = document.student
        self.mean_D = mean_embedding(self.images).to(place.device) if config.loss.centred else None
        self.bank = None
        if config.loss.vl:
            self.bank = TextBank(self.texts, config.text_mix, self.pairs, self.selection, seed=config.seed)
        val_texts = Store(config.val_texts) if config.val_texts else self.texts
        self.validation = Validation(config.val, val_texts, self.spec) if config.val and place.first else None
        self.checkpoints = Checkpoints(config.out)

        torch.manual_seed(config.seed)
        self.model = build_student(self.spec).to(place.device)
        self.layout = torch.channels_last if has_convolutions(self.model) else torch.contiguous_format
        self.model.to(memory_format=self.layout)
        self.tower: Any = DistributedDataParallel(self.model) if place.world > 1 else self.model
        self.optimizer = adamw(
            self.model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
        )
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "fp16")

    def run(self) -> Result:
        """The loop: a batch arrives, a step is taken, and what is due after it is done."""
        config = self.config
        first = require_same(self._restore(), self.place)
        if first >= self.steps:
            return Result(config.out, self.steps, last_validation(config.out))
        scores: dict[str, float] = {}
        validate_every = max(1, round(config.val_every * self.per_epoch))
        with RunLog(config.out, first=first, steps=self.steps, enabled=self.place.first) as log:
            asked = time.monotonic()
            for batch in batches(self._loader(first)):
                waited = time.monotonic() - asked
                values = self._step(batch)
                done, last = batch.step + 1, batch.step + 1 == self.steps
                log.step(done, images=config.batch_size, waited=waited)
                if last or done % config.log_every == 0:
                    log.train(done, values)
                validated = last or done % validate_every == 0
                if self.validation and validated:
                    began = time.monotonic()
                    scores = self.validation.run(self.model, self.place.device)
                    log.validation(done, scores, time.monotonic() - began)
                if validated or done % config.checkpoint_every == 0:
                    self._save(done, scores if validated else {})
                asked = time.monotonic()
        return Result(config.out, self.steps, scores)

    def _step(self, batch: Batch) -> dict[str, float]:
        """Targets in, images forward, losses in float32 over the global batch, backward, optimiser."""
        config, device = self.config, self.place.device
        lr = learning_rate(
            batch.step,
            steps=self.steps,
            warmup_steps=round(config.warmup_epochs * self.per_epoch),
            peak=config.lr,
            warmup_start=config.warmup_lr,
            floor=config.min_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        teacher_text_TD = None
        if self.bank is not None:
            teacher_text_TD = self.bank.sample(batch.step, config.texts_per_step, batch.all_rows_G.numpy()).to(device)
        images = normalise(batch.pixels_B3HW.to(device, non_blocking=True), self.spec.mean, self.spec.std)
        dtype = _DTYPES[config.precision]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features_BD = self.tower(images.to(memory_format=self.layout))
        student_GD = gather_batch(F.normalize(features_BD.float(), dim=-1), self.place)
        teacher_GD = gather_batch(batch.teacher_BD.to(device).float(), self.place)
        loss, parts = distillation_loss(teacher_GD, teacher_text_TD, student_GD, config.loss, self.mean_D)
        values = {"loss": loss.item(), **{name: value.item() for name, value in parts.items()}}
        self._require_finite(values, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {**values, "lr": lr, "epoch": batch.epoch}

    def _require_finite(self, values: dict[str, float], batch: Batch) -> None:
        if math.isfinite(values["loss"]):
            return
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        what = f"step {batch.step + 1}: {listed}; rows {batch.rows_B[:8].tolist()}..."
        raise TrainingError(what, remedy="lower --lr, or use --precision bf16 or fp32; the last checkpoint is whole")

    def _loader(self, first: int) -> Any:
        config, spec = self.config, self.spec
        return training_loader(
            self.images,
            Augmentation(size=spec.image_size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed),
            batch_size=config.batch_size,
            per_epoch=self.per_epoch,
            first=first,
            steps=self.steps,
            workers=config.workers,
            rank=self.place.rank,
            world=self.place.world,
        )

    def _save(self, done: int, scores: dict[str, float]) -> None:
        if self.place.first:
            state = {
                "step": done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
            }
            self.checkpoints.save(done, state, sum(scores.values()) / len(scores) if scores else None)
        wait_for_all(self.place)

    def _restore(self) -> int:
        """Load the last checkpoint, if any; the number of steps that are done."""
        state = self.checkpoints.load()
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        return int(state["step"])


def mean_embedding(images: Store) -> torch.Tensor:
    """The mean teacher embedding (D,), float32, over at most 65,536 rows spread evenly over the store."""
    rows = np.linspace(0, images.schema.rows - 1, min(images.schema.rows, _MEAN_ROWS)).astype(np.int64)
    embedding_ND = torch.from_numpy(images.gather(rows)).double()
    return embedding_ND[embedding_ND.any(dim=1)].mean(dim=0).float()


def _open_stores(config: TrainConfig) -> tuple[Store, Store, Pairs | None, SelectedTexts | None]:
    """The finished stores of a run, checked against each other."""
    images, texts = Store(config.images), Store(config.texts)
    for store, kind in ((images, "image"), (texts, "text")):
        store.require_kind(kind)
        store.require_complete()
    require_same_teacher(images, texts)
    pairs = Pairs(config.pairs) if config.pairs else None
    if pairs:
        require_pairs_match(pairs, images, texts)
    selection = SelectedTexts(config.selection) if config.selection else None
    if selection:
        selection.require_texts(texts)
    if config.val_texts:
        require_same_teacher(images, Store(config.val_texts))
    return images, texts, pairs, selection


def _steps_per_epoch(config: TrainConfig, images: Store, place: Place) -> int:
    if config.batch_size % place.world:
        what = f"a batch of {config.batch_size} does not divide over {place.world} processes"
        raise TrainingError(what, remedy="give a --batch-size that does")
    steps = steps_per_epoch(images, config.batch_size)
    if steps == 0:
        what = f"a batch of {config.batch_size} is more than the images with an embedding in {images.path}"
        raise TrainingError(what, remedy="give a smaller --batch-size")
    return steps
