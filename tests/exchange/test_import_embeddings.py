"""Embeddings of others become stores, and which image each of their rows is."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageOps

from cache_schemas import Status
from dimefm.cli import cli
from dimefm.errors import DimefmError, MismatchError, OutputExistsError, SourceError, StoreError, TrainingError
from dimefm.exchange.clip_retrieval_folder import Folder
from dimefm.exchange.export_embeddings import export_embeddings
from dimefm.exchange.import_embeddings import ImportConfig, import_embeddings
from dimefm.exchange.match_names import stem
from dimefm.images.preprocess import Preprocess
from dimefm.inspection.info import describe
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.retrieval.build_index import IndexConfig, build_index
from dimefm.retrieval.retrieve import retrieve
from dimefm.sources.account import Account
from dimefm.store.embedding_store import Store
from dimefm.system import lock, storage
from dimefm.training.train import train
from tests.making import encoded, make_jpeg, picture, read_tar, write_tar
from tests.tiny_training import tiny_config

SHARD_ROWS = 32
Columns = dict[str, list[Any]]


def write_folder(
    root: Path, kind: str, vectors_ND: np.ndarray, columns: Columns, numbers: tuple[str, ...] = ("0", "1")
) -> Path:
    """The layout as clip-retrieval writes it: the rows shared out over files with these numbers."""
    name = {"image": "img_emb", "text": "text_emb"}[kind]
    (root / name).mkdir(parents=True)
    (root / "metadata").mkdir(exist_ok=True)
    parts = np.array_split(np.arange(len(vectors_ND)), len(numbers))
    for number, rows in zip(numbers, parts, strict=True):
        np.save(root / name / f"{name}_{number}.npy", vectors_ND[rows])
        table = pa.table({column: values[rows[0] : rows[-1] + 1] for column, values in columns.items()})
        pq.write_table(table, root / "metadata" / f"metadata_{number}.parquet")
    return root


def in_one_line(shown: str) -> str:
    """What is shown, without the ends of its lines."""
    return " ".join(shown.split())


@pytest.fixture(scope="module")
def captions(text_store: Store) -> list[str]:
    return [entry["text"] for entry in text_store.samples(np.arange(text_store.schema.rows))]


@pytest.fixture(scope="module")
def keys(image_store: Store) -> list[str]:
    return [entry["key"] for entry in image_store.samples(np.arange(image_store.schema.rows))]


@pytest.fixture(scope="module")
def text_vectors(text_store: Store) -> np.ndarray:
    return text_store.read(0, text_store.schema.rows)


@pytest.fixture(scope="module")
def image_vectors(image_store: Store) -> np.ndarray:
    return image_store.read(0, image_store.schema.rows)


@pytest.fixture
def texts(tmp_path: Path, text_vectors: np.ndarray, captions: list[str]) -> Path:
    """The text store's embeddings as clip-retrieval would have written them."""
    return write_folder(tmp_path / "texts", "text", text_vectors, {"caption": captions, "url": captions})


@pytest.fixture
def images(tmp_path: Path, image_vectors: np.ndarray, keys: list[str]) -> Path:
    """The image store's embeddings as clip-retrieval would have written them."""
    return write_folder(tmp_path / "images", "image", image_vectors, {"image_path": keys, "caption": keys})


@pytest.fixture
def config(tmp_path: Path, teacher_name: str) -> ImportConfig:
    """An import of texts; what is imported in a test replaces `folder` and `kind`."""
    out = str(tmp_path / "out.zarr")
    return ImportConfig(folder="", out=out, kind="text", teacher=teacher_name, shard_rows=SHARD_ROWS)


def of(config: ImportConfig, folder: Path, **changes: Any) -> ImportConfig:
    return replace(config, folder=str(folder), **changes)


def files_below(folder: Path | str) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# -- what comes in ----------------------------------------------------------------------------------------------------


def test_texts_become_a_finished_store_row_by_row(
    config: ImportConfig, texts: Path, text_vectors: np.ndarray, captions: list[str]
) -> None:
    lines: list[str] = []
    store = import_embeddings(of(config, texts), lines.append)
    store.require_complete()
    assert store.schema.kind == "text"
    assert store.schema.batch_size == 1
    assert store.schema.source.problems == ()
    assert store.read(0, 200).tobytes() == text_vectors.tobytes()
    assert (store.status() == Status.OK).all()
    entries = store.samples(np.arange(200))
    assert [entry["text"] for entry in entries] == captions
    assert entries[0]["key"] == "text_emb_0.npy:0"
    assert entries[150]["key"] == "text_emb_1.npy:50"
    assert len(lines) == 1
    assert lines[0].startswith("mean cosine 1.0000")
    assert "8 of 8 rows" in lines[0]


def test_images_with_their_sources_are_planned_as_if_they_had_been_cached(
    config: ImportConfig, images: Path, image_tar: Path, image_store: Store, image_vectors: np.ndarray
) -> None:
    lines: list[str] = []
    store = import_embeddings(of(config, images, kind="image", sources=(str(image_tar),)), lines.append)
    assert store.read(0, 96).tobytes() == image_vectors.tobytes()
    assert store.samples(np.arange(96)) == image_store.samples(np.arange(96))
    assert lines[0] == "96 of 96 rows have an image in the sources: 96 by the whole key or path"
    assert lines[1].endswith("8 of 8 rows encoded again")
    assert store.schema.source.problems == ()


def test_an_imported_store_passes_its_verification(config: ImportConfig, images: Path, image_tar: Path) -> None:
    store = import_embeddings(of(config, images, kind="image", sources=(str(image_tar),)))
    report = verify(VerifyConfig(store=store.path, sample=8))
    assert report.trusted, report.show()
    assert {f"rows/{name}.parquet" for name in ("000000", "000002", "files")} < store.schema.digests.keys()


def test_a_trainer_learns_from_imported_stores(
    config: ImportConfig, images: Path, texts: Path, image_tar: Path, tmp_path: Path
) -> None:
    sources = (str(image_tar),)
    image = import_embeddings(of(config, images, kind="image", sources=sources, out=str(tmp_path / "i.zarr")))
    text = import_embeddings(of(config, texts, out=str(tmp_path / "t.zarr")))
    assert train(tiny_config(image, text, tmp_path / "run", max_steps=2)).steps == 2


def test_without_sources_images_serve_retrieve_and_the_store_says_what_they_do_not(
    config: ImportConfig, images: Path, text_store: Store, tmp_path: Path
) -> None:
    store = import_embeddings(of(config, images, kind="image"))
    places = {(entry["file"], entry["offset"], entry["size"]) for entry in store.samples(np.arange(96))}
    assert places == {("", 0, 0)}
    assert "serves retrieve, but not train-student" in in_one_line(describe(store.path))
    assert "not compared with the teacher" in in_one_line(describe(store.path))
    with pytest.raises(TrainingError, match=r"imported without the images(?s:.*)--images"):
        train(tiny_config(store, text_store, tmp_path / "run"))
    index, pairs = str(tmp_path / "texts.index"), str(tmp_path / "pairs.zarr")
    build_index(IndexConfig(store=text_store.path, out=index))
    assert retrieve(store.path, text_store.path, index=index, top_k=4, out=pairs).images == 96


@pytest.mark.parametrize("numbers", [("9", "10", "11"), ("09", "10", "011")])
def test_files_come_in_the_order_of_their_numbers(
    tmp_path: Path, config: ImportConfig, text_vectors: np.ndarray, captions: list[str], numbers: tuple[str, ...]
) -> None:
    folder = write_folder(tmp_path / "in", "text", text_vectors, {"caption": captions}, numbers)
    store = import_embeddings(of(config, folder))
    assert store.read(0, 200).tobytes() == text_vectors.tobytes()


def test_vectors_of_any_length_are_normalised(
    tmp_path: Path, config: ImportConfig, text_vectors: np.ndarray, captions: list[str]
) -> None:
    scale = np.linspace(1e-3, 1e3, 200, dtype=np.float32)[:, None]
    folder = write_folder(tmp_path / "in", "text", text_vectors.astype(np.float32) * scale, {"caption": captions})
    read = import_embeddings(of(config, folder)).read(0, 200).astype(np.float32)
    np.testing.assert_allclose(read, text_vectors.astype(np.float32), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), 1, atol=1e-3)


def test_vectors_that_cannot_be_normalised_keep_their_rows(
    tmp_path: Path, config: ImportConfig, text_vectors: np.ndarray, captions: list[str]
) -> None:
    vectors = text_vectors.copy()
    vectors[3, 5], vectors[40, 0], vectors[199] = np.nan, np.inf, 0
    store = import_embeddings(of(config, write_folder(tmp_path / "in", "text", vectors, {"caption": captions})))
    bad = [3, 40, 199]
    assert np.flatnonzero(store.status() == Status.NOT_FINITE).tolist() == bad
    assert not store.gather(np.array(bad)).any()
    good = np.setdiff1d(np.arange(200), bad)
    assert store.gather(good).tobytes() == text_vectors[good].tobytes()
    failures = [failure for commit in store.commits() for failure in commit.failures]
    assert [(f.row, f.status) for f in failures] == [(row, "NOT_FINITE") for row in bad]
    assert "NaN, infinite or zero" in failures[0].reason


def test_a_row_without_a_caption_is_an_empty_sentence_and_counted(
    tmp_path: Path, config: ImportConfig, text_vectors: np.ndarray, captions: list[str]
) -> None:
    columns: Columns = {"caption": [None, *captions[1:]]}
    store = import_embeddings(of(config, write_folder(tmp_path / "in", "text", text_vectors, columns)))
    assert store.samples(np.array([0, 1]))[0]["text"] == ""
    assert store.schema.source.problems == ("rows without a caption, whose sentence is empty: 1",)


def test_export_then_import_gives_the_same_bytes(
    image_store: Store, text_store: Store, config: ImportConfig, image_tar: Path, tmp_path: Path
) -> None:
    for store, kind, sources in ((image_store, "image", (str(image_tar),)), (text_store, "text", ())):
        folder = Path(export_embeddings(store.path, str(tmp_path / kind), rows_per_file=50))
        back = import_embeddings(of(config, folder, kind=kind, sources=sources, out=str(tmp_path / f"{kind}.zarr")))
        rows = store.schema.rows
        assert back.read(0, rows).tobytes() == store.read(0, rows).tobytes()
        assert (back.status() == store.status()).all()
        column = "file" if kind == "image" else "text"
        mine, theirs = back.samples(np.arange(rows)), store.samples(np.arange(rows))
        assert [entry[column] for entry in mine] == [entry[column] for entry in theirs]


# -- which image a row is ---------------------------------------------------------------------------------------------


def test_images_are_found_by_the_last_part_of_a_path_from_another_machine_where_only_one_has_it(
    tmp_path: Path,
    config: ImportConfig,
    image_vectors: np.ndarray,
    image_tar: Path,
    image_store: Store,
    keys: list[str],
) -> None:
    last = [key.rpartition("/")[2] for key in keys]
    once = np.array([last.count(name) == 1 for name in last])
    assert 0 < once.sum() < 96
    columns: Columns = {"image_path": [f"/there/{name}.jpg" for name in last]}
    folder = write_folder(tmp_path / "in", "image", image_vectors, columns)
    store = import_embeddings(of(config, folder, kind="image", sources=(str(image_tar),)))
    assert store.status().tolist() == np.where(once, Status.OK, Status.MISSING).tolist()
    rows = np.flatnonzero(once)
    places = [[(entry["file"], entry["offset"]) for entry in s.samples(rows)] for s in (store, image_store)]
    assert places[0] == places[1]


def test_files_of_a_folder_are_found_by_their_path(
    tmp_path: Path, config: ImportConfig, image_vectors: np.ndarray, image_tar: Path
) -> None:
    """The two have the same last part, so nothing else tells them apart."""
    paths = [tmp_path / "pictures" / name / "0.jpg" for name in ("b", "a")]
    for path, data in zip(paths, read_tar(image_tar, 2).values(), strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    columns: Columns = {"image_path": [str(path) for path in paths]}
    folder = write_folder(tmp_path / "in", "image", image_vectors[:2], columns)
    store = import_embeddings(of(config, folder, kind="image", sources=(str(tmp_path / "pictures"),)))
    assert [entry["file"] for entry in store.samples(np.arange(2))] == [str(path) for path in paths]


def test_rows_without_an_image_are_counted_and_left_out_of_training(
    tmp_path: Path, config: ImportConfig, images: Path, image_tar: Path, keys: list[str], image_vectors: np.ndarray
) -> None:
    members = read_tar(image_tar, 96)
    fewer = write_tar(tmp_path / "fewer.tar", dict(list(members.items())[10:]))
    lines: list[str] = []
    store = import_embeddings(of(config, images, kind="image", sources=(str(fewer),)), lines.append)
    assert lines[0] == "86 of 96 rows have an image in the sources: 86 by the whole key or path"
    assert store.status().tolist() == [Status.MISSING] * 10 + [Status.OK] * 86
    assert not store.read(0, 10).any()
    assert store.read(10, 96).tobytes() == image_vectors[10:].tobytes()
    failure = next(store.commits()).failures[0]
    assert (failure.key, failure.status) == (keys[0], "MISSING")
    assert failure.reason.startswith("no image of the sources has this key")


def test_sources_with_none_of_the_images_are_refused_with_an_example_of_both(
    tmp_path: Path, config: ImportConfig, images: Path, keys: list[str]
) -> None:
    other = write_tar(tmp_path / "other.tar", {"elsewhere/zebra.jpg": make_jpeg()})
    with pytest.raises(SourceError) as caught:
        import_embeddings(of(config, images, kind="image", sources=(str(other),)))
    assert repr(keys[0]) in str(caught.value)
    assert "'elsewhere/zebra'" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "expected"), [("key", ["a", "img_emb_0.npy:1", "c"]), ("url", [f"img_emb_0.npy:{i}" for i in range(3)])]
)
def test_images_without_a_path_are_called_by_their_key_or_their_place(
    tmp_path: Path, config: ImportConfig, image_vectors: np.ndarray, column: str, expected: list[str]
) -> None:
    folder = write_folder(tmp_path / "in", "image", image_vectors[:3], {column: ["a", None, "c"]}, ("0",))
    store = import_embeddings(of(config, folder, kind="image"))
    assert [entry["key"] for entry in store.samples(np.arange(3))] == expected


def test_a_key_that_comes_twice_means_no_image(
    tmp_path: Path, config: ImportConfig, image_vectors: np.ndarray, image_tar: Path, keys: list[str]
) -> None:
    columns: Columns = {"image_path": [keys[0], keys[0], *keys[2:]]}
    folder = write_folder(tmp_path / "in", "image", image_vectors, columns)
    store = import_embeddings(of(config, folder, kind="image", sources=(str(image_tar),)))
    assert store.status().tolist() == [Status.MISSING] * 2 + [Status.OK] * 94
    assert store.schema.source.repeated_keys == 1


def test_rows_with_the_extension_of_a_file_are_found_in_tars(
    tmp_path: Path,
    config: ImportConfig,
    image_vectors: np.ndarray,
    image_tar: Path,
    image_store: Store,
    keys: list[str],
) -> None:
    """Many of which have the same last part."""
    columns: Columns = {"image_path": [f"/there/{key}.jpg" for key in keys]}
    folder, lines = write_folder(tmp_path / "in", "image", image_vectors, columns), list[str]()
    store = import_embeddings(of(config, folder, kind="image", sources=(str(image_tar),)), lines.append)
    assert (store.status() == Status.OK).all()
    places = [[(entry["file"], entry["offset"]) for entry in s.samples(np.arange(96))] for s in (store, image_store)]
    assert places[0] == places[1]
    assert lines[0].endswith("53 by the last 4 parts, 43 by the last 3 parts")
    assert lines[1].endswith("8 of 8 rows encoded again, 8 of them matched by the last 3 parts")


def test_the_weakest_matches_are_compared_and_can_be_left_out(
    tmp_path: Path, config: ImportConfig, image_vectors: np.ndarray, image_tar: Path, keys: list[str]
) -> None:
    """A row whose number another set has too is paired with a stranger, which the comparison must see among many."""
    members = dict(list(read_tar(image_tar, 96).items()))
    stranger, *others = members
    tar = write_tar(tmp_path / "mixed.tar", {"sbu/05009.jpg": members[stranger], **{n: members[n] for n in others[1:]}})
    columns: Columns = {"image_path": ["none/at-all", "cc3m/05009", *keys[2:]]}
    mine = of(config, write_folder(tmp_path / "in", "image", image_vectors, columns), kind="image", sources=(str(tar),))
    with pytest.raises(
        MismatchError, match=r"1 of them matched by the last part alone.*least .*row 1 \('cc3m/05009'\)"
    ) as e:
        import_embeddings(mine)
    assert "--match-parts 2 leaves rows without an image" in str(e.value)
    store = import_embeddings(replace(mine, match_parts=2))
    assert store.status().tolist() == [Status.MISSING] * 2 + [Status.OK] * 94
    assert import_embeddings(replace(mine, match_parts=2)).path == store.path
    with pytest.raises(MismatchError, match="match_parts: 2 != None"):
        import_embeddings(mine)
    accepted = import_embeddings(replace(mine, accept=True, out=str(tmp_path / "accepted.zarr")))
    assert "rows whose image shares the last part alone with their key: 1" in in_one_line(describe(accepted.path))


def test_ambiguous_rows_are_counted_with_examples(
    tmp_path: Path, config: ImportConfig, image_vectors: np.ndarray, image_tar: Path
) -> None:
    members = list(read_tar(image_tar, 3).values())
    tar = write_tar(tmp_path / "s.tar", dict(zip(["a/1.jpg", "b/1.jpg", "b/2.jpg"], members, strict=True)))
    columns: Columns = {"image_path": ["c/1.jpg", "d/1.jpg", "b/2.jpg"]}
    folder, lines = write_folder(tmp_path / "in", "image", image_vectors[:3], columns, ("0",)), list[str]()
    store = import_embeddings(of(config, folder, kind="image", sources=(str(tar),), check=0), lines.append)
    assert lines[0] == "1 of 3 rows have an image in the sources: 1 by the whole key or path"
    assert lines[1].startswith("rows without an image, as several match as well as each other: 2")
    assert lines[1].endswith("such as 'c/1.jpg', 'd/1.jpg'")
    assert lines[1] in store.schema.source.problems
    columns = {"image_path": ["c/1.jpg", "d/1.jpg", "e/1.jpg"]}
    folder = write_folder(tmp_path / "none", "image", image_vectors[:3], columns, ("0",))
    with pytest.raises(SourceError, match=r"3 rows of .* match several images each"):
        import_embeddings(of(config, folder, kind="image", sources=(str(tar),), out=str(tmp_path / "none.zarr")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b/000012", "000012"), ("/x/cat.JPG", "cat"), ("x/v1.5", "v1.5"), ("v1.5.png", "v1.5"), (".jpg", ".jpg")],
)
def test_stem_takes_off_folders_and_the_extension_of_an_image(name: str, expected: str) -> None:
    assert stem(name) == expected


# -- who made them ----------------------------------------------------------------------------------------------------


def test_embeddings_of_another_teacher_are_refused_with_their_cosine(
    tmp_path: Path, config: ImportConfig, captions: list[str], text_vectors: np.ndarray
) -> None:
    vectors = np.random.default_rng(0).standard_normal(text_vectors.shape).astype(np.float32)
    folder = write_folder(tmp_path / "in", "text", vectors, {"caption": captions})
    with pytest.raises(MismatchError, match=r"mean cosine -?0\.\d{4}.*not from that teacher"):
        import_embeddings(of(config, folder))
    assert not Path(config.out).exists()  # a second try with the right teacher is not in the way of this one
    store = import_embeddings(of(config, folder, accept=True))
    assert "accepted at a mean cosine" in in_one_line(describe(store.path))


def test_metadata_that_is_shifted_by_a_row_is_refused(
    tmp_path: Path, config: ImportConfig, captions: list[str], text_vectors: np.ndarray
) -> None:
    shifted: Columns = {"caption": captions[1:] + captions[:1]}
    with pytest.raises(MismatchError, match="mean cosine"):
        import_embeddings(of(config, write_folder(tmp_path / "in", "text", text_vectors, shifted)))


def test_images_are_compared_too(
    tmp_path: Path, config: ImportConfig, keys: list[str], image_vectors: np.ndarray, image_tar: Path
) -> None:
    folder = write_folder(tmp_path / "in", "image", image_vectors[::-1], {"image_path": keys})
    with pytest.raises(MismatchError, match=r"8 of 8 rows encoded again.*not of these images"):
        import_embeddings(of(config, folder, kind="image", sources=(str(image_tar),)))


def oriented_jpeg(seed: int) -> bytes:
    """A photograph as a telephone saves it that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture((96, 64), colour=(200, 90, 30 * seed), seed=seed), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("turned", "changes", "said"),
    [
        (True, {}, r"if the images are turned by their EXIF orientation, which is not followed here"),
        (False, {"resize_mode": "squash"}, r"if the images are squashed to the square"),
        (False, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, r"normalised by Inception's"),
        (
            True,
            {"resize_mode": "squash"},
            r"turned by their EXIF orientation, which [a-z ]* and squashed to the square",
        ),
    ],
)
def test_a_failed_comparison_says_what_would_fit(
    tmp_path: Path, config: ImportConfig, clip: Clip, turned: bool, changes: dict[str, Any], said: str
) -> None:
    jpegs = {f"{seed}.jpg": oriented_jpeg(seed) for seed in range(4)}
    identity = replace(clip.identity, preprocessing=replace(clip.identity.preprocessing, **changes))
    theirs = Clip(clip.model, clip.tokenizer, identity, clip.model_cfg, "cpu")
    opened = [Image.open(io.BytesIO(data)) for data in jpegs.values()]
    seen = [ImageOps.exif_transpose(image) for image in opened] if turned else opened
    pixels = torch.stack([Preprocess(identity.preprocessing, exact=True).apply(image) for image in seen])
    folder = write_folder(tmp_path / "in", "image", theirs.encode_images(pixels).numpy(), {"image_path": list(jpegs)})
    tar = write_tar(tmp_path / "a.tar", jpegs)
    with pytest.raises(MismatchError, match=rf"of the \d rows below 0.99, they fit \(mean cosine [01].*{said}"):
        import_embeddings(of(config, folder, kind="image", sources=(str(tar),), check=4))


def test_a_failed_comparison_that_nothing_explains_counts_orientations(
    tmp_path: Path, config: ImportConfig, clip: Clip
) -> None:
    jpegs = {"0.jpg": oriented_jpeg(0), "1.jpg": make_jpeg((96, 64), seed=1)}
    vectors = np.random.default_rng(0).standard_normal((2, clip.identity.embed_dim)).astype(np.float32)
    folder = write_folder(tmp_path / "in", "image", vectors, {"image_path": list(jpegs)})
    tar = write_tar(tmp_path / "a.tar", jpegs)
    with pytest.raises(MismatchError, match=r"of the 2 rows below 0\.99, 1 of the images have an EXIF orientation"):
        import_embeddings(of(config, folder, kind="image", sources=(str(tar),)))


def test_rows_that_cannot_be_compared_do_not_count_as_equal(
    tmp_path: Path, config: ImportConfig, captions: list[str], text_vectors: np.ndarray
) -> None:
    folder = write_folder(tmp_path / "in", "text", np.zeros_like(text_vectors), {"caption": captions})
    with pytest.raises(SourceError, match="8 are NaN, infinite or zero"):
        import_embeddings(of(config, folder))


def test_another_width_is_refused(
    tmp_path: Path, config: ImportConfig, captions: list[str], text_vectors: np.ndarray
) -> None:
    folder = write_folder(tmp_path / "in", "text", text_vectors[:, :100], {"caption": captions})
    with pytest.raises(MismatchError, match=f"100 wide.*{text_vectors.shape[1]}"):
        import_embeddings(of(config, folder, accept=True))


# -- folders that are not what they should be -------------------------------------------------------------------------


class Trap:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_array_of_objects_is_refused_and_nothing_is_unpickled(
    texts: Path, config: ImportConfig, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    objects = np.array([[Trap(sprung)] * 4] * 100, object)
    np.save(texts / "text_emb" / "text_emb_1.npy", objects, allow_pickle=True)
    with pytest.raises(SourceError, match=r"text_emb_1\.npy cannot be read as a plain \.npy"):
        import_embeddings(of(config, texts))
    (texts / "text_emb" / "text_emb_1.npy").write_bytes(objects.dumps())
    with pytest.raises(SourceError, match=r"text_emb_1\.npy cannot be read as a plain \.npy"):
        import_embeddings(of(config, texts))
    assert not sprung.exists()


def test_metadata_of_another_length_is_refused(texts: Path, config: ImportConfig) -> None:
    path = texts / "metadata" / "metadata_1.parquet"
    pq.write_table(pq.read_table(path).slice(0, 99), path)
    with pytest.raises(SourceError, match=r"text_emb_1\.npy has 100 rows and .*metadata_1\.parquet has 99"):
        import_embeddings(of(config, texts))


def test_texts_without_captions_are_refused(
    tmp_path: Path, config: ImportConfig, captions: list[str], text_vectors: np.ndarray
) -> None:
    folder = write_folder(tmp_path / "in", "text", text_vectors, {"url": captions, "key": captions})
    with pytest.raises(SourceError, match=r"no column 'caption' \(it has url, key\)"):
        import_embeddings(of(config, folder))


def damage(texts: Path, how: str) -> None:
    emb, metadata = texts / "text_emb", texts / "metadata"
    match how:
        case "no metadata":
            (metadata / "metadata_1.parquet").unlink()
        case "no vectors":
            (emb / "text_emb_1.npy").unlink()
        case "cut":
            os.truncate(emb / "text_emb_1.npy", 5000)
        case "integers":
            np.save(emb / "text_emb_1.npy", np.ones((100, 512), np.int32))
        case "flat":
            np.save(emb / "text_emb_1.npy", np.ones(100, np.float32))
        case "width":
            np.save(emb / "text_emb_1.npy", np.ones((100, 4), np.float32))
        case "twice":
            shutil.copy(emb / "text_emb_1.npy", emb / "text_emb_01.npy")
        case "stranger":
            shutil.copy(emb / "text_emb_1.npy", emb / "extra.npy")
        case "parquet":
            (metadata / "metadata_1.parquet").write_bytes(b"PAR1" + bytes(100))
        case "empty":
            shutil.rmtree(emb)
        case "no rows":
            for number in range(2):
                np.save(emb / f"text_emb_{number}.npy", np.empty((0, 512), np.float16))
                path = metadata / f"metadata_{number}.parquet"
                pq.write_table(pq.read_table(path).slice(0, 0), path)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("no metadata", r"text_emb_1\.npy has no file of its number in metadata/"),
        ("no vectors", r"metadata_1\.parquet has no file of its number in text_emb/"),
        ("cut", "larger|greater"),
        ("integers", r"int32 \(100, 512\)"),
        ("flat", r"float32 \(100,\)"),
        ("width", "4 wide, those before it"),
        ("twice", "have the same number"),
        ("stranger", r"extra\.npy is not named text_emb_<number>\.npy"),
        ("parquet", r"metadata_1\.parquet cannot be read"),
        ("empty", r"holds no text_emb_<number>\.npy"),
        ("no rows", "holds no embedding"),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_written(
    texts: Path, config: ImportConfig, how: str, what: str
) -> None:
    damage(texts, how)
    with pytest.raises(SourceError, match=what) as caught:
        import_embeddings(of(config, texts))
    assert caught.value.remedy
    assert not Path(config.out).exists()


def test_images_for_texts_are_refused(texts: Path, config: ImportConfig, image_tar: Path) -> None:
    with pytest.raises(DimefmError, match="images are given for text embeddings"):
        import_embeddings(of(config, texts, sources=(str(image_tar),)))
    with pytest.raises(DimefmError, match="--match-parts has no effect without --images"):
        import_embeddings(of(config, texts, match_parts=2))


# -- stopped, and typed again -----------------------------------------------------------------------------------------


def test_a_second_import_does_nothing(texts: Path, config: ImportConfig) -> None:
    before = files_below(import_embeddings(of(config, texts)).path)
    import_embeddings(of(config, texts))
    assert files_below(config.out) == before


def test_an_import_goes_on_where_it_was_stopped(texts: Path, config: ImportConfig) -> None:
    before = files_below(import_embeddings(of(config, texts)).path)
    lost = [str(Path(config.out) / name) for name in ("commits/000005.json", "embedding/c/5/0")]
    for path in lost:
        Path(path).unlink()
    import_embeddings(of(config, texts)).require_complete()
    after = files_below(config.out)
    assert after[lost[1]][1] == before[lost[1]][1]
    for path in before:
        if "/5" not in path and "000005" not in path:
            assert after[path] == before[path], path


def test_an_import_that_was_stopped_while_it_planned_plans_again(
    texts: Path, config: ImportConfig, monkeypatch: pytest.MonkeyPatch, text_vectors: np.ndarray
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", lambda path, schema: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_embeddings(of(config, texts))
    assert storage.listing(config.out) == []  # what it had begun is removed
    store = import_embeddings(of(config, texts, shard_rows=64))
    assert store.read(0, 200).tobytes() == text_vectors.tobytes()
    assert verify(VerifyConfig(store=store.path)).trusted  # nothing is left of the first plan


@pytest.fixture
def imported(texts: Path, config: ImportConfig) -> Store:
    """The store at `config.out`, of the folder `texts`."""
    return import_embeddings(of(config, texts))


def test_another_folder_is_refused(imported: Store, texts: Path, config: ImportConfig, tmp_path: Path) -> None:
    other = shutil.copytree(texts, tmp_path / "other")
    with pytest.raises(MismatchError, match="source: "):
        import_embeddings(of(config, other))


def test_a_folder_that_was_written_again_is_refused(imported: Store, texts: Path, config: ImportConfig) -> None:
    os.utime(texts / "text_emb" / "text_emb_1.npy", ns=(1, 1))
    with pytest.raises(MismatchError, match=r"source: .*text_emb_1\.npy has changed: written .* 1970-01-01.* now"):
        import_embeddings(of(config, texts))


def test_another_teacher_is_refused(imported: Store, texts: Path, config: ImportConfig) -> None:
    with pytest.raises(MismatchError, match=r"teacher\.precision: fp32 != bf16"):
        import_embeddings(of(config, texts, precision="bf16"))


def test_other_shards_are_refused(imported: Store, texts: Path, config: ImportConfig) -> None:
    with pytest.raises(MismatchError, match="shard_rows: 32 != 64"):
        import_embeddings(of(config, texts, shard_rows=64))


def test_another_writer_is_refused(texts: Path, config: ImportConfig) -> None:
    with lock.writing(config.out), pytest.raises(StoreError, match="is being written by"):
        import_embeddings(of(config, texts))


def test_something_else_at_out_is_refused_and_left_alone(texts: Path, config: ImportConfig, tmp_path: Path) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        import_embeddings(of(config, texts))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputExistsError, match="is a file"):
        import_embeddings(of(config, texts, out=str(out / "thesis.tex")))


def test_finished_shards_that_nothing_describes_are_refused(imported: Store, texts: Path, config: ImportConfig) -> None:
    (Path(imported.path) / "zarr.json").unlink()
    with pytest.raises(OutputExistsError, match="finished shards but no attributes"):
        import_embeddings(of(config, texts))


def test_shards_of_part_of_a_chunk_are_refused(texts: Path, config: ImportConfig) -> None:
    with pytest.raises(SourceError, match="1,500 rows are not whole chunks"):
        import_embeddings(of(config, texts, shard_rows=1500))


# -- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands(texts: Path, teacher_name: str, tmp_path: Path, text_vectors: np.ndarray) -> None:
    store, folder = tmp_path / "store.zarr", tmp_path / "folder"
    arguments = ["import-embeddings", texts, "--out", store, "--kind", "text", "--teacher", teacher_name]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "mean cosine 1.0000" in result.output
    assert "OK 200" in result.output
    result = CliRunner().invoke(cli, ["export-embeddings", str(store), "--out", str(folder), "--rows-per-file", "200"])
    assert result.exit_code == 0, result.output
    assert np.load(folder / "text_emb" / "text_emb_0.npy").tobytes() == text_vectors.tobytes()


def test_the_import_command_says_what_images_without_pixels_are_for(
    images: Path, teacher_name: str, image_tar: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> str:
        words = ["import-embeddings", str(images), "--out", str(tmp_path / name), "--kind", "image"]
        result = CliRunner().invoke(cli, [*words, "--teacher", teacher_name, *more])
        assert result.exit_code == 0, result.output
        return in_one_line(result.output)

    assert "serves retrieve, but not train-student" in run("without.zarr")
    with_pixels = run("with.zarr", "--images", str(image_tar))
    assert "train-student" not in with_pixels
    assert "96 of 96 rows have an image" in with_pixels


def test_files_that_are_no_embeddings_are_named_as_what_they_are_and_others_counted(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "in", "image", np.eye(3, 8, dtype=np.float16), {"image_path": ["a", "b", "c"]}, ("0",)
    )
    (folder / "img_emb" / "notes.txt").write_text("mine")
    account = Account()
    Folder(str(folder), "image", account)
    assert account.lines() == [f"files beside the .npy of embeddings: 1, {folder}/img_emb/notes.txt"]
    for path in (folder / "metadata" / "metadata_0.parquet", folder / "img_emb" / "img_emb_0.npy"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(SourceError, match=rf"{path.name} cannot .*: it is a Git LFS pointer.*\n  remedy: fetch"):
            Folder(str(folder), "image")
    np.save(path, np.eye(3, 8))
    with pytest.raises(SourceError, match=r"is float64 \(3, 8\).*\n  remedy: .* as float16 or float32"):
        Folder(str(folder), "image")


def test_images_without_an_embedding_are_counted_and_repeated_keys_named(
    config: ImportConfig, image_vectors: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "s.tar", {f"{name}.jpg": make_jpeg() for name in "abcd"})
    lines, columns = list[str](), {"image_path": ["D:\\data\\a.jpg", "b"]}
    folder = write_folder(tmp_path / "in", "image", image_vectors[:2], columns, ("0",))
    words: Any = {"kind": "image", "sources": (str(tar),), "check": 0}
    store = import_embeddings(of(config, folder, **words), lines.append)
    assert lines[0].startswith("2 of 2 rows have an image in the sources: 1 by the whole key")
    assert [(one.reason, one.count) for one in store.schema.source.skipped] == [
        ("images of the sources without an embedding", 2)
    ]
    folder = write_folder(tmp_path / "twice", "image", image_vectors[:2], {"image_path": ["a", "a"]}, ("0",))
    with pytest.raises(SourceError, match=r"1 rows? of .* the key of a row before .*\n  remedy: take away"):
        import_embeddings(of(config, folder, out=str(tmp_path / "twice.zarr"), **words))
