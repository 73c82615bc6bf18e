"""`dimefm report` and `dimefm watch`."""

from __future__ import annotations

import click

from dimefm.commands.help import Command
from dimefm.commands.options import quiet_option
from dimefm.system.inert_text import say
from dimefm.system.notes import note


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", default="report.html", show_default=True, metavar="FILE",
              help="HTML file to write. An older page there is replaced.")  # fmt: skip
@quiet_option
def report(paths: tuple[str, ...], out: str) -> None:
    """Write a page to look at, for a browser.

    It is one HTML file that needs no network and no other file.

    PATH: what dimefm wrote: a store, pairs, a selection, an index, a run, results of evaluations, an exported model, or
    a folder of these. Several runs are drawn over each other, several models stand side by side.
    """
    from dimefm.pages.report import report as write

    say(write(paths, out))


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N",
              help="Port to listen at, on this machine alone. Default: any that is free.")  # fmt: skip
@quiet_option
def watch(run: str, port: int) -> None:
    """Watch a run in a browser while it trains.

    Prints the URL of its page, which renews itself, and serves it until Ctrl-C. From another machine: ssh -L
    PORT:localhost:PORT, with the port of that URL on both sides.

    RUN: a run folder, as train-student wrote it; training goes on in a command of its own.
    """
    from dimefm.pages.watch import watch as serve

    def ready(url: str) -> None:
        note(f"the page of {run} is served until Ctrl-C")
        say(url)

    serve(run, port, ready=ready)
