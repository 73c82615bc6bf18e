"""Captions by every kind of place that they are in: what is read, what is counted, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample
from dimefm.sources.caption_reader import MOST_CAPTIONS
from dimefm.sources.image_sources import open_image_source
from tests.making import make_jpeg, write_lineidx, write_parquet, write_tar, write_tsv

JPEG = make_jpeg((8, 8))
Captions = dict[str, tuple[str, ...]]


def read(captions: str, *sources: Path | str) -> tuple[Captions, dict[str, int]]:
    """By key the captions of the images of some sources, and the counts by reason of what was not used."""
    account = Account()
    source = open_image_source([str(one) for one in sources], captions=captions, account=account)
    samples = list(source.samples(account))
    assert samples == list(source.samples(Account()))
    assert not account.problems
    return {one.key: one.captions for one in samples}, {one.reason: one.count for one in account.skipped()}


def test_txt_and_json_members_of_a_tar_as_img2dataset_writes_them(tmp_path: Path) -> None:
    about = {"caption": "a cat", "all": ["a cat", {"raw": "no"}, "two cats"], "url": "http://cat", "empty": None}
    tar = write_tar(
        tmp_path / "00000.tar",
        {"0.json": json.dumps(about).encode(), "0.jpg": JPEG, "0.txt": b"a cat", "1.jpg": JPEG, "1.json": b"{"},
    )
    write_parquet(tmp_path / "00000.parquet", [{"caption": "a cat"}])  # of the downloader
    assert read("txt", tmp_path) == (
        {"0": ("a cat",), "1": ()},
        {"members of tars that end in .json": 2, "tables beside a tar of the same name": 1},
    )
    found, skipped = read("json:caption", tar)
    assert found == {"0": ("a cat",), "1": ()}
    assert skipped == {"members of tars that end in .txt": 1, "files of captions that are no JSON": 1}
    found, skipped = read("json:all", tar)
    assert found == {"0": ("a cat", "two cats"), "1": ()}
    assert skipped["captions in .json files that are no strings"] == 1
    assert read("json:empty", tar)[0] == {"0": (), "1": ()}


def test_a_key_that_several_images_of_a_tar_have_gives_its_captions_to_none(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.txt": b"one", "b.jpg": JPEG, "b.txt": b"two"})
    again = write_tar(tmp_path / "b.tar", {"a.jpg": JPEG, "a.txt": b"three"})
    tar.write_bytes(tar.read_bytes() + again.read_bytes())
    found, skipped = read("txt", tar)
    assert found == {"a": (), "b": ("two",)}
    assert skipped == {"members with the captions of a key that several images of a tar have": 2}


def test_files_beside_images(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.jpg", "b.png", "d/c.jpg", "plain"):
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "d/c.txt").write_text("\ufeffin a folder\r\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("of no image")
    whole = {"a": ("a cat", "a dog"), "b": (), "d/c": ("in a folder",), "plain": ()}
    counted = {"files that end in .txt": 1, "captions that are blank": 1}
    assert read("txt", tmp_path) == (whole, counted)
    assert read("txt", f"{tmp_path}/*.jpg", f"{tmp_path}/*.png")[0] == {"a": whole["a"], "b": ()}
    assert read("txt", tmp_path / "d" / "c.jpg")[0] == {"c": whole["d/c"]}
    source = open_image_source([str(tmp_path)], captions="txt")
    names = [Path(file.path).name for file in source.files()]
    assert names == ["a.jpg", "a.txt", "b.png", "c.jpg", "c.txt", "plain"]  # so that a changed caption is noticed


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (pa.string(), ["one", None]),
        (pa.list_(pa.large_string()), [["one"], []]),
        (pa.list_(pa.string()), [["one", "one", " "], None]),
        (pa.dictionary(pa.int8(), pa.string()), ["one", None]),
    ],
)
def test_a_column_of_a_table(tmp_path: Path, type_: Any, values: list[Any]) -> None:
    table = pa.table({"image": [JPEG, JPEG], "id": ["x", "y"], "words": pa.array(values, type_)})
    pq.write_table(table, tmp_path / "a.parquet")
    found, skipped = read("words", tmp_path / "a.parquet")
    assert found == {"x": ("one",), "y": ()}
    assert skipped == ({"captions that an image has twice": 1, "captions that are blank": 1} if skipped else {})
    with pytest.raises(SourceError, match="no column 'word' of captions") as error:
        read("word", tmp_path / "a.parquet")
    assert "words" in error.value.remedy
    write_parquet(tmp_path / "b.parquet", [{"image": JPEG, "id": "z"}])
    found, skipped = read("words", tmp_path)  # one that was found has its images without captions
    assert found["z"] == ()
    assert skipped["Parquet files without a column 'words' of captions (their images are used)"] == 1


def test_a_field_of_structs_and_rows_with_several_images(tmp_path: Path) -> None:
    rows = [{"images": [JPEG], "say": [{"raw": "a"}, {"raw": "b"}]}, {"images": [JPEG, JPEG], "say": [{"raw": "c"}]}]
    write_parquet(tmp_path / "a.parquet", rows)
    found, skipped = read("say.raw", tmp_path / "a.parquet")
    assert list(found.values()) == [("a", "b"), (), ()]
    assert skipped == {"captions of rows of Parquet files with several images": 1}


@pytest.mark.parametrize("index", [False, True])
def test_a_column_of_a_tsv(tmp_path: Path, index: bool) -> None:
    tsv = write_tsv(tmp_path / "a.tsv", {"x": JPEG}, middle="\ta caf\u00e9 " + "far away " * 200 + "\tmore\t")
    if index:
        write_lineidx(tsv)
    found, _ = read("1", tsv)
    assert found == {"x": ("a caf\u00e9 " + ("far away " * 200).strip(),)}
    assert read("2", tmp_path)[0] == {"x": ("more",)}
    assert read("txt", tmp_path)[0] == {"x": ()}
    with pytest.raises(SourceError, match="has no column 3 before the image, which is in column 3"):
        read("3", tsv)
    with pytest.raises(SourceError, match=r"columns of a \.tsv of images have no names"):
        read("txt", tsv)


COCO = {
    "images": [
        {"id": 7, "file_name": "val/01.jpg"},
        {"id": 8, "file_name": "02.jpg"},
        {"id": 9, "file_name": "03.jpg"},
    ],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A man.\n"},
        {"image_id": 7, "id": 2, "caption": "A tall man"},
        {"image_id": 9, "id": 3, "caption": "never seen"},
        {"image_id": 5, "id": 4, "caption": "of nothing"},
    ],
}


def test_annotations_of_coco(tmp_path: Path) -> None:
    (tmp_path / "captions_val.json").write_text(json.dumps(COCO))
    (tmp_path / "images").mkdir()
    for name in ("01.jpg", "02.jpg"):
        (tmp_path / "images" / name).write_bytes(JPEG)
    place = f"coco:{tmp_path / 'captions_val.json'}"
    found, skipped = read(place, tmp_path / "images")
    assert found == {"01": ("A man.", "A tall man"), "02": ()}
    assert skipped == {
        "images of COCO's annotations that are not in the sources": 1,
        "captions of COCO's annotations whose image is not listed there": 1,
    }
    tar = write_tar(tmp_path / "a.tar", {"val/01.jpg": JPEG, "train/01.jpg": JPEG})
    assert read(place, tar)[0] == {"val/01": found["01"], "train/01": ()}
    (tmp_path / "images" / "more").mkdir()
    (tmp_path / "images" / "more" / "02.jpg").write_bytes(JPEG)
    with pytest.raises(SourceError, match="02 may be the image '02' or 'more/02'"):
        read(place, tmp_path / "images")
    files = open_image_source([str(tar)], captions=place).files()
    assert [Path(file.path).name for file in files] == ["a.tar", "captions_val.json"]


def test_an_annotation_file_that_is_none(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG})
    with pytest.raises(AbsentError, match=r"gone\.json does not exist"):
        read(f"coco:{tmp_path}/gone.json", tar)
    for text in ("{", "[]", '{"images": [{"id": 1}], "annotations": []}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SourceError, match="holds no annotations as COCO writes them"):
            read(f"coco:{tmp_path}/a.json", tar)


@pytest.mark.parametrize("text", ["", "json", "json:", "jpg", "tar", "txt:caption", "."])
def test_what_is_no_place_of_captions(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=re.escape("--captions")):
        open_image_source([str(write_tar(tmp_path / "a.tar", {"a.jpg": JPEG}))], captions=text)


def test_more_captions_than_an_image_may_have(tmp_path: Path) -> None:
    lines = "".join(f"caption {n}\n" for n in range(MOST_CAPTIONS + 3))
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.txt": lines.encode()})
    found, skipped = read("txt", tar)
    assert len(found["a"]) == MOST_CAPTIONS
    assert skipped == {f"captions of an image beyond its first {MOST_CAPTIONS}": 3}


def test_without_captions_nothing_is_read_of_them(tmp_path: Path) -> None:
    account = Account()
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.txt": b"a"})
    (sample,) = open_image_source([str(tar)], account=account).samples(account)
    assert sample == ImageSample("a", str(tar), sample.offset, len(JPEG))
    assert [one.reason for one in account.skipped()] == ["members of tars that end in .txt"]
