"""Sections about embedding stores of images and of texts, finished or not.

Commits and failures are read to their end or to a bound; embeddings, keys and pictures are those of a sample.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from cache_schemas import Status
from dimefm.inspection.describe_store import failures_of
from dimefm.inspection.description import Description
from dimefm.inspection.info import examine
from dimefm.pages.charts import Bar, Line, bar_chart, line_chart
from dimefm.pages.embedding_blocks import distributions, duplicates, embedding_map, in_words, look
from dimefm.pages.page import Block, Cell, Facts, Section, Table, Words
from dimefm.pages.short_words import short, short_names
from dimefm.store.embedding_store import Store
from dimefm.system.wording import counted

_DOTS, _FEWEST_DOTS = 600, 120  # of all maps of a page, since each has a picture; and of one map
_FAILURES, _EXAMPLES, _MOST_LINES = 300, 3, 8
_PENDING = "not done yet"
_IN_TABLE = ("failed", "")  # lines of info about failures, which have a table here


def store_sections(paths: Sequence[str]) -> list[Section]:
    """What is in each store."""
    dots = max(_FEWEST_DOTS, _DOTS // len(paths))
    return [
        section for path, name in zip(paths, short_names(paths), strict=True) for section in _store(path, name, dots)
    ]


def _store(path: str, name: str, dots: int) -> list[Section]:
    store, found = Store(path), examine(path)
    blocks: list[Block] = []
    if not found.facts["finished"]:
        done = f"{found.facts['shards_done']:,} of {counted(found.facts['shards'], 'shard')} are done"
        blocks.append(Words(f"This store is unfinished: {done}. The same command goes on there.", warning=True))
    facts = [row for row in found.rows if row[0] not in _IN_TABLE]
    blocks += [Facts([("path", store.path), *facts]), _status(found)]
    blocks += [*_throughput(store, found), *_failures(path, found), _identity(found)]
    sections = [Section(f"{name}: {store.schema.kind}s", blocks)]
    looked = look(store, found.facts["status"].get(Status.OK.name, 0))
    if looked is None:
        nothing = Words("There are too few embeddings yet to draw any.", warning=True)
        return [*sections, Section(f"{name}: embeddings", [nothing])]
    drawn = [*distributions(looked), embedding_map(looked, dots)]
    alike = duplicates(looked)
    warnings = looked.pictures.notes() if looked.pictures else []
    said = Words(f"Of a sample: {in_words(looked)}.")
    return [
        *sections,
        Section(f"{name}: embeddings", [said, *warnings, *drawn]),
        Section(f"{name}: near-duplicates", alike),
    ]


def _status(found: Description) -> Block:
    counts: dict[str, int] = dict(found.facts["status"])
    if pending := found.facts["rows"] - sum(counts.values()):
        counts[_PENDING] = pending
    bars = [Bar(count, f"{count:,}") for count in counts.values()]
    note = f"of {counted(found.facts['rows'], 'row')}"
    return bar_chart("Rows by status", list(counts), [("rows", bars)], "rows", note=note)


def _throughput(store: Store, found: Description) -> list[Block]:
    """Rows per second of each shard, in the order in which they were finished; a line for each device."""
    timed = [(one.finished, one.shard, one.device, one.stop - one.start, one.seconds) for one in store.commits()]
    devices = {device for _, _, device, _, seconds in timed if seconds > 0}
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, (_, _, device, rows, seconds) in enumerate(sorted(timed), 1):
        if seconds > 0:
            name = device if len(devices) <= _MOST_LINES else counted(len(devices), "device")
            lines.setdefault(name, []).append((number, rows / seconds))
    if not lines:
        return []
    left_out = sum(seconds <= 0 for *_, seconds in timed)
    note = f"{counted(len(timed) - left_out, 'shard')}, each by its own worker's time"
    note += f"; {counted(left_out, 'shard')} without a time" if left_out else ""
    note += "; without views that were added later" if found.facts["added_views"] else ""
    drawn = [Line(name, points) for name, points in lines.items()]
    title = "Rows per second, shard by shard"
    return [line_chart(title, drawn, "shards in the order they were finished", "rows/s", zero=True, note=note)]


def _failures(path: str, found: Description) -> list[Block]:
    """The first failures by status and reason, and how many there are in all."""
    failed = sum(count for name, count in found.facts["status"].items() if name != Status.OK.name)
    if not failed:
        return []
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for one in islice(failures_of(path), _FAILURES):
        kind = one["status"], _reason(one)
        counts[kind] += 1
        kinds.setdefault(kind, []).append(one)
    rows = [
        (kind[0], short(kind[1]), Cell(f"{count:,}", count), "; ".join(map(_example, kinds[kind][:_EXAMPLES])))
        for kind, count in counts.most_common()
    ]
    read = counts.total()
    which = f"all {failed:,}" if read == failed else f"the first {read:,} of {failed:,}"
    caption = f"Failures by reason: {which}; dimefm info STORE --failures lists them"
    return [Table(("status", "reason", "rows", "examples"), rows, "llrl", caption)]


def _reason(failure: dict[str, Any]) -> str:
    """The reason without what differs from row to row: its file, and numbers."""
    reason: str = failure["reason"]
    for own in (failure["file"], failure["key"]):
        reason = reason.replace(own, "…") if own else reason
    return re.sub(r"\d[\d,.]*", "…", reason)


def _example(failure: dict[str, Any]) -> str:
    return f"row {failure['row']:,}, {short(failure['key'], 60)}"


def _identity(found: Description) -> Block:
    """What made the embeddings, in full."""
    rows = [("identity", str(found.facts["identity"]))]
    for name, value in found.facts["teacher"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {part}".strip().replace("_", " "), _plainly(one)) for part, one in parts]
    return Facts([(f"teacher: {name}" if place else name, words) for place, (name, words) in enumerate(rows)])


def _plainly(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plainly, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value in (None, "") else str(value)
