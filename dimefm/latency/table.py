"""What `dimefm latency` prints: the models, and the speed of each tower, in tables that are Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from cache_schemas.latency import Machine, ModelLatency, Timing, Tower
from dimefm.latency.config import ROUNDS
from dimefm.latency.measure import Measured
from dimefm.latency.record import describe_machine
from dimefm.system.inert_text import line, markdown
from dimefm.system.markdown_table import markdown_table
from dimefm.system.progress import amount
from dimefm.system.wording import counted, hanging, three_digits

_NOISY, _BUSY = 1.5, 0.5
"""A timing is noisy where its 95th percentile is so many times its median; a machine is busy with so many cores."""


def tables(models: Sequence[ModelLatency]) -> str:
    """A table of the models, and one for each tower, number of threads and device."""
    found = [_facts(models)]
    for threads, device in dict.fromkeys((one.threads, one.device) for one in models):
        alike = [one for one in models if (one.threads, one.device) == (threads, device)]
        found += [_speed("image", alike, threads, device), _speed("text", alike, threads, device)]
    return "\n\n".join("\n".join(table) for table in found)


def _facts(models: Sequence[ModelLatency]) -> list[str]:
    head = ("model", "by", "parameters", "GFLOP/image", "GFLOP/text", "on disk", "memory")
    whole = {(one.name, one.backend, one.device, one.precision): one for one in models}  # of any number of threads
    return markdown_table([head, *map(_fact_row, whole.values())], "llrrrrr", padded=True)


def _fact_row(one: ModelLatency) -> tuple[str, ...]:
    millions = f"{one.image_parameters / 1e6:.1f} + {(one.parameters - one.image_parameters) / 1e6:.1f} M"
    flops = ("" if value is None else three_digits(value / 1e9) for value in (one.image_flops, one.text_flops))
    return markdown(one.name), one.backend, millions, *flops, amount(one.bytes), amount(one.memory or 0)


def _speed(tower: Tower, models: Sequence[ModelLatency], threads: int, device: str) -> list[str]:
    what = "image" if tower == "image" else "sentence"
    where = counted(threads, "thread") if device == "cpu" else markdown(device)
    head = (f"{tower}, {where}", "by", "batch", f"ms/{what}", "95 %", "spread", f"{what}s/s")
    timed = [(timing, one) for one in models for timing in _timings(one, tower)]
    timed.sort(key=lambda pair: pair[0].batch)
    rows = [(markdown(one.name), one.backend, *_timing_row(timing)) for timing, one in timed]
    return markdown_table([head, *rows], "llrrrrr", padded=True)


def _timing_row(timing: Timing) -> tuple[str, ...]:
    times = (three_digits(timing.median_ms), three_digits(timing.p95_ms))
    return str(timing.batch), *times, f"±{timing.spread:.0%}", three_digits(timing.per_second)


def _timings(one: ModelLatency, tower: Tower) -> tuple[Timing, ...]:
    return one.image if tower == "image" else one.text


def notes(machine: Machine, models: Sequence[ModelLatency]) -> Iterator[str]:
    """What a reader must know: how it was measured, on what, and whether the machine was quiet."""
    yield f"Machine: {describe_machine(machine)}"
    packages = dict(pair for one in models for pair in one.versions.items())
    yield "Versions: " + ", ".join(f"{name} {value}" for name, value in packages.items())
    yield (
        "An image is timed from pixels, resized and cropped, to its embedding, a sentence from tokens that fill the "
        "context. Median and 95th percentile are those of the calls, divided by their batch; spread: half of the range "
        f"of the medians of {ROUNDS} rounds. Parameters: of the image tower + of the text tower. A product and its sum "
        "are 2 FLOP. Memory: by how much the process, or the GPU, grew."
    )
    order = dict.fromkeys(one.order for one in models)
    yield from (
        f"Order of the first round, of which each next one begins a place later: {', '.join(one)}" for one in order
    )
    if words := noise(machine, models):
        yield words


def noise(machine: Machine, models: Sequence[ModelLatency]) -> str:
    """A sentence if the machine was not quiet, else ""."""
    timings = [timing for one in models for timing in (*one.image, *one.text)]
    noisy = sum(timing.p95_ms > _NOISY * timing.median_ms for timing in timings)
    loads = [one.load for one in models if one.load is not None and one.load > _BUSY]
    words = []
    if loads:
        words.append(f"{max(loads):.1f} of {counted(machine.cores, 'core')} were busy in the minute before")
    if noisy > len(timings) / 4:
        words.append(
            f"in {noisy} of {counted(len(timings), 'timing')} the 95th percentile is {_NOISY} times the median"
        )
    return f"The machine was NOT QUIET: {', and '.join(words)}." if words else ""


def shown(done: Measured) -> str:
    """All that is printed."""
    parts = []
    if done.models:
        parts.append(tables(done.models))
        parts.append("\n".join(hanging("", line(words)) for words in notes(done.machine, done.models)))
    parts += [f"{line(subject)}: FAILED: {error}" for subject, error in done.failed]
    if done.models:
        parts.append(f"written: {line(done.file)}")
    return "\n\n".join(parts)


def as_document(done: Measured) -> dict[str, Any]:
    """The outcome for JSON."""
    return {
        "file": done.file,
        "machine": asdict(done.machine),
        "models": [asdict(one) for one in done.models],
        "quiet": not noise(done.machine, done.models),
        "failed": [
            {"model": subject.model, "backend": subject.backend, "what": error.what, "remedy": error.remedy}
            for subject, error in done.failed
        ],
    }
