"""What is told of a step whose loss or gradient is not finite, or that a GPU has too little memory for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dimefm.errors import TrainingError
from dimefm.system import storage

REPORT = "stopped-at.json"


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
    """The error for `step`, once all that led to it is in the run folder `out`, if `write`.

    `values` are the losses and the rest, `cached` the embeddings that went in, `gradients` the norm of each parameter's
    one, `rows` those of the images.
    """
    bad = [name for name, value in cached.items() if value is not None and not value.isfinite().all()]
    broken = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    path = storage.join(out, REPORT)
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
        return TrainingError(f"{what}; all of it is in {path}", remedy="look at the store with dimefm verify")
    remedy = "go on from the last checkpoint with a lower --lr (and --allow-changes lr), --clip-grad or another "
    remedy += "--precision; if it fails there again, delete that checkpoint: the one before is used then"
    return TrainingError(f"{what}; all of it is in {path}", remedy=remedy)


@contextmanager
def explain_out_of_memory(batch_size: int, passes: int, image_size: int) -> Iterator[None]:
    """Around steps of `batch_size` images a process, in so many passes: where a GPU has too little memory for one, the
    error is a TrainingError with what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:3])
        what = (
            f"a step of {batch_size} images of {image_size} px a process, in {passes} pass{'es' * (passes > 1)}, needs"
        )
        what += f" more memory than this GPU has: {reason}"
        remedy = "a smaller --batch-size in another --out"
        if 2 * passes <= batch_size:
            more = f"--accumulate {2 * passes} (to go on from a checkpoint: --allow-changes accumulate)"
            remedy = f"{more}, which needs about half of it for the same gradient; or {remedy}"
        raise TrainingError(what, remedy=f"give {remedy}; all checkpoints are kept") from error
