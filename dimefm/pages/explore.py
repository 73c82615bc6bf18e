"""`dimefm explore`: a page that asks a store or an index: type a sentence, give an image, or go on from a row.

The page is there at once; behind it a thread makes the search ready and then loads the teacher. A row asks with its own
embedding, which needs no teacher. Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schemas import SchemaError
from dimefm.caching.thumbnails import thumbnails
from dimefm.errors import DimefmError, StoreError
from dimefm.pages.page import Page, render, template_file
from dimefm.pages.row_sample import sample_rows
from dimefm.pages.server import Request, Response, Routes, as_json, as_text, serve
from dimefm.retrieval.searched import Encoder, Hit, Searched, SearchedRows, Student, decoded
from dimefm.store.failures import require_embeddings
from dimefm.system.inert_text import text
from dimefm.system.machine import available_memory
from dimefm.system.notes import note
from dimefm.system.wording import counted
from dimefm.version import __version__

_MOST = 1000  # results
_SIDE = 256  # of a picture


@dataclass(frozen=True)
class ExploreConfig:
    """What is explored, and how."""

    path: str
    """Store or index."""
    teacher: str | None = None
    """Where the teacher is now. Default: where it was when the store was written."""
    pretrained: str | None = None
    """Pretrained tag of `teacher`."""
    device: str | None = None
    """Where the model and the search run. Default: cuda if there is a GPU, else cpu."""
    memory: int | None = None
    """Memory that the rows of a store may be kept in, such as 4GB; if they do not fit, each answer reads them. Default:
    half of this machine's."""


def explore(config: ExploreConfig, port: int, *, student: Student | None = None, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; `ready` gets its URL. Port 0 is any free one.

    Raises StoreError where there is neither store nor index, MismatchError for a `student` of another teacher,
    DimefmError where the port cannot be had. What goes wrong later is said in the page.
    """
    explorer = Explorer(config, student)
    with explorer.loading():
        serve(explorer.routes, port, ready=ready)


class Explorer:
    """Answers what the page asks. Raises as `explore` does."""

    def __init__(self, config: ExploreConfig, student: Student | None = None) -> None:
        self._config, self._student = config, student
        self._searched = Searched(config.path, student)
        self._store = self._searched.store
        self._rows, self._encoder = Future[SearchedRows](), Future[Encoder]()
        self._lock = threading.Lock()  # one question at a time: each uses all cores, and memory for one
        schema = self._store.schema
        self._bytes = schema.rows * schema.dim * 4
        self._kept = self._bytes <= (config.memory or available_memory() // 2)
        self.routes: Routes = {
            ("GET", "/"): self._page,
            ("GET", "/state"): self._state,
            ("GET", "/start"): _in_words(self._start),
            ("GET", "/row"): _in_words(self._of_row),
            ("POST", "/text"): _in_words(self._of_text),
            ("POST", "/image"): _in_words(self._of_image),
            ("GET", "/picture"): self._picture,
        }

    def loading(self) -> ExitStack:
        """Begin to load what answers need, in a thread. Within the block that is returned it stays loaded."""
        stack = ExitStack()
        threading.Thread(target=self._load, args=(stack,), daemon=True).start()
        return stack

    def _load(self, stack: ExitStack) -> None:
        config = self._config
        if not self._kept and not self._searched.index:
            note(self._slow)
        try:
            self._rows.set_result(self._searched.open(config.device, keep=self._kept))
        except BaseException as error:  # whoever asks gets it
            self._rows.set_exception(error)
        try:
            self._encoder.set_result(
                stack.enter_context(self._searched.encoder(config.teacher, config.pretrained, config.device))
            )
        except BaseException as error:
            self._encoder.set_exception(error)

    # -- the page -----------------------------------------------------------------------------------------------------

    def _page(self, request: Request) -> Response:
        schema, student = self._store.schema, self._student
        how = f" of {self._store.path} by this index" if self._searched.index else ", by exact search"
        by = f"the student {student.name} of {schema.teacher.name}" if student else schema.teacher.name
        words = f"{counted(schema.rows, schema.kind)}{how}; what is asked is encoded by {by}; dimefm {__version__}"
        page = Page(f"dimefm: {self._config.path.rstrip('/')}", words, [])
        return Response(render(page, script=template_file("explore.js"), served=True).encode())

    def _state(self, request: Request) -> Response:
        """What the store holds, whether sentences can ask, and in words what is not ready, or went wrong."""
        problem = _problem(self._rows) or _problem(self._encoder)
        if problem:
            state, words = "failed", problem
        elif not self._rows.done():
            state, words = "loading", f"reading {counted(self._store.schema.rows, 'row')} ..."
        elif not self._encoder.done():
            model = "student" if self._student else "teacher"
            state, words = "loading", f"loading the {model} ... Rows can be clicked already."
        else:
            state, words = "ready", "" if self._kept or self._searched.index else self._slow
        facts = {"kind": self._store.schema.kind, "texts": self._has_texts, "state": state, "words": text(words)}
        return as_json(facts)

    @property
    def _slow(self) -> str:
        size = f"{self._bytes / 1e9:,.1f} GB"
        return f"every answer reads all rows, which would take {size} of memory: dimefm build-index makes answers quick"

    @property
    def _has_texts(self) -> bool:
        return self._store.schema.teacher.tokenizer != ""

    # -- questions ----------------------------------------------------------------------------------------------------

    def _start(self, request: Request) -> Any:
        """Some rows to begin with, spread over the store."""
        rows_N = sample_rows(self._store, _count(request)).rows_N
        if not len(rows_N):
            require_embeddings(self._store)
            raise StoreError(f"no row of {self._store.path} has an embedding")
        entries = self._store.samples(rows_N)
        return {"hits": [_shown(row, None, entry) for row, entry in zip(rows_N, entries, strict=True)]}

    def _of_row(self, request: Request) -> Any:
        row_1 = self._row(request)
        query_1D = self._store.gather(row_1).astype(np.float32)
        if not np.isfinite(query_1D).all() or not query_1D.any():
            raise DimefmError(f"row {row_1[0]} has no embedding")
        (entry,) = self._store.samples(row_1)
        return {"query": _shown(row_1[0], None, entry), **self._nearest(self._store.schema.kind, query_1D, request)}

    def _of_text(self, request: Request) -> Any:
        words = request.body.decode(errors="replace").strip()
        if not self._has_texts:
            what = f"{self._store.schema.teacher.name} has no text tower: it cannot be asked with a sentence"
            raise DimefmError(what, remedy="give an image, or click a row")
        if not words:
            raise DimefmError("there is no sentence to ask with")
        encoder = self._encoder.result()
        with self._lock:
            query_1D = encoder.of_text(words)
        return self._nearest("text", query_1D, request)

    def _of_image(self, request: Request) -> Any:
        encoder = self._encoder.result()
        with self._lock:
            query_1D = encoder.of_image(decoded(encoder.preprocessing, "the image", request.body))
        return self._nearest("image", query_1D, request)

    def _nearest(self, kind: str, query_1D: np.ndarray[Any, Any], request: Request) -> dict[str, Any]:
        count, rows = _count(request), self._rows.result()
        began = time.perf_counter()
        with self._lock:
            (hits,) = rows.nearest(kind, query_1D, count)
        if not hits:
            raise DimefmError("nothing is found", remedy=f"dimefm info {self._config.path} says what is in it")
        seconds = time.perf_counter() - began
        return {"hits": [_of_hit(hit) for hit in hits], "milliseconds": round(1000 * seconds)}

    def _picture(self, request: Request) -> Response:
        """A row as a JPEG, or in words why there is none."""
        if self._store.schema.kind != "image":
            raise DimefmError("there are no pictures of sentences")
        (found,) = thumbnails(self._store, self._row(request), _SIDE)
        return as_text(found) if isinstance(found, str) else Response(found, "image/jpeg")

    def _row(self, request: Request) -> np.ndarray[Any, Any]:
        """The row that is asked for, int64 (1,)."""
        row = request.query.get("row", "")
        if not _is_number(row) or int(row) >= self._store.schema.rows:
            raise DimefmError(f"there is no row {row}")
        return np.array([int(row)])


def _in_words(answer: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """A route that answers with JSON; what a user can mend is its `error`, in words."""

    def route(request: Request) -> Response:
        try:
            return as_json(answer(request))
        except (DimefmError, SchemaError, OSError) as error:
            return as_json({"error": text(error)})

    return route


def _problem(loaded: Future[Any]) -> str | None:
    error = loaded.exception() if loaded.done() else None
    return None if error is None else str(error) or type(error).__name__


def _count(request: Request) -> int:
    asked = request.query.get("count", "24")
    if not _is_number(asked) or not 1 <= int(asked) <= _MOST:
        raise DimefmError(f"{asked} results cannot be shown", remedy=f"ask for 1 to {_MOST:,}")
    return int(asked)


def _is_number(words: str) -> bool:
    return words.isascii() and words.isdigit() and len(words) < 19


def _of_hit(hit: Hit) -> dict[str, Any]:
    return _shown(hit.row, hit.score, hit.entry)


def _shown(row: int, score: float | None, entry: dict[str, Any]) -> dict[str, Any]:
    """A row as the page shows it: its words are the sentence, or the key of an image; `place` is where it is from."""
    words, place = (entry["text"], entry["key"]) if "text" in entry else (entry["key"], entry["file"])
    return {"row": int(row), "score": score, "words": text(words), "place": text(place)}
