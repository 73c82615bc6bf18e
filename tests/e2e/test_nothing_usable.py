"""A command that gets nothing usable, or whose every row fails, says why and does not exit with 0."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from dimefm.caching.worker import none_usable
from dimefm.cli import cli
from dimefm.datasets.own_sets import open_folder
from dimefm.errors import SourceError
from dimefm.images.decode import decode_rgb
from dimefm.store.embedding_store import Store
from pipeline.cache import CacheConfig, cache
from tests.stores import random_store
from tests.tiny_clip import WIDTH, write_clip

WHY = "UNDECODABLE: 4, such as row 0 (k0 in f): made so"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture(scope="module")
def nan_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(write_clip(tmp_path_factory.mktemp("nan") / "clip"))
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    nothing = {name: torch.full_like(weights[name], torch.nan) for name in ("visual.proj", "text_projection")}
    save_file({**weights, **nothing}, file, metadata={"format": "pt"})
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: object) -> str:
    """What a command says that does not exit with 0."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    return result.output


def write_images(folder: Path, *, good: int = 0, bad: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(good):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"good{number}.png")
    for number in range(bad):
        (folder / f"bad{number}.jpg").write_bytes(b"no image")
    return folder


def write_set(folder: Path, *, good: int = 0, bad: int = 0) -> Path:
    for name in ("cat", "dog"):
        write_images(folder / name, good=good, bad=bad)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "templates.txt").write_text("a {c}\n")
    return folder


@pytest.fixture
def empty_images(tmp_path: Path) -> Store:
    return random_store(tmp_path / "e.zarr", rows=4, shard_rows=16, failed=(0, 1, 2, 3))[0]


@pytest.fixture
def empty_texts(tmp_path: Path) -> Store:
    return random_store(tmp_path / "et.zarr", rows=4, shard_rows=16, kind="text", failed=(0, 1, 2, 3))[0]


@pytest.fixture
def texts(tmp_path: Path) -> Store:
    return random_store(tmp_path / "t.zarr", rows=20, shard_rows=16, kind="text")[0]


@pytest.fixture
def images(tmp_path: Path) -> Store:
    return random_store(tmp_path / "i.zarr", rows=20, shard_rows=16)[0]


# -- stage 1 ----------------------------------------------------------------------------------------------------------


def test_a_job_whose_every_image_fails_ends_with_an_error_and_keeps_what_it_wrote(tmp_path: Path, clip: Path) -> None:
    source, out = write_images(tmp_path / "in", bad=3), tmp_path / "i.zarr"
    job = ("cache-images", source, "--out", out, "--teacher", f"local-dir:{clip}")
    said = refused(*job)
    assert "none of its 3 images has an embedding\n  - UNDECODABLE: 3, such as row 0 (bad0 in " in said
    assert f"dimefm info {out} --failures" in said
    assert run("info", out, "--failures").output.count("UNDECODABLE") == 3
    assert "none of its 3 images" in refused(*job)  # nothing is to be done, and nothing is there


def test_a_job_of_which_some_rows_fail_is_one_that_succeeds(tmp_path: Path, clip: Path) -> None:
    source, out = write_images(tmp_path / "in", good=1, bad=2), tmp_path / "i.zarr"
    job = ("cache-images", source, "--out", out, "--teacher", f"local-dir:{clip}")
    result = run(*job, "--retry-failed")  # of a new store: what failed is tried again, and what is new was achieved
    assert result.exit_code == 0, result.output
    assert "OK 1, UNDECODABLE 2" in result.stdout
    said = refused(*job, "--retry-failed")
    assert "none of the 2 rows that had failed could be mended\n  - UNDECODABLE: 2, such as row 0 (bad0 in" in said
    assert Store(str(out)).contents.good == 1


def test_a_retry_with_nothing_to_retry_succeeds(tmp_path: Path, clip: Path) -> None:
    source = write_images(tmp_path / "in", good=1)
    job = ("cache-images", source, "--out", tmp_path / "i.zarr", "--teacher", f"local-dir:{clip}", "--retry-failed")
    assert [run(*job).exit_code for _ in range(2)] == [0, 0]


def test_a_teacher_that_gives_nan_stops_at_the_first_shard(tmp_path: Path, nan_clip: Path) -> None:
    source, out = tmp_path / "t.txt", tmp_path / "t.zarr"
    source.write_text("".join(f"sentence {number}\n" for number in range(48)))
    said = refused("cache-texts", source, "--out", out, "--teacher", f"local-dir:{nan_clip}", "--shard-rows", 16)
    assert "none of its 16 texts has an embedding\n  - NOT_FINITE: 16, such as row 0 (t.txt:1)" in said
    assert "another --precision" in said
    assert Store(str(out)).committed() == {0}


def test_a_shard_without_a_usable_row_is_told_of_while_a_job_goes_on(
    tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "in", good=16, bad=32)
    config = CacheConfig(
        kind="image", sources=(str(source),), out=str(tmp_path / "i.zarr"), teacher=f"local-dir:{clip}", shard_rows=16,
        workers=1,
    )  # fmt: skip
    store = cache(config)
    said = capfd.readouterr().err
    assert said.count("no row of shard 0 has an embedding (UNDECODABLE 16)") == 1
    assert "shard 1" not in said  # one line is enough
    assert [bool(none_usable(commit)) for commit in store.commits()] == [True, True, False]


def test_an_import_of_zeros_alone_is_an_error(tmp_path: Path, clip: Path) -> None:
    folder = tmp_path / "in"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.zeros((3, WIDTH), np.float16))
    pq.write_table(pa.table({"image_path": ["a.jpg", "b.jpg", "c.jpg"]}), folder / "metadata" / "metadata_0.parquet")
    said = refused("import-embeddings", folder, "--out", tmp_path / "i.zarr", "--kind", "image",
                   "--teacher", f"local-dir:{clip}")  # fmt: skip
    assert "none of its 3 images has an embedding\n  - NOT_FINITE: 3, such as row 0 (a.jpg)" in said


# -- what is made from stores -----------------------------------------------------------------------------------------


def test_what_needs_embeddings_refuses_a_store_without(
    tmp_path: Path, empty_images: Store, empty_texts: Store, images: Store, texts: Store
) -> None:
    out = ("--out", tmp_path / "out")
    train = ("train-student", *out, "--student", "resnet18")
    for command in (
        ("build-index", empty_images.path, *out),
        ("build-index", empty_images.path, *out, "--dry-run"),
        ("build-index", empty_images.path, *out, "--partial"),
        ("build-index", texts.path, *out, "--queries", empty_images.path),
        ("retrieve", empty_images.path, "--texts", texts.path, *out),
        ("retrieve", images.path, "--texts", empty_texts.path, *out),
        ("export-embeddings", empty_images.path, *out),
        (*train, "--images", empty_images.path, "--texts", texts.path),
        (*train, "--images", images.path, "--texts", empty_texts.path),
    ):
        said = refused(*command)
        assert "none of its 4" in said, command
        assert WHY in said, command
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_search_that_finds_nothing_is_an_error_and_verify_says_that_there_is_no_embedding(
    tmp_path: Path, clip: Path
) -> None:
    source, out = write_images(tmp_path / "in", bad=2), tmp_path / "i.zarr"
    refused("cache-images", source, "--out", out, "--teacher", f"local-dir:{clip}")
    assert "none of its 2 images has an embedding" in refused("search", out, "--text", "a cat")
    said = refused("verify", out)
    assert "failed  UNDECODABLE: 2, such as row 0 (bad0 in " in said
    assert "the store is as it was written, but no row has an embedding" in said


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_a_set_of_which_no_image_has_features_is_no_result(tmp_path: Path, clip: Path, nan_clip: Path) -> None:
    bad, good = write_set(tmp_path / "bad", bad=2), write_set(tmp_path / "good", good=2)
    out = ("--out", tmp_path / "out")
    said = refused("evaluate", f"local-dir:{clip}", bad, good, *out)
    assert f"bad: FAILED: {bad}: none of the 4 images has features\n  - UNDECODABLE: 4, such as row 0 (cat/bad0" in said
    assert "own-good" in said
    said = refused("evaluate", f"local-dir:{nan_clip}", good, *out, "--name", "nan")
    assert "NOT_FINITE: 4, such as row 0 (cat/good0" in said
    assert not (tmp_path / "out" / "nan" / "results.jsonl").exists()


def test_a_probe_of_captions_is_refused(tmp_path: Path, clip: Path) -> None:
    folder, image = tmp_path / "captions", io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    folder.mkdir()
    pq.write_table(pa.table({"image": [image.getvalue()], "caption": ["a cat"]}), folder / "test.parquet")
    said = refused("evaluate", f"local-dir:{clip}", folder, "--task", "linear-probe", "--out", tmp_path / "out")
    assert "has captions, and linear-probe needs classes" in said


def test_a_set_to_validate_with_needs_an_image_that_can_be_read(tmp_path: Path) -> None:
    bad = open_folder(str(write_set(tmp_path / "bad", bad=2)))
    with pytest.raises(SourceError, match=r"none of the 4 images can be read\n  - 4 images: "):
        bad.require_readable(decode_rgb)
    open_folder(str(write_set(tmp_path / "mixed", good=1, bad=2))).require_readable(decode_rgb)


def test_models_that_have_nothing_in_common_are_not_compared(tmp_path: Path, clip: Path) -> None:
    out, model = tmp_path / "out", f"local-dir:{clip}"
    for name in ("one", "two"):
        assert run("evaluate", model, write_set(tmp_path / name, good=1), "--out", out, "--name", name).exit_code == 0
    said = refused("compare", out / "one", out / "two")
    assert "no set and protocol in common" in said
    assert "own-two zero-shot" in said
    assert run("compare", out / "one").exit_code == 0
    (out / "none").mkdir()
    (out / "none" / "results.jsonl").touch()
    assert "has no result" in refused("compare", out / "one", out / "none")


def test_a_folder_of_sets_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert "is no folder" in refused("sets", "--data", tmp_path / "nowhere")
