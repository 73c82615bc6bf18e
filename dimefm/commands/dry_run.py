"""What `train-student --dry-run` prints. The fields of a config need no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dimefm.commands.train_config import Given, shown
from dimefm.system.progress import amount, duration
from dimefm.system.wording import counted

if TYPE_CHECKING:
    from dimefm.training.dry_run import Foresight

_LATER = {
    "precision": "auto", "threads": None, "workers": None, "device": None,
    "checkpoint_every": None, "image_size": None,
}  # fmt: skip
"""Fields that are decided when the run begins, where they have this value: by the machine, if nothing else is named."""
_DECIDED_BY = {"checkpoint_every": "the clock", "image_size": "the student"}


def origins(given: Given) -> dict[str, str]:
    """Where the value of each field comes from, also where it is decided later."""
    later = {name for name, value in _LATER.items() if given.values[name] == value}
    return {name: _DECIDED_BY.get(name, "the machine") if name in later else by for name, by in given.origins.items()}


def field_lines(given: Given) -> list[str]:
    """Every field with where its value comes from, and the value; those of a text tower's losses if there is one."""
    names = [name for name in given.values if given.config.text_student or not name.startswith("text_loss.")]
    by = origins(given)
    return _columns([(name, by[name], shown(given.values[name])) for name in names])


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in list(zip(*rows, strict=True))[:-1]]
    pairs = [(list(zip(row, [*widths, 0], strict=True))) for row in rows]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in pairs]


def foresight_lines(found: Foresight) -> list[str]:
    """What was counted and measured."""
    config = found.config
    every = f"every {config.checkpoint_every:,} steps" if config.checkpoint_every else "every ten minutes"
    threads = counted(config.threads or 1, "torch thread")
    optimizer = "AdamW" if config.optimizer == "adamw" else config.optimizer
    rows = [
        ("machine", f"{found.machine}: {found.device}, {config.precision}, {threads}"),
        ("rows", f"{counted(found.images, 'image')} and {counted(found.sentences, 'sentence')} that can be used"),
        ("steps", f"{found.steps:,}" + (f", of which {found.first_step:,} are done" if found.first_step else "")),
        ("an epoch", f"{counted(found.steps_per_epoch, 'step')}, {found.steps_per_epoch * config.batch_size:,} images"),
        ("warm-up", counted(found.warmup_steps, "step")),
        ("validation", f"every {found.validation_steps:,} steps" if found.validation_steps else "none, without --val"),
        ("checkpoints", every),
        ("a step", _step_time(found)),
        ("the run", _run_time(found)),
        ("student", f"{found.parameters / 1e6:,.1f} million weights, images of {found.image_size} px"),
        ("memory", f"{amount(found.training_state)} for weights, gradients, {optimizer}; activations come on top"),
    ]
    if found.text_bank:
        where = "on the GPU" if found.text_bank_in == "device" else "in memory"
        rows.append(("", f"{amount(found.text_bank)} for embeddings of sentences, {where}"))
    readers = "one process that reads images" if found.loaders == 1 else f"{found.loaders} processes that read images"
    rows.append(("", f"{amount(found.shared_memory)} of /dev/shm for {readers}"))
    return _columns(rows)


def _step_time(found: Foresight) -> str:
    if found.seconds_per_step is None:
        return f"unknown: {found.why_unknown}"
    seconds = found.seconds_per_step
    took = f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return (
        f"{took} for {found.config.batch_size:,} images, measured with {found.measured_images:,}; reading is not in it"
    )


def _run_time(found: Foresight) -> str:
    left = found.steps - found.first_step
    if not left:
        return "it is done"
    return duration(found.seconds_per_step * left) if found.seconds_per_step else "unknown"
