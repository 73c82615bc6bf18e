"""`dimefm card` and `push`."""

from __future__ import annotations

from typing import Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import options_of
from dimefm.system.inert_text import say
from dimefm.system.wording import counted

_option = options_of("dimefm.export.card", "CardConfig")


@click.command(cls=Command)
@click.argument("folder")
@_option("--evaluation", multiple=True, metavar="EVALUATION")
@_option("--license", metavar="ID")
@_option("--data-license", metavar="TEXT")
@_option("--overwrite", is_flag=True)
def card(folder: str, **options: Any) -> None:
    """Write the model card of an exported folder anew.

    FOLDER: what export wrote. Its README.md gets the results, once they are measured: evaluate FOLDER, then give the
    evaluation here. What earlier calls added stays, and so does your own text above and below dimefm's.
    """
    from dimefm.export.card import CardConfig, write_card

    written = write_card(folder, CardConfig(**options))
    licence = f"licence {written.license}" if written.license else "no licence (--license)"
    say(f"{written.path}: {counted(written.results, 'result') if written.results else 'no results yet'}, {licence}")
