"""Captions of images: read with the images, cached in a store of their own, and put to the images whose they are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schemas.plan import CAPTIONS
from dimefm.errors import MismatchError, SourceError, StoreError
from dimefm.inspection.info import describe, examine
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.store.captions import Captions, open_captions
from dimefm.store.embedding_store import Store
from dimefm.system import storage
from pipeline.cache import CacheConfig, cache, captions_place, dry_run
from tests.making import make_jpeg, write_tar

LONG = "a very long sentence " * 40
MEMBERS = {
    "a.jpg": make_jpeg(seed=1),
    "a.txt": b"a red bus\nA dog.\na red bus\n\n",  # a repeat, and a blank line
    "b.jpg": make_jpeg(seed=2),
    "b.txt": "a dog.\n\u00e9t\u00e9\n".encode(),  # the tokenizer lowers the case: one row with A dog.
    "c.jpg": make_jpeg(seed=3),  # without a caption
    "d.jpg": b"no image",
    "d.txt": b"a caption of a broken image",
    "e.jpg": make_jpeg(seed=4),
    "e.txt": LONG.encode() + b"\n\xff\xfe bad bytes \xe9\n\x00\x00\n",
    "f.txt": b"of no image",
    "g.jpg": make_jpeg(seed=5),
    "g.txt": b"",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_name: str) -> CacheConfig:
    """What a command over a tar with captions was given; it is done. Nothing may be written to its stores."""
    folder = tmp_path_factory.mktemp("captions")
    tar = write_tar(folder / "photos.tar", MEMBERS)
    found = config(tar, folder, teacher_name)
    cache(found)
    return found


def config(source: Path | str, folder: Path, teacher: str, **changes: Any) -> CacheConfig:
    words: dict[str, Any] = {"captions": "txt", "workers": 1, "device": "cpu", "shard_rows": 4, **changes}
    return CacheConfig(kind="image", sources=(str(source),), out=str(folder / "I.zarr"), teacher=teacher, **words)


def opened(made: CacheConfig) -> tuple[Store, Captions]:
    images = Store(made.out)
    return images, open_captions(captions_place(made), images)


def texts_of(images: Store, captions: Captions) -> dict[str, list[str]]:
    """By the key of each image its captions, by the pairs and the text store, best first."""
    sentences = [one["text"] for one in captions.texts.samples(np.arange(captions.texts.schema.rows))]
    keys = [one["key"] for one in images.samples(np.arange(images.schema.rows))]
    rows_NK = captions.pairs.text_rows(0, images.schema.rows)
    return {key: [sentences[row] for row in rows if row >= 0] for key, rows in zip(keys, rows_NK, strict=True)}


def test_each_image_has_its_own_captions(made: CacheConfig) -> None:
    images, captions = opened(made)
    found = texts_of(images, captions)
    assert {key: sorted(several) for key, several in found.items()} == {
        "a": ["A dog.", "a red bus"],
        "b": ["A dog.", "\u00e9t\u00e9"],  # of equal captions the first that was read
        "c": [],
        "d": [],  # it has no embedding, so nothing is learned from it
        "e": sorted([LONG.strip(), "\ufffd\ufffd bad bytes \ufffd"]),
        "g": [],
    }
    assert "a caption of a broken image" in [
        one["text"] for one in captions.texts.samples(np.arange(captions.texts.schema.rows))
    ]
    assert captions.pairs.schema.kind == "captions"


def test_scores_are_the_teachers_cosines_best_first(made: CacheConfig) -> None:
    images, captions = opened(made)
    rows_NK, scores_NK = captions.pairs.text_rows(0, 6), captions.pairs.scores(0, 6)
    image_ND = images.read(0, 6).astype(np.float32)
    text_TD = captions.texts.read(0, captions.texts.schema.rows).astype(np.float32)
    for row in (0, 1, 4):
        expected = text_TD[rows_NK[row]] @ image_ND[row]
        assert np.allclose(scores_NK[row], expected, atol=1e-3)
        assert expected[0] >= expected[1]
    assert np.isnan(scores_NK[rows_NK < 0]).all()
    assert (captions.pairs.hits() == np.bincount(rows_NK[rows_NK >= 0], minlength=len(text_TD))).all()


def test_what_is_not_used_is_counted(made: CacheConfig) -> None:
    images = Store(made.out)
    skipped = {one.reason: (one.count, one.example) for one in images.schema.source.skipped}
    assert skipped["captions that an image has twice"][0] == 1
    assert skipped["captions that are blank"][0] == 1
    assert skipped["captions with NUL bytes in them, which is damage"][0] == 1
    assert skipped["members with the captions of no image of the same tar"][1].endswith("photos.tar: f.txt")
    assert skipped["images without a caption (they are cached as the others are)"][0] == 2
    assert skipped["captions whose end is beyond the teacher's context (their beginning is cached)"][0] == 1
    assert any("1 captions are not UTF-8" in problem for problem in images.schema.source.problems)
    assert skipped["files of captions that are empty"][1].endswith("photos.tar: g.txt")
    assert len(skipped) == 7
    text = " ".join(describe(captions_place(made)).split())
    assert "3 of 6 images, up to 2 each" in text
    assert examine(f"{captions_place(made)}/pairs").facts["kind"] == "captions"


def test_the_same_command_is_done_and_another_is_refused(made: CacheConfig, tmp_path: Path) -> None:
    before = {name: storage.digest_file(f"{folder}/{name}") for folder, name in _files(made)}
    cache(made)
    assert {name: storage.digest_file(f"{folder}/{name}") for folder, name in _files(made)} == before
    with pytest.raises(MismatchError, match="captions: txt != json:caption"):
        cache(config(made.sources[0], Path(made.out).parent, made.teacher, captions="json:caption"))
    again = config(made.sources[0], tmp_path, made.teacher)
    cache(again)
    arrays = [f"{name}/c/0/0" for name in ("embedding", "pairs/text_row", "pairs/score")]
    for name in arrays:
        first, second = (Path(captions_place(one), name) for one in (made, again))
        assert first.read_bytes() == second.read_bytes()


def _files(made: CacheConfig) -> list[tuple[str, str]]:
    folders = (made.out, captions_place(made))
    return [(folder, name) for folder in folders for name in sorted(storage.tree(folder))]


def test_a_run_that_was_stopped_while_it_aligned_goes_on(
    made: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dimefm.caching import align_captions

    mine, whole = config(made.sources[0], tmp_path, made.teacher), align_captions._align_shard

    def stop_at_the_second(*given: Any) -> None:
        if given[-2] == 1:
            raise StoreError("stopped here", remedy="go on")
        whole(*given)

    monkeypatch.setattr(align_captions, "_align_shard", stop_at_the_second)
    with pytest.raises(StoreError, match="stopped here"):
        cache(mine)
    with pytest.raises(StoreError, match="unfinished"):
        opened(mine)
    monkeypatch.setattr(align_captions, "_align_shard", lambda *given: given[-2] and whole(*given))
    cache(mine)
    assert texts_of(*opened(mine)) == texts_of(*opened(made))


def test_images_that_are_encoded_again_are_aligned_again(made: CacheConfig, tmp_path: Path) -> None:
    whole = make_jpeg(seed=6)
    tar = write_tar(tmp_path / "photos.tar", {**MEMBERS, "d.jpg": bytes(len(whole))})
    mine, time = config(tar, tmp_path, made.teacher), tar.stat().st_mtime_ns
    cache(mine)
    assert texts_of(*opened(mine))["d"] == []
    write_tar(tar, {**MEMBERS, "d.jpg": whole})
    os.utime(tar, ns=(time, time))  # the same file, as far as anybody can tell
    before = Path(captions_place(mine), "pairs/commits/000001.json").read_bytes()
    cache(replace(mine, retry_failed=True))
    assert texts_of(*opened(mine))["d"] == ["a caption of a broken image"]
    assert Path(captions_place(mine), "pairs/commits/000001.json").read_bytes() == before  # its images are the same


def test_verify_finds_damaged_pairs(made: CacheConfig, tmp_path: Path) -> None:
    mine = config(made.sources[0], tmp_path, made.teacher)
    cache(mine)
    place = captions_place(mine)
    report = verify(VerifyConfig(store=place))
    assert report.trusted
    assert "captions of 3 of 6 images" in report.show()
    file = Path(place, "pairs/text_row/c/0/0")
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(bytes(data))
    (Path(place) / "pairs" / "stranger").write_text("x")
    report = verify(VerifyConfig(store=place))
    assert not report.trusted
    assert [("shard 0" in fault, "stranger" in fault) for fault in report.faults] == [(True, False), (False, True)]


def test_captions_of_other_images_are_refused(made: CacheConfig, image_store: Store) -> None:
    with pytest.raises(MismatchError, match="over other images"):
        open_captions(captions_place(made), image_store)


def test_sentences_that_are_no_captions_are_refused(made: CacheConfig, text_store: Store) -> None:
    with pytest.raises(StoreError, match="does not say whose captions"):
        open_captions(text_store.path, Store(made.out))


def test_a_dry_run_counts_captions_and_writes_nothing(made: CacheConfig, tmp_path: Path, clip: Clip) -> None:
    mine = config(made.sources[0], tmp_path, made.teacher)
    text = dry_run(mine)
    assert "7, which" in text
    assert "I.captions.zarr gets after the images" in " ".join(text.split())
    assert "images without a caption" in " ".join(text.split())
    assert not list(tmp_path.iterdir())


def test_no_caption_at_all_is_an_error(made: CacheConfig, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image has a caption by --captions json:caption"):
        cache(config(made.sources[0], tmp_path, made.teacher, captions="json:caption"))
    assert not list(tmp_path.iterdir())


def test_captions_go_with_limit_and_stay_in_the_plan(made: CacheConfig, tmp_path: Path) -> None:
    store = cache(config(made.sources[0], tmp_path, made.teacher, limit=2))
    assert store.plan(0)[CAPTIONS].to_pylist() == [["a red bus", "A dog."], ["a dog.", "\u00e9t\u00e9"]]
    assert json.loads(Path(store.path, "zarr.json").read_text())["attributes"]["dimefm"]["source"]["settings"] == {
        "captions": "txt",
        "limit": 2,
    }


def test_captions_that_are_encoded_again_are_aligned_again(made: CacheConfig, tmp_path: Path) -> None:
    mine = config(made.sources[0], tmp_path, made.teacher)
    cache(mine)
    texts = Store(captions_place(mine))
    arrays = texts.shard_arrays(0)
    arrays["embedding"] = -arrays["embedding"]
    texts.write_shard(0, arrays, [], device="cpu", seconds=1.0)
    with pytest.raises(MismatchError, match="other embeddings"):
        opened(mine)
    cache(mine)
    before, after = (opened(one)[1].pairs.scores(0, 2) for one in (made, mine))
    assert np.allclose(after, -before[:, ::-1], atol=1e-3)
