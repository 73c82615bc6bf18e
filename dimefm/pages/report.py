"""`dimefm report`: one page for what dimefm wrote at some places, whatever that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import cast

from cache_schemas import SchemaError
from cache_schemas.latency import LATENCY_FILE
from dimefm.errors import DimefmError, OutputExistsError
from dimefm.inspection.kinds import Kind, kind_of, require_kind
from dimefm.pages.page import Page, Section, Words, render
from dimefm.system import storage
from dimefm.system.notes import note
from dimefm.version import __version__

_SECTIONS = {
    Kind.STORE: "store_page.store_sections",
    Kind.PAIRS: "pairs_page.pairs_sections",
    Kind.INDEX: "index_page.index_sections",
    Kind.SELECTION: "selection_page.selection_sections",
    Kind.IMAGE_SELECTION: "image_selection_page.image_selection_sections",
    Kind.LEAKS: "leaks_page.text_leaks_sections",
    Kind.SET: "set_page.set_sections",
    Kind.RUN: "run_page.run_sections",
    Kind.EVALUATIONS: "evaluation_page.evaluation_sections",
    Kind.LATENCY: "latency_page.latency_sections",
}
"""What makes the sections of a kind: a module of this room and its function, which takes the paths of all places of
this kind, so that models and runs can be compared; in the order of a page. Other kinds come last, and are shown as
`dimefm info` describes them."""

_BESIDE = {Kind.LATENCY: Kind.EVALUATIONS}
"""A kind whose sections need another: its function also takes the paths of all places of that kind."""

_MARK = b'<meta name="generator" content="dimefm">'


def report(paths: Sequence[str], out: str) -> str:
    """Write a page about `paths` to the file `out`, which may hold an older page; returns its path.

    Each path is a place of any kind that `dimefm info` knows, or a folder with several of these. Raises StoreError
    where there is nothing of dimefm's, OutputExistsError where `out` is another file or a folder.
    """
    target = Path(storage.local(out, "a page"))
    if target.is_dir() or (target.is_file() and _MARK not in target.read_bytes()[:2000]):
        raise OutputExistsError(f"{target} exists and is not a page of dimefm's", remedy="give another --out")
    page = make_page(paths)
    with storage.writing_to(str(target)):
        storage.make_folder(str(target.parent))
        storage.write_atomic(str(target), render(page).encode())
    return str(target)


def make_page(paths: Sequence[str]) -> Page:
    """The page about some places. Raises StoreError as `report` does."""
    found: dict[Kind, list[str]] = {}
    seen = set[str]()
    for path in paths:
        for kind, place in _places(path):
            if storage.absolute(place) not in seen:
                seen.add(storage.absolute(place))
                found.setdefault(kind, []).append(place)
    sections: list[Section] = []
    order = [*_SECTIONS, *(kind for kind in Kind if kind not in _SECTIONS)]
    for kind in sorted(found, key=order.index):
        note(f"looking at {', '.join(found[kind])} ...")
        beside = [found.get(_BESIDE[kind], [])] if kind in _BESIDE else []
        try:
            sections += _sections(kind, found[kind], *beside)
        except (DimefmError, SchemaError) as error:
            if len(seen) == 1:
                raise
            sections.append(Section(", ".join(found[kind]), [Words(str(error), warning=True)]))
    title = paths[0] if len(paths) == 1 else f"{len(paths)} places"
    return Page(f"dimefm: {title.rstrip('/')}", f"{_now()}, dimefm {__version__}", sections)


def _places(path: str) -> list[tuple[Kind, str]]:
    """A place with its kind; of a folder that is none itself, the places in it."""
    kind = kind_of(path)
    if kind is None and not storage.is_url(path) and Path(path).is_dir():
        inside = [str(one) for one in sorted(Path(path).iterdir()) if one.is_dir() or one.name == LATENCY_FILE]
        known = [(kind, one) for one in inside if (kind := kind_of(one))]
        if known:
            return known
    return [(kind or require_kind(path, "report"), path)]


def _sections(kind: Kind, *places: list[str]) -> list[Section]:
    name = _SECTIONS.get(kind, "described.described_sections")
    module, function = name.split(".")
    sections = cast(Callable[..., list[Section]], getattr(import_module(f"{__package__}.{module}"), function))
    return sections(*places)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
