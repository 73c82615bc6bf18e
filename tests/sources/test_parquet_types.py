"""Parquet files as other programs write them: types of columns, lists, names, paths in place of images, damage."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from dimefm.datasets.own_sets import open_folder
from dimefm.errors import SourceError
from dimefm.sources.base import ImageSample
from dimefm.sources.files import stat_files
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.parquet_texts import ParquetTexts
from dimefm.sources.read_image import ImagePlace, read_encoded
from dimefm.sources.text_sources import open_text_source
from tests.contracts.source_contract import accounted
from tests.making import make_jpeg, upload, write_parquet, write_text


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **{"row_group_size": 2, **options})
    return path


def images(path: Path | str, column: str | None = None, *, found: bool = False) -> tuple[list[ImageSample], list[str]]:
    """The samples of one file, and the lines of its account."""
    samples, account = accounted(ParquetImages(stat_files([str(path)]), column, found=found))
    return samples, account.lines()


def texts(path: Path, column: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    samples, account = accounted(ParquetTexts(*stat_files([str(path)]), column))
    return [tuple(sample) for sample in samples], account.lines()


def contents(samples: list[ImageSample]) -> list[bytes]:
    """What each of them reads as, read in another order."""
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    read = {i: read_encoded(samples[i]) for i in order}
    assert all(len(read[i]) == sample.size for i, sample in enumerate(samples))
    return [read[i] for i in range(len(samples))]


def refused(path: Path, column: str | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        ParquetImages(stat_files([str(path)]), column).check()
    return str(caught.value)


# -- images -----------------------------------------------------------------------------------------------------------

BYTES = [b"1" * 70, None, b"22" * 35, b"1" * 70, b"3" * 70]
BINARY = [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.binary(70),
    pa.dictionary(pa.int32(), pa.binary()),
    pa.dictionary(pa.int8(), pa.large_binary()),
]
FORMATS: list[dict[str, Any]] = [
    {"version": "1.0"},
    {"version": "2.6", "data_page_version": "2.0", "use_dictionary": False},
    {"compression": "zstd", "store_schema": False},
]


def cast(values: list[Any], type_: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(type_):
        return pa.array(values, type_.value_type).dictionary_encode().cast(type_)
    return pa.array(values, type_)


@pytest.mark.parametrize("type_", BINARY, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: next(iter(options)))
def test_bytes_of_any_type_are_images(tmp_path: Path, type_: pa.DataType, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.parquet", {"image": cast(BYTES, type_)}, **options)
    samples, lines = images(path)
    assert [(s.key, s.file, s.offset) for s in samples] == [(f"a.parquet:{i}", f"{path}#image", i) for i in range(5)]
    assert contents(samples) == [value or b"" for value in BYTES]
    assert lines == []


@pytest.mark.parametrize("strings", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_structs_of_any_bytes_and_strings_are_images(tmp_path: Path, strings: pa.DataType) -> None:
    type_ = pa.struct([("bytes", pa.binary_view()), ("path", strings)])
    path = write(tmp_path / "a.parquet", {"i": pa.array([{"bytes": b"x", "path": "k"}, None], type_)})
    samples, lines = images(path)
    assert [s.key for s in samples] == ["k", "a.parquet:1"]
    assert (contents(samples), lines) == ([b"x", b""], [])


def test_a_dictionary_that_grows_too_large_for_its_page_is_read_in_any_order(tmp_path: Path) -> None:
    few = [os.urandom(150_000) for _ in range(3)]
    values = [*few, *few, *(os.urandom(150_000) for _ in range(8)), *few]
    path = write(tmp_path / "a.parquet", {"image": pa.array(values).dictionary_encode()}, row_group_size=100)
    assert contents(images(path)[0]) == values


def test_no_group_of_rows_and_groups_without_rows(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    empty = schema.empty_table()
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for i in range(6):
            writer.write_table(pa.table({"image": [bytes([i])], "text": [str(i)]}) if i % 3 else empty)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 6
    samples, lines = images(tmp_path / "a.parquet")
    assert [s.offset for s in samples] == [0, 1, 2, 3]
    assert (contents(samples), lines) == ([b"\1", b"\2", b"\4", b"\5"], [])
    pq.write_table(empty, tmp_path / "b.parquet")
    counted = [f"Parquet files without rows: 1, {tmp_path}/b.parquet"]
    assert images(tmp_path / "b.parquet") == ([], counted)
    assert texts(tmp_path / "b.parquet") == ([], counted)


IN_LISTS = {
    "list": pa.list_(pa.binary()),
    "large_list": pa.large_list(pa.binary_view()),
    "list_view": pa.list_view(pa.binary()),
    "structs": pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "dictionary": pa.list_(pa.dictionary(pa.int32(), pa.binary())),
}


@pytest.mark.parametrize("type_", IN_LISTS.values(), ids=IN_LISTS)
def test_each_image_of_a_list_is_an_image(tmp_path: Path, type_: pa.DataType) -> None:
    rows: list[list[Any] | None] = [[b"1", b"22"], None, [], [b"333"], [b"4", None, b"66"]]
    if pa.types.is_struct(type_.value_type):
        rows = [row if row is None else [one if one is None else {"bytes": one} for one in row] for row in rows]
    path = write(tmp_path / "a.parquet", {"images": pa.array(rows, type_), "n": range(5)})
    samples, lines = images(path)
    places = [(0, 0), (0, 1), (3, 0), (4, 0), (4, 1), (4, 2)]
    assert [(s.key, s.file, s.offset) for s in samples] == [
        (f"a.parquet:{row}:{n}", f"{path}#images[{n}]", row) for row, n in places
    ]
    assert contents(samples) == [b"1", b"22", b"333", b"4", b"", b"66"]
    assert lines == [f"rows of Parquet files without an image in their list: 2, such as {path}, row 1"]
    for column, row in (("images[2]", 0), ("images[0]", 1), ("other[0]", 0)):
        with pytest.raises(Exception, match=r"has no (row|column)"):
            read_encoded(ImagePlace(f"{path}#{column}", row, 1))


def test_lists_of_fixed_size_and_keys_of_lists(tmp_path: Path) -> None:
    rows = pa.array([[b"1", b"2"], None, [b"3", None]], pa.list_(pa.binary(), 2))
    samples, _ = images(write(tmp_path / "a.parquet", {"i": rows, "id": ["x", "y", "z"]}))
    assert [s.key for s in samples] == ["x:0", "x:1", "z:0", "z:1"]
    assert contents(samples) == [b"1", b"2", b"3", b""]
    rows = pa.array([[{"bytes": b"1", "path": "p"}, {"bytes": b"2", "path": "q"}]])
    assert [s.key for s in images(write(tmp_path / "b.parquet", {"i": rows}))[0]] == ["p", "q"]


@pytest.mark.parametrize("name", ["a.b", "a/b", "a#b", "i[0]", "a b", "ü", "a.parquet#b"])
def test_a_column_may_be_called_anything(tmp_path: Path, name: str) -> None:
    columns = {"a": pa.array([{"b": b"no", "c": "c"}] * 3), name: pa.array([b"0", b"1", b"2"])}
    path = write(tmp_path / "a.parquet", columns)
    samples, _ = images(path, name)
    assert [s.file for s in samples] == [f"{path}#{name}"] * 3
    assert contents(samples) == [b"0", b"1", b"2"]


def test_fields_of_structs_can_be_named(tmp_path: Path) -> None:
    inner = {"image": {"bytes": b"x", "path": "k"}, "said": {"caption": "c"}}
    path = write(tmp_path / "a.parquet", {"sample": pa.array([inner, None])})
    samples, _ = images(path)
    assert [s.key for s in samples] == ["k", "a.parquet:1"]
    assert samples[0].file == f"{path}#sample.image"
    assert contents(samples) == [b"x", b""]
    assert texts(path, "sample.said.caption")[0] == [("a.parquet:0", "c")]


def test_digests_maps_and_repeated_names_are_no_images(tmp_path: Path) -> None:
    columns = {
        "sha512": pa.array([b"d" * 64], pa.binary(64)),
        "map": pa.array([[("k", b"v")]], pa.map_(pa.string(), pa.binary())),
        "image": pa.array([b"x"]),
        "frames": pa.array([[b"y"]]),
    }
    path = write(tmp_path / "a.parquet", columns)
    assert contents(images(path)[0]) == [b"x"]
    assert contents(images(path, "sha512")[0]) == [b"d" * 64]
    assert contents(images(path, "frames")[0]) == [b"y"]
    twice = pa.table([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"])
    assert "of images, only image, image" in refused(write(tmp_path / "b.parquet", twice))


def test_of_two_columns_the_metadata_may_tell_which_is_the_images(tmp_path: Path) -> None:
    table = pa.table({"picture": [b"x"], "sound": [b"y"]})
    said = {"info": {"features": {"picture": {"_type": "Image"}, "sound": {"_type": "Audio"}}}}
    path = write(tmp_path / "a.parquet", table.replace_schema_metadata({"huggingface": json.dumps(said)}))
    assert contents(images(path)[0]) == [b"x"]
    for broken in ("{", "[]", '{"info": {"features": {"picture": [3]}}}'):
        path = write(tmp_path / "a.parquet", table.replace_schema_metadata({"huggingface": broken}))
        assert "could hold the images: picture, sound" in refused(path)


def test_addresses_are_no_images_and_what_to_do_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"TEXT": ["t"], "URL": ["http://x"], "n": [3]})
    assert "of images, only TEXT, URL, n (URL holds strings, such as addresses or base64, not images)" in refused(path)
    assert "img2dataset" in refused(path)
    assert "img2dataset" not in refused(write(tmp_path / "b.parquet", {"TEXT": ["t"]}))


def test_files_that_were_found_are_counted_where_they_hold_no_images(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"caption": ["t"]})
    write(tmp_path / "b.parquet", {"image": [b"x"]})
    files = stat_files([str(tmp_path / name) for name in ("a.parquet", "b.parquet")])
    source = ParquetImages(files, found=True)
    source.check()
    samples, account = accounted(source)
    assert [s.key for s in samples] == ["b.parquet:0"]
    assert account.lines() == [
        f"Parquet files without a column of images (name one with --column): 1, {tmp_path}/a.parquet, which has caption"
    ]
    with pytest.raises(SourceError, match=r"a\.parquet .* images, only caption"):
        ParquetImages(files).check()
    lines = images(tmp_path / "b.parquet", "picture", found=True)[1]
    assert "without a column 'picture' of images" in lines[0]
    write(tmp_path / "b.parquet", {"image": [b"x"], "mask": [b"y"]})
    with pytest.raises(SourceError, match="could hold the images: image, mask"):
        accounted(source)


def test_a_folder_that_spark_wrote_is_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    for i in range(3):
        part = f"part-0000{i}-c000.snappy.parquet"
        write(folder / part, {"image": [bytes([i])], "text": [str(i)]})
        (folder / f".{part}.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_metadata", "_common_metadata"):
        (folder / name).write_bytes(b"")
    samples, account = accounted(open_image_source([str(folder)]))
    assert (contents(samples), account.problems) == ([b"\0", b"\1", b"\2"], [])
    assert [text.text for text in accounted(open_text_source([str(folder)]))[0]] == ["0", "1", "2"]


# -- paths in place of images -----------------------------------------------------------------------------------------


def test_images_that_are_named_by_their_path_are_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "t" / "sub").mkdir(parents=True)
    for name in ("t/one.jpg", "t/sub/two.jpg", "three.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    paths = ["one.jpg", "sub/two.jpg", str(tmp_path / "three.jpg"), "gone.jpg", None, "../three.jpg"]
    rows = [{"image": {"bytes": None, "path": path}} for path in paths]
    for rows_of in (rows, [*rows, {"image": {"bytes": b"x", "path": "one.jpg"}}]):  # bytes of no type, or binary
        path = write_parquet(tmp_path / "t" / "a.parquet", rows_of)
        samples, lines = images(path)
        found = {s.key: read_encoded(s) for s in samples[:5]}
        assert found == {
            "one.jpg": b"t/one.jpg", "sub/two.jpg": b"t/sub/two.jpg", paths[2]: b"three.jpg",
            "a.parquet:4": b"", "../three.jpg": b"three.jpg",
        }  # fmt: skip
        assert lines == [
            f"images that are named by a path at which there is no file: 1, {path}, row 3: {tmp_path}/t/gone.jpg"
        ]
    assert samples[-1] == ImageSample("one.jpg", f"{path}#image", 6, 1)


def test_a_table_may_name_no_more_than_another_document(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    rows = [{"image": {"bytes": None, "path": p}} for p in ("https://x/a.jpg", "zip://a::s3://b", "pipe")]
    samples, lines = images(write_parquet(tmp_path / "a.parquet", rows))
    assert samples == []
    assert len(lines) == 1
    assert "images that are named by a path that a document may not name: 3" in lines[0]
    assert "a.parquet, row 0, names https://x/a.jpg: https:// is not opened" in lines[0]


def test_a_table_at_a_url_names_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.jpg").write_bytes(b"there")
    rows = [{"image": {"bytes": None, "path": path}} for path in ("img/a.jpg", "img/b.jpg")]
    write_parquet(tmp_path / "a.parquet", rows)
    url = upload(tmp_path, f"memory://{tmp_path.name}")
    samples, lines = images(f"{url}/a.parquet")
    assert [read_encoded(s) for s in samples] == [b"there"]
    assert len(lines) == 1
    assert lines[0].endswith(f"row 1: {url}/img/b.jpg")


def test_a_file_that_a_table_names_and_that_cannot_be_looked_at_ends_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": {"bytes": None, "path": "n" * 300}}])
    with pytest.raises(SourceError, match=r"nnn cannot be read: File name too long"):
        images(path)


# -- sentences --------------------------------------------------------------------------------------------------------

STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]


@pytest.mark.parametrize("type_", STRINGS, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: next(iter(options)))
def test_strings_of_any_type_are_sentences(tmp_path: Path, type_: pa.DataType, options: dict[str, Any]) -> None:
    values = cast(["one", "zwei  ü", None, " ", "one"], type_)
    path = write(tmp_path / "a.parquet", {"text": values, "__index_level_0__": range(5)}, **options)
    found, lines = texts(path)
    assert found == [("a.parquet:0", "one"), ("a.parquet:1", "zwei ü"), ("a.parquet:4", "one")]
    assert lines == [
        f"rows of Parquet files that are null: 1, {path}, row 2",
        f"rows of Parquet files that are blank: 1, {path}, row 3",
    ]


CAPTIONS = [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_view(pa.string_view())]


@pytest.mark.parametrize("type_", CAPTIONS, ids=str)
def test_each_string_of_a_list_is_a_sentence(tmp_path: Path, type_: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", {"caption": pa.array([["a", "b"], None, [], ["c", None, "e"]], type_)})
    found, lines = texts(path)
    assert found == [
        (f"a.parquet:{place}", text) for place, text in zip(("0:0", "0:1", "3:0", "3:2"), "abce", strict=True)
    ]
    assert lines == [
        f"rows of Parquet files without a sentence in their list: 2, such as {path}, row 1",
        f"rows of Parquet files that are null: 1, {path}, row 3",
    ]


def test_lists_of_structs_and_of_lists_hold_sentences_too(tmp_path: Path) -> None:
    spoken = pa.array([[{"raw": "a", "n": 1}, {"raw": "b", "n": 2}], [], [{"raw": "c", "n": 3}]])
    path = write(tmp_path / "a.parquet", {"sentences": spoken, "text": pa.array([[["x"], ["y", "z"]], None, []])})
    assert texts(path, "sentences.raw")[0] == [("a.parquet:0:0", "a"), ("a.parquet:0:1", "b"), ("a.parquet:2:0", "c")]
    assert texts(path)[0] == [("a.parquet:0:0", "x"), ("a.parquet:0:1", "y"), ("a.parquet:0:2", "z")]


@pytest.mark.parametrize(
    ("values", "holds"),
    [([{"raw": "a"}], r"struct<raw: string>, .*there is: url, text\.raw"), ([3], "int64"), ([[3.5]], "double")],
)
def test_a_column_of_something_else_is_refused_by_its_type(tmp_path: Path, values: list[Any], holds: str) -> None:
    path = write(tmp_path / "a.parquet", {"url": ["u"], "text": values})
    for column in (None, "text"):
        with pytest.raises(SourceError, match=f"(?s)column 'text' holds {holds}"):
            ParquetTexts(*stat_files([str(path)]), column).check()
    path = write(tmp_path / "b.parquet", {"text": values, "caption": ["c"]})
    assert texts(path)[0] == [("b.parquet:0", "c")]


def test_a_column_of_nothing_but_null_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": pa.nulls(3), "n": range(3)})
    assert texts(path) == ([], [f"rows of Parquet files that are null: 3, such as {path}, row 0"])


def test_why_a_value_is_no_sentence_is_said_as_of_lines(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a\0b"}, {"text": "\u200b"}])
    assert [line.split(":")[0].removeprefix("rows of Parquet files ") for line in texts(path)[1]] == [
        "with NUL bytes in them, which is damage",
        "in which no character shows, such as zero-width spaces",
    ]


@pytest.mark.parametrize("kind", ["plain", "list", "dictionary"])
def test_strings_that_are_not_utf8_are_replaced_and_reported(tmp_path: Path, kind: str) -> None:
    broken = pa.array([b"good", b"caf\xe9 noir"]).view(pa.string())
    values = pa.ListArray.from_arrays([0, 2], broken) if kind == "list" else broken
    path = write(tmp_path / "a.parquet", {"text": values.dictionary_encode() if kind == "dictionary" else values})
    found, lines = texts(path)
    assert [text for _, text in found] == ["good", "caf\ufffd noir"]
    assert lines == [f"{path}: 1 sentences are not UTF-8; the bad bytes were replaced"]


def test_keys_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"], "key": pa.array([b"caf\xe9"]).view(pa.string())})
    assert [s.key for s in images(path)[0]] == ["caf\ufffd"]


# -- what is no Parquet file, or cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a Git LFS pointer"),
        (gzip.compress(b"PAR1", mtime=0), "it is gzip-compressed"),
        (b"<!DOCTYPE html><title>404</title>", "it is a page of HTML"),
        (b"", "Parquet file size is 0 bytes"),
        (b"PAR1 and then cut", "magic bytes not found"),
    ],
    ids=["pointer", "gzip", "html", "empty", "cut"],
)
def test_what_is_called_parquet_and_is_not_is_said(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    for samples, lines in (images(path), texts(path)):
        assert samples == []
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: broken: ")
        assert what in lines[0]


class _Kms(encryption.KmsClient):  # type: ignore[misc]
    def wrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64decode(key)


@pytest.mark.parametrize("plain", [True, False])
def test_an_encrypted_file_is_said_to_be_so(tmp_path: Path, plain: bool) -> None:
    """Arrow ends the process where it looks at the sizes of an encrypted column."""
    table, path = pa.table({"image": [b"x"], "text": ["y"], "key": ["k"]}), tmp_path / "a.parquet"
    settings = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": ["image", "text"]}, plaintext_footer=plain
    )
    factory = encryption.CryptoFactory(lambda _: _Kms())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    for samples, lines in (images(path), texts(path)):
        assert samples == []
        assert "encrypted" in lines[0]


def test_sentences_before_the_damage_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": [str(i) * 500 for i in range(6)]}, compression="none")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    found, lines = texts(path)
    assert [key for key, _ in found] == ["a.parquet:0", "a.parquet:1"]
    assert len(lines) == 1
    assert f"{path}: broken after 2 rows" in lines[0]


# -- labelled sets ----------------------------------------------------------------------------------------------------


def labelled(folder: Path, columns: dict[str, Any]) -> Path:
    write_text(folder / "classnames.txt", ["cat", "dog"])
    write_text(folder / "templates.txt", ["a {c}"])
    write(folder / "test.parquet", columns)
    return folder


def test_labelled_images_in_lists_of_one_are_read_and_those_in_longer_lists_refused(tmp_path: Path) -> None:
    one, two, three = (make_jpeg(seed=seed) for seed in range(3))
    data = pa.array([one, two, three], pa.binary_view()).cast(pa.binary()).dictionary_encode()
    labels = pa.array(["dog", "cat", "dog"], pa.string_view())
    found = open_folder(str(labelled(tmp_path / "a", {"image": data, "label": labels})))
    assert contents(found.samples) == [one, two, three]
    assert found.class_labels.tolist() == [1, 0, 1]
    found = open_folder(str(labelled(tmp_path / "b", {"images": [[one], [two], [three]], "label": labels})))
    assert contents(found.samples) == [one, two, three]
    for rows in ([[one, two], [], [three]], [[one], None, [three]]):
        folder = labelled(tmp_path / "c", {"images": rows, "label": labels})
        with pytest.raises(
            SourceError, match=r"c has 3 rows and \d images\n  - rows of Parquet files without an image"
        ):
            open_folder(str(folder))


def test_captions_and_metadata_of_a_set_that_are_damaged(tmp_path: Path) -> None:
    captions = pa.array([b"caf\xe9"]).view(pa.string())
    folder = labelled(tmp_path / "a", {"image": [make_jpeg()], "caption": captions})
    with pytest.raises(SourceError, match=r"test\.parquet is damaged: 'utf-8' codec"):
        open_folder(str(folder))
    table = pa.table({"image": [make_jpeg(seed=i) for i in range(2)], "label": [0, 1]})
    for said in ("{", '{"info": []}', '{"info": {"features": {"label": {"feature": 3}}}}'):
        folder = labelled(tmp_path / "b", table.replace_schema_metadata({"huggingface": said}))
        assert open_folder(str(folder)).class_labels.tolist() == [0, 1]
