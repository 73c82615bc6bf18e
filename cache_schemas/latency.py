"""latency.json: how fast models were on one machine. A later measurement with the same key replaces an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cache_schemas.document import Document
from cache_schemas.identity import Precision
from cache_schemas.problems import Problem

LATENCY_FILE = "latency.json"

Backend = Literal["pytorch", "compiled", "onnx", "int8"]
Tower = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides the speed of a CPU: its name, the cores that this process may use, the vector instructions that it
    has, and the system."""

    processor: str
    cores: int
    instructions: tuple[str, ...]
    system: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Calls of a tower with `batch` images or sentences: the median and the 95th percentile of the milliseconds per
    image or sentence. `spread` is half of the range of the medians of the rounds, as a share of the median."""

    batch: int
    median_ms: float
    p95_ms: float
    spread: float
    calls: int

    @property
    def per_second(self) -> float:
        """Images or sentences."""
        return 1000 / self.median_ms


@dataclass(frozen=True, kw_only=True)
class ModelLatency:
    """How fast a model was in one way of running it.

    `weights` is the digest by which results of evaluations name the same model. `device` is cpu, or the name of the
    GPU; `threads` are CPU threads. `image_flops` and `text_flops` are as in an export. `bytes` are those of the weights
    on disk; `memory` is by how many bytes the process, or the GPU, grew with the weights and all batches. `load` is
    that of the machine in the minute before, in busy cores. `order` are the models of these rounds, in the order of the
    first.
    """

    name: str
    weights: str
    backend: Backend
    precision: Precision
    device: str
    threads: int
    parameters: int
    image_parameters: int
    image_flops: int | None
    text_flops: int | None
    bytes: int
    memory: int | None
    image: tuple[Timing, ...]
    text: tuple[Timing, ...]
    load: float | None
    order: tuple[str, ...]
    versions: dict[str, str]
    finished: str

    @property
    def way(self) -> str:
        """How it was run; int8 has no other number format beside it."""
        return self.backend if self.backend == "int8" else f"{self.backend} in {self.precision}"

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """A later measurement with the same key replaces this one."""
        return self.weights, self.backend, self.precision, self.device, self.threads


@dataclass(frozen=True, kw_only=True)
class Latency(Document):
    """All measurements of one machine."""

    SCHEMA: ClassVar[str] = "dimefm.latency"

    machine: Machine
    models: tuple[ModelLatency, ...]

    def problems(self) -> list[Problem]:
        """Problems that the types cannot express."""
        timings = [(one, timing) for one in self.models for timing in (*one.image, *one.text)]
        return [
            Problem("models", f"{one.name} has a batch of {timing.batch} in {timing.median_ms} ms")
            for one, timing in timings
            if timing.batch < 1 or not 0 < timing.median_ms <= timing.p95_ms
        ]
