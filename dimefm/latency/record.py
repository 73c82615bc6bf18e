"""The file latency.json: it is read before anything is measured, and measurements are added to it."""

from __future__ import annotations

from pathlib import Path

from cache_schemas.latency import Latency, Machine, ModelLatency
from dimefm.errors import OutputExistsError, StoreError
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.wording import counted


class Record:
    """The measurements of one machine in a file."""

    def __init__(self, path: str, machine: Machine) -> None:
        """Raises OutputExistsError for a folder, or for measurements of another machine, and SchemaError for another
        document."""
        self.path, self._machine = storage.local(path, "a file of measurements"), machine
        if Path(self.path).is_dir():
            raise OutputExistsError(f"{path} is a folder", remedy="give --out a name such as latency.json")
        if Path(self.path).exists():
            there = read_latency(self.path).machine
            if there != machine:
                what = f"{path} has measurements of another machine ({describe_machine(there)})"
                raise OutputExistsError(what, remedy="give another --out")

    def add(self, models: list[ModelLatency]) -> None:
        """Write the file with these measurements; each replaces an earlier one with the same key."""
        found = {one.key: one for one in read_latency(self.path).models} if Path(self.path).exists() else {}
        for one in models:
            found.pop(one.key, None)
            found[one.key] = one
        document = Latency(machine=self._machine, models=tuple(found.values()))
        with storage.writing_to(self.path):
            storage.write_json(self.path, document.to_json())


def read_latency(path: str) -> Latency:
    """The measurements in a file. Raises StoreError where there is none, SchemaError for another document."""
    if not storage.exists(storage.absolute(path)):
        remedy = did_you_mean_path(path, "dimefm latency MODEL... --out FILE writes it")
        raise StoreError(f"{path} does not exist", remedy=remedy)
    return Latency.parse(storage.read_json(storage.absolute(path)), path)


def describe_machine(machine: Machine) -> str:
    """The machine in a line."""
    parts = (machine.processor, counted(machine.cores, "core"), machine.system, " ".join(machine.instructions))
    return ", ".join(filter(None, parts))
