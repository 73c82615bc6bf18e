"""`dimefm card` and `push`."""

from __future__ import annotations

from typing import Any

import click

from dimefm.commands.help import Command
from dimefm.commands.options import options_of, quiet_option
from dimefm.system.inert_text import say
from dimefm.system.wording import counted

_option = options_of("dimefm.export.card", "CardConfig")
_push_option = options_of("dimefm.export.push", "PushConfig")


@click.command(cls=Command)
@click.argument("folder")
@_option("--evaluation", multiple=True, metavar="EVALUATION")
@_option("--latency", metavar="FILE")
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


@click.command(cls=Command)
@click.argument("folder")
@click.argument("repository", metavar="ORG/NAME")
@_push_option("--private", is_flag=True)
@_push_option("--revision", metavar="BRANCH")
@_push_option("--message", metavar="TEXT")
@quiet_option
def push(folder: str, repository: str, **options: Any) -> None:
    """Publish an exported folder as a repository of the Hub.

    FOLDER: what export wrote. ORG/NAME: your name or your organisation's, and that of the repository, which is made if
    it does not exist. The token is that of hf auth login, or HF_TOKEN.

    If it is stopped, the same command goes on: files that are there are not sent again.
    """
    from dimefm.export.push import PushConfig
    from dimefm.export.push import push as send

    done = send(PushConfig(folder=folder, repository=repository, **options))
    say(done.url if done.changed else f"{done.url}: the same files are there already")
