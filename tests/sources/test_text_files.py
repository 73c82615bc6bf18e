"""Text as people really have it: encodings, line ends, damage; JSON and tars of sentences."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dimefm.errors import SourceError
from dimefm.sources import json_texts
from dimefm.sources.account import Account
from dimefm.sources.files import stat_files
from dimefm.sources.json_texts import JsonArray
from dimefm.sources.tar_texts import TarTexts
from dimefm.sources.text_sources import TextFile, open_text_source
from dimefm.sources.text_tables import Delimited, JsonLines
from tests.contracts.source_contract import BreakableContract, TextSourceContract, accounted
from tests.making import make_jpeg, write_tar, write_text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def read(path: Path, kind: Any = TextFile, *column: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys, without the file, and sentences of a file; the account, with the file by its name."""
    samples, account = accounted(kind(*stat_files([str(path)]), *column))
    lines = [line.replace(f"{path.parent}/", "") for line in account.lines()]
    return [(key.removeprefix(f"{path.name}:"), text) for key, text in samples], lines


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# -- contracts --------------------------------------------------------------------------------------------------------


class TestJsonArray(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        rows = [{"id": i, "caption": text} for i, text in enumerate(self.sentences())]
        return JsonArray(*stat_files([str(write_text(folder.absolute() / "sätze.json", [json.dumps(rows)]))]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        path = write_text(folder / "a.json", [json.dumps(["one", "two", "three"], indent=1)])
        path.write_bytes(path.read_bytes()[:-6])
        return JsonArray(*stat_files([str(path)])), 2


class TestTarTexts(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        members = {f"ä/{i}.txt": f"{text}\n".encode() for i, text in enumerate(self.sentences())}
        return TarTexts(*stat_files([str(write_tar(folder.absolute() / "sätze.tar", members))]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        path = write_tar(folder / "a.tar", {f"{i}.txt": b"one" * 200 for i in range(4)})
        path.write_bytes(path.read_bytes()[: 3 * 1536 + 700])
        return TarTexts(*stat_files([str(path)])), 3


class TestTarTextsOfAField(TestTarTexts):
    def make(self, folder: Path) -> Any:
        members = {f"ä/{i}.json": json.dumps({"c": text}).encode() for i, text in enumerate(self.sentences())}
        return TarTexts(*stat_files([str(write_tar(folder.absolute() / "sätze.tar", members))]), "c")


# -- encodings and line ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    lines = ["text", "猫が寝る", "a\u2028line\x85within", "ok", '"quoted"']
    data = (mark + end.join(lines)).encode(encoding)
    wanted = [("2", "猫が寝る"), ("3", "a line within"), ("4", "ok")]
    assert read(written(tmp_path / "a.txt", data)) == ([("1", "text"), *wanted, ("5", '"quoted"')], [])
    assert read(written(tmp_path / "a.txt.gz", gzip.compress(data, mtime=0)))[0][1:4] == wanted
    assert read(written(tmp_path / "a.csv", data), Delimited) == ([*wanted, ("5", "quoted")], [])
    assert read(written(tmp_path / "a.tsv", data), Delimited) == ([*wanted, ("5", '"quoted"')], [])
    objects = (mark + end.join(json.dumps({"text": line}) for line in lines)).encode(encoding)
    assert read(written(tmp_path / "a.jsonl", objects), JsonLines)[0][1:4] == wanted


def test_bad_pairs_of_utf16_are_replaced_and_reported(tmp_path: Path) -> None:
    data = "\ufeffgood\nb".encode("utf-16-le") + b"\x00\xd8" + "d\n".encode("utf-16-le")
    found, account = read(written(tmp_path / "a.txt", data))
    assert found == [("1", "good"), ("2", "b\ufffdd")]
    assert account == ["a.txt: 1 lines are not UTF-16; the bad bytes were replaced"]


def test_a_return_within_a_line_ends_none_where_there_are_line_feeds(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", "a\rb\nc\r\n")) == ([("1", "a b"), ("2", "c")], [])
    data = 'id,text\r\n1,a\rb\r\n2,"c\rd\r\ne"\r\n'
    assert read(written(tmp_path / "a.csv", data), Delimited) == ([("2", "a b"), ("3", "c d e")], [])


def test_byte_order_marks_within_a_file_are_white_space(tmp_path: Path) -> None:
    one, two = "a\nb".encode("utf-8-sig"), "c\nd\n".encode("utf-8-sig")
    assert read(written(tmp_path / "a.txt", one + b"\n" + two))[0] == [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d")]
    assert read(written(tmp_path / "a.txt", one + two))[0] == [("1", "a"), ("2", "b c"), ("3", "d")]


# -- damage, and what is no text --------------------------------------------------------------------------------------


def test_lines_that_show_nothing_are_counted_by_reason(tmp_path: Path) -> None:
    hidden = ["\u200b", "\u00ad\ufeff", "\u3164 \u200d", "nul\0here"]
    lines = ["good", "", " \t", *hidden, "👩\u200d🚀", "x\x07y\x1bz", "\x01", *["fill"] * 90]
    found, account = read(written(tmp_path / "a.txt", "\n".join(lines)))
    assert found[:3] == [("1", "good"), ("8", "👩\u200d🚀"), ("9", "x y z")]
    assert account == [
        "lines that are blank: 2, such as a.txt:2",
        "lines in which no character shows, such as zero-width spaces: 4, such as a.txt:4",
        "lines with NUL bytes in them, which is damage: 1, a.txt:7",
    ]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (LFS, "a Git LFS pointer"),
        (gzip.compress(b"a cat\n", mtime=0), "gzip-compressed"),
        (b"<!DOCTYPE html><html>", "a page of HTML"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "an SVG drawing"),
        (b"%PDF-1.4\n", "a PDF"),
        (make_jpeg(), "an image (JPEG)"),
        ("a cat\na dog\n".encode("utf-16-le"), "UTF-16 or UTF-32 without a mark"),
        (("猫が窓辺で寝ている。\n" * 40).encode("utf-16-be"), "no text"),
        (bytes(range(256)) * 10, "no text"),
    ],
)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", TextFile), ("a.jsonl", JsonLines), ("a.csv", Delimited), ("a.tsv", Delimited), ("a.json", JsonArray)],
)
def test_a_file_that_is_no_text_is_reported_and_gives_no_sentence(
    tmp_path: Path, name: str, kind: Any, data: bytes, what: str
) -> None:
    path = written(tmp_path / name, data)
    if kind is not TextFile:
        kind(*stat_files([str(path)])).check()
    found, account = read(path, kind)
    assert found == []
    assert len(account) == 1
    assert account[0].startswith(f"{name}: it ")
    assert what in account[0]
    assert account[0].endswith("; no sentence is taken from it")


def test_a_name_that_promises_gzip_is_held_to_it(tmp_path: Path) -> None:
    found, account = read(written(tmp_path / "a.txt.gz", LFS))
    assert found == []
    assert "a.txt.gz: its name ends in .gz, and it is a Git LFS pointer" in account[0]
    assert read(written(tmp_path / "A.TXT.GZ", gzip.compress(b"a cat\n", mtime=0))) == ([("1", "a cat")], [])


def test_text_in_other_encodings_and_with_escapes_is_text(tmp_path: Path) -> None:
    for data in ("кот сидит\n" * 99).encode("cp1251"), b"\x1b[31mred\x1b[0m\n" * 99, "猫が\n".encode("shift_jis") * 99:
        assert len(read(written(tmp_path / "a.txt", data))[0]) == 99


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", TextFile), ("a.jsonl", JsonLines), ("a.csv", Delimited), ("a.tsv", Delimited), ("a.json", JsonArray)],
)
def test_an_empty_file_is_counted(tmp_path: Path, name: str, kind: Any) -> None:
    assert read(written(tmp_path / name, b""), kind) == ([], [f"empty files: 1, {name}"])


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.csv", b"id,text\n", Delimited),
        ("a.tsv", b"id\ttext\n", Delimited),
        ("a.json", b" [ ] ", JsonArray),
        ("a.txt.gz", gzip.compress(b"", mtime=0), TextFile),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), JsonLines),
    ],
)
def test_so_is_one_with_a_header_or_brackets_alone(tmp_path: Path, name: str, data: bytes, kind: Any) -> None:
    assert read(written(tmp_path / name, data), kind) == ([], [f"empty files: 1, {name}"])


@pytest.mark.parametrize("tab", [",", "\t"])
def test_the_header_is_the_first_row_that_is_not_blank(tmp_path: Path, tab: str) -> None:
    lines = ["", "", f"id{tab}text", f"1{tab}one", f'2{tab}"a ""b"" c"']
    path = written(tmp_path / ("a.csv" if tab == "," else "a.tsv"), "\n".join(lines).encode())
    assert read(path, Delimited) == ([("4", "one"), ("5", 'a "b" c')], [])


# -- tables -----------------------------------------------------------------------------------------------------------


CELLS = ["plain", 'say "hi"', "a\tb", "two\nlines", "two\r\nmore", '"', '""', 'end"', '"start', "", "a 'b", "x" * 2000]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tsv_with_quotes_reads_as_it_was_written(tmp_path: Path, end: str, quoting: int, place: int) -> None:
    path = tmp_path / "a.tsv"
    rows = [[str(number), str(number)] for number in range(len(CELLS))]
    for row, cell in zip(rows, CELLS, strict=True):
        row.insert(place, cell)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator=end, quoting=quoting)
        writer.writerows([[("text" if i == place else f"c{i}") for i in range(3)], *rows])
    found, account = read(path, Delimited)
    assert [text for _, text in found] == [" ".join(cell.split()) for cell in CELLS if cell]
    assert account == ["lines that are blank: 1, a.tsv:13"]


def test_a_tsv_without_quotes_keeps_those_in_its_text(tmp_path: Path) -> None:
    cells = ['"a, b', '2" pipe', '"Hello"', '"c" d"', 'so "no"', '"opens', 'closes"', "plain", '"again']
    lines = ["id\ttext", *(f"{number}\t{cell}" for number, cell in enumerate(cells))]
    found, account = read(write_text(tmp_path / "a.tsv", lines), Delimited)
    assert [text for _, text in found] == cells
    assert [key for key, _ in found] == [str(number + 2) for number in range(len(cells))]
    assert account == []
    lines = ["text\tother", *(f"{cell}\t{cell}" for cell in cells)]
    assert [text for _, text in read(write_text(tmp_path / "a.tsv", lines), Delimited)[0]] == cells


def test_rows_with_too_few_columns_and_blank_ones_are_told_apart(tmp_path: Path) -> None:
    for name, tab in (("a.csv", ","), ("a.tsv", "\t")):
        path = write_text(tmp_path / name, [f"id{tab}text", f"1{tab}a", "2", "", f"3{tab}", tab])
        assert read(path, Delimited) == (
            [("2", "a")],
            [f"lines with too few columns: 1, {name}:3", f"lines that are blank: 3, such as {name}:4"],
        )


# -- JSON -------------------------------------------------------------------------------------------------------------


COCO = {
    "info": {"text": {"url": "u"}},
    "images": [{"id": 1, "sentences": [{"raw": "one"}, {"raw": "two"}]}, {"id": 2, "sentences": [{"raw": "three"}]}],
    "annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "a dog"}],
}


@pytest.mark.parametrize(
    ("document", "column", "wanted"),
    [
        (["one", "two"], (), [("0", "one"), ("1", "two")]),
        ([["one", "two"], ["three"]], (), [("0:0", "one"), ("0:1", "two"), ("1:0", "three")]),
        ([{"caption": "one"}, {"caption": ["two", "three"]}], (), [("0", "one"), ("1:0", "two"), ("1:1", "three")]),
        ([{"a": {"b": "one"}}], ("a.b",), [("0", "one")]),
        ([{"a.b": "one"}], ("a.b",), [("0", "one")]),
        (COCO, (), [("0", "a cat"), ("1", "a dog")]),
        (COCO, ("images.sentences.raw",), [("0:0", "one"), ("0:1", "two"), ("1:0", "three")]),
        ({"1.jpg": "one", "2.jpg": ["two", "three"]}, (), [("0", "one"), ("1:0", "two"), ("1:1", "three")]),
        ({"text": "one"}, (), [("0", "one")]),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_holds_sentences_in_many_forms(
    tmp_path: Path, document: Any, column: tuple[str, ...], wanted: list[tuple[str, str]], indent: int | None
) -> None:
    path = write_text(tmp_path / "a.json", [json.dumps(document, indent=indent)])
    JsonArray(*stat_files([str(path)]), *column).check()
    assert read(path, JsonArray, *column) == (wanted, [])


def test_json_lines_that_are_named_json_are_read_as_such(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", ['{"text": "one"}', "no", '{"text": ["two", "three"]}'])
    assert read(path, JsonArray) == (
        [("1", "one"), ("3:0", "two"), ("3:1", "three")],
        ["lines that are no JSON object: 1, a.json:2"],
    )
    assert read(path, JsonLines) == read(path, JsonArray)


def test_elements_without_a_sentence_are_counted_by_reason(tmp_path: Path) -> None:
    values: list[Any] = [
        {"text": "a"},
        {"text": None},
        {"text": []},
        {"text": 1},
        {"url": "u"},
        "s",
        {"text": "\u200b"},
    ]
    assert read(write_text(tmp_path / "a.json", [json.dumps(values)]), JsonArray) == (
        [("0", "a")],
        [
            "elements that are null: 1, a.json:1",
            "elements that are an empty list: 1, a.json:2",
            "elements that are no strings: 1, a.json:3",
            "elements without 'text': 1, a.json:4",
            "elements that are no JSON objects: 1, a.json:5",
            "elements in which no character shows, such as zero-width spaces: 1, a.json:6",
        ],
    )


def test_json_without_the_field_is_refused_with_what_is_there(tmp_path: Path) -> None:
    for document in ([{"url": "u", "of": {"alt": "a"}}], {"data": [{"url": "u", "of": {"alt": "a"}}], "version": 1}):
        source = JsonArray(*stat_files([str(write_text(tmp_path / "a.json", [json.dumps(document)]))]))
        with pytest.raises(SourceError, match=r"a\.json has no column .*, only (data\.)?url, (data\.)?of\.alt"):
            source.check()


def test_damaged_json_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    for tail, why in ((', {"te', "not JSON"), ("] x", "something follows"), (" {}]", "no comma")):
        path = write_text(tmp_path / "a.json", ['[{"text": "one"}' + tail])
        found, account = read(path, JsonArray)
        assert found == [("0", "one")]
        assert len(account) == 1
        assert "a.json: broken after element 0" in account[0]
        assert why in account[0]


def test_json_larger_than_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_texts, "MOST_BYTES", 1 << 20)
    path = written(tmp_path / "a.json", '["' + "x" * (1 << 20) + '"]')
    with pytest.raises(SourceError, match=r"a\.json is larger than 1 MB.*\n  remedy: write it as JSON lines"):
        JsonArray(*stat_files([str(path)])).check()


# -- tars -------------------------------------------------------------------------------------------------------------


def test_a_tar_gives_the_lines_of_its_texts_and_counts_the_rest(tmp_path: Path) -> None:
    captions = {"0.jpg": b"x", "0.txt": b"one\n", "a/1.TXT": b"two\nthree\n\n", "2.txt": b"", "3.txt": b"caf\xe9"}
    others = {
        "0.json": b'{"c": "four"}',
        "4.txt": make_jpeg(),
        ".5.txt": b"x",
        "6.txt": "six".encode("utf-16"),
        "__MACOSX/7.txt": b"x",
    }
    path = write_tar(tmp_path / "a.tar", {**captions, **others})
    assert read(path, TarTexts) == (
        [("0", "one"), ("a/1:1", "two"), ("a/1:2", "three"), ("3", "caf\ufffd"), ("6", "six")],
        [
            "members of tars that end in .jpg: 1, a.tar: 0.jpg",
            "lines of .txt members that are blank: 1, a.tar: a/1.TXT",
            "empty members of tars: 1, a.tar: 2.txt",
            "members of tars that end in .json (--column NAME reads a field of them): 1, a.tar: 0.json",
            "members of tars that are no text: it is an image (JPEG): 1, a.tar: 4.txt",
            "hidden members of tars: 2, such as a.tar: .5.txt",
            "a.tar: 1 sentences are not UTF-8; the bad bytes were replaced",
        ],
    )


def test_a_column_is_a_field_of_the_json_members_of_a_tar(tmp_path: Path) -> None:
    members = {"0.json": b'{"c": "one"}', "1.json": b'{"c": ["two", null]}', "2.json": b"no", "3.json": b'{"d": 1}'}
    path = write_tar(tmp_path / "a.tar", {**members, "0.txt": b"text"})
    assert read(path, TarTexts, "c") == (
        [("0", "one"), ("1:0", "two")],
        [
            "values in .json members that are null: 1, a.tar: 1.json",
            "members of tars that are no JSON: 1, a.tar: 2.json",
            "values in .json members without 'c': 1, a.tar: 3.json",
            "members of tars that end in .txt: 1, a.tar: 0.txt",
        ],
    )


@pytest.mark.parametrize(
    ("document", "keys"),
    [
        ({"a": {"caption": "one"}, "b": {"caption": "two"}, "c": {"url": "u"}}, ["0", "1"]),
        ({"a": {"caption": ["one", "two"]}, "b": {"url": "u"}}, ["0:0", "0:1"]),
        ({"train": [{"caption": "one"}], "val": [{"caption": "two"}]}, ["train.caption:0", "val.caption:0"]),
    ],
)
def test_every_caption_of_objects_by_key_and_of_several_lists_is_read(
    tmp_path: Path, document: Any, keys: list[str]
) -> None:
    found, account = read(write_text(tmp_path / "a.json", [json.dumps(document)]), JsonArray)
    assert found == list(zip(keys, ["one", "two"], strict=True))
    assert len(account) == sum("url" in str(one) for one in document.values())


def test_a_table_that_is_called_txt_is_likely_a_mistake(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", ["a.jpg#0\ta cat", "a.jpg#1\ta dog", "the end"])
    found, account = read(path, TextFile)
    assert len(found) == 3
    assert account == [
        "a.txt: 2 of 3 lines hold tabs, which become spaces; if it is a table, rename it to .tsv, and name its column "
        "with --column"
    ]
    assert read(write_text(tmp_path / "b.txt", ["a cat", "\ta dog\t"]), TextFile)[1] == []


def test_the_names_of_a_labelled_set_may_be_in_utf_16(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_bytes("cat\r\ndog\r\n".encode("utf-16"))
    (tmp_path / "templates.txt").write_bytes(b"\xef\xbb\xbfa {c}\r\n")
    assert [one.text for one in open_text_source([str(tmp_path)]).samples(Account())] == ["a cat", "a dog"]
    (tmp_path / "classnames.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SourceError, match=r"not UTF-8: .*\n  remedy: write it again as UTF-8"):
        list(open_text_source([str(tmp_path)]).samples(Account()))
