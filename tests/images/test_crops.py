"""Views: the crops and flips that the teacher saw are those that the student is trained on, pixel for pixel."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schemas import EmbeddingStore, Preprocessing, SchemaError, Status, ViewPlan
from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.errors import MismatchError
from dimefm.images import preprocess
from dimefm.images.crops import draw_views, random_crop, replay
from dimefm.images.decode import decode_rgb
from dimefm.models.clip import Clip
from dimefm.sources.read_image import ImagePlace
from dimefm.store.embedding_store import Store
from dimefm.training.batch_loader import Request
from dimefm.training.image_batches import Augmentation, Batch, TrainingImages
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import encoded, make_jpeg, picture, read_tar, write_tar
from tests.tiny_clip import SIDE
from tests.tiny_training import tiny_config

ROWS, VIEWS = 32, 3
PLAN = ViewPlan(count=VIEWS, seed=0, crop_scale=(0.4, 1.0), flip=True)
SIDES = [None, 64, 160]


class Spy:
    """The teacher, and the pixels that it was given."""

    def __init__(self, clip: Clip) -> None:
        self.identity, self.device, self._clip, self.seen = clip.identity, clip.device, clip, list[torch.Tensor]()

    def encode_images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels_B3HW.clone())
        return self._clip.encode_images(pixels_B3HW)


class Cached:
    """A finished store of views, and the pixels that the teacher saw, (rows, views, 3, H, W)."""

    def __init__(self, source: Path, out: Path, clip: Clip, side: int | None) -> None:
        spy: Any = Spy(clip)
        self.store = planned(source, out, clip, side)
        for shard in range(self.store.schema.shards):
            encode_shard(self.store, shard, spy, threads=2)
        self.seen = torch.cat(spy.seen).reshape(ROWS, VIEWS, 3, *clip.identity.preprocessing.size)


def planned(source: Path, out: Path, clip: Clip, side: int | None = None, views: ViewPlan | None = PLAN) -> Store:
    request = PlanRequest(
        kind="image", arguments=(str(source),), shard_rows=16, batch_size=16, views=views, pixels=side
    )
    return open_or_plan(request, str(out), clip.identity)


@pytest.fixture(scope="module")
def source(image_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images, and four that are no RGB JPEG."""
    members = read_tar(image_tar, ROWS - 4)
    members["x0.png"] = encoded(picture((120, 90), seed=1), "PNG")
    members["x1.jpg"] = encoded(picture((90, 120), seed=2).convert("L"), "JPEG")
    members["x2.jpg"] = encoded(picture((130, 100), seed=3).convert("CMYK"), "JPEG")
    members["x3.png"] = encoded(picture((48, 32), seed=4).convert("RGBA"), "PNG")
    return write_tar(tmp_path_factory.mktemp("views") / "images.tar", members)


@pytest.fixture(scope="module")
def found(source: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Cached]:
    """Stores of the same images and views, by the short side of their pixels."""
    folder = tmp_path_factory.mktemp("stores")
    return {side: Cached(source, folder / f"{side}.zarr", clip, side) for side in SIDES}


def batch_of(store: Store, epoch: int, size: int) -> Batch:
    """All rows as the trainer gets them in an epoch. Its own augmentation would show in the pixels."""
    augmentation = Augmentation(size=size, crop_scale=(0.1, 0.2), flip=True, seed=epoch)
    rows = np.arange(ROWS)
    found = store.samples(rows)
    places = None if store.schema.pixels else [ImagePlace(one["file"], one["offset"], one["size"]) for one in found]
    item = TrainingImages(store.path, augmentation)[Request(0, epoch, rows, rows, places)]
    assert isinstance(item, Batch)
    return item


def view_of(epoch: int) -> np.ndarray[Any, Any]:
    return (np.arange(ROWS) + epoch) % VIEWS


# -- the same pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("epoch", range(VIEWS))
def test_the_trainer_sees_what_the_teacher_saw_bit_for_bit(
    found: dict[int | None, Cached], clip: Clip, side: int | None, epoch: int
) -> None:
    one = found[side]
    pixels = batch_of(one.store, epoch, clip.identity.preprocessing.size[0]).pixels_B3HW
    assert torch.equal(pixels, one.seen[np.arange(ROWS), view_of(epoch)])


@pytest.mark.parametrize("pillow", [10, 12, 13])
@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [(90, 40, "5277f2a5a7bfd218"), (40, 90, "3ae1a239a333d3a2"), (20, 24, "6a862f4c342db153")],
    ids=["tall", "wide", "small"],
)
def test_no_release_of_a_library_changes_a_view(
    height: int, width: int, pixels: str, pillow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that resizes whole images otherwise, as Pillow 13 does. A failure here means that views of stores
    that are there would be replayed otherwise than the teacher saw them."""
    monkeypatch.setattr(preprocess, "_PILLOW", pillow)
    y, x = np.arange(100)[:, None], np.arange(100)[None]
    bars = [((y // step + x // (step + 1)) % 2) * 255 for step in (2, 3, 5)]  # edges that bicubic overshoots at
    image = torch.from_numpy(np.stack(bars).astype(np.uint8))
    facts = Preprocessing(
        size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest"
    )
    numbers = np.array([5, 7, height, width, 1], np.int32)
    view = replay(image, numbers, PLAN, facts.size, facts, lambda row: image)
    assert hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()[:16] == pixels


@pytest.mark.parametrize("side", SIDES)
def test_the_embedding_of_a_view_is_the_teachers_of_those_pixels(
    found: dict[int | None, Cached], clip: Clip, side: int | None
) -> None:
    one = found[side]
    stored = one.store.embeddings(np.arange(ROWS)).astype(np.float32)
    again = torch.stack([clip.encode_images(views) for views in one.seen]).numpy()
    np.testing.assert_allclose(stored, again, atol=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_the_trainer_gets_the_embedding_of_the_view_that_it_sees(
    found: dict[int | None, Cached], side: int | None
) -> None:
    store = found[side].store
    stored = store.embeddings(np.arange(ROWS))
    for epoch in range(VIEWS):
        teacher = batch_of(store, epoch, 32).teacher_BD.numpy()
        np.testing.assert_array_equal(teacher, stored[np.arange(ROWS), view_of(epoch)])


def test_every_view_comes_once_in_as_many_epochs(found: dict[int | None, Cached]) -> None:
    one = found[None]
    epochs = [batch_of(one.store, epoch, SIDE).pixels_B3HW for epoch in range(VIEWS)]
    for row in range(ROWS):
        seen = [next(v for v in range(VIEWS) if torch.equal(epoch[row], one.seen[row, v])) for epoch in epochs]
        assert sorted(seen) == list(range(VIEWS))


def test_a_smaller_student_sees_the_same_part_of_the_image(found: dict[int | None, Cached]) -> None:
    one = found[None]
    small = batch_of(one.store, 0, SIDE // 4).pixels_B3HW.float()
    large = one.seen[np.arange(ROWS), view_of(0)].float()
    large = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - large).abs().mean() < 8
    assert (small.flip(-1) - large).abs().mean() > 20


# -- the views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_boxes_lie_in_the_image_that_the_trainer_decodes(
    found: dict[int | None, Cached], source: Path, side: int | None
) -> None:
    store = found[side].store
    boxes = store.gather_view(np.repeat(np.arange(ROWS), VIEWS), np.tile(np.arange(VIEWS), ROWS))[1]
    originals = list(read_tar(source, ROWS).values())
    for row, views in enumerate(boxes.reshape(ROWS, VIEWS, 5)):
        height, width = decode_rgb(next(store.pixels(np.array([row]))) if side else originals[row]).shape[-2:]
        for top, left, high, wide, flipped in views.tolist():
            assert top >= 0 <= left
            assert 0 < high <= height - top
            assert 0 < wide <= width - left
            assert flipped in (0, 1)
            assert high * wide > 0.3 * height * width


def test_the_views_of_an_image_differ(found: dict[int | None, Cached]) -> None:
    one = found[None]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (one.seen[:, a] != one.seen[:, b]).flatten(1).any(dim=1).all()
    embedding = one.store.embeddings(np.arange(ROWS)).astype(np.float32)
    cosine = (embedding[:, 0] * embedding[:, 1]).sum(axis=1)
    assert 0.5 < cosine.mean() < 0.999


def test_half_of_the_views_are_flipped_and_none_without_flips() -> None:
    flips = [draw_views(replace(PLAN, count=8), row, 60, 80)[:, 4] for row in range(300)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.05)
    assert not any(draw_views(replace(PLAN, flip=False), row, 60, 80)[:, 4].any() for row in range(50))


def test_a_view_depends_on_seed_row_and_its_number_alone() -> None:
    many, few = draw_views(replace(PLAN, count=5), 7, 60, 80), draw_views(PLAN, 7, 60, 80)
    np.testing.assert_array_equal(many[:VIEWS], few)
    for other in (draw_views(PLAN, 8, 60, 80), draw_views(replace(PLAN, seed=1), 7, 60, 80)):
        assert (other != few).any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (900, 1), (30, 3000), (7, 5)])
def test_a_crop_of_an_odd_image_lies_in_it(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, high, wide = random_crop(height, width, (0.4, 1.0), rng)
        assert 0 <= top < top + high <= height
        assert 0 <= left < left + wide <= width


def test_crops_have_the_area_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    areas = [math.prod(random_crop(400, 400, (0.25, 0.36), rng)[2:]) / 400**2 for _ in range(500)]
    assert min(areas) > 0.24
    assert max(areas) < 0.37
    assert np.mean(areas) == pytest.approx(0.305, abs=0.01)


# -- stores of views --------------------------------------------------------------------------------------------------


def test_reading_a_store_of_views_gives_their_normalised_mean(found: dict[int | None, Cached]) -> None:
    store = found[None].store
    mean = store.embeddings(np.arange(ROWS)).astype(np.float64).mean(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(store.read(0, ROWS), mean, atol=1e-3)
    rows = np.array([5, 0, 31, 5])
    np.testing.assert_array_equal(store.gather(rows), store.read(0, ROWS)[rows])


def test_an_image_that_cannot_be_read_has_neither_embedding_nor_views(tmp_path: Path, clip: Clip) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "1.jpg": b"no image", "2.jpg": make_jpeg(seed=2)})
    store = cached("image", tar, tmp_path / "s.zarr", clip, views=PLAN, pixels=16)
    assert [Status(code).name for code in store.status()] == ["OK", "UNDECODABLE", "OK"]
    assert not store.read(1, 2).any()
    assert not store.gather_view(np.array([1]), np.array([0]))[1].any()
    good = store.embeddings(np.array([0, 2])).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(good, axis=-1), 1, atol=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_a_second_run_gives_the_same_bytes(
    found: dict[int | None, Cached], source: Path, tmp_path: Path, clip: Clip, side: int | None
) -> None:
    again = planned(source, tmp_path / "again.zarr", clip, side)
    for shard in (1, 0):
        encode_shard(again, shard, clip, threads=3)
    first = found[side].store
    for name in first.schema.arrays():
        for shard in range(2):
            file = first.shard_file(name, shard)
            assert (Path(again.path) / file).read_bytes() == (Path(first.path) / file).read_bytes()
    digests = [(c.digest, c.pixels) for c in first.commits()]
    assert [(c.digest, c.pixels) for c in again.commits()] == digests


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "views.seed: 0 != 1"),
        ({"crop_scale": (0.5, 1.0)}, "views.crop_scale: [0.4, 1.0] != [0.5, 1.0]"),
        ({"flip": False}, "views.flip: True != False"),
    ],
)
def test_other_views_are_another_store_and_refused_by_name(
    found: dict[int | None, Cached], source: Path, clip: Clip, changes: dict[str, Any], difference: str
) -> None:
    store = found[None].store
    other = replace(PLAN, **changes)
    assert replace(store.schema, views=other).identity != store.schema.identity
    with pytest.raises(MismatchError) as caught:
        planned(source, Path(store.path), clip, views=other)
    assert difference in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


def test_views_are_refused_where_there_were_none_and_the_reverse(
    found: dict[int | None, Cached], source: Path, tmp_path: Path, clip: Clip
) -> None:
    planned(source, tmp_path / "plain.zarr", clip, views=None)
    with pytest.raises(MismatchError, match=r"views\.count: None != 3"):
        planned(source, tmp_path / "plain.zarr", clip)
    with pytest.raises(MismatchError, match=r"views\.count: 3 != None"):
        planned(source, Path(found[None].store.path), clip, views=None)


def test_views_drawn_on_stored_pixels_are_another_identity(found: dict[int | None, Cached]) -> None:
    assert len({found[side].store.schema.identity for side in SIDES}) == len(SIDES)


def test_texts_have_no_views(text_store: Store) -> None:
    document = replace(text_store.schema, views=PLAN).to_json()
    with pytest.raises(SchemaError, match="views: is for images, and the store holds texts"):
        EmbeddingStore.parse(document, "zarr.json")


@pytest.mark.parametrize("side", [None, 64])
def test_a_student_is_trained_on_views(
    found: dict[int | None, Cached], text_store: Store, tmp_path: Path, side: int | None
) -> None:
    result = train(tiny_config(found[side].store, text_store, tmp_path / "run", max_steps=4))
    assert result.steps == 4
