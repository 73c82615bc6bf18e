"""What any source must do. A source is tested by a class Test... that inherits one of these and says how to make it."""

from __future__ import annotations

import builtins
import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dimefm.sources.account import Account
from dimefm.sources.base import ImageSample, Joined, TextSample
from dimefm.sources.read_image import read_encoded
from tests.making import make_jpeg


def listed(source: Any) -> tuple[list[Any], list[str]]:
    """All samples of a source, and what it reported."""
    samples, account = accounted(source)
    return samples, account.problems


def accounted(source: Any) -> tuple[list[Any], Account]:
    """All samples of a source, and its account."""
    account = Account()
    return list(source.samples(account)), account


class SourceContract:
    """`make` gives a source of at least two samples, with names beyond ASCII; `kind` is the class of its samples."""

    kind: type[Any]

    def make(self, folder: Path) -> Any:
        raise NotImplementedError

    def test_two_listings_give_the_same_samples_in_the_same_order(self, tmp_path: Path) -> None:
        first, reports = listed(self.make(tmp_path))
        source = self.make(tmp_path)
        assert len(first) >= 2
        assert reports == []
        assert listed(source)[0] == first
        assert listed(source)[0] == first

    def test_samples_are_of_the_right_kind_with_keys_of_their_own(self, tmp_path: Path) -> None:
        samples, _ = listed(self.make(tmp_path))
        assert {type(sample) for sample in samples} == {self.kind}
        assert all(sample.key and sample.key == sample.key.strip() for sample in samples)
        assert len({sample.key for sample in samples}) == len(samples)

    def test_files_are_sorted_absolute_and_have_their_sizes_and_times(self, tmp_path: Path) -> None:
        files = self.make(tmp_path).files()
        paths = [file.path for file in files]
        assert paths
        assert paths == sorted(set(paths))
        for file in files:
            assert Path(file.path).is_absolute()
            status = Path(file.path).stat()
            assert (file.size, file.modified) == (status.st_size, status.st_mtime_ns)

    def test_files_are_absolute_for_a_relative_argument(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        absolute = self.make(tmp_path).files()
        monkeypatch.chdir(tmp_path)
        assert [file.path for file in self.make(Path()).files()] == [file.path for file in absolute]

    def test_files_opens_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = self.make(tmp_path)

        def refuse(*arguments: object, **options: object) -> None:
            raise AssertionError(f"files() opened {arguments}")

        with monkeypatch.context() as patch:
            for owner in (builtins, io, fsspec, tarfile):
                patch.setattr(owner, "open", refuse)
            files = source.files()
        assert files

    def test_joined_sources_follow_each_other(self, tmp_path: Path) -> None:
        one, two = self.make(tmp_path / "one"), self.make(tmp_path / "two")
        joined = Joined([two, one])
        assert listed(joined)[0] == listed(two)[0] + listed(one)[0]
        assert joined.files() == two.files() + one.files()


class BreakableContract:
    """For a source that reads through its files to list them."""

    def make_with_broken_file(self, folder: Path) -> tuple[Any, int]:
        """A source that has a file which breaks off in the middle, and the number of samples that can be had."""
        raise NotImplementedError

    def test_a_broken_file_is_reported_and_the_rest_go_on(self, tmp_path: Path) -> None:
        source, readable = self.make_with_broken_file(tmp_path)
        samples, reports = listed(source)
        assert len(samples) == readable
        assert len(reports) == 1
        assert "broken" in reports[0]
        assert str(tmp_path) in reports[0]


class ImageSourceContract(SourceContract):
    """`images` says what bytes `make` puts under which key, in the order of the samples."""

    kind = ImageSample

    def images(self) -> dict[str, bytes]:
        names = ("000", "010", "cat/черепаха", "cat/猫", "dog/naïve")
        return {name: make_jpeg(seed=seed) for seed, name in enumerate(names)}

    def test_every_sample_reads_as_the_exact_bytes(self, tmp_path: Path) -> None:
        samples, _ = listed(self.make(tmp_path))
        found = {}
        for sample in samples:
            found[sample.key] = read_encoded(sample)
        assert list(found.items()) == list(self.images().items())

    def test_every_file_of_a_sample_is_among_the_files(self, tmp_path: Path) -> None:
        source = self.make(tmp_path)
        assert {sample.file.partition("#")[0] for sample in listed(source)[0]} == {file.path for file in source.files()}


class TextSourceContract(SourceContract):
    """`sentences` says what texts `make` holds, in order."""

    kind = TextSample

    def sentences(self) -> list[str]:
        return ["A red bus on a bridge.", "Ein Bär schläft.", "猫が窓辺で寝ている。", "🦓 zebra"]

    def test_the_sentences_are_exact(self, tmp_path: Path) -> None:
        assert [sample.text for sample in listed(self.make(tmp_path))[0]] == self.sentences()
