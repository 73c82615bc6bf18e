"""Sentences in .jsonl, .csv, .tsv and Parquet files: columns, and lines that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dimefm.errors import SourceError
from dimefm.sources import parquet
from dimefm.sources.text_sources import open_text_source
from tests.contracts.source_contract import accounted, listed
from tests.making import write_parquet, write_text


def read(*paths: Path, column: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys and sentences, and reports."""
    samples, reports = listed(open_text_source([str(path) for path in paths], column))
    return [tuple(sample) for sample in samples], reports


def texts(*paths: Path, column: str | None = None) -> list[str]:
    """The sentences of a source that must have nothing to report."""
    found, reports = read(*paths, column=column)
    assert reports == []
    return [text for _, text in found]


def counted(*paths: Path, column: str | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys and sentences, and the account, with files by their names."""
    samples, account = accounted(open_text_source([str(path) for path in paths], column))
    return [tuple(sample) for sample in samples], [line.replace(f"{paths[0].parent}/", "") for line in account.lines()]


def write(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    """The same rows as a table of any kind."""
    path = folder / f"a.{kind}"
    if kind == "parquet":
        return write_parquet(path, rows)
    if kind.startswith("jsonl"):
        return write_text(path, [json.dumps(row) for row in rows])
    separator = "," if kind.startswith("csv") else "\t"
    return write_text(path, [separator.join(map(str, row)) for row in ([*rows[0]], *(row.values() for row in rows))])


KINDS = ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz", "parquet"]


# -- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_is_the_one_named_or_the_first_known(tmp_path: Path, kind: str) -> None:
    path = write(
        tmp_path, kind, [{"title": "l", "TEXT": "T", "url": "u", "sentence": "s", "caption": "c", "text": "t"}]
    )
    assert texts(path) == ["t"]
    assert texts(path, column="url") == ["u"]
    path = write(tmp_path, kind, [{"url": "u", "TEXT": "T", "sentence": "s", "caption": "c"}])
    assert texts(path) == ["c"]
    path = write(tmp_path, kind, [{"title": "l", "TEXT": "T"}])
    assert texts(path) == ["T"]
    path = write(tmp_path, kind, [{"filepath": "f", "title": "l"}])  # as open_clip's own tables
    assert texts(path) == ["l"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [None, "words"])
def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path: Path, kind: str, column: str | None) -> None:
    path = write(tmp_path, kind, [{"url": "u", "alt": "a"}])
    with pytest.raises(SourceError, match=rf"a\.{kind} has no column .*, only url, alt\n  remedy: .*--column NAME"):
        open_text_source([str(path)], column)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistyped_column_is_answered_with_those_that_are_near(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{f"url{number}": "u" for number in range(30)} | {"Caption_Long": "a"}])
    with pytest.raises(SourceError, match=r"has no column 'caption-lon'\n  remedy: did you mean 'Caption_Long'\?"):
        open_text_source([str(path)], "caption-lon")


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_file_without_the_column_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    one, two = write(tmp_path / "1", kind, [{"text": "t"}]), write(tmp_path / "2", kind, [{"name": "t"}])
    with pytest.raises(SourceError, match=rf"2/a\.{kind} has no column"):
        texts(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_the_file_and_the_line_or_row(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": " one\u3000 two "}, {"text": " "}, {"text": "three"}])
    numbers = {"jsonl": (1, 3), "csv": (2, 4), "tsv": (2, 4), "parquet": (0, 2)}[kind.removesuffix(".gz")]
    assert read(path)[0] == [(f"a.{kind}:{numbers[0]}", "one two"), (f"a.{kind}:{numbers[1]}", "three")]


def test_a_column_without_tables_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", ["one"])
    with pytest.raises(SourceError, match="--column text: the sentences are in no table"):
        open_text_source([str(path)], "text")
    assert texts(path, write(tmp_path, "jsonl", [{"text": "two"}]), column="text") == ["one", "two"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "tsv.gz"])
def test_a_number_is_a_column_of_a_file_without_a_header(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": "1"}, {"text": "2"}])
    assert texts(path, column="0") == ["text", "1", "2"]
    found, account = counted(path, column="1")
    assert found == []
    assert account == [f"lines with too few columns: 3, such as a.{kind}:1"]


def test_a_field_that_the_first_objects_lack_may_come_later(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", ['{"id": 1}', '{"id": 2, "caption": "c"}'])
    found, account = counted(path)
    assert found == [("a.jsonl:2", "c")]
    assert account == ["lines without 'caption': 1, a.jsonl:1"]


# -- what is no text --------------------------------------------------------------------------------------------------


def test_lines_of_jsonl_that_hold_no_text_are_counted_by_reason(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', "{not json", '{"other": "x"}', '{"text": null}', '{"text": 3}', "[1]", "", '"s"', "\0"]
    found, account = counted(write_text(tmp_path / "a.jsonl", [*lines, '{"text": " "}', '{"text": "last"}']))
    assert found == [("a.jsonl:1", "good"), ("a.jsonl:11", "last")]
    assert account == [
        "lines that are no JSON object: 3, such as a.jsonl:2",
        "lines without 'text': 1, a.jsonl:3",
        "lines that are null: 1, a.jsonl:4",
        "lines that are no strings: 1, a.jsonl:5",
        "lines that are blank: 2, such as a.jsonl:7",
        "lines with NUL bytes in them, which is damage: 1, a.jsonl:9",
    ]


def test_a_file_of_no_json_at_all_gives_nothing_but_a_count(tmp_path: Path) -> None:
    found, account = counted(write_text(tmp_path / "a.jsonl", ["plain", "text", "[" * 100_000]))
    assert found == []
    assert account == ["lines that are no JSON object: 3, such as a.jsonl:1"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", [r'{"text": "a \ud83d b \ud83e\udd93"}'])
    assert texts(path) == ["a \ufffd b 🦓"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_bytes_that_are_not_utf8_are_replaced_and_reported(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": "caf__ noir"}, {"text": "good"}])
    path.write_bytes(path.read_bytes().replace(b"__", b"\xe9"))
    found, reports = read(path)
    assert [text for _, text in found] == ["caf\ufffd noir", "good"]
    assert reports == [f"{path}: 1 lines are not UTF-8; the bad bytes were replaced"]


# -- csv, tsv, Parquet ------------------------------------------------------------------------------------------------


def test_quotes_of_csv_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text\r\n1,"a, ""b""\r\nand c"\r\n\r\n2,plain\r\n3\r\n'.encode())
    found, account = counted(path)
    assert found == [("a.csv:2", 'a, "b" and c'), ("a.csv:5", "plain")]
    assert account == ["lines that are blank: 1, a.csv:4", "lines with too few columns: 1, a.csv:6"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": "one", "id": 1}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts(path) == ["one"]


def test_quotes_of_tsv_are_text(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.tsv", ["id\ttext", '1\t"a, b', '2\t"c" d"'])
    assert texts(path) == ['"a, b', '"c" d"']


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_field_may_be_longer_than_the_csv_module_likes(tmp_path: Path, kind: str) -> None:
    assert texts(write(tmp_path, kind, [{"text": "x" * 300_000}])) == ["x" * 300_000]


def test_a_quote_that_is_never_closed_is_reported(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.csv", ["text", "one", '"two', *["more"] * 2000])
    found, reports = read(path)
    assert [key for key, _ in found] == ["a.csv:2"]
    why = "a quote that is opened in line 3, or after it, is never closed"
    assert reports == [f"{path}: broken after line 2 ({why}); what follows is lost"]
    write_text(tmp_path / "a.csv", ["text", "one", '"two', *["more"] * 2000, 'end"', "three"])
    found, reports = read(path)
    assert [key for key, _ in found] == ["a.csv:2", "a.csv:3", "a.csv:2005"]
    assert len(reports) == 1
    assert "the record of line 3 goes on for 2001 lines" in reports[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_table_holds_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        write_text(path, [])
    assert texts(path) == []


def test_parquet_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"sentence {i}" for i in range(1000)]
    types = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    for number, kind in enumerate(types):
        table = pa.table({"id": range(1000), "text": pa.array(sentences).cast(kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=400)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 500)
    assert texts(tmp_path) == sentences * 3


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_must_be_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"text": "a"}])
    write(tmp_path, "jsonl.gz", [{"text": "b"}])
    (tmp_path / "a.md").write_text("x")
    assert texts(tmp_path) == ["a", "b"]
    write(tmp_path, "csv", [{"text": "c"}])
    with pytest.raises(SourceError, match=r"holds 2 \.jsonl and 1 \.csv files\n  remedy: name those .*\*\*/\*\.jsonl"):
        texts(tmp_path)
    assert texts(tmp_path / "*.jsonl*") == ["a", "b"]


@pytest.mark.parametrize("mark", [";", "|", "\t", ","])
@pytest.mark.parametrize("hint", ["", "sep=X\r\n"])
def test_what_stands_between_the_columns_of_a_csv_is_told(tmp_path: Path, mark: str, hint: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f'{hint.replace("X", mark)}id{mark} caption\r\n1{mark}"a, b; c"\r\n2{mark}d\r\n'.encode())
    first = 3 if hint else 2
    assert read(path) == ([(f"a.csv:{first}", "a, b; c"), (f"a.csv:{first + 1}", "d")], [])
    with pytest.raises(SourceError, match="has no column 'title', only id, caption\n"):
        open_text_source([str(path)], "title")


def test_tables_that_were_found_are_counted_where_they_have_no_such_column(tmp_path: Path) -> None:
    write_text(tmp_path / "captions.json", ['{"annotations": [{"caption": "a cat"}]}'])
    write_text(tmp_path / "instances.json", ['{"annotations": [{"bbox": [1, 2]}], "images": [{"id": 1}]}'])
    for argument in (tmp_path, tmp_path / "*.json"):
        samples, account = accounted(open_text_source([str(argument)]))
        assert [sample.text for sample in samples] == ["a cat"]
        assert account.lines() == [
            "tables without a column of sentences (name one with --column): 1, "
            f"{tmp_path}/instances.json, which has annotations.bbox, images.id"
        ]
    assert (
        accounted(open_text_source([str(tmp_path)], "title"))[1]
        .lines()[0]
        .startswith(f"tables without a column 'title': 2, such as {tmp_path}/captions.json")
    )
