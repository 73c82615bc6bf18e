"""The model card of an exported folder: README.md, with the metadata that the Hub reads and what dimefm knows.

What dimefm writes stands between two comments. A user's own text before and after them stays, and so do values of the
metadata that are there already; the results alone are written anew.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cache_schemas.export import CARD_FILE, EXPORT_FILE, Export
from cache_schemas.latency import Latency
from cache_schemas.run import RUN_FILE
from dimefm.errors import OutputExistsError, StoreError
from dimefm.export.card_metadata import RESULTS, metadata
from dimefm.export.card_results import add_results, results_section
from dimefm.export.card_sections import format_section, licence_section, limits_section, origin_section, summary
from dimefm.export.card_speed import add_latency, speed_section
from dimefm.export.card_usage import usage
from dimefm.export.licences import require_licence
from dimefm.models.exported import format_of, read_export
from dimefm.system import storage
from dimefm.system.inert_text import line
from dimefm.system.near_names import did_you_mean_path

_BEGIN, _END = (
    "<!-- dimefm card {}: write your own text above or below, not within -->",
    "<!-- end of the dimefm card -->",
)
_OURS = re.compile(_BEGIN.format(r"(\w+)") + r"\n\n(.*)\n\n" + _END, re.DOTALL)
_METADATA = re.compile(r"\s*---\n(.*?\n|)---[ \t]*(?:\n|$)", re.DOTALL)
_DATA_LICENCE = "data_license"
_WIDTH = 2**16  # of a line of YAML: none is broken


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What is added to the card of a folder. What an earlier call added stays."""

    evaluation: tuple[str, ...] = ()
    """Folder of an evaluation of this model, such as evaluations/STUDENT; its results are copied into the folder."""
    latency: str | None = None
    """File of dimefm latency; its measurements of this model are copied into the folder."""
    license: str | None = None
    """Licence of the weights, by its identifier on the Hub, such as mit, cc-by-nc-4.0 or other."""
    data_license: str | None = None
    """Licence of the images and sentences that the student was trained on, in words."""
    overwrite: bool = False
    """Write the card anew also where its text or results were changed by hand. Text above and below stays."""

    def __post_init__(self) -> None:
        if self.license:
            require_licence(self.license)


@dataclass(frozen=True)
class Card:
    """What a written card says: the number of results, and the licence of the weights."""

    path: str
    results: int
    license: str | None


def write_card(folder: str, config: CardConfig) -> Card:
    """Write the card of an exported folder. Raises MismatchError for results of other weights, and OutputExistsError
    for a card that was changed by hand where dimefm writes."""
    document, path = read_exported(folder), Path(folder) / CARD_FILE
    given, before, after = _existing(path, config.overwrite)
    results = add_results(Path(folder), document, config.evaluation)
    latency = add_latency(Path(folder), document, config.latency)
    told = {**metadata(document, results), **{name: value for name, value in given.items() if name != RESULTS}}
    options = {"license": config.license, _DATA_LICENCE: config.data_license and line(config.data_license)}
    told |= {name: value for name, value in options.items() if value is not None}
    licence = None if told.get("license") is None else str(told["license"])
    body = _body(document, Path(folder), results, latency, licence, told.get(_DATA_LICENCE))
    ours = "\n\n".join([_BEGIN.format(_digest(body, told.get(RESULTS))), body, _END])
    head = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=_WIDTH)
    with storage.writing_to(str(path)):
        storage.write_atomic(str(path), f"---\n{head}---\n{before}{ours}{after or chr(10)}".encode())
    return Card(str(path), len(results), licence)


def read_exported(folder: str) -> Export:
    """The document of a folder that export wrote. Raises StoreError for anything else."""
    if Path(folder, EXPORT_FILE).is_file():
        return read_export(folder)
    remedy = did_you_mean_path(folder, "give the --out of dimefm export")
    if Path(folder, RUN_FILE).is_file() or format_of(folder):
        remedy = f"dimefm export {folder} --out STUDENT writes one"
    raise StoreError(f"{folder} is no exported model: it has no {EXPORT_FILE}", remedy=remedy)


def read_metadata(path: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and the text below them. Raises StoreError for metadata that are not valid YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise StoreError(f"{path} is not UTF-8", remedy="save it as UTF-8") from None
    found = _METADATA.match(text)
    try:
        head = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise StoreError(f"{path}: its metadata are not YAML: {error}", remedy="mend what stands between ---") from None
    if not isinstance(head or {}, dict):
        raise StoreError(f"{path}: its metadata are not names with values", remedy="mend what stands between ---")
    return head or {}, text[found.end() :] if found else text


def own_words(text: str) -> str:
    """The text below the metadata without what dimefm wrote."""
    return _OURS.sub("", text)


def _existing(path: Path, overwrite: bool) -> tuple[dict[str, Any], str, str]:
    """Of the card that is there: its metadata, and the user's text before and after ours."""
    if not path.exists():
        return {}, "", ""
    head, text = read_metadata(path)
    found = _OURS.search(text)
    if found is None:
        if overwrite:
            return {}, "", ""
        raise OutputExistsError(f"{path} was not written by dimefm", remedy="give --overwrite to replace all of it")
    if found[1] != _digest(found[2], head.get(RESULTS)) and not overwrite:
        what = f"{path} was changed where dimefm writes: between its two comments, or in {RESULTS}"
        remedy = "move your text above or below the comments, and give --overwrite to write what is between them anew"
        raise OutputExistsError(what, remedy=remedy)
    return head, text[: found.start()], text[found.end() :]


def _digest(body: str, results: Any) -> str:
    """Of what dimefm wrote: by it a change by hand is found."""
    return hashlib.sha256(f"{body}{yaml.safe_dump(results)}".encode()).hexdigest()[:16]


def _body(
    document: Export,
    folder: Path,
    results: list[Any],
    latency: Latency | None,
    licence: str | None,
    data_licence: str | None,
) -> str:
    sections = [
        summary(document),
        usage(document),
        results_section(document, results),
        *([speed_section(latency)] if latency else []),
        origin_section(document),
        format_section(document, folder),
        limits_section(document, bool(results)),
        licence_section(licence, data_licence),
    ]
    return "\n\n".join("\n".join(one).strip() for one in sections)
