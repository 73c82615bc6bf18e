"""Stage 2: train a student from cached teacher embeddings. This process has no teacher, no Ray and no FAISS.

Shapes: B images or sentences of this process, G images of all, T texts, L tokens, D embedding width, H height, W width;
P parameters, V values of a step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from dimefm.errors import StoppedError, TrainingError
from dimefm.models.towers import Columns, notes_on_preparation
from dimefm.system import storage
from dimefm.system.file_cache import caching_in
from dimefm.system.lock import writing
from dimefm.system.machine import describe
from dimefm.system.named_paths import allowing
from dimefm.system.output_names import require_name
from dimefm.system.stopping import holding
from dimefm.system.transfer import Arriving, Transfer, fetch
from dimefm.training.batch_loader import explain_reader_death
from dimefm.training.build_towers import build_towers, named_modules
from dimefm.training.checkpoint_writer import CheckpointWriter
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import TrainConfig
from dimefm.training.distributed import (
    Place,
    Vote,
    explain_lost_process,
    find_place,
    join_group,
    leave_group,
    require_same_step,
    wait_for_all,
)
from dimefm.training.feed import Feed, notes_on_feed, open_feed
from dimefm.training.feed_plan import TEXT_STREAM
from dimefm.training.image_batches import Batch
from dimefm.training.machine_settings import decide_settings, torch_threads
from dimefm.training.not_finite import explain_out_of_memory, not_finite_error
from dimefm.training.objective import Pair
from dimefm.training.optimizer import learning_rate, load_optimizer, optimizer_of
from dimefm.training.read_metrics import last_validation
from dimefm.training.run_folder import has_begun, plan_run, write_run
from dimefm.training.run_log import RunLog
from dimefm.training.stop_signal import StopSignal
from dimefm.training.text_batches import TextBatch
from dimefm.training.tower_trainer import Learned, TowerTrainer
from dimefm.training.validation import open_validation

_SECONDS_BETWEEN_CHECKPOINTS = 600.0


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its steps, and the last validation's top-1 by set."""

    out: str
    steps: int
    validation: dict[str, float]


def train(config: TrainConfig, allow_changes: tuple[str, ...] = ()) -> Result:
    """Train to the end, or go on from the last checkpoint of the same run in `config.out`.

    A run that goes on may differ from its start in the fields that `allow_changes` names; run.json records the changes.
    Raises TrainingError, MismatchError or StoreError for what the user can mend, and StoppedError after SIGINT or
    SIGTERM. Checkpoints stay in every case.
    """
    config = replace(config, out=storage.local(config.out, "a run folder"))
    require_name(config.out, "a run folder")
    place = find_place(config.device)
    lock = writing(config.out, of_use=lambda files: has_begun(config.out, files)) if place.first else holding()
    cache = caching_in(config.cache_dir, config.cache_size)
    of_others = explain_lost_process()
    with allowing(config.val), lock, cache, open_feed(config, place) as feed, explain_reader_death(), of_others:
        join_group(config.device)  # from here on nothing is forked
        config, notes = decide_settings(config, place, allow_changes)
        notes += notes_on_feed(config, feed)
        with torch_threads(config.threads):
            result = _Trainer(config, place, feed, allow_changes).run(notes)
    leave_group(place)
    return result


@dataclass(frozen=True)
class _PendingStep:
    """A step that the device was given at the time `at`, after `waited` seconds for its batch. Its values are on their
    way to memory: those called `names`, the norms of the gradients of `parameters`, and the scaler's scale.

    `cached` are the cached embeddings that went into it, for the report on a step that is not finite.
    """

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
        self.checkpoint_writer = CheckpointWriter(self.checkpoints)
        self.saved_at = time.monotonic()

        torch.manual_seed(config.seed)
        self.towers = build_towers(config, self.document, feed.inputs, place, feed.only, resumed=feed.first_step > 0)
        self.image, self.text = self.towers["image"], self.towers.get("text")
        modules = [module for tower in self.towers.values() for module in (tower.module, tower.objective)]
        self.optimizer = optimizer_of(config, modules, named_modules(config, self.towers), self.document.undecayed)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "fp16")
        self.one = torch.ones((), device=place.device)
        self.transfer = Transfer(place.device)
        self.validation = open_validation(config, self.document, self.inputs, self.place, self.image.dtype)

    def run(self, notes: list[str]) -> Result:
        """Go on from the last checkpoint, if any, to the last step. `notes` are shown first."""
        config, first, steps = self.config, self.feed.first_step, self.feed.steps
        require_same_step(first, self._restore(), self.place)
        if first > steps:
            what = f"{config.out} has done {first:,} steps already, more than {steps:,}"
            raise TrainingError(what, remedy="give more --epochs or --max-steps, or another --out")
        if self.place.first:
            write_run(config.out, self.document)
        if first == steps:
            return Result(config.out, steps, last_validation(config.out))
        log = RunLog(config, first=first, steps=steps, enabled=self.place.first)
        notes = notes + notes_on_preparation(self.spec, self.document.teachers)
        for note in notes + (self.validation.take_notes() if self.validation else []):
            log.note(note)
        memory = explain_out_of_memory(config.batch_size // self.place.world, config.accumulate, self.spec.image_size)
        with log, self.checkpoint_writer, StopSignal() as stop, self._explain_reader_death(stop), memory:
            for bank in filter(None, self.feed.banks):
                bank.upload(self.place.device)
            return Result(config.out, steps, self._loop(log, stop))

    def _loop(self, log: RunLog, stop: StopSignal) -> dict[str, float]:
        """For each batch: a step, and what is due after it. Returns the scores of the last validation.

        The device is given a step before the values of the step before are read, so that it always has work. They are
        read at once where a validation, a checkpoint or the end follows: nothing is kept of a step that is not finite.
        """
        steps, vote, scores = self.feed.steps, Vote(self.place), dict[str, float]()
        validate_every = self.config.validation_steps(self.feed.steps_per_epoch)
        asked_at, previous = time.monotonic(), None
        for batch, texts in self.feed.batches:
            pending = self._step(batch, texts, waited=time.monotonic() - asked_at)
            if previous:
                self._finish(previous, log)
            done, last = batch.step + 1, batch.step + 1 == steps
            signal_number = 0 if last else vote.cast(stop.received or 0)
            validate = self.validation is not None and (last or done % validate_every == 0)
            save = last or validate or signal_number > 0 or self._checkpoint_is_due(done)
            if save:
                self._finish(pending, log, show=last or signal_number > 0)
            if validate:
                scores = self._validate_and_log(done, log)
            self.checkpoint_writer.check()
            if save:
                log.flush()
                self._save(done, scores if validate else {})
            if last or signal_number:
                self.checkpoint_writer.wait()
                wait_for_all(self.place)
            if signal_number:
                raise self._stopped(signal_number, f"after step {done:,} of {steps:,}, which is kept")
            asked_at, previous = time.monotonic(), None if save else pending
        return scores

    def _step(self, batch: Batch, texts: TextBatch | None, *, waited: float) -> _PendingStep:
        """Give the device a step: each tower's gradients, then the optimiser. Nothing here waits for it."""
        lr = self._set_learning_rate(batch.step)
        self.optimizer.zero_grad(set_to_none=True)
        image, texts_TD = self._learn_images(batch)
        learned, values = {"image": image}, dict(image.values)
        numbered = {f"texts of teacher {number}": text_TD for number, text_TD in enumerate(texts_TD[1:], 2)}
        cached: dict[str, torch.Tensor | None] = {"images": image.teacher_GD, "texts": texts_TD[0], **numbered}
        if self.text and texts:
            text = learned["text"] = self._learn_sentences(self.text, texts, image.teacher_GD, batch.step)
            values |= {f"text_{name}": value for name, value in text.values.items()}
            cached["sentences"] = text.teacher_GD
        self.scaler.unscale_(self.optimizer)
        parameters, norm_P, values["grad_norm"] = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, tower in self.towers.items():
            tower.after_step(learned[name])
        arriving = fetch(torch.stack([v.float() for v in values.values()]), norm_P, self.scaler.scale(self.one))
        return _PendingStep(
            step=batch.step, epoch=batch.epoch, waited=waited, at=time.monotonic(), lr=lr, names=list(values),
            arriving=arriving, rows_G=batch.all_rows_G, cached=cached, parameters=parameters,
        )  # fmt: skip

    def _set_learning_rate(self, step: int) -> float:
        config, per_epoch = self.config, self.feed.steps_per_epoch
        lr = learning_rate(
            step, steps=self.feed.steps, warmup_steps=config.warmup_steps(per_epoch), peak=config.lr,
            warmup_start=config.warmup_lr, floor=config.min_lr,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _learn_images(self, batch: Batch) -> tuple[Learned, list[torch.Tensor | None]]:
        """The image tower's gradients; and the texts (T, D) of each teacher that it learned from, if any."""
        send, texts_TD, pairs = self.transfer.send, list[torch.Tensor | None](), list[Pair | None]()
        for bank, drawn in zip(self.feed.banks, batch.texts, strict=True):
            texts_TD.append(bank.embeddings(drawn, send) if bank and drawn and self.config.loss.vl else None)
            pairs.append(bank.pair(drawn, send) if bank and drawn else None)
        several = len(texts_TD) > 1
        learned = self.image.learn(
            send(batch.pixels_B3HW), send(batch.teacher_BD), texts_TD if several else texts_TD[0],
            pairs if several else pairs[0], seed=(self.config.seed, batch.step), scaler=self.scaler,
        )  # fmt: skip
        return learned, texts_TD

    def _learn_sentences(self, tower: TowerTrainer, texts: TextBatch, images_GD: torch.Tensor, step: int) -> Learned:
        """The text tower's gradients. For its losses the images of the step are what texts are for the image tower."""
        tokens_BL, teacher_BD = self.transfer.send(texts.tokens_BL), self.transfer.send(texts.teacher_BD)
        seed = (self.config.seed, step, TEXT_STREAM)
        return tower.learn(tokens_BL, teacher_BD, images_GD, None, seed=seed, scaler=self.scaler)

    def _clip(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Scale the whole gradient down to the norm `clip_grad`, if it is larger. Returns the parameters that have a
        gradient, the norm of each gradient before that (P,), and of all together."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm_P = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        norm = torch.linalg.vector_norm(norm_P)
        if self.config.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        return parameters, norm_P, norm

    def _finish(self, pending: _PendingStep, log: RunLog, *, show: bool = False) -> None:
        """Wait for the values of a step, and log all of them if a line is due or `show` asks for one.

        Raises TrainingError, with a report of all that led to it, for the first step whose loss or gradient is not
        finite. In fp16 a gradient may overflow: the scaler leaves such a step out and halves its scale, and only a
        scale below 1 is an error.
        """
        value_V, norm_P, scale = pending.arriving.wait()
        values = {**dict(zip(pending.names, value_V.tolist(), strict=True)), "lr": pending.lr}
        may_overflow = self.scaler.is_enabled() and scale.item() >= 1
        must_be_finite = [value for name, value in values.items() if not (name == "grad_norm" and may_overflow)]
        if not all(map(math.isfinite, must_be_finite)):
            names = {id(p): name for name, p in self._parameters()}
            gradients = dict(zip([names[id(p)] for p in pending.parameters], norm_P.tolist(), strict=True))
            raise not_finite_error(
                pending.step + 1, values, pending.cached, gradients, pending.rows_G.tolist(), self.config.out,
                write=self.place.first,
            )  # fmt: skip
        log.step(pending.step + 1, images=self.config.batch_size, waited=pending.waited, at=pending.at)
        if show or (pending.step + 1) % self.config.log_every == 0:
            log.train(pending.step + 1, {**values, "epoch": pending.epoch})

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters by name, as ``image.conv1.weight``."""
        for side, tower in self.towers.items():
            for module in (tower.module, tower.objective):
                for name, parameter in module.named_parameters():
                    yield f"{side}.{name}", parameter

    @contextmanager
    def _explain_reader_death(self, stop: StopSignal) -> Iterator[None]:
        """Around the loop: turn the death of a process that reads images, or of another one that trains, into a
        TrainingError; or, where a signal was sent to the whole job, into the StoppedError that it means."""
        try:
            with explain_reader_death(), explain_lost_process():
                yield
        except TrainingError:
            if stop.received is None:
                raise
            raise self._stopped(stop.received, "within a step; the last checkpoint is kept") from None

    def _stopped(self, number: int, when: str) -> StoppedError:
        what = f"{self.config.out} was stopped by {signal.Signals(number).name} {when}"
        return StoppedError(what, signal=number, remedy="the same command goes on from there")

    def _validate_and_log(self, done: int, log: RunLog) -> dict[str, float]:
        assert self.validation
        began = time.monotonic()
        scores = self._validate()
        log.validation(done, scores, time.monotonic() - began)
        for note in self.validation.take_notes():
            log.note(note)
        return scores

    def _validate(self) -> dict[str, float]:
        """Top-1 by set, of several teachers that of the first; that of the moving average too, as ``SET_ema``."""
        assert self.validation
        image, text = self.image, self.text
        towers = {"": (image.module, text and text.module)}
        if image.moving_average:
            ema = text.moving_average.module if text and text.moving_average else None
            towers["_ema"] = (image.moving_average.module, ema)
        if self.document.more_teachers:
            width = self.document.teacher.embed_dim
            towers = {name: (Columns(tower, width), None) for name, (tower, _) in towers.items()}
        return self.validation.run(towers)

    def _checkpoint_is_due(self, done: int) -> bool:
        """Whether a checkpoint is due, by steps or by time. Only rank 0 writes, and so only rank 0 decides."""
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
        mean = sum(ranked) / len(ranked) if ranked else None
        self.checkpoint_writer.begin(done, state, mean)
        self.saved_at = time.monotonic()

    def _restore(self) -> int:
        """Load the last checkpoint, if any. Returns the number of steps that are done."""
        state = self.checkpoints.load()
        if state is None:
            return 0
        self.image.load_state_dict(state["image"])
        if self.text:
            self.text.load_state_dict(state["text"])
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty where the run began in another precision
            self.scaler.load_state_dict(state["scaler"])
        return int(state["step"])
