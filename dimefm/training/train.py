"""Stage 2: train a student from cached teacher embeddings. No teacher, no Ray and no FAISS in this process.

Shapes: B images of this process, G images of all, T texts, D embedding width, H height, W width; P parameters.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dimefm.errors import StoppedError, TrainingError
from dimefm.images.preprocess import normalise
from dimefm.models.first_weights import load_first_weights
from dimefm.models.towers import build_student, build_text_student, notes_on_preparation, tokenizer_of
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.machine import describe
from dimefm.system.named_paths import allowing
from dimefm.system.transfer import Arriving, Transfer, fetch
from dimefm.training.checkpoints import Checkpoints, CheckpointWriter
from dimefm.training.config import TrainConfig
from dimefm.training.distributed import (
    Place,
    Vote,
    find_place,
    join_group,
    leave_group,
    require_same_step,
    wait_for_all,
)
from dimefm.training.feed import TEXT_STREAM, Feed, notes_on_remote_data, open_feed
from dimefm.training.image_batches import Batch, explain_reader_death
from dimefm.training.machine_settings import decide_settings
from dimefm.training.not_finite import explain_out_of_memory, not_finite_error
from dimefm.training.objective import Objective
from dimefm.training.optimizer import adamw, learning_rate
from dimefm.training.run_folder import plan_run, write_run
from dimefm.training.run_log import RunLog, last_validation
from dimefm.training.stop_signal import StopSignal
from dimefm.training.text_batches import TextBatch
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.validation import Validation

_MEAN_ROWS = 65536
_SECONDS_BETWEEN_CHECKPOINTS = 600.0


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
    place = find_place(config.device)
    lock = writing(config.out) if place.first else nullcontext()
    with allowing(config.val), lock, open_feed(config, place) as feed, explain_reader_death():
        join_group(config.device)  # from here on nothing is forked
        config, notes = decide_settings(config, place, allow_changes)
        notes += notes_on_remote_data(feed.inputs, feed.bank, feed.order)
        with _threads(config.threads):
            result = _Trainer(config, place, feed, allow_changes).run(notes)
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


@dataclass(frozen=True)
class _Taken:
    """A step that the device has been given by the time `at`, whose values are on their way; and what is told of it if
    they are not finite: `cached` embeddings that went in, and `parameters`, the norms of whose gradients are on their
    way too."""

    step: int
    epoch: int
    waited: float
    at: float
    lr: float
    names: list[str]
    arriving: Arriving
    rows_G: torch.Tensor
    cached: dict[str, torch.Tensor | None]
    parameters: list[torch.Tensor]


class _Trainer:
    def __init__(self, config: TrainConfig, place: Place, feed: Feed, allow_changes: tuple[str, ...]) -> None:
        self.config, self.place, self.feed, self.inputs = config, place, feed, feed.inputs
        self.document = plan_run(
            config, feed.inputs, feed.steps, machine=describe(str(place.device)), processes=place.world,
            order=feed.order, allow_changes=allow_changes, done=feed.first_step,
        )  # fmt: skip
        self.spec, self.text_spec = self.document.student, self.document.text_student
        self.checkpoints = Checkpoints(config.out, config.keep)
        self.saving = CheckpointWriter(self.checkpoints)
        self.saved_at = time.monotonic()

        torch.manual_seed(config.seed)
        self.image, self.text = self._image_learner(), self._text_learner()
        self.learners = {"image": self.image} | ({"text": self.text} if self.text else {})
        modules = [m for learner in self.learners.values() for m in (learner.module, learner.objective)]
        self.optimizer = adamw(
            modules, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps,
            undecayed=self.document.undecayed,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "fp16")
        self.one = torch.ones((), device=place.device)
        self.transfer = Transfer(place.device)
        self.validation = self._validation() if config.val else None

    def run(self, notes: list[str]) -> Result:
        """The loop: a batch arrives, the device is given a step, and what is due after it is done. `notes` are shown at
        its start.

        The values of a step are read when the device has been given the next one, so that it always has work; or at
        once where anything is to follow from them, so that nothing is kept of a step that is not finite.
        """
        config, feed, first, steps = self.config, self.feed, self.feed.first_step, self.feed.steps
        if require_same_step(self._restore(), self.place) > steps:
            what = f"{config.out} has done {first:,} steps already, more than {steps:,}"
            raise TrainingError(what, remedy="give more --epochs or --max-steps, or another --out")
        if self.place.first:
            write_run(config.out, self.document)
        if first == steps:
            return Result(config.out, steps, last_validation(config.out))
        scores: dict[str, float] = {}
        validate_every = max(1, round(config.val_every * feed.steps_per_epoch))
        log, vote = RunLog(config.out, first=first, steps=steps, enabled=self.place.first), Vote(self.place)
        said = self.validation.take_notes() if self.validation else []
        for note in [*notes, *notes_on_preparation(self.spec, self.inputs.images.schema.teacher), *said]:
            log.note(note)
        memory = explain_out_of_memory(config.batch_size // self.place.world, config.accumulate, self.spec.image_size)
        with log, self.saving, StopSignal() as stop, self._reading(stop), memory:
            if feed.bank:
                feed.bank.upload(self.place.device)
            asked, before = time.monotonic(), None
            for batch, texts in feed.batches:
                taken = self._step(batch, texts, waited=time.monotonic() - asked)
                if before:
                    self._finish(before, log)
                done, last = batch.step + 1, batch.step + 1 == steps
                number = 0 if last else vote.cast(stop.received or 0)
                validated = bool(config.val) and (last or done % validate_every == 0)
                save = last or validated or number > 0 or self._checkpoint_is_due(done)
                if save:
                    self._finish(taken, log, show=last or number > 0)
                if self.validation and validated:
                    began = time.monotonic()
                    scores = self._validate()
                    log.validation(done, scores, time.monotonic() - began)
                    for note in self.validation.take_notes():
                        log.note(note)
                self.saving.check()
                if save:
                    log.flush()
                    self._save(done, scores if validated else {})
                if last or number:
                    self.saving.wait()
                    wait_for_all(self.place)
                if number:
                    raise self._stopped(number, f"after step {done:,} of {steps:,}, which is kept")
                asked, before = time.monotonic(), None if save else taken
        return Result(config.out, steps, scores)

    def _step(self, batch: Batch, texts: TextBatch | None, *, waited: float) -> _Taken:
        """Give the device a step: each tower's gradients, then the optimiser. Nothing here waits for it."""
        config, send, bank = self.config, self.transfer.send, self.feed.bank
        lr = learning_rate(
            batch.step,
            steps=self.feed.steps,
            warmup_steps=round(config.warmup_epochs * self.feed.steps_per_epoch),
            peak=config.lr,
            warmup_start=config.warmup_lr,
            floor=config.min_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        text_TD = bank.embeddings(batch.texts, send) if bank and batch.texts and config.loss.vl else None
        pair = bank.pair(batch.texts, send) if bank and batch.texts else None
        seed = (config.seed, batch.step)
        values = self.image.learn(
            send(batch.pixels_B3HW), send(batch.teacher_BD), text_TD, pair, seed=seed, scaler=self.scaler
        )  # fmt: skip
        cached: dict[str, torch.Tensor | None] = {"images": self.image.teacher_GD, "texts": text_TD}
        if self.text and texts:
            images_GD = self.image.teacher_GD
            found = self.text.learn(
                send(texts.tokens_BL),
                send(texts.teacher_BD),
                images_GD,
                None,
                seed=(*seed, TEXT_STREAM),
                scaler=self.scaler,
            )
            values |= {f"text_{name}": value for name, value in found.items()}
            cached["sentences"] = self.text.teacher_GD
        self.scaler.unscale_(self.optimizer)
        parameters, norm_P, values["grad_norm"] = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for learner in self.learners.values():
            learner.after_step()
        arriving = fetch(torch.stack([v.float() for v in values.values()]), norm_P, self.scaler.scale(self.one))
        return _Taken(
            batch.step, batch.epoch, waited, time.monotonic(), lr, list(values), arriving, batch.all_rows_G, cached,
            parameters,
        )  # fmt: skip

    def _clip(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Cut the whole gradient down to `clip_grad`. The parameters that have one, and the norms of theirs (P,) and of
        all of it before that."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm_P = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        norm = torch.linalg.vector_norm(norm_P)
        if self.config.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        return parameters, norm_P, norm

    def _finish(self, taken: _Taken, log: RunLog, *, show: bool = False) -> None:
        """Wait for the values of a step; log them, where they are due or are to be shown.

        Raises TrainingError, with all that led to it, for the first step whose loss or gradient is not finite. In fp16
        a gradient may be: the scaler leaves such a step out and halves its scale, until that is hopeless.
        """
        value_V, norm_P, scale = taken.arriving.wait()
        values = {**dict(zip(taken.names, value_V.tolist(), strict=True)), "lr": taken.lr}
        scaling = self.scaler.is_enabled() and scale.item() >= 1
        if not all(math.isfinite(value) for name, value in values.items() if name != "grad_norm" or not scaling):
            names = {id(p): f"{tower}.{name}" for tower, name, p in self._parameters()}
            gradients = dict(zip([names[id(p)] for p in taken.parameters], norm_P.tolist(), strict=True))
            raise not_finite_error(
                taken.step + 1, values, taken.cached, gradients, taken.rows_G.tolist(), self.config.out,
                write=self.place.first,
            )  # fmt: skip
        log.step(taken.step + 1, images=self.config.batch_size, waited=taken.waited, at=taken.at)
        if show or (taken.step + 1) % self.config.log_every == 0:
            log.train(taken.step + 1, {**values, "epoch": taken.epoch})

    def _parameters(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for tower, learner in self.learners.items():
            for module in (learner.module, learner.objective):
                for name, parameter in module.named_parameters():
                    yield tower, name, parameter

    @contextmanager
    def _reading(self, stop: StopSignal) -> Iterator[None]:
        """Around the loop: what the death of a process that reads images is, told apart from a signal to all."""
        try:
            with explain_reader_death():
                yield
        except TrainingError:
            if stop.received is None:
                raise
            raise self._stopped(stop.received, "within a step; the last checkpoint is kept") from None

    def _stopped(self, number: int, when: str) -> StoppedError:
        what = f"{self.config.out} was stopped by {signal.Signals(number).name} {when}"
        return StoppedError(what, signal=number, remedy="the same command goes on from there")

    def _image_learner(self) -> TowerTrainer:
        config, spec = self.config, self.spec
        module = build_student(spec)
        if config.init and not self.feed.first_step:
            load_first_weights(module, spec, config.init)
        mean_D = mean_embedding(self.inputs.images) if config.loss.centred else None
        return self._learner(module, config.loss, mean_D, partial(normalise, mean=spec.mean, std=spec.std))

    def _text_learner(self) -> TowerTrainer | None:
        if self.text_spec is None:
            return None
        mean_D = mean_embedding(self.inputs.texts) if self.config.text_loss.centred else None
        return self._learner(build_text_student(self.text_spec), self.config.text_loss, mean_D, lambda tokens: tokens)

    def _learner(self, module: Any, loss: Any, mean_D: torch.Tensor | None, prepare: Any) -> TowerTrainer:
        config, teacher = self.config, self.inputs.images.schema.teacher
        objective = Objective(loss, teacher_scale=teacher.logit_scale, dim=teacher.embed_dim, mean_D=mean_D)
        return TowerTrainer(
            module, objective, self.place, prepare=prepare, precision=config.precision,
            accumulate=config.accumulate, ema=config.ema, compile=config.compile,
        )  # fmt: skip

    def _validation(self) -> Validation:
        config, shared = self.config, (self.spec, self.place, self.image.dtype)
        if self.text_spec:
            return Validation(config.val, None, *shared, tokenizer_of(self.text_spec))
        return Validation(config.val, Store(config.val_texts) if config.val_texts else self.inputs.texts, *shared)

    def _validate(self) -> dict[str, float]:
        """Top-1 by set; of the moving average, too, as ``SET_ema``."""
        assert self.validation
        image, text = self.image, self.text
        towers = {"": (image.module, text and text.module)}
        if image.moving_average:
            towers["_ema"] = (
                image.moving_average.module,
                text.moving_average.module if text and text.moving_average else None,
            )
        return self.validation.run(towers)

    def _checkpoint_is_due(self, done: int) -> bool:
        """By steps or by time; rank 0, which alone writes, decides."""
        if not self.place.first:
            return False
        if self.config.checkpoint_every:
            return done % self.config.checkpoint_every == 0
        return time.monotonic() - self.saved_at >= _SECONDS_BETWEEN_CHECKPOINTS

    def _save(self, done: int, scores: dict[str, float]) -> None:
        if not self.place.first:
            return
        state = {
            "step": done,
            "image": self.image.state_dict(),
            "text": self.text.state_dict() if self.text else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        ranked = [score for name, score in scores.items() if name.endswith("_ema") or not self.config.ema]
        self.saving.begin(done, state, sum(ranked) / len(ranked) if ranked else None)
        self.saved_at = time.monotonic()

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
