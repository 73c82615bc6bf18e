"""A source of the user's own: it keeps the contract, and is cached from Python without a change to dimefm."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cache_schemas import Status
from cache_schemas.plan import SourceFile
from dimefm.errors import MismatchError
from dimefm.sources import base
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, Source, TextSample
from dimefm.sources.files import stat_files
from pipeline.cache import CacheConfig, cache, dry_run
from tests.contracts.source_contract import ImageSourceContract, accounted
from tests.making import make_jpeg

WIDTH = 8  # digits of the length before each image of a pack


class Packs:
    """Files in which images follow each other, each after its length in eight digits."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._files = stat_files(list(paths))

    def files(self) -> list[SourceFile]:
        return self._files

    def samples(self, account: Account) -> Iterator[ImageSample]:
        for file in self._files:
            data, place, number = Path(file.path).read_bytes(), 0, 0
            name = Path(file.path).stem
            while place < len(data):
                start, size = place + WIDTH, int(data[place : place + WIDTH])
                if size:
                    yield ImageSample(f"{name}/{number}", file.path, start, size)
                else:
                    account.skip("empty entries of packs", f"{file.path}, byte {place}")
                place, number = start + size, number + 1


def write_pack(path: Path, images: Sequence[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(b"%08d" % len(image) + image for image in images))
    return path


class TestPacks(ImageSourceContract):
    def images(self) -> dict[str, bytes]:
        return {f"猫/{number}": image for number, image in enumerate(super().images().values())}

    def make(self, folder: Path) -> Packs:
        return Packs([str(write_pack(folder / "猫.pack", list(self.images().values())))])


def config(out: Path, teacher: str, source: Any, **changes: Any) -> CacheConfig:
    words = {"kind": "image", "sources": (source,), "device": "cpu", "workers": 1, "threads": 1, **changes}
    return CacheConfig(out=str(out), teacher=teacher, **words)


@pytest.mark.parametrize("accept_missing", [False, True])
def test_it_is_cached_resumed_and_compared(tmp_path: Path, teacher_name: str, accept_missing: bool) -> None:
    images = list(TestPacks().images().values())
    pack = write_pack(tmp_path / "a.pack", [*images, b"", b"no image"])

    def wanted() -> CacheConfig:
        return config(tmp_path / "a.zarr", teacher_name, Packs([str(pack)]), accept_missing=accept_missing)

    assert re.search(r"rows +6 from 1 file,", dry_run(wanted()))
    store = cache(wanted())
    assert store.status().tolist() == [Status.OK] * 5 + [Status.UNDECODABLE]
    assert [one.reason for one in store.schema.source.skipped] == ["empty entries of packs"]
    assert cache(wanted()).path == store.path
    write_pack(pack, images)
    with pytest.raises(MismatchError, match="has changed since it was planned"):
        cache(wanted())


def test_the_example_of_the_protocol_runs(tmp_path: Path) -> None:
    """The class in the docstring of Source, as it stands there."""
    _, _, rest = inspect.getdoc(Source).partition("::\n\n")
    example = textwrap.dedent(rest[: rest.index("\n\nIt is handed in")])
    images = [tmp_path / name for name in ("b.jpg", "a.jpg", "c.png")]
    for image in images:
        image.write_bytes(make_jpeg())
    (tmp_path / "list.txt").write_text("".join(f"{image}\n" for image in images))
    names: dict[str, Any] = {**vars(base), "Path": Path, "stat_files": stat_files}
    exec(example, names)
    samples, account = accounted(names["ListedImages"](str(tmp_path / "list.txt")))
    assert samples == [ImageSample(image.stem, str(image), 0, image.stat().st_size) for image in images[:2]]
    assert [(one.reason, one.count) for one in account.skipped()] == [("files that are not JPEGs", 1)]


class Greetings:
    """Sentences that are in no file."""

    def files(self) -> list[SourceFile]:
        return []

    def samples(self, account: Account) -> Iterator[TextSample]:
        yield TextSample("1", "Good morning.")
        yield TextSample("2", "Good night.")


def test_sentences_need_no_file(tmp_path: Path, teacher_name: str) -> None:
    store = cache(config(tmp_path / "t.zarr", teacher_name, Greetings(), kind="text"))
    assert store.schema.rows == 2
