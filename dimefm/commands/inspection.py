"""`dimefm doctor`, `info` and `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import (
    json_option,
    options_of,
    quiet_option,
    ray_options,
    require_with,
    say_json,
    shard_runner,
)
from dimefm.models.names import require_model
from dimefm.system.inert_text import say

_option = options_of("dimefm.inspection.verify", "VerifyConfig")
_COLUMNS = ("row", "key", "status", "file", "reason")


@click.command(cls=Command)
def doctor() -> None:
    """Look for what would stop or slow the work here.

    It also says which defaults follow from this machine. Paste the output into a report of a problem. Exits with 1 if
    something would stop the work.
    """
    from dimefm.inspection.doctor import diagnose

    found = diagnose()
    say(found.show())
    if found.stops:
        raise click.exceptions.Exit(1)


@click.command(cls=Command)
@click.argument("path")
@click.option("--failures", is_flag=True, help="List every row of a store that has no embedding, separated by tabs.")
@json_option
def info(path: str, failures: bool, as_json: bool) -> None:
    """Describe what dimefm wrote, or would read.

    PATH: a store, pairs, an index, a selection, a run, an exported model, results of evaluations, latency.json,
    exported embeddings, or a labelled set.
    """
    from dimefm.inspection.info import examine, list_failures

    if failures:
        _say_failures(list_failures(path), as_json)
        return
    found = examine(path)
    say_json(found.facts) if as_json else say(found.show())


def _say_failures(failures: Iterator[dict[str, Any]], as_json: bool) -> None:
    """As a list of objects, or as a table with tabs between its columns."""
    if as_json:
        say_json(list(failures))
        return
    say("\t".join(_COLUMNS))
    for one in failures:
        say("\t".join(" ".join(str(one[name]).split()) for name in _COLUMNS))


@click.command(cls=Command)
@click.argument("store")
@_option("--sample", type=click.IntRange(1), metavar="ROWS")
@_option("--teacher")
@_option("--pretrained")
@_option("--repair", is_flag=True)
@ray_options("Shards to check at once, on Ray. Default: one after another.")
@quiet_option
@json_option
def verify(workers: int | None, ray_address: str | None, as_json: bool, **options: Any) -> None:
    """Check whether a store can be trusted.

    It reads every byte, and exits with 1 if the store cannot be trusted.
    """
    teacher, pretrained = options["teacher"], options["pretrained"]
    require_with("--teacher", teacher, "--sample", options["sample"])
    require_with("--pretrained", pretrained, "--teacher", teacher)
    if teacher:
        require_model(teacher, pretrained)
    run = shard_runner(workers, ray_address)
    from dimefm.inspection.verify import VerifyConfig
    from dimefm.inspection.verify import verify as check

    report = check(VerifyConfig(**options), run)
    say_json(report.facts()) if as_json else say(report.show())
    if not report.trusted:
        raise click.exceptions.Exit(1)
