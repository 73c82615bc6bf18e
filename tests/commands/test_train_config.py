"""Options over a file over a recipe: what wins, where each value comes from, and what is said of a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.commands.dry_run import field_lines, foresight_lines
from dimefm.commands.options import Weights
from dimefm.commands.train_config import Given, config_of
from dimefm.training.config import LossConfig, TextMix
from dimefm.training.dry_run import Foresight
from dimefm.training.recipes import RECIPES
from tests.making import make_jpeg

PATHS = {"images": "i", "texts": "t", "out": "o"}


def given(text: str = "", *settings: str, recipe: str = "paper", folder: Path | None = None, **options: Any) -> Given:
    file = None
    if text:
        assert folder
        (folder / "c.yaml").write_text(text)
        file = str(folder / "c.yaml")
    return config_of(recipe, file, {**PATHS, **options}, settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_alone(recipe: str) -> None:
    found = given(recipe=recipe)
    assert found.config == RECIPES[recipe]("i", "t", "o")
    assert found.origins["images"] == "--images"
    assert found.origins["lr"] == found.origins["loss.vl"] == found.origins["warmup_epochs"] == f"recipe {recipe}"
    assert found.origins["eps"] == found.origins["loss.queue"] == found.origins["text_loss.cosine"] == "default"
    assert found.origins["image_size"] == ("default" if found.config.image_size is None else f"recipe {recipe}")
    assert found.values.keys() == found.origins.keys()


def test_another_student_has_its_own_image_size(tmp_path: Path) -> None:
    sizes = {"recipe sample": 48, "default": None, "--image-size": 96, str(tmp_path / "c.yaml"): 112}
    for origin, found in zip(
        sizes,
        (
            given(recipe="sample", student="test_resnet"),  # the recipe's own
            given(recipe="sample", student="resnet18"),
            given(recipe="sample", student="resnet18", image_size=96),
            given("image_size: 112\nstudent: resnet18\n", recipe="sample", folder=tmp_path),
        ),
        strict=True,
    ):
        assert (found.origins["image_size"], found.config.image_size) == (origin, sizes[origin])


def test_a_file_wins_over_the_recipe_options_over_the_file_and_set_over_all(tmp_path: Path) -> None:
    text = "lr: 1e-3\nepochs: 7\nseed: 5\nbetas: [0.9, 0.98]\n"
    found = given(text, "seed=9", folder=tmp_path, epochs=3.0)
    config = found.config
    assert (config.lr, config.epochs, config.seed, config.betas) == (1e-3, 3, 9, (0.9, 0.98))
    file = str(tmp_path / "c.yaml")
    assert [found.origins[name] for name in ("lr", "epochs", "seed", "betas", "min_lr")] == [
        file, "--epochs", "--set", file, "recipe paper",
    ]  # fmt: skip


def test_weights_of_several_stores_are_typed_as_their_paths_are() -> None:
    words = ["train-student", "--images", "a::b", "--texts", "t", "--out", "o", "--image-weights"]
    done = CliRunner().invoke(cli, [*words, "1:2"])
    assert done.exit_code == 2
    assert "'1:2' is not a weight for each store, such as 1::2" in done.stderr
    done = CliRunner().invoke(cli, [*words, "1::2::3"])
    assert "image_weights are one for each image store: 3 for 2" in done.stderr
    assert given(images="a::b", image_weights=Weights()("1::0.5")).config.image_weights == (1.0, 0.5)
    assert given("", "image_weights=[1,2]", images="a::b").config.image_weights == (1.0, 2.0)


def test_weights_that_are_not_named_beside_another_are_0_wherever_they_are_given(tmp_path: Path) -> None:
    text = "loss:\n  cosine: 1\n  vl_temperature: 2\ntext_mix: {selected: 1}\n"
    config = given(text, folder=tmp_path).config
    assert config.loss == LossConfig(vl=0, pvl=0, cosine=1, vl_temperature=2)
    assert config.text_mix == TextMix(random=0, selected=1)
    assert given(loss="udist=1,vl=2").config.loss == LossConfig(vl=2, pvl=0, udist=1)
    assert given(text, folder=tmp_path, loss="vl=1").config.loss == LossConfig(vl=1, pvl=0, vl_temperature=2)
    assert given("", "loss.cosine=1").config.loss == LossConfig(cosine=1)
    assert given("loss.cosine: 1\n", folder=tmp_path).config.loss == LossConfig(cosine=1)
    assert given("loss: {queue: 8}\n", folder=tmp_path).config.loss == LossConfig(queue=8)
    assert given("", 'loss={"cosine": 1}').config.loss == LossConfig(vl=0, pvl=0, cosine=1)


def test_a_run_json_gives_its_whole_config_again(tmp_path: Path) -> None:
    before = RECIPES["sample"]("i", "t", "o", lr=0.5, val=("a", "b"))
    (tmp_path / "run.json").write_text(json.dumps({"schema": "dimefm.run", "config": before.to_json()}))
    assert config_of("paper", str(tmp_path / "run.json"), {}, ()).config == before


def test_inputs_may_stand_in_the_file_and_are_missed_otherwise(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("images: i\ntexts: t\nout: o\n")
    assert config_of("paper", str(tmp_path / "c.yaml"), {}, ()).config.texts == "t"
    assert config_of("paper", str(tmp_path / "c.yaml"), {"texts": "other"}, ()).config.texts == "other"
    with pytest.raises(click.UsageError, match="Missing --texts, --out: give them, or a --config file that has them"):
        config_of("paper", None, {"images": "i"}, ())
    with pytest.raises(click.UsageError, match="that has it; where there are no other sentences, --texts may be"):
        config_of("paper", None, {"images": "i", "captions": "c", "out": "o"}, ())


def test_a_value_of_the_wrong_kind_names_what_gave_it(tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match="lr: expected a number, found 'much'; keep: expected") as caught:
        given("lr: much\nkeep: 1.5\n", folder=tmp_path)
    assert caught.value.param_hint == f"--config {tmp_path}/c.yaml"


def test_a_mistake_in_options_imports_no_torch() -> None:
    code = (
        "import sys\nfrom dimefm.cli import cli\n"
        "for words in (['--set', 'lrr=1'], ['--weight-decay', '-1'], ['--allow-changes', 'epoch'], ['--lr', '1e-9'],\n"
        "              ['--text-mix', 'selected=1'], ['--config', 'nowhere.yaml']):\n"
        "    try:\n"
        "        cli(['train-student', '--images', 'i', '--texts', 't', '--out', 'o', *words])\n"
        "    except SystemExit as error:\n"
        "        assert error.code in (1, 2)\n"
        "try:\n    cli(['recipes', 'paper'])\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = {'torch', 'zarr', 'open_clip', 'timm', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy - {'numpy', 'pyarrow'}, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Error: ") == 6


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_first_sentence() -> None:
    lines = CliRunner().invoke(cli, ["recipes"]).output
    assert "paper         The authors' settings: ViT-B/32 from scratch for 100 epochs" in lines
    for name in RECIPES:
        assert f"\n{name} " in f"\n{lines}"
    assert max(map(len, lines.splitlines())) <= 80


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_shows_every_field_that_it_sets_with_its_line(name: str) -> None:
    shown = CliRunner().invoke(cli, ["recipes", name]).output
    assert max(map(len, shown.splitlines())) <= 80
    found = config_of(name, None, PATHS, ())
    for field, origin in found.origins.items():
        is_set = origin.startswith("recipe") and not ("." in field and found.values[field] == 0)
        assert (f"\n{field}=" in shown) == is_set, field
    assert "Learning rate at its peak, after the warm-up." in shown
    if name == "paper":
        assert "\n- Softmaxes are over the whole batch." in shown


def test_a_mistyped_recipe() -> None:
    done = CliRunner().invoke(cli, ["recipes", "papr"])
    assert done.exit_code == 2
    assert "no recipe is called 'papr': did you mean 'paper'?" in done.output
    done = CliRunner().invoke(cli, ["train-student", "--recipe", "simple"])
    assert done.exit_code == 2
    assert "no recipe is called 'simple': did you mean 'sample'" in done.output


# -- train-student --dry-run ------------------------------------------------------------------------------------------


def test_what_is_decided_later_says_by_what() -> None:
    lines = [line.split() for line in field_lines(given(epochs=3.0))]
    by_name = {name: " ".join(rest) for name, *rest in lines}
    assert by_name["precision"] == "the machine auto"
    assert [by_name[name] for name in ("threads", "workers", "device")] == ["the machine -"] * 3
    assert (by_name["checkpoint_every"], by_name["image_size"]) == ("the clock -", "the student -")
    assert (by_name["epochs"], by_name["lr"], by_name["eps"]) == ("--epochs 3", "recipe paper 0.0008", "default 1e-08")
    assert "text_loss.vl" not in by_name
    assert "text_loss.vl" in "\n".join(field_lines(given("", "text_student=x")))
    (precision,) = [line for line in field_lines(given(precision="bf16")) if " precision " in line]
    assert precision.split() == ["precision", "--precision", "bf16"]


def test_a_dry_run_says_all_and_writes_nothing(tmp_path: Path, tiny_run: list[str]) -> None:
    out = tmp_path / "run"
    words = [*tiny_run, "--out", str(out), "--dry-run", "--device", "cpu", "--max-steps", "1"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert not out.exists()
    assert f"{out}: nothing is written\n" in done.output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("  ")}
    assert lines["max_steps"] == "--max-steps 1"
    assert lines["threads"] == "recipe sample 1"
    assert lines["image_size"] == "--image-size 32"
    assert lines["eps"] == "default 1e-08"
    assert lines["rows"] == "96 images and 200 sentences that can be used"
    assert re.search(r"  a step +[\d.]+ s for 16 images, measured with \d+; reading is not in it", done.stdout)
    assert "million weights" in lines["student"]
    assert "note: the run ends within its warm-up" in done.stderr
    report = [*done.stderr.splitlines(), *done.stdout.partition("\n\n")[2].splitlines()]
    assert max(map(len, report)) <= 80
    document = json.loads(CliRunner().invoke(cli, [*words, "--json", "--quiet"]).output)
    assert document["fields"]["max_steps"] == {"value": 1, "from": "--max-steps"}
    assert document["fields"]["log_every"]["from"] == "default"
    assert (document["images"], document["sentences"], document["steps"]) == (96, 200, 1)
    assert document["seconds_per_step"] > 0
    assert document["parameters"] > 1000
    assert not out.exists()


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        (
            {},
            ["a step  250 s for 5,120 images, measured with 64;", "the run  27h46m", "on the GPU", "7 processes that"],
        ),
        ({"seconds_per_step": None, "why_unknown": "no room"}, ["a step  unknown: no room", "the run  unknown"]),
        ({"first_step": 400}, ["steps  400, of which 400 are done", "the run  it is done"]),
        ({"text_bank": 0, "loaders": 1, "validation_steps": 9}, ["one process that reads", "every 9 steps"]),
    ],
)
def test_what_was_counted_and_measured_is_shown(facts: dict[str, Any], shown: list[str]) -> None:
    found = Foresight(
        config=given().config, device="cuda:0", machine="some GPU", image_size=224, images=9, sentences=1,
        steps_per_epoch=4, steps=400, first_step=0, warmup_steps=1, validation_steps=None, parameters=10**6,
        training_state=16 * 10**6, text_bank=10**9, text_bank_in="device", loaders=7, shared_memory=10**9,
        seconds_per_step=250.0, measured_images=64, why_unknown=None, notes=[],
    )  # fmt: skip
    found = replace(found, **facts)
    text = "\n".join(re.sub(r"  +", "  ", line) for line in foresight_lines(found))
    for words in (*shown, "9 images and 1 sentence that", "warm-up  1 step\n", "1.0 million weights"):
        assert words in text


def test_a_dry_run_ends_as_the_run_would_where_that_cannot_begin(tmp_path: Path, tiny_run: list[str]) -> None:
    words = [*tiny_run, "--out", str(tmp_path / "run"), "--dry-run", "--device", "cpu", "--batch-size", "1000"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1
    assert re.search(r"batch_size +--batch-size +1000\n", done.stdout)
    assert "a batch of 1,000 images is more than the 96 with an embedding" in done.stderr


def test_a_dry_run_misses_the_prompts_of_a_validation_as_the_run_would(tmp_path: Path, tiny_run: list[str]) -> None:
    for name in ("aardvarks", "zebras"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "one.jpg").write_bytes(make_jpeg())
    words = [*tiny_run, "--out", str(tmp_path / "run"), "--device", "cpu", "--val", str(tmp_path / "set")]
    refusals = [CliRunner().invoke(cli, [*words, *more]) for more in (["--dry-run"], [])]
    assert [done.exit_code for done in refusals] == [1, 1]
    assert all("lacks 2 of 2 prompts of the --val sets" in done.stderr for done in refusals)


def test_json_needs_a_dry_run() -> None:
    done = CliRunner().invoke(cli, ["train-student", "--images", "i", "--texts", "t", "--out", "o", "--json"])
    assert done.exit_code == 2
    assert "--json has no effect without --dry-run" in done.output
