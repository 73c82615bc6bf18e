"""A run's log in wandb and in trackio: each step once, whatever was stopped, and nothing of it ends a run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from dimefm.errors import TrainingError
from dimefm.store.embedding_store import Store
from dimefm.training.before_training import require_startable
from dimefm.training.read_metrics import read_metrics
from dimefm.training.recipes import sample
from dimefm.training.run_log import RunLog
from dimefm.training.train import train
from tests.tiny_training import same, tiny_config, weights

Rows = list[tuple[str, int, dict[str, Any]]]


class Crash(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home without a login, where no network is asked for."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR", "HF_HOME"):
            patch.setenv(name, str(home / name))
        yield home
        import wandb

        wandb.teardown()


def wandb_rows(run: Path, project: str = "dimefm") -> Rows:
    """The rows that wandb has written for later, by its run and step, file after file. A file is a header of 7 bytes
    and blocks of 32 KiB, in which each piece of a record has its length after 4 bytes and its kind after 6."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process has written all
    found: Rows = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, record, name = path.read_bytes(), 7, b"", ""
        while at + 7 <= len(data):
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            record += data[at + 7 : at + 7 + size]
            if data[at + 6] in (1, 4):  # the whole of a record, or its last piece
                known, record = Record.FromString(record), b""
                if known.run.run_id:
                    assert known.run.project == project
                    assert {item.key for item in known.run.config.update} > {"student", "lr", "loss"}
                    name = known.run.run_id
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in known.history.item}
                if row:
                    found.append((name, row["_step"], {key: v for key, v in row.items() if key[0] != "_"}))
            at += 7 + size
    return found


def trackio_rows(home: Path) -> Rows:
    """The rows of the only run that trackio has."""
    with sqlite3.connect(home / "TRACKIO_DIR" / "dimefm.db") as tables:
        rows = tables.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(name, step, json.loads(metrics)) for name, step, metrics in rows]


def log(out: Path, to: Any, first: int, stop: int, *, crash: bool = False) -> None:
    """Log the steps after `first` as a run does, in which step 4 is validated; end well, or in the middle of a step."""
    config = sample("i", "t", str(out), log_to=to)
    with suppress(Crash), RunLog(config, first=first, steps=8, enabled=True) as run:
        for step in range(first + 1, stop + 1):
            run.step(step, images=1, waited=0.0, at=run._now + 1)
            run.train(step, {"loss": float(10 * first + step), "grad_norm": float("inf")})
            if step == 4:
                run.validation(step, {"eval": 0.5}, 0.0)
        if crash:
            raise Crash
        run.flush()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["wandb", "trackio"])
def test_every_step_is_logged_once_in_one_run(tmp_path: Path, home: Path, to: str) -> None:
    """The first start dies in step 5 and goes on after step 3, for a while without a tracker."""
    pytest.importorskip(to, reason=f"{to} is not installed here: pip install dimefm[{to}]")
    out = tmp_path / "a run"
    log(out, to, 0, 5, crash=True)
    log(out, None, 3, 6)
    log(out, to, 6, 8)
    rows = wandb_rows(out) if to == "wandb" else trackio_rows(home)
    assert [(step, row["train/loss"]) for _, step, row in rows] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 35.0), (6, 36.0), (7, 67.0), (8, 68.0),
    ]  # fmt: skip
    assert rows[3][2]["validation/eval"] == 0.5
    assert "train/grad_norm" not in rows[0][2], "infinity is no number for everyone"
    (name,) = {name for name, _, _ in rows}
    assert name.startswith("a-run-")
    log(out, to, 0, 1)  # nothing was kept: another run
    (out / "metrics.jsonl").unlink()  # as if no line had been due before the checkpoint
    log(out, to, 1, 2)
    rows = wandb_rows(out) if to == "wandb" else trackio_rows(home)
    assert len({name for name, _, _ in rows}) == 2


def test_a_run_does_not_depend_on_its_tracker(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    """Its weights have the same bits, and it goes on with another tracker as the same run."""
    plain = tiny_config(image_store, text_store, tmp_path / "plain", max_steps=3)
    train(plain)
    tracked = replace(plain, out=str(tmp_path / "tracked"), log_to="wandb", log_project="mine")
    train(tracked)
    assert same(weights(plain.out), weights(tracked.out))
    assert [step for _, step, _ in wandb_rows(tmp_path / "tracked", "mine")] == [2, 3]
    before = Path(plain.out, "run.json").read_bytes()
    train(replace(plain, log_to="wandb"))
    assert Path(plain.out, "run.json").read_bytes() == before


@pytest.mark.parametrize("broken", ["init", "sdk.wandb_run.Run.log"])
def test_a_tracker_that_fails_is_noted_once(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        print("much, for long")
        raise OSError("no room\nfor anything")

    monkeypatch.setattr(f"wandb.{broken}", fail)
    log(tmp_path, "wandb", 0, 5)
    shown = capsys.readouterr()
    assert shown.err.count("nothing more is logged to wandb, and training goes on: no room\n") == 1
    assert "much" not in shown.out + shown.err
    assert len(read_metrics(str(tmp_path))) == 6


def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dimefm.training.before_training.version", missing)
    require_startable(sample("i", "t", "o"))
    with pytest.raises(TrainingError, match=r'cannot be logged to wandb(.|\n)*pip install "dimefm\[wandb\]"'):
        require_startable(sample("i", "t", "o", log_to="wandb"))
