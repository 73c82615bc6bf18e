"""A stopped evaluation goes on where it was, and what is there already is not made again."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.evaluation import features as featuring
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.results import read_results
from dimefm.store.embedding_store import Store
from tests.processes import Command, Gate
from tests.tiny_clip import write_clip

FEATURES = "own-cifar10-test.zarr"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose numbers do not matter."""
    return write_clip(tmp_path_factory.mktemp("models") / "tiny")


def few_rows() -> None:
    """In the process of the command: shards of so few images that there are several."""
    featuring._SHARD_ROWS = (50, 50)


@pytest.mark.slow
def test_killed_it_goes_on_with_the_shards_that_are_there(cifar10: str, model: str, tmp_path: Path) -> None:
    words = ["evaluate", model, cifar10, "--out", str(tmp_path / "killed"), "--name", "m", "--device", "cpu"]
    commits, gate = tmp_path / "killed" / "m" / "features" / FEATURES / "commits", Gate(tmp_path / "gate")
    gate.close(at="os.rename */commits/000002.json")
    Command(words, gate, few_rows).kill_when(gate.waiting)
    written = {path.name: path.stat().st_mtime_ns for path in commits.glob("[0-9]*")}
    assert len(written) == 2
    assert not (tmp_path / "killed" / "m" / "results.jsonl").exists()
    Command(words, prepare=few_rows).finish()
    Command([*words[:4], str(tmp_path / "whole"), *words[5:]], prepare=few_rows).finish()
    assert {name: (commits / name).stat().st_mtime_ns for name in written} == written
    killed, whole = (read_results(str(tmp_path / name / "m"))[0] for name in ("killed", "whole"))
    assert killed.metrics == whole.metrics
    stores = [Store(str(tmp_path / name / "m" / "features" / FEATURES)) for name in ("killed", "whole")]
    assert [c.digest for c in stores[0].commits()] == [c.digest for c in stores[1].commits()]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are encoded, as they are."""
    shards: list[int] = []
    real = featuring.encode_shard

    def counting(store: Any, shard: int, *args: Any, **words: Any) -> Any:
        shards.append(shard)
        return real(store, shard, *args, **words)

    monkeypatch.setattr(featuring, "encode_shard", counting)
    return shards


def test_features_are_encoded_once_and_again_only_for_other_pixels(
    cifar10: str, model: str, tmp_path: Path, encoded: list[int]
) -> None:
    config: dict[str, Any] = {"model": model, "folders": (cifar10,), "out": str(tmp_path), "threads": 1}
    first = evaluate(EvaluationConfig(**config)).results[0]
    again = evaluate(EvaluationConfig(**config)).results[0]
    assert encoded == [0]
    assert again.metrics == first.metrics
    assert again.finished >= first.finished
    evaluate(EvaluationConfig(**config, decoder="fast"))
    assert encoded == [0, 0]
    (Path(cifar10) / "test-00000.tar").touch()  # changed, for all that is known
    evaluate(EvaluationConfig(**config, decoder="fast"))
    assert encoded == [0, 0, 0]


def test_skip_existing_keeps_a_result_of_the_same_settings_alone(cifar10: str, model: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": model, "folders": (cifar10,), "out": str(tmp_path), "skip_existing": True}
    path = tmp_path / "tiny" / "results.jsonl"
    first = evaluate(EvaluationConfig(**config)).results
    assert evaluate(EvaluationConfig(**config)).results == first
    assert len(path.read_text().splitlines()) == 1
    evaluate(EvaluationConfig(**config, predictions=True))  # which were not kept
    evaluate(EvaluationConfig(**config, predictions=True))
    assert len(path.read_text().splitlines()) == 2
    evaluate(EvaluationConfig(**config, decoder="fast"))
    assert len(path.read_text().splitlines()) == 3
    assert len(read_results(str(path))) == 1


def test_a_last_line_that_was_cut_short_is_written_over(cifar10: str, model: str, tmp_path: Path) -> None:
    config = EvaluationConfig(model=model, folders=(cifar10,), out=str(tmp_path))
    evaluate(config)
    path = tmp_path / "tiny" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert len(read_results(str(path.parent))) == 1
    evaluate(config)
    assert [json.loads(line)["set"] for line in path.read_text().splitlines()] == ["cifar10"] * 2


def test_results_are_not_written_through_a_link(cifar10: str, model: str, tmp_path: Path) -> None:
    """A folder of others' could lead anywhere with one."""
    other = tmp_path / "thesis.tex"
    other.write_text("all of it\nand a line that is not finished")
    (tmp_path / "out" / "m").mkdir(parents=True)
    (tmp_path / "out" / "m" / "results.jsonl").symlink_to(other)
    result = CliRunner().invoke(cli, ["evaluate", model, cifar10, "--out", str(tmp_path / "out"), "--name", "m"])
    assert result.exit_code == 1
    assert other.read_text() == "all of it\nand a line that is not finished"
    other.unlink()
    result = CliRunner().invoke(cli, ["evaluate", model, cifar10, "--out", str(tmp_path / "out"), "--name", "m"])
    assert f"Error: {tmp_path}/out/m/results.jsonl cannot be written: " in result.output
    assert not other.exists()
