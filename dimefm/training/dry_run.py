"""What a run would do, and what it would take: counted from the stores, and measured in a few steps on random data.
Nothing is written.

Shapes: B images or sentences of a step, T texts, L tokens, D embedding width, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional as F

from cache_schemas import to_plain
from cache_schemas.run import TextSpec
from dimefm.models.towers import tokenizer_of
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from dimefm.system.machine import describe
from dimefm.system.output_names import require_name
from dimefm.training.before_training import notes_on_inputs, notes_on_length, notes_on_rate
from dimefm.training.build_towers import build_towers, named_modules
from dimefm.training.config import TrainConfig
from dimefm.training.distributed import Place, find_place
from dimefm.training.feed import loaders_of
from dimefm.training.feed_plan import Plan, plan_feed
from dimefm.training.machine_settings import decide_settings, torch_threads
from dimefm.training.optimizer import optimizer_of
from dimefm.training.run_folder import plan_run
from dimefm.training.text_bank import bytes_of_texts, place_of
from dimefm.training.tower_trainer import TowerTrainer
from dimefm.training.validation import open_validation

_FIRST_IMAGES, _GROWTH = 4, 4
_ENOUGH = 3.0  # seconds of a measured step, beyond which no larger one is tried
_WEIGHT, _ADAMW = 8, 8  # bytes for each weight: itself and its gradient; AdamW's two averages


@dataclass(frozen=True)
class Foresight:
    """A run that has not begun. `config` has what the machine decides; sizes are in bytes, times in seconds.

    `images` and `sentences` are the rows with an embedding, those of the selection where sentences come from it alone.
    `text_bank_in` says where embeddings of sentences are kept; "disk" also where none are drawn.
    `seconds_per_step` was measured with `measured_images` at once, and leaves out reading of images; it is None where
    `why_unknown` says why. `shared_memory` is that of the loader processes, `checkpoint` the size of one.
    """

    config: TrainConfig
    device: str
    machine: str
    image_size: int
    images: int
    sentences: int
    steps_per_epoch: int
    steps: int
    first_step: int
    warmup_steps: int
    validation_steps: int | None
    parameters: int
    training_state: int
    text_bank: int
    text_bank_in: Literal["device", "memory", "disk"]
    loaders: int
    shared_memory: int
    seconds_per_step: float | None
    measured_images: int
    why_unknown: str | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data; of the config, what the machine decides."""
        facts = {name: to_plain(value) for name, value in vars(self).items() if name != "config"}
        return {"precision": self.config.precision, "threads": self.config.threads, **facts}


def foresee(config: TrainConfig, allow_changes: tuple[str, ...] = ()) -> Foresight:
    """Look ahead. Raises as `train` does for what would keep the run from beginning."""
    config = replace(config, out=storage.local(config.out, "a run folder"))
    require_name(config.out, "a run folder")
    place = find_place(config.device)
    plan = plan_feed(config, place.world)
    config, notes = decide_settings(config, place, allow_changes)
    document = plan_run(
        config, plan.inputs, plan.steps, machine=describe(str(place.device)), processes=place.world,
        order=plan.order, allow_changes=allow_changes, done=plan.first_step,
    )  # fmt: skip
    size, banks = document.student.image_size, _banks(config, plan, place)
    in_step = sum(bytes_of_texts(store, kept_in, drawn) for store, drawn, kept_in in banks)
    loaders, ahead, batch = loaders_of(config, place, size, in_step)
    one_pass = replace(config, compile=False, accumulate=1, batch_size=config.batch_size // config.accumulate)
    with torch_threads(config.threads):
        towers = build_towers(one_pass, document, plan.inputs, place, plan.only, resumed=True)
        validation = open_validation(config, document, plan.inputs, place, towers["image"].dtype)
        parameters = sum(p.numel() for tower in towers.values() for p in tower.module.parameters())
        try:
            measured, seconds, state = _measure(config, plan, place, towers, size, document.text_student)
            why = None
        except torch.OutOfMemoryError:
            measured, seconds, state = 0, None, _ADAMW * parameters
            why = "the GPU has too little memory for a step (--accumulate, --batch-size)"
    kept = [(store, kept_in) for store, _, kept_in in banks if kept_in != "disk"]
    bank = sum(bytes_of_texts(store, "memory", store.schema.rows) for store, _ in kept)
    kept_in = kept[0][1] if kept else "disk"
    return Foresight(
        config=config, device=str(place.device), machine=describe(str(place.device)), image_size=size,
        images=_images(plan), sentences=_sentences(config, plan),
        steps_per_epoch=plan.steps_per_epoch, steps=plan.steps, first_step=plan.first_step,
        warmup_steps=config.warmup_steps(plan.steps_per_epoch),
        validation_steps=config.validation_steps(plan.steps_per_epoch) if config.val else None,
        parameters=parameters, training_state=(_WEIGHT + 4 * (config.ema is not None)) * parameters + state,
        text_bank=bank, text_bank_in=kept_in, loaders=loaders,
        shared_memory=loaders * (ahead + 1) * batch,
        seconds_per_step=seconds, measured_images=measured, why_unknown=why,
        notes=[
            *notes, *notes_on_inputs(config), *notes_on_rate(config),
            *notes_on_length(config, plan.steps, plan.steps_per_epoch),
            *(validation.take_notes() if validation else ()),
        ],
    )  # fmt: skip


def _banks(
    config: TrainConfig, plan: Plan, place: Place
) -> list[tuple[Store, int, Literal["device", "memory", "disk"]]]:
    """The text stores that a run draws from, how many sentences of each in a step, and where they are kept."""
    captions = plan.inputs.captions
    *texts, of_captions = config.text_mix.counts(config.texts_per_step if config.loss.vl else 0)
    own = config.batch_size if config.loss.contrastive else 0
    drawn = [(one.texts, sum(texts) + (0 if captions else own)) for one in plan.inputs.teachers if one.texts]
    if captions:
        drawn.append((captions.texts, of_captions + own))
    return [(store, count, place_of(store, place.device)) for store, count in drawn if count]


def _images(plan: Plan) -> int:
    """The images that can be drawn: an epoch may have more, or fewer, where stores have weights."""
    alone = not (plan.inputs.more or plan.inputs.image_selection)
    return plan.inputs.images.contents.good if alone else plan.images.rows


def _sentences(config: TrainConfig, plan: Plan) -> int:
    """Sentences that the run may draw from."""
    selection = plan.inputs.selection
    alone = config.text_student is not None if not config.loss.vl else config.text_mix.selected == 1
    captions = plan.inputs.captions.texts.contents.good if plan.inputs.captions else 0
    texts = plan.inputs.texts.contents.good if plan.inputs.texts else 0
    return captions + (len(selection.rows()) if selection and alone else texts)


def _measure(
    config: TrainConfig, plan: Plan, place: Place, towers: dict[str, TowerTrainer], size: int, text: TextSpec | None
) -> tuple[int, float | None, int]:
    """How many images were measured at once, as many as a pass has if that is quick; the seconds of a step; and the
    bytes of the optimiser's state."""
    modules = named_modules(config, towers)
    optimizer = optimizer_of(config, [*modules.values()], modules)
    passes, here = config.accumulate, config.batch_size // place.world
    most, images = -(-here // passes), _FIRST_IMAGES
    while True:
        images = min(images, most)
        step = partial(_learn, config, plan, place, towers, images, size, text)
        step()
        seconds = _seconds(step, place)
        if images == most or _GROWTH * seconds > _ENOUGH:
            break
        images *= _GROWTH
    advance: Callable[[], Any] = optimizer.step
    advance()  # the first makes its state
    again = 4 / 3 if passes > 1 else 1.0  # the features of each pass are computed twice
    values = [value for state in optimizer.state.values() for value in state.values()]
    size_of_state = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    return images, seconds * here / images * again + _seconds(advance, place), size_of_state


def _seconds(work: Callable[[], object], place: Place) -> float:
    began = _now(place)
    work()
    return _now(place) - began


def _now(place: Place) -> float:
    """The time, when all that a GPU was given is done."""
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter()


def _learn(
    config: TrainConfig, plan: Plan, place: Place, towers: dict[str, TowerTrainer], images: int, size: int,
    text: TextSpec | None,
) -> None:  # fmt: skip
    """A step on random data, whose gradients are thrown away. A text tower gets its share of sentences."""
    device, widths = place.device, [one.images.schema.dim for one in plan.inputs.teachers]

    def embeddings(rows: int, dim: int = widths[0]) -> torch.Tensor:
        return F.normalize(torch.randn(rows, dim, device=device), dim=-1)

    scaler, row_B = torch.amp.GradScaler(device.type, enabled=False), torch.arange(images, device=device)
    teacher_BD = torch.cat([embeddings(images, dim) for dim in widths], dim=1)
    losses = [loss for loss in config.teacher_losses() if loss]
    of_each = list(zip(losses, widths, strict=True))
    texts = [embeddings(config.texts_per_step, dim) if loss.vl else None for loss, dim in of_each]
    pairs = [(embeddings(images, dim), row_B) if loss.contrastive else None for loss, dim in of_each]
    several = len(widths) > 1
    pixels_B3HW = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device)
    towers["image"].learn(
        pixels_B3HW,
        teacher_BD,
        texts if several else texts[0],
        pairs if several else pairs[0],
        seed=(0,),
        scaler=scaler,
    )
    if text:
        sentences = max(1, config.text_batch_size * images // config.batch_size)
        tokens_BL = tokenizer_of(text)(["a photo of a cat and a dog"] * sentences).to(device)
        towers["text"].learn(tokens_BL, embeddings(sentences), teacher_BD, None, seed=(0,), scaler=scaler)
