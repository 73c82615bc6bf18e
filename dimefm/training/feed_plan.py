"""What a training run would read and how long it is, found out without torch: so mistakes are shown at once.

It holds no batch and starts no process: training.feed does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache_schemas.plan import FILES_TABLE
from dimefm.errors import TrainingError
from dimefm.sources.parquet import BLOCK_BYTES, SUFFIX
from dimefm.sources.parquet_cells import KEPT_BYTES
from dimefm.store.embedding_store import Store
from dimefm.system.progress import amount
from dimefm.training.before_training import require_startable
from dimefm.training.checkpoints import Checkpoints
from dimefm.training.config import TrainConfig
from dimefm.training.mixed_order import order_of
from dimefm.training.row_order import Order
from dimefm.training.run_folder import Inputs, choose_order, open_inputs
from dimefm.training.teacher_stores import rows_of_all

TEXT_STREAM = 1
"""Added to the seeds of a text tower, so that its random numbers differ from those of the images."""


@dataclass(frozen=True)
class Plan:
    """What a run would read, in which order, and how long it is. `texts` is the order of a text tower's sentences."""

    inputs: Inputs
    order: Literal["chunks", "blocks"]
    images: Order
    texts: Order | None
    steps_per_epoch: int
    steps: int
    first_step: int

    @property
    def only(self) -> dict[str, np.ndarray[Any, Any] | None]:
        """For each tower the rows that are drawn, int64 (N,), ascending; None: all with an embedding."""
        return {"image": self.images.only, "text": self.texts.only if self.texts else None}


def plan_feed(config: TrainConfig, world: int) -> Plan:
    """Open the stores that a run reads, and count its steps. Raises TrainingError, MismatchError or StoreError for what
    the user can mend."""
    require_startable(config)
    inputs = open_inputs(config)
    if config.augment != "crop" and inputs.images.schema.views:
        what = f"augment {config.augment} has no effect with {inputs.images.path}, whose views are shown as they are"
        raise TrainingError(what, remedy="leave it out, or give a store of whole images")
    kind = choose_order(config, inputs)
    images, texts = _orders(config, inputs, world, kind)
    per_epoch = images.steps_per_epoch
    steps = config.steps(per_epoch)
    if steps < 1:
        raise TrainingError(f"{config.epochs:g} epochs of {per_epoch} steps are none", remedy="give more --epochs")
    first = Checkpoints(config.out).step() or 0
    if not (first or config.accept_slow):
        for store in inputs.images.parts:
            _require_fast(store)
    return Plan(inputs, kind, images, texts, per_epoch, steps, first)


def _require_fast(images: Store) -> None:
    """Raises TrainingError if images would be read one by one from large Parquet files: for each of them, much of a row
    group is decoded."""
    if images.schema.pixels or FILES_TABLE not in images.schema.digests:
        return
    files = images.source_files()
    sizes = zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True)
    if sum(size for path, size in sizes if path.endswith(SUFFIX)) > KEPT_BYTES:
        what = f"{images.path} has no pixels of its own, and its images are in Parquet files, of which up to"
        what += f" {amount(BLOCK_BYTES)} are decoded for each image that is read out of order: about 25 ms"
        remedy = "cache them again with cache-images --pixels 256 and another --out; or train as slowly as that with"
        raise TrainingError(what, remedy=f"{remedy} --set accept_slow=true")


def _orders(
    config: TrainConfig, inputs: Inputs, world: int, kind: Literal["chunks", "blocks"]
) -> tuple[Order, Order | None]:
    """The orders of images and, for a text tower, of sentences. Raises TrainingError for a batch size that is not
    possible."""
    only = _rows(inputs)
    images = order_of(inputs.images, seed=config.seed, batch_size=config.batch_size, only=only, kind=kind)
    texts = None
    if config.text_student:
        assert inputs.texts
        only = inputs.selection.rows() if inputs.selection else None
        size = config.text_batch_size
        texts = Order(store=inputs.texts, seed=config.seed, batch_size=size, only=only, stream=TEXT_STREAM, kind=kind)
    _require_batches(images, world, config, "a batch", "images", "--batch-size")
    if texts:
        _require_batches(texts, world, config, "a text batch", "sentences", "--set text_batch_size=N")
    return images, texts


def _rows(inputs: Inputs) -> np.ndarray[Any, Any] | None:
    """The rows of images that may be drawn, int64 (N,), ascending: those of the selection, and of several teachers
    those that have an embedding in every store. None: all with an embedding."""
    of_all = rows_of_all([one.images for one in inputs.teachers]) if inputs.more else None
    if inputs.image_selection is None:
        return of_all
    selected = inputs.image_selection.rows()
    return selected if of_all is None else np.intersect1d(selected, of_all, assume_unique=True)


def _require_batches(order: Order, world: int, config: TrainConfig, batch: str, items: str, option: str) -> None:
    """Raises TrainingError for a batch size that is not possible."""
    size = order.batch_size
    if size % world:
        what = f"{batch} of {size} cannot be divided over {world} processes"
        raise TrainingError(what, remedy=f"give a {option} that can")
    if size // world < config.accumulate:
        what = f"{batch} of {size} over {world} processes is less than one for each of its passes"
        raise TrainingError(what, remedy="give a smaller --accumulate")
    if order.steps_per_epoch == 0:
        selected = config.image_selection if items == "images" else config.selection
        which = "" if order.only is None else " and in the selection" if selected else " and in all others"
        what = f"{batch} of {size:,} {items} is more than the {order.rows:,} with an embedding in {order.store.path}"
        raise TrainingError(what + which, remedy=f"give a smaller {option}, {order.rows} at most")
