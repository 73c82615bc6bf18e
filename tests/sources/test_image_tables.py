"""Images in Parquet files and in .tsv files, and read_encoded, which reads the images of every source."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_schemas import Status
from dimefm.errors import SourceError
from dimefm.images.decode import DecodeError
from dimefm.sources import forward_reader, parquet, parquet_cells
from dimefm.sources.base import ImageSample
from dimefm.sources.files import stat_files
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.sources.text_sources import open_text_source
from dimefm.sources.tsv_images import TsvImages
from tests.contracts.source_contract import accounted, listed
from tests.making import make_jpeg, write_lineidx, write_parquet, write_tar, write_tsv


def samples(*arguments: Path, column: str | None = None) -> list[ImageSample]:
    """The samples of a source that must have nothing to report."""
    found, reports = listed(open_image_source([str(a) for a in arguments], column))
    assert reports == []
    return found


def contents(found: list[ImageSample]) -> dict[str, bytes]:
    return {s.key: read_encoded(s) for s in found}


def refused(file: str, offset: int, size: int) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        read_encoded(ImagePlace(file, offset, size))
    return caught.value


# -- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"image": b"x", "path": "p", "id": "i", "__key__": "k", "key": "K"}, "K"),
        ({"image": b"x", "path": "p", "id": "i", "__key__": "k"}, "k"),
        ({"image": b"x", "path": "p", "id": "i"}, "i"),
        ({"image": b"x", "path": "p"}, "p"),
        ({"image": {"bytes": b"x", "path": "inner"}, "path": "p"}, "p"),
        ({"image": {"bytes": b"x", "path": "inner"}, "id": 3}, "inner"),
        ({"image": {"bytes": b"x"}}, "a.parquet:0"),
        ({"image": b"x", "id": 3}, "a.parquet:0"),
        ({"image": b"x", "id": ""}, "a.parquet:0"),
    ],
)
def test_keys_of_a_parquet_file(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row])
    assert samples(path) == [ImageSample(key, f"{path}#image", 0, 1)]


def test_rows_count_through_the_row_groups_and_nulls_keep_theirs(tmp_path: Path) -> None:
    values = [b"0", b"", None, b"333", None, b"5"]
    plain = write_parquet(tmp_path / "plain.parquet", [{"image": value} for value in values])
    struct = write_parquet(
        tmp_path / "struct.parquet", [{"image": None if v is None else {"bytes": v}} for v in values]
    )
    for path in (plain, struct):
        found = samples(path)
        assert [(s.offset, s.size) for s in found] == [(0, 1), (1, 0), (2, 0), (3, 3), (4, 0), (5, 1)]
        assert list(contents(found).values()) == [b"0", b"", b"", b"333", b"", b"5"]


def test_of_several_columns_one_must_be_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x", "mask": b"yy", "key": "k"}])
    with pytest.raises(SourceError, match=r"a\.parquet has several columns .* image, mask\n  remedy: .*--column NAME"):
        samples(path)
    assert samples(path, column="mask") == [ImageSample("k", f"{path}#mask", 0, 2)]
    assert contents(samples(path, column="mask")) == {"k": b"yy"}


@pytest.mark.parametrize("column", ["nothing", "key"])
def test_a_column_that_holds_no_images_is_refused_with_those_that_could(tmp_path: Path, column: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x", "key": "k"}])
    with pytest.raises(SourceError, match=rf"a\.parquet has no column '{column}' of images.* image\n  remedy"):
        open_image_source([str(path)], column)


def test_a_mistyped_column_of_images_is_answered_with_the_near_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x", "key": "k"}])
    with pytest.raises(SourceError, match=r"remedy: did you mean 'image'\?"):
        open_image_source([str(path)], "imgae")


def test_a_later_file_without_the_column_is_refused_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"image": b"x"}])
    write_parquet(tmp_path / "b.parquet", [{"caption": "x"}])
    with pytest.raises(SourceError, match=r"b\.parquet .*images, only caption"):
        samples(tmp_path / "a.parquet", tmp_path / "b.parquet")
    found, account = accounted(open_image_source([str(tmp_path)]))
    assert [s.key for s in found] == ["a.parquet:0"]
    assert [(one.count, one.example) for one in account.skipped()] == [(1, f"{tmp_path}/b.parquet, which has caption")]


def test_a_column_without_parquet_files_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    with pytest.raises(SourceError, match=r"--column image: the images are in no \.parquet"):
        open_image_source([str(tar)], "image")
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x"}])
    assert [s.key for s in samples(tar, path, column="image")] == ["a", "a.parquet:0"]


@pytest.mark.parametrize("block", [1, 2500, 1 << 25])
@pytest.mark.parametrize("group", [7, 100])
def test_images_are_read_in_any_order_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, group: int
) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", block)
    values = {f"{i}": os.urandom(20 * i) for i in range(50)}
    rows = [{"image": {"bytes": value, "path": key}} for key, value in values.items()]
    found = samples(write_parquet(tmp_path / "a.parquet", rows, row_group_size=group))
    assert contents(found) == values
    random.Random(0).shuffle(found)
    assert contents(found) == values


def test_files_and_columns_may_be_read_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 300)
    found = []
    for name in ("a", "b"):
        rows = [{"key": f"{name}{i}", "one": os.urandom(100), "two": os.urandom(100)} for i in range(40)]
        path = write_parquet(tmp_path / f"{name}.parquet", rows, row_group_size=20)
        for column in ("one", "two"):
            found.append([(sample, rows[sample.offset][column]) for sample in samples(path, column=column)])
    for turn in zip(*found, strict=True):
        for sample, value in turn:
            assert read_encoded(sample) == value


def test_few_blocks_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(parquet_cells, "_cells", parquet_cells._Cells())
    rows = [{"image": os.urandom(1000)} for _ in range(200)]
    contents(samples(write_parquet(tmp_path / "a.parquet", rows, row_group_size=100)))
    held = parquet_cells._cells._blocks.values()
    assert 0 < len(held) <= 4
    assert sum(block.nbytes for block in held) < 30_000


def test_blocks_in_order_are_each_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": os.urandom(1000)} for _ in range(300)], row_group_size=100)
    found = samples(path)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 5_000)
    begun, read_blocks = [], parquet.read_blocks
    monkeypatch.setattr(parquet_cells, "read_blocks", lambda *a: begun.append(a[-1]) or read_blocks(*a))
    contents(found)
    assert begun == [0, 1, 2]


def test_memory_that_runs_out_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan without the rows that follow would be without them for good."""
    source = open_image_source([str(write_parquet(tmp_path / "a.parquet", [{"image": b"x"}]))])
    texts = open_text_source([str(write_parquet(tmp_path / "t.parquet", [{"text": "x"}]))])

    def full(*words: Any, **options: Any) -> None:
        raise pa.lib.ArrowMemoryError("realloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", full)
    for each in (source, texts):
        with pytest.raises(
            SourceError, match=r"memory ran out while .*\.parquet was read: realloc of .*\n  remedy: end"
        ):
            listed(each)
    with pytest.raises(MemoryError, match="realloc"):
        read_encoded(ImagePlace(f"{tmp_path}/a.parquet#image", 0, 1))


def test_many_threads_read_the_same_as_one(tmp_path: Path) -> None:
    values = [os.urandom(500) for _ in range(400)]
    found = samples(write_parquet(tmp_path / "a.parquet", [{"image": v} for v in values], row_group_size=30))
    order = list(range(400)) * 3
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: read_encoded(found[i]), order))
    assert read == [values[i] for i in order]


def test_a_forked_process_reads_while_its_parent_holds_the_lock(tmp_path: Path) -> None:
    values = [os.urandom(500) for _ in range(100)]
    found = samples(write_parquet(tmp_path / "a.parquet", [{"image": v} for v in values], row_group_size=10))
    assert read_encoded(found[0]) == values[0]
    with parquet_cells._cells._lock:
        child = os.fork()
        if child == 0:
            threading.Timer(20, lambda: os._exit(2)).start()  # instead of hanging for ever
            os._exit(0 if [read_encoded(s) for s in found] == values else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_written_again_is_not_read_from_memory(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"old"}])
    assert read_encoded(ImagePlace(f"{path}#image", 0, 3)) == b"old"
    write_parquet(path, [{"image": b"newer"}])
    assert read_encoded(ImagePlace(f"{path}#image", 0, 5)) == b"newer"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_encoded(ImagePlace(f"{path}#image", 0, 5))


def test_what_a_parquet_file_does_not_hold_is_said(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x"}])
    error = refused(f"{path}#image", 1, 1)
    assert (error.status, str(error)) == (Status.TRUNCATED, f"{path} has no row 1")
    error = refused(f"{path}#other", 0, 1)
    assert (error.status, str(error)) == (Status.UNDECODABLE, f"{path} has no column 'other'")
    path.write_bytes(path.read_bytes()[:-30])
    error = refused(f"{path}#image", 0, 1)
    assert error.status == Status.UNDECODABLE
    assert "is damaged" in str(error)


def test_damaged_pages_are_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": bytes([i]) * 1000} for i in range(6)], compression="none")
    write_parquet(tmp_path / "b.parquet", [{"image": b"x"}])
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    found, reports = listed(open_image_source([str(tmp_path)]))
    assert [s.key for s in found] == ["a.parquet:0", "a.parquet:1", "b.parquet:0"]
    assert len(reports) == 1
    assert f"{path}: broken after 2 rows" in reports[0]
    assert refused(f"{path}#image", 3, 1000).status == Status.UNDECODABLE
    assert read_encoded(ImagePlace(f"{path}#image", 5, 1000)) == b"\5" * 1000


def test_storage_that_does_not_answer_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(parquet_cells, "open_parquet", fail)
    path = write_parquet(tmp_path / "a.parquet", [{"image": b"x"}])
    with pytest.raises(OSError, match="Input/output error"):
        read_encoded(ImagePlace(f"{path}#image", 0, 1))


def test_large_binary_columns_are_images_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x"], pa.large_binary())}), tmp_path / "a.parquet")
    assert contents(samples(tmp_path / "a.parquet")) == {"a.parquet:0": b"x"}


# -- .tsv -------------------------------------------------------------------------------------------------------------

IMAGES = {"first": make_jpeg(seed=1), "κ2": make_jpeg((400, 300), seed=2), "third": b"", "4": make_jpeg(seed=4)}


@pytest.fixture(params=["scanned", "indexed"])
def make_tsv(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes a.tsv of given bytes or images, in one case with its .lineidx."""

    def make(content: bytes | dict[str, bytes], **options: str) -> Path:
        path = tmp_path / "a.tsv"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_tsv(path, content, **options)
        if request.param == "indexed":
            write_lineidx(path)
        return path

    return make


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("middle", ["\t", "\ta caption\t12\t", f"\t{'long ' * 1000}\t", "\t\t"])
def test_the_image_is_the_last_column(make_tsv: Any, middle: str, end: str) -> None:
    assert contents(samples(make_tsv(IMAGES, middle=middle, end=end))) == IMAGES


@pytest.mark.parametrize("cut", [1, 2])
def test_the_last_line_needs_no_line_end(make_tsv: Any, tmp_path: Path, cut: int) -> None:
    path = make_tsv(write_tsv(tmp_path / "a.tsv", IMAGES, end="\r\n").read_bytes()[:-cut])
    assert contents(samples(path)) == IMAGES


def test_keys_longer_than_the_first_look_are_whole(make_tsv: Any) -> None:
    images = {"k" * length: make_jpeg(seed=length) for length in (500, 511, 512, 513, 5000)}
    assert contents(samples(make_tsv(images))) == images


def test_a_byte_order_mark_is_not_of_the_first_key(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", {"\ufeffa": make_jpeg(), "b": make_jpeg()})
    assert [sample.key for sample in samples(path)] == ["a", "b"]


def test_lines_without_a_key_are_named_by_their_number(make_tsv: Any) -> None:
    assert [s.key for s in samples(make_tsv(b"a\teHg=\n\teHg=\n \teHg=\n"))] == ["a", "a.tsv:2", "a.tsv:3"]


def test_lines_with_fewer_columns_and_blank_ones_are_counted(make_tsv: Any) -> None:
    path = make_tsv(b"\na\tb\teHg=\n\nno tab\nc\tone\n\nd\te\teHg=\n\n")
    found, account = accounted(open_image_source([str(path)]))
    assert [s.key for s in found] == ["a", "d"]
    assert [(one.count, one.example) for one in account.skipped()] == [(4, f"{path}:1"), (2, f"{path}:4")]
    assert not account.problems


@pytest.mark.parametrize(("line", "what"), [(b"no tab", "has no tab"), (b'1\t[{"class": 3}]', "is not base64")])
def test_a_table_of_something_else_is_refused(make_tsv: Any, line: bytes, what: str) -> None:
    with pytest.raises(SourceError, match=rf"a\.tsv, line 1.* {what}\n  remedy"):
        samples(make_tsv(line + b"\n2\teHg=\n"))


def test_what_is_not_base64_and_what_was_cut_short_cannot_be_decoded(make_tsv: Any) -> None:
    path = make_tsv(b"a\teHg=\nb\te!g=\nc\teHg\nd\teHg=eHg=")
    for sample, status in zip(samples(path), [None, *[Status.UNDECODABLE] * 3], strict=True):
        if status:
            error = refused(*sample[1:4])
            assert error.status == status
            assert str(error).startswith("not base64: ")
    last = samples(path)[-1]
    path.write_bytes(path.read_bytes()[:-3])
    error = refused(*last[1:4])
    assert (error.status, str(error)) == (Status.TRUNCATED, "the file ends after 5 of 8 bytes")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("0\n9\n8\n", "do not ascend"),
        ("0\n9\n9\n", "do not ascend"),
        ("9\n18\n", "do not ascend from 0"),
        ("", "do not ascend from 0"),
        ("0\n8\n18\n", "line 2 does not begin after a newline"),
        ("0\n9\n17\n", "line 3 does not begin after a newline"),
        ("0\n9\n18\n27\n", "the file ends at 27"),
        ("0\n9\n", "more lines than the 2"),
        ("0\nnine\n", "something other than offsets"),
        (f"0\n9\n{2**70}\n", "something other than offsets"),
    ],
)
def test_an_index_that_does_not_fit_is_named_with_the_remedy(tmp_path: Path, index: str, why: str) -> None:
    write_tsv(tmp_path / "a.tsv", {"abc": b"xx", "def": b"yy", "ghi": b"zz"})
    write_lineidx(tmp_path / "a.tsv")
    assert len(samples(tmp_path / "a.tsv")) == 3
    (tmp_path / "a.lineidx").write_text(index)
    with pytest.raises(SourceError, match=rf"a\.lineidx does not fit .*a\.tsv: .*{why}.*\n  remedy: delete it"):
        samples(tmp_path / "a.tsv")


def test_with_an_index_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tsv(tmp_path / "a.tsv", {f"{i}": os.urandom(300_000) for i in range(40)})
    found = samples(path)
    write_lineidx(path)
    sizes, pread = [], os.pread
    monkeypatch.setattr(
        forward_reader.os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset)
    )
    assert samples(path) == found
    # The first line is read for its columns, the last for line ends within.
    assert sum(sizes) < 2.5 * 400_000 + 40 * 5000


def test_a_tsv_that_is_gone_ends_the_planning(tmp_path: Path) -> None:
    files = stat_files([str(write_tsv(tmp_path / name, {"k": b"x"})) for name in ("a.tsv", "b.tsv")])
    (tmp_path / "b.tsv").unlink()
    with pytest.raises(SourceError, match=r"b\.tsv cannot be read: No such file"):
        listed(TsvImages(files))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_tars_is_its_tars_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"a.jpg": b"x"})
    write_parquet(tmp_path / "00000.parquet", [{"caption": "x", "key": "a"}])
    assert [s.key for s in samples(tmp_path)] == ["a"]


def test_a_folder_of_tables_is_all_of_them_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_parquet(tmp_path / "p" / f"{name}.parquet", [{"image": b"x", "key": name}])
        write_tsv(tmp_path / "t" / f"{name}.tsv", {name: make_jpeg()})
    assert [s.key for s in samples(tmp_path / "p")] == ["a", "b"]
    assert [s.key for s in samples(tmp_path / "t", tmp_path / "p")] == ["a", "b", "a", "b"]


def test_files_of_several_kinds_keep_the_order_of_the_arguments_or_stand_together(tmp_path: Path) -> None:
    tsv = write_tsv(tmp_path / "a.tsv", {"tsv": make_jpeg()})
    tar = write_tar(tmp_path / "b.tar", {"tar.jpg": b"x"})
    table = write_parquet(tmp_path / "c.parquet", [{"image": b"x", "key": "parquet"}])
    assert [s.key for s in samples(table, tsv, tar)] == ["parquet", "tsv", "tar"]
    assert [s.key for s in samples(tmp_path / "*.*")] == ["tar", "parquet", "tsv"]
    assert [s.key for s in samples(tmp_path)] == ["tar", "parquet", "tsv"]


def test_a_parquet_source_that_is_gone_ends_the_planning(tmp_path: Path) -> None:
    files = stat_files([str(write_parquet(tmp_path / "a.parquet", [{"image": b"x"}]))])
    (tmp_path / "a.parquet").unlink()
    source = ParquetImages(files)
    source.check()
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read"):
        listed(source)
