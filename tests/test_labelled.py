"""Labelled sets: tars and class folders, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_schemas import Status
from dimefm.decode import DecodeError
from dimefm.errors import SourceError
from dimefm.labelled import LabelledSet
from tests.making import make_jpeg, write_tar

CLASSES = ["cat", "red bus", "собака"]
LABELS = [2, 0, 1, 1, 0, 2, 2]


def with_texts(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    (folder / "templates.txt").write_text("a {c}.\nthe {}\n")
    return folder


def in_tars(folder: Path) -> Path:
    """The set as two tars; in the second the labels come before the images."""
    members = [
        {f"{i:02d}.jpg": make_jpeg(seed=i), f"{i:02d}.cls": f"{label}\n".encode()} for i, label in enumerate(LABELS)
    ]
    with_texts(folder)
    write_tar(folder / "a.tar", {name: data for sample in members[:4] for name, data in sample.items()})
    write_tar(folder / "b.tar", {name: data for sample in members[4:] for name, data in reversed(sample.items())})
    return folder


def in_folders(folder: Path) -> Path:
    """The same set as a folder for each class."""
    with_texts(folder)
    for i, label in enumerate(LABELS):
        (folder / CLASSES[label]).mkdir(exist_ok=True)
        (folder / CLASSES[label] / f"{i:02d}.jpg").write_bytes(make_jpeg(seed=i))
    return folder


def contents(labelled: LabelledSet) -> list[tuple[bytes, int]]:
    return [(Path(i.file).read_bytes()[i.offset : i.offset + i.size], i.label) for i in labelled.items]


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        LabelledSet(str(folder))
    assert caught.value.remedy
    return str(caught.value)


def test_a_set_in_tars_keeps_its_order_and_labels(tmp_path: Path) -> None:
    labelled = LabelledSet(str(in_tars(tmp_path / "pets")))
    assert contents(labelled) == [(make_jpeg(seed=i), label) for i, label in enumerate(LABELS)]
    assert labelled.name == "pets"
    assert labelled.classnames == CLASSES


def test_tars_and_class_folders_hold_the_same_items(tmp_path: Path) -> None:
    tars, folders = LabelledSet(str(in_tars(tmp_path / "t"))), LabelledSet(str(in_folders(tmp_path / "f")))
    assert sorted(contents(folders)) == sorted(contents(tars))


def test_labels_of_folders_follow_classnames_and_not_the_alphabet(tmp_path: Path) -> None:
    folder = in_folders(tmp_path)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in reversed(CLASSES)), encoding="utf-8")
    labels = {Path(item.file).parent.name: item.label for item in LabelledSet(str(folder)).items}
    assert labels == {"cat": 2, "red bus": 1, "собака": 0}


def test_prompts_are_every_template_by_class(tmp_path: Path) -> None:
    assert LabelledSet(str(in_tars(tmp_path))).prompts()[1:] == [
        ["a red bus.", "the red bus"],
        ["a собака.", "the собака"],
    ]


def test_the_sets_of_the_sample_can_be_read(sample: Path) -> None:
    for name, classes in (("cifar10", 10), ("caltech101", None)):
        labelled = LabelledSet(str(sample / "eval" / name))
        assert classes in (None, len(labelled.classnames))
        assert {item.label for item in labelled.items} == set(range(len(labelled.classnames)))


def test_an_image_without_a_label_is_named(tmp_path: Path) -> None:
    write_tar(with_texts(tmp_path) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": b"0", "1.jpg": make_jpeg()})
    assert "a.tar: 1 has no .cls" in refused(tmp_path)


@pytest.mark.parametrize("label", [b"", b"cat", b"1.5", b"\xff"])
def test_a_label_that_is_no_integer_is_named(tmp_path: Path, label: bytes) -> None:
    write_tar(with_texts(tmp_path) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": label})
    assert "0.cls holds" in refused(tmp_path)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_named(tmp_path: Path, label: int) -> None:
    write_tar(with_texts(tmp_path) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": str(label).encode()})
    assert f"label {label}, but classnames.txt has 3 classes" in refused(tmp_path)


def test_a_folder_that_is_no_class_is_named(tmp_path: Path) -> None:
    (in_folders(tmp_path) / "horse").mkdir()
    assert "horse is not a class of classnames.txt" in refused(tmp_path)


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    assert "holds no labelled image" in refused(with_texts(tmp_path))


def test_a_truncated_tar_is_refused_since_its_accuracy_would_mislead(tmp_path: Path) -> None:
    tar = in_tars(tmp_path) / "a.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    assert "a.tar: broken after" in refused(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_hold_every_readable_image_once_under_its_place(tmp_path: Path, batch_size: int) -> None:
    labelled = LabelledSet(str(in_tars(tmp_path)))
    sizes = {item.size: place for place, item in enumerate(labelled.items)}
    assert len(sizes) == len(LABELS)
    broken = 4

    def preprocess(data: bytes) -> torch.Tensor:
        if sizes[len(data)] == broken:
            raise DecodeError(Status.UNDECODABLE, "broken")
        return torch.full((3, 2, 2), sizes[len(data)], dtype=torch.uint8)

    batches = list(labelled.batches(preprocess, batch_size))
    assert all(len(images) == len(places) <= batch_size for images, places in batches)
    places = torch.cat([places for _, places in batches])
    assert places.tolist() == [place for place in range(len(LABELS)) if place != broken]
    assert torch.equal(torch.cat([images for images, _ in batches])[:, 0, 0, 0].long(), places)
