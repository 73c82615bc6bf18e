"""Ctrl-C and SIGTERM in the commands, each held by a gate at a known moment: one message, the exit code of the signal,
nothing left of what never began, and the same command goes on.

A signal comes to the command alone, as from `kill`, or to all of its processes, as from a terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.models.clip import Clip
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from dimefm.system.lock import writing
from dimefm.training.train import train
from tests.e2e.test_kill import data_files, make_folder
from tests.processes import Command, Gate, processes
from tests.tiny_training import tiny_config
from tests.training.test_trainer_faults import children

CTRL_C, TERM = signal.SIGINT, signal.SIGTERM
NOTHING = "nothing was finished; the same command begins again"


class Given:
    """Finished inputs of all commands, and where one writes."""

    def __init__(self, out: Path, images: Store, texts: Store, teacher: str, labelled: str, made: Path) -> None:
        self.images, self.texts, self.teacher, self.labelled = images.path, texts.path, teacher, labelled
        self.out, self.pairs, self.run, self.folder = str(out), f"{made}/pairs", f"{made}/run", f"{made}/folder"
        self.sentences = str(texts.schema.source.arguments[0])


@pytest.fixture(scope="module")
def made(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What later commands need of earlier ones."""
    folder = tmp_path_factory.mktemp("made")
    retrieve(image_store.path, text_store.path, top_k=3, out=f"{folder}/pairs")
    train(tiny_config(image_store, text_store, folder / "run", max_steps=1))
    export_embeddings(image_store.path, f"{folder}/folder")
    return folder


@pytest.fixture
def given(image_store: Store, text_store: Store, teacher_name: str, cifar10: str, made: Path, tmp_path: Path) -> Given:
    return Given(tmp_path / "new" / "out", image_store, text_store, teacher_name, cifar10, made)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def stopped(words: list[str], gate: Gate, number: signal.Signals, *, at: str, everybody: bool = True) -> str:
    """What a command shows that gets a signal where it is held."""
    gate.close(at=at)
    command = Command(words, gate, apart=True)
    command.wait_until(gate.waiting)
    (command.send_to_all if everybody else command.send)(number)
    gate.open()  # for its threads, which get no signal
    shown = command.finish(128 + number, seconds=60)
    assert "Traceback" not in shown
    return shown


LOOKING: dict[str, tuple[str, Callable[[Given], list[str]]]] = {
    "info": ("open */zarr.json", lambda g: ["info", g.images]),
    "verify": ("open */commits/000001.json", lambda g: ["verify", g.images]),
    "search": ("open */zarr.json", lambda g: ["search", g.texts, "--text", "a dog"]),
}
"""By command: where it is held, and its words."""

WRITING: dict[str, tuple[str, Callable[[Given], list[str]], str]] = {
    "cache-texts": (
        "os.rename */rows/000000.parquet", lambda g: ["cache-texts", g.sentences, "--teacher", g.teacher], "",
    ),
    "import-embeddings": (
        "os.rename */commits/000000.json",
        lambda g: ["import-embeddings", g.folder, "--kind", "image", "--teacher", g.teacher],
        "what was finished is kept",
    ),
    "build-index": ("os.rename */build/part-*.json", lambda g: ["build-index", g.texts], "what was finished is kept"),
    "retrieve": (
        "os.rename */commits/000001.json", lambda g: ["retrieve", g.images, "--texts", g.texts],
        "1 of 3 shards are kept",
    ),
    "select-texts": ("os.rename */rows*", lambda g: ["select-texts", g.pairs], ""),
    "evaluate": (
        "os.rename */features/*/commits/*.json",
        lambda g: ["evaluate", f"local-dir:{g.teacher.removeprefix('local-dir:')}", g.labelled, "--device", "cpu"], "",
    ),
    "export": ("open */new/.out.*", lambda g: ["export", g.run], ""),
    "export-embeddings": ("open */new/.out.*", lambda g: ["export-embeddings", g.images], ""),
}  # fmt: skip
"""By command: where it is held, its words without --out, and what is kept at that moment."""


@pytest.mark.parametrize("name", LOOKING)
def test_a_command_that_only_looks(name: str, given: Given, gate: Gate) -> None:
    at, words = LOOKING[name]
    assert stopped(words(given), gate, CTRL_C, at=at) == "Stopped by Ctrl-C\n"


@pytest.mark.parametrize("name", WRITING)
def test_a_command_that_writes(name: str, given: Given, gate: Gate) -> None:
    """With Ctrl-C in a terminal and with SIGTERM to the process in turn."""
    at, words, kept = WRITING[name]
    number = (CTRL_C, TERM)[list(WRITING).index(name) % 2]
    shown = stopped([*words(given), "--out", given.out], gate, number, at=at, everybody=number == CTRL_C)
    how = "Ctrl-C" if number == CTRL_C else "SIGTERM"
    what = f"{kept} in {given.out}; the same command goes on" if kept else NOTHING
    assert shown.splitlines()[-1] == f"Stopped by {how}: {what}"
    assert sum("Stopped" in line for line in shown.splitlines()) == 1
    if kept:
        with writing(given.out):
            assert not list(Path(given.out).rglob("*.unfinished"))
    else:
        assert not Path(given.out).parent.exists()


def test_pairs_of_which_no_shard_was_finished(given: Given, gate: Gate) -> None:
    words = ["retrieve", given.images, "--texts", given.texts, "--out", given.out]
    shown = stopped(words, gate, CTRL_C, at="os.rename */commits/000000.json")
    assert shown.endswith(f"Stopped by Ctrl-C: {NOTHING}\n")
    assert not Path(given.out).parent.exists()


@pytest.mark.parametrize("everybody", [True, False], ids=["all", "alone"])
@pytest.mark.parametrize("number", [CTRL_C, TERM])
def test_a_cache_goes_on_to_the_same_bytes(
    number: signal.Signals, everybody: bool, clip: Clip, teacher_name: str, gate: Gate, tmp_path: Path
) -> None:
    folder, out = make_folder(tmp_path, clip, shards=2), tmp_path / "s.zarr"
    words = folder.words(out, teacher_name)
    shown = stopped(words, gate, number, at=folder.reading(1), everybody=everybody)
    assert shown.endswith(f": 1 of 2 shards are kept in {out}; the same command goes on\n")
    assert not (out / ".running").exists()
    if everybody:
        Command(words).finish()
        assert data_files(out) == data_files(folder.undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [True, False], ids=["all", "alone"])
@pytest.mark.parametrize("number", [CTRL_C, TERM])
def test_a_cache_on_ray(
    number: signal.Signals, everybody: bool, clip: Clip, teacher_name: str, gate: Gate, tmp_path: Path
) -> None:
    folder, out = make_folder(tmp_path, clip, shards=4), tmp_path / "s.zarr"
    words = folder.words(out, teacher_name, workers=2)
    gate.close(at=folder.reading(3))
    command = Command(words, gate, apart=True)
    command.wait_until(lambda: gate.waiting() and len(Store(str(out)).committed()) == 3)
    (command.send_to_all if everybody else command.send)(number)
    shown = command.finish(128 + number)
    assert shown.endswith(f": 3 of 4 shards are kept in {out}; the same command goes on\n")
    assert "Traceback" not in shown
    assert not processes("ray::")
    gate.open()
    Command(words).finish()
    assert data_files(out) == data_files(folder.undisturbed)


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file of another"])
def test_training_that_never_begins_leaves_what_was_there(
    there: str, tiny_run: list[str], gate: Gate, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "new"
    if there != "nothing":
        out.mkdir(parents=True)
    if there == "a file of another":
        (out / ".note").write_text("mine")
    words = [*tiny_run, "--out", str(out), "--workers", "2"]
    gate.close(at="open */metrics.jsonl")
    command = Command(words, gate, apart=True)
    command.wait_until(gate.waiting)
    assert (out / "run.json").exists()
    loaders = children(command.pid)
    assert len(loaders) >= 2
    command.send_to_all(CTRL_C)
    gate.open()
    shown = command.finish(128 + CTRL_C)
    assert "Traceback" not in shown
    if there == "a file of another":
        assert (out / ".note").read_text() == "mine"
    else:
        assert shown.endswith(NOTHING + "\n")
        assert not (tmp_path / "runs").exists() if there == "nothing" else not any(out.iterdir())
    for loader in loaders:
        with pytest.raises(ProcessLookupError):
            os.kill(loader, 0)


def test_a_second_ctrl_c_ends_the_clean_up(tiny_run: list[str], gate: Gate, tmp_path: Path) -> None:
    gate.close(at="os.rename */run.json")
    command = Command([*tiny_run, "--out", str(tmp_path / "run")], gate)
    command.wait_until(gate.waiting)
    gate.close(at="os.remove */.lock")
    command.send(CTRL_C)
    command.wait_until(gate.waiting)
    command.send(TERM)
    assert command.finish(128 + CTRL_C).endswith(f"\nStopped by Ctrl-C: {NOTHING}\n")
    gate.open()
    with writing(str(tmp_path / "run")):
        pass


@pytest.mark.parametrize("at", ["open */click/*.pyc", "open */torch/__pycache__/__init__*.pyc"])
def test_while_libraries_are_imported(at: str, teacher_name: str, cifar10: str, gate: Gate, tmp_path: Path) -> None:
    words = ["evaluate", teacher_name, cifar10, "--out", str(tmp_path / "out")]
    gate.close(at=at)
    environment = {**os.environ, **gate.environment}
    environment["PYTHONPATH"] += os.pathsep + os.getcwd()  # noqa: PTH109
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "dimefm", *words], stdout=log, stderr=log, env=environment)
    while not gate.waiting():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.send_signal(TERM)
    assert process.wait(60) == 128 + TERM
    shown = (tmp_path / "log").read_text()
    assert shown.splitlines()[-1].startswith("Stopped by SIGTERM")
    assert "Traceback" not in shown
