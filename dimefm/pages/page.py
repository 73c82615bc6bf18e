"""What a page is made of: sections of blocks, which a template turns into one HTML file that needs no other file.

Every text may have been written by others: a key, a caption, the name of a file or a class. The template escapes all of
it, and a policy in the page forbids every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from dimefm.system.inert_text import text

if TYPE_CHECKING:
    import jinja2

Mark = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Words:
    """A paragraph; a `warning` stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names, and what there is to say of each, as `dimefm info` has them."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its words; the number that it is sorted by, if not its words; a picture before them, as a
    `data:` URI; a bar below them, as a share of the width; and whether it is good or bad."""

    words: str
    value: float | None = None
    image: str | None = None
    share: float | None = None
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column and filtered. `align` has a letter for each column, `l` or `r`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    align: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """A picture, as a `data:` URI (None: there is none to show), with a title and lines below it."""

    image: str | None
    title: str
    lines: Sequence[str] = ()
    mark: Mark = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures that can be filtered by their words."""

    cards: Sequence[Card]
    caption: str = ""


@dataclass(frozen=True)
class Dot:
    """A point of a map: its place, its group, its words, and its picture."""

    x: float
    y: float
    words: str
    group: int = 0
    image: str | None = None


@dataclass(frozen=True)
class Chart:
    """A drawing as SVG (see pages.charts), with its title, its content in words for who cannot see it, and a legend:
    the number of a colour and a name."""

    title: str
    svg: Markup
    alt: str
    legend: Sequence[tuple[int, str]] = ()
    note: str = ""
    dots: Sequence[Dot] = ()
    """Of a map: its points in the order in which they are drawn. Their words and pictures are shown at the pointer."""


Block = Words | Facts | Table | Gallery | Chart


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """`subtitle` says what was looked at, and when."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render(page: Page, *, script: str = "", served: bool = False) -> str:
    """The page as HTML. `script` is JavaScript beside the page's own; `served`: it may ask the server it came from."""
    code = Markup(template_file("page.js") + script)  # ours: nothing of a user is in it
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    style = Markup(template_file("page.css"))
    return _template("page.html").render(page=page, script=code, style=style, digest=digest, served=served)


def render_sections(page: Page) -> str:
    """The sections alone, to take the place of those of a page that is open."""
    return _template("sections.html").render(page=page)


@lru_cache
def template_file(name: str) -> str:
    """A file of the folder templates: HTML, CSS or JavaScript."""
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


@lru_cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment


def _inert(value: Any) -> Any:
    """What a template shows: text without control characters and marks that turn the direction of what follows."""
    return text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
