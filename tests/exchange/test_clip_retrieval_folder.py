"""The layout of clip-retrieval: vectors of any length, and stores written as such folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dimefm.errors import OutputExistsError, StoreError, UnreadableError
from dimefm.exchange.clip_retrieval_folder import Folder, unit
from dimefm.exchange.export_embeddings import ExportFiles, export_embeddings
from dimefm.store.embedding_store import Store
from dimefm.system.shard_work import Seat
from tests.making import tree
from tests.other_processes import run_elsewhere
from tests.stores import random_store

Columns = dict[str, list[Any]]

# -- what comes in ----------------------------------------------------------------------------------------------------


def test_unit_keeps_what_is_a_unit_vector_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    assert unit(vectors)[0].tobytes() == vectors.tobytes()
    doubled, good = unit(vectors * np.float16(2))
    np.testing.assert_allclose(np.linalg.norm(doubled.astype(np.float32), axis=1), 1, atol=1e-3)
    assert good.all()


def test_unit_survives_vectors_whose_squares_overflow() -> None:
    vectors = np.array([[1e30, 0], [0, 1e-30], [3e38, 3e38]], np.float32)
    embedding, good = unit(vectors)
    assert good.all()
    np.testing.assert_allclose(embedding, [[1, 0], [0, 1], [0.5**0.5, 0.5**0.5]], atol=1e-3)


# -- what goes out ----------------------------------------------------------------------------------------------------


def read_folder(root: Path, kind: str) -> Iterator[tuple[str, np.ndarray, Columns]]:
    """Number, vectors and metadata of each file, with NumPy and PyArrow alone."""
    name = {"image": "img_emb", "text": "text_emb"}[kind]
    for path in sorted((root / name).iterdir()):
        number = path.stem.rpartition("_")[2]
        yield number, np.load(path), pq.read_table(root / "metadata" / f"metadata_{number}.parquet").to_pydict()


def test_an_exported_store_reads_with_numpy_and_pyarrow(image_store: Store, image_tar: Path, tmp_path: Path) -> None:
    image_vectors = image_store.read(0, 96)
    keys = [entry["key"] for entry in image_store.samples(np.arange(96))]
    out = Path(export_embeddings(image_store.path, str(tmp_path / "out")))
    assert sorted(entry.name for entry in out.iterdir()) == ["img_emb", "metadata"]
    parts = list(read_folder(out, "image"))
    assert [number for number, _, _ in parts] == ["0", "1", "2"]
    for shard, (_, vectors, metadata) in enumerate(parts):
        rows = slice(shard * 32, shard * 32 + 32)
        assert vectors.dtype == np.float16
        assert vectors.tobytes() == image_vectors[rows].tobytes()
        assert metadata["image_path"] == metadata["key"] == keys[rows]
        assert metadata["row"] == list(range(96))[rows]
        assert metadata["file"] == [str(image_tar)] * 32


@pytest.mark.parametrize("rows_per_file", [1, 7, 45, 1000])
def test_rows_without_an_embedding_are_left_out_whatever_the_size_of_the_files(
    tmp_path: Path, rows_per_file: int
) -> None:
    store, values = random_store(tmp_path / "s.zarr", rows=100, shard_rows=32, kind="text", failed=(0, 31, 32, 99))
    out = export_embeddings(store.path, str(tmp_path / "out"), rows_per_file=rows_per_file)
    parts = sorted(read_folder(Path(out), "text"), key=lambda part: part[0])
    good = [row for row in range(100) if row not in (0, 31, 32, 99)]
    assert [row for _, _, metadata in parts for row in metadata["row"]] == good
    assert [text for _, _, metadata in parts for text in metadata["caption"]] == [f"sentence {row}" for row in good]
    assert np.concatenate([vectors for _, vectors, _ in parts]).tobytes() == values[good].tobytes()
    assert all(len(vectors) == len(metadata["row"]) for _, vectors, metadata in parts)


def test_an_export_that_is_stopped_leaves_nothing_and_begins_again(
    image_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(path: Path, data: bytes) -> int:
        if "_2" in path.name:
            raise KeyboardInterrupt
        return write(path, data)

    write = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            export_embeddings(image_store.path, str(out))
    assert list(tmp_path.iterdir()) == []
    export_embeddings(image_store.path, str(out), rows_per_file=96)
    assert [path.name for path in (out / "img_emb").iterdir()] == ["img_emb_0.npy"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_goes_nowhere_where_something_is(image_store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputExistsError):
        export_embeddings(image_store.path, str(tmp_path))
    with pytest.raises(OutputExistsError):
        export_embeddings(image_store.path, str(tmp_path / "thesis.tex"))
    (tmp_path / "empty").mkdir()
    export_embeddings(image_store.path, str(tmp_path / "empty"))
    assert Folder(str(tmp_path / "empty"), "image").rows == 96


def test_a_store_without_any_embedding_is_not_exported(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=3, shard_rows=16, failed=(0, 1, 2))
    with pytest.raises(StoreError, match="none of its 3 images has an embedding"):
        export_embeddings(store.path, str(tmp_path / "out"))


def test_an_unfinished_store_is_not_exported(image_store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(image_store.path, tmp_path / "copy.zarr"))
    (copy / "commits" / "000001.json").unlink()
    with pytest.raises(StoreError, match="unfinished"):
        export_embeddings(str(copy), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_workers_elsewhere_write_the_same_files(tmp_path: Path) -> None:
    """A file without any row is left out."""
    store, _ = random_store(tmp_path / "s.zarr", rows=60, shard_rows=16, failed=(3, *range(20, 30)))
    alone = export_embeddings(store.path, str(tmp_path / "alone"), rows_per_file=10)
    found = export_embeddings(store.path, str(tmp_path / "elsewhere"), rows_per_file=10, run=run_elsewhere)
    assert tree(Path(found)) == tree(Path(alone))
    assert len(tree(Path(alone))) == 2 * 5


def test_a_machine_without_the_mount_writes_nothing(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "s.zarr", rows=16, shard_rows=16)
    for places in ((str(tmp_path / "gone"), str(tmp_path)), (store.path, str(tmp_path / "gone"))):
        with pytest.raises(UnreadableError, match=r"gone"):
            ExportFiles(*places, "out", 16).open(Seat())
