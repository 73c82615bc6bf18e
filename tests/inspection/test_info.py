"""`dimefm info`: what it knows of each thing that dimefm writes, in lines and as JSON, and what it says of the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cache_schemas.run import Change
from dimefm.cli import cli
from dimefm.errors import StoreError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.export.export_student import export
from dimefm.inspection import describe_retrieval
from dimefm.inspection.info import examine
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.retrieve import retrieve
from dimefm.selection.select_texts import SelectionConfig, select_texts
from dimefm.store.embedding_store import Store
from dimefm.training.run_folder import read_run, write_run
from dimefm.training.train import train
from tests.making import make_jpeg
from tests.tiny_training import tiny_config


@pytest.fixture(scope="module")
def session(image_store: Store, text_store: Store, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each thing that dimefm writes."""
    here = tmp_path_factory.mktemp("session")
    (here / "images.zarr").symlink_to(image_store.path)
    (here / "set").symlink_to(cifar10)
    build_index(IndexConfig(store=text_store.path, out=str(here / "texts.index")))
    retrieve(image_store.path, text_store.path, top_k=3, out=str(here / "pairs.zarr"), device="cpu")
    select_texts(SelectionConfig(pairs=str(here / "pairs.zarr"), out=str(here / "texts.selection")))
    train(tiny_config(image_store, text_store, here / "run", max_steps=2))
    export(str(here / "run"), str(here / "student"))
    export_embeddings(image_store.path, str(here / "embeddings"))
    for name in ("one", "other"):
        evaluate(
            EvaluationConfig(model=str(here / "student"), folders=(cifar10,), out=str(here / "results"), name=name)
        )
    return here


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def document(*words: object) -> Any:
    """What a command prints with --json, and nothing else on stdout."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


KINDS = {
    "images.zarr": "store", "texts.index": "index", "pairs.zarr": "pairs", "texts.selection": "selection",
    "run": "run", "student": "model", "results": "evaluations", "results/one": "evaluations", "set": "labelled-set",
    "embeddings": "embeddings",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_thing_is_known_in_lines_and_as_json(session: Path, name: str) -> None:
    found = document("info", session / name)
    assert (found["artefact"], found["finished"]) == (KINDS[name], True)
    assert found["path"] == str(session / name)
    lines = run("info", session / name).stdout.splitlines()
    assert str(session / name) in lines[0]
    assert [line for line in lines[1:] if len(line) > 80 and "/" not in line] == []


def test_the_lines_are_made_of_the_facts(session: Path) -> None:
    """Whatever facts are changed, the lines follow: there is no second way to them."""
    found = examine(str(session / "pairs.zarr"))
    assert f"{found.facts['selected']:,} of {found.facts['text_rows']:,} sentences" in found.show()
    rows = dict(describe_retrieval._pairs({**found.facts, "skipped": 1, "examples": [{"hits": 1, "text": "a dog"}]}))
    assert rows["skipped"] == "1 image without a usable embedding"
    assert rows["1 hit"] == "a dog"


def test_a_model_in_a_folder(session: Path) -> None:
    found = document("info", session / "student")
    assert (found["image_tower"], found["embed_dim"], found["preprocessing"]["size"]) == ("test_resnet", 128, [32, 32])
    assert found["load"] == f"local-dir:{session / 'student'}"
    result = json.loads((session / "results" / "one" / "results.jsonl").read_text().splitlines()[0])
    for name in ("parameters", "image_parameters"):
        assert found[name] == result["model"][name]
    weights = session / "student" / "open_clip_model.safetensors"
    assert found["bytes"] == weights.stat().st_size


def test_a_model_whose_files_are_not_those_of_one(session: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(StoreError, match="is no config of open_clip"):
        examine(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_bytes((session / "student" / "open_clip_config.json").read_bytes())
    assert document("info", tmp_path)["parameters"] is None
    assert "weights       no open_clip_model.safetensors here" in run("info", tmp_path).output
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(StoreError, match="is damaged: it has no header of safetensors"):
        examine(str(tmp_path))


def test_results_of_evaluations(session: Path) -> None:
    found = document("info", session / "results")
    assert [model["name"] for model in found["models"]] == ["one", "other"]
    assert [r["protocol"] for r in found["models"][0]["results"]] == ["zero-shot"]
    result = found["models"][0]["results"][0]
    line = f"one           cifar10: zero-shot, {result['metric']} {result['value']:.4f}, 200 images"
    assert line in run("info", session / "results" / "one").output


def test_allowed_changes_of_a_run_are_no_error(session: Path, tmp_path: Path) -> None:
    begun = read_run(str(session / "run"))
    write_run(str(tmp_path), replace(begun, changes=(Change(step=2, field="lr", values="0.004 != 0.001"),)))
    assert "lr changed from 0.004 to 0.001 after step 2" in run("info", tmp_path).output
    changes = document("info", tmp_path)["changes"]
    assert changes == [{"step": 2, "field": "lr", "before": "0.004", "after": "0.001"}]
    assert "checkpoints    none yet" in run("info", tmp_path).output


def test_a_run_with_a_setting_that_is_refused_now_is_described(session: Path, tmp_path: Path) -> None:
    begun = read_run(str(session / "run"))
    config = {name: value for name, value in begun.config.items() if name != "threads"}  # older runs lack some, too
    write_run(str(tmp_path), replace(begun, config={**config, "weight_decay": -1.0}))
    assert "training run" in run("info", tmp_path).output
    usual, found = document("info", session / "run"), document("info", tmp_path)
    assert found["threads"] is None
    assert [found[name] for name in ("loss", "batch_size", "images")] == [
        usual[name] for name in ("loss", "batch_size", "images")
    ]


@pytest.mark.parametrize("damaged", ["[]", "null", '{"attributes": []}', '{"attributes": {"dimefm": {"schema": []}}}'])
def test_a_damaged_zarr_group_is_nothing_that_is_known(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(damaged)
    with pytest.raises(StoreError, match="is nothing that dimefm wrote"):
        examine(str(tmp_path))


def test_class_folders_without_class_names(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.jpg").write_bytes(make_jpeg())
    found = document("info", tmp_path)
    assert (found["artefact"], found["classes"]) == ("labelled-set", ["cats", "dogs"])


def test_what_a_mistyped_path_was_probably_meant_to_be(session: Path) -> None:
    for path, remedy in (
        (session / "imags.zarr", f"did you mean '{session}/images.zarr'"),
        (session / "elsewhere", "give the --out of one of dimefm's commands"),
        (session / "run" / "checkpoints", f"dimefm info {session / 'run'}"),
        (session / "run" / "checkpoints" / "last.json", f"dimefm info {session / 'run'}"),
        (session / "texts.index" / "index.json", f"dimefm info {session / 'texts.index'}"),
        (session / "set" / "test-00000.tar", f"dimefm info {session / 'set'}"),
    ):
        result = run("info", path)
        assert result.exit_code == 1
        assert f"Error: {path} " in result.output
        assert f"remedy: {remedy}" in result.output


def test_a_folder_of_other_things_is_said_to_be_that(session: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"dimefm wrote: it holds 'embeddings', 'images.zarr', 'pairs.zarr'") as caught:
        examine(str(session))
    assert f"dimefm info {session}/embeddings or dimefm info {session}/images.zarr" in str(caught.value.remedy)
    with pytest.raises(StoreError, match="is empty"):
        examine(str(tmp_path))


def test_json_of_the_other_commands(session: Path, image_store: Store, text_store: Store, tmp_path: Path) -> None:
    checked = document("verify", image_store.path)
    assert (checked["trusted"], checked["rows"], checked["bad_shards"]) == (True, 96, [])
    assert checked["verdict"] == "the store can be trusted"
    assert document("info", image_store.path, "--failures") == []
    words = ["select-texts", session / "pairs.zarr", "--size", 7, "--out", tmp_path / "s.selection"]
    assert document(*words)["kept"] == 7
    found = document("search", text_store.path, "--text", "a dog", "--top-k", 2, "--device", "cpu")
    assert [one["query"] for one in found] == ["a dog"]
    assert [set(hit) for hit in found[0]["hits"]] == [{"score", "row", "key", "text"}] * 2
    words = ["retrieve", image_store.path, "--texts", text_store.path, "--device", "cpu"]
    assert document(*words, "--out", tmp_path / "p.zarr")["images"] == 96
    words = ["build-index", text_store.path, "--out", tmp_path / "t.index"]
    assert document(*words, "--dry-run")["plan"]["factory"] == "Flat"
    assert document(*words)["factory"] == "Flat"


def test_every_name_of_the_json_is_in_the_documents(session: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("## What `--json` prints")[2].partition("\n## ")[0]
    for name, kind in KINDS.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| `{kind}` |"))
        for fact in document("info", session / name).keys() - {"artefact", "path", "finished"}:
            assert f"`{fact}`" in row, f"{kind}: {fact}"


def test_a_mistyped_store_or_index_is_answered_with_what_is_beside_it(session: Path, image_store: Store) -> None:
    pairs = str(session / "pairs.zarr")
    for words in (["verify", f"{session}/par.zarr"], ["search", f"{session}/par.zarr", "--text", "a"]):
        assert f"remedy: did you mean '{pairs}'" in run(*words).output
    words = ["retrieve", image_store.path, "--texts", image_store.path.replace("images.zarr", "image.zarr")]
    assert f"did you mean '{image_store.path}'" in run(*words, "--out", session / "q.zarr").output
