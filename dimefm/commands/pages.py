"""`dimefm report`."""

from __future__ import annotations

import click

from dimefm.commands.help import Command
from dimefm.commands.options import quiet_option
from dimefm.system.inert_text import say


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", default="report.html", show_default=True, metavar="FILE",
              help="HTML file to write. An older page there is replaced.")  # fmt: skip
@quiet_option
def report(paths: tuple[str, ...], out: str) -> None:
    """Write a page to look at, for a browser.

    It is one HTML file that needs no network and no other file.

    PATH: what dimefm wrote: a store, pairs, a selection, an index, a run, results of evaluations, latency.json, an
    exported model, or a folder of these. Several runs are drawn over each other, several models stand side by side.
    """
    from dimefm.pages.report import report as write

    say(write(paths, out))
