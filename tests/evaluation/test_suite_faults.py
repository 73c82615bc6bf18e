"""Sets, annotations and results that are not as they should be: each is named, and nothing is left out in silence."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimefm.datasets.definitions import load_definitions
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import open_set
from dimefm.errors import MismatchError, SourceError, StoreError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import Evaluation, evaluate
from dimefm.evaluation.predictions import read_predictions, read_scores
from dimefm.evaluation.results import read_results
from dimefm.evaluation.submission import write_submission
from tests.making import make_jpeg, read_tar, write_parquet, write_tar, write_text
from tests.synthetic_published import trust
from tests.synthetic_sets import IMAGES, as_read, as_written, forms_of, write_set
from tests.tiny_clip import write_clip

KNOWN = load_definitions()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return write_clip(tmp_path_factory.mktemp("models") / "tiny")


def measured(model: str, root: Path, *names: str, **changes: Any) -> Evaluation:
    words = {"data": str(root), "sets": names, "out": str(root.parent / "out"), "threads": 1, "device": "cpu"}
    return evaluate(EvaluationConfig(model=model, **{**words, **changes}))


def opened(root: Path, name: str, split: str = "test") -> ImageSet:
    images = open_set(KNOWN[name], str(root), split, str(root / "unpacked"))
    assert images is not None
    return images


def refused(root: Path, name: str, split: str = "test") -> str:
    with pytest.raises(SourceError) as error:
        open_set(KNOWN[name], str(root), split, str(root / "unpacked"))
    return str(error.value)


def changed(root: Path, name: str, **members: bytes | None) -> Path:
    """A set in one tar with these members changed, or without them where they are None; the tar's path."""
    write_set(name, "flat", root / name)
    path = root / name / "test-00000.tar"
    found = {**read_tar(path, 1000), **{name.replace("_", "."): data for name, data in members.items()}}
    return write_tar(path, {name: data for name, data in found.items() if data is not None})


# -- labels -----------------------------------------------------------------------------------------------------------


def with_names(root: Path, change: Callable[[list[str]], list[str]]) -> None:
    """CIFAR-10 as CLIP_benchmark has it, with other class names."""
    write_set("cifar10", "webdataset", root / "cifar10")
    path = root / "cifar10" / "classnames.txt"
    path.write_text("".join(f"{name}\n" for name in change(path.read_text().splitlines())))


def test_more_class_names_than_the_set_has_classes_are_said(model: str, tmp_path: Path) -> None:
    with_names(tmp_path / "sets", lambda names: [*names, "horse cart"])
    (result,) = measured(model, tmp_path / "sets", "cifar10").results
    assert result.classes == 11
    assert "11 of 10 classes" in result.partial
    folder = "class names and templates are those of the folder"
    assert f"{folder} (1 of 11 are not in the definition, such as 'horse cart')" in result.partial


def test_a_submission_of_other_class_names_is_refused(model: str, tmp_path: Path) -> None:
    with_names(tmp_path / "sets", lambda names: [*names[:-1], "horse cart"])
    done = measured(model, tmp_path / "sets", "cifar10", predictions=True)
    with pytest.raises(StoreError, match="cifar10 was measured with other class names than the leaderboard's"):
        write_submission(done.folder, str(tmp_path / "all.zip"))


def test_fewer_class_names_than_labels_are_an_error(tmp_path: Path) -> None:
    with_names(tmp_path, lambda names: names[:5])
    assert "but there are 5 classes" in refused(tmp_path, "cifar10")


def test_a_class_name_twice_is_said(tmp_path: Path) -> None:
    with_names(tmp_path, lambda names: [*names[:-1], names[0]])
    assert "class names and templates are those of the folder (their order)" in opened(tmp_path, "cifar10").partial


def test_one_class_name_is_an_error(tmp_path: Path) -> None:
    with_names(tmp_path, lambda names: ["animal"])
    for tar in sorted((tmp_path / "cifar10" / "test").glob("*.tar")):
        write_tar(tar, {name: b"0" if name.endswith("cls") else data for name, data in read_tar(tar, 100).items()})
    assert "has one class, 'animal': whatever the model says is right" in refused(tmp_path, "cifar10")


@pytest.mark.parametrize(("label", "problem"), [
    (b"10", "s0000003 has label 10, but there are 10 classes"),
    (b"-1", "s0000003 has label -1, but there are 10 classes"),
    (b"cat", "s0000003.cls holds b'cat'"),
    (b"3.0", "s0000003.cls holds b'3.0'"),
    (b"", "s0000003.cls holds b''"),
    (None, "s0000003 has no .cls, .npy or .txt"),
])  # fmt: skip
def test_a_label_that_is_none_is_named_with_its_file(
    model: str, tmp_path: Path, label: bytes | None, problem: str
) -> None:
    tar = changed(tmp_path / "sets", "cifar10", s0000003_cls=label)
    write_set("dtd", "flat", tmp_path / "sets" / "dtd")
    done = measured(model, tmp_path / "sets", "cifar10", "dtd")
    ((name, error),) = done.failed
    assert name == "cifar10"
    assert f"{tar}: {problem}" in str(error)
    assert [result.set for result in done.results] == ["dtd"]


def npy(values: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array(values))
    return sink.getvalue()


MARKS = [[1.0] * 19, [0] * 21, [0] * 19 + [-1], [0.5] * 20, [[0] * 20]]


@pytest.mark.parametrize("marks", [*map(npy, MARKS), npy([0] * 20)[:-3], b"", b"x"])
def test_marks_that_are_not_one_for_each_class_are_named(tmp_path: Path, marks: bytes) -> None:
    tar = changed(tmp_path, "voc2007", s0000003_npy=marks)
    assert f"{tar}: s0000003.npy " in refused(tmp_path, "voc2007")


@pytest.mark.parametrize(("labels", "problem"), [
    ([0, 1.5], "holds float, such as 0.0"),
    ([0, None], "has no label"),
    ([[0], [1]], "has several labels per image, where cifar10 has one"),
    ([{"id": 0}, {"id": 1}], "holds dict"),
    ([0, 10], "has label 10, but there are 10 classes"),
])  # fmt: skip
def test_labels_of_a_table_that_are_none_are_named(tmp_path: Path, labels: list[Any], problem: str) -> None:
    rows = [{"image": make_jpeg(seed=i), "label": label} for i, label in enumerate(labels)]
    write_parquet(tmp_path / "cifar10" / "test-0.parquet", rows)
    assert problem in refused(tmp_path, "cifar10")


def test_names_of_several_classes_an_image_are_read(tmp_path: Path) -> None:
    rows = [{"image": make_jpeg(seed=i), "labels": names} for i, names in enumerate([["cat", "dog"], [], ["sofa"]])]
    write_parquet(tmp_path / "voc2007" / "0.parquet", rows)
    found = [np.flatnonzero(row).tolist() for row in opened(tmp_path, "voc2007").class_labels]
    assert found == [[7, 11], [], [17]]


def test_a_set_of_the_other_kind_is_an_error(tmp_path: Path) -> None:
    write_set("flickr30k", "flat", tmp_path / "dtd")
    write_set("dtd", "flat", tmp_path / "flickr30k")
    write_set("dtd", "flat", tmp_path / "voc2007")
    assert "has captions, but Describable Textures is a set of classes" in refused(tmp_path, "dtd")
    assert "has labels, but Flickr30k (Karpathy split) is a set of captions" in refused(tmp_path, "flickr30k")
    assert "has one label per image, where voc2007 has several" in refused(tmp_path, "voc2007")


def test_roc_auc_of_one_class_is_an_error(model: str, tmp_path: Path) -> None:
    changed(tmp_path / "sets", "hateful_memes", **{f"s{i:07d}_cls": b"1" for i in range(IMAGES)})
    ((_, error),) = measured(model, tmp_path / "sets", "hateful_memes").failed
    assert "needs images of both class 0 and class 1, not of [1]" in str(error)


def test_map_without_an_image_of_any_class_is_an_error(model: str, tmp_path: Path) -> None:
    changed(tmp_path / "sets", "voc2007", **{f"s{i:07d}_npy": npy([0] * 20) for i in range(IMAGES)})
    ((_, error),) = measured(model, tmp_path / "sets", "voc2007").failed
    assert "no image has a label" in str(error)


# -- images -----------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_read_count_as_wrong_and_are_said(model: str, tmp_path: Path) -> None:
    """A truncated and an empty one in a tar; a file of a list that is gone. Good ones keep their predictions."""
    root = tmp_path / "sets"
    write_set("mnist", "flat", root / "mnist")
    write_set("dtd", "torchvision", root / "dtd")
    whole = measured(model, root, "mnist", "dtd", predictions=True, name="whole")
    jpeg = read_tar(root / "mnist" / "test-00000.tar", 2)["s0000000.jpg"]
    changed(root, "mnist", s0000000_jpg=jpeg[: len(jpeg) // 2], s0000005_jpg=b"")
    Path(opened(root, "dtd").samples[2].file).unlink()
    done = measured(model, root, "mnist", "dtd", predictions=True)
    for before, after, lost in zip(whole.results, done.results, ([0, 5], [2]), strict=True):
        assert (after.images, after.unreadable) == (IMAGES, len(lost))
        (note,) = after.notes
        assert note.startswith(f"{len(lost)} images could not be read and count as wrong: ")
        assert all(opened(root, after.set).samples[place].key in note for place in lost)
        kept, now = read_predictions(whole.folder, before), read_predictions(done.folder, after)
        assert now == [-1 if place in lost else label for place, label in enumerate(kept)]
        right = np.array(now) == opened(root, after.set).class_labels
        assert after.metrics["top1"] == pytest.approx(right.mean())
        assert after.metrics["top1"] <= before.metrics["top1"]
    path = Path(done.folder, "predictions", "mnist.zero-shot")
    assert "2 could not be read" in path.with_name("mnist.zero-shot.md").read_text()
    assert not read_scores(f"{path}.parquet")[[0, 5]].any()


def test_an_unreadable_image_in_a_submission_has_probabilities_too(model: str, tmp_path: Path) -> None:
    """The leaderboard refuses rows that do not sum to one."""
    changed(tmp_path / "sets", "mnist", s0000004_jpg=b"x")
    done = measured(model, tmp_path / "sets", "mnist", predictions=True)
    assert list(write_submission(done.folder, str(tmp_path / "all.zip"))) == ["mnist"]
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        (entry,) = json.loads(archive.read("all_predictions.json"))["data"]
    assert [sum(row) for row in entry["predictions"][0]] == pytest.approx([1] * IMAGES, rel=1e-3)


def test_all_images_unreadable_is_no_result_of_chance(model: str, tmp_path: Path) -> None:
    changed(tmp_path / "sets", "mnist", **{f"s{i:07d}_jpg": b"x" for i in range(IMAGES)})
    changed(tmp_path / "sets", "flickr30k", **{f"s{i:07d}_jpg": b"x" for i in range(IMAGES)})
    done = measured(model, tmp_path / "sets", "mnist", "flickr30k")
    assert done.results == []
    expected = f"none of the {IMAGES} images has features\n  - UNDECODABLE: {IMAGES}, such as row 0 (s0000000"
    assert all(expected in str(error) for _, error in done.failed)
    assert [name for name, _ in done.failed] == ["mnist", "flickr30k"]


def test_what_is_said_of_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    tar = changed(tmp_path, "mnist", s0000004_jpg=None)
    assert f"{tar}: s0000004.cls has no image beside it" in refused(tmp_path, "mnist")
    tar = changed(tmp_path, "flickr30k", s0000007_jpg=None)
    assert f"{tar}: s0000007.txt has no image beside it" in refused(tmp_path, "flickr30k")


def test_two_images_of_one_name_are_named_and_others_without_a_key_said(tmp_path: Path) -> None:
    tar = changed(tmp_path, "mnist", s0000004_png=make_jpeg())
    assert f"{tar} has two images called s0000004" in refused(tmp_path, "mnist")
    members = read_tar(changed(tmp_path, "dtd"), 100)
    write_tar(tmp_path / "dtd" / "test-00000.tar", {**members, "s0000004.mask.png": make_jpeg()})
    said = "members whose extension has more than one part (a key ends at the first dot): 1, "
    assert opened(tmp_path, "dtd").notes == (f"{said}{tmp_path}/dtd/test-00000.tar: s0000004.mask.png",)


@pytest.mark.parametrize("made", ["nothing", "split", "classes", "list"])
def test_a_folder_without_images_is_named(model: str, tmp_path: Path, made: str) -> None:
    folder = tmp_path / "sets" / "dtd"
    (folder / "test" / "banded" if made == "classes" else folder / "test" if made == "split" else folder).mkdir(
        parents=True
    )
    if made == "list":
        write_text(folder / "labels" / "test1.txt", [])
    write_set("mnist", "flat", tmp_path / "sets" / "mnist")
    done = measured(model, tmp_path / "sets", "dtd", "mnist")
    what = "has no test images of Describable Textures" if made in ("nothing", "split") else "holds no labelled image"
    assert what in str(done.failed[0][1])
    assert done.missing == []
    assert len(done.results) == 1


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n in ("flickr30k", "coco_captions") for f in ("torchvision", "karpathy")]
)
def test_captions_of_images_that_are_not_there(model: str, tmp_path: Path, name: str, form: str) -> None:
    """One is a miss in both directions; without any, the images were not unpacked."""
    root = tmp_path / "sets"
    write_set(name, form, root / name)
    images = opened(root, name)
    assert images.captions is not None
    Path(images.samples[1].file).unlink()
    (result,) = measured(model, root, name).results
    assert result.unreadable == 1
    assert f"1 images could not be read and count as wrong: {images.samples[1].key}" in result.notes[0]
    assert result.metrics["text_retrieval_recall@10"] <= 11 / 12
    texts = sum(map(len, images.captions))
    assert result.metrics["image_retrieval_recall@10"] <= (texts - len(images.captions[1])) / texts
    for sample in images.samples:
        Path(sample.file).unlink(missing_ok=True)
    assert f"lists {IMAGES} images, and none of them exists" in refused(root, name)


def test_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    changed(tmp_path, "flickr30k", s0000003_txt=b" \n\n")
    assert "1 images have no caption, such as s0000003" in refused(tmp_path, "flickr30k")
    write_set("coco_captions", "torchvision", tmp_path / "coco")
    path = tmp_path / "coco" / "coco_test_karpathy.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "annotations": said["annotations"][1:]}))
    assert "1 images have no caption, such as val2014/COCO_val2014_" in refused(tmp_path, "coco_captions")


@pytest.mark.parametrize(("captions", "problem"), [
    ([["a"], []], "1 images have no caption, such as 0.parquet:1"),
    ([["a"], ["", " "]], "1 images have no caption, such as 0.parquet:1"),
    ([["a"], None], "1 images have no caption, such as 0.parquet:1"),
    ([[{"raw": "a"}], [{"raw": "b"}]], "column 'captions' holds dict, not captions"),
    ([1, 2], "column 'captions' holds int, not captions"),
])  # fmt: skip
def test_captions_of_a_table_that_are_none_are_named(tmp_path: Path, captions: list[Any], problem: str) -> None:
    rows = [{"image": make_jpeg(seed=i), "captions": said} for i, said in enumerate(captions)]
    write_parquet(tmp_path / "flickr30k" / "0.parquet", rows)
    assert problem in refused(tmp_path, "flickr30k")


# -- annotations that are damaged -------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "short": lambda data: data[:3],
    "cut": lambda data: data[: len(data) // 3],
    "other": lambda data: b'{"x": [1, "\xff"]}\n\0\x01,2;3 4\n5' * 20,
}
LISTED = [name for name, d in KNOWN.items() if {"torchvision", "original"} & set(d.layouts)]
PICTURES = (".jpg", ".jpeg", ".png", ".ppm")


@pytest.mark.parametrize(("name", "damage"), [
    pytest.param(name, damage, marks=() if (place + at) % len(DAMAGE) == 0 else pytest.mark.slow)
    for place, name in enumerate(LISTED) for at, damage in enumerate(DAMAGE)
])  # fmt: skip
def test_damaged_annotations_are_a_named_error_or_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    """Each file of annotations or arrays in turn: whatever comes of it is said, and is no error of another kind. Every
    set has one kind of damage here, and all of them among those that are slow."""
    form = next(form for form in forms_of(KNOWN[name]) if form in ("torchvision", "original"))
    items = write_set(name, form, tmp_path / "sets" / name)
    trust(monkeypatch, tmp_path)
    written = as_written(items)
    for path in sorted(p for p in (tmp_path / "sets").rglob("*") if p.is_file() and p.suffix.lower() not in PICTURES):
        whole, data = path.read_bytes(), DAMAGE[damage](path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        images, said = None, ""
        try:
            images = open_set(KNOWN[name], str(tmp_path / "sets"), "test", str(tmp_path / "unpacked"))
        except SourceError as error:
            said = str(error)
        assert images is not None or not said or str(tmp_path / "sets") in said
        if images is not None:
            assert images.partial
            found = list(as_read(images, missing=True).items())
            assert all(written[key] == label for key, label in (found[:-1] if images.captions else found))
        path.write_bytes(whole)


def test_a_class_or_a_feeling_that_there_is_not_is_named(tmp_path: Path) -> None:
    write_set("dtd", "torchvision", tmp_path / "dtd")
    listed = tmp_path / "dtd" / "dtd" / "dtd" / "labels" / "test1.txt"
    listed.write_text(listed.read_text() + "checkered/checkered_0001.jpg\n")
    assert "lists an image of 'checkered', which is no class of Describable Textures" in refused(tmp_path, "dtd")
    rows = [f"9,PrivateTest,{' '.join(['0'] * 48 * 48)}"]
    path = write_text(tmp_path / "fer2013" / "fer2013.csv", ["emotion,Usage,pixels", *rows])
    assert f"{path} cannot be read: IndexError" in refused(tmp_path, "fer2013")


def test_a_compressed_array_that_was_cut_short_is_named_and_leaves_no_tar(tmp_path: Path) -> None:
    write_set("mnist", "torchvision", tmp_path / "mnist")
    for path in sorted((tmp_path / "mnist" / "MNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0)[:-20])
        path.unlink()
    assert "t10k-images-idx3-ubyte.gz cannot be read: EOFError" in refused(tmp_path, "mnist")
    assert not list((tmp_path / "unpacked").rglob("*.tar"))


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_damaged_line_of_results_is_named_and_left_as_it_is(model: str, tmp_path: Path) -> None:
    write_set("mnist", "flat", tmp_path / "sets" / "mnist")
    path = Path(measured(model, tmp_path / "sets", "mnist").folder, "results.jsonl")
    line = path.read_text()
    for damaged, problem in ((line[:50] + "\n", "is damaged"), ('{"set": "mnist"}\n', "line 2")):
        path.write_text(line + damaged + line)
        with pytest.raises(Exception, match=rf"results\.jsonl, line 2.*{problem}|{problem}"):
            measured(model, tmp_path / "sets", "mnist")
        with pytest.raises(Exception, match=r"results\.jsonl, line 2"):
            read_results(str(path.parent))
        assert path.read_text() == line + damaged + line


def test_results_of_another_model_under_the_name_are_not_mixed(model: str, tmp_path: Path) -> None:
    write_set("mnist", "flat", tmp_path / "sets" / "mnist")
    folder = measured(model, tmp_path / "sets", "mnist", name="m").folder
    before = Path(folder, "results.jsonl").read_bytes()
    with pytest.raises(MismatchError, match="has results of other weights"):
        measured(write_clip(tmp_path / "other", 7), tmp_path / "sets", "mnist", name="m")
    assert Path(folder, "results.jsonl").read_bytes() == before


def test_two_sets_of_one_name_are_refused(model: str, tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_set("mnist", "flat", tmp_path / place / "own")
    folders = tuple(str(tmp_path / place / "own") for place in ("here", "there"))
    with pytest.raises(SourceError, match="two sets are called 'own'"):
        measured(model, tmp_path, folders=folders)
    with pytest.raises(SourceError, match="two sets are called 'mnist'"):
        measured(model, tmp_path, "mnist", "MNIST")
    assert not (tmp_path.parent / "out").exists()


def test_a_set_that_is_none_of_the_known_ones_is_named(model: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"cifar11 is neither a known set nor a folder of {tmp_path}"):
        measured(model, tmp_path, "cifar11")


def test_predictions_that_were_not_kept_are_named(model: str, tmp_path: Path) -> None:
    write_set("mnist", "flat", tmp_path / "sets" / "mnist")
    done = measured(model, tmp_path / "sets", "mnist")
    with pytest.raises(StoreError, match=r"mnist\.zero-shot\.parquet does not exist: predictions were not kept"):
        write_submission(done.folder, str(tmp_path / "all.zip"))
