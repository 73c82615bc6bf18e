"""How --help is shown: options below headings, numbers as N and X, no line broken within a name such as hf-hub:NAME."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from dimefm.commands.completion import completed
from dimefm.system.near_names import did_you_mean

_Command = TypeVar("_Command", bound=Callable[..., Any])
_HYPHEN = "\u2011"  # one at which no line is broken
_WIDEST = 26  # columns of names of options; what is longer has a line of its own


class _Formatter(click.HelpFormatter):
    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = _WIDEST, col_spacing: int = 2) -> None:
        super().write_dl([(name, words.replace("-", _HYPHEN)) for name, words in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


class HelpContext(click.Context):
    """A context whose help is broken into lines at spaces alone."""

    formatter_class = _Formatter


class Command(click.Command):
    """A command that shows its options below their headings."""

    context_class = HelpContext

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for parameter in self.params:
            parameter.type = completed(parameter)
            if isinstance(parameter.type, click.IntRange):
                parameter.metavar, parameter.type.name = parameter.metavar or "N", "whole number"
            elif isinstance(parameter.type, type(click.FLOAT)):
                parameter.metavar, parameter.type.name = parameter.metavar or "X", "number"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params:  # as of a variable of the shell that is not set
            value = ctx.params.get(str(parameter.name))
            if ctx.get_parameter_source(str(parameter.name)) is not ParameterSource.COMMANDLINE:
                continue
            several = parameter.multiple or parameter.nargs == -1
            if "" in (value or ()) if several else value == "":
                raise click.BadParameter("it is empty", ctx, parameter)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        write_sections(formatter, sections)


class Commands(click.Group):
    """A group that shows its commands below headings, and knows which one a mistyped name means."""

    context_class = HelpContext

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._headings: dict[str, str] = {}

    def add_section(self, words: str, *commands: click.Command) -> None:
        """Add commands, to be shown below a heading."""
        for command in commands:
            self.add_command(command)
            self._headings[str(command.name)] = words

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            words = command.get_short_help_str(limit=200)
            sections.setdefault(self._headings[name], []).append((name, words))
        write_sections(formatter, sections)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            near = did_you_mean(name, self.commands, "dimefm --help lists all commands")
            raise click.UsageError(f"No such command {name!r}: {near}", ctx)
        return super().resolve_command(ctx, args)


def write_sections(formatter: click.HelpFormatter, sections: dict[str, list[tuple[str, str]]]) -> None:
    """Lists below headings, all with the same columns."""
    width = min(_WIDEST, max(len(name) for rows in sections.values() for name, _ in rows))
    for heading, rows in sections.items():
        with formatter.section(heading):
            formatter.write_dl([(name.ljust(width), words) for name, words in rows])


def under(words: str, command: _Command) -> _Command:
    """The command, with the option that it was given last below a heading, wherever the option stands."""
    vars(command)["__click_params__"][-1].heading = words
    return command


def heading(words: str) -> Callable[[_Command], _Command]:
    """A decorator that shows the options below it under a heading, down to the next heading."""

    def mark(command: _Command) -> _Command:
        for parameter in getattr(command, "__click_params__", []):
            if not hasattr(parameter, "heading"):
                parameter.heading = words
        return command

    return mark
