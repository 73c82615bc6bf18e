"""`dimefm report`, `dimefm watch` and `dimefm explore`."""

from __future__ import annotations

from typing import Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import DEVICES, Bytes, options_of, quiet_option
from dimefm.commands.retrieval import model_option, require_encoder, student_of
from dimefm.system.inert_text import say
from dimefm.system.notes import note

_port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Port to listen at, on this machine alone. Default: any that is free.",
)
_explore_option = options_of("dimefm.pages.explore", "ExploreConfig")


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


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@_port_option
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


@click.command(cls=Command)
@click.argument("path", metavar="STORE.zarr|STORE.index")
@_port_option
@_explore_option("--teacher")
@_explore_option("--pretrained")
@model_option
@_explore_option("--device", type=DEVICES)
@_explore_option("--memory", type=Bytes(), metavar="SIZE")
@quiet_option
def explore(path: str, port: int, model: str | None, **options: Any) -> None:
    """Explore a store in a browser: by sentences, images and rows.

    Prints the URL of a page where you type a sentence, drop, paste or choose an image, and see what is nearest; a click
    goes on from there. It is served until Ctrl-C, to this machine alone. From another one: ssh -L PORT:localhost:PORT,
    with the port of that URL on both sides.

    A store is searched exactly, an index as retrieve searches it.
    """
    require_encoder(options["teacher"], options["pretrained"], model)
    from dimefm.pages.explore import ExploreConfig
    from dimefm.pages.explore import explore as serve

    def ready(url: str) -> None:
        note(f"the page of {path} is served until Ctrl-C")
        say(url)

    student = student_of(model, options["device"]) if model else None
    serve(ExploreConfig(path=path, **options), port, student=student, ready=ready)
