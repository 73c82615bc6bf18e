"""Help and defaults of options come from the configs: neither can drift from what the config says and does."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.commands.options import fields_of, options_of, say_json
from dimefm.evaluation.config import EvaluationConfig
from dimefm.exchange.export_parquet import ParquetConfig
from dimefm.exchange.import_embeddings import ImportConfig
from dimefm.inspection.verify import VerifyConfig
from dimefm.models.trained import Trained
from dimefm.pages.explore import ExploreConfig
from dimefm.retrieval.build_index import IndexConfig
from dimefm.selection.select_images import ImageSelectionConfig
from dimefm.selection.select_texts import SelectionConfig
from dimefm.training.config import LossConfig, TextMix, TrainConfig
from dimefm.training.recipes import RECIPES
from pipeline.cache import CacheConfig

CONFIGS: dict[str, Any] = {
    "cache-images": CacheConfig,
    "cache-texts": CacheConfig,
    "import-embeddings": ImportConfig,
    "export-embeddings": ParquetConfig,
    "build-index": IndexConfig,
    "select-texts": SelectionConfig,
    "select-images": ImageSelectionConfig,
    "train-student": TrainConfig,
    "evaluate": EvaluationConfig,
    "verify": VerifyConfig,
    "explore": ExploreConfig,
}
OF_NO_CONFIG = {
    "cache-images": {"dry_run"},
    "cache-texts": {"dry_run"},
    "build-index": {"dry_run", "workers", "ray_address"},
    "import-embeddings": {"workers", "ray_address"},
    "export-embeddings": {"format_", "workers", "ray_address"},
    "select-texts": {"workers", "ray_address"},
    "select-images": {"workers", "ray_address", "teacher", "pretrained"},
    "verify": {"workers", "ray_address"},
    "explore": {"port", "model"},
    "evaluate": {"config"},
    "train-student": {"recipe", "config_file", "settings", "fields", "dry_run", "as_json", "allow_changes"},
}
TRAINED = {field.name for field in dataclasses.fields(Trained)}  # options of weights in a file, of every such command


def options(command: str) -> list[click.Option]:
    return [one for one in cli.commands[command].params if isinstance(one, click.Option)]


def words(config: Any) -> dict[str, str]:
    return {name: field.words for name, field in fields_of(config.__module__, config.__name__).items()}


def help_of(line: str) -> str:
    """A line as an option shows it, without the dashes of the options that it names."""
    return line.replace("`", "")


@pytest.mark.parametrize("config", [*dict.fromkeys(CONFIGS.values()), LossConfig, TextMix, Trained])
def test_every_field_of_a_config_has_a_line(config: Any) -> None:
    lines = words(config)
    assert list(lines) == [field.name for field in dataclasses.fields(config)]
    for name, line in lines.items():
        assert line.endswith("."), f"{config.__name__}.{name} has no whole sentence below it"
        assert line[0].isupper()


@pytest.mark.parametrize("command", CONFIGS)
def test_the_help_of_an_option_is_the_line_of_its_field(command: str) -> None:
    lines = {**words(Trained), **words(CONFIGS[command])}
    for option in options(command):
        assert option.name is not None
        if option.name not in {"quiet", "as_json", *OF_NO_CONFIG.get(command, set())}:
            shown = (option.help or "").removesuffix(" May be repeated.")
            for other in options(command):
                shown = shown.replace(other.opts[0], str(other.name))
            assert shown == help_of(lines[option.name]), option.name


def parsed(command: str) -> dict[str, Any]:
    """The values of all options of a command line that has only what is required."""
    words = ["x"] if any(isinstance(one, click.Argument) for one in cli.commands[command].params) else []
    for one in options(command):
        if one.required:
            words += [one.opts[0], one.type.choices[0] if isinstance(one.type, click.Choice) else "x"]
    return cli.commands[command].make_context(command, words).params


@pytest.mark.parametrize("command", [command for command in CONFIGS if command != "train-student"])
def test_the_default_of_an_option_is_that_of_its_field(command: str) -> None:
    values = parsed(command)
    for config in (Trained, CONFIGS[command]):
        for field in dataclasses.fields(config):
            if field.name in values and field.default is not dataclasses.MISSING:
                assert values[field.name] == field.default, field.name


def test_train_student_leaves_defaults_to_the_recipe() -> None:
    given = {name for name, value in parsed("train-student").items() if value not in (None, (), "", "x")}
    assert given == {"recipe", "dry_run", "as_json"}
    (recipe,) = (one for one in options("train-student") if one.name == "recipe")
    assert isinstance(recipe.type, click.Choice)
    assert set(recipe.type.choices) == set(RECIPES)


def test_train_student_lists_every_field_that_set_takes() -> None:
    text = " ".join(CliRunner().invoke(cli, ["train-student", "--help"]).output.split())
    assert "--set FIELD=VALUE" in text
    assert "--fields lists them" in text
    listed = CliRunner().invoke(cli, ["train-student", "--fields"])
    assert listed.exit_code == 0
    assert max(map(len, listed.output.splitlines())) <= 110
    named = [line.split()[0] for line in listed.output.splitlines() if not line.startswith(" ")]
    parts: dict[str, Any] = {"loss": LossConfig, "text_mix": TextMix}
    expected = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in parts]
    expected += [f"{part}.{field.name}" for part, config in parts.items() for field in dataclasses.fields(config)]
    assert named == expected
    words = ["train-student", "--images", "i", "--texts", "t", "--out", "o", "--set", "nothing=1"]
    assert "dimefm train-student --fields lists all" in CliRunner().invoke(cli, words).output


def test_an_option_needs_a_field_with_a_line() -> None:
    option = options_of("pipeline.cache", "CacheConfig")
    with pytest.raises(LookupError, match="has no field 'rows'"):
        option("--rows")
    with pytest.raises(LookupError, match="has no class NoConfig"):
        options_of("pipeline.cache", "NoConfig")
    with pytest.raises(LookupError, match="has no field 'status' with a line below it"):
        options_of("dimefm.images.decode", "DecodeError")("--status")


def test_what_a_line_becomes_as_help() -> None:
    @click.command()
    @options_of("dimefm.training.config", "TrainConfig", defaults=False)("--val", multiple=True)
    @options_of("dimefm.training.config", "TrainConfig")("--max-steps")
    @options_of("dimefm.training.config", "TrainConfig")("--last", "keep")
    def command(**given: object) -> None:
        """A command."""

    text = CliRunner().invoke(command, ["--help"]).output
    assert "Labelled set to validate on. May be repeated." in text
    assert "if --epochs would be longer." in text
    assert "[default: 2]" in text


def test_a_json_document_holds_text_and_numbers_as_json_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no NaN, and no control character reaches the terminal as it is."""
    say_json({"a": [math.nan, -math.inf, 0.5], "b": {"c": ("\x1b[2K\x7f", "Löwe 狮子")}})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"a": [None, None, 0.5], "b": {"c": ["\x1b[2K\x7f", "Löwe 狮子"]}}
    assert shown.isascii()
    assert shown.replace("\n", " ").isprintable()
