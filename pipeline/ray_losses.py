"""Workers that are lost on Ray, and how often a unit of work may lose its worker before the job ends."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError

from dimefm.errors import StoreError

LOST = (RayActorError, OutOfMemoryError)  # the second: Ray ended a worker because the node's memory was full
PATIENCE = 60.0  # seconds without any worker until a note says so
_TRIES = 3


def never_ran(error: Exception) -> bool:
    """Whether Ray sent an actor to a node that was lost already, and did not know yet: that is nobody's fault."""
    return "never ran" in str(error)


class Losses:
    """By unit of work, how often it lost its worker; None stands for a worker that was lost while it started."""

    def __init__(self) -> None:
        self._tries: dict[int | None, int] = {}

    def __contains__(self, unit: int) -> bool:
        return unit in self._tries

    def __bool__(self) -> bool:
        return bool(self._tries)

    def started(self) -> None:
        """A worker has started: the next one has all its tries."""
        self._tries.pop(None, None)

    def count(self, unit: int | None, name: str, error: Exception) -> None:
        """Raises StoreError with `name` where the unit has lost its worker too often."""
        self._tries[unit] = self._tries.get(unit, 0) + 1
        if self._tries[unit] >= _TRIES:
            lines = str(error).strip().split("\n")  # where its own code failed, what it raised comes last
            reason = lines[-1] if "creation task" in lines[0] else lines[0]
            lost = f"{name} lost its worker" if unit is not None else "a worker was lost while it started"
            remedy = "see the worker's log, mend the cause (often memory), and run again"
            raise StoreError(f"{lost} {_TRIES} times: {reason}", remedy=remedy)
