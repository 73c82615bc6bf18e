"""Errors for a step that fails: its loss or gradient is not finite, or the GPU has too little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cache_schemas.run import REPORT_FILE
from dimefm.errors import TrainingError
from dimefm.system import storage


def not_finite_error(
    step: int,
    values: dict[str, float],
    cached: dict[str, torch.Tensor | None],
    gradients: dict[str, float],
    rows: list[int],
    out: str,
    *,
    write: bool,
) -> TrainingError:
    """The error for a `step` whose loss or gradient is not finite. With `write`, all that led to it is written into the
    run folder `out` first, as stopped-at.json.

    `values` are the losses and what else is logged, `cached` the embeddings that went in, `gradients` the norm of the
    gradient of each parameter, `rows` the rows of the images.
    """
    bad = [name for name, value in cached.items() if value is not None and not value.isfinite().all()]
    broken = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    path = storage.join(out, REPORT_FILE)
    if write:
        facts = {
            "step": step,
            "values": {name: str(value) for name, value in values.items()},
            "rows": rows,
            "cached_embeddings_that_are_not_finite_of": bad,
            "parameters_with_a_gradient_that_is_not_finite": broken,
        }
        with storage.writing_to(path):
            storage.write_json(path, facts)
    listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
    what = f"step {step}: {listed}; gradients that are not finite: {len(broken)} of {len(gradients)}"
    what += f" ({', '.join(broken[:3])})" if broken else ""
    if bad:
        what += f"; cached embeddings of {' and '.join(bad)} are not finite"
        return TrainingError(f"{what}; details are in {path}", remedy="look at the store with dimefm verify")
    remedy = "go on from the last checkpoint with a lower --lr (and --allow-changes lr), --clip-grad or another "
    remedy += "--precision; if it fails there again, delete that checkpoint: the one before is used then"
    return TrainingError(f"{what}; details are in {path}", remedy=remedy)


@contextmanager
def explain_out_of_memory(batch_size: int, passes: int, image_size: int) -> Iterator[None]:
    """Around steps of `batch_size` images per process, in `passes` passes: if the GPU has too little memory, raise a
    TrainingError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:3])
        what = f"a step of {batch_size} images of {image_size} px per process, in {passes} pass{'es' * (passes > 1)},"
        what += f" needs more memory than this GPU has: {reason}"
        remedy = "a smaller --batch-size in another --out"
        if 2 * passes <= batch_size:
            more = f"--accumulate {2 * passes} (to go on from a checkpoint: --allow-changes accumulate)"
            remedy = f"{more}, which needs about half of it for the same gradient; or {remedy}"
        raise TrainingError(what, remedy=f"give {remedy}; all checkpoints are kept") from error
