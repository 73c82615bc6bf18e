"""Words of a model card: what others named is shown so that no HTML, link or Markdown begins in it."""

from __future__ import annotations

import re

from cache_schemas.export import ExportOrigin
from dimefm.system.inert_text import line, markdown


def code(value: object) -> str:
    """A name as code, also within a cell of a table: nothing in it means anything in Markdown. The two characters that
    could end it are shown by others, since no escape works everywhere."""
    shown = line(value).replace("`", "'").replace("|", "\N{BROKEN BAR}").strip()
    return f"`{shown}`" if shown else "(no name)"


def words(value: object) -> str:
    """Running text, also within a cell: as `inert_text.markdown`, and no address in it becomes a link. A space breaks
    it, since some readers look for addresses once they have taken escapes away."""
    shown = markdown(value).replace("*", "\\*").replace("_", "\\_")
    return shown.replace("://", ": //").replace("www.", "www .")


def points(value: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * value:.1f}"


def repository(origin: ExportOrigin | None) -> str | None:
    """Where the Hub has the teacher, unless the document, which anyone may have written, names no repository."""
    name = origin.repository if origin else None
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else None
