"""A mount that goes away, a token that runs out: at any read of planning, encoding, retrying and evaluating the command
fails, and run again it leaves what it would have left undisturbed. A row is never given up for it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from dimefm.caching.canary import check_canary
from dimefm.caching.encode_shard import encode_shard, retry_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.caching.same_command import require_no_stranger
from dimefm.caching.sentences import SentenceRules, tidy
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import DimefmError, SourceError
from dimefm.evaluation.features import compute_features
from dimefm.models.clip import Clip
from dimefm.sources.account import Account
from dimefm.sources.base import TextSample
from dimefm.sources.files import expand
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.text_sources import open_text_source
from dimefm.store.embedding_store import Store
from dimefm.store.output_folder import is_planned
from dimefm.system import storage
from tests.contracts.source_contract import listed
from tests.making import make_jpeg, write_parquet, write_tar, write_text, write_tsv
from tests.stores import teacher_identity

FAST = ["folder", "tar", "token parquet"]
SLOW = ["parquet", "tsv", "links", "token tar", "token tsv", "token folder"]
COUNT, BROKEN = 12, 5
IMAGES = {f"{i:02d}": bytes(700) if i == BROKEN else make_jpeg(seed=i) for i in range(COUNT)}


def slow(*kinds: str) -> list[Any]:
    """Kinds that are tried among all tests alone."""
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def write_source(kind: str, folder: Path) -> None:
    """Twelve images, one of them none, in two files or folders of a kind."""
    items = list(IMAGES.items())
    for number, part in enumerate((dict(items[:7]), dict(items[7:]))):
        if kind == "tar":
            write_tar(folder / f"{number}.tar", {f"{key}.jpg": data for key, data in part.items()})
        elif kind == "parquet":
            write_parquet(folder / f"{number}.parquet", [{"key": k, "image": v} for k, v in part.items()])
        elif kind == "tsv":
            write_tsv(folder / f"{number}.tsv", part)
        else:
            place = folder / str(number)
            place.mkdir(parents=True)
            for key, data in part.items():
                file = place / f"{key}.jpg"
                if kind == "links":
                    (folder / ".far").mkdir(exist_ok=True)
                    file.symlink_to(folder / ".far" / key)
                    file = folder / ".far" / key
                file.write_bytes(data)


class Mount:
    """A folder that goes away at the n-th look at anything in it, for ever or for some looks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.aside = folder, folder.with_name(f"{folder.name}.aside")
        self.looks, self.first, self.last, self.lock = 0, -1, 1 << 30, threading.RLock()

    def seen(self, path: object) -> None:
        if str(path).startswith(str(self.folder)):
            with self.lock:
                self.looks += 1
                if self.looks == self.first:
                    self.folder.rename(self.aside)
                if self.looks == self.last:
                    self.back()

    def back(self) -> None:
        self.first, self.last = -1, 1 << 30
        if self.aside.exists():
            self.aside.rename(self.folder)

    @contextmanager
    def gone(self, first: int, last: int = 1 << 30) -> Iterator[None]:
        self.looks, self.first, self.last = 0, first, last
        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((os, "stat"), (os, "listdir"), (os, "scandir"), (io, "open"), (builtins, "open")):
                patch.setattr(module, name, self._watched(getattr(module, name)))
            yield
        self.back()

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*words: Any, **options: Any) -> Any:
            if words:
                self.seen(words[0])
            return call(*words, **options)

        return watched


class TokenFileSystem(AbstractFileSystem):
    """Local files at token://, which are refused from the n-th request on. All that fsspec's base class can be left to
    is left to it."""

    protocol = "token"
    cachable = False
    requests, first, last, lock = 0, -1, 1 << 30, threading.Lock()
    error: OSError = PermissionError("The provided token has expired.")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("token://").strip("/")

    @classmethod
    @contextmanager
    def gone(cls, first: int, last: int = 1 << 30, error: OSError | None = None) -> Iterator[None]:
        cls.requests, cls.first, cls.last, cls.error = 0, first, last, error or TokenFileSystem.error
        yield
        cls.first = -1

    def _ask(self) -> None:
        with TokenFileSystem.lock:
            TokenFileSystem.requests += 1
        if 0 <= self.first <= self.requests < self.last:
            raise self.error

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._ask()
        place = Path(self._strip_protocol(path))
        found = [self._info(one) for one in place.iterdir()] if place.is_dir() else [self._info(place)]
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._ask()
        return self._info(Path(self._strip_protocol(path)))

    def _info(self, path: Path) -> dict[str, Any]:
        status = path.stat()
        kind = "directory" if path.is_dir() else "file"
        return {"name": str(path), "type": kind, "size": status.st_size, "mtime": status.st_mtime}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._ask()
        return Path(self._strip_protocol(path)).read_bytes()[start:end]


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("token", TokenFileSystem, clobber=True)
    monkeypatch.setenv("DIMEFM_ALLOW_SCHEMES", "token")
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0,))


def request_of(place: str, **changes: Any) -> PlanRequest:
    return PlanRequest(kind="image", arguments=(place,), **{"shard_rows": 4, "batch_size": 2, **changes})


def cache(request: PlanRequest, out: Path, clip: Clip, *, retry: bool = False, accept_missing: bool = False) -> Store:
    """What cache-images does with one worker, with two of its threads."""
    store = open_or_plan(request, str(out), clip.identity, accept_missing=accept_missing)
    if store.committed():
        check_canary(store, clip, accept_missing=accept_missing)
    for shard in sorted(set(range(store.schema.shards)) - store.committed()):
        encode_shard(store, shard, clip, threads=2, accept_missing=accept_missing)
    for commit in list(store.commits()) if retry else []:
        if commit.failures:
            retry_shard(store, commit.shard, clip, threads=2, accept_missing=accept_missing)
    return Store(store.path)


def contents(store: Path) -> dict[str, bytes]:
    """Every file but commits, which say when they were made."""
    names = storage.tree(str(store))
    return {name: (store / name).read_bytes() for name in names if not name.startswith("commits/")}


def failures(store: Store) -> list[tuple[int, str, str]]:
    return [(f.row, f.status, f.reason) for commit in store.commits() for f in commit.failures]


def moments(looks: int) -> list[int]:
    """Some of the looks, the first and the last with them."""
    return sorted({1, looks // 4, looks // 2, 2 * looks // 3, looks - 2} & set(range(1, looks + 1)))


def disturbed(gone: Callable[..., Any], moment: int, last: int, work: Callable[[], Any]) -> bool:
    """Whether the work failed, with an error that says what to do, or else one of the system that names a file."""
    found: Exception | None = None
    with gone(moment, last):
        try:
            work()
        except (DimefmError, OSError) as error:
            found = error
    assert found is None or "remedy" in str(found) or getattr(found, "filename", None)
    return found is not None


@pytest.mark.parametrize("accept_missing", [False, True])
@pytest.mark.parametrize("kind", FAST + slow(*SLOW))
def test_a_store_is_right_or_the_command_fails(tmp_path: Path, clip: Clip, kind: str, accept_missing: bool) -> None:
    source, undisturbed = tmp_path / "in" / "source", tmp_path / "undisturbed.zarr"
    write_source(kind.removeprefix("token "), source)
    token, mount = kind.startswith("token"), Mount(source)
    request, gone = (
        request_of(f"token://{source}" if token else str(source)),
        TokenFileSystem.gone if token else mount.gone,
    )
    with gone(-1):
        whole = cache(request, undisturbed, clip)
    looks, failed = TokenFileSystem.requests if token else mount.looks, 0
    assert [row for row, _, _ in failures(whole)] == [BROKEN]
    for moment in moments(looks):
        for length in (1 << 30, 1):  # for good, or for a moment
            out = tmp_path / f"{moment}-{length}.zarr"
            words = {"accept_missing": accept_missing}
            failed += disturbed(gone, moment, moment + length, lambda o=out, w=words: cache(request, o, clip, **w))
            store = cache(request, out, clip, **words)
            assert contents(out) == contents(undisturbed), f"at {moment} of {looks}"
            assert failures(store) == failures(whole)
    assert failed > len(moments(looks)) // 2


@pytest.mark.parametrize("accept_missing", [False, True])
@pytest.mark.parametrize("kind", ["folder", "token folder"])
def test_a_retry_is_right_or_fails(tmp_path: Path, clip: Clip, kind: str, accept_missing: bool) -> None:
    source, begun = tmp_path / "in" / "source", tmp_path / "begun.zarr"
    write_source("folder", source)
    token, mount = kind.startswith("token"), Mount(source)
    request, gone = (
        request_of(f"token://{source}" if token else str(source)),
        TokenFileSystem.gone if token else mount.gone,
    )
    open_or_plan(request, str(begun), clip.identity)
    lost = [source / "0/02.jpg", source / "0/06.jpg", source / "1/07.jpg"]
    for file in lost:
        file.rename(source.parent / file.name)
    assert [row for row, _, _ in failures(cache(request, begun, clip, accept_missing=True))] == [2, BROKEN, 6, 7]
    for file in lost:
        (source.parent / file.name).rename(file)
    undisturbed = Path(shutil.copytree(begun, tmp_path / "undisturbed.zarr"))
    with gone(-1):
        whole = cache(request, undisturbed, clip, retry=True)
    assert [row for row, _, _ in failures(whole)] == [BROKEN]
    looks = TokenFileSystem.requests if token else mount.looks
    for moment in moments(looks):
        for length in (1 << 30, 1):
            out = Path(shutil.copytree(begun, tmp_path / f"{moment}-{length}.zarr"))
            words: dict[str, Any] = {"retry": True, "accept_missing": accept_missing}
            disturbed(gone, moment, moment + length, lambda o=out, w=words: cache(request, o, clip, **w))
            store = cache(request, out, clip, **words)
            assert contents(out) == contents(undisturbed), f"at {moment} of {looks}"
            assert failures(store) == failures(whole)


@pytest.mark.parametrize("kind", ["token tars", *slow("folders", "tars")])
def test_features_of_a_set_are_right_or_the_evaluation_fails(tmp_path: Path, clip: Clip, kind: str) -> None:
    folder = tmp_path / "in" / "set"
    write_text(folder / "classnames.txt", ["cat", "dog"])
    write_text(folder / "templates.txt", ["a {c}."])
    for number, name in enumerate(("cat", "dog")):
        part = list(IMAGES.items())[6 * number : 6 * number + 6]
        if kind == "folders":
            (folder / name).mkdir()
            for key, data in part:
                (folder / name / f"{key}.jpg").write_bytes(data)
        else:
            members = {f"{key}.{end}": value for key, data in part for end, value in (("jpg", data), ("cls", b"1"))}
            write_tar(folder / f"{number}.tar", members)
    token, mount = kind.startswith("token"), Mount(folder)
    place, gone = f"token://{folder}" if token else str(folder), TokenFileSystem.gone if token else mount.gone

    def evaluated(out: Path) -> Any:
        return compute_features(clip, open_folder(place), str(out), threads=2, batch_size=4)

    with gone(-1):
        whole = evaluated(tmp_path / "undisturbed.zarr")
    looks = TokenFileSystem.requests if token else mount.looks
    assert [failure.row for failure in whole.failures()] == [BROKEN]
    for moment in moments(looks):
        for length in (1 << 30, 1):
            out = tmp_path / f"{moment}-{length}.zarr"
            disturbed(gone, moment, moment + length, lambda o=out: evaluated(o))
            again = evaluated(out)
            np.testing.assert_array_equal(again.all(), whole.all())
            assert [failure.row for failure in again.failures()] == [BROKEN]


@pytest.mark.parametrize("kind", ["txt", "parquet", *slow("txt.gz", "jsonl", "tsv", "prompts")])
@pytest.mark.parametrize("token", [False, True])
def test_a_plan_of_sentences_is_right_or_fails(tmp_path: Path, kind: str, token: bool) -> None:
    folder = tmp_path / "in" / "texts"
    for number in range(2):
        sentences = [f"sentence {number}-{i}" for i in range(5)]
        if kind == "parquet":
            write_parquet(folder / f"{number}.parquet", [{"text": text} for text in sentences])
        elif kind == "prompts":
            write_text(folder / "classnames.txt", sentences)
            write_text(folder / "templates.txt", ["a {c}."])
        else:
            lines = {"jsonl": [f'{{"text": "{text}"}}' for text in sentences], "tsv": ["text", *sentences]}
            write_text(folder / f"{number}.{kind}", lines.get(kind, sentences))
    mount = Mount(folder)
    place, gone = f"token://{folder}" if token else str(folder), TokenFileSystem.gone if token else mount.gone
    request = PlanRequest(kind="text", arguments=(place,), shard_rows=4)

    def planned(out: Path) -> Store:
        return open_or_plan(request, str(out), teacher_identity())

    with gone(-1):
        planned(tmp_path / "undisturbed.zarr")
    looks = TokenFileSystem.requests if token else mount.looks
    for moment in range(1, looks + 1):
        out = tmp_path / f"{moment}.zarr"
        disturbed(gone, moment, 1 << 30, lambda o=out: planned(o))
        planned(out)
        assert contents(out) == contents(tmp_path / "undisturbed.zarr"), f"at {moment} of {looks}"


def test_sentences_that_change_between_the_two_readings_end_the_planning() -> None:
    class Shrinking:
        readings = 0

        def samples(self, report: Callable[[str], None]) -> Iterator[TextSample]:
            self.readings += 1
            yield from (TextSample(str(i), str(i)) for i in range(5 - self.readings))

    with pytest.raises(SourceError, match="have changed while they were read: there are no longer 4"):
        list(tidy(Shrinking(), SentenceRules(), Account()))


# -- what may not be taken for nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    PermissionError("expired"), OSError(errno.ESTALE, "Stale file handle"), TimeoutError("no answer"), KeyError("odd"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_not_taken_for_nothing(tmp_path: Path, error: Exception) -> None:
    """A commit or a store that is taken for absent would be written over."""
    (tmp_path / "store" / "commits").mkdir(parents=True)
    (tmp_path / "store" / "commits" / "0.json").write_text("{}")
    url = f"token://{tmp_path}/store"
    calls: list[Callable[[str], Any]] = [storage.exists, storage.listing, storage.tree, storage.remove_folder]
    calls += [storage.read_bytes, storage.remove_file, is_planned, require_no_stranger, lambda u: expand(f"{u}/*")]
    for call in calls:
        with TokenFileSystem.gone(1, error=error), pytest.raises((OSError, SourceError)) as caught:
            call(url)
        assert str(tmp_path) in str(caught.value)
    assert storage.exists(f"{url}/commits/0.json")
    assert storage.listing(url) == ["commits"]
    assert storage.tree(url) == {"commits/0.json"}
    assert storage.listing(f"{url}/no") == []
    assert storage.tree(f"{url}/no") == set()
    assert not storage.exists(f"{url}/no")


def test_what_is_refused_on_a_disk_is_not_taken_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.jpg").write_bytes(b"0")
    (tmp_path / "in" / "lost+found").mkdir()
    refused, really = {"b", "lost+found"}, {name: getattr(os, name) for name in ("stat", "scandir")}

    def refusing(name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *words: Any, **options: Any) -> Any:
            if Path(str(path)).name in refused:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return really[name](path, *words, **options)

        return call

    for name in really:
        monkeypatch.setattr(os, name, refusing(name))
    folder = str(tmp_path / "in")
    for call in (storage.exists, storage.listing):
        with pytest.raises(PermissionError):
            call(f"{folder}/b")
    with pytest.raises(PermissionError):
        storage.tree(folder)
    for argument in (folder, f"{folder}/*/*.jpg", f"{folder}/**/*.jpg"):
        with pytest.raises(SourceError, match=r"cannot be read: .*Permission denied"):
            open_image_source([argument])
    refused.remove("b")
    for argument in (folder, f"{folder}/*/*.jpg", f"{folder}/**/*.jpg"):
        assert [place.path for place in expand(argument)] or argument == folder


PATTERNS = ["*", "*/*", "*/*.tar", "a*/x.tar", "?/x.ta[rs]", "**/*.tar", "a/**/x.tar", "*/b/*.tar", "a", "[!a]*", "**"]


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_match_what_fsspec_matches(tmp_path: Path, pattern: str, token: bool) -> None:
    for name in ("a/x.tar", "a/b/x.tar", "b/x.tar", "b/x.tas", "c.tar", "ab/x.tar", "ab/b/y.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    expected = {str(path).rstrip("/") for path in fsspec.filesystem("file").glob(f"{tmp_path}/{pattern}")}
    if pattern == "**":  # all of the files, so that no folder is gone through again
        expected = {path for path in expected if not Path(path).is_dir()}
    found = expand(f"{'token://' if token else ''}{tmp_path}/{pattern}")
    assert {place.path.replace("token://", "") for place in found} == expected - {str(tmp_path)}
    assert [place.path for place in found] == sorted(place.path for place in found)


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "tsv", "parquet"])
def test_sentences_of_a_file_that_is_refused_end_the_planning(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        if kind == "parquet":
            write_parquet(tmp_path / f"{number}.parquet", [{"text": "a"}])
        else:
            write_text(tmp_path / f"{number}.{kind}", {"jsonl": ['{"text": "a"}']}.get(kind, ["text", "a"]))
    really = TokenFileSystem.cat_file

    def refusing(self: TokenFileSystem, path: str, *words: Any, **options: Any) -> bytes:
        if f"/1.{kind}" in path:
            raise PermissionError("expired")
        return really(self, path, *words, **options)

    monkeypatch.setattr(TokenFileSystem, "cat_file", refusing)
    with pytest.raises(SourceError, match=rf"1\.{kind} cannot be read: expired\n  remedy: .*credentials"):
        listed(open_text_source([f"token://{tmp_path}"]))
