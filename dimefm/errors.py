"""Every error that a user can cause or mend. Each says what went wrong, where, and the remedy.

DimefmError
  |- SourceError          an input is missing, empty, or not in a layout that can be read
  |    `- AbsentError     ... because storage answers that it does not exist
  |- OutputExistsError    the output exists and is not what this command would write
  |- MismatchError        two things do not come from the same teacher, source or settings
  |- StoreError           a store, index or run is missing, unfinished or damaged
  |    `- UnreadableError ... or was there before and cannot be read now, on one machine
  |- TeacherError         a teacher cannot be loaded as asked
  |- RecallError          an index does not reach the recall that was asked for
  |- SelectionError       sentences cannot be selected as asked
  |- TrainingError        a run cannot start or go on
  `- StoppedError         a run was stopped by a signal, and wrote a checkpoint

The command line prints the message alone and exits with 1; after a StoppedError with 128 + the signal, as a shell does.
It treats a SchemaError (cache_schemas.problems), of a document that does not follow its schema, in the same way. Any
other exception is a bug in dimefm, and shows its traceback.
"""

from __future__ import annotations

import socket

RUN_AGAIN = "run the same command again; what was finished is kept"


class DimefmError(Exception):
    """An error that the user can mend: `what` went wrong and where, and the `remedy`."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(what if remedy is None else f"{what}\n  remedy: {remedy}")


class SourceError(DimefmError):
    """An input is missing, empty, or not in a layout that can be read."""


class AbsentError(SourceError):
    """A file, folder or glob that an argument names does not exist: this is what the storage answered."""


class OutputExistsError(DimefmError):
    """The output exists and is not what this command would write."""


class MismatchError(DimefmError):
    """Two things that must come from the same teacher, source or settings do not. The message names the fields."""


class StoreError(DimefmError):
    """A store, index or run is missing, unfinished or damaged."""


class UnreadableError(StoreError):
    """Images, files of a store or a teacher were there before and cannot be read now, on the machine `host`."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        self.host = socket.gethostname()  # an error that was raised on another machine keeps the name of that one
        super().__init__(what, remedy=remedy)


class TeacherError(DimefmError):
    """A teacher cannot be loaded as asked, or would silently be another model than the one that is meant."""


class RecallError(DimefmError):
    """An index does not reach the recall that was asked for."""


class SelectionError(DimefmError):
    """Sentences cannot be selected as asked: settings have no effect, or no sentence fulfils them."""


class TrainingError(DimefmError):
    """A run cannot start or go on: bad settings, NaN or infinity, a failed worker."""


class StoppedError(DimefmError):
    """A run was asked to stop by the signal with the number `signal`, and stopped after a checkpoint."""

    def __init__(self, what: str, *, signal: int, remedy: str | None = None) -> None:
        self.signal = signal
        super().__init__(what, remedy=remedy)
