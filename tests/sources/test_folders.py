"""Folders and files as people have them: everything in a place that was named is used, or counted with an example."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import fsspec
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

from dimefm.cli import cli
from dimefm.errors import AbsentError, SourceError
from dimefm.sources.account import Account
from dimefm.sources.image_sources import open_image_source
from dimefm.sources.text_sources import open_text_source
from tests.contracts.source_contract import listed
from tests.making import encoded, make_jpeg, picture, upload, write_parquet, write_tar, write_text, write_tsv


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or make_jpeg())
    return path


def opened(*arguments: object) -> tuple[list[str], dict[str, tuple[int, str]]]:
    """The keys of the images that arguments name, and by reason how many of what else there is and one of them."""
    account = Account()
    source = open_image_source([str(argument) for argument in arguments], account=account)
    keys = [sample.key for sample in source.samples(account)]
    return keys, {one.reason: (one.count, one.example) for one in account.skipped()}


# -- keys -------------------------------------------------------------------------------------------------------------


def test_images_that_differ_only_in_their_extension_keep_it_and_no_others(tmp_path: Path) -> None:
    names = ("a/1.jpg", "a/1.png", "a/2.jpg", "a/1.k.jpg", "a/1-x.jpg", "a/1/1.jpg", "b/1.jpg", "b/3.JPG", "b/3.jpg")
    names += ("c/1.jpg", "c/1.jpg.png", "c/1.png", "d/1.jpg.png")
    for name in names:
        write(tmp_path / "in" / name)
    expected = ["a/1-x", "a/1.jpg", "a/1.k", "a/1.png", "a/1/1", "a/2", "b/1", "b/3.JPG", "b/3.jpg"]
    expected += ["c/1.jpg", "c/1.jpg.png", "c/1.png", "d/1.jpg"]
    for argument in ("in", "in/**/*.[jJp][pPn][gG]"):
        assert opened(tmp_path / argument) == (expected, {}), argument


# -- links and names --------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "far" / "a.jpg")
    write(tmp_path / "in" / "b" / "b.jpg")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "b" / "up").symlink_to("..")
    (tmp_path / "far" / "over").symlink_to(tmp_path)
    for argument in ("in", "in/**/*.jpg", "in/*"):
        keys, skipped = opened(tmp_path / argument)
        assert sorted(key.rpartition("/")[2] for key in keys) == ["a", "b"], argument
        assert skipped["links back to a folder that they are in"][0] == 2


def test_two_links_to_a_folder_are_two_folders(tmp_path: Path) -> None:
    write(tmp_path / "far" / "a.jpg")
    for name in ("x", "y"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).symlink_to(tmp_path / "far")
    assert opened(tmp_path / "in") == (["x/a", "y/a"], {})


def test_links_to_what_is_gone_are_counted_and_those_into_a_lost_disk_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "c.jpg").symlink_to("c.jpg")
    looped = {"links to themselves": (1, str(tmp_path / "c.jpg"))}
    gone = {"links to files that do not exist": (1, str(tmp_path / "b.jpg")), **looped}
    for argument in (tmp_path, tmp_path / "*.jpg"):
        assert opened(argument) == (["a"], gone)
        for name in ("d.jpg", "e.jpg"):
            (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        with pytest.raises(SourceError, match=r"2 links lead into folders that do not exist, such as .*d\.jpg -> "):
            opened(argument)
        for name in ("d.jpg", "e.jpg"):
            (tmp_path / name).unlink()


def test_hidden_files_and_folders_are_counted_unless_they_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".DS_Store", ".ipynb_checkpoints/a.jpg", "b/.thumbnails/b.jpg", "b/b.jpg"):
        write(tmp_path / name)
    keys, skipped = opened(tmp_path)
    assert keys == ["a", "b/b"]
    assert {reason: count for reason, (count, _) in skipped.items()} == {"hidden files": 2, "hidden folders": 2}
    assert opened(tmp_path / "*.jpg") == (["a"], {"hidden files": (1, str(tmp_path / "._a.jpg"))})
    assert opened(tmp_path / "b" / ".thumbnails")[0] == ["b"]
    assert opened(tmp_path / ".*.jpg")[0] == ["._a"]


def test_names_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    for name in (b"caf\xe9.jpg", b"\xff"):
        os.link(tmp_path / "a.jpg", os.fsencode(tmp_path) + b"/" + name)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/ordner\xfc")).mkdir()
    for argument, count in ((tmp_path, 3), (tmp_path / "*.jpg", 1)):
        keys, skipped = opened(argument)
        assert keys == ["a"]
        ((reason, (found, example)),) = skipped.items()
        assert (reason, found) == ("names that are not UTF-8 (rename them)", count)
        assert example.isascii()
    with pytest.raises(SourceError, match=r"caf\\xe9\.jpg is not UTF-8"):
        opened(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))


def test_no_name_makes_up_a_line_of_a_message(tmp_path: Path) -> None:
    evil = "a\nError: all is lost\x1b[2J"
    write(tmp_path / f"{evil}.md")
    write(tmp_path / f"{evil}.tar", b"this is no tar")
    (tmp_path / "b.jpg").symlink_to(tmp_path / evil / "b.jpg")
    shown = ["cache-images", str(tmp_path), "--out", str(tmp_path / "s.zarr"), "--teacher", "local-dir:none"]
    account = Account()
    with pytest.raises(SourceError) as caught:
        open_image_source([str(tmp_path)], account=account)
    (tmp_path / "b.jpg").unlink()
    listed_lines = listed(open_image_source([str(tmp_path)], account=account))
    assert listed_lines[0] == []
    with pytest.raises(SourceError) as refused:
        open_image_source([str(tmp_path / f"{evil}.md")])
    for text in (str(caught.value), str(refused.value), *account.lines()):
        assert "\nError" not in text
        assert "\x1b" not in text
    output = CliRunner().invoke(cli, shown)
    assert "\x1b" not in output.output


def test_what_is_no_file_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert opened(tmp_path) == (["a"], {"pipes, sockets and devices": (1, str(tmp_path / "b.jpg"))})


# -- what people download ---------------------------------------------------------------------------------------------


def test_a_repository_of_the_hub_is_all_of_its_images(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": make_jpeg(seed=i), "path": f"{i}.jpg"}} for i in range(2)]
    write_parquet(tmp_path / "data" / "train-00000.parquet", rows)
    write(tmp_path / "assets" / "banner.png", encoded(picture(), "PNG"))
    write(tmp_path / "README.md", b"# a set")
    write(tmp_path / ".gitattributes", b"*.parquet filter=lfs")
    keys, skipped = opened(tmp_path)
    assert keys == ["0.jpg", "1.jpg", "assets/banner"]
    assert skipped == {
        "hidden files": (1, str(tmp_path / ".gitattributes")),
        "files that end in .md": (1, str(tmp_path / "README.md")),
    }


def test_what_a_downloader_writes_as_files_is_its_images(tmp_path: Path) -> None:
    for name in ("00000/000000000.jpg", "00000/000000001.jpg"):
        write(tmp_path / name)
        write(tmp_path / name.replace(".jpg", ".txt"), b"a caption")
    write_parquet(tmp_path / "00000.parquet", [{"caption": "a caption", "key": "000000000"}])
    write(tmp_path / "00000_stats.json", b"{}")
    keys, skipped = opened(tmp_path)
    assert keys == ["00000/000000000", "00000/000000001"]
    assert {reason: count for reason, (count, _) in skipped.items()} == {
        "files that end in .txt": 2,
        "files that end in .json": 1,
        "Parquet files without a column of images (name one with --column)": 1,
    }


def test_captions_beside_tars_are_not_looked_into(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"0.jpg": make_jpeg()})
    write(tmp_path / "00000.parquet", b"not even a table")
    assert opened(tmp_path) == (["0"], {"tables beside a tar of the same name": (1, str(tmp_path / "00000.parquet"))})


def test_no_kind_of_file_hides_another(tmp_path: Path) -> None:
    write_tar(tmp_path / "deep" / "er" / "a.tar", {"tar.jpg": make_jpeg()})
    write_parquet(tmp_path / "b.parquet", [{"image": make_jpeg(), "key": "parquet"}])
    write_tsv(tmp_path / "c.tsv", {"tsv": make_jpeg()})
    write(tmp_path / "image.jpg")
    write_text(tmp_path / "captions.tsv", ["caption\turl", "a cat\tabcd"])
    keys, skipped = opened(tmp_path)
    assert keys == ["tar", "parquet", "tsv", "image"]
    assert skipped == {"tables (.tsv) whose first lines hold no image": (1, str(tmp_path / "captions.tsv"))}


def test_a_table_of_images_whose_first_is_broken_is_one(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", {"0": bytes(1000), "1": make_jpeg()})
    write_tsv(tmp_path / "b.tsv", {"2": b"x", "3": make_jpeg()})
    assert opened(tmp_path) == (["0", "1", "2", "3"], {})


# -- single images, globs of them, extensions -------------------------------------------------------------------------


def test_images_and_globs_of_them_can_be_named(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.png", "b [1]/3.jpg", "1.jpg", "2.jpg"):
        write(tmp_path / name)
    write(tmp_path / "a" / "notes.txt", b"x")
    assert opened(tmp_path / "a" / "1.jpg") == (["1"], {})
    assert opened(tmp_path / "b [1]" / "3.jpg") == (["3"], {})
    assert opened(tmp_path / "a" / "*.jpg") == (["1"], {})
    assert opened(tmp_path / "{1..2}.jpg") == (["1", "2"], {})
    assert opened(tmp_path / "**" / "*.jpg")[0] == ["1", "2", "a/1", "b [1]/3"]
    assert opened(tmp_path / "a" / "*") == (
        ["1", "2"],
        {"files that end in .txt": (1, str(tmp_path / "a" / "notes.txt"))},
    )
    with pytest.raises(SourceError, match=r"notes\.txt is neither a \.tar"):
        opened(tmp_path / "a" / "notes.txt")
    with pytest.raises(SourceError, match=r"\*\.txt holds no .*\n  - files that end in \.txt: 1, .*notes\.txt"):
        opened(tmp_path / "a" / "*.txt")
    with pytest.raises(AbsentError):
        opened(tmp_path / "a" / "*.gif")
    with pytest.raises(SourceError, match=r"a/1\.jpg is given more than once"):
        opened(tmp_path / "a" / "1.jpg", tmp_path / "a")


@pytest.mark.parametrize(
    "extension", ["JPG", "Jpeg", "jpe", "jfif", "avif", "heic", "jp2", "j2k", "TIF", "apng", "qoi"]
)
def test_images_are_known_by_their_extensions(tmp_path: Path, extension: str) -> None:
    write(tmp_path / f"a.{extension}", b"whatever it holds, its row says whether it can be decoded")
    write_tar(tmp_path / "b.tar", {f"b.{extension}": b"x"})
    assert opened(tmp_path) == (["b", "a"], {})


def test_where_a_name_says_nothing_the_first_bytes_do(tmp_path: Path) -> None:
    for name in ("0a1b2c", "photo.2019", "c.jpg?w=200", "d."):
        write(tmp_path / name)
    write(tmp_path / "LICENSE", b"Do as you like.")
    write(tmp_path / "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    write(tmp_path / "broken.jpg", b"no image")
    keys, skipped = opened(tmp_path)
    assert keys == ["0a1b2c", "broken", "c", "d", "photo"]
    assert sorted(example for _, example in skipped.values()) == [str(tmp_path / "LICENSE"), str(tmp_path / "pointer")]
    assert any("git lfs pull" in reason for reason in skipped)


def test_compressed_tars_are_counted_in_a_folder_and_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    for name in ("b.tar.gz", "c.tgz", "d.TAR.ZST"):
        write(tmp_path / name, b"\x1f\x8b")
    keys, skipped = opened(tmp_path)
    ((reason, (count, _)),) = skipped.items()
    assert (keys, count) == (["a"], 3)
    assert "decompress" in reason
    with pytest.raises(SourceError, match="decompress them"):
        opened(tmp_path / "b.tar.gz")


def test_an_error_about_a_folder_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", b"x")
    write(tmp_path / ".b.jpg")
    with pytest.raises(
        SourceError, match=r"no image\n  - hidden files: 1, .*\n  - files that end in \.mp4: 1, .*\n  remedy"
    ):
        opened(tmp_path)


# -- folders of sentences ---------------------------------------------------------------------------------------------


def test_sentences_are_found_at_any_depth_and_the_rest_is_counted(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "1.txt", ["one"])
    write_text(tmp_path / "2.TXT", ["two"])
    write_text(tmp_path / ".cache" / "3.txt", ["three"])
    write(tmp_path / "a" / "x.jpg")
    write(tmp_path / "Makefile", b"all:")
    account = Account()
    found = open_text_source([str(tmp_path)], account=account).samples(account)
    assert [sample.text for sample in found] == ["two", "one"]
    assert [(one.reason, one.count) for one in account.skipped()] == [
        ("hidden folders", 1),
        ("files without an extension, or with none that is known", 1),
        ("files that end in .jpg", 1),
    ]


def test_captions_are_those_of_the_tables_and_not_of_what_tells_of_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"0.jpg": make_jpeg(), "0.txt": b"in the tar"})
    write(tmp_path / "00000_stats.json", b'{"text": "no sentence"}')
    account = Account()
    found = open_text_source([str(tmp_path)], account=account).samples(account)
    assert [sample.text for sample in found] == ["in the tar"]
    assert (account.skipped()[0].count, account.skipped()[0].example) == (1, str(tmp_path / "00000_stats.json"))
    write_parquet(tmp_path / "00000.parquet", [{"caption": "in the table"}])
    found = open_text_source([str(tmp_path)], account=(account := Account())).samples(account)
    assert [sample.text for sample in found] == ["in the table"]
    assert sorted(one.example for one in account.skipped()) == [
        f"{tmp_path}/00000{end}" for end in (".tar", "_stats.json")
    ]
    assert [sample.text for sample in open_text_source([f"{tmp_path}/*.tar"]).samples(account)] == ["in the tar"]
    write_text(tmp_path / "more.txt", ["text"])
    with pytest.raises(SourceError, match=r"holds 1 \.txt and 1 \.parquet files\n"):
        open_text_source([str(tmp_path)])


def test_a_glob_at_a_url_leaves_out_what_is_hidden_as_on_a_disk(tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.txt", "b/.d.txt", ".e/f.txt"):
        write_text(tmp_path / name, [name])
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/", "/hidden", recursive=True)
    for pattern in ("**/*.txt", "*"):
        found = []
        for root in (str(tmp_path), "memory:///hidden"):
            account = Account()
            files = open_text_source([f"{root}/{pattern}"], account=account).files()
            found.append(
                (
                    [file.path.removeprefix(root) for file in files],
                    sorted((one.reason, one.count, one.example.removeprefix(root)) for one in account.skipped()),
                )
            )
        counted = [("hidden files", 1, "/b/.d.txt"), ("hidden folders", 1, "/.e")]
        assert found == 2 * [(["/a.txt", "/b/c.txt"], counted)]
    store.rm("/hidden", recursive=True)


@pytest.mark.parametrize("opener", [open_image_source, open_text_source])
def test_a_reason_is_not_of_what_others_wrote(tmp_path: Path, opener: Callable[..., object]) -> None:
    write(tmp_path / "a.jpg")
    write_text(tmp_path / "b.txt", ["b"])
    for name in ("a.\x1b[2J", "b.two\nlines", "c.with space", "d.tar.gz", "e.2019"):
        write(tmp_path / name, b"x")
    account = Account()
    opener([str(tmp_path)], account=account)
    reasons = [one.reason for one in account.skipped()]
    assert len(reasons) == 3
    assert "compressed tars, of which no member can be read alone (decompress them)" in reasons
    assert all(reason.isprintable() and "space" not in reason for reason in reasons)


@pytest.mark.parametrize("name", ["*", "*.md"])
def test_a_glob_that_holds_no_sentences_is_refused_with_what_it_matches(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.md", b"x")
    with pytest.raises(SourceError, match=r"holds no \.txt, .*\n  - files that end in \.md: 1, .*a\.md\n  remedy"):
        open_text_source([str(tmp_path / name)])


def test_what_lies_beside_the_names_of_a_labelled_set_is_counted(tmp_path: Path) -> None:
    write_text(tmp_path / "classnames.txt", ["cat"])
    write_text(tmp_path / "templates.txt", ["a {c}"])
    write_text(tmp_path / "captions.txt", ["a cat on a mat"])
    account = Account()
    found = open_text_source([str(tmp_path)], account=account).samples(account)
    assert [sample.text for sample in found] == ["a cat"]
    assert [one.example for one in account.skipped()] == [str(tmp_path / "captions.txt")]


OPENERS: list[Callable[..., Any]] = [open_image_source, open_text_source]


@pytest.mark.parametrize("opener", OPENERS)
def test_an_account_is_not_needed(tmp_path: Path, opener: Callable[..., Any]) -> None:
    write(tmp_path / "a.jpg")
    write_text(tmp_path / "b.txt", ["b"])
    assert len(list(opener([str(tmp_path)]).samples(Account()))) == 1


# -- what systems keep for themselves, and patterns --------------------------------------------------------------------


@pytest.mark.parametrize("at_url", [False, True])
def test_folders_that_a_system_keeps_are_counted_unless_they_are_named(tmp_path: Path, at_url: bool) -> None:
    for name in (
        "a.jpg",
        "@eaDir/a.jpg/b.jpg",
        "c/#recycle/c.jpg",
        "c/c.jpg",
        "_temporary/0/d.jpg",
        "c/_temporary.jpg",
    ):
        write(tmp_path / name)
    place = upload(tmp_path, f"memory://{tmp_path.name}").replace("memory://", "memory:///") if at_url else tmp_path
    keys, skipped = opened(place)
    reason = "folders of thumbnails, of deleted files or of unfinished output (name one to use what is in it)"
    assert (keys, skipped[reason][0]) == (["a", "c/_temporary", "c/c"], 3)
    assert opened(f"{place}/*/*.jpg")[0] == ["c/_temporary", "c/c"]
    assert opened(f"{place}/@eaDir/*/*.jpg")[0] == ["a.jpg/b"]
    assert opened(f"{place}/_temporary")[0] == ["0/d"]


@pytest.mark.parametrize("at_url", [False, True])
def test_patterns_of_any_depth_match_each_file_once_and_count_hidden_ones(tmp_path: Path, at_url: bool) -> None:
    for name in ("a.jpg", ".a.jpg", "b/b.jpg", "b/._b.jpg", "b/.thumbs/c.jpg", "b/train/d.jpg", "b/train/.d.jpg"):
        write(tmp_path / name)
    place = upload(tmp_path, f"memory://{tmp_path.name}").replace("memory://", "memory:///") if at_url else tmp_path
    for pattern in ("**", "**/*", "**/*.jpg"):
        keys, skipped = opened(f"{place}/{pattern}")
        assert keys == ["a", "b/b", "b/train/d"]
        assert {reason: count for reason, (count, _) in skipped.items()} == {"hidden files": 3, "hidden folders": 1}
        assert skipped["hidden folders"][1] == f"{place}/b/.thumbs"
    keys, skipped = opened(f"{place}/**/train*")
    assert (keys, skipped) == (["d"], {"hidden files": (1, f"{place}/b/train/.d.jpg")})
    assert opened(f"{place}/*/*.jpg") == (["b/b"], {"hidden files": (1, f"{place}/b/._b.jpg")})


def test_names_that_would_be_taken_for_a_column_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet#b.jpg")
    write(tmp_path / "b.jpg")
    reason = "names with .parquet# in them, which stands before a column (rename them)"
    assert opened(tmp_path) == (["b"], {reason: (1, str(tmp_path / "a.parquet#b.jpg"))})
    with pytest.raises(SourceError, match=r"b\.jpg is neither .*, but one of the names with \.parquet# in them"):
        opened(tmp_path / "a.parquet#b.jpg")


def test_images_that_a_table_beside_them_names_are_used_once(tmp_path: Path) -> None:
    for name in ("img/a.jpg", "img/b.jpg"):
        write(tmp_path / name)
    rows = [{"image": {"bytes": None, "path": path}} for path in ("img/a.jpg", "./img", "img/gone.jpg")]
    write_parquet(tmp_path / "train.parquet", rows)
    keys, skipped = opened(tmp_path)
    assert keys == ["img/a.jpg", "img/b"]
    assert skipped == {
        "images that are named by a path at which there is no file": (
            2, f"{tmp_path}/train.parquet, row 1: {tmp_path}/./img"
        ),
        "images that are rows of a Parquet file, too (each is used once, as a row)": (1, f"{tmp_path}/img/a.jpg"),
    }  # fmt: skip


def test_what_to_do_with_packed_files_and_other_tables_is_said(tmp_path: Path) -> None:
    for name in ("a.zip", "b.pq", "c.arrow", "d.txt.bz2"):
        write(tmp_path / name)
    for opener in (open_image_source, open_text_source):
        with pytest.raises(SourceError) as error:
            opener([str(tmp_path)])
        for what in (".zip (unpack them)", ".pq (rename them to .parquet)", ".arrow (write", ".bz2 (decompress them)"):
            assert f"files that end in {what}" in str(error.value)


@pytest.mark.parametrize("status", [0, 403, 404])
def test_a_server_that_does_not_answer_is_not_one_that_says_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """As fsspec has it: all that goes wrong by http is a file that is not found."""
    cause: Exception = aiohttp.ClientConnectionError("no route")
    if status:
        cause = aiohttp.ClientResponseError(
            cast(Any, SimpleNamespace(real_url="u")), (), status=status, message="so it says"
        )

    def info(self: object, path: str) -> None:
        raise FileNotFoundError(path) from cause

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(SourceError, match="does not exist" if status == 404 else "cannot be read: .*(no route|403)"):
        opened("memory://x/a.tar")


def test_a_chained_url_is_refused_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x::y\.jpg has :: in it, which URLs are chained by\n  remedy: rename it"):
        opened(f"memory://{tmp_path.name}/x::y.jpg")
