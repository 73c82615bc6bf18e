"""Stores have more shard files than a process may have open: the maps of them are bounded, whatever the command."""

import resource
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dimefm.store import mapped_array
from dimefm.store.embedding_store import Store
from dimefm.system.machine import open_files
from tests.making import read_tar, write_tar
from tests.processes import result_of
from tests.stores import random_store
from tests.tiny_training import STUDENT

SHARDS, FILES = 250, 128


def gathered(path: str, most: int) -> tuple[bool, int, int]:
    """Whether all rows of a store are read right at random, and the files open before and after, of `most`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    store, before = Store(path), _open()
    rows_N = np.random.default_rng(0).permutation(store.schema.rows)
    same = np.array_equal(store.gather(rows_N), store.read(0, store.schema.rows)[rows_N])
    return same, before, _open()


def _open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_maps_take_half_of_the_files_that_may_be_open(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=200, shard_rows=2)
    same, before, after = result_of(gathered, store.path, 64)
    assert same
    assert before + 20 < after <= before + 32


def test_a_shard_that_was_written_again_is_mapped_anew(tmp_path: Path) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=8, shard_rows=4)
    np.testing.assert_array_equal(store.gather(np.array([5])), values[[5]])
    arrays = store.shard_arrays(1)
    arrays["embedding"] = arrays["embedding"][::-1].copy()
    store.write_shard(1, arrays, (), device="cpu", seconds=0)
    np.testing.assert_array_equal(store.gather(np.array([5])), values[[6]])
    assert len(mapped_array.maps._maps) <= open_files() // 2


def shuffled(most: int, count: int) -> list[int]:
    """The order of so many sentences where only `most` files may be open."""
    from dimefm.caching.sentences import _shuffled
    from dimefm.sources.base import TextSample

    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    samples = (TextSample(f"{row}", "a") for row in range(count))
    return [int(sample.key) for sample in _shuffled(samples, count, 3)]


def test_sentences_are_shuffled_alike_however_few_files_may_be_open() -> None:
    few, many = result_of(shuffled, 64, 1000), result_of(shuffled, 1024, 1000)
    assert few == many
    assert sorted(few) == list(range(1000))


def typed(words: list[str]) -> tuple[int, str]:
    """A command where far fewer files may be open than its stores have."""
    from dimefm.cli import cli

    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    result = CliRunner().invoke(cli, words)
    return result.exit_code, f"{result.output}\n{result.exception!r}"


@pytest.mark.slow
def test_every_command_goes_through_250_shards_with_128_open_files(
    sample: Path, teacher_name: str, cifar10: str, tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "0.tar", read_tar(sample / "images" / "train-00000.tar", 2 * SHARDS))
    sentences = tmp_path / "s.txt"
    sentences.write_text("".join(f"a photo of {number} cats\n" for number in range(SHARDS)), encoding="utf-8")
    names = ("i.zarr", "t.zarr", "p.zarr", "x.zarr", "t.index", "t.selection", "s.selection", "run", "out", "evaluated")
    places = {name: str(tmp_path / name) for name in names}
    made = ["--teacher", teacher_name, "--shard-rows", "1", "--workers", "1", "--device", "cpu"]
    stores = ["--images", places["i.zarr"], "--texts", places["t.zarr"], "--pairs", places["p.zarr"]]
    small = ["--student", STUDENT, "--image-size", "32", "--batch-size", "64", "--texts-per-step", "256"]
    mix = ["--text-mix", "random=0.5,retrieved=0.5", "--loss", "vl=0.7,pvl=0.3", "--epochs", "1", "--workers", "2"]
    retrieve = ["retrieve", places["i.zarr"], "--texts", places["t.zarr"], "--top-k", "4", "--out"]
    similar = ["--by", "similarity", "--size", "50", "--pool", "300", "--dedup", "0.999", "--balance"]
    for words in (
        ["cache-images", str(tar), "--out", places["i.zarr"], *made],
        ["cache-texts", str(sentences), "--out", places["t.zarr"], *made, "--shuffle", "1"],
        ["cache-images", str(tar), "--out", places["i.zarr"], *made, "--retry-failed"],
        ["build-index", places["t.zarr"], "--out", places["t.index"], "--queries", places["i.zarr"]],
        [*retrieve, places["x.zarr"], "--index", places["t.index"]],
        [*retrieve, places["p.zarr"]],
        [*retrieve, places["p.zarr"]],
        ["select-texts", places["p.zarr"], "--out", places["t.selection"]],
        ["select-texts", places["p.zarr"], "--out", places["s.selection"], *similar],
        ["train-student", *stores, "--out", places["run"], "--recipe", "sample", *small, *mix],
        ["search", places["t.index"], "--text", "a cat"],
        ["search", places["i.zarr"], "--text", "a cat"],
        *(["info", places[name]] for name in ("i.zarr", "t.zarr", "p.zarr", "t.index", "t.selection", "run")),
        ["info", places["i.zarr"], "--failures"],
        *(["verify", places[name], "--sample", "5"] for name in ("i.zarr", "t.zarr")),
        *(["export-embeddings", places[name], "--out", f"{places['out']}-{name[0]}"] for name in ("i.zarr", "t.zarr")),
        ["evaluate", places["run"], cifar10, "--out", places["evaluated"]],
    ):
        code, output = result_of(typed, words)
        assert code == 0, output
    for name in ("i.zarr", "t.zarr"):
        assert Store(places[name]).schema.shards >= SHARDS
