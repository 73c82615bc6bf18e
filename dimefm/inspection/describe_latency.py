"""What `info` knows of latency.json: the machine, and how fast each model was on it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cache_schemas.latency import ModelLatency
from dimefm.inspection.description import Description, Rows
from dimefm.latency.record import describe_machine, read_latency
from dimefm.latency.table import noise
from dimefm.system import storage
from dimefm.system.wording import counted, three_digits


def describe_latency(path: str) -> Description:
    """The measurements in a file. Raises SchemaError for another document."""
    latency = read_latency(path)
    noisy = noise(latency.machine, latency.models)
    facts: dict[str, Any] = {
        "artefact": "latency",
        "path": storage.absolute(path),
        "finished": True,
        "machine": asdict(latency.machine),
        "models": [asdict(one) for one in latency.models],
        "quiet": not noisy,
    }
    rows: Rows = [("machine", describe_machine(latency.machine))]
    rows += [(one.name, f"{where(one)}: {_speed(one)}") for one in latency.models]
    rows += [("note", noisy)] if noisy else []
    models = counted(len({one.weights for one in latency.models}), "model")
    return Description(f"{path}: the speed of {models}, measured in {counted(len(latency.models), 'way')}", facts, rows)


def where(one: ModelLatency) -> str:
    """How a model was run, and on what."""
    return f"{one.way}, {one.device if one.device != 'cpu' else counted(one.threads, 'thread')}"


def _speed(one: ModelLatency) -> str:
    parts = []
    for timings, noun in ((one.image, "image"), (one.text, "sentence")):
        if timings:
            first, last = (pick(timings, key=lambda timing: timing.batch) for pick in (min, max))
            parts.append(
                f"{three_digits(first.median_ms)} ms per {noun} in batches of {first.batch}, "
                f"{three_digits(last.per_second)} {noun}s/s in batches of {last.batch}"
            )
    return "; ".join(parts) or "nothing measured"
