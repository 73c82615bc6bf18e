"""select-images: planted copies are found, each condition counts what it leaves out, and a stopped run goes on."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cache_schemas import ViewPlan
from cache_schemas.document import CHECKSUM, digest_of
from cache_schemas.image_selection import ImageSelection
from dimefm.errors import MismatchError, OutputExistsError, SelectionError, StoreError, TeacherError, TrainingError
from dimefm.inspection.info import describe
from dimefm.models.clip import Clip
from dimefm.selection import exact_copies
from dimefm.selection import select_images as module
from dimefm.selection.select_images import ImageSelectionConfig, select_images
from dimefm.store.embedding_store import Store
from dimefm.store.selected_images import SelectedImages
from dimefm.training.feed_plan import plan_feed
from dimefm.training.run_folder import read_run
from dimefm.training.train import train
from tests.conftest import cached
from tests.making import read_tar, tree, write_tar
from tests.stores import random_store, teacher_identity
from tests.tiny_training import tiny_config

ROWS, GROUPS, COPIES = 500, 20, 5
FAILED, BROKEN = (7, 300), 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray[Any, Any]]:
    """A store of random images; rows 100 to 199 are 20 groups of five near-copies. Two rows failed, one is not a
    number."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((ROWS, 16))
    for group in range(GROUPS):
        rows = slice(100 + COPIES * group, 100 + COPIES * (group + 1))
        values[rows] = values[100 + COPIES * group] + 0.05 * rng.standard_normal((COPIES, 16))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values[BROKEN] = np.nan
    folder = tmp_path_factory.mktemp("world")
    return random_store(folder / "i.zarr", rows=ROWS, shard_rows=128, values=values, failed=FAILED)


def select(store: Store, out: Path, encode: Any = None, **changes: Any) -> ImageSelection:
    return select_images(ImageSelectionConfig(images=store.path, out=str(out), device="cpu", **changes), encode)


def selected(out: Path) -> set[int]:
    return set(SelectedImages(str(out)).rows().tolist())


@pytest.mark.parametrize("by", ["central", "distant", "random"])
def test_of_each_group_of_near_copies_one_is_kept(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path, by: Any
) -> None:
    store, values = world
    found = select(store, tmp_path / "s.selection", by=by, dedup=0.95)

    kept = selected(tmp_path / "s.selection")
    assert kept >= set(range(ROWS)) - set(range(100, 200)) - {*FAILED, BROKEN}
    of_groups = [kept & set(range(at, at + COPIES)) for at in range(100, 200, COPIES)]
    assert [len(one) for one in of_groups] == [1] * GROUPS
    assert found.dropped == {"without an embedding": 3, "repeated, by --dedup": GROUPS * (COPIES - 1)}
    assert found.groups == {"1": ROWS - 100 - 3, str(COPIES): GROUPS}
    copies = SelectedImages(str(tmp_path / "s.selection")).copies().to_pylist()
    for one in copies:
        assert one["like"] in kept
        assert float(values[one["row"]].astype(np.float32) @ values[one["like"]].astype(np.float32)) >= 0.9


def test_the_most_and_the_least_typical_are_kept(world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    store, _ = world
    for by in ("central", "distant"):
        select(store, tmp_path / f"{by}.selection", by=by, dedup=0.95)
    scores = {}
    for by in ("central", "distant"):
        table = pa.parquet.read_table(tmp_path / f"{by}.selection" / "rows.parquet").to_pylist()
        scores[by] = {one["row"] // COPIES: one["score"] for one in table if 100 <= one["row"] < 200}
    assert scores["central"].keys() == scores["distant"].keys()
    assert all(scores["central"][group] >= scores["distant"][group] for group in scores["central"])
    assert sum(scores["central"].values()) > sum(scores["distant"].values())


def test_two_alike_on_the_border_of_two_clusters_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass some pairs fall into different clusters; the second pass finds most of them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2000, 16))
    values[1000:] = values[:1000] + 0.25 * rng.standard_normal((1000, 16))
    store, values = random_store(tmp_path / "i.zarr", rows=2000, shard_rows=512, values=values)
    cosine = (values[:1000].astype(np.float32) * values[1000:].astype(np.float32)).sum(axis=1)
    pairs = int((cosine >= 0.9).sum())
    missed = {}
    for passes in (1, 2):
        monkeypatch.setattr(module, "_PASSES", passes)
        select(store, tmp_path / f"{passes}.selection", dedup=0.9)
        kept = selected(tmp_path / f"{passes}.selection")
        missed[passes] = sum(row in kept and row + 1000 in kept and cosine[row] >= 0.9 for row in range(1000))
    assert pairs > 900
    assert missed[1] > 20
    assert missed[2] < missed[1] / 2


def test_conditions_apply_in_their_order(world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    store, values = world
    asked = values[[20, 30]].astype(np.float32)
    near = values.astype(np.float32) @ asked.T
    unwanted = set(np.flatnonzero((np.nan_to_num(near) >= 0.6).any(axis=1)).tolist())
    found = select(
        store, tmp_path / "s.selection", lambda sentences: asked, drop_near=("a", "b"), drop_above=0.6, dedup=0.95,
        top=400, balance=True, size=200,
    )  # fmt: skip

    assert found.dropped["near to a sentence, by --drop-near"] == len(unwanted)
    assert {20, 30} <= unwanted
    assert not unwanted & selected(tmp_path / "s.selection")
    assert found.kept == 200
    assert list(found.dropped) == [
        "without an embedding", "near to a sentence, by --drop-near", "beyond --top", "repeated, by --dedup",
        "above the cap of their cluster, by --balance",
    ]  # fmt: skip
    assert found.cap is not None
    assert "200 of 500 images" in describe(str(tmp_path / "s.selection"))
    assert "none with a cosine of 0.6 to 'b'" in (tmp_path / "s.selection" / "report.md").read_text()


def test_images_near_to_the_targets_come_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values, targets = rng.standard_normal((300, 16)), rng.standard_normal((100, 16))
    values[:100, :3] += 4
    targets[:50, :3] += 4
    store, _ = random_store(tmp_path / "i.zarr", rows=300, shard_rows=128, values=values)
    wanted, _ = random_store(tmp_path / "t.zarr", rows=100, shard_rows=64, values=targets, kind="text")
    select(store, tmp_path / "s.selection", near=wanted.path, size=100)

    assert len(selected(tmp_path / "s.selection") & set(range(100))) >= 85


@pytest.fixture(scope="module")
def copied(image_tar: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Real images: 40, ten of them a second time under another name, ten again as JPEGs of another quality, and two
    files of the same size that have nothing in common."""
    folder = tmp_path_factory.mktemp("copied")
    images = read_tar(image_tar, 40)
    names = sorted(images)
    more = {f"copy-{name}": images[name] for name in names[:10]}
    for name in names[10:20]:
        sink = io.BytesIO()
        Image.open(io.BytesIO(images[name]), formats=["JPEG"]).save(sink, "JPEG", quality=60)
        more[f"again-{name}"] = sink.getvalue()
    size = max(len(images[names[20]]), len(images[names[21]])) + 1
    padded = {f"padded-{name}": images[name].ljust(size, b"\0") for name in names[20:22]}
    source = write_tar(folder / "images.tar", {**images, **more, **padded})
    return cached("image", source, folder / "i.zarr", clip)


def test_copies_of_the_same_bytes_are_told_from_those_that_look_alike(copied: Store, tmp_path: Path) -> None:
    found = select(copied, tmp_path / "s.selection", by="random", exact=True)

    assert found.dropped == {"the same bytes as another, by --exact": 10}
    keys = {one["row"]: one["key"] for one in copied.samples(np.arange(copied.schema.rows))}
    table = SelectedImages(str(tmp_path / "s.selection")).copies().to_pylist()
    assert len(table) == 10
    for one in table:
        names = {keys[one["row"]].removeprefix("copy-"), keys[one["like"]].removeprefix("copy-")}
        assert len(names) == 1
        assert one["same_bytes"]


def test_images_that_are_gone_are_counted_and_kept(
    copied: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(place: Any) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(exact_copies, "read_encoded", gone)
    found = select(copied, tmp_path / "s.selection", by="random", exact=True)
    assert found.kept == copied.schema.rows
    assert "cannot be read now, and so cannot be compared byte by byte" in capsys.readouterr().err


def test_again_does_nothing_and_other_settings_are_refused_by_name(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    store, _ = world
    out = tmp_path / "s.selection"
    select(store, out, dedup=0.95)
    before = tree(out)
    select(store, out, dedup=0.95)
    assert tree(out) == before
    with pytest.raises(OutputExistsError, match=r"dedup: 0\.95 != 0\.9"):
        select(store, out, dedup=0.9)


@pytest.mark.parametrize("stop", ["narrow", "write_kept_images", "write_copies", "markdown_report"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    store, _ = world
    select(store, tmp_path / "whole.selection", dedup=0.95, balance=True, size=300)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, stop, killed)
        with pytest.raises(KeyboardInterrupt):
            select(store, tmp_path / "s.selection", dedup=0.95, balance=True, size=300)
    with pytest.raises(StoreError, match="is unfinished"):
        SelectedImages(str(tmp_path / "s.selection"))
    select(store, tmp_path / "s.selection", dedup=0.95, balance=True, size=300)
    assert tree(tmp_path / "s.selection") == tree(tmp_path / "whole.selection")


def test_sentences_are_encoded_once_and_compared_by_their_words(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device rounds their embeddings otherwise; and a teacher takes long to load."""
    store, values = world
    out, calls = tmp_path / "s.selection", list[tuple[str, ...]]()

    def encode(sentences: tuple[str, ...]) -> np.ndarray[Any, Any]:
        calls.append(sentences)
        found: np.ndarray[Any, Any] = values[[20, 30]].astype(np.float32)
        return found

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words: dict[str, Any] = {"encode": encode, "drop_above": 0.6, "dedup": 0.95}
    with monkeypatch.context() as patched:
        patched.setattr(module, "narrow", killed)
        with pytest.raises(KeyboardInterrupt):
            select(store, out, drop_near=("a", "b"), **words)
    assert calls == [("a", "b")]
    with pytest.raises(OutputExistsError, match=r"drop_near: \('a', 'b'\) != \('c',\)"):
        select(store, out, drop_near=("c",), **words)
    first = select(store, out, drop_near=("a", "b"), **words)
    plan = json.loads((out / "plan.json").read_text())
    plan["settings"]["drop_data"] = "0" * 64  # as older releases have it
    plan.pop(CHECKSUM)
    (out / "plan.json").write_text(json.dumps({**plan, CHECKSUM: digest_of(plan)}))
    assert select(store, out, drop_near=("a", "b"), **words) == first
    assert calls == [("a", "b")]


def test_damaged_embeddings_of_sentences_are_made_again(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, values = world
    words: dict[str, Any] = {
        "drop_near": ("a",),
        "drop_above": 0.6,
        "encode": lambda _: values[[20]].astype(np.float32),
    }
    select(store, tmp_path / "whole.selection", **words)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            select(store, tmp_path / "s.selection", **words)
    vectors = tmp_path / "s.selection" / "unwanted" / "vectors"
    vectors.write_bytes(bytes([*vectors.read_bytes()[:-5], 0, 0, 0, 0, 0]))
    select(store, tmp_path / "s.selection", **words)
    assert tree(tmp_path / "s.selection") == tree(tmp_path / "whole.selection")


def test_a_teacher_that_is_gone_leaves_nothing_behind(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    def gone(_: Any) -> Any:
        raise TeacherError("gone", remedy="give --teacher")

    with pytest.raises(TeacherError):
        select(world[0], tmp_path / "s.selection", gone, drop_near=("a",), drop_above=0.6)
    assert not (tmp_path / "s.selection").exists()


def test_one_cluster_of_equal_images_leaves_one(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "i.zarr", rows=50, shard_rows=32, values=np.ones((50, 16)))
    found = select(store, tmp_path / "s.selection", dedup=0.99)
    assert (found.kept, found.groups) == (1, {"11 or more": 1})


def test_a_store_without_any_embedding_is_an_error(tmp_path: Path) -> None:
    store, _ = random_store(tmp_path / "i.zarr", rows=3, shard_rows=16, failed=(0, 1, 2))
    with pytest.raises(SelectionError, match="has no image with an embedding"):
        select(store, tmp_path / "s.selection", dedup=0.99)
    with pytest.raises(SelectionError, match="no image is left"):
        select(store, tmp_path / "r.selection", by="random", size=1)


def test_where_nothing_was_left_other_settings_can_be_tried(
    world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    store, values = world
    asked = values[[20]].astype(np.float32)
    words: dict[str, Any] = {"drop_near": ("a",), "encode": lambda sentences: asked}
    with pytest.raises(SelectionError, match="no image is left"):
        select(store, tmp_path / "s.selection", drop_above=-0.99, **words)
    assert select(store, tmp_path / "s.selection", drop_above=0.9, **words).kept > 400


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({}, "nothing says what to leave out"),
        ({"by": "near", "size": 1}, "--by near needs --near"),
        ({"near": "t.zarr", "by": "random", "size": 1}, "--near has no effect without --by near"),
        ({"drop_near": ("x",)}, "--drop-near needs --drop-above"),
        ({"drop_above": 0.2, "size": 1}, "--drop-above has no effect without --drop-near"),
        ({"balance": True, "dedup": 0.9}, "--balance has no effect without --size"),
        ({"top": 5, "size": 9}, "--top has no effect without --dedup or --balance"),
        ({"balance": True, "size": 9, "top": 9}, "leaves --size 9 no choice"),
        ({"near_sample": 4, "size": 9}, "--near-sample has no effect without --near"),
        ({"dedup": 1.5}, "--dedup must lie between 0 and 1"),
    ],
)
def test_settings_without_effect_are_refused(words: dict[str, Any], what: str) -> None:
    with pytest.raises(SelectionError, match=what):
        ImageSelectionConfig(images="i.zarr", out="s.selection", **words)


def test_targets_of_another_teacher_are_refused(world: tuple[Store, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    other, _ = random_store(tmp_path / "t.zarr", rows=16, shard_rows=16, kind="text", weights="9" * 64)
    assert teacher_identity().weights != "9" * 64
    with pytest.raises(MismatchError, match="come from different teachers"):
        select(world[0], tmp_path / "s.selection", near=other.path, size=9)


# -- training ---------------------------------------------------------------------------------------------------------


def test_only_selected_images_are_trained_on(image_store: Store, text_store: Store, tmp_path: Path) -> None:
    select(image_store, tmp_path / "a.selection", by="random", size=40)
    select(image_store, tmp_path / "b.selection", by="random", size=41)
    config = tiny_config(
        image_store, text_store, tmp_path / "run", image_selection=str(tmp_path / "a.selection"), max_steps=4
    )
    plan = plan_feed(config, 1)
    drawn = {row for _, _, rows_G in plan.images.steps(0, 12) for row in rows_G.tolist()}
    assert drawn <= selected(tmp_path / "a.selection")
    assert len(drawn) > 32
    assert plan.steps_per_epoch == 40 // config.batch_size
    train(replace(config, max_steps=2))
    digest = SelectedImages(str(tmp_path / "a.selection")).document.digest
    assert read_run(config.out).image_selection_digest == digest
    with pytest.raises(MismatchError, match="image_selection_digest: "):
        train(replace(config, image_selection=str(tmp_path / "b.selection")))
    with pytest.raises(MismatchError, match="image_selection_digest: "):
        train(replace(config, image_selection=None))


def test_a_selection_of_other_images_is_refused(
    world: tuple[Store, np.ndarray[Any, Any]], image_store: Store, text_store: Store, tmp_path: Path
) -> None:
    select(world[0], tmp_path / "s.selection", by="random", size=40)
    config = tiny_config(image_store, text_store, tmp_path / "run", image_selection=str(tmp_path / "s.selection"))
    with pytest.raises(MismatchError, match="other images than those of"):
        plan_feed(config, 1)
    with pytest.raises(TrainingError, match="image_selection is of one image store"):
        replace(config, images=f"{image_store.path}::{image_store.path}")


def test_a_store_of_views_is_selected_from(image_tar: Path, clip: Clip, tmp_path: Path) -> None:
    store = cached(
        "image", image_tar, tmp_path / "v.zarr", clip, views=ViewPlan(count=2, seed=0, crop_scale=(0.5, 1.0), flip=True)
    )
    found = select(store, tmp_path / "s.selection", dedup=0.99, size=30)
    assert found.kept == 30
