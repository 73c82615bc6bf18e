"""Sources: the contract for each of them, and how arguments are turned into sources."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cache_schemas.plan import SourceFile
from dimefm.errors import SourceError
from dimefm.sources.account import Account
from dimefm.sources.base import split_key
from dimefm.sources.files import expand, stat_files
from dimefm.sources.image_sources import ImageFolder, WebDataset, open_image_source
from dimefm.sources.parquet_images import ParquetImages
from dimefm.sources.parquet_texts import ParquetTexts
from dimefm.sources.prompts import PromptSet, prompt, read_classnames, read_templates
from dimefm.sources.text_sources import TextFile, open_text_source
from dimefm.sources.text_tables import Delimited, JsonLines
from dimefm.sources.tsv_images import TsvImages
from tests.contracts.source_contract import (
    BreakableContract,
    ImageSourceContract,
    TextSourceContract,
    accounted,
    listed,
)
from tests.making import make_jpeg, write_lineidx, write_parquet, write_tar, write_text, write_tsv


class TestWebDataset(ImageSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        images = [(f"{key}.jpg", data) for key, data in self.images().items()]
        if not (folder / "β.tar").exists():
            write_tar(folder / "β.tar", dict(images[3:]))
            write_tar(folder / "a.tar", {"000.txt": b"a caption", **dict(images[:3]), "000.json": b"{}"})
        return WebDataset(stat_files([str(folder.absolute() / name) for name in ("a.tar", "β.tar")]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        source = self.make(folder)
        whole = (folder / "a.tar").read_bytes()
        last = listed(source)[0][2]
        (folder / "a.tar").write_bytes(whole[: last.offset - 100])  # within the header of the third image
        return source, 4


class TestImageFolder(ImageSourceContract):
    def make(self, folder: Path) -> Any:
        for key, data in self.images().items():
            path = folder / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / "notes.txt").write_text("not an image")
        return ImageFolder(str(folder), Account())


class TestParquetImages(ImageSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        images = [{"name": "x", "key": key, "image": data} for key, data in self.images().items()]
        if not (folder / "β.parquet").exists():
            write_parquet(folder / "a.parquet", images[:3])
            write_parquet(folder / "β.parquet", images[3:])
        return ParquetImages(stat_files([str(folder.absolute() / name) for name in ("a.parquet", "β.parquet")]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        source = self.make(folder)
        path = folder / "a.parquet"
        path.write_bytes(path.read_bytes()[:-20])  # within the footer
        return source, 2


class TestParquetStructs(ImageSourceContract):
    def make(self, folder: Path) -> Any:
        images = [{"image": {"bytes": data, "path": key}, "label": 3} for key, data in self.images().items()]
        return ParquetImages(stat_files([str(write_parquet(folder.absolute() / "a.parquet", images))]))


class TestTsvImages(ImageSourceContract):
    def make(self, folder: Path) -> Any:
        write_tsv(folder / "a.tsv", dict(list(self.images().items())[:3]))
        write_tsv(folder / "β.tsv", dict(list(self.images().items())[3:]))
        return TsvImages(stat_files([str(folder.absolute() / name) for name in ("a.tsv", "β.tsv")]))


class TestTsvImagesByIndex(TestTsvImages):
    def make(self, folder: Path) -> Any:
        source = super().make(folder)
        for file in source.files():
            write_lineidx(Path(file.path))
        return source


class TestTextFile(TextSourceContract):
    def make(self, folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        one, two, *rest = self.sentences()
        (folder / "sätze.txt").write_text(f"{one}\n\n   \n  {two}\t\r\n" + "\n".join(rest), encoding="utf-8")
        return TextFile(*stat_files([str(folder.absolute() / "sätze.txt")]))


class TestGzippedTextFile(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        (folder / "sätze.txt.gz").write_bytes(gzip.compress("\n".join(self.sentences()).encode(), mtime=0))
        return TextFile(*stat_files([str(folder.absolute() / "sätze.txt.gz")]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        lines = [f"sentence {i} of many" for i in range(3000)]
        whole = gzip.compress("\n".join(lines).encode(), mtime=0)
        (folder / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
        (folder / "b.txt").write_text("one\ntwo\n")
        readable = len(listed(TextFile(*stat_files([str(folder / "a.txt.gz")])))[0])
        assert 0 < readable < 3000
        return open_text_source([str(folder)]), readable + 2


class TestJsonLines(TextSourceContract):
    suffix = ".jsonl"

    def make(self, folder: Path) -> Any:
        lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(self.sentences())]
        return JsonLines(*stat_files([str(write_text(folder.absolute() / f"sätze{self.suffix}", lines))]))


class TestGzippedJsonLines(TestJsonLines, BreakableContract):
    suffix = ".jsonl.gz"

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        path = write_text(folder / "a.jsonl.gz", [json.dumps({"text": f"sentence {i * i}"}) for i in range(9000)])
        path.write_bytes(path.read_bytes()[:-2000])
        write_text(folder / "b.jsonl", ['{"text": "one"}'])
        readable = len(listed(JsonLines(*stat_files([str(path)])))[0])
        assert 100 < readable < 9000
        return open_text_source([str(folder)]), readable + 1


class TestCsv(TextSourceContract):
    def make(self, folder: Path) -> Any:
        lines = ["id,caption", *(f'{i},"{text}"' for i, text in enumerate(self.sentences()))]
        return Delimited(*stat_files([str(write_text(folder.absolute() / "sätze.csv", lines))]))


class TestGzippedTsv(TextSourceContract):
    def make(self, folder: Path) -> Any:
        lines = ["id\tTEXT", *(f"{i}\t{text}" for i, text in enumerate(self.sentences()))]
        return Delimited(*stat_files([str(write_text(folder.absolute() / "sätze.tsv.gz", lines))]))


class TestParquetTexts(TextSourceContract, BreakableContract):
    def make(self, folder: Path) -> Any:
        rows = [{"id": i, "sentence": text} for i, text in enumerate(self.sentences())]
        return ParquetTexts(*stat_files([str(write_parquet(folder.absolute() / "sätze.parquet", rows))]))

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        rows = [{"text": f"sentence {i}"} for i in range(6)]
        path = write_parquet(folder / "a.parquet", rows, compression="none", use_dictionary=False)
        write_parquet(folder / "b.parquet", rows)
        start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
        damaged = bytearray(path.read_bytes())
        damaged[start : start + 20] = b"\xff" * 20
        path.write_bytes(damaged)
        return open_text_source([str(folder)]), 2 + 6


class TestPromptSet(TextSourceContract):
    def make(self, folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        (folder / "classnames.txt").write_text("кот\nred bus\n", encoding="utf-8")
        (folder / "templates.txt").write_text("a photo of a {c}.\n{}\n")
        return PromptSet(str(folder))

    def sentences(self) -> list[str]:
        return ["a photo of a кот.", "кот", "a photo of a red bus.", "red bus"]


# -- tars and image folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("a/b/0001.JPEG", "a/b/0001", "jpeg"),
        ("v1.2/0001.jpg", "v1.2/0001", "jpg"),
        ("0001.left.jpg", "0001", "left.jpg"),
        ("0001", "0001", ""),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_last_part(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)


def test_a_tar_with_a_damaged_header_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(4)})
    samples, _ = listed(WebDataset(stat_files([str(path)])))
    content = bytearray(path.read_bytes())
    content[samples[2].offset - 400 : samples[2].offset - 380] = b"x" * 20
    path.write_bytes(content)
    found, reports = listed(WebDataset(stat_files([str(path)])))
    assert found == samples[:2]
    assert len(reports) == 1
    assert "2 members" in reports[0]


def test_a_tar_cut_between_two_members_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(4)})
    samples, _ = listed(WebDataset(stat_files([str(path)])))
    path.write_bytes(path.read_bytes()[: samples[2].offset - 512])
    found, reports = listed(WebDataset(stat_files([str(path)])))
    assert found == samples[:2]
    assert len(reports) == 1


def test_a_text_file_named_tar_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("this is no archive\n" * 100)
    found, reports = listed(WebDataset(stat_files([str(tmp_path / "a.tar")])))
    assert found == []
    assert len(reports) == 1
    assert "a.tar" in reports[0]


def test_a_tar_that_is_gone_ends_the_planning(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"0.jpg": b"0"})
    with pytest.raises(SourceError, match=r"a\.tar cannot be read: No such file"):
        listed(WebDataset([SourceFile(str(tmp_path / name), 1024, 0) for name in ("b.tar", "a.tar")]))


def test_members_that_are_no_images_or_have_no_name_are_passed_over(tmp_path: Path) -> None:
    members = {"0.cls": b"3", "0.jpg": b"0", "._0.jpg": b"x", ".jpg": b"x", "1.mp4": b"1", "2.WEBP": b"2"}
    path = write_tar(tmp_path / "a.tar", members)
    assert [sample.key for sample in listed(WebDataset(stat_files([str(path)])))[0]] == ["0", "2"]


def test_images_whose_key_has_more_dots_are_passed_over_and_counted_once(tmp_path: Path) -> None:
    names = ["0.left.jpg", "0.right.PNG", "0.jpg", "0.meta.json", "._0.left.jpg", "v1.2/1.jpg"]
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {f"{number}/{name}": b"x" for name in names})
    found, account = accounted(open_image_source([str(tmp_path)]))
    assert [sample.key for sample in found] == ["0/0", "0/v1.2/1", "1/0", "1/v1.2/1"]
    what = "members whose extension has more than one part (a key ends at the first dot): 4, such as"
    assert f"{what} {tmp_path}/0.tar: 0/0.left.jpg" in account.lines()


def test_hidden_files_of_a_folder_and_what_is_no_file_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "d.jpg").mkdir()
    assert [sample.key for sample in listed(ImageFolder(str(tmp_path), Account()))[0]] == ["a"]


@pytest.mark.parametrize("name", ["b.jpg", "b.tar"])
def test_a_link_to_a_disk_that_is_not_mounted_ends_the_planning(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": b"0"})
    (tmp_path / "a.jpg").write_bytes(b"0")
    (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    with pytest.raises(
        SourceError, match=rf"a link leads into a folder that does not exist: .*{name} -> .*\n  remedy: mount"
    ):
        open_image_source([str(tmp_path)])


def test_keys_of_a_folder_keep_their_dots(tmp_path: Path) -> None:
    for name in ("img.v1.jpg", "img.v2.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert [sample.key for sample in listed(ImageFolder(str(tmp_path), Account()))[0]] == ["img.v1", "img.v2"]


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of shard-000.tar to shard-011.tar, one image each, whose key is the number."""
    for i in range(12):
        write_tar(tmp_path / f"shard-{i:03d}.tar", {f"{i}.jpg": make_jpeg(seed=i)})
    return tmp_path


def keys(*arguments: str) -> list[str]:
    return [sample.key for sample in listed(open_image_source(list(arguments)))[0]]


def test_a_range_keeps_the_padding_of_its_first_number(tars: Path) -> None:
    assert keys(f"{tars}/shard-{{000..002}}.tar") == ["0", "1", "2"]
    assert keys(f"{tars}/shard-0{{08..11}}.tar") == ["8", "9", "10", "11"]
    with pytest.raises(SourceError, match=r"shard-0\.tar does not exist"):
        keys(f"{tars}/shard-{{0..2}}.tar")


def test_two_ranges_make_every_combination(tmp_path: Path) -> None:
    for a in range(2):
        for b in range(3):
            (tmp_path / f"{a}-{b}.txt").write_text("x")
    names = [Path(place.path).name for place in expand(f"{tmp_path}/{{0..1}}-{{0..2}}.txt")]
    assert names == ["0-0.txt", "0-1.txt", "0-2.txt", "1-0.txt", "1-1.txt", "1-2.txt"]


def test_a_glob_is_sorted(tars: Path) -> None:
    assert keys(f"{tars}/shard-00[3-5].tar") == ["3", "4", "5"]
    assert keys(f"{tars}/*.tar") == [str(i) for i in range(12)]


def test_a_folder_of_tars_is_all_its_tars(tars: Path) -> None:
    assert keys(str(tars)) == [str(i) for i in range(12)]


def test_arguments_follow_each_other_in_their_order(tars: Path) -> None:
    assert keys(f"{tars}/shard-007.tar", f"{tars}/shard-001.tar") == ["7", "1"]


def test_a_missing_file_within_a_range_is_named(tars: Path) -> None:
    with pytest.raises(SourceError, match=r"shard-012\.tar does not exist") as caught:
        keys(f"{tars}/shard-{{010..013}}.tar")
    assert caught.value.remedy


def test_a_range_that_counts_down_is_refused(tars: Path) -> None:
    with pytest.raises(SourceError, match="counts down"):
        keys(f"{tars}/shard-{{005..001}}.tar")


def test_a_glob_that_matches_nothing_is_refused(tars: Path) -> None:
    with pytest.raises(SourceError, match="matches no file") as caught:
        keys(f"{tars}/other-*.tar")
    assert caught.value.remedy


def test_a_name_with_brackets_that_exists_is_itself(tmp_path: Path) -> None:
    folder = tmp_path / "photos [2019]"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(make_jpeg())
    assert keys(str(folder)) == ["a"]


def test_one_file_given_twice_is_refused(tars: Path) -> None:
    with pytest.raises(SourceError, match=r"shard-001\.tar is given more than once"):
        keys(f"{tars}/shard-001.tar", f"{tars}/shard-00*.tar")


def test_a_text_file_given_as_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(
        SourceError,
        match=r"neither a \.tar, \.parquet, \.tsv, an image nor a folder, but one of the files that end in \.txt",
    ):
        open_image_source([str(tmp_path / "a.txt")])


@pytest.mark.parametrize("opener", [open_image_source, open_text_source])
def test_a_path_that_is_not_there_and_an_empty_folder_are_refused(tmp_path: Path, opener: Any) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist\n  remedy: "):
        opener([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty holds no [^\n]*\n  remedy: "):
        opener([str(tmp_path / "empty")])


def test_an_image_given_as_sentences_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(make_jpeg())
    with pytest.raises(
        SourceError, match=r"neither a \.txt, \.jsonl, .* nor a folder, but one of the files that end in \.jpg"
    ):
        open_text_source([str(tmp_path / "a.jpg")])


# -- sentences --------------------------------------------------------------------------------------------------------


def test_lines_that_are_not_utf8_are_kept_and_reported_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\ncaf\xe9 noir\n\xff\xfe\nlast")
    found, reports = listed(TextFile(*stat_files([str(tmp_path / "a.txt")])))
    assert [sample.text for sample in found] == ["good", "caf� noir", "��", "last"]
    assert [sample.key for sample in found] == ["a.txt:1", "a.txt:2", "a.txt:3", "a.txt:4"]
    assert len(reports) == 1
    assert "2 lines are not UTF-8" in reports[0]


def test_keys_count_lines_of_the_file_and_white_space_is_made_one_space(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\n one \t two\r\n\nthree")
    found = listed(TextFile(*stat_files([str(tmp_path / "a.txt")])))[0]
    assert [(sample.key, sample.text) for sample in found] == [("a.txt:3", "one two"), ("a.txt:5", "three")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    for name in ("a.txt", "classnames.txt"):
        (tmp_path / name).write_bytes("zebra\nlion\n".encode("utf-8-sig"))
    assert [sample.text for sample in listed(TextFile(*stat_files([str(tmp_path / "a.txt")])))[0]] == ["zebra", "lion"]
    assert read_classnames(str(tmp_path)) == ["zebra", "lion"]


def test_a_text_file_named_gz_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("plain text\n")
    found, reports = listed(TextFile(*stat_files([str(tmp_path / "a.txt.gz")])))
    assert found == []
    path = tmp_path / "a.txt.gz"
    assert reports == [f"{path}: its name ends in .gz, and it is not gzip-compressed; no sentence is taken from it"]


@pytest.mark.parametrize("damage", [b"\x00", b"\xff", b"u"])
def test_a_gz_with_a_damaged_middle_is_reported(tmp_path: Path, damage: bytes) -> None:
    whole = bytearray(gzip.compress("\n".join(f"sentence {i * i}" for i in range(20000)).encode(), mtime=0))
    whole[len(whole) // 2 : len(whole) // 2 + 200] = damage * 200
    (tmp_path / "a.txt.gz").write_bytes(whole)
    found, reports = listed(TextFile(*stat_files([str(tmp_path / "a.txt.gz")])))
    assert len(found) > 5000
    assert any("broken" in report for report in reports)


def test_a_folder_of_text_files_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\n", mtime=0))
    (tmp_path / "readme.md").write_text("no sentence\n")
    assert [sample.text for sample in listed(open_text_source([str(tmp_path)]))[0]] == ["a", "b"]


def test_a_labelled_set_given_as_sentences_is_its_prompts(sample: Path) -> None:
    found = listed(open_text_source([str(sample / "eval" / "cifar10")]))[0]
    templates = (sample / "eval" / "cifar10" / "templates.txt").read_text().splitlines()
    assert len(found) == 10 * len(templates)
    assert found[0].key == "cifar10/0/0"
    assert found[0].text == templates[0].replace("{c}", "airplane").replace("{}", "airplane")


# -- class names and templates ----------------------------------------------------------------------------------------


def test_both_forms_of_a_template_take_the_class() -> None:
    assert prompt("a photo of a {c}.", "red  bus") == "a photo of a red bus."
    assert prompt("a photo of a {}.", "cat") == "a photo of a cat."


def test_a_template_without_a_place_for_the_class_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a {c}\n{}\nno place\n")
    with pytest.raises(SourceError, match=r"templates\.txt, line 3: 'no place' has no \{c\}"):
        read_templates(str(tmp_path))


def test_a_set_without_templates_has_one_prompt_per_class_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\nbus\n")
    account = Account()
    found = [one.text for one in open_text_source([str(tmp_path)]).samples(account)]
    assert found == ["a photo of a cat.", "a photo of a bus."]
    assert account.problems == [f'{tmp_path}: no templates.txt: the only prompt is "a photo of a {{c}}."']
    (tmp_path / "zeroshot_classification_templates.txt").write_text("the {c}\n")
    assert [one.text for one in PromptSet(str(tmp_path)).samples(Account())] == ["the cat", "the bus"]


def test_class_folders_given_as_sentences_are_the_prompts_of_their_names(tmp_path: Path) -> None:
    for name in ("train/red_bus", "train/cat", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(b"x")
    account = Account()
    source = open_text_source([str(tmp_path)], account=account)
    assert [one.text for one in source.samples(account)] == ["a photo of a cat.", "a photo of a red bus."]
    assert [file.path for file in source.files()] == [f"{tmp_path}/test/cat", f"{tmp_path}/train/red_bus"]
    assert "no classnames.txt: class names are those of the folders" in account.problems[0]
    (tmp_path / "templates.txt").write_text("the {}\n")
    assert [one.text for one in open_text_source([str(tmp_path)]).samples(Account())] == ["the cat", "the red bus"]


@pytest.mark.parametrize(
    "files",
    [
        ("cat/0.jpg", "dog/0.jpg", "1.jpg"),  # an image beside them
        ("cat/0.jpg", "notes/0.md"),  # a folder without an image
        ("00000/0.jpg", "00001/0.jpg"),
        ("cat/0.jpg",),
    ],
)
def test_other_folders_of_images_are_not_taken_for_sentences(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"holds no \.txt, .* file\n"):
        open_text_source([str(tmp_path)])


def test_sentences_in_class_folders_stay_sentences(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(b"x")
        (tmp_path / name / "0.txt").write_text(f"my {name}\n")
    assert [one.text for one in open_text_source([str(tmp_path)]).samples(Account())] == ["my cat", "my dog"]


@pytest.mark.parametrize(("content", "what"), [(b"\n  \n", "is empty"), (b"caf\xe9\n", "is not UTF-8")])
def test_class_names_that_cannot_be_used_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "classnames.txt").write_bytes(content)
    with pytest.raises(SourceError, match=what):
        read_classnames(str(tmp_path))
