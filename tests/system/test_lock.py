"""The lock on a store: one writer at a time, who is named to the others, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from dimefm.cli import cli
from dimefm.errors import StoreError
from dimefm.store.embedding_store import Store
from dimefm.system.lock import writing
from dimefm.system.lock_owner import show_owner
from tests.tiny_training import tiny_config

HOLD = """
import sys
from dimefm.errors import StoreError
from dimefm.system.lock import writing
try:
    with writing(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except StoreError as error:
    print("refused", flush=True)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts processes that hold the lock of a store, or say that they were refused."""
    with ExitStack() as stack:

        def start(store: Path) -> subprocess.Popen[str]:
            words = [sys.executable, "-c", HOLD, str(store)]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def refuse(store: Path) -> str:
    """The message with which the lock is refused."""
    with pytest.raises(StoreError, match="is being written by") as caught, writing(str(store)):
        pass
    return str(caught.value)


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    with writing(str(store)):
        message = refuse(store)
    owner = rf"process {os.getpid()} of \S+ on {re.escape(socket.gethostname())} since 20\d\d-\S+: \S+"
    assert re.search(f"^{store} is being written by {owner}", message)
    assert message.endswith("\n  remedy: wait until it has finished, or stop it")


def test_the_writer_may_be_another_process_and_its_death_frees_the_store(
    tmp_path: Path, holder: Callable[[Path], subprocess.Popen[str]]
) -> None:
    store = tmp_path / "s.zarr"
    process = holder(store)
    assert said(process) == "held"
    assert f"process {process.pid} of " in refuse(store)
    process.kill()
    process.wait()
    with writing(str(store)):
        pass


def test_of_many_that_start_at_once_one_writes(tmp_path: Path, holder: Callable[[Path], subprocess.Popen[str]]) -> None:
    processes = [holder(tmp_path / "s.zarr") for _ in range(4)]
    assert sorted(map(said, processes)) == ["held", "refused", "refused", "refused"]


def test_an_error_frees_the_store(tmp_path: Path) -> None:
    store = str(tmp_path / "s.zarr")
    with pytest.raises(ZeroDivisionError), writing(store):
        raise ZeroDivisionError
    with writing(store):
        pass


def test_an_owner_that_has_not_yet_said_who_it_is(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another process" in refuse(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_lock_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", cannot)
    with writing(str(tmp_path / "s.zarr")):
        (tmp_path / "s.zarr" / "file").touch()
    assert (tmp_path / "s.zarr" / "file").exists()


def test_nothing_of_the_lock_stays_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with writing(str(tmp_path)):
        assert (tmp_path / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_lock_tells_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/dimefm", "cache-images", "https://user:secret@host/a.tar"])
    with writing(str(tmp_path)):
        assert "secret" not in (tmp_path / ".lock").read_text()
        assert refuse(tmp_path).split("\n")[0].endswith(": dimefm")


def test_what_a_lock_says_is_inert_on_a_terminal() -> None:
    facts = {"process": 1, "user": "u", "host": "h\033]0;x\a", "since": "now", "command": "a\nb"}
    assert show_owner(json.dumps(facts).encode()) == "process 1 of u on h?]0;x? since now: a?b"


@pytest.mark.parametrize("kind", ["link", "link to nothing", "second name", "pipe"])
def test_a_lock_that_is_not_ours_is_neither_followed_nor_overwritten(tmp_path: Path, kind: str) -> None:
    store, other = tmp_path / "s.zarr", tmp_path / "thesis.tex"
    store.mkdir()
    if kind != "link to nothing":
        other.write_text("all of it")
    if kind.startswith("link"):
        (store / ".lock").symlink_to(other)
    elif kind == "second name":
        (store / ".lock").hardlink_to(other)
    else:
        os.mkfifo(store / ".lock")
    with (
        pytest.raises(StoreError, match=r"s\.zarr/\.lock is a link, or no plain file\n  remedy: "),
        writing(str(store)),
    ):
        pass
    assert [path.name for path in store.iterdir()] == [".lock"]
    assert not other.exists() if kind == "link to nothing" else other.read_text() == "all of it"


def test_a_refused_command_ends_with_one_message_and_writes_nothing(
    image_store: Store, image_tar: Path, teacher_name: str, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(image_store.path, tmp_path / "s.zarr"))
    with writing(str(store)):
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        words = ["cache-images", str(image_tar), "--teacher", teacher_name, "--out", str(store), "--device", "cpu"]
        result = CliRunner().invoke(cli, words)
        assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    assert result.exit_code == 1
    assert f"Error: {store} is being written by process {os.getpid()} of " in result.output


def test_repair_is_writing(image_store: Store, tmp_path: Path) -> None:
    store = Path(shutil.copytree(image_store.path, tmp_path / "s.zarr"))
    (store / "embedding" / "c" / "0" / "0").unlink()
    with writing(str(store)):
        result = CliRunner().invoke(cli, ["verify", str(store), "--repair"])
    assert result.exit_code == 1
    assert "is being written by" in result.output
    assert (store / "commits" / "000000.json").exists()


@pytest.mark.parametrize("words", [["info"], ["info", "--failures"], ["verify"]])
def test_who_only_reads_needs_no_lock(image_store: Store, tmp_path: Path, words: list[str]) -> None:
    store = shutil.copytree(image_store.path, tmp_path / "s.zarr")
    with writing(str(store)):
        result = CliRunner().invoke(cli, [words[0], str(store), *words[1:]])
    assert result.exit_code == 0, result.output


def test_the_trainer_needs_no_lock(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    from dimefm.training.train import train

    images = Store(str(shutil.copytree(image_store.path, tmp_path / "images.zarr")))
    texts = Store(str(shutil.copytree(text_store.path, tmp_path / "texts.zarr")))
    with writing(images.path), writing(texts.path):
        assert train(tiny_config(images, texts, tmp_path / "run", max_steps=1)).steps == 1


@pytest.mark.parametrize("name", ["plan.json", "shard.json"])
def test_what_a_failed_start_made_goes_unless_it_is_of_use(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "s"

    def start() -> None:
        with writing(str(folder), of_use=lambda files: "a/shard.json" in files):
            (folder / "a").mkdir()
            (folder / "a" / name).write_text("{}")
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert (tmp_path / "new").exists() == (name == "shard.json")


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(KeyError), writing(str(tmp_path), of_use=lambda files: False):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
