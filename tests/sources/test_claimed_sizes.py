"""Sizes that a file claims and does not have: no memory is taken for them, and what they stand in is named."""

import gzip
import io
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache_schemas import Status
from dimefm.datasets import raw_arrays
from dimefm.datasets.raw_arrays import read_raw
from dimefm.datasets.webdataset_layout import read_webdataset
from dimefm.errors import SourceError
from dimefm.images.decode import MAX_BYTES, MAX_PIXELS
from dimefm.models.clip import Clip
from dimefm.sources import tsv_images
from dimefm.sources.account import Account
from dimefm.sources.files import stat_files
from dimefm.sources.tsv_images import TsvImages
from dimefm.system import storage
from tests.conftest import cached
from tests.making import make_jpeg, write_lineidx, write_tar, write_tsv

HUGE = 1 << 50


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """64 GB of address space more than there is now: not enough for HUGE, even where memory is promised twice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def claiming(name: str, size: int) -> bytes:
    """A member's header of that size, and little behind it."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + b"x" * 512


def test_the_largest_image_is_as_large_as_any_that_is_decoded() -> None:
    """Four channels of 16 bits, as base64."""
    assert MAX_PIXELS * 4 * 2 * 4 / 3 < MAX_BYTES


@pytest.mark.parametrize(("size", "status"), [(HUGE, Status.TOO_LARGE), (MAX_BYTES, Status.TRUNCATED)])
def test_a_member_larger_than_its_tar_costs_its_row(clip: Clip, tmp_path: Path, size: int, status: Status) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{row}.jpg": make_jpeg(seed=row) for row in range(3)})
    end = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(end + bytes(-len(end) % 512) + claiming("3.jpg", size))
    store = cached("image", tar, tmp_path / "i.zarr", clip)
    assert store.status().tolist() == [Status.OK] * 3 + [status]
    (failure,) = next(store.commits()).failures
    assert f"{size:,}" in failure.reason
    assert "what follows is lost" in store.schema.source.problems[0]


def test_no_more_is_read_than_a_file_has(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    path = str(tmp_path / "f")
    for offset, size, expected in ((4, HUGE, b"456789"), (HUGE, 4, b""), (10, HUGE, b""), (4, -2, b""), (4, 2, b"45")):
        assert storage.read_bytes(path, offset, size) == expected


@pytest.mark.parametrize("indexed", [False, True])
def test_a_line_too_long_for_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    table = write_tsv(tmp_path / "a.tsv", {"a": make_jpeg((16, 16)), "b": make_jpeg((300, 300))})
    if indexed:
        write_lineidx(table)
    monkeypatch.setattr(tsv_images, "MAX_BYTES", 2000)
    with pytest.raises(SourceError, match=r"a\.tsv, line 2 is longer than 2,000 bytes"):
        list(TsvImages(stat_files([str(table)])).samples(Account()))


def test_a_label_of_absurd_size_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "set" / "test-00000.tar", {"0.jpg": make_jpeg()})
    end = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(end + bytes(-len(end) % 512) + claiming("0.cls", HUGE))
    with pytest.raises(SourceError, match="broken after 2 members"):
        read_webdataset(str(tmp_path / "set"), "test", None)


def test_marks_whose_header_says_petabytes_are_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "|u1", "fortran_order": False, "shape": (HUGE,)})
    write_tar(tmp_path / "set" / "test-00000.tar", {"0.jpg": make_jpeg(), "0.npy": sink.getvalue() + b"\1"})
    with pytest.raises(SourceError, match=r"0\.npy cannot be read"):
        read_webdataset(str(tmp_path / "set"), "test", None)


def test_published_arrays_that_claim_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_arrays, "_MOST_IDX", 1 << 20)
    header = b"\0\0\x08\x03" + np.array([1 << 30, 1 << 10, 1 << 10], ">u4").tobytes()
    raw = tmp_path / "mnist"
    raw.mkdir()
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + np.array([1], ">u4").tobytes() + b"\1")
    for content, what in ((header, "cannot reshape"), (header + bytes(1 << 22), "more than 1,048,576 bytes")):
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
        with pytest.raises(SourceError, match=what):
            read_raw("mnist", str(tmp_path / "unpacked"), str(raw), "test")


@pytest.mark.parametrize("shape", [(HUGE, 96, 96, 3), (2, 1 << 20, 1 << 20, 1 << 10)])
def test_patches_that_claim_too_much_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for name, of_array in (("x", shape), ("y", (shape[0], 1, 1, 1))):
        with h5py.File(tmp_path / f"camelyonpatch_level_2_split_test_{name}.h5", "w") as file:
            file.create_dataset(name, of_array, "u1", chunks=(1, *of_array[1:3], 1) if of_array[1] < 100 else (1,) * 4)
    with pytest.raises(SourceError, match="not patches of"):
        read_raw("patch_camelyon", str(tmp_path / "unpacked"), str(tmp_path), "test")
