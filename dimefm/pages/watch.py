"""`dimefm watch`: the page of a run that is being trained, which asks for what is new.

The page asks with the version that it shows, and gets the sections only where there is a newer one. So a run that logs
nothing costs a look at the times of five files.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cache_schemas.run import CHECKPOINTS, METRICS_FILE, REPORT_FILE, RUN_FILE
from dimefm.errors import StoreError
from dimefm.pages.page import Page, render, render_sections, template_file
from dimefm.pages.run_page import sections_of
from dimefm.pages.run_reading import LoggedRun, read_logged
from dimefm.pages.server import Request, Response, as_json, serve
from dimefm.system import storage
from dimefm.system.near_names import did_you_mean_path
from dimefm.system.wording import counted
from dimefm.version import __version__

_FILES = (RUN_FILE, METRICS_FILE, REPORT_FILE, f"{CHECKPOINTS}/last.json", f"{CHECKPOINTS}/best.json")
_PATIENCE = 60.0  # seconds without a word, at least, before a run is said to be silent
_LINES = 3  # as many lines of the log may be late


def watch(run: str, port: int, *, ready: Callable[[str], None]) -> None:
    """Serve the page of the run folder `run` until Ctrl-C or SIGTERM; `ready` gets its URL. Port 0 is any free one.

    Raises StoreError where there is no run, DimefmError where the port cannot be had.
    """
    watched = WatchedRun(run)
    serve({("GET", "/"): watched.page, ("GET", "/now"): watched.now}, port, ready=ready)


class WatchedRun:
    """A run, as far as it was when it was last asked for. Raises StoreError where there is none."""

    def __init__(self, path: str) -> None:
        if not Path(storage.local(path, "a run to watch")).exists():
            remedy = did_you_mean_path(path, "start it first: dimefm train-student ... --out RUN")
            raise StoreError(f"{path} does not exist", remedy=remedy)
        if not Path(path).is_dir():
            raise StoreError(f"{path} is a file", remedy="give the folder of a run")
        self._path = path
        self._lock = threading.Lock()  # several windows may ask
        self._version = ""
        self._look()

    def page(self, request: Request) -> Response:
        """The whole page."""
        with self._lock:
            self._look()
            page = self._page
        return Response(render(page, script=template_file("watch.js"), served=True).encode())

    def now(self, request: Request) -> Response:
        """How it is now, as JSON, with the sections where the one who asks shows another `version` of them."""
        with self._lock:
            changed = self._look()
            state, words = _state(self._logged, time.time() - changed)
            sections = render_sections(self._page) if request.query.get("version") != self._version else None
            return as_json(
                {"version": self._version, "state": state, "words": words, "changed": changed, "sections": sections}
            )

    def _look(self) -> float:
        """Read the run again if a file of it is another one. Returns the time of its last change."""
        version, changed = _version(self._path)
        if version != self._version:
            (self._logged,) = read_logged([self._path])
            self._page = Page(
                f"dimefm: {self._path.rstrip('/')}", f"watched by dimefm {__version__}", sections_of([self._logged])
            )
            self._version = version  # last: what could not be read is read again
        return changed


def _version(path: str) -> tuple[str, float]:
    """A word that is another one when a file of the run is, and the time of the last change. A file is looked at before
    it is read: what is written in between has another version."""
    seen, last = hashlib.sha256(), 0.0
    for name in _FILES:
        try:
            file = Path(path, name).stat()
        except FileNotFoundError:
            seen.update(b"none;")
            continue
        seen.update(f"{file.st_ino} {file.st_size} {file.st_mtime_ns};".encode())
        last = max(last, file.st_mtime)
    return seen.hexdigest()[:16], last


def _state(logged: LoggedRun, silent: float) -> tuple[str, str]:
    """A name for the page's style, and words."""
    if logged.finished:
        return "finished", f"finished: {counted(logged.run.steps, 'step')}"
    if silent > max(_PATIENCE, _LINES * _between_lines(logged)):
        return "silent", f"not heard of for {silent:,.0f} s, after {logged.done:,} of {logged.run.steps:,} steps"
    return "training", f"training: {logged.done:,} of {counted(logged.run.steps, 'step')}"


def _between_lines(logged: LoggedRun) -> float:
    """Seconds from one line of the log to the next, by its last line; 0 where there is none."""
    speed = logged.points("train", "images_per_second")[-1:]
    images = logged.batch_size * float(logged.config["log_every"])
    return images / speed[0][1] if speed and speed[0][1] > 0 else 0.0
