"""--help on a terminal of 80 columns, and what is answered to a mistyped command or option."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.commands.help import Command, heading

NARROW = {"COLUMNS": "80"}


def run(*arguments: str) -> str:
    return CliRunner(env=NARROW).invoke(cli, arguments).output


def test_the_list_of_commands_is_whole_and_below_headings() -> None:
    lines = run("--help").splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines[1:])
    words = " ".join(" ".join(lines).split())
    for name, command in cli.commands.items():
        assert f" {name} {(command.help or '').splitlines()[0]} " in f"{words} "
    assert "Stage 2: train a student:" in lines


@pytest.mark.parametrize("name", cli.commands)
def test_help_fits_80_columns_and_breaks_no_name(name: str) -> None:
    lines = run(name, "--help").splitlines()
    assert max(map(len, lines)) <= 80
    broken = [line for line in lines if line.endswith(("-", "/", "|", ":ORG"))]
    assert broken == []
    assert "INTEGER" not in " ".join(lines)  # N is shorter, and plain
    assert "FLOAT" not in " ".join(lines)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train", "did you mean 'train-student'?"),
        ("cache", "did you mean 'cache-images' or 'cache-texts'?"),
        ("eval", "did you mean 'evaluate'?"),
        ("serch", "did you mean 'search'?"),
        ("index", "did you mean 'build-index'?"),
        ("elephant", "dimefm --help lists all commands"),
    ],
)
def test_a_mistyped_command(typed: str, meant: str) -> None:
    assert f"Error: No such command '{typed}': {meant}\n" in run(typed)


def test_a_mistyped_option_and_a_word_for_a_number() -> None:
    assert "Did you mean '--teacher'?" in run("cache-images", "--teachr", "x")
    assert "'many' is not a valid whole number" in run("evaluate", "x", "--batch-size", "many")


def test_options_are_shown_below_the_heading_that_stands_above_them() -> None:
    @click.command(cls=Command)
    @click.option("--first", help="A.")
    @heading("Some")
    @click.option("--second", type=float, help="B.")
    @heading("Others")
    @click.option("--third", type=click.IntRange(1), help="C, a long-" + "long-" * 12 + "word.")
    def command(**given: object) -> None:
        """A command."""

    text = CliRunner(env=NARROW).invoke(command, ["--help"]).output
    assert [line for line in text.splitlines() if line.endswith(":")] == ["Options:", "Some:", "Others:"]
    assert text.index("--first") < text.index("--help") < text.index("Some:") < text.index("--second X")
    assert "long-\n" not in text
