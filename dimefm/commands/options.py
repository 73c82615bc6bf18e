"""Kinds of options, and rules for them, that several commands share."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """`12GB` or `800 MB` as bytes, at least one. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])?b)?", text.strip().lower())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size")
    return size


def require_with(option: str, value: object, needed: str, given: object) -> None:
    """Refuses an option that has no effect without another."""
    if value is not None and given is None:
        raise click.UsageError(f"{option} has no effect without {needed}")


class Bytes(click.ParamType[int]):
    """`12GB` as bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from dimefm.commands.options import parse_bytes

        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 800MB or 12GB", param, ctx)
