"""What a training run reads: its stores, the order of their rows, and the processes that make batches of them.

All of this begins before a GPU and the process group do: the processes are forked, and a fork shares memory, locks and
connections with whatever CUDA and NCCL have begun by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch

from cache_schemas import StrongViews
from dimefm.models.towers import student_spec, text_spec
from dimefm.store.embedding_store import Store
from dimefm.store.local_copy import bring, fits_in_cache
from dimefm.store.pairs_store import Pairs
from dimefm.system.file_cache import active
from dimefm.system.progress import amount
from dimefm.system.storage import is_url
from dimefm.system.wording import counted
from dimefm.training.batch_loader import Requests, take_ahead, training_loader
from dimefm.training.before_training import notes_on_inputs, notes_on_length, notes_on_rate
from dimefm.training.config import TextMix, TrainConfig
from dimefm.training.distributed import Place
from dimefm.training.feed_plan import plan_feed
from dimefm.training.fetch_ahead import fetching_ahead
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.machine_settings import choose_loaders
from dimefm.training.run_folder import Inputs
from dimefm.training.text_bank import TextBank
from dimefm.training.text_batches import TextBatch, TrainingTexts

Pair = tuple[Batch, TextBatch | None]
"""A step's images, and its sentences for a text tower."""

REQUESTS_PER_SECOND = 500
"""To an object store, by one core: the time is spent in s3fs (python -m benchmarks urls)."""

_PAGE_LOCKED_AHEAD = 2  # batches


@dataclass(frozen=True)
class Feed:
    """What a run reads, and how long it is.

    `batches` begin with the step `first_step`, from which the run goes on. For a GPU they are in page-locked memory; it
    must be in use before the first is taken. `banks` are those of each teacher, None for one that needs no sentences;
    `only` are the rows that are drawn, as of a Plan; `left_out` counts the images that lack the embedding of a further
    teacher.
    """

    inputs: Inputs
    only: dict[str, np.ndarray[Any, Any] | None]
    order: Literal["chunks", "blocks"]
    banks: list[TextBank | None]
    left_out: int
    steps_per_epoch: int
    steps: int
    first_step: int
    batches: Iterator[Pair]


def notes_on_feed(config: TrainConfig, feed: Feed) -> list[str]:
    """Notes for the user on what a run reads, and for how long."""
    notes = notes_on_inputs(config) + notes_on_rate(config)
    notes += notes_on_length(config, feed.steps, feed.steps_per_epoch)
    if feed.left_out:
        what = f"{counted(feed.left_out, 'image')} of {feed.inputs.images.path} will not be drawn"
        notes.append(f"{what}: another teacher has no embedding of them")
    return notes + notes_on_remote_data(feed.inputs, feed.banks, feed.order)


def notes_on_remote_data(
    inputs: Inputs, banks: Sequence[TextBank | None], order: Literal["chunks", "blocks"]
) -> list[str]:
    """Notes on data that is read over the network at every step: what this costs, and the remedy.

    Embeddings cost little: a small store is kept whole, and of a large one the chunks that a window of rows comes from.
    """
    images, texts, schema, notes = inputs.images, inputs.texts, inputs.images.schema, list[str]()
    places = [one.path for one in images.parts] if schema.pixels else schema.source.arguments
    if any(map(is_url, places)) and not (schema.pixels and active()):
        what = (
            f"--cache-dir, or a copy of {images.path} on a local disk"
            if schema.pixels
            else "--pixels in a store on a local disk"
        )
        notes.append(
            f"each image is a request over the network, and each core that reads makes about {REQUESTS_PER_SECOND} of "
            f"them per second: faster with {what}"
        )
    stores: list[Store | Pairs] = [*(one.images for one in inputs.teachers), *inputs.all_pairs]
    far = [store.path for store in stores if store.by_chunks]
    if not far and texts and texts.by_chunks:
        far = [texts.path]
    if order == "chunks" and far:
        notes.append(
            f"rows are drawn from whole chunks of neighbours, since {' and '.join(far)} is at a URL: with a copy on a "
            "local disk they are mixed better"
        )
    elif images.by_chunks:
        notes.append(
            f"rows are drawn from all over {images.path}, as when the run began, and each row is a request over the "
            "network: copy it to a local disk"
        )
    for store in _read_from_disk(inputs, banks):
        if is_url(store.path) and not fits_in_cache(store):
            size = store.schema.rows * store.schema.dim * store.schema.item_bytes
            notes.append(
                f"{store.path} does not fit into memory: each sentence of a step is a request over the network, about "
                f"{REQUESTS_PER_SECOND} per second for each core that reads: copy it ({amount(size)}) to a local disk, "
                "or give a --cache-dir with room for twice as much"
            )
    return notes


def _read_from_disk(inputs: Inputs, banks: Sequence[TextBank | None]) -> list[Store]:
    """The text stores that are read anew in each step."""
    read = [(bank, one.texts) for bank, one in zip(banks, inputs.teachers, strict=True)]
    if inputs.captions:
        read.append((banks[0] and banks[0].captions, inputs.captions.texts))
    return [store for bank, store in read if store and bank and bank.kept_in == "disk" and bank.draws]


@contextmanager
def open_feed(config: TrainConfig, place: Place) -> Iterator[Feed]:
    """Open what a run reads, and start the processes that read it. They end with the block.

    Raises TrainingError, MismatchError or StoreError for what the user can mend.
    """
    plan = plan_feed(config, place.world)
    inputs, first, steps = plan.inputs, plan.first_step, plan.steps
    banks = [_text_bank(config, inputs, number, place) for number in range(len(inputs.teachers))]
    for store in _read_from_disk(inputs, banks):
        bring(store)
    with ExitStack() as stack:
        batches: Iterator[Pair] = iter(())
        if first < steps:
            orders = [plan.images, *([plan.texts] if plan.texts else [])]
            beside: list[Store | Pairs] = [*inputs.all_pairs, *(one.images for one in inputs.more)]
            position = stack.enter_context(fetching_ahead(orders, beside, first, steps))
            requests = partial(Requests, first=first, steps=steps, rank=place.rank, world=place.world)
            texts = requests(plan.texts) if plan.texts else None
            images = requests(plan.images, position=position)
            batches = _start(config, place, inputs, banks, images, texts, stack)
        by_teachers = inputs.more and plan.images.only is not None and inputs.image_selection is None
        left_out = inputs.images.contents.good - plan.images.rows if by_teachers else 0
        yield Feed(inputs, plan.only, plan.order, banks, left_out, plan.steps_per_epoch, steps, first, batches)


def _start(
    config: TrainConfig,
    place: Place,
    inputs: Inputs,
    banks: list[TextBank | None],
    image_requests: Requests,
    text_requests: Requests | None,
    stack: ExitStack,
) -> Iterator[Pair]:
    teacher = inputs.images.schema.teacher
    size = student_spec(config.student, teacher, config.image_size).image_size
    sentences_bytes = sum(bank.bytes_of_step(config.batch_size) for bank in banks if bank)
    workers, ahead, _ = loaders_of(config, place, size, sentences_bytes)
    texts: Iterator[TextBatch | None] = repeat(None)
    if (
        config.text_student and text_requests and inputs.texts
    ):  # before the loader of images starts a thread: this one forks
        sentences = TrainingTexts(inputs.texts, text_spec(config.text_student, teacher))
        loader = training_loader(sentences, text_requests, min(1, workers), ahead)
        texts = stack.enter_context(closing(loader))
    strong = StrongViews() if config.augment == "strong" else None
    augmentation = Augmentation(
        size=size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed, strong=strong
    )
    pictures = TrainingImages(inputs.images, augmentation, banks, [one.images for one in inputs.more])
    images = stack.enter_context(closing(training_loader(pictures, image_requests, workers, ahead)))
    pairs = zip(images, texts, strict=False)
    if place.device.type != "cuda":
        return pairs
    begin = partial(_begin_page_locking, place.device)
    return stack.enter_context(closing(take_ahead(map(_page_locked, pairs), _PAGE_LOCKED_AHEAD, begin)))


def loaders_of(config: TrainConfig, place: Place, size: int, embeddings: int) -> tuple[int, int, int]:
    """How many processes read images of `size` pixels, how many batches each reads ahead, and the bytes of one of them,
    of which `embeddings` are of sentences. Raises as choose_loaders does."""
    batch = config.batch_size // place.world * 3 * size**2 + embeddings
    return *choose_loaders(config.workers, place.device.type, batch), batch


def _page_locked(pair: Pair) -> Pair:
    images, texts = pair
    return images.pin_memory(), texts and texts.pin_memory()


def _begin_page_locking(device: torch.device) -> None:
    torch.set_num_threads(1)  # the cores are for decoding
    torch.cuda.set_device(device)  # or another GPU's memory would be taken for it


def _text_bank(config: TrainConfig, inputs: Inputs, number: int, place: Place) -> TextBank | None:
    """The sentences of the teacher of that number, if its losses need some. All banks draw by the same seed: of stores
    with the same sentences, each teacher gets the same."""
    loss, texts = config.teacher_losses()[number], inputs.teachers[number].texts
    if loss is None or texts is None or not (loss.vl or loss.contrastive):
        return None
    total, paired, captions = config.texts_per_step if loss.vl else 0, loss.contrastive > 0, None
    if inputs.captions:
        captions = TextBank(
            inputs.captions.texts, TextMix(random=0, retrieved=1), inputs.captions.pairs, seed=config.seed,
            total=config.text_mix.counts(total)[3], paired=paired, any_of_its=True, device=place.device,
        )  # fmt: skip
    return TextBank(
        texts, config.text_mix, inputs.pairs, inputs.selection, seed=config.seed, total=total,
        paired=paired and captions is None, captions=captions, device=place.device,
    )  # fmt: skip
