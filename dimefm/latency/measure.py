"""`dimefm latency`: models side by side on this machine. In each round every model is measured once, in turn, so that
a machine that drifts drifts for all alike."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

from cache_schemas.latency import Machine, ModelLatency, Timing, Tower
from dimefm.errors import DimefmError
from dimefm.latency.config import ROUNDS, LatencyConfig
from dimefm.latency.record import Record
from dimefm.latency.subject import Facts, Subject, subjects
from dimefm.latency.worker import Asked, Worker, prepare
from dimefm.system.machine import cpus
from dimefm.system.notes import note
from dimefm.system.processor import instructions, load, processor_name
from dimefm.system.progress import Progress
from dimefm.system.wording import counted
from dimefm.version import __version__

_TOWERS: tuple[Tower, ...] = ("image", "text")
_Call = tuple[Tower, int]


@dataclass
class Measured:
    """The outcome: the file, the machine, the measurements, and the models that failed with the reasons."""

    file: str
    machine: Machine
    models: list[ModelLatency] = field(default_factory=list)
    failed: list[tuple[Subject, DimefmError]] = field(default_factory=list)


@dataclass
class _Model:
    """A model at work: its process, its facts, and the seconds of the calls of each round."""

    worker: Worker
    facts: Facts
    rounds: dict[_Call, list[list[float]]] = field(default_factory=dict)


def measure(config: LatencyConfig) -> Measured:
    """Measure the models, and add them to `config.out`. A model that cannot be loaded or run is listed in the outcome,
    and the others go on. Raises a DimefmError for one that does not exist, and for measurements of another machine."""
    chosen = subjects(config)
    machine = this_machine()
    record = Record(config.out, machine)
    done = Measured(record.path, machine)
    prepare(chosen)
    for threads in config.threads or (cpus(),):
        note(f"{counted(len(chosen), 'model')}, {counted(threads, 'thread')}: loading and warming up ...")
        _measure(config, chosen, threads, done)
    if done.models:
        record.add(done.models)
    return done


def this_machine() -> Machine:
    """What decides the speed of a CPU here."""
    return Machine(processor=processor_name(), cores=cpus(), instructions=instructions(), system=platform.system())


def _measure(config: LatencyConfig, chosen: Sequence[Subject], threads: int, done: Measured) -> None:
    """All models with one number of threads."""
    busy = load()
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(one, threads, config.batch, config.seconds))) for one in chosen]
        models = [model for worker in workers for model in _ready(worker, done)]
        order = tuple(str(model.worker.subject) for model in models)
        calls = [(tower, batch) for tower in _TOWERS for batch in config.batch]
        with Progress(f"measuring, {counted(threads, 'thread')}", ROUNDS * len(calls), "turn") as progress:
            for number in range(ROUNDS):
                for place, call in enumerate(calls, 1):
                    models = _turn(models, number, call, config.seconds / ROUNDS, done)
                    progress.at(number * len(calls) + place)
        for model in models:
            done.models += _finished(model, threads, busy, order, done)


def _ready(worker: Worker, done: Measured) -> Iterator[_Model]:
    """The model, unless it fails."""
    try:
        yield _Model(worker, worker.facts())
    except DimefmError as error:
        done.failed.append((worker.subject, error))


def _turn(models: list[_Model], number: int, call: _Call, seconds: float, done: Measured) -> list[_Model]:
    """Measure a call of every model; another one is the first in each round. The models that did not fail."""
    shift = number % max(1, len(models))
    left = []
    for model in models[shift:] + models[:shift]:
        try:
            found = model.worker.measure(Asked(*call, seconds))
        except DimefmError as error:
            done.failed.append((model.worker.subject, error))
            continue
        model.rounds.setdefault(call, []).append(found)
        left.append(model)
    return [model for model in models if model in left]


def _finished(
    model: _Model, threads: int, busy: float | None, order: tuple[str, ...], done: Measured
) -> Iterator[ModelLatency]:
    subject = model.worker.subject
    try:
        memory = model.worker.memory()
    except DimefmError as error:
        done.failed.append((subject, error))
        return
    yield ModelLatency(
        name=subject.name,
        backend=subject.backend,
        threads=threads,
        **asdict(model.facts),
        memory=memory,
        image=_timings(model, "image"),
        text=_timings(model, "text"),
        load=busy,
        order=order,
        versions=_versions(subject),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _timings(model: _Model, tower: Tower) -> tuple[Timing, ...]:
    return tuple(_timing(batch, rounds) for (one, batch), rounds in model.rounds.items() if one == tower)


def _timing(batch: int, rounds: list[list[float]]) -> Timing:
    """Of the seconds of calls, by rounds."""
    calls = sorted(1000 * seconds / batch for one in rounds for seconds in one)
    medians, median = [1000 * statistics.median(one) / batch for one in rounds], statistics.median(calls)
    return Timing(
        batch=batch,
        median_ms=median,
        p95_ms=calls[min(len(calls) - 1, int(0.95 * len(calls)))],
        spread=(max(medians) - min(medians)) / 2 / median,
        calls=len(calls),
    )


def _versions(subject: Subject) -> dict[str, str]:
    """The versions of the libraries that run it."""
    quick = subject.backend in ("onnx", "int8")
    own = {"python": platform.python_version(), "dimefm": __version__}
    return {**own, **{name: version(name) for name in (("onnxruntime", "numpy") if quick else ("torch", "timm"))}}
