"""The whole suite over tiny copies of all known sets: from images to the summary, the comparison and the submission."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.zero_shot_metadata
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from scipy.special import softmax

from dimefm.cli import cli
from dimefm.datasets.definitions import class_names, load_definitions
from dimefm.datasets.known_sets import open_set
from dimefm.errors import StoreError
from dimefm.evaluation import features as featuring
from dimefm.evaluation.compare import compare, write_comparison
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import Evaluation, evaluate
from dimefm.evaluation.features import compute_features
from dimefm.evaluation.predictions import read_keys, read_scores
from dimefm.evaluation.results import read_results
from dimefm.evaluation.submission import write_submission
from dimefm.evaluation.summary import result_text, summary_text
from dimefm.images.preprocess import Preprocess
from dimefm.models.clip import Clip, load_clip
from dimefm.sources.read_image import read_encoded
from dimefm.store.embedding_store import Store
from tests.synthetic_published import trust
from tests.synthetic_sets import AMBIGUOUS, IMAGES, Items, as_read, forms_of, missing_images, write_set
from tests.tiny_clip import write_clip

KNOWN = load_definitions()
METRICS = {
    "accuracy": "top1",
    "mean_per_class": "mean_per_class",
    "roc_auc": "roc_auc",
    "map_11_point": "map_11_point",
    "recall": "mean_recall@1",
}
ELEVATER = [name for name, definition in KNOWN.items() if definition.suite == "elevater"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@dataclass
class Done:
    """An evaluation of all sets: the model, the sets' folder, what was written there, and what came of it."""

    model: str
    root: Path
    items: dict[str, Items]
    done: Evaluation

    @property
    def out(self) -> str:
        return self.done.folder

    def config(self, **changes: Any) -> EvaluationConfig:
        words = {"model": self.model, "data": str(self.root), "out": str(self.root.parent / "out"), "threads": 1}
        return EvaluationConfig(**{**words, "device": "cpu", **changes})


def form_of(name: str, turn: int) -> str:
    """In the first turn as the publishers have it, if the definition has that, else in tars, else in what it has;
    in the second turn one of the others. Never a thousand class folders."""
    forms = [form for form in forms_of(KNOWN[name]) if not (name in AMBIGUOUS and form in ("folders", "torchvision"))]
    first = next(form for form in ("torchvision", "original", "webdataset", forms[0]) if form in forms)
    others = [form for form in forms if form not in (first, "webdataset")] or [first]
    return others[list(KNOWN).index(name) % len(others)] if turn else first


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """ImageNet with three templates: its 80 are 80,000 prompts."""
    with pytest.MonkeyPatch.context() as patch:
        some = open_clip.zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES[:3]
        patch.setattr(open_clip.zero_shot_metadata, "OPENAI_IMAGENET_TEMPLATES", some)
        torch.set_num_threads(1)
        yield patch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny")


def measured(turn: int, folder: Path, model: str, patch: pytest.MonkeyPatch, **changes: Any) -> Done:
    items = {name: write_set(name, form_of(name, turn), folder / "sets" / name) for name in KNOWN}
    trust(patch, folder / "sets")
    done = Done(model, folder / "sets", items, Evaluation(""))
    done.done = evaluate(done.config(suite="all", **changes))
    return done


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, model: str, patch: pytest.MonkeyPatch) -> Done:
    """All sets as their publishers have them, with predictions. Not to be written to."""
    return measured(0, tmp_path_factory.mktemp("first"), model, patch, predictions=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards of images and batches of texts that are encoded, as they are."""
    seen: list[str] = []
    shard, tokens = featuring.encode_shard, Clip.encode_tokens
    monkeypatch.setattr(featuring, "encode_shard", lambda *a, **w: (seen.append("shard"), shard(*a, **w))[1])
    monkeypatch.setattr(Clip, "encode_tokens", lambda *a: (seen.append("texts"), tokens(*a))[1])
    return seen


# -- all sets ---------------------------------------------------------------------------------------------------------


def test_every_set_has_the_result_that_its_definition_asks_for(first: Done) -> None:
    done = first.done
    assert (done.missing, done.failed) == ([], [])
    assert [result.set for result in done.results] == list(KNOWN)
    for result in done.results:
        definition = KNOWN[result.set]
        assert (result.suite, result.protocol) == (definition.suite, "zero-shot")
        assert result.metric == METRICS[definition.metric]
        assert set(result.intervals) == set(result.metrics) >= {result.metric}
        assert all(0 <= low <= high <= 1 for low, high in result.intervals.values())
        assert (result.images, result.expected) == (IMAGES, definition.splits["test"])
        assert (result.classes, result.unreadable) == (definition.class_count, 0)
        for missing in missing_images(definition):
            assert result.partial[0] == missing
            assert f"partial: {missing}" in " ".join(result_text(result).split())
    assert read_results(done.folder) == done.results
    lines = Path(done.folder, "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["set"] for line in lines] == list(KNOWN)


def test_predictions_are_those_of_each_image(first: Done, model: str) -> None:
    """Of every set, the labels beside the images; of one, what the model itself says of them."""
    classified = [result for result in first.done.results if result.classes]
    for result in classified:
        images = open_set(KNOWN[result.set], str(first.root), "test", str(first.root.parent / "out" / "unpacked"))
        assert images is not None
        table = pq.read_table(Path(first.out, "predictions", f"{result.set}.zero-shot.parquet")).to_pydict()
        assert table["key"] == [sample.key for sample in images.samples]
        said = [tuple(label) if isinstance(label, list) else label for label in table["label"]]
        assert said == list(as_read(images).values())
        assert set(said) == {item.said for item in first.items[result.set]["test"]}
        if KNOWN[result.set].task != "multilabel":
            right = [label == prediction for label, prediction in zip(said, table["prediction"], strict=True)]
            assert right == table["correct"]
            assert result.metrics["top1"] == pytest.approx(np.mean(right))
        assert f"# {result.set}: " in Path(first.out, "predictions", f"{result.set}.zero-shot.md").read_text()
    clip, images = load_clip(f"local-dir:{model}", device="cpu"), open_set(KNOWN["dtd"], str(first.root), "test", "")
    assert images is not None
    prepare = Preprocess(clip.identity.preprocessing, exact=True)
    pixels = torch.stack([prepare(read_encoded(s)) for s in images.samples])
    heads = torch.stack([clip.encode_texts(prompts).mean(0) for prompts in images.prompts()])
    cosines = clip.encode_images(pixels) @ torch.nn.functional.normalize(heads, dim=-1).T
    scores = read_scores(str(Path(first.out, "predictions", "dtd.zero-shot.parquet")))
    assert scores == pytest.approx(softmax(100 * cosines.numpy(), axis=1), abs=1e-5)


def test_the_summary_has_the_means_of_whole_suites(first: Done) -> None:
    text = summary_text(first.done)
    elevater = [result.value for result in first.done.results if result.suite == "elevater"]
    assert f"elevater zero-shot      {np.mean(elevater):6.1%} [" in text
    assert "mean of 20 of 20 sets, 20 partial" in text
    assert "mean of 5 of 5 sets, 5 partial" in text
    for name in ("imagenetv2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet", "mean"):
        assert f"effective robustness, {name}" in text


@pytest.mark.slow
def test_other_layouts_of_the_same_images_give_the_same_numbers(
    first: Done, tmp_path: Path, model: str, patch: pytest.MonkeyPatch
) -> None:
    """But where an image is another file: WebP or PNG in the one, JPEG in the other; or has fewer captions."""
    second = measured(1, tmp_path, model, patch, predictions=True)
    assert (second.done.missing, second.done.failed) == ([], [])
    same = []
    for one, other in zip(first.done.results, second.done.results, strict=True):
        assert (one.set, one.metric, one.images, one.partial) == (other.set, other.metric, other.images, other.partial)
        if first.items[one.set]["test"] == second.items[one.set]["test"] and form_of(one.set, 1) != "parquet-names":
            same.append(one.set)
            assert one.metrics == pytest.approx(other.metrics), one.set
            if one.classes:
                scores = [
                    read_scores(f"{done.out}/predictions/{one.set}.zero-shot.parquet") for done in (first, second)
                ]
                assert np.allclose(*(np.sort(scores_NC, axis=0) for scores_NC in scores), atol=1e-6)
    assert len(same) >= 8


def test_kitti_gives_up_the_aspect_ratio_and_others_do_not(first: Done, model: str, tmp_path: Path) -> None:
    modes = {
        name: Store(f"{first.out}/features/{name}-test.zarr").schema.teacher.preprocessing.resize_mode for name in KNOWN
    }
    assert modes["kitti_distance"] == "squash"
    assert modes == {name: "squash" if d.resize == "squash" else "shortest" for name, d in KNOWN.items()}
    assert all(result.settings["resize"] == KNOWN[result.set].resize for result in first.done.results)
    clip, images = (
        load_clip(f"local-dir:{model}"),
        open_set(KNOWN["kitti_distance"], str(first.root), "test", str(tmp_path)),
    )
    assert images is not None
    facts = clip.identity.preprocessing
    data = read_encoded(images.samples[0])
    squashed, cropped = (Preprocess(replace(facts, resize_mode=mode))(data) for mode in ("squash", "shortest"))
    assert (squashed.int() - cropped.int()).abs().max() > 20
    kept = Store(f"{first.out}/features/kitti_distance-test.zarr").read(0, IMAGES)
    for squash in (True, False):
        embedded = compute_features(clip, images, str(tmp_path / f"{squash}.zarr"), squash=squash, threads=1).all()
        assert np.allclose(embedded, kept, atol=1e-6) == squash


# -- again, and in part -----------------------------------------------------------------------------------------------


def test_skip_existing_encodes_and_writes_nothing(first: Done, calls: list[str]) -> None:
    path = Path(first.out, "results.jsonl")
    before = path.read_bytes()
    again = evaluate(first.config(suite="all", skip_existing=True, predictions=True))
    assert again.results == first.done.results
    assert (calls, path.read_bytes()) == ([], before)


def test_a_second_model_with_the_text_tower_embeds_no_text(first: Done, tmp_path: Path, calls: list[str]) -> None:
    """And one with another does."""
    same, other = (write_clip(tmp_path / f"m{text}", 1, text) for text in (0, 5))
    done = evaluate(first.config(model=same, sets=("dtd", "mnist", "flickr30k")))
    assert calls == ["shard"] * 3
    assert [result.model["text_tower"] for result in done.results] == [first.done.results[0].model["text_tower"]] * 3
    assert done.results[0].model["weights"] != first.done.results[0].model["weights"]
    calls.clear()
    evaluate(first.config(model=other, sets=("mnist",)))
    assert sorted(set(calls)) == ["shard", "texts"]


def test_a_missing_set_is_listed_with_its_source_and_the_rest_runs(first: Done, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "flickr30k").symlink_to(first.root / "flickr30k")
    words = ("--suite", "retrieval", "--data", tmp_path / "sets", "--out", tmp_path / "out", "--threads", 1)
    result = run("evaluate", first.model, *words)
    assert result.exit_code == 0, result.output
    assert "flickr30k          zero-shot    recall@1" in result.output
    get = f"coco_captions: test images not found. Get it from {KNOWN['coco_captions'].get}"
    assert get in " ".join(result.output.split())


def test_a_broken_set_is_listed_as_failed_and_the_rest_runs(first: Done, tmp_path: Path) -> None:
    write_set("mnist", "flat", tmp_path / "sets" / "mnist")
    write_set("dtd", "flat", tmp_path / "sets" / "dtd")
    tar = tmp_path / "sets" / "dtd" / "test-00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    words = ("--sets", "dtd,mnist", "--data", tmp_path / "sets", "--out", tmp_path / "out", "--threads", 1)
    result = run("evaluate", first.model, *words)
    assert result.exit_code == 1
    assert f"dtd: FAILED: {tar}: broken after" in result.output
    assert [result.set for result in read_results(str(tmp_path / "out" / "tiny"))] == ["mnist"]


def test_where_nothing_is_there_it_is_an_error(first: Done, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    result = run("evaluate", first.model, "--suite", "all", "--data", tmp_path / "sets", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"none of the sets is below {tmp_path / 'sets'}" in result.output
    assert not (tmp_path / "out" / "tiny").exists()


def test_a_users_own_sets_stand_beside_the_known_ones(first: Done, tmp_path: Path) -> None:
    """One of class folders called as a known one is, and one of captions below the same root."""
    write_set("mnist", "folders", tmp_path / "mnist")
    (tmp_path / "mnist" / "classnames.txt").write_text("".join(f"{name}\n" for name in class_names(KNOWN["mnist"])))
    (tmp_path / "mnist" / "templates.txt").write_text('a photo of the number: "{c}".\n')
    write_set("flickr30k", "flat", tmp_path / "sets" / "captioned")
    write_set("mnist", "folders", tmp_path / "sets" / "mnist")
    words: dict[str, Any] = {"folders": (str(tmp_path / "mnist"),), "sets": ("mnist", "captioned")}
    done = evaluate(first.config(**words, data=str(tmp_path / "sets"), out=str(tmp_path / "out"), predictions=True))
    assert [(r.title, r.suite, r.metric) for r in done.results] == [
        ("own-mnist", "own", "top1"),
        ("mnist", "elevater", "top1"),
        ("own-captioned", "own", "mean_recall@1"),
    ]
    assert done.results[0].metrics == done.results[1].metrics
    assert (done.results[0].partial, done.results[0].expected) == ((), None)
    kept = sorted(path.name for path in Path(done.folder, "predictions").glob("*.parquet"))
    assert kept == ["mnist.zero-shot.parquet", "own-mnist.zero-shot.parquet"]
    assert "mean of 1 of 20 sets" in summary_text(done)


# -- comparison and submission ----------------------------------------------------------------------------------------


def test_the_comparison_marks_what_is_published(first: Done, tmp_path: Path) -> None:
    table = compare([first.out])
    for name in ("table.md", "table.csv", "table.tex"):
        write_comparison(table, str(tmp_path / name))
    head, sources, *rows = csv.reader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert (head[1], sources[1], len(head)) == ("tiny", "measured", 5)
    assert all(source.startswith("published: ") for source in sources[2:])
    cells = {row[0]: row[1:] for row in rows}
    assert cells["imagenet1k zero-shot"][1:] == ["66.5", "66.1", "67.6"]
    elevater = [result.value for result in first.done.results if result.suite == "elevater"]
    assert cells["elevater zero-shot"][0].startswith(f"{100 * np.mean(elevater):.1f} ± ")
    for result in first.done.results:
        assert cells[f"{result.set} zero-shot"][0] == f"{100 * result.value:.1f}{'*' if result.partial else ''}"
    markdown, latex = (tmp_path / "table.md").read_text().splitlines(), (tmp_path / "table.tex").read_text()
    assert markdown[2] == f"| {' | '.join(sources)} |"
    assert markdown[3] == f"| imagenet1k zero-shot | {' | '.join(cells['imagenet1k zero-shot'])} |"
    assert r"coco\_captions zero-shot & " in latex
    assert latex.count(r"\begin{tabular}{lrrrr}") == latex.count(r"\end{tabular}") == 1
    assert "published: " not in compare([first.out], published=False).markdown()


def predictions_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["all_predictions.json"]
        document = json.loads(archive.read("all_predictions.json"))
    assert list(document) == ["data"]
    return {entry["dataset_name"]: entry for entry in document["data"]}


def test_the_submission_passes_the_toolkits_checks(first: Done, tmp_path: Path) -> None:
    names = list(write_submission(first.out, str(tmp_path / "all.zip")))
    entries = predictions_of(tmp_path / "all.zip")
    assert names == list(entries) == sorted(str(KNOWN[name].elevater) for name in ELEVATER)
    for name in ELEVATER:
        definition, entry = KNOWN[name], entries[str(KNOWN[name].elevater)]
        kinds = {"model_name": str, "rnd_seeds": list, "predictions": list, **dict.fromkeys(NUMBERS, int)}
        assert set(entry) == {*kinds, "dataset_name"}
        assert all(type(entry[field]) is kind for field, kind in kinds.items())
        assert (entry["n_shot"], entry["rnd_seeds"], entry["num_trainable_params"]) == (0, [0], 0)
        assert np.shape(entry["predictions"]) == (1, IMAGES, definition.class_count)
        for row in entry["predictions"][0]:
            assert math.isclose(sum(row), 1, rel_tol=1e-3)
            assert all(0 <= value <= 1 for value in row)
        ours = read_scores(str(Path(first.out, "predictions", f"{name}.zero-shot.parquet")))
        columns = list(definition.elevater_columns) or list(range(definition.class_count))
        assert entry["predictions"][0] == pytest.approx(ours[:, columns], rel=1e-5)
    assert sum(bool(KNOWN[name].elevater_columns) for name in ELEVATER) >= 3


NUMBERS = ("num_trainable_params", "num_params", "num_visual_params", "num_backbone_params", "n_shot")


def test_the_submission_takes_the_order_of_lists_of_images(first: Done, tmp_path: Path) -> None:
    """Paths with an archive before them, labels after them, in another order than the set's."""
    (tmp_path / "lists").mkdir()
    for name in ELEVATER:
        keys = read_keys(str(Path(first.out, "predictions", f"{name}.zero-shot.parquet")))
        lines = [f"test.zip@some/{key}.jpg {number % 7}" for number, key in enumerate(keys)]
        (tmp_path / "lists" / f"{KNOWN[name].elevater}.txt").write_text("\n".join(lines[::-1]))
    write_submission(first.out, str(tmp_path / "plain.zip"))
    write_submission(first.out, str(tmp_path / "ordered.zip"), order=str(tmp_path / "lists"))
    plain, ordered = predictions_of(tmp_path / "plain.zip"), predictions_of(tmp_path / "ordered.zip")
    assert all(ordered[name]["predictions"][0] == plain[name]["predictions"][0][::-1] for name in plain)
    (tmp_path / "lists" / "dtd.txt").write_text("\n".join(lines + lines[:1]))
    with pytest.raises(StoreError, match=r"dtd\.txt does not name the 12 images"):
        write_submission(first.out, str(tmp_path / "out.zip"), order=str(tmp_path / "lists"))
    (tmp_path / "lists" / "dtd.txt").write_text("test.zip@some/other.jpg 0\n")
    with pytest.raises(StoreError, match=r"dtd\.txt does not name the 12 images .* such as some/other\.jpg"):
        write_submission(first.out, str(tmp_path / "out.zip"), order=str(tmp_path / "lists"))
    (tmp_path / "lists" / "dtd.txt").unlink()
    with pytest.raises(StoreError, match=r"dtd\.txt does not exist"):
        write_submission(first.out, str(tmp_path / "out.zip"), order=str(tmp_path / "lists"))
    assert not (tmp_path / "out.zip").exists()


def test_a_submission_of_few_shots_has_every_seed(first: Done, tmp_path: Path) -> None:
    write_set("patch_camelyon", "flat", tmp_path / "patch_camelyon")
    words: dict[str, Any] = {"tasks": ("few-shot",), "shots": (4,), "seeds": (0, 2), "solver": "lbfgs"}
    config = first.config(sets=("patch_camelyon",), data=str(tmp_path), out=str(tmp_path / "out"), **words)
    done = evaluate(replace(config, predictions=True))
    protocols = [f"few-shot-4/honest, lbfgs/seed-{seed}" for seed in (0, 2)]
    assert [result.protocol for result in done.results] == protocols
    found = write_submission(done.folder, str(tmp_path / "5.zip"), "few-shot-4/honest, lbfgs")
    assert found == {"patch-camelyon": (f"{IMAGES} of 32768 images",)}
    entry = predictions_of(tmp_path / "5.zip")["patch-camelyon"]
    assert (entry["n_shot"], entry["rnd_seeds"]) == (4, [0, 2])
    assert np.shape(entry["predictions"]) == (2, IMAGES, 2)
    assert entry["num_params"] - entry["num_backbone_params"] == entry["num_trainable_params"] == 2 * 16 + 2
    with pytest.raises(StoreError, match="has no result of an ELEVATER set under zero-shot"):
        write_submission(done.folder, str(tmp_path / "0.zip"))
