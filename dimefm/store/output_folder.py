"""The rules for the place that a command writes to: it is free, or holds what the same command began, or is an error.

A folder of someone else is never written into, and a store, index or run is never gone on with by another command. The
four questions, in the order in which they are asked: does it hold anything that is not ours (`require_only`); was it
begun (`is_planned`, for Zarr groups); what differs from this command (`differing`); may it go on (`require_same`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from cache_schemas.embedding_store import ATTRIBUTES_KEY, COMMITS
from dimefm.errors import OutputExistsError
from dimefm.system import storage

ANOTHER_OUT = "give another --out"
OWN_AND_NEW = "(its own != this one's)"
"""What the two sides of `differing` are, for the message above them."""


def require_only(out: str, what: str, ours: Collection[str] | Callable[[str], bool]) -> None:
    """Raises OutputExistsError where `out` is a file, or a folder with a name that is not `ours`; `what` is what it
    would be otherwise, such as "an index"."""
    out = storage.absolute(out)
    names = storage.listing(out)
    if not names and not storage.is_url(out) and Path(out).is_file():
        raise OutputExistsError(f"{out} exists and is a file", remedy=ANOTHER_OUT)
    is_ours = ours if callable(ours) else ours.__contains__
    stranger = next((name for name in names if not is_ours(name)), None)
    if stranger is not None:
        raise OutputExistsError(f"{out} exists and is not {what} (it holds {stranger!r})", remedy=ANOTHER_OUT)


def is_planned(out: str) -> bool:
    """Whether the Zarr group at `out` has our attributes, which are written after its plan and its empty arrays. Raises
    OutputExistsError where it has lost them, StoreError where they are damaged."""
    out = storage.absolute(out)
    path = storage.join(out, "zarr.json")
    finished = bool(storage.listing(storage.join(out, COMMITS)))
    if not finished and storage.exists(path) and not storage.size(path):
        return False  # zarr's own, before ours: a loss of power leaves it empty
    planned = storage.exists(path) and ATTRIBUTES_KEY in storage.read_json(path).get("attributes", {})
    if finished and not planned:
        raise OutputExistsError(f"{out} has finished shards but no attributes", remedy="it is damaged: delete it")
    return planned


def differing(own: Mapping[str, object], new: Mapping[str, object]) -> dict[str, str]:
    """What the output was begun with against what this command asks for: `{"top_k": "5 != 10"}`. A name that only one
    of the two has counts as None in the other."""
    return {name: f"{own.get(name)} != {new.get(name)}" for name in {**own, **new} if own.get(name) != new.get(name)}


def in_lines(facts: Iterable[str] | Mapping[str, str]) -> str:
    """Facts, or differences by name, to stand below a message, one per line."""
    lines = (f"{name}: {fact}" for name, fact in facts.items()) if isinstance(facts, Mapping) else facts
    return "".join(f"\n  - {line}" for line in lines)


def require_same(out: str, differences: Mapping[str, str], *, remedy: str = f"{ANOTHER_OUT}, or delete it") -> None:
    """Raises OutputExistsError naming these differences, if there are any."""
    if differences:
        what = f"{out} was made by another command {OWN_AND_NEW}:{in_lines(differences)}"
        raise OutputExistsError(what, remedy=remedy)
