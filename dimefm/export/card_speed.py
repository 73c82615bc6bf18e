"""How fast the model of a card is: the measurements of exactly these weights, kept beside the card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache_schemas.export import Export
from cache_schemas.latency import LATENCY_FILE, Latency, ModelLatency
from dimefm.errors import MismatchError
from dimefm.export.card_words import words
from dimefm.latency.record import describe_machine, read_latency
from dimefm.latency.table import noise
from dimefm.system import storage
from dimefm.system.markdown_table import markdown_table
from dimefm.system.wording import counted, three_digits


def add_latency(folder: Path, document: Export, given: str | None) -> Latency | None:
    """The measurements in the folder's latency.json, which those of `given` replace; None where there are none. Raises
    MismatchError for measurements of other models alone; nothing is written then."""
    path = folder / LATENCY_FILE
    if given is None and not path.exists():
        return None
    place = given or str(path)
    latency = read_latency(place)
    models = tuple(
        replace(one, name=document.model.name, order=())  # names of others say nothing here, and may be paths
        for one in latency.models
        if one.weights == document.model.weights
    )
    if not models:
        what = f"{place} has no measurement of this model ({document.model.weights[:12]}...)"
        raise MismatchError(what, remedy="measure the folder itself: dimefm latency FOLDER")
    latency = replace(latency, models=models)
    if given is not None:
        with storage.writing_to(str(path)):
            storage.write_json(str(path), latency.to_json())
    return latency


def speed_section(latency: Latency) -> list[str]:
    """A row for each tower, way of running it, and batch."""
    rows = [["tower", "run by", "on", "batch", "ms each, median", "95th percentile", "per second"]]
    for one in latency.models:
        for tower, timings in (("image", one.image), ("text", one.text)):
            for timing in timings:
                figures = (timing.median_ms, timing.p95_ms, timing.per_second)
                rows.append([tower, one.way, _place(one), str(timing.batch), *map(three_digits, figures)])
    about = f"Measured with dimefm on {words(describe_machine(latency.machine))}, from prepared pixels and tokens to "
    about += f"embeddings; [{LATENCY_FILE}]({LATENCY_FILE}) has every number."
    warning = [words(found)] if (found := noise(latency.machine, latency.models)) else []
    return ["## Speed", "", *markdown_table(rows, "lllrrrr"), "", " ".join([about, *warning])]


def _place(one: ModelLatency) -> str:
    return counted(one.threads, "thread") if one.device == "cpu" else words(one.device)
