"""Stage 2: train a student from cached teacher embeddings. No teacher, no Ray and no FAISS in this process.

Shapes: B images of this process, G images of all, T texts, D embedding width, H height, W width.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch

from dimefm import storage
from dimefm.checkpoint import Checkpoints
from dimefm.collapse import not_finite
from dimefm.config import TrainConfig
from dimefm.data import Augmentation, Batch, Requests, TrainingImages, reader_died, training_loader
from dimefm.distributed import Place, join_group, largest, leave_group, require_same, wait_for_all
from dimefm.errors import StoppedError, TrainingError
from dimefm.initial import load_initial
from dimefm.learner import Learner
from dimefm.lock import writing
from dimefm.machine import describe
from dimefm.machine_settings import decide, loaders
from dimefm.objective import Objective
from dimefm.optim import adamw, learning_rate
from dimefm.order import Order
from dimefm.preprocess import normalise
from dimefm.run import Inputs, open_inputs, plan_run, write_run
from dimefm.runlog import RunLog, last_validation
from dimefm.stopping import Stopping
from dimefm.store import Store
from dimefm.student import build_student, build_text_student, tokenizer_of
from dimefm.text_data import TextBatch, TrainingTexts
from dimefm.textbank import TextBank
from dimefm.validate import Validation

_MEAN_ROWS = 65536
_TEXTS = 1  # tells the order of a text tower's sentences from that of the images


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its steps, and the last validation's top-1 by set."""

    out: str
    steps: int
    validation: dict[str, float]


def train(config: TrainConfig, allow_changes: tuple[str, ...] = ()) -> Result:
    """Train to the end, or go on from the last checkpoint of the same run in `config.out`.

    A run that goes on may differ from its start in the fields named by `allow_changes`; run.json keeps a record. Raises
    TrainingError, MismatchError or StoreError for what the user can mend, and StoppedError after SIGINT or SIGTERM;
    checkpoints stay.
    """
    config = replace(config, out=storage.local(config.out, "a run folder"))
    place = join_group(config.device)
    with writing(config.out) if place.first else nullcontext():
        config, notes = decide(config, place, allow_changes)
        with _threads(config.threads):
            result = _Trainer(config, place, allow_changes).run(notes)
    leave_group(place)
    return result


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """That many torch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Trainer:
    def __init__(self, config: TrainConfig, place: Place, allow_changes: tuple[str, ...]) -> None:
        self.config, self.place = config, place
        self.inputs = inputs = open_inputs(config)
        self.order, self.text_order = _orders(config, inputs, place)
        self.per_epoch = self.order.steps_per_epoch
        self.steps = min(round(config.epochs * self.per_epoch), config.max_steps or 2**62)
        if self.steps < 1:
            raise TrainingError(
                f"{config.epochs:g} epochs of {self.per_epoch} steps are none", remedy="give more --epochs"
            )
        self.checkpoints = Checkpoints(config.out, config.keep)
        done = self.checkpoints.step() or 0
        self.document = plan_run(
            config, inputs, self.steps, machine=describe(str(place.device)), allow_changes=allow_changes, done=done
        )
        self.spec, self.text_spec = self.document.student, self.document.text_student

        torch.manual_seed(config.seed)
        self.image, self.text = self._image_learner(), self._text_learner()
        self.learners = [learner for learner in (self.image, self.text) if learner is not None]
        modules = [m for learner in self.learners for m in (learner.module, learner.objective)]
        self.optimizer = adamw(
            modules, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
        )
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "fp16")
        self.bank = None
        if config.loss.vl or config.loss.contrastive:
            self.bank = TextBank(
                inputs.texts, config.text_mix, inputs.pairs, inputs.selection, seed=config.seed,
                total=config.texts_per_step if config.loss.vl else 0, paired=config.loss.contrastive > 0,
                device=place.device,
            )  # fmt: skip
        self.validation = self._validation() if config.val and place.first else None

    def run(self, notes: list[str]) -> Result:
        """The loop: a batch arrives, a step is taken, and what is due after it is done. `notes` are shown at its
        start."""
        config = self.config
        first = require_same(self._restore(), self.place)
        if first > self.steps:
            what = f"{config.out} has done {first:,} steps already, more than {self.steps:,}"
            raise TrainingError(what, remedy="give more --epochs or --max-steps, or another --out")
        if self.place.first:
            write_run(config.out, self.document)
        if first == self.steps:
            return Result(config.out, self.steps, last_validation(config.out))
        scores: dict[str, float] = {}
        validate_every = max(1, round(config.val_every * self.per_epoch))
        log = RunLog(config.out, first=first, steps=self.steps, enabled=self.place.first)
        for note in notes:
            log.note(note)
        with log, Stopping() as stopping, self._reading(stopping):
            asked = time.monotonic()
            for batch, texts in self._batches(first):
                waited = time.monotonic() - asked
                values = self._step(batch, texts)
                done, last = batch.step + 1, batch.step + 1 == self.steps
                number = 0 if last else largest(stopping.asked or 0, self.place)
                log.step(done, images=config.batch_size, waited=waited)
                if last or number or done % config.log_every == 0:
                    log.train(done, values)
                validated = bool(config.val) and (last or done % validate_every == 0)
                if self.validation and validated:
                    began = time.monotonic()
                    scores = self._validate()
                    log.validation(done, scores, time.monotonic() - began)
                if last or validated or number or done % config.checkpoint_every == 0:
                    self._save(done, scores if validated else {})
                if number:
                    raise self._stopped(number, f"after step {done:,} of {self.steps:,}, which is kept")
                asked = time.monotonic()
        return Result(config.out, self.steps, scores)

    def _step(self, batch: Batch, texts: TextBatch | None) -> dict[str, float]:
        """Each tower's gradients, then the optimiser. Nothing waits for the device before the end."""
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
        self.optimizer.zero_grad(set_to_none=True)
        drawn = batch.texts if self.bank else None
        text_TD = self.bank.embeddings(drawn, device) if self.bank and drawn and config.loss.vl else None
        pair = self.bank.pair(drawn, device) if self.bank and drawn else None
        seed = (config.seed, batch.step)
        values = self.image.learn(
            batch.pixels_B3HW, batch.teacher_BD, text_TD, pair, seed=seed, scaler=self.scaler
        )  # fmt: skip
        if self.text and texts:
            images_GD = self.image.teacher_GD
            found = self.text.learn(
                texts.tokens_BL, texts.teacher_BD, images_GD, None, seed=(*seed, _TEXTS), scaler=self.scaler
            )
            values |= {f"text_{name}": value for name, value in found.items()}
        self.scaler.unscale_(self.optimizer)
        values["grad_norm"] = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for learner in self.learners:
            learner.after_step()
        shown = dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))
        self._require_finite({**shown, "lr": lr}, batch, text_TD)
        return {**shown, "lr": lr, "epoch": batch.epoch}

    def _clip(self) -> torch.Tensor:
        """The norm of the whole gradient, before it is cut down to `clip_grad`."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm: torch.Tensor = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        return norm

    def _require_finite(self, values: dict[str, float], batch: Batch, text_TD: torch.Tensor | None) -> None:
        """Stops the run at the first step whose loss or gradient is not finite, with all that led to it. In fp16 a
        gradient may be: the scaler leaves such a step out and halves its scale, until that is hopeless."""
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if all(math.isfinite(value) for name, value in values.items() if name != "grad_norm" or not scaling):
            return
        cached = {"images": self.image.teacher_GD, "texts": text_TD}
        modules = {"image": self.image.module}
        if self.text:
            cached["sentences"], modules["text"] = self.text.teacher_GD, self.text.module
        raise not_finite(
            batch.step + 1, values, cached, modules, batch.all_rows_G.tolist(), self.config.out, write=self.place.first
        )

    def _batches(self, first: int) -> Iterator[tuple[Batch, TextBatch | None]]:
        config, place = self.config, self.place
        augmentation = Augmentation(
            size=self.spec.image_size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed
        )
        span: dict[str, int] = {"first": first, "steps": self.steps, "rank": place.rank, "world": place.world}
        dataset = TrainingImages(self.inputs.images.path, augmentation, self.bank and self.bank.without_device())
        batch_bytes = config.batch_size // place.world * 3 * self.spec.image_size**2
        workers, ahead = loaders(config.workers, place.device.type, batch_bytes)
        images = training_loader(dataset, Requests(self.order, **span), workers, ahead, pin=place.device.type == "cuda")
        texts: Iterator[TextBatch | None] = repeat(None)
        if self.text_order and self.text_spec:
            texts = training_loader(
                TrainingTexts(self.inputs.texts.path, self.text_spec),
                Requests(self.text_order, **span),
                min(1, workers),
                ahead,
            )
        for text, image in zip(texts, images, strict=False):  # in this order: all are forked before a thread pins
            yield image, text

    @contextmanager
    def _reading(self, stopping: Stopping) -> Iterator[None]:
        """Around the loop: what the death of a process that reads images is, told apart from a signal to all."""
        try:
            with reader_died():
                yield
        except TrainingError:
            if stopping.asked is None:
                raise
            raise self._stopped(stopping.asked, "within a step; the last checkpoint is kept") from None

    def _stopped(self, number: int, when: str) -> StoppedError:
        what = f"{self.config.out} was stopped by {signal.Signals(number).name} {when}"
        return StoppedError(what, signal=number, remedy="the same command goes on from there")

    def _image_learner(self) -> Learner:
        config, spec = self.config, self.spec
        module = build_student(spec)
        if config.init and not self.checkpoints.step():
            load_initial(module, spec, config.init)
        mean_D = mean_embedding(self.inputs.images) if config.loss.centred else None
        return self._learner(module, config.loss, mean_D, partial(normalise, mean=spec.mean, std=spec.std))

    def _text_learner(self) -> Learner | None:
        if self.text_spec is None:
            return None
        mean_D = mean_embedding(self.inputs.texts) if self.config.text_loss.centred else None
        return self._learner(build_text_student(self.text_spec), self.config.text_loss, mean_D, lambda tokens: tokens)

    def _learner(self, module: Any, loss: Any, mean_D: torch.Tensor | None, prepare: Any) -> Learner:
        config, teacher = self.config, self.inputs.images.schema.teacher
        objective = Objective(loss, teacher_scale=teacher.logit_scale, dim=teacher.embed_dim, mean_D=mean_D)
        return Learner(
            module, objective, self.place, prepare=prepare, precision=config.precision,
            accumulate=config.accumulate, ema=config.ema, compile=config.compile,
        )  # fmt: skip

    def _validation(self) -> Validation:
        config = self.config
        if self.text_spec:
            return Validation(config.val, None, self.spec, tokenizer_of(self.text_spec))
        return Validation(config.val, Store(config.val_texts) if config.val_texts else self.inputs.texts, self.spec)

    def _validate(self) -> dict[str, float]:
        """Top-1 by set; of the moving average, too, as ``SET_ema``."""
        assert self.validation
        device, text = self.place.device, self.text
        scores = self.validation.run(self.image.module, text and text.module, device)
        if self.image.average:
            average = text.average.module if text and text.average else None
            found = self.validation.run(self.image.average.module, average, device)
            scores |= {f"{name}_ema": score for name, score in found.items()}
        return scores

    def _save(self, done: int, scores: dict[str, float]) -> None:
        if self.place.first:
            state = {
                "step": done,
                "image": self.image.state_dict(),
                "text": self.text.state_dict() if self.text else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            ranked = [score for name, score in scores.items() if name.endswith("_ema") or not self.config.ema]
            self.checkpoints.save(done, state, sum(ranked) / len(ranked) if ranked else None)
        wait_for_all(self.place)

    def _restore(self) -> int:
        """Load the last checkpoint, if any; the number of steps that are done."""
        state = self.checkpoints.load()
        if state is None:
            return 0
        self.image.load_state_dict(state["image"])
        if self.text:
            self.text.load_state_dict(state["text"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, mine in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(mine)  # those of the config, which --allow-changes may have changed
        if state["scaler"]:  # empty where the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        return int(state["step"])


def mean_embedding(store: Store) -> torch.Tensor:
    """The mean teacher embedding (D,), float32: of all rows, or of 65,536 in whole chunks spread evenly over the store,
    since a chunk is read as a whole to be checked."""
    rows, size = store.schema.rows, store.schema.chunk_rows
    chunks = np.arange(-(-rows // size))
    if rows > _MEAN_ROWS:
        chunks = np.linspace(0, len(chunks) - 1, max(1, _MEAN_ROWS // size)).astype(np.int64)
    spans = [store.read(at, min(at + size, rows)) for at in (chunks * size).tolist()]
    embedding_ND = torch.from_numpy(np.concatenate(spans)).double()
    good_N = embedding_ND.any(dim=1) & embedding_ND.isfinite().all(dim=1)
    return embedding_ND[good_N].mean(dim=0).float()


def _orders(config: TrainConfig, inputs: Inputs, place: Place) -> tuple[Order, Order | None]:
    """The orders of images and, for a text tower, of sentences. Raises TrainingError for a batch that cannot be."""
    images = Order(store=inputs.images, seed=config.seed, batch_size=config.batch_size)
    texts = None
    if config.text_student:
        only = inputs.selection.rows() if inputs.selection else None
        size = config.text_batch_size
        texts = Order(store=inputs.texts, seed=config.seed, batch_size=size, only=only, stream=_TEXTS)
    named = ((images, "a batch", "images", "--batch-size"), (texts, "a text batch", "sentences", "text_batch_size"))
    for order, what, of, option in named:
        if order is None:
            continue
        if order.batch_size % place.world:
            what = f"{what} of {order.batch_size} does not divide over {place.world} processes"
            raise TrainingError(what, remedy=f"give a {option} that does")
        if order.batch_size // place.world < config.accumulate:
            what = f"{what} of {order.batch_size} over {place.world} processes is less than one for each of its passes"
            raise TrainingError(what, remedy="give a smaller --accumulate")
        if order.steps_per_epoch == 0:
            what = f"{what} of {order.batch_size} is more than the {of} with an embedding in {order.store.path}"
            raise TrainingError(what, remedy=f"give a smaller {option}")
    return images, texts
