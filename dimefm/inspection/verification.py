"""What `dimefm verify` found, as a report for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dimefm.system import inert_text
from dimefm.system.wording import counted, hanging

_SHOWN = 20  # faults that are listed


@dataclass
class Verification:
    """What was found. `bad`: what is wrong with each shard that must be written again. `faults`: what is wrong with the
    store as a whole, which writing shards again does not mend. `empty`: why no row has an embedding, if none has.
    `additions`: the same of views that were added; those that are not complete are not read with the store."""

    store: str
    rows: int
    done: int
    shards: int
    bad: dict[int, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    repaired: bool = False
    additions: list[Verification] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        """Whether the store is complete, exactly as it was written, and has at least one embedding; and what was added
        to it is as it was written."""
        whole = not self.bad and not self.faults and self.done == self.shards and not self.empty
        return whole and all(one.trusted or one.unfinished for one in self.additions)

    @property
    def unfinished(self) -> bool:
        """Whether all that there is of it can be trusted, but it is not complete."""
        return not self.bad and not self.faults and self.done < self.shards

    def facts(self) -> dict[str, Any]:
        """The report for a program."""
        return {
            "store": self.store,
            "trusted": self.trusted,
            "rows": self.rows,
            "shards": self.shards,
            "shards_done": self.done,
            "bad_shards": [{"shard": shard, "problems": what} for shard, what in sorted(self.bad.items())],
            "faults": self.faults,
            "notes": self.notes,
            "no_embedding": self.empty,
            "additions": [one.facts() for one in self.additions],
            "repaired": self.repaired,
            "verdict": self._verdict(),
        }

    def show(self) -> str:
        """The report in lines."""
        lines = [f"{self.store}: {counted(self.rows, 'row')}, {self.done:,} of {self.shards:,} shards done"]
        found = [f"shard {shard}: {what}" for shard, problems in sorted(self.bad.items()) for what in problems]
        found += self.faults
        lines += [f"  bad   {inert_text.line(one)}" for one in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  bad   and {len(found) - _SHOWN:,} more")
        lines += [f"  note  {inert_text.line(note)}" for note in self.notes]
        lines += [f"  failed  {inert_text.line(one)}" for one in self.empty]
        lines.append(hanging("  ", self._verdict()))
        return "\n".join([*lines, *(one.show() for one in self.additions)])

    def _verdict(self) -> str:
        shards = counted(len(self.bad), "bad shard")
        if self.repaired:
            return f"{shards} marked: run the command that wrote the store again, then verify again"
        if self.bad:
            again = f"to mend the {shards}, give --repair, then run the command that wrote the store again"
            return f"the store must not be trusted; {again}"
        if self.faults:
            return "the store must not be trusted"
        if any(not one.trusted and not one.unfinished for one in self.additions):
            return "views that were added to the store must not be trusted: see below"
        if self.done < self.shards:
            return "the store is unfinished: run the command that writes it again; the finished part can be trusted"
        if self.empty:
            return "the store is as it was written, but no row has an embedding: mend the source, and write it again"
        return "the store can be trusted"
