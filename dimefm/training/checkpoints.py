"""Checkpoints of a run: written whole or not at all, the last few and the best kept.

RUN/checkpoints/step-00001200.pt   tensors and plain values only (read with weights_only=True)
RUN/checkpoints/last.json          {"step": 1200, "crc32c": {...}}, with the checksum of each file by its step
RUN/checkpoints/best.json          {"step": 900, "score": 0.61}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import google_crc32c

from cache_schemas.run import CHECKPOINTS
from dimefm.errors import StoreError
from dimefm.system import storage

_NAME = re.compile(r"step-(\d{8})\.pt")
_BLOCK = 2**20


class Checkpoints:
    """The checkpoints of the run in the folder `run`. The last `keep` of them are kept, and the best."""

    def __init__(self, run: str, keep: int = 2) -> None:
        self._folder, self._keep = Path(run) / CHECKPOINTS, keep

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Write the state after `step` steps and delete older ones. A `score` above all before makes it the best.

        Raises StoreError if it cannot be written, as on a full disk; earlier checkpoints are not touched then.
        """
        import torch

        path = self._path(step)
        with storage.writing_to(str(path)):
            storage.remove_leftovers(str(self._folder))  # left by a kill: they may be what fills the disk
            try:
                with storage.writing_atomically(str(path)) as file:
                    checksummed = _ChecksummedFile(file)
                    torch.save(state, checksummed)  # type: ignore[arg-type]
            except RuntimeError as error:  # torch's writer hides why it could not write
                raise _os_error_behind(error) from error
            checksums = {**self._checksums(), str(step): checksummed.checksum}
            if score is not None and score > self._best_score():
                storage.write_json(str(self._folder / "best.json"), {"step": step, "score": score})
            kept = {*[s for s in self.steps() if s <= step][-self._keep :], step, self.step("best")}
            checksums = {s: c for s, c in checksums.items() if int(s) in kept}
            storage.write_json(
                str(self._folder / "last.json"), {"step": step, "crc32c": checksums}
            )  # from here on it counts
            for old in set(self.steps()) - kept:
                self._path(old).unlink()

    def load(self, which: str = "last") -> dict[str, Any] | None:
        """The state of "last", "best" or the number of a step; None if there is no such checkpoint. Raises StoreError
        for a damaged file."""
        import torch

        step = self.step(which)
        if step is None:
            return None
        path, expected = self._path(step), self._checksums().get(str(step))
        try:
            if expected is not None and _checksum(path) != expected:
                raise ValueError("its checksum does not fit")
            return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        except Exception as error:  # torch's reader raises a dozen kinds
            reason = str(error).strip().split("\n")[0]
            others = [s for s in self.steps() if s < step]
            remedy = "delete the run folder: there is no other checkpoint"
            if others:
                remedy = f"delete it: training then goes on from {self._path(others[-1]).name}"
            raise StoreError(f"{path} cannot be read: {reason}", remedy=remedy) from None

    def step(self, which: str = "last") -> int | None:
        """The step of the checkpoint that is meant by "last", "best" or a number; None if there is none. If the file of
        the last one was deleted, "last" is the one before."""
        if which.isdigit():
            return int(which) if self._path(int(which)).exists() else None
        path = self._folder / f"{which}.json"
        if not path.exists():  # last.json was lost: take the newest file
            return max(self.steps(), default=None) if which == "last" else None
        step = int(storage.read_json(str(path))["step"])
        if which == "last" and not self._path(step).exists():
            return max((s for s in self.steps() if s < step), default=None)
        return step

    def _checksums(self) -> dict[str, int]:
        path = self._folder / "last.json"
        return dict(storage.read_json(str(path))["crc32c"]) if path.exists() else {}

    def _best_score(self) -> float:
        step, path = self.step("best"), self._folder / "best.json"
        there = step is not None and self._path(step).exists()
        return float(storage.read_json(str(path))["score"]) if there else float("-inf")

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(int(m[1]) for p in names if (m := _NAME.fullmatch(p.name)))


class _ChecksummedFile:
    """A file to write to, and the crc32c of what was written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self.checksum = file, 0

    def write(self, data: memoryview) -> int:
        """Write all of `data`."""
        for at in range(0, len(data), _BLOCK):
            self.checksum = google_crc32c.extend(self.checksum, bytes(data[at : at + _BLOCK]))
        return int(self._file.write(data))

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def _checksum(path: Path) -> int:
    """crc32c of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = google_crc32c.extend(value, block)
    return value


def _os_error_behind(error: BaseException) -> BaseException:
    """The OSError behind an error, or the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error
