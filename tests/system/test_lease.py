"""The lease on a store at a URL: one writer at a time, who is named to the others; a silent one is taken over."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import s3fs
from click.testing import CliRunner
from fsspec.spec import AbstractFileSystem

from cache_schemas import ViewPlan
from dimefm.caching.add_views import stores_to_write
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.worker import Job, Worker
from dimefm.cli import cli
from dimefm.errors import StoreError
from dimefm.models.clip import Clip
from dimefm.store.commit import make_commit, write_commit
from dimefm.store.embedding_store import Store
from dimefm.system import lease, storage
from dimefm.system.lease import require_held, writes_under
from dimefm.system.lock import writing
from tests.processes import Command

pytest_plugins = ["tests.s3"]

BEAT, PATIENCE, LOOK = 0.2, 1.5, 0.05


def be_quick() -> None:
    """Seconds become tenths."""
    lease._BEAT, lease._PATIENCE, lease._LOOK = BEAT, PATIENCE, LOOK


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BEAT", BEAT), ("_PATIENCE", PATIENCE), ("_LOOK", LOOK)):
        monkeypatch.setattr(lease, name, value)


HOLD = f"""
import sys
from dimefm.errors import StoreError
from dimefm.system import lease
from dimefm.system.lock import writing
lease._BEAT, lease._PATIENCE, lease._LOOK = {BEAT}, {PATIENCE}, {LOOK}
try:
    with writing(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except StoreError as error:
    print("refused", flush=True)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts processes that hold the lease of a store until their input ends, or say that they were refused."""
    with ExitStack() as stack:

        def start(store: str) -> subprocess.Popen[str]:
            words = [sys.executable, "-c", HOLD, store]
            streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen(words, text=True, cwd=Path(__file__).parents[2], **streams)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def refused(store: str) -> str:
    with pytest.raises(StoreError, match="is being written by") as caught, writing(store):
        pass
    return str(caught.value)


@pytest.fixture(params=["s3", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store on S3, and on another kind of file system."""
    where = request.getfixturevalue("s3") if request.param == "s3" else f"memory://{tmp_path.name}"
    return f"{where}/s.zarr"


def test_a_second_writer_is_refused_and_told_who_the_first_is(url: str) -> None:
    with writing(url):
        message = refused(url)
        assert refused(url) == message, "the time of its start is not that of a renewal"
    assert re.search(f"^{url} is being written by process {os.getpid()} of .+ since 20.+\n  remedy: wait", message)
    assert not storage.exists(f"{url}/.lease")
    with writing(url):
        pass


def test_an_error_frees_the_store(url: str) -> None:
    with pytest.raises(ZeroDivisionError), writing(url):
        raise ZeroDivisionError
    assert not storage.exists(f"{url}/.lease")


@pytest.mark.parametrize("knows", [True, False])
def test_of_many_that_start_at_once_one_writes(s3: str, knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store knows no conditional write, one at a time all the same."""
    if not knows:

        def pipe_file(self: Any, path: str, data: bytes, **options: Any) -> None:
            if options:
                raise TypeError("got an unexpected keyword argument 'mode'")
            plain(self, path, data)

        plain = s3fs.S3FileSystem.pipe_file
        monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", pipe_file)
    inside, most, outcomes = 0, 0, list[str]()

    def write() -> None:
        nonlocal inside, most
        try:
            with writing(f"{s3}/s.zarr"):
                inside += 1
                most = max(most, inside)
                time.sleep(4 * BEAT)
                inside -= 1
            outcomes.append("held")
        except StoreError:
            outcomes.append("refused")

    threads = [threading.Thread(target=write) for _ in range(4 if knows else 1)]
    for thread in threads:
        thread.start()
    if not knows:
        while not inside:
            time.sleep(0.01)
        threads.append(threading.Thread(target=write))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(outcomes) == ["held", *["refused"] * (len(threads) - 1)]


def test_the_writer_may_be_another_process_and_its_death_frees_the_store(
    s3: str, holder: Callable[[str], subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{s3}/s.zarr"
    process = holder(store)
    assert said(process) == "held"
    assert f"is being written by process {process.pid} of " in refused(store)
    process.kill()
    process.wait()
    began = time.monotonic()
    with writing(store):
        assert time.monotonic() - began > PATIENCE
        assert said(holder(store)) == "refused"
    assert f"{store} has the lease of process {process.pid} of " in capsys.readouterr().err


def test_of_two_that_take_over_at_once_one_writes(s3: str, holder: Callable[[str], subprocess.Popen[str]]) -> None:
    store = f"{s3}/s.zarr"
    process = holder(store)
    assert said(process) == "held"
    process.kill()
    process.wait()
    assert sorted(said(process) for process in [holder(store), holder(store)]) == ["held", "refused"]


def test_a_writer_that_was_silent_for_too_long_commits_nothing_more(
    s3: str, image_tar: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3}/s.zarr"
    monkeypatch.setattr(lease, "_BEAT", 3600.0)
    block = writing(out)
    block.__enter__()
    store = open_or_plan(PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=32), out, clip.identity)
    encode_shard(store, 0, clip)
    facts = '{"process": 7, "user": "u", "host": "h", "since": "now", "command": "dimefm", "token": "t"}'
    storage.write_atomic(f"{out}/.lease", facts.encode())
    message = "is no longer this command's: it is being written by process 7 of u on h"
    for shard in (0, 1):  # a commit that is there is the other's by now
        with pytest.raises(StoreError, match=message):
            encode_shard(store, shard, clip)
    assert store.committed() == {0}
    with pytest.raises(StoreError, match=f"{message}.*\n  remedy: let one command alone write there"):
        block.__exit__(None, None, None)
    assert storage.exists(f"{out}/.lease"), "the other's"


def named(name: str) -> bytes:
    return f'{{"process": 7, "user": "{name}", "host": "h", "since": "now", "command": "dimefm"}}'.encode()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_PATIENCE", 0.05)
    monkeypatch.setattr(lease, "_LOOK", 0.01)


@pytest.mark.usefixtures("impatient")
def test_a_command_that_was_stopped_does_not_take_back_what_it_has_lost(url: str) -> None:
    """Its renewal may be under way for as long as it is stopped, and arrive after it was taken over from; so may the
    removal of its lease."""
    for name in ("a", "b", "c"):
        lease._acquire(url, named(name))  # each finds the one before silent
        for other in ("a", "b"):
            storage.write_atomic(f"{url}/.lease-beat-{lease._digest(named(other))}", b"9")
    assert lease._chain(url) == [named("a"), named("b"), named("c")]
    writes_under(url, lease._digest(named("a")))
    with pytest.raises(StoreError, match="is being written by process 7 of c on h"):
        require_held(url)
    lease._held.pop(url)
    lease._release(url, lease._digest(named("a")))
    assert lease._chain(url)[-1] == named("c")
    lease._release(url, lease._digest(named("c")))
    fs, inner = storage.filesystem(url)
    fs.invalidate_cache()
    assert not fs.exists(inner) or fs.ls(inner) == []


@pytest.mark.usefixtures("impatient")
def test_who_is_overtaken_while_it_takes_over_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease._acquire(url, named("silent"))
    create = storage.create

    def late(place: str, data: bytes) -> bool:
        if ".lease-after-" in place and data == named("late"):
            assert create(place, named("first"))
        return create(place, data)

    monkeypatch.setattr(storage, "create", late)
    with pytest.raises(StoreError, match="is being written by process 7 of first on h"):
        lease._acquire(url, named("late"))
    assert lease._chain(url)[-1] == named("first")


@pytest.mark.parametrize("wrong", [None, "ignores", "looks first"])
def test_a_storage_without_a_condition_is_named(
    s3: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if wrong:
        plain = s3fs.S3FileSystem._pipe_file

        async def pipe_file(self: Any, path: str, data: bytes, mode: str = "overwrite") -> None:
            await plain(self, path, data)

        monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", pipe_file)
    fs, _ = storage.filesystem(s3)
    if wrong == "looks first":
        monkeypatch.setattr(fs, "pipe_file", MethodType(AbstractFileSystem.pipe_file, fs))
    elif wrong:
        monkeypatch.setattr(fs, "pipe_file", MethodType(s3fs.core.sync_wrapper(pipe_file), fs))
    with writing(f"{s3}/s.zarr"):
        pass
    assert ("this storage writes a file that is there without a word" in capsys.readouterr().err) == bool(wrong)


def test_a_write_whose_answer_was_lost_counts_as_ours(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends it again, and is refused for what it has written itself."""
    fs, _ = storage.filesystem(s3)
    plain = fs.pipe_file

    def pipe_file(path: str, data: bytes, **options: Any) -> None:
        plain(path, data, **options)
        plain(path, data, **options)

    monkeypatch.setattr(fs, "pipe_file", pipe_file)
    assert storage.create(f"{s3}/x", b"mine")
    assert not storage.create(f"{s3}/x", b"another's")
    assert storage.read_bytes(f"{s3}/x") == b"mine"


def test_a_commit_does_not_replace_that_of_another_command(url: str) -> None:
    """As of a command that was stopped between its look at the lease and its commit."""
    status_N = np.zeros(4, np.uint8)
    commits = [make_commit(0, 0, status_N, (), digest=name, device="cpu", seconds=0.0) for name in ("a", "b")]
    write_commit(url, commits[0])
    with pytest.raises(StoreError, match=r"000000\.json has just been written by another command"):
        write_commit(url, commits[1])
    assert storage.read_json(f"{url}/commits/000000.json")["digest"] == "a"


def test_a_lease_that_is_gone_is_not_renewed(s3: str) -> None:
    store = f"{s3}/s.zarr"
    block = writing(store)
    block.__enter__()
    storage.remove_file(f"{store}/.lease")
    time.sleep(3 * BEAT)
    assert not storage.exists(f"{store}/.lease")
    with pytest.raises(StoreError, match="its lease was deleted"):
        block.__exit__(None, None, None)


def test_a_worker_writes_under_the_lease_of_its_command(s3: str, image_tar: Path, clip: Clip) -> None:
    out = f"{s3}/s.zarr"
    with writing(out) as token:
        store = open_or_plan(PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=48), out, clip.identity)
        job = Job(
            store=out, teacher="t", pretrained=None, precision=clip.identity.precision, device="cpu", threads=1,
            lease=token,
        )  # fmt: skip
        worker = Worker(job, clip)
        worker.start(1, 0)
        worker.encode(0)
        writes_under(out, "another's")  # as in a process of Ray's, whose command has lost it
        with pytest.raises(StoreError, match="is no longer this command's"):
            worker.encode(1)
        assert store.committed() == {0}
        writes_under(out, token)
    require_held(out)


def test_views_are_added_under_the_lease_of_their_store(s3: str, image_tar: Path, clip: Clip) -> None:
    out, plan = f"{s3}/s.zarr", ViewPlan(count=1, seed=0, crop_scale=(0.4, 1.0), flip=True)
    with writing(out) as token:
        request = PlanRequest(kind="image", arguments=(str(image_tar),), shard_rows=48, views=plan)
        store = open_or_plan(request, out, clip.identity)
        for shard in range(2):
            encode_shard(store, shard, clip)
        _, added = stores_to_write(store, replace(plan, count=2))
        job = Job(
            store=added.path, teacher="t", pretrained=None, precision=clip.identity.precision, device="cpu", threads=1,
            lease=token,
        )  # fmt: skip
        worker = Worker(job, clip)
        worker.start(1, 0)
        worker.encode(0)
        writes_under(out, "another's")
        with pytest.raises(StoreError, match="is no longer this command's"):
            worker.encode(1)
        assert added.committed() == {0}
        writes_under(out, token)
        worker.encode(1)
    found = Store(out)
    assert found.schema.views == replace(plan, count=2)
    assert found.embeddings(np.arange(96)).shape == (96, 2, 128)


def test_a_lease_tells_no_secrets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/dimefm", "cache-images", "https://user:secret@host/a.tar"])
    with writing(f"{s3}/s.zarr"):
        assert b"secret" not in storage.read_bytes(f"{s3}/s.zarr/.lease")


def test_a_refused_command_ends_with_one_message_and_writes_nothing(
    s3: str, image_tar: Path, teacher_name: str
) -> None:
    out = f"{s3}/s.zarr"
    with writing(out):
        words = ["cache-images", str(image_tar), "--teacher", teacher_name, "--out", out, "--device", "cpu"]
        result = CliRunner().invoke(cli, words)
        assert storage.tree(out) == set()
    assert result.exit_code == 1
    assert f"\nError: {out} is being written by process {os.getpid()} of " in result.output


@pytest.mark.slow
def test_workers_of_ray_write_under_the_lease(s3: str, image_tar: Path, teacher_name: str) -> None:
    out = f"{s3}/s.zarr"
    more = ["--teacher", teacher_name, "--shard-rows", "48", "--device", "cpu", "--workers", "2", "--out", out]
    assert "2 of 2 done" in Command(["cache-images", str(image_tar), *more], prepare=be_quick).finish()
    assert not storage.exists(f"{out}/.lease")
