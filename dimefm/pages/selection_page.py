"""Sections about a selection of sentences: what was kept, what was not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from cache_schemas.text_selection import SELECTION_FILE, Example, TextSelection
from dimefm.inspection.info import examine
from dimefm.pages.charts import Bar, bar_chart, histogram
from dimefm.pages.page import Block, Cell, Chart, Facts, Section, Table
from dimefm.selection.report import left_out
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage

_SOURCES = 200  # rows of the table; a chart has the largest of them
_CHARTED = 16
_SHOWN_BELOW = ("of", "left out", "", "read more")  # lines of info that the charts and tables have


def selection_sections(paths: Sequence[str]) -> list[Section]:
    """A section for each selection. One that is unfinished is described in words."""
    sections = []
    for path in paths:
        described = examine(path)
        blocks: list[Block] = [Facts([row for row in described.rows if row[0] not in _SHOWN_BELOW])]
        if storage.exists(storage.join(path, SELECTION_FILE)):
            blocks += _blocks(SelectedTexts(path).document)
        sections.append(Section(described.title, blocks))
    return sections


def _blocks(found: TextSelection) -> list[Block]:
    charts: list[Block] = [_outcomes(found), _shares(found)]
    if found.histogram:
        shown = found.histogram
        by_hits = shown.of != "score"
        counts = [("kept", shown.kept), ("dropped", shown.dropped)]
        name = "Sentences by score" if not by_hits else "Sentences by hits"
        charts.append(histogram(name, shown.edges, counts, shown.of, "sentences", log_across=by_hits))
    return [*charts, _sources(found), *_examples(found)]


def _outcomes(found: TextSelection) -> Chart:
    """How many sentences were kept, and how many each condition left out."""
    counts = [("kept", found.kept), *((reason, count) for reason, count in left_out(found) if count)]
    bars = [Bar(count, f"{count:,}, {count / found.rows:.1%}") for _, count in counts]
    return bar_chart("What became of the sentences", [name for name, _ in counts], [("sentences", bars)], "sentences")


def _shares(found: TextSelection) -> Chart:
    """The share of each source file that was kept."""
    largest = sorted(found.sources, key=lambda source: (-source.rows, source.file))[:_CHARTED]
    ordered = sorted(largest, key=lambda source: (-source.kept / max(1, source.rows), source.file))
    bars = [Bar(100 * one.kept / max(1, one.rows), f"{one.kept / max(1, one.rows):.1%}") for one in ordered]
    return bar_chart("Share kept of each source", [one.file or "(none)" for one in ordered], [("kept", bars)], "%")


def _sources(found: TextSelection) -> Table:
    rows = []
    for one in sorted(found.sources, key=lambda source: (-source.kept, -source.rows, source.file))[:_SOURCES]:
        share, part = one.kept / max(1, one.rows), one.kept / max(1, found.kept)
        rows.append(
            (
                one.file or "(none)",
                Cell(f"{one.rows:,}", one.rows),
                Cell(f"{one.kept:,}", one.kept),
                Cell(f"{share:.1%}", share, share=share),
                Cell(f"{part:.1%}", part, share=part),
            )
        )
    head = ("file", "sentences", "kept", "share of the file", "share of the selection")
    more = len(found.sources) - _SOURCES
    caption = "Source files" + (f", the first {_SOURCES} of {len(found.sources):,}" if more > 0 else "")
    return Table(head, rows, "lrrrr", caption)


def _examples(found: TextSelection) -> list[Block]:
    """What was kept beside what was dropped, and the other groups of examples."""
    groups: dict[str, list[Example]] = {}
    for example in found.examples:
        groups.setdefault(example.group, []).append(example)
    blocks: list[Block] = []
    for kept, dropped in (("kept, the last", "dropped, the best"), ("kept, at random", "dropped, at random")):
        if kept in groups and dropped in groups:
            blocks.append(_side_by_side(kept, groups.pop(kept), dropped, groups.pop(dropped)))
    for group, examples in groups.items():
        rows = [(*_score(one), one.text, one.file, one.like or "") for one in examples]
        head = ("score", "hits", "sentence", "file", "like")
        if not any(one.like for one in examples):
            rows, head = [row[:-1] for row in rows], head[:-1]  # type: ignore[misc,assignment]
        blocks.append(Table(head, rows, "rrlll", f"Examples: {group}"))
    return blocks


def _side_by_side(kept: str, left: list[Example], dropped: str, right: list[Example]) -> Table:
    rows = []
    for one, other in zip_longest(left, right):
        cells = [(*_score(example), example.text) if example else ("", "", "") for example in (one, other)]
        rows.append((*cells[0], *cells[1]))
    return Table(("score", "hits", kept, "score", "hits", dropped), rows, "rrlrrl", f"{kept} | {dropped}")


def _score(one: Example) -> tuple[Cell, Cell]:
    score = Cell("") if one.score is None else Cell(f"{one.score:.3f}", one.score)
    return score, Cell(f"{one.hits:,}", one.hits)
