"""What a config file may hold, and what is said of one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from dimefm.commands.config_file import read_config

KNOWN = ("lr", "weight_decay", "betas", "loss.vl", "loss.pvl")


def read(folder: Path, text: str, name: str = "config.yaml") -> dict[str, object]:
    (folder / name).write_text(text, encoding="utf-8")
    return read_config(str(folder / name), KNOWN, "--fields")


def refused(folder: Path, text: str, name: str = "config.yaml") -> str:
    with pytest.raises(click.BadParameter) as caught:
        read(folder, text, name)
    assert caught.value.param_hint == "--config"
    return caught.value.message


def test_yaml_and_json_give_the_same_fields(tmp_path: Path) -> None:
    """Also 1e-3, which is a string in YAML 1.1."""
    expected = {"lr": 1e-3, "betas": [0.9, 0.98], "loss": {"vl": 1}, "loss.pvl": 0.5}
    assert read(tmp_path, "# mine\nlr: 1e-3\nbetas: [0.9, 0.98]\nloss: {vl: 1}\nloss.pvl: 0.5\n") == expected
    text = '{"lr": 1e-3, "betas": [0.9, 0.98], "loss": {"vl": 1}, "loss.pvl": 0.5}'
    assert read(tmp_path, text, "config.json") == expected
    assert read(tmp_path, text) == expected


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_of_a_run_json_it_is_the_config(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, '{"schema": "dimefm.run", "steps": 3, "config": {"lr": 1e-08}}', name) == {"lr": 1e-8}


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.yaml", "lr: 1\nbetas: [1, 2\n", "a.yaml is not YAML: line 3, column 1: "),
        ("a.yaml", "lr: 1\nloss:\n  vl: 1\n  vl: 2\n", "a.yaml is not YAML: line 4, column 3: 'vl' stands twice"),
        ("a.yaml", "lr: !!python/object:os.system 1\n", "a.yaml is not YAML: line 1, column 5: "),
        ("a.yaml", "lr: \x07\n", "a.yaml is not YAML: "),
        ("a.yaml", "- lr\n", "a.yaml must hold fields with values, such as `lr: 1e-3`, and holds a list"),
        ("a.yaml", "", "and holds nothing"),
        ("a.json", '{"lr": 1,\n}', "a.json is not JSON: line 2, column 1: "),
        ("a.json", '{"lr": 1, "lr": 2}', "a.json: 'lr' stands twice"),
        ("a.yaml", "weight_decai: 1\n", "no field is called 'weight_decai': did you mean 'weight_decay'?"),
        ("a.yaml", "weight-decay: 1\n", "no field is called 'weight-decay': did you mean 'weight_decay'?"),
        ("a.yaml", "loss:\n  pvll: 1\n", "no field is called 'loss.pvll': did you mean 'loss.pvl'"),
        ("a.yaml", "banana: 1\n", "no field is called 'banana': --fields lists all"),
        ("a.yaml", "lr:\n  vl: 1\nconfig: {}\n", "no field is called 'config': --fields lists all"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, text: str, what: str) -> None:
    assert what in refused(tmp_path, text, name)


def test_every_unknown_field_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "banana: 1\nlrr: 2\n")
    assert "'banana'" in message
    assert "'lrr': did you mean 'lr'?" in message


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(click.BadParameter, match=what):
            read_config(str(path), KNOWN, "--fields")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(click.BadParameter, match="not text in UTF-8"):
        read_config(str(tmp_path / "b.yaml"), KNOWN, "--fields")
