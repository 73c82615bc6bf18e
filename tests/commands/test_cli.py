"""The command line: a user's mistake ends in one message with a remedy, never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner, Result

from cache_schemas.document import CHECKSUM, digest_of
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.cli import cli
from dimefm.datasets.definitions import load_definitions
from dimefm.evaluation.predictions import read_predictions
from dimefm.evaluation.results import read_results
from dimefm.models.clip import Clip, load_clip
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.exact_search import ExactSearch
from dimefm.retrieval.index_sidecar import read_sidecar
from dimefm.retrieval.retrieve import write_pairs
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system.progress import amount
from dimefm.training.run_folder import read_run
from tests.conftest import cached
from tests.making import make_jpeg, write_tar
from tests.stores import random_store

COMMANDS = {
    "cache-images": ["SOURCE...", "--out", "--teacher", "--pretrained", "--captions", "--captions-out", "--shard-rows",
                     "--batch-size", "--dry-run"],
    "cache-texts": ["SOURCE...", "--out", "--teacher", "--pretrained", "--shard-rows", "--batch-size", "--dry-run"],
    "import-embeddings": ["FOLDER", "--out", "--kind", "--teacher", "--images", "--check", "--accept", "--workers",
                          "--ray-address"],
    "build-index": ["STORE.zarr", "--out", "--queries", "--recall", "--accept", "--factory", "--memory", "--workers",
                    "--ray-address", "--partial", "--seed", "--dry-run"],
    "retrieve": [
        "IMAGES.zarr", "--texts", "--index", "--top-k", "--out", "--device", "--workers", "--ray-address", "--dry-run",
    ],
    "search": ["STORE.zarr|STORE.index", "--image", "--text", "--top-k", "--teacher", "--pretrained", "--model",
               "--device"],
    "select-texts": ["PAIRS.zarr", "--out", "--by", "--size", "--min-hits", "--min-score", "--pool", "--dedup",
                     "--balance", "--images-sample", "--seed", "--images", "--texts", "--scores", "--without",
                     "--device", "--workers", "--ray-address"],
    "select-images": ["IMAGES.zarr", "--out", "--by", "--exact", "--near", "--near-sample", "--drop-near",
                      "--drop-above", "--top", "--dedup", "--balance", "--size", "--seed", "--device", "--teacher",
                      "--pretrained", "--workers", "--ray-address"],
    "leaks": ["STORE.zarr", "[SET]...", "--out", "--suite", "--data", "--sets", "--cosine", "--similarity", "--nearest",
              "--teacher", "--pretrained", "--device"],
    "train-student": ["--images", "--texts", "--pairs", "--captions", "--image-selection", "--out", "--recipe",
                      "--config", "--student", "--loss", "--text-mix", "--log-to", "--dry-run", "--json"],
    "recipes": ["[NAME]"],
    "evaluate": ["MODEL", "[SET]...", "--suite", "--data", "--sets", "--pretrained", "--checkpoint", "--weights",
                 "--config", "--json", "--task", "--probe-selection", "--solver", "--shots", "--seeds", "--decoder",
                 "--precision", "--device", "--out", "--name", "--skip-existing", "--predictions"],
    "sets": ["[NAME]...", "--data"],
    "compare": ["NAME...", "--out", "--no-published", "--latency", "--plot", "--json"],
    "latency": ["MODEL...", "--batch", "--threads", "--device", "--precision", "--compiled", "--with-teacher",
                "--seconds", "--out", "--json"],
    "submission": ["NAME", "--out", "--protocol", "--order"],
    "export": ["RUN", "--out", "--format", "--checkpoint", "--weights", "--teacher", "--pretrained", "--precision",
               "--int8", "--max-loss", "--accept", "--image-input", "--check-on", "--evaluation", "--license"],
    "card": ["FOLDER", "--evaluation", "--latency", "--license", "--data-license", "--overwrite"],
    "push": ["FOLDER", "ORG/NAME", "--private", "--revision", "--message"],
    "convert-checkpoint": ["CHECKPOINT", "--out", "--teacher", "--pretrained"],
    "export-embeddings": ["STORE.zarr", "--out", "--format", "--rows-per-file", "--pairs", "--clusters", "--map",
                          "--thumbnails", "--workers", "--ray-address"],
    "predict": ["MODEL", "IMAGE...", "--classes", "--classes-from", "--templates", "--top-k", "--images-from",
                "--pretrained", "--checkpoint", "--weights", "--device", "--json"],
    "info": ["PATH", "--failures", "--json"],
    "report": ["PATH...", "--out"],
    "watch": ["RUN", "--port"],
    "explore": ["STORE.zarr|STORE.index", "--port", "--teacher", "--pretrained", "--model", "--device", "--memory"],
    "verify": ["STORE", "--sample", "--teacher", "--pretrained", "--repair", "--workers", "--ray-address", "--json"],
    "doctor": [],
}  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 1) -> str:
    """The one message that a command ends with; it has a remedy where the mistake is not in the usage."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert result.output.count("Error: ") == 1
    if code == 1:
        assert re.search("^Error: ", result.stderr, re.MULTILINE)  # notes on what began may stand before it
        assert result.output.count("remedy: ") == 1
    return result.output[result.output.index("Error: ") :] if code == 1 else result.output


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A tar of three images."""
    return write_tar(tmp_path / "in" / "000.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(3)})


def altered(store: Store, out: Path, **teacher: Any) -> Path:
    """A copy of a store with other facts about its teacher."""
    shutil.copytree(store.path, out)
    group = json.loads((out / "zarr.json").read_text())
    document = store.schema.to_json()
    document["teacher"].update(teacher)
    group["attributes"]["dimefm"] = with_checksum(document)
    (out / "zarr.json").write_text(json.dumps(group))
    return out


def with_checksum(document: dict[str, Any]) -> dict[str, Any]:
    """A document as it would be, had it been written with these fields."""
    body = {name: value for name, value in document.items() if name != CHECKSUM}
    return {**body, CHECKSUM: digest_of(body)}


def unfinished(store: Store, out: Path) -> Path:
    """A copy of a store without the commit of its last shard."""
    shutil.copytree(store.path, out)
    max((out / "commits").iterdir()).unlink()
    return out


# -- usage ------------------------------------------------------------------------------------------------------------


def test_every_command_is_known_to_these_tests() -> None:
    assert set(COMMANDS) <= set(cli.commands)
    assert set(cli.commands) - set(COMMANDS) <= {"reproduce"}


@pytest.mark.parametrize("command", cli.commands)
def test_help_names_every_argument_and_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for name in COMMANDS.get(command, []):
        assert name in result.output
    assert max(map(len, result.output.splitlines())) <= 110
    for parameter in cli.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output


def test_help_lists_the_commands_in_the_order_of_the_work() -> None:
    output = run("--help").output
    places = [output.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


CACHE = ["cache-images", "x.tar", "--out", "o", "--teacher", "t"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["cache-images"],
        ["cache-images", "x.tar", "--teacher", "t"],
        [*CACHE, "--batch-size", "0"],
        [*CACHE, "--precision", "int8"],
        ["build-index", "x.zarr"],
        ["build-index", "x.zarr", "--out", "o", "--recall", "1.5"],
        ["build-index", "x.zarr", "--out", "o", "--workers", "0"],
        ["build-index", "x.zarr", "--out", "o", "--seed", "-1"],
        ["retrieve", "x.zarr", "--index", "i", "--out", "o"],
        ["retrieve", "x.zarr", "--texts", "t", "--index", "i", "--out", "o", "--top-k", "none"],
        ["retrieve", "x.zarr", "--texts", "t", "--out", "o", "--device", "tpu"],
        ["search"],
        ["select-texts", "p.zarr", "--out", "o", "--by", "beauty"],
        ["select-texts", "p.zarr", "--out", "o", "--dedup", "1"],
        ["select-texts", "p.zarr", "--out", "o", "--images-sample", "1"],
        ["train-student", "--images", "i", "--texts", "t", "--out", "o", "--recipe", "secret"],
        ["evaluate", "model"],
        ["evaluate", "model", "set", "--task", "knn"],
        ["evaluate", "model", "set", "--shots", "5,many"],
        ["evaluate", "model", "set", "--solver", "lbfgs", "--selection", "elevater"],
        ["compare"],
        ["submission", "evaluations/model"],
        ["info"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    refused(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["cache-images", "x", "--out", "o", "--teacher", "t", "--view-scale", "0.5"], "--view-scale has no effect"),
        (["cache-images", "x", "--out", "o", "--teacher", "t", "--augment", "strong"], "--augment has no effect"),
        (["cache-images", "x", "--out", "o", "--teacher", "t", "--mixup", "0.2"], "--mixup has no effect"),
        (
            ["cache-images", "x", "--out", "o", "--teacher", "t", "--captions-out", "c"],
            "--captions-out has no effect without --captions",
        ),
        (
            ["cache-images", "x", "--out", "o", "--teacher", "t", "--dry-run", "--retry-failed"],
            "--dry-run says nothing",
        ),
        (["build-index", "s.zarr", "--out", "o", "--ray-address", "x"], "--ray-address has no effect without --worker"),
        (["retrieve", "i", "--texts", "t", "--out", "o", "--ray-address", "x"], "--ray-address has no effect without"),
        (
            ["retrieve", "i.zarr", "--texts", "t", "--out", "o", "--index", "i", "--device", "cpu"],
            "--device has no effect with --index",
        ),
        (["verify", "s.zarr", "--teacher", "t"], "--teacher has no effect without --sample"),
        (["verify", "s.zarr", "--sample", "3", "--pretrained", "t"], "--pretrained has no effect without --teacher"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments: list[str], what: str) -> None:
    assert what in refused(*arguments, code=2)


@pytest.mark.parametrize("size", ["banana", "GB", "0", "-5GB", "nanGB", "infGB", "1e400"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    message = refused("build-index", "s.zarr", "--out", "o", f"--memory={size}", code=2)
    assert f"Invalid value for '--memory': {size!r} is not a size such as 800MB or 12GB" in message


def test_a_full_disk_is_one_message_whatever_was_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a write raises it: without the name of a file."""

    def full(path: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dimefm.inspection.info.examine", full)
    assert "No space left on device" in refused("info", "anything")


def test_storage_that_fails_is_one_message_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dimefm.inspection.info.examine", fails)
    assert "Error: Input/output error\n  remedy: check the path" in refused("info", "anything")


def test_a_full_gpu_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.05 GiB is"

    def full(path: str) -> str:
        raise torch.OutOfMemoryError(f"{said} free. See documentation for Memory Management")

    monkeypatch.setattr("dimefm.inspection.info.examine", full)
    message = refused("info", "anything")
    assert "a GPU has too little memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n  remedy:" in message
    assert "documentation" not in message


def test_other_errors_of_torch_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> str:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dimefm.inspection.info.examine", broken)
    result = CliRunner().invoke(cli, ["info", "anything"])
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--loss", "banana=1", "'banana' is not known: there are vl, pvl, udist, cosine, centred, contrastive; dimefm"),
        ("--loss", "pvll=1", "'pvll' is not known: did you mean 'pvl'"),
        ("--loss", "vl=much", "'vl=much' is not NAME=NUMBER"),
        ("--loss", "vl", "'vl' is not NAME=NUMBER"),
        ("--loss", "scale=1", "'scale' is not known: "),
        ("--text-mix", "pretty=1", "'pretty' is not known: there are random, selected, retrieved"),
        ("--text-mix", "retreived=1", "'retreived' is not known: did you mean 'retrieved'?"),
        ("--set", "loss.quue=8", "no field is called 'loss.quue': did you mean 'loss.queue'"),
        ("--set", "weight-decay=8", "no field is called 'weight-decay': did you mean 'weight_decay'?"),
        ("--set", "banana=8", "no field is called 'banana': dimefm train-student --fields lists all"),
        ("--set", "warmup_epochs", "'warmup_epochs' is not FIELD=VALUE"),
        ("--set", "epochs.x=1", "no field is called 'epochs.x': did you mean 'epochs'"),
        ("--set", "loss.queue=many", "loss.queue: expected an integer, found 'many'"),
        ("--set", "betas=[1]", "betas: expected 2 items, found 1"),
    ],
)
def test_a_bad_list_of_weights_or_a_bad_field_says_what_was_meant(option: str, value: str, what: str) -> None:
    message = refused("train-student", "--images", "i", "--texts", "t", "--out", "o", option, value, code=2)
    assert f"Invalid value for {option}: {what}" in message


def test_the_installed_command_prints_one_message_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dimefm", "info", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: nowhere does not exist\n  remedy: ")
    assert done.stderr.count("\n") == 2


# -- cache-images and cache-texts -------------------------------------------------------------------------------------


def test_a_source_that_is_not_there(tmp_path: Path, teacher_name: str) -> None:
    for command in ("cache-images", "cache-texts"):
        message = refused(command, tmp_path / "nowhere", "--out", tmp_path / "s.zarr", "--teacher", teacher_name)
        assert f"{tmp_path}/nowhere does not exist" in message
    assert not (tmp_path / "s.zarr").exists()


def test_an_empty_folder(tmp_path: Path, teacher_name: str) -> None:
    (tmp_path / "in").mkdir()
    for command, what in (("cache-images", "no .tar"), ("cache-texts", "no .txt")):
        message = refused(command, tmp_path / "in", "--out", tmp_path / "s.zarr", "--teacher", teacher_name)
        assert f"{tmp_path}/in holds {what}" in message


def test_a_range_of_tars_of_which_one_is_missing(images: Path, tmp_path: Path, teacher_name: str) -> None:
    source = f"{images.parent}/{{000..001}}.tar"
    message = refused("cache-images", source, "--out", tmp_path / "s.zarr", "--teacher", teacher_name)
    assert "001.tar does not exist" in message


def test_a_tar_without_an_image(tmp_path: Path, teacher_name: str) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.txt": b"a caption"})
    message = refused("cache-images", tar, "--out", tmp_path / "s.zarr", "--teacher", teacher_name)
    assert f"no image in {tar}" in message
    assert not (tmp_path / "s.zarr").exists()


def test_a_labelled_set_without_a_class(tmp_path: Path, teacher_name: str) -> None:
    (tmp_path / "classnames.txt").write_text("")
    message = refused("cache-texts", tmp_path, "--out", tmp_path / "s.zarr", "--teacher", teacher_name)
    assert "classnames.txt is empty" in message


@pytest.mark.parametrize(
    ("teacher", "what"),
    [
        (["."], ". is a folder without a model"),
        (["ViT-Z-99"], "ViT-Z-99 is neither a folder nor an architecture"),
        (["ViT-Z-99", "--pretrained", "openai"], "ViT-Z-99 is neither a folder nor an architecture"),
        (["ViT-B-32"], "no weights named for ViT-B-32"),
        (["ViT-L-14", "--pretrained", "openai"], "trained with QuickGELU"),
        (["ViT-B-32-quickgelu", "--pretrained", "laion2b_s34b_b79k"], "cannot load ViT-B-32-quickgelu"),
        (["ViT-B-32", "--pretrained", "no_such_tag"], "cannot load ViT-B-32"),
    ],
)
def test_a_teacher_that_is_not_meant_or_not_there(
    images: Path, tmp_path: Path, teacher: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: object, **options: object) -> None:
        raise AssertionError("a download was begun")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    message = refused("cache-images", images, "--out", tmp_path / "s.zarr", "--teacher", *teacher)
    assert what in message
    assert "a download was begun" not in message
    assert not (tmp_path / "s.zarr").exists()


def test_the_remedy_for_another_activation_is_the_right_name(images: Path, tmp_path: Path) -> None:
    arguments = ["--out", tmp_path / "s.zarr", "--teacher", "ViT-L-14", "--pretrained", "openai"]
    message = refused("cache-images", images, *arguments)
    assert "remedy: use --teacher ViT-L-14-quickgelu --pretrained openai" in message


def test_a_name_without_weights_says_how_its_tags_are_listed(images: Path, tmp_path: Path) -> None:
    message = refused("cache-images", images, "--out", tmp_path / "s.zarr", "--teacher", "ViT-B-32")
    assert "--pretrained" in message
    assert "list_pretrained_tags_by_model('ViT-B-32')" in message


def test_a_teacher_folder_without_weights_or_not_there(images: Path, tmp_path: Path, sample: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(sample / "teacher" / "open_clip_config.json", tmp_path / "bare")
    for folder in ("bare", "nowhere"):
        teacher = f"local-dir:{tmp_path / folder}"
        message = refused("cache-images", images, "--out", tmp_path / "s.zarr", "--teacher", teacher)
        assert f"cannot load {teacher}" in message


def test_an_output_that_is_something_else_is_left_alone(images: Path, tmp_path: Path, teacher_name: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("precious")
    for out in ("thesis", "file"):
        message = refused("cache-images", images, "--out", tmp_path / out, "--teacher", teacher_name)
        assert f"{tmp_path / out} exists and is " in message
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_store_made_by_another_command(image_store: Store, images: Path, teacher_name: str) -> None:
    arguments = ["--out", image_store.path, "--teacher", teacher_name, "--batch-size", 8]
    message = refused("cache-images", images, *arguments)
    assert "was made by another command" in message
    assert "batch_size: 16 != 8" in message
    assert f"source: {images} is new" in message
    assert "shard_rows" not in message  # it was chosen by the size of the source


def test_a_store_whose_source_was_written_again_is_left_alone(images: Path, tmp_path: Path, teacher_name: str) -> None:
    out = tmp_path / "s.zarr"
    open_or_plan(PlanRequest(kind="image", arguments=(str(images),)), str(out), load_clip(teacher_name).identity)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    os.utime(images)
    message = refused("cache-images", images, "--out", out, "--teacher", teacher_name, "--batch-size", 64)
    assert f"the source of {out} has changed since it was planned" in message
    assert f"{images} has changed: written " in message
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert {path: time for path, time in before.items() if path != out} == {
        path: time for path, time in after.items() if path != out
    }


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    images: Path, tmp_path: Path, teacher_name: str
) -> None:
    result = run("cache-images", images, "--out", tmp_path / "s.zarr", "--teacher", teacher_name, "--dry-run")
    assert result.exit_code == 0
    assert re.search(r"rows +3 from 1 file, ", result.output)
    assert re.search(f"writes +{amount(3 * (2 * 128 + 1))} of embeddings and status\n", result.output)
    assert re.search(r"teacher .*, 128 wide, ", " ".join(result.output.split()))
    assert not (tmp_path / "s.zarr").exists()


def test_a_dry_run_of_images_measures_reading_and_the_teacher(images: Path, tmp_path: Path, teacher_name: str) -> None:
    words = ["--device", "cpu", "--workers", 2, "--threads", 1, "--pixels", 32, "--shard-rows", 2, "--dry-run"]
    output = run("cache-images", images, "--out", tmp_path / "s.zarr", "--teacher", teacher_name, *words).output
    output = " ".join(output.split())  # as if no line were wrapped
    rates = r"measured ([\d,.]+) images/s read and decoded by a thread, ([\d,.]+) images/s by the teacher on one core"
    taken = r"takes \d+s at ([\d,.]+) images/s with 2 workers of 1 decoding thread"
    measured, takes = re.search(rates, output), re.search(taken, output)
    assert measured
    assert takes
    load, teacher = (float(part.replace(",", "")) for part in measured.groups())
    assert float(takes[1].replace(",", "")) == pytest.approx(2 / (1 / load + 1 / teacher), rel=0.1)
    assert " of JPEGs" in output


def test_a_dry_run_of_sentences_says_what_is_dropped(tmp_path: Path, teacher_name: str) -> None:
    (tmp_path / "a.txt").write_text("one two three\none two three\none\nfour five six\n")
    words = ["--min-words", 2, "--device", "cpu", "--workers", 1, "--dry-run"]
    output = run("cache-texts", tmp_path / "a.txt", "--out", tmp_path / "s.zarr", "--teacher", teacher_name, *words)
    assert re.search(r"rows +2 from 1 file, ", output.output)
    assert re.search(r"skipped +sentences shorter than --min-words: 1, a.txt:3: one\n", output.output)
    assert re.search(r"skipped +repeated sentences: 1, a.txt:2: one two three\n", output.output)
    assert re.search(r"measured +[\d,.]+ texts/s by the teacher on one core\n", output.output)
    assert "with 1 worker\n" in output.output


def test_a_dry_run_over_images_that_cannot_be_read_says_why(tmp_path: Path, teacher_name: str) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": b"not an image", "1.jpg": b"nor this"})
    message = refused("cache-images", tar, "--out", tmp_path / "s.zarr", "--teacher", teacher_name, "--dry-run")
    assert "none of the first 2 images can be read: " in message
    assert f" (0 in {tar})\n" in message


def test_a_dry_run_says_which_of_the_first_images_cannot_be_read(tmp_path: Path, teacher_name: str) -> None:
    images = {"0.jpg": make_jpeg(), "1.jpg": b"version https://git-lfs.github.com/spec/v1\n"}
    tar = write_tar(tmp_path / "a.tar", images)
    output = run("cache-images", tar, "--out", tmp_path / "s.zarr", "--teacher", teacher_name, "--dry-run").output
    assert re.search("failed +1 of the first 2 images cannot be read: a Git LFS pointer", output)


def test_the_same_command_over_a_finished_store_only_describes_it(
    image_store: Store, image_tar: Path, teacher_name: str
) -> None:
    arguments = [image_tar, "--out", image_store.path, "--teacher", teacher_name]
    result = run("cache-images", *arguments, "--shard-rows", 32, "--batch-size", 16, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 of 3 done" in result.output


# -- build-index and retrieve -----------------------------------------------------------------------------------------


def test_an_index_over_a_store_that_is_unfinished_or_not_there(text_store: Store, tmp_path: Path) -> None:
    half = unfinished(text_store, tmp_path / "half.zarr")
    assert "is unfinished: 6 of 7 shards are done" in refused("build-index", half, "--out", tmp_path / "i.index")
    assert "is not a dimefm store" in refused("build-index", tmp_path / "nowhere", "--out", tmp_path / "i.index")
    assert not (tmp_path / "i.index").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--factory", "Magic9"], "--factory Magic9: "),
        (["--factory", "IVF512,Flat"], "--factory IVF512,Flat has 512 centroids, more than the 200 training rows"),
        (["--memory", "100MB"], "no index over 200 rows of width 128 fits into 100.0 MB: the smallest takes 1.2 GB"),
        (["--recall", "nan"], "--recall must lie between 0 and 1, found nan"),
        (["--queries", "nowhere"], "nowhere is not a dimefm store"),
        (["--workers", "1", "--ray-address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_an_index_that_cannot_be_built_as_asked(
    text_store: Store, tmp_path: Path, options: list[str], what: str
) -> None:
    assert what in refused("build-index", text_store.path, "--out", tmp_path / "i.index", *options)
    assert not (tmp_path / "i.index" / "index.json").exists()


def test_an_index_that_falls_short_is_refused_and_kept_with_accept(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "t.zarr", rows=3000, shard_rows=1024, kind="text")
    out = tmp_path / "i.index"
    words = ["build-index", store.path, "--out", out, "--recall", 1, "--factory", "PQ1x4"]
    result = run(*words)
    assert result.exit_code == 1
    what = r"\nError: PQ1x4 reaches recall@10 0\.\d+ for text queries, 0\.\d+ below 1\.0\n  remedy: .* or --accept; "
    assert re.search(what, result.output)
    assert run("info", out).output.startswith(f"{out}: FAISS index, unfinished\n")
    result = run(*words, "--accept")
    assert result.exit_code == 0, result.output
    assert run("info", out).output in result.output
    assert "  factory        PQ1x4\n" in result.output


def test_an_index_into_what_is_there_already(text_store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    message = refused("build-index", text_store.path, "--out", tmp_path / "thesis")
    assert "is not an index (it holds 'chapter.tex')" in message
    words = ["build-index", text_store.path, "--out", tmp_path / "i.index"]
    assert run(*words).exit_code == 0
    message = refused(*words, "--recall", 0.5)
    assert "was made by another command (its own != this one's):\n  - recall_target: 0.95 != 0.5" in message
    assert "an index must be a local path" in refused("build-index", text_store.path, "--out", "s3://bucket/i.index")


def test_part_of_a_store_is_indexed_if_it_is_asked_for(text_store: Store, tmp_path: Path) -> None:
    half = unfinished(text_store, tmp_path / "half.zarr")
    result = run("build-index", half, "--out", tmp_path / "i.index", "--partial")
    assert result.exit_code == 0, result.output
    assert "vectors        192 texts, 0 skipped" in result.output


def test_a_dry_run_of_an_index_builds_nothing(text_store: Store, image_store: Store, tmp_path: Path) -> None:
    words = ["build-index", text_store.path, "--out", tmp_path / "i.index", "--factory", "IVF16,Flat", "--dry-run"]
    assert "factory  IVF16,Flat, trained on 200 rows\n" in run(*words).output
    advice = " ".join(run(*words, "--queries", image_store.path).output.split())
    assert "for the 96 of --queries, exact search is cheaper" in advice
    assert not (tmp_path / "i.index").exists()


def test_retrieve_without_an_index_searches_exactly(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    words = ["retrieve", image_store.path, "--texts", text_store.path, "--top-k", 3, "--device", "cpu"]
    result = run(*words, "--out", tmp_path / "p.zarr")
    assert result.exit_code == 0, result.output
    assert "images        96 of 96, the nearest 3 sentences each\n" in result.output
    assert "index         exact search\n" in result.output
    half = unfinished(image_store, tmp_path / "half.zarr")
    message = refused("retrieve", half, "--texts", text_store.path, "--out", tmp_path / "q.zarr")
    assert "is unfinished: 2 of 3 shards are done" in message


def test_retrieve_says_what_it_would_take(
    image_store: Store, text_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index as it was measured when it was built, exact search as it is measured now, a GPU by arithmetic."""
    monkeypatch.setattr("dimefm.retrieval.retrieve_cost._measured", lambda dim: 96 * 200 / 3600)
    words = ["retrieve", image_store.path, "--texts", text_store.path, "--out", tmp_path / "p.zarr", "--dry-run"]
    shown = run(*words).output
    assert re.search(r"^images +96; 200 sentences, 128 wide$", shown, re.MULTILINE)
    assert re.search(r"^exact +1h00m of the CPU of this machine, at 5\.3 scores/s", shown, re.MULTILINE)
    assert "build-index --dry-run --queries IMAGES.zarr says whether" in " ".join(shown.split())
    several = run(*words, "--workers", 2, "--ray-address", "none", "--device", "cpu").output
    assert re.search(r"^exact +30m00s of the CPUs of 2 machines, each at 5\.3 scores/s", several, re.MULTILINE)
    assert "on a GPU" in shown
    assert "on a GPU" not in several
    index = tmp_path / "t.index"
    build_index(IndexConfig(store=text_store.path, out=str(index)))
    facts = json.loads(run(*words, "--index", index, "--json").stdout)
    assert facts["index_images_per_second"] == read_sidecar(str(index)).queries_per_second
    assert facts["seconds"]["exact"] == pytest.approx(3600)
    assert facts["advice"].startswith("on CPUs the index is cheaper; exact search on one such GPU is done sooner")
    assert not (tmp_path / "p.zarr").exists()


def test_retrieve_with_an_index_over_another_store(
    image_store: Store, text_store: Store, prompt_store: Store, tmp_path: Path
) -> None:
    index = tmp_path / "prompts.index"
    build_index(IndexConfig(store=prompt_store.path, out=str(index)))
    arguments = [image_store.path, "--texts", text_store.path, "--out", tmp_path / "p.zarr"]
    assert f"{index} was built over {prompt_store.path}" in refused("retrieve", *arguments, "--index", index)
    assert "is not a dimefm index" in refused("retrieve", *arguments, "--index", tmp_path / "nowhere")
    assert not (tmp_path / "p.zarr").exists()


def test_retrieve_over_two_teachers(image_store: Store, prompt_store: Store, tmp_path: Path) -> None:
    other = altered(prompt_store, tmp_path / "other.zarr", weights="0" * 64)
    index = tmp_path / "other.index"
    build_index(IndexConfig(store=str(other), out=str(index)))
    message = refused("retrieve", image_store.path, "--texts", other, "--index", index, "--out", tmp_path / "p.zarr")
    assert "come from different teachers" in message
    assert "teacher.weights: " in message


# -- select-texts -----------------------------------------------------------------------------------------------------


def test_selecting_from_what_is_not_there_or_with_options_without_effect(tmp_path: Path) -> None:
    words = ["select-texts", tmp_path / "p.zarr", "--out", tmp_path / "s"]
    assert "is not a dimefm store" in refused(*words, "--size", 3)
    assert "--seed has no effect without --by similarity" in refused(*words, "--by", "hits", "--seed", 3)
    assert "--pool has no effect without --dedup or --balance" in refused(*words, "--size", 3, "--pool", 9)
    assert not (tmp_path / "s").exists()


def test_what_is_selected_is_what_training_draws_from(
    image_store: Store, text_store: Store, tmp_path: Path, tiny_run: list[str]
) -> None:
    pairs, out = tmp_path / "p.zarr", tmp_path / "s.selection"
    search = ExactSearch(text_store)
    write_pairs(image_store, text_store, search, index="exact", index_digest="e", top_k=4, out=str(pairs))
    union = tmp_path / "union.selection"
    assert run("select-texts", pairs, "--out", union).exit_code == 0
    np.testing.assert_array_equal(SelectedTexts(str(union)).rows(), np.flatnonzero(Pairs(str(pairs)).hits()))
    result = run(
        "select-texts", pairs, "--out", out, "--by", "similarity", "--size", 40, "--dedup", 0.99, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "kept          40 of 200 sentences" in result.output
    assert run("info", out).output in result.output
    train = [*tiny_run, "--max-steps", 1, "--device", "cpu"]
    result = run(*train, "--out", tmp_path / "run", "--selection", out, "--text-mix", "selected=1")
    assert result.exit_code == 0, result.output
    message = refused(*train, "--out", tmp_path / "other", "--selection", out)
    assert "a selection is given, but the text mix draws nothing from it" in message


# -- train-student ----------------------------------------------------------------------------------------------------


def training(images: object, texts: object, out: Path, *more: object) -> list[object]:
    given = ["--images", images, "--texts", texts, "--out", out, "--device", "cpu", "--recipe", "sample"]
    return ["train-student", *given, *more]


def test_training_from_two_teachers_names_every_field_that_differs(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    other = altered(text_store, tmp_path / "other.zarr", weights="0" * 64, context_length=77)
    message = refused(*training(image_store.path, other, tmp_path / "run"))
    assert "teacher.weights: " in message
    assert "teacher.context_length: 32 != 77" in message
    assert not (tmp_path / "run").exists()


def test_training_from_a_store_that_is_unfinished_or_not_there(
    image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    half = unfinished(image_store, tmp_path / "half.zarr")
    assert "is unfinished" in refused(*training(half, text_store.path, tmp_path / "run"))
    assert "is not a dimefm store" in refused(*training(image_store.path, tmp_path / "no", tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--loss", "vl=0"], "every loss has weight 0"),
        (["--student", "resnet9000"], "no image tower is called 'resnet9000'"),
        (["--batch-size", "1000"], "a batch of 1,000 images is more than the 96 with an embedding"),
        (["--lr", "0", "--epochs", "-1"], "epochs must be above 0, found -1.0; lr must be above 0, found 0.0"),
        (["--text-mix", "selected=1"], "--pairs"),
        (["--text-mix", "random=0.5"], "add up to"),
        (["--pairs", "nowhere"], "neither the text mix nor the loss draws from them"),
        (["--captions", "nowhere"], "neither the text mix nor the loss draws from them"),
        (["--text-mix", "random=0.5,captions=0.5"], "captions in the text mix need --captions"),
        (["--set", "loss.queue=-1"], "loss.queue must not be below 0"),
        (["--set", "loss.mask_diagonal=true"], "loss.mask_diagonal needs pvl or udist"),
        (["--loss", "contrastive=1"], "the contrastive loss needs --captions or --pairs"),
        (["--ema", "1.5"], "ema must lie between 0 and 1"),
        (["--accumulate", "9"], "a batch of 8 over 1 processes is less than one for each of its passes"),
        (["--init", "nowhere.pt"], "'nowhere.pt' is no file, no folder and no tag"),
        (["--text-student", "nobody", "--set", "text_batch_size=8"], "no model of open_clip is called 'nobody'"),
        (["--allow-changes", "lr,student"], "student cannot change within a run"),
        (["--pairs", "nowhere", "--text-mix", "selected=1"], "nowhere is not a dimefm store"),
        (["--epochs", "0.001"], "of 12 steps are none"),
        (["--val", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_cannot_be_trained_with(
    image_store: Store, text_store: Store, tmp_path: Path, options: list[str], what: str
) -> None:
    more = [] if "--batch-size" in options else ["--batch-size", "8"]
    if "--loss" not in options:
        more += ["--loss", "vl=1"]
    assert what in refused(*training(image_store.path, text_store.path, tmp_path / "run", *more, *options))


def test_captions_from_a_tar_to_a_student(tmp_path: Path, text_store: Store, teacher_name: str) -> None:
    members: dict[str, bytes] = {}
    for row in range(8):
        members |= {f"{row}.jpg": make_jpeg(seed=row), f"{row}.txt": f"picture {row}\nanother".encode()}
    write_tar(tmp_path / "a.tar", members)
    stores = ["--captions", "txt", "--out", tmp_path / "I.zarr", "--captions-out", tmp_path / "C.zarr"]
    made = run("cache-images", tmp_path / "a.tar", "--teacher", teacher_name, "--device", "cpu", *stores)
    assert made.exit_code == 0, made.output
    assert "I.zarr: image embeddings" in made.output
    assert "C.zarr: text embeddings" in made.output
    assert "8 of 8 images, up to 2 each" in " ".join(made.output.split())
    small = ["--student", "test_resnet", "--image-size", 32, "--batch-size", 8, "--max-steps", 1, "--workers", 0]
    mix = ["--captions", tmp_path / "C.zarr", "--loss", "vl=1,contrastive=1", "--text-mix", "random=0.5,captions=0.5"]
    result = run(*training(tmp_path / "I.zarr", text_store.path, tmp_path / "run", *small, *mix))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "C.zarr") in " ".join(run("info", tmp_path / "run").output.split())


def test_every_switch_arrives_in_the_run(tmp_path: Path, tiny_run: list[str]) -> None:
    switches = ["--ema", 0.9, "--accumulate", 2, "--clip-grad", 1, "--keep", 3, "--max-steps", 1, "--device", "cpu"]
    settings = ["--set", "loss.queue=32", "--set", "loss.logit_scale=teacher", "--set", "betas=[0.9, 0.98]"]
    result = run(*tiny_run, *switches, *settings, "--set", "warmup_epochs=0.5", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = read_run(str(tmp_path / "run")).config
    expected = {"ema": 0.9, "accumulate": 2, "clip_grad": 1.0, "keep": 3, "betas": [0.9, 0.98], "warmup_epochs": 0.5}
    assert {name: config[name] for name in expected} == expected
    assert config["loss"]["queue"] == 32  # type: ignore[index]
    assert config["loss"]["centred"] == 1.0, "--set leaves the rest of --loss alone"  # type: ignore[index]
    told = run("info", tmp_path / "run").output
    assert "checkpoints" in told


def test_training_into_a_folder_of_something_else(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    message = refused(*training(image_store.path, text_store.path, tmp_path / "thesis", "--batch-size", 8))
    assert "'chapter.tex'" in message


# -- evaluate, export, info -------------------------------------------------------------------------------------------


def labelled_set(folder: Path, members: dict[str, bytes]) -> Path:
    """A set of two classes in a tar of these members."""
    write_tar(folder / "a.tar", members)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "templates.txt").write_text("a {c}\n")
    return folder


def failed(*arguments: object) -> str:
    """What evaluate prints of sets that it cannot read: each on a line with a remedy, and it exits with 1."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.output.count("FAILED: ") == result.output.count("remedy: ") == 1
    return result.output


def test_evaluate_with_a_label_that_has_no_class(tmp_path: Path, teacher_name: str) -> None:
    pets = labelled_set(tmp_path / "pets", {"0.jpg": make_jpeg(), "0.cls": b"2"})
    message = failed("evaluate", teacher_name, pets, "--device", "cpu", "--out", tmp_path / "out")
    assert f"pets: FAILED: {pets}/a.tar: 0 has label 2, but there are 2 classes" in message
    assert "written: " not in message


def test_evaluate_a_model_or_a_set_that_is_not_there(tmp_path: Path, teacher_name: str, sample: Path) -> None:
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    assert f"{tmp_path}/nowhere is no folder" in refused("evaluate", teacher_name, tmp_path / "nowhere", *out)
    assert "nowhere is neither a folder nor an architecture" in refused(
        "evaluate", "nowhere", sample / "eval" / "cifar10", *out
    )
    assert not (tmp_path / "out").exists()


def test_evaluate_does_the_sets_that_it_can_and_says_which_not(tmp_path: Path, teacher_name: str) -> None:
    good = labelled_set(tmp_path / "pets", {"0.jpg": make_jpeg(), "0.cls": b"1"})
    bad = labelled_set(tmp_path / "zoo", {"0.jpg": make_jpeg()})
    output = failed("evaluate", teacher_name, bad, good, "--device", "cpu", "--out", tmp_path / "out", "--name", "m")
    assert f"zoo: FAILED: {bad}/a.tar: 0 has no .cls" in output
    assert "1 image, 2 classes" in output
    assert f"written: {tmp_path}/out/m/results.jsonl" in output
    assert [result.set for result in read_results(str(tmp_path / "out" / "m"))] == ["pets"]


def test_evaluate_refuses_two_sets_of_one_name_before_it_opens_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        labelled_set(tmp_path / place / "pets", {"0.jpg": make_jpeg(), "0.cls": b"1"})
    monkeypatch.chdir(tmp_path / "here" / "pets")
    for one in (tmp_path / "here" / "pets", "."):
        assert "two sets are called 'pets'" in refused("evaluate", tmp_path, one, f"{tmp_path}/there/pets/")


def test_evaluate_of_known_sets_needs_to_be_told_where_they_are(tmp_path: Path) -> None:
    for words in (["--suite", "imagenet"], ["--sets", "dtd"], ["set", "--data", "sets"]):
        assert "--data ROOT goes with --suite or --sets" in run("evaluate", "model", *words).stderr
    words = ["evaluate", tmp_path, "--data", tmp_path, "--suite", "elevater", "--sets", "dtd,imagenet_a"]
    assert "imagenet_a is a set of the suite robustness, not of elevater" in refused(*words)
    words = ["evaluate", "model", "--data", tmp_path, "--sets", "imagenet1k,imagenet_z"]
    message = refused(*words)
    assert f"imagenet_z is neither a known set nor a folder of {tmp_path}\n  remedy: did you mean 'imagenet" in message
    words = ["evaluate", "model", "--data", f"{tmp_path}-sets", "--sets", "dtd"]
    assert f"{tmp_path}-sets is no folder\n  remedy: did you mean '{tmp_path}'" in refused(*words)
    assert "no suite is called 'robust': did you mean 'robustness'?" in run(*words, "--suite", "robust").stderr
    assert "no set is called 'gtsr'\n  remedy: did you mean 'gtsrb'?" in refused("sets", "gtsr")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "5"], "--shots has no effect without --task few-shot"),
        (["--seeds", "5", "--task", "linear-probe"], "--seeds has no effect without --task few-shot"),
        (["--solver", "sgd"], "--solver has no effect without --task linear-probe or --task few-shot"),
        (["--task", "few-shot", "--solver", "lbfgs", "--selection", "elevater"], "--solver lbfgs has none"),
        (["--shots", "a", "--task", "few-shot"], "is not a list of whole numbers"),
    ],
)
def test_evaluate_refuses_options_without_effect(words: list[str], message: str) -> None:
    result = run("evaluate", "model", "set", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_evaluate_prints_and_writes_its_results(tmp_path: Path, teacher_name: str) -> None:
    pets = labelled_set(tmp_path / "pets", {"0.jpg": make_jpeg(), "0.cls": b"1", "1.jpg": b"broken", "1.cls": b"0"})
    words = ["evaluate", teacher_name, pets, "--device", "cpu", "--out", tmp_path / "out", "--name", "m"]
    result = run(*words, "--predictions")
    assert result.exit_code == 0, result.output
    assert "2 images, 2 classes\n    1 images could not be read and count as wrong: 1 (" in result.stdout
    (found,) = read_results(str(tmp_path / "out" / "m"))
    first, second = read_predictions(str(tmp_path / "out" / "m"), found)
    assert first in (0, 1)
    assert second == -1
    assert f"top-1 {found.value:6.1%}" in result.stdout
    again = run(*words, "--skip-existing", "--predictions")
    assert again.stdout == result.stdout
    assert len((tmp_path / "out" / "m" / "results.jsonl").read_text().splitlines()) == 1


def test_evaluate_measures_retrieval_where_there_are_captions(tmp_path: Path, teacher_name: str) -> None:
    members = {f"{i}.{kind}": data for i in range(2) for kind, data in (("jpg", make_jpeg(seed=i)), ("txt", b"a\nb"))}
    write_tar(tmp_path / "pairs" / "a.tar", members)
    words = ["evaluate", teacher_name, tmp_path / "pairs", "--device", "cpu", "--out", tmp_path / "out"]
    assert "recall@1  50.0% [" in run(*words).stdout
    assert "image to text" in run(*words).stdout


# -- sets, compare and submission -------------------------------------------------------------------------------------


def test_sets_lists_them_all_or_says_everything_of_one(tmp_path: Path) -> None:
    known = load_definitions()
    lines = run("sets").output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(known)
    one = " ".join(run("sets", "gtsrb").output.split())
    assert one.startswith(known["gtsrb"].title)
    assert known["gtsrb"].get in one
    (tmp_path / "gtsrb").mkdir()
    there = run("sets", "--data", tmp_path).output.splitlines()
    assert [line for line in there if str(tmp_path) in line] == [line for line in there if line.startswith("gtsrb ")]
    assert "no set is called 'imagenet_z'" in refused("sets", "imagenet_z")


def test_compare_and_submission_of_what_was_not_evaluated(tmp_path: Path) -> None:
    for words in (["compare", tmp_path], ["submission", tmp_path, "--out", tmp_path / "s.zip"]):
        assert f"{tmp_path}/results.jsonl does not exist" in refused(*words)
    assert not (tmp_path / "s.zip").exists()


def test_export_of_what_is_no_run(tmp_path: Path, image_store: Store) -> None:
    for path in (tmp_path / "nowhere", image_store.path):
        assert "is neither a run folder nor a model" in refused("export", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_info_on_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        assert f"Error: {path} " in refused("info", path)


def test_info_on_a_damaged_store_reports_every_problem(image_store: Store, tmp_path: Path) -> None:
    other = altered(image_store, tmp_path / "s.zarr", weights=3, precision="int8")
    result = run("info", other)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "teacher.weights: expected a string, found 3" in result.output
    assert "teacher.precision: expected one of 'fp32', 'bf16', 'fp16', found 'int8'" in result.output


def test_info_lists_every_failure_as_a_table(clip: Clip, tmp_path: Path) -> None:
    contents = {"a.jpg": b"", "b.jpg": make_jpeg(), **{f"c{i:02d}.jpg": b"no image" for i in range(12)}}
    tar = write_tar(tmp_path / "a.tar", contents)
    store = cached("image", tar, tmp_path / "s.zarr", clip)
    lines = run("info", store.path, "--failures").output.splitlines()
    assert lines[0].split("\t") == ["row", "key", "status", "file", "reason"]
    assert lines[1].split("\t") == ["0", "a", "EMPTY", str(tar), "no bytes"]
    assert [line.split("\t")[:3] for line in lines[2:]] == [[str(2 + i), f"c{i:02d}", "UNDECODABLE"] for i in range(12)]
    assert all(line.split("\t")[4] for line in lines[2:])
    assert "and 3 more" in run("info", store.path).output


def test_info_of_no_failures_is_the_head_of_a_table(image_store: Store) -> None:
    assert run("info", image_store.path, "--failures").output == "row\tkey\tstatus\tfile\treason\n"


def test_info_on_a_store_says_rows_shards_status_and_teacher(image_store: Store, tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in run("info", image_store.path).output.splitlines()]
    assert lines[0] == f"{image_store.path}: image embeddings"
    assert any(line.startswith("rows 96, from 1 file of ") for line in lines)
    assert "shards 3 of 3 done, 32 rows each" in lines
    assert "status OK 96" in lines
    half = run("info", unfinished(image_store, tmp_path / "half.zarr")).output
    assert "2 of 3 done" in half
    assert "OK 64" in half
