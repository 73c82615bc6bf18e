"""Sections about FAISS indexes: what they cost, and how much of the exact answer they find."""

from __future__ import annotations

from collections.abc import Sequence

from cache_schemas.index import IndexSidecar, Recall
from dimefm.inspection.info import examine
from dimefm.pages.charts import Line, line_chart
from dimefm.pages.page import Block, Cell, Facts, Section, Table, Words
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.system import storage

_NO_CURVE = "Only the parameters that were chosen are known: the index was built before all that were tried were kept."


def index_sections(paths: Sequence[str]) -> list[Section]:
    """A section for each index."""
    sections = []
    for path in paths:
        described = examine(path)
        sidecar = read_sidecar(storage.absolute(path))
        blocks: list[Block] = [Facts(described.rows)]
        blocks += _curve(sidecar) if any(one.tried for one in sidecar.recall) else [Words(_NO_CURVE)]
        sections.append(Section(described.title, [*blocks, _table(sidecar)]))
    return sections


def _curve(sidecar: IndexSidecar) -> list[Block]:
    """Recall over the time that a query takes, for each kind of query that the index was tuned for."""
    lines = []
    for colour, one in enumerate(sidecar.recall):
        for depth in dict.fromkeys(tried.rescore for tried in one.tried):
            points = [(1000 / t.queries_per_second, t.value) for t in one.tried if t.rescore == depth]
            lines.append(Line(f"{one.source} queries", sorted(points), colour))
    return [
        line_chart(
            "Recall against cost",
            lines,
            "milliseconds per query",
            f"recall@{sidecar.recall[0].k}",
            log_across=True,
            rules=[("target", sidecar.recall_target)],
            note="Each point is a setting that was tried as the index was tuned, on the machine that built it; a line "
            "joins those that score as many candidates again.",
        )
    ]


def _table(sidecar: IndexSidecar) -> Table:
    """Each setting that was tried, and the one that was chosen."""
    rows = []
    for recall in sidecar.recall:
        chosen = sidecar.search_of(recall.source)
        for one in recall.tried:
            is_chosen = _is_chosen(chosen, one.probes, one.rescore)
            rows.append(
                (
                    recall.source,
                    Cell(f"{one.probes:,}" if one.probes else "no lists", one.probes),
                    Cell(f"{one.rescore} k" if one.rescore > 1 else "none", one.rescore),
                    Cell(f"{one.value:.4f}", one.value, mark="good" if one.value >= sidecar.recall_target else "bad"),
                    Cell(f"{one.queries_per_second:,.0f}", one.queries_per_second),
                    "chosen" if is_chosen else "",
                )
            )
        if not recall.tried:
            found = Cell(f"{recall.value:.4f}", recall.value)
            rate = Cell(f"{chosen.queries_per_second:,.0f}" if chosen.queries_per_second else "not known")
            probes = (chosen.search_parameters or {}).get("nprobe", 0)
            rows.append(
                (recall.source, Cell(f"{probes:,}", probes), Cell(f"{chosen.rescore} k"), found, rate, "chosen")
            )
    head = ("queries", "lists probed", "scored again", f"recall@{sidecar.recall[0].k}", "queries/s", "")
    return Table(head, rows, "lrrrrl", "Search parameters that were tried")


def _is_chosen(chosen: Recall, probes: int, rescore: int) -> bool:
    return ((chosen.search_parameters or {}).get("nprobe", 0), chosen.rescore or 1) == (probes, rescore)
