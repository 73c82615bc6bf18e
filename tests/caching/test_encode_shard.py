"""The work of one shard: every row keeps its place, good ones as open_clip has them, bad ones with their reason."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import zarr
from PIL import Image

from cache_schemas import Status
from cache_schemas.embedding_store import EMBEDDING, STATUS
from cache_schemas.plan import PlannedImage, planned_rows
from dimefm.caching.canary import check_canary
from dimefm.caching.encode_rows import encode_rows
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.errors import MismatchError, StoreError, UnreadableError
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from tests.images.test_decode import huge_png
from tests.making import encoded, make_jpeg, picture, read_tar, write_tar

GOOD, BAD = "OK", "UNDECODABLE"


def members() -> dict[str, tuple[bytes, str]]:
    """Name to bytes and expected status: every kind of odd and broken image among good ones."""
    whole = make_jpeg((200, 150), seed=5)
    return {
        "00-jpeg.jpg": (make_jpeg((90, 70), seed=1), GOOD),
        "01-truncated.jpg": (whole[: len(whole) // 2], BAD),
        "02-empty.jpg": (b"", "EMPTY"),
        "03-text.jpg": (b"404 Not Found\n" * 50, BAD),
        "04-cmyk.jpg": (encoded(picture((80, 60), seed=2).convert("CMYK"), "JPEG"), GOOD),
        "05-huge.png": (huge_png(20_000, 20_000), "TOO_LARGE"),
        "06-animated.gif": (
            encoded(picture(seed=3), "GIF", save_all=True, append_images=[picture(seed=4), picture(seed=5)]),
            GOOD,
        ),
        "07-zeros.jpg": (bytes(500), BAD),
        "08-palette.png": (encoded(picture((70, 50), seed=6).quantize(32), "PNG"), GOOD),
        "09-signature.png": (b"\x89PNG\r\n\x1a\n", BAD),
        "10-grey.jpg": (encoded(picture(seed=7).convert("L"), "JPEG"), GOOD),
        "11-rgba.png": (encoded(picture(seed=8).convert("RGBA"), "PNG"), GOOD),
        "12-signature.jpg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", BAD),
        "13-jpeg.jpg": (make_jpeg((300, 200), seed=9), GOOD),
    }


@dataclass(frozen=True)
class Encoded:
    store: Store
    tar: Path


def planned(source: Path, out: Path, clip: Clip, *, shard_rows: int = 8, batch_size: int = 3) -> Store:
    request = PlanRequest(kind="image", arguments=(str(source),), shard_rows=shard_rows, batch_size=batch_size)
    return open_or_plan(request, str(out), clip.identity)


def finish(store: Store, clip: Clip, **options: Any) -> Store:
    for shard in range(store.schema.shards):
        encode_shard(store, shard, clip, **options)
    return store


@pytest.fixture(scope="module")
def mixed(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """The finished store over a tar of `members`."""
    folder = tmp_path_factory.mktemp("mixed")
    tar = write_tar(folder / "mixed.tar", {name: data for name, (data, _) in members().items()})
    return Encoded(finish(planned(tar, folder / "mixed.zarr", clip), clip), tar)


@pytest.fixture(scope="module")
def by_open_clip(teacher_name: str) -> Callable[[list[bytes]], np.ndarray]:
    """Encoded images to unit-norm embeddings with open_clip alone, one image at a time."""
    model, _, transform = open_clip.create_model_and_transforms(teacher_name)
    model.eval()

    def encode(datas: list[bytes]) -> np.ndarray:
        with torch.inference_mode():
            features = [model.encode_image(transform(Image.open(io.BytesIO(data)))[None])[0] for data in datas]
        return torch.nn.functional.normalize(torch.stack(features), dim=-1).numpy()

    return encode


def cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    return (a_ND * b_ND).sum(axis=-1) / (np.linalg.norm(a_ND, axis=-1) * np.linalg.norm(b_ND, axis=-1))


# -- broken images ----------------------------------------------------------------------------------------------------


def test_every_row_has_the_status_of_its_own_image(mixed: Encoded) -> None:
    plan = [row for shard in range(2) for row in planned_rows(mixed.store.plan(shard))]
    expected = {name.partition(".")[0]: status for name, (_, status) in members().items()}
    found = {row.key: Status(code).name for row, code in zip(plan, mixed.store.status(), strict=True)}
    assert found == expected


def test_every_failure_is_in_the_commits_with_row_key_file_and_reason(mixed: Encoded) -> None:
    failures = [failure for commit in mixed.store.commits() for failure in commit.failures]
    names = list(members())
    expected = [(row, status) for row, (_, status) in enumerate(members().values()) if status != GOOD]
    assert [(failure.row, failure.status) for failure in failures] == expected
    reasons = {"EMPTY": "no bytes", "TOO_LARGE": "pixels"}
    for failure in failures:
        assert failure.key == names[failure.row].partition(".")[0]
        assert failure.file == str(mixed.tar)
        assert reasons.get(failure.status, "") in failure.reason
        assert failure.reason


def test_the_counts_of_the_commits_add_up(mixed: Encoded) -> None:
    first, second = mixed.store.commits()
    assert (first.start, first.stop, second.start, second.stop) == (0, 8, 8, 14)
    assert first.counts == {"OK": 3, "EMPTY": 1, "UNDECODABLE": 3, "TOO_LARGE": 1}
    assert second.counts == {"OK": 4, "UNDECODABLE": 2}


def test_good_rows_are_what_open_clip_gives_for_their_own_image(
    mixed: Encoded, by_open_clip: Callable[[list[bytes]], np.ndarray]
) -> None:
    good = [(row, data) for row, (data, status) in enumerate(members().values()) if status == GOOD]
    rows = np.array([row for row, _ in good])
    theirs = by_open_clip([data for _, data in good])
    ours = mixed.store.gather(rows)
    assert cosine(ours, theirs).min() > 0.9999
    assert np.abs(np.linalg.norm(ours.astype(np.float64), axis=1) - 1).max() < 1e-3


def test_rows_that_failed_are_zero_and_nothing_stands_in_for_them(mixed: Encoded) -> None:
    status, embedding = mixed.store.status(), mixed.store.read(0, 14)
    assert (embedding[status != Status.OK] == 0).all()
    good = embedding[status == Status.OK].astype(np.float32)
    assert len(np.unique(good, axis=0)) == len(good) == 7


def test_a_shard_in_which_every_image_is_broken_is_done(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"no image" for i in range(3)})
    store = finish(planned(tar, tmp_path / "s.zarr", clip), clip)
    assert (store.status() == Status.UNDECODABLE).all()
    store.require_complete()


def test_progress_is_told_every_row_once(mixed: Encoded, tmp_path: Path, clip: Clip) -> None:
    told: list[int] = []
    finish(planned(mixed.tar, tmp_path / "s.zarr", clip), clip, progress=told.append)
    assert sum(told) == 14
    assert min(told) >= 0


# -- files that change or end -----------------------------------------------------------------------------------------


def test_a_tar_cut_within_an_image_gives_that_row_as_truncated(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{i}.jpg": make_jpeg((120, 90), seed=i) for i in range(4)})
    whole = planned(tar, tmp_path / "whole.zarr", clip)
    last = planned_rows(whole.plan(0))[3]
    tar.write_bytes(tar.read_bytes()[: last.offset + last.size // 2])
    store = finish(planned(tar, tmp_path / "cut.zarr", clip), clip)
    assert len(store.schema.source.problems) == 1
    assert "a.tar: broken after 4 members" in store.schema.source.problems[0]
    assert [Status(code).name for code in store.status()] == ["OK", "OK", "OK", "TRUNCATED"]
    (failure,) = next(iter(store.commits())).failures
    assert failure.key == "3"
    assert f"{last.size // 2:,} of {last.size:,} bytes" in failure.reason


def test_embeddings_that_are_not_finite_or_zero_have_a_status_of_their_own(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(4)})
    store = planned(tar, tmp_path / "s.zarr", clip, batch_size=4)

    class Odd:
        identity = clip.identity
        device = clip.device

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            features = clip.encode_images(pixels).clone()
            features[1] = float("nan")
            features[2, 5] = float("inf")
            features[3] = 0
            return features

    odd: Any = Odd()
    data = encode_rows(planned_rows(store.plan(0)), store.schema, odd)
    assert [Status(code).name for code in data.arrays[STATUS]] == ["OK", "NOT_FINITE", "NOT_FINITE", "NOT_FINITE"]
    assert (data.arrays[EMBEDDING][1:] == 0).all()
    assert data.arrays[EMBEDDING][0].any()
    assert sorted(data.reasons) == [1, 2, 3]


# -- rows of real images and sentences --------------------------------------------------------------------------------


def test_rows_and_keys_are_those_of_the_tar(
    image_store: Store, image_tar: Path, by_open_clip: Callable[[list[bytes]], np.ndarray]
) -> None:
    content = read_tar(image_tar, 96)
    plan = [row for shard in range(3) for row in planned_rows(image_store.plan(shard))]
    assert [row.key for row in plan] == [name.rpartition(".")[0] for name in content]
    rows = np.arange(0, 96, 5)
    datas = list(content.values())
    theirs, ours = by_open_clip([datas[row] for row in rows]), image_store.gather(rows)
    similarity = ours.astype(np.float64) @ theirs.T
    assert np.diag(similarity).min() > 0.9999
    assert (similarity.argmax(axis=1) == np.arange(len(rows))).all()


def test_sentences_are_what_open_clip_gives(text_store: Store, text_file: Path, teacher_name: str) -> None:
    lines = text_file.read_text(encoding="utf-8").splitlines()
    assert [row.text for shard in range(7) for row in planned_rows(text_store.plan(shard))] == lines
    rows = np.arange(0, 200, 9)
    model, _, _ = open_clip.create_model_and_transforms(teacher_name)
    tokenizer = open_clip.get_tokenizer(teacher_name)
    with torch.inference_mode():
        features = model.eval().encode_text(tokenizer([lines[row] for row in rows]))
    theirs = torch.nn.functional.normalize(features, dim=-1).numpy()
    assert cosine(text_store.gather(rows), theirs).min() > 0.9999


# -- the same bytes again ---------------------------------------------------------------------------------------------


def chunk_files(store: Store) -> dict[str, bytes]:
    folder = Path(store.path)
    paths = [p for name in ("embedding", "status") for p in sorted((folder / name / "c").rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_encoding_twice_gives_the_same_bytes_with_any_number_of_threads(
    mixed: Encoded, tmp_path: Path, clip: Clip
) -> None:
    again = finish(planned(mixed.tar, tmp_path / "again.zarr", clip), clip, threads=3)
    assert len(chunk_files(mixed.store)) == 4
    assert chunk_files(again) == chunk_files(mixed.store)
    assert [c.digest for c in again.commits()] == [c.digest for c in mixed.store.commits()]


def test_shards_done_in_another_order_give_the_same_bytes(mixed: Encoded, tmp_path: Path, clip: Clip) -> None:
    again = planned(mixed.tar, tmp_path / "again.zarr", clip)
    for shard in (1, 0, 1):
        encode_shard(again, shard, clip)
    assert chunk_files(again) == chunk_files(mixed.store)


def test_plain_zarr_reads_the_same_as_the_store(mixed: Encoded) -> None:
    group: Any = zarr.open_group(mixed.store.path, mode="r")
    embedding = group["embedding"][:]
    assert embedding.dtype == np.float16
    assert embedding.any(axis=1).sum() == 7
    assert np.array_equal(mixed.store.read(0, 14), embedding)
    assert np.array_equal(mixed.store.read(5, 11), embedding[5:11])
    rows = np.array([13, 0, 8, 7, 0])
    assert np.array_equal(mixed.store.gather(rows), embedding[rows])
    assert np.array_equal(mixed.store.status(), group["status"][:])
    assert np.array_equal(mixed.store.status(3, 9), group["status"][3:9])


# -- the canary -------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(mixed: Encoded, tmp_path: Path, clip: Clip) -> Store:
    """A store over a copy of the tar, with its first shard done."""
    tar = Path(shutil.copy(mixed.tar, tmp_path / "mixed.tar"))
    store = planned(tar, tmp_path / "s.zarr", clip)
    encode_shard(store, 0, clip)
    return store


def test_the_canary_is_silent_where_nothing_changed_or_nothing_is_done(
    begun: Store, mixed: Encoded, tmp_path: Path, clip: Clip
) -> None:
    check_canary(begun, clip)
    check_canary(planned(mixed.tar, tmp_path / "new.zarr", clip), clip)


def test_the_canary_refuses_when_what_is_stored_was_changed(begun: Store, clip: Clip) -> None:
    values = begun.read(0, 8).copy()
    values[4] = np.roll(values[4], 1)
    group: Any = zarr.open_group(begun.path, mode="r+")
    group["embedding"][0:8] = values
    with pytest.raises(MismatchError, match=r"row 4 \(04-cmyk\) encoded again has cosine -?0\.") as caught:
        check_canary(Store(begun.path), clip)
    assert caught.value.remedy


def test_the_canary_refuses_when_a_file_was_changed_in_place(begun: Store, clip: Clip) -> None:
    row = planned_rows(begun.plan(0))[0]
    other = make_jpeg((90, 70), colour=(10, 200, 30), seed=77)
    assert len(other) <= row.size
    with Path(row.file).open("r+b") as file:
        file.seek(row.offset)
        file.write(other.ljust(row.size, b"\0"))
    with pytest.raises(MismatchError, match=r"row 0 \(00-jpeg\)"):
        check_canary(begun, clip)


def test_the_canary_refuses_when_a_file_is_gone(begun: Store, clip: Clip) -> None:
    Path(planned_rows(begun.plan(0))[0].file).unlink()
    with pytest.raises(UnreadableError, match=r"row 0 .* cannot be read now"):
        check_canary(begun, clip)
    check_canary(begun, clip, accept_missing=True)


def test_storage_that_fails_for_a_moment_is_asked_again(
    image_store: Store, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read, failures = planned_rows(image_store.plan(0))[:2], storage.read_bytes, iter([OSError("stale handle")])

    def flaky(*where: Any) -> bytes:
        for failure in failures:
            raise failure
        return read(*where)

    monkeypatch.setattr("dimefm.system.storage.read_bytes", flaky)
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0, 0.0))
    assert (encode_rows(rows, image_store.schema, clip).arrays[STATUS] == Status.OK).all()


def test_storage_that_goes_on_failing_ends_the_job_and_gives_up_no_row(
    image_store: Store, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*where: Any) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr("dimefm.system.storage.read_bytes", broken)
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0,))
    with pytest.raises(StoreError, match=r"cannot be read: no answer"):
        encode_rows([PlannedImage(0, "k", "f", 0, 9)], image_store.schema, clip)
