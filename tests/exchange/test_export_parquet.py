"""A store as Parquet: read back with PyArrow alone, it is the store's; what cannot be is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from cache_schemas import SchemaError
from dimefm.cli import cli
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, StoreError, UnreadableError
from dimefm.exchange.export_parquet import ParquetConfig, ParquetFiles, export_parquet
from dimefm.exchange.parquet_columns import MoreColumns
from dimefm.images.thumbnail import thumbnail
from dimefm.retrieval.retrieve import retrieve
from dimefm.store.embedding_store import Store
from dimefm.store.pairs_store import Pairs
from dimefm.system.shard_work import Seat
from tests.making import read_tar, tree
from tests.other_processes import run_elsewhere
from tests.stores import random_store

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m{{ 7*7 }}\x00'; DROP TABLE x; --\n../../etc"
NONE = MoreColumns(None, None, None, None)


def export(store: Store, out: Path, **options: Any) -> pa.Table:
    """The table that is read back."""
    return pq.read_table(export_parquet(ParquetConfig(store.path, str(out), **options)))


def vectors(table: pa.Table) -> np.ndarray[Any, Any]:
    """The column of vectors, (N, D)."""
    column = table["vector"].combine_chunks()
    found: np.ndarray[Any, Any] = column.flatten().to_numpy().reshape(len(table), -1)
    return found


@pytest.fixture(scope="module")
def pairs(image_store: Store, text_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    out = str(tmp_path_factory.mktemp("pairs") / "p.zarr")
    retrieve(image_store.path, texts=text_store.path, top_k=4, out=out, device="cpu")
    return Pairs(out)


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("out", ["folder", "one.parquet"])
def test_rows_keys_sentences_and_vectors_are_those_of_the_store(tmp_path: Path, dtype: str, out: str) -> None:
    keys = [f"{HOSTILE}{row}" for row in range(100)]
    failed = (0, 31, 32, *range(50, 60), 99)
    store, values_ND = random_store(
        tmp_path / "s.zarr", rows=100, shard_rows=32, kind="text", failed=failed, keys=keys, dtype=dtype
    )
    table = export(store, tmp_path / out, rows_per_file=None if out == "one.parquet" else 10)
    good = [row for row in range(100) if row not in failed]
    assert table["row"].to_pylist() == good
    assert table["key"].to_pylist() == [keys[row] for row in good]
    assert table["text"].to_pylist() == [f"sentence {row}" for row in good]
    assert table["vector"].type == pa.list_(pa.float32(), 16)
    assert vectors(table).tobytes() == values_ND[good].astype(np.float32).tobytes()
    if out == "folder":  # a file of rows without any embedding is left out
        names = sorted(path.name for path in (tmp_path / out).iterdir())
        assert names == [f"embeddings_{number}.parquet" for number in range(10) if number != 5]


def test_a_file_of_many_groups_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first groups of one have no row at all."""
    store, _ = random_store(tmp_path / "s.zarr", rows=100, shard_rows=32, failed=tuple(range(20)))
    whole = export(store, tmp_path / "whole.parquet", map=True)
    monkeypatch.setattr("dimefm.exchange.export_parquet._GROUP_ROWS", 7)
    groups = export(store, tmp_path / "groups.parquet", map=True)
    assert pq.ParquetFile(tmp_path / "groups.parquet").num_row_groups == 13
    assert groups.drop(["x", "y"]).equals(whole.drop(["x", "y"]))
    for axis in "xy":
        np.testing.assert_allclose(groups[axis], whole[axis], atol=1e-6)


def test_pairs_give_the_best_score_of_images_and_the_hits_of_sentences(
    image_store: Store, text_store: Store, pairs: Pairs, tmp_path: Path
) -> None:
    images = export(image_store, tmp_path / "i", pairs=pairs.path)
    texts = export(text_store, tmp_path / "t", pairs=pairs.path)
    best_N = (image_store.read(0, 96).astype(np.float32) @ text_store.read(0, 200).astype(np.float32).T).max(axis=1)
    np.testing.assert_allclose(images["score"].to_numpy(), best_N, atol=2e-3)
    found_T = np.bincount(pairs.text_rows(0, 96).ravel(), minlength=200)
    assert texts["hits"].to_pylist() == found_T.tolist()
    assert "hits" not in images.column_names
    assert "score" not in texts.column_names


def test_clusters_are_those_of_vectors_about_known_centres(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    group_N = np.repeat(np.arange(4), 50)
    rng.shuffle(group_N)
    values_ND = np.eye(16)[group_N] + 0.05 * rng.standard_normal((200, 16))
    store, _ = random_store(tmp_path / "s.zarr", rows=200, shard_rows=64, values=values_ND, failed=(7,))
    found = export(store, tmp_path / "o", clusters=4)["cluster"].to_numpy()
    groups = np.delete(group_N, 7)
    pairs = set(zip(found.tolist(), groups.tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist()))  # no cluster has rows of two groups


def test_the_map_keeps_the_direction_in_which_rows_differ_most(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    along_N = rng.uniform(-1, 1, 150)
    values_ND = np.ones((150, 16)) + 0.01 * rng.standard_normal((150, 16))
    values_ND[:, 5] += along_N
    store, _ = random_store(tmp_path / "s.zarr", rows=150, shard_rows=64, values=values_ND)
    table = export(store, tmp_path / "o", map=True)
    assert abs(np.corrcoef(table["x"].to_numpy(), along_N)[0, 1]) > 0.99
    assert table["x"].to_numpy().std() > 3 * table["y"].to_numpy().std()
    assert abs(table["x"].to_numpy().mean()) < 1e-3


def test_thumbnails_are_the_pictures_of_their_rows_as_datasets_reads_them(
    image_store: Store, image_tar: Path, tmp_path: Path
) -> None:
    table = export(image_store, tmp_path / "o.parquet", thumbnails=24)
    assert table["thumbnail"].type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for found, data in zip(table["thumbnail"].to_pylist(), read_tar(image_tar, 96).values(), strict=True):
        assert found == {"bytes": thumbnail(data, 24), "path": None}
    assert table["file"].to_pylist() == [str(image_tar)] * 96
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert features["thumbnail"] == {"_type": "Image"}
    assert features["vector"]["length"] == image_store.schema.dim


def test_a_picture_that_cannot_be_had_is_null_and_counted(
    image_store: Store, image_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = image_tar.rename(image_tar.with_suffix(".moved"))
    try:
        table = export(image_store, tmp_path / "o", thumbnails=24)
    finally:
        moved.rename(image_tar)
    assert table["thumbnail"].null_count == 96
    assert "thumbnail is null for 96 images, such as: " in capsys.readouterr().err


# -- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["folder", "one.parquet"])
def test_an_export_that_is_stopped_leaves_nothing_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=60, shard_rows=16)
    monkeypatch.setattr("dimefm.exchange.export_parquet._GROUP_ROWS", 8)
    status = Store.status

    def stop(self: Store, start: int = 0, end: int | None = None) -> np.ndarray[Any, Any]:
        if start >= 40:
            raise KeyboardInterrupt
        return status(self, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "status", stop)
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "new" / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr"]
    assert len(export(store, tmp_path / "new" / out)) == 60
    assert [path.name for path in (tmp_path / "new").iterdir()] == [out]


def test_workers_elsewhere_write_the_same_files(image_store: Store, pairs: Pairs, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"pairs": pairs.path, "clusters": 3, "map": True, "thumbnails": 16, "rows_per_file": 20}
    trees = []
    for name, run in (("alone", {}), ("elsewhere", {"run": run_elsewhere})):
        out = export_parquet(ParquetConfig(image_store.path, str(tmp_path / name), **columns), **run)
        trees.append(tree(Path(out)))
    assert trees[0] == trees[1]
    assert len(trees[0]) == 5


def test_a_machine_without_the_mount_writes_nothing(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=16, shard_rows=16)
    for places in ((str(tmp_path / "gone"), str(tmp_path)), (store.path, str(tmp_path / "gone"))):
        with pytest.raises(UnreadableError, match=r"gone"):
            ParquetFiles(*places, "out", 16, NONE).open(Seat())


def test_an_export_goes_nowhere_where_something_is(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=16, shard_rows=16)
    (tmp_path / "old.parquet").touch()
    (tmp_path / "folder.parquet").mkdir()
    for out in ("", "old.parquet", "folder.parquet"):
        with pytest.raises(OutputExistsError):
            export(store, tmp_path / out)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_columns_that_the_store_cannot_have(
    image_store: Store, text_store: Store, pairs: Pairs, tmp_path: Path
) -> None:
    other, _ = random_store(tmp_path / "s.zarr", rows=20, shard_rows=16, failed=(3,))
    empty, _ = random_store(tmp_path / "e.zarr", rows=2, shard_rows=16, failed=(0, 1))
    for store, options, kind, what in (
        (text_store, {"thumbnails": 32}, MismatchError, "of which there are no pictures"),
        (other, {"pairs": pairs.path}, MismatchError, "was made for another store of images than"),
        (other, {"pairs": other.path}, SchemaError, "pairs"),
        (other, {"clusters": 20}, DimefmError, "has 19 rows with an embedding"),
        (empty, {"map": True}, StoreError, "none of its 2 images has an embedding"),
    ):
        with pytest.raises(kind, match=what):
            export(store, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--out", "o", "--clusters", "4"], "--clusters has no effect without --format parquet"),
        (["--out", "o", "--map"], "--map has no effect without --format parquet"),
        (["--out", "o", "--pairs", "p.zarr"], "--pairs has no effect without --format parquet"),
        (["--out", "o", "--thumbnails", "64"], "--thumbnails has no effect without --format parquet"),
        (["--out", "o.parquet", "--format", "parquet", "--rows-per-file", "4"], "--rows-per-file has no effect with"),
        (["--out", "o.parquet", "--format", "parquet", "--workers", "1"], "--workers has no effect with one file"),
        (["--out", "o", "--format", "csv"], "'csv' is not one of"),
    ],
)
def test_options_that_have_no_effect(words: list[str], what: str) -> None:
    result = CliRunner().invoke(cli, ["export-embeddings", "nothing.zarr", *words])
    assert (result.exit_code, what in result.output) == (2, True), result.output


def test_the_command_writes_one_file(image_store: Store, tmp_path: Path) -> None:
    words = ["--format", "parquet", "--out", str(tmp_path / "o.parquet"), "--map", "--thumbnails", "16"]
    result = CliRunner().invoke(cli, ["export-embeddings", image_store.path, *words])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'o.parquet'}: embeddings as .parquet\n"
    names = ["row", "key", "file", "vector", "x", "y", "thumbnail"]
    assert pq.read_schema(tmp_path / "o.parquet").names == names
