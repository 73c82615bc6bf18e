"""The log of a run in trackio or wandb too. trackio has wandb's calls, so one class hands rows to either.

A tracker neither ends nor holds up a run: its first error is shown as a note, and training goes on without it. It needs
no network: without a login, or without an answer, wandb writes into RUN/wandb, for `wandb sync`.

Each step is one row there, once: a run that goes on repeats the steps after its last checkpoint, and those that were
logged before it was stopped are not logged again.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache_schemas.run import LOGGED_TO_FILE
from dimefm.system import storage
from dimefm.training.config import TrainConfig
from dimefm.training.read_metrics import read_lines

_PROJECT = "dimefm"
_SECONDS_TO_BEGIN, _SECONDS_TO_END = 20, 30  # that wandb may take for an answer, and for what is left to send


@dataclass(frozen=True)
class _Run:
    """A run that a library has opened. `log` takes a row and its step, `finish` whether the run failed; `next_step` is
    1 more than the last step that is there, None where the library cannot say; `shown` says where it is to be seen."""

    log: Callable[[dict[str, float], int], None]
    finish: Callable[[bool], object]
    next_step: int | None
    shown: str


class Tracker:
    """Rows on their way to `config.log_to`. A run that is `resumed` goes on in its history, and a line of metrics.jsonl
    that is `kept` and not there is logged first. `note` shows a line to the user."""

    def __init__(
        self, config: TrainConfig, note: Callable[[str], None], *, resumed: bool, kept: list[dict[str, Any]]
    ) -> None:
        self._to, self._note = config.log_to, note
        self._row, self._step, self._last = dict[str, float](), 0, 0
        self._run: _Run | None = None
        self._path = Path(config.out) / LOGGED_TO_FILE
        with self._surviving():
            self._open(config, resumed)
        if self._run:
            self._note(f"logged to {self._to} too: {self._run.shown}")
        for line in kept:
            self.add(line["event"], line["step"], {k: v for k, v in line.items() if k not in ("event", "step")})

    def _open(self, config: TrainConfig, resumed: bool) -> None:
        project = config.log_project or _PROJECT
        marks = {(mark["to"], mark["project"]): mark for mark in read_lines(self._path)}
        mark = marks.get((self._to, project)) if resumed else None
        folder = re.sub(r"[^\w.-]", "-", Path(config.out).name, flags=re.ASCII)[:40]
        mark = mark or {"to": self._to, "project": project, "run": f"{folder}-{secrets.token_hex(4)}", "step": 0}
        self._mark = marks[self._to, project] = mark
        storage.write_atomic(str(self._path), "".join(json.dumps(one) + "\n" for one in marks.values()).encode())
        opened = _open_wandb if self._to == "wandb" else _open_trackio
        self._run = opened(config, project, mark["run"])
        self._last = mark["step"] if self._run.next_step is None else self._run.next_step - 1

    def add(self, event: str, step: int, values: dict[str, float | None]) -> None:
        """Add values to the row of a step, after all rows of earlier steps."""
        if step != self._step:
            self.hand_over()
        self._step = step
        self._row |= {f"{event}/{name}": value for name, value in values.items() if value is not None}

    def hand_over(self) -> None:
        """Log the row that has been added, which is complete."""
        row, self._row = self._row, {}
        if self._run and row and self._step > self._last:
            with self._surviving():
                self._run.log(row, self._step)
                self._last = self._step
                with self._path.open("a", encoding="utf-8") as marks:
                    marks.write(json.dumps({**self._mark, "step": self._last}) + "\n")

    def close(self, *, failed: bool) -> None:
        """End, in bounded time. A row that may lack something is left to the run that goes on."""
        if self._run:
            with self._surviving():
                self._run.finish(failed)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Around all that the library does: what it prints is not shown, and its first error is its last."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                yield
                return
            except Exception as error:
                reason = _first_line(error)
            if self._to == "wandb":
                with suppress(Exception):
                    import wandb

                    wandb.teardown()  # or it shows a traceback when this process ends
        self._run = None
        self._note(f"nothing more is logged to {self._to}, and training goes on: {reason}")


def _open_trackio(config: TrainConfig, project: str, name: str) -> _Run:
    import trackio

    run = trackio.init(project=project, name=name, config=config.to_json(), resume="allow")
    ahead = getattr(run, "_next_step", None)
    unknown = run.url and not ahead  # the server may not have answered
    shown = f"{name}, in: trackio show --project {project}"
    return _Run(run.log, lambda _: trackio.finish(), None if unknown else ahead, shown)


def _open_wandb(config: TrainConfig, project: str, name: str) -> _Run:
    import wandb

    wishes: dict[str, Any] = {
        "console": "off", "silent": True, "init_timeout": _SECONDS_TO_BEGIN, "finish_timeout": _SECONDS_TO_END,
        "x_transaction_log_flush_interval": 0.1,  # what is not flushed is lost when a run is killed
    }  # fmt: skip
    settings = wandb.Settings(**{field: wish for field, wish in wishes.items() if field in wandb.Settings.model_fields})
    unwanted, why = os.environ.get("WANDB_MODE") == "disabled", ""
    try:
        online = unwanted or wandb.login(prompt=False)
    except wandb.Error as error:  # after ten seconds without an answer
        online, why = False, f" ({_first_line(error)})"
    run = wandb.init(
        project=project, id=name, name=name, config=config.to_json(), resume="allow", reinit="create_new",
        dir=os.environ.get("WANDB_DIR", config.out), mode=None if online else "offline", settings=settings,
    )  # fmt: skip
    stored = f"{name}, offline{why}; wandb sync {run.settings.wandb_dir} sends it"
    return _Run(
        log=partial(run.log, commit=True),
        finish=lambda failed: run.finish(exit_code=int(failed)),
        next_step=None if run.offline else run.step,
        shown="nowhere, since WANDB_MODE is disabled" if unwanted else run.url or stored,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
