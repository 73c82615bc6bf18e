"""What is told of a step whose loss or gradient is not finite."""

from __future__ import annotations

import torch

from dimefm import storage
from dimefm.errors import TrainingError

REPORT = "stopped-at.json"


def not_finite(
    step: int,
    values: dict[str, float],
    cached: dict[str, torch.Tensor | None],
    modules: dict[str, torch.nn.Module],
    rows: list[int],
    out: str,
    *,
    write: bool,
) -> TrainingError:
    """The error for `step`, once all that led to it is in the run folder `out`, if `write`.

    `values` are the losses and the rest, `cached` the embeddings that went in, `modules` the towers with their
    gradients, `rows` those of the images.
    """
    bad = [name for name, value in cached.items() if value is not None and not value.isfinite().all()]
    parameters = [(f"{tower}.{name}", p) for tower, module in modules.items() for name, p in module.named_parameters()]
    broken = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
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
    what = f"step {step}: {listed}; gradients that are not finite: {len(broken)} of {len(parameters)}"
    what += f" ({', '.join(broken[:3])})" if broken else ""
    if bad:
        what += f"; cached embeddings of {' and '.join(bad)} are not finite"
        return TrainingError(f"{what}; all of it is in {path}", remedy="look at the store with dimefm verify")
    remedy = "go on from the last checkpoint with a lower --lr (and --allow-changes lr), --clip-grad or another "
    remedy += "--precision; if it fails there again, delete that checkpoint: the one before is used then"
    return TrainingError(f"{what}; all of it is in {path}", remedy=remedy)
