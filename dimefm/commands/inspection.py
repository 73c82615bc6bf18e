"""`dimefm doctor`, `info` and `verify`."""

from __future__ import annotations

import click

from dimefm.commands.help import Command
from dimefm.commands.options import options_of, quiet_option, require_with
from dimefm.models.names import require_model
from dimefm.system.inert_text import say

_option = options_of("dimefm.inspection.verify", "VerifyConfig")


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
def info(path: str, failures: bool) -> None:
    """Describe a store, index, selection or run."""
    from dimefm.inspection.info import describe, list_failures

    if not failures:
        say(describe(path))
        return
    for line in list_failures(path):
        say(line)


@click.command(cls=Command)
@click.argument("store")
@_option("--sample", type=click.IntRange(1), metavar="ROWS")
@_option("--teacher")
@_option("--pretrained")
@_option("--repair", is_flag=True)
@quiet_option
def verify(store: str, sample: int | None, teacher: str | None, pretrained: str | None, repair: bool) -> None:
    """Check whether a store can be trusted.

    It reads every byte, and exits with 1 if the store cannot be trusted.
    """
    require_with("--teacher", teacher, "--sample", sample)
    require_with("--pretrained", pretrained, "--teacher", teacher)
    if teacher:
        require_model(teacher, pretrained)
    from dimefm.inspection.verify import VerifyConfig
    from dimefm.inspection.verify import verify as check

    report = check(VerifyConfig(store=store, sample=sample, teacher=teacher, pretrained=pretrained, repair=repair))
    say(report.show())
    if not report.trusted:
        raise click.exceptions.Exit(1)
