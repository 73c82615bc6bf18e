"""leaks: planted copies in a test set are found, left out of the selection, and of the accuracy on clean images."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache_schemas.document import CHECKSUM, digest_of
from dimefm.errors import MismatchError, OutputExistsError, SelectionError, SourceError, StoreError, UnreadableError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.inspection.info import describe, examine
from dimefm.leaks import find_leaks as module
from dimefm.leaks import image_pairs
from dimefm.leaks.report import as_text
from dimefm.models.clip import Clip
from dimefm.store.embedding_store import Store
from dimefm.store.leaked_rows import read_leaks
from dimefm.store.selected_images import SelectedImages
from dimefm.training.train import train
from tests.leaks.planted import COPIED, run, write_test_set
from tests.making import tree
from tests.tiny_training import tiny_config


@pytest.fixture(scope="module")
def test_set(image_tar: Path, cifar10: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the set, and the keys of the training images that were copied."""
    folder = tmp_path_factory.mktemp("sets") / "planted"
    return folder, write_test_set(folder, image_tar, cifar10)


@pytest.fixture(scope="module")
def found(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("leaks") / "l.selection"
    run(image_store, test_set[0], out, clip)
    return out


def test_planted_copies_are_found_and_nothing_else(
    found: Path, image_store: Store, test_set: tuple[Path, list[str]]
) -> None:
    table = pq.read_table(found / "leaks.parquet").to_pylist()
    leaks = [one for one in table if one["leak"]]
    assert len(table) == 24 * 96
    assert {one["key"] for one in leaks} == set(test_set[1])
    assert sorted(one["test_key"].rpartition("/")[2] for one in leaks) == [f"copy{number}" for number in range(COPIED)]
    facts = examine(str(found)).facts["leaks"]
    assert [(one["tested"], one["leaked"], one["candidates"], one["unread"]) for one in facts] == [(24, 6, 24 * 96, 0)]
    kept = SelectedImages(str(found)).rows()
    assert len(kept) == image_store.schema.rows - COPIED
    assert not set(kept.tolist()) & {one["row"] for one in leaks}
    assert "6 of 24 images of own-planted" in describe(str(found))
    assert "in a test set" in (found / "report.md").read_text()


def test_evaluation_tells_the_clean_ones(
    found: Path, image_store: Store, text_store: Store, test_set: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=2)
    train(config)
    words: dict[str, Any] = {"folders": (str(test_set[0]),), "out": str(tmp_path / "e"), "predictions": True}
    (without,) = evaluate(EvaluationConfig(model=config.out, skip_existing=True, **words)).results
    assert "clean_top1" not in without.metrics
    (result,) = evaluate(EvaluationConfig(model=config.out, leaks=str(found), skip_existing=True, **words)).results
    predicted = pq.read_table(next((tmp_path / "e").rglob("predictions/*.parquet"))).to_pylist()
    clean = [one["correct"] for one in predicted if "other" in one["key"]]
    assert len(clean) == 18
    assert result.metrics["clean_top1"] == pytest.approx(np.mean(clean))
    assert result.metrics["top1"] == pytest.approx(np.mean([one["correct"] for one in predicted]))
    assert result.intervals["clean_top1"][0] <= result.metrics["clean_top1"] <= result.intervals["clean_top1"][1]
    assert "6 of 24 images stand in the images that it was trained on; top1 on the other 18" in result.notes[-1]


def test_a_run_without_them_has_no_leaks(
    found: Path, image_store: Store, text_store: Store, test_set: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", image_selection=str(found), max_steps=2)
    train(config)
    out, folders = str(tmp_path / "e"), (str(test_set[0]),)
    (result,) = evaluate(EvaluationConfig(model=config.out, leaks=str(found), folders=folders, out=out)).results
    assert result.notes[-1] == "0 of 24 images stand in the images that it was trained on"
    assert "clean_top1" not in result.metrics


def test_leaks_of_other_images_are_refused(
    found: Path, image_store: Store, text_store: Store, test_set: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=2)
    train(config)
    document = tmp_path / "run" / "run.json"
    body = {**json.loads(document.read_text()), "images_data": "0" * 64}
    body.pop(CHECKSUM)
    document.write_text(json.dumps({**body, CHECKSUM: digest_of(body)}))
    asked = EvaluationConfig(model=config.out, folders=(str(test_set[0]),), out=str(tmp_path / "e"), leaks=str(found))
    with pytest.raises(MismatchError, match="was trained on other images"):
        evaluate(asked)
    with pytest.raises(StoreError, match=r"has no leaks\.json"):
        evaluate(EvaluationConfig(model=config.out, folders=(str(test_set[0]),), leaks=str(tmp_path)))


def test_a_set_that_leaks_did_not_look_at_is_named(
    found: Path, image_store: Store, text_store: Store, cifar10: str, tmp_path: Path
) -> None:
    config = tiny_config(image_store, text_store, tmp_path / "run", max_steps=2)
    train(config)
    asked = EvaluationConfig(model=config.out, folders=(cifar10,), out=str(tmp_path / "e"), leaks=str(found))
    (result,) = evaluate(asked).results
    assert result.notes[-1] == "dimefm leaks did not look at these images of cifar10"
    assert not [name for name in result.metrics if name.startswith("clean")]


def test_again_does_nothing_and_other_sets_are_refused(
    found: Path, image_store: Store, test_set: tuple[Path, list[str]], cifar10: str, clip: Clip
) -> None:
    before = tree(found)
    assert run(image_store, test_set[0], found, clip).rows == COPIED
    assert tree(found) == before
    with pytest.raises(OutputExistsError, match=r":\n  - set own-cifar10: None != [0-9a-f]{64}\n.*another --out"):
        run(image_store, [test_set[0], Path(cifar10)], found, clip)
    with pytest.raises(
        OutputExistsError, match=r":\n  - cosine: -1\.0 != 0\.5\n  - similarity: 0\.75 != 0\.9\n.*another"
    ):
        run(image_store, test_set[0], found, clip, cosine=0.5, similarity=0.9)


def test_a_plan_of_an_older_release_is_gone_on_with(
    found: Path, image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path: Path
) -> None:
    """Its plan has the digest of what was looked for alone, and its leaks.json no count of what could not be read."""
    copytree(found, tmp_path / "l.selection")
    for name, drop in (("plan.json", lambda body: body.pop("looked_for")),
                       ("leaks.json", lambda body: body["sets"][0].pop("unreadable"))):  # fmt: skip
        document = tmp_path / "l.selection" / name
        body = json.loads(document.read_text())
        drop(body)
        body.pop(CHECKSUM)
        document.write_text(json.dumps({**body, CHECKSUM: digest_of(body)}))
    again = run(image_store, test_set[0], tmp_path / "l.selection", clip)
    assert (again.rows, again.sets[0].unreadable) == (COPIED, None)
    with pytest.raises(OutputExistsError, match="leaks: "):
        run(image_store, test_set[0], tmp_path / "l.selection", clip, similarity=0.9)


def test_a_stopped_search_goes_on_without_encoding_again(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, found: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(image_pairs, "_candidates", killed)
        with pytest.raises(KeyboardInterrupt):
            run(image_store, test_set[0], tmp_path / "l.selection", clip)
    features = tmp_path / "l.selection" / "features"
    before = {place: place.stat().st_mtime_ns for place in features.rglob("*")}
    run(image_store, test_set[0], tmp_path / "l.selection", clip)
    assert {place: place.stat().st_mtime_ns for place in before} == before
    assert pq.read_table(tmp_path / "l.selection" / "leaks.parquet") == pq.read_table(found / "leaks.parquet")


def test_pairs_that_were_kept_are_compared_again_only_where_they_are_damaged(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, real, out = list[str](), module.image_pairs, tmp_path / "l.selection"
    monkeypatch.setattr(module, "image_pairs", lambda title, *rest: compared.append(title) or real(title, *rest))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def stopped() -> bytes:
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_table", killed)
            with pytest.raises(KeyboardInterrupt):
                run(image_store, test_set[0], out, clip, nearest=2)
        return (out / "pairs" / "own-planted").read_bytes()

    whole = stopped()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 1  # of a value: Parquet itself may not see it
    (out / "pairs" / "own-planted").write_bytes(damaged)
    assert stopped() == whole
    assert compared == ["own-planted"] * 2
    run(image_store, test_set[0], out, clip, nearest=2)
    assert len(pq.read_table(out / "leaks.parquet")) == 24 * 2
    assert compared == ["own-planted"] * 2


def test_test_images_that_cannot_be_read_are_counted_with_their_reason(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path: Path
) -> None:
    copytree(test_set[0], tmp_path / "planted")
    (tmp_path / "planted" / "test" / "class 0" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "planted" / "test" / "class 1" / "empty.jpg").write_bytes(b"")
    out = tmp_path / "l.selection"
    document = run(image_store, tmp_path / "planted", out, clip, nearest=1)
    assert read_leaks(str(out)) == document
    (one,) = document.sets
    assert (one.tested, one.candidates, one.unread) == (26, 24, 0)
    assert one.unreadable == {"UNDECODABLE": 1, "EMPTY": 1}
    sentence = "2 of 26 images of own-planted could not be encoded, and so not be looked for: 1 EMPTY, 1 UNDECODABLE"
    assert sentence in as_text(document, str(out))
    assert sentence in " ".join(describe(str(out)).split())
    assert examine(str(out)).facts["leaks"][0]["unreadable"] == one.unreadable


def test_images_that_cannot_be_read_are_counted(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(place: Any) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(image_pairs, "read_encoded", gone)
    with pytest.raises(UnreadableError, match=r"not one of 2,304 pairs can be compared"):
        run(image_store, test_set[0], tmp_path / "l.selection", clip)
    assert not (tmp_path / "l.selection" / "selection.json").exists()
    monkeypatch.undo()
    real, seen = image_pairs.read_encoded, list[Any]()

    def some(place: Any) -> bytes:
        seen.append(place)
        if len(seen) % 5 == 0:
            raise FileNotFoundError
        return real(place)

    monkeypatch.setattr(image_pairs, "read_encoded", some)
    document = run(image_store, test_set[0], tmp_path / "l.selection", clip)
    (one,) = document.sets
    assert 0 < one.unread < 24 * 96
    assert "could not be compared" in as_text(document, "l.selection")


def test_a_set_that_is_not_there_is_an_error(image_store: Store, clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        run(image_store, tmp_path / "nothing", tmp_path / "l.selection", clip)


def test_where_every_image_leaks_other_options_can_be_tried(
    image_store: Store, test_set: tuple[Path, list[str]], clip: Clip, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=r"no image is left"):
        run(image_store, test_set[0], tmp_path / "l.selection", clip, similarity=0.0)
    assert len(run(image_store, test_set[0], tmp_path / "l.selection", clip).sets) == 1
    assert len(SelectedImages(str(tmp_path / "l.selection")).rows()) == image_store.schema.rows - COPIED
