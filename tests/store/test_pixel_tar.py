"""Training pixels: small JPEGs in tars that any WebDataset reader reads, enough to train without the originals."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache_schemas import EmbeddingStore, SchemaError, Status
from cache_schemas.embedding_store import pixels_path
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.errors import MismatchError, StoreError, TrainingError
from dimefm.images.decode import DecodeError, decode_fast, decode_rgb
from dimefm.images.small_jpeg import small_jpeg
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import encoded, make_jpeg, picture, read_tar, write_tar
from tests.tiny_training import tiny_config

SIDE = 64
KINDS = {
    "large.jpg": make_jpeg((300, 200), seed=1),
    "tall.jpg": make_jpeg((150, 400), seed=2),
    "small.jpg": make_jpeg((64, 90), seed=3),
    "broken.jpg": b"no image",
    "grey.jpg": encoded(picture((200, 120), seed=4).convert("L"), "JPEG"),
    "small-grey.jpg": encoded(picture((40, 30), seed=5).convert("L"), "JPEG"),
    "cmyk.jpg": encoded(picture((200, 120), seed=6).convert("CMYK"), "JPEG"),
    "large.png": encoded(picture((200, 120), seed=7), "PNG"),
    "small.png": encoded(picture((40, 30), seed=8), "PNG"),
    "rgba.png": encoded(picture((120, 200), seed=9).convert("RGBA"), "PNG"),
    "palette.png": encoded(picture((120, 200), seed=10).quantize(32), "PNG"),
    "empty.jpg": b"",
    "truncated.jpg": make_jpeg((300, 200), seed=11)[:2000],
}
NAMES = list(KINDS)
BROKEN = {"broken.jpg", "empty.jpg", "truncated.jpg"}
KEPT = [name for name in NAMES if name not in BROKEN]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tar(tmp_path_factory.mktemp("source") / "kinds.tar", KINDS)


@pytest.fixture(scope="module")
def store(source: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished store of `KINDS`, in two shards."""
    return cached("image", source, tmp_path_factory.mktemp("s") / "s.zarr", clip, shard_rows=8, pixels=SIDE)


def samples(store: Store) -> list[tuple[int, bytes]]:
    """Row and JPEG of every member of the tars, as a WebDataset reader meets them."""
    found = []
    for path in sorted((Path(store.path) / "pixels").iterdir()):
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                assert extension == "jpg"
                assert data is not None
                found.append((int(key), data.read()))
    return found


def jpeg_of(store: Store, name: str) -> bytes:
    return next(store.pixels(np.array([NAMES.index(name)])))


def grey(image_3HW: torch.Tensor) -> torch.Tensor:
    """Brightness (H, W) as JPEG weighs it."""
    return torch.einsum("chw,c->hw", image_3HW.float(), torch.tensor([0.299, 0.587, 0.114]))


# -- the tars ---------------------------------------------------------------------------------------------------------


def test_there_is_one_tar_a_shard(store: Store) -> None:
    assert store.schema.shards == 2
    assert sorted(p.name for p in (Path(store.path) / "pixels").iterdir()) == ["000000.tar", "000001.tar"]


def test_a_tar_holds_the_good_rows_of_its_shard_in_order(store: Store) -> None:
    rows = [row for row, _ in samples(store)]
    assert [NAMES[row] for row in rows] == KEPT
    assert rows == np.flatnonzero(store.status() == Status.OK).tolist()


def test_a_row_is_read_from_its_place_in_the_tar(store: Store) -> None:
    for row, jpeg in samples(store):
        assert next(store.pixels(np.array([row]))) == jpeg


def test_broken_images_have_no_pixels(store: Store) -> None:
    for name in BROKEN:
        assert jpeg_of(store, name) == b""


def test_the_commit_holds_the_digest_of_the_tar(store: Store) -> None:
    for commit in store.commits():
        data = (Path(store.path) / pixels_path(commit.shard)).read_bytes()
        assert commit.pixels == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_second_run_gives_the_same_tars(store: Store, source: Path, tmp_path: Path, clip: Clip, threads: int) -> None:
    request = PlanRequest(kind="image", arguments=(str(source),), shard_rows=8, batch_size=16, pixels=SIDE)
    again = open_or_plan(request, str(tmp_path / "again.zarr"), clip.identity)
    for shard in (1, 0):
        encode_shard(again, shard, clip, threads=threads)
    for shard in range(2):
        one, two = (Path(path) / pixels_path(shard) for path in (store.path, again.path))
        assert one.read_bytes() == two.read_bytes()


def test_nothing_unfinished_is_left_beside_the_tars(store: Store) -> None:
    assert not [p for p in Path(store.path).rglob(".*") if p.name != ".lock"]


# -- the JPEGs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_the_short_side_is_the_one_asked_for_and_nothing_is_enlarged(store: Store, name: str) -> None:
    before, after = Image.open(io.BytesIO(KINDS[name])), Image.open(io.BytesIO(jpeg_of(store, name)))
    assert after.format == "JPEG"
    assert min(after.size) == min(SIDE, *before.size)
    scale = min(after.size) / min(before.size)
    assert after.size == pytest.approx([side * scale for side in before.size], abs=1)


@pytest.mark.parametrize("name", ["small.jpg", "small-grey.jpg"])
def test_a_jpeg_that_is_small_is_kept_byte_for_byte(store: Store, name: str) -> None:
    assert jpeg_of(store, name) == KINDS[name]


@pytest.mark.parametrize("name", KEPT)
def test_a_small_jpeg_shows_its_image(store: Store, name: str) -> None:
    """By brightness: the colours of these images change faster than a JPEG stores colours."""
    small, whole = (grey(decode_rgb(data)) for data in (jpeg_of(store, name), KINDS[name]))
    expected = torch.nn.functional.interpolate(whole[None, None], small.shape, mode="bicubic", antialias=True)[0, 0]
    assert (small - expected).abs().mean() < 4
    assert (small.flip(-1) - expected).abs().mean() > 8


def test_the_embedding_is_that_of_the_whole_image(store: Store, source: Path, tmp_path: Path, clip: Clip) -> None:
    plain = cached("image", source, tmp_path / "plain.zarr", clip, shard_rows=8)
    np.testing.assert_array_equal(store.read(0, len(KINDS)), plain.read(0, len(KINDS)))


def test_an_image_longer_than_any_jpeg_fails_alone(tmp_path: Path, clip: Clip) -> None:
    strip = encoded(Image.new("RGB", (66_000, 60)), "PNG")
    tar = write_tar(tmp_path / "a.tar", {"0.png": strip, "1.jpg": make_jpeg()})
    found = cached("image", tar, tmp_path / "s.zarr", clip, pixels=SIDE)
    assert [Status(code).name for code in found.status()] == ["TOO_LARGE", "OK"]
    with pytest.raises(DecodeError, match="66000 x 60 is more than the 65,500 pixels that a side of a JPEG can have"):
        small_jpeg(strip, decode_fast(strip), SIDE)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def orphan(image_tar: Path, tmp_path: Path, clip: Clip) -> Store:
    """A store whose source has been deleted since."""
    (tmp_path / "in").mkdir()
    source = Path(shutil.copy(image_tar, tmp_path / "in"))
    found = cached("image", source, tmp_path / "s.zarr", clip, pixels=SIDE)
    shutil.rmtree(tmp_path / "in")
    return found


def test_a_student_is_trained_after_the_images_are_deleted(orphan: Store, text_store: Store, tmp_path: Path) -> None:
    assert train(tiny_config(orphan, text_store, tmp_path / "run")).steps == 8


def test_a_student_is_trained_on_the_kept_pixels(orphan: Store) -> None:
    augmentation = Augmentation(size=32, crop_scale=(0.5, 1), flip=True, seed=0)
    rows = np.array([90, 3, 41])
    item = TrainingImages(orphan.path, augmentation)[Request(0, 2, rows, rows)]
    assert isinstance(item, Batch)
    kept = dict(samples(orphan))
    for row, pixels in zip(rows.tolist(), item.pixels_B3HW, strict=True):
        assert torch.equal(pixels, augmentation(kept[row], 2, row))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_a_kept_jpeg_stops_the_training_with_what_to_do(
    orphan: Store, text_store: Store, tmp_path: Path, workers: int
) -> None:
    """One bit of the picture's data: it decodes all the same, to another picture."""
    file = Path(orphan.path) / pixels_path(0)
    data = bytearray(file.read_bytes())
    (jpeg,) = orphan.pixels(np.array([3]))
    place = data.index(jpeg) + len(jpeg) // 2
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="row 3 is damaged"):
        list(orphan.pixels(np.array([3])))
    with pytest.raises(TrainingError, match=r"row 3 is damaged(?s:.*)dimefm verify"):
        train(tiny_config(orphan, text_store, tmp_path / "run", workers=workers))


def test_pixels_of_another_size_are_refused_by_name(store: Store, source: Path, clip: Clip) -> None:
    for side in (None, 128):
        words: dict[str, Any] = {"shard_rows": 8, "batch_size": 16, "pixels": side}
        with pytest.raises(MismatchError, match=f"pixels: {SIDE} != {side}"):
            open_or_plan(PlanRequest(kind="image", arguments=(str(source),), **words), store.path, clip.identity)


def test_pixels_without_views_leave_the_identity_as_it_was(
    store: Store, source: Path, tmp_path: Path, clip: Clip
) -> None:
    plain = cached("image", source, tmp_path / "plain.zarr", clip, shard_rows=8)
    assert plain.schema.identity == store.schema.identity


def test_texts_have_no_pixels(text_store: Store) -> None:
    document = {**text_store.schema.to_json(), "pixels": SIDE}
    with pytest.raises(SchemaError, match="pixels: is for images, and the store holds texts"):
        EmbeddingStore.parse(document, "zarr.json")


def test_the_first_member_of_a_real_tar_is_its_first_image(orphan: Store, image_tar: Path) -> None:
    first = next(iter(read_tar(image_tar, 1).values()))
    assert samples(orphan)[0] == (0, small_jpeg(first, decode_fast(first), SIDE))
