"""Every error that a user can cause or mend. Each says what went wrong, where, and the remedy.

Anything else that is raised is a bug in dimefm, and shows its traceback.
"""

from __future__ import annotations

import socket

RUN_AGAIN = "run the same command again; what was finished is kept"


class DimefmError(Exception):
    """Base of all of them; the command line prints its message alone and exits with 1."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(what if remedy is None else f"{what}\n  remedy: {remedy}")


class SourceError(DimefmError):
    """An input that is missing, empty or not in a layout that can be read."""


class AbsentError(SourceError):
    """A file, folder or glob that an argument names and that is not there: storage that answers says so."""


class OutputExistsError(DimefmError):
    """The output is already there and is not what this command would write."""


class MismatchError(DimefmError):
    """Two things that must come from the same teacher, source or settings do not. Names the fields."""


class StoreError(DimefmError):
    """A store, index or run that is missing, unfinished or damaged."""


class UnreadableError(StoreError):
    """Images, files of a store or a teacher that were there before and cannot be read now, on the machine `host`."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        self.host = socket.gethostname()  # an error that was raised on another machine brings its own
        super().__init__(what, remedy=remedy)


class TeacherError(DimefmError):
    """A teacher that cannot be loaded as asked, or would silently be another model than the one meant."""


class RecallError(DimefmError):
    """An index that does not reach the recall asked for."""


class SelectionError(DimefmError):
    """Sentences that cannot be selected as asked: settings without effect, or nothing that fulfils them."""


class TrainingError(DimefmError):
    """A run that cannot start or go on: bad settings, NaN or infinity, a failed worker."""


class StoppedError(DimefmError):
    """A run that was asked to stop by a signal, and did so with a checkpoint. `signal` is its number."""

    def __init__(self, what: str, *, signal: int, remedy: str | None = None) -> None:
        self.signal = signal
        super().__init__(what, remedy=remedy)
