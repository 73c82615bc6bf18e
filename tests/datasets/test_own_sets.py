"""A user's own sets: tars, Parquet, class folders and captions, and what is wrong with them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cache_schemas import Status
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.own_sets import open_folder, open_folders
from dimefm.errors import SourceError, UnreadableError
from dimefm.images.decode import DecodeError, decode_rgb
from dimefm.sources.read_image import read_encoded
from tests.making import make_jpeg, upload, write_parquet, write_tar

CLASSES = ["cat", "red bus", "собака"]
LABELS = [2, 0, 1, 1, 0, 2, 2]
IMAGES = [make_jpeg(seed=i) for i in range(len(LABELS))]


def with_texts(folder: Path, classes: list[str] = CLASSES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    (folder / "templates.txt").write_text("a {c}.\nthe {}\n")
    return folder


def in_tars(folder: Path) -> Path:
    """The set as two tars; in the second the labels come before the images."""
    members = [{f"{i:02d}.jpg": IMAGES[i], f"{i:02d}.cls": f"{label}\n".encode()} for i, label in enumerate(LABELS)]
    with_texts(folder)
    write_tar(folder / "a.tar", {name: data for sample in members[:4] for name, data in sample.items()})
    write_tar(folder / "b.tar", {name: data for sample in members[4:] for name, data in reversed(sample.items())})
    return folder


def in_folders(folder: Path) -> Path:
    """The same set as a folder for each class."""
    with_texts(folder)
    for i, label in enumerate(LABELS):
        (folder / CLASSES[label]).mkdir(exist_ok=True)
        (folder / CLASSES[label] / f"{i:02d}.jpg").write_bytes(IMAGES[i])
    return folder


def in_parquet(folder: Path) -> Path:
    """The same set as two Parquet files."""
    rows = [{"image": data, "label": label} for data, label in zip(IMAGES, LABELS, strict=True)]
    with_texts(folder)
    write_parquet(folder / "test-00000-of-00002.parquet", rows[:3])
    write_parquet(folder / "test-00001-of-00002.parquet", rows[3:])
    return folder


def contents(images: ImageSet) -> list[tuple[bytes, int]]:
    data = [read_encoded(s) for s in images.samples]
    return list(zip(data, images.class_labels.tolist(), strict=True))


def refused(folder: Path | str, split: str = "test") -> str:
    with pytest.raises(SourceError) as caught:
        open_folder(str(folder), split)
    assert caught.value.remedy
    return str(caught.value)


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [in_tars, in_parquet])
def test_a_set_in_files_keeps_its_order_and_labels(made: Callable[[Path], Path], tmp_path: Path) -> None:
    images = open_folder(str(made(tmp_path / "pets")))
    assert contents(images) == list(zip(IMAGES, LABELS, strict=True))
    assert (images.name, images.split, images.partial, images.notes) == ("pets", "test", (), ())
    assert images.classnames == tuple(CLASSES)
    assert images.templates == ("a {c}.", "the {}")
    assert images.captions is None


def test_every_layout_holds_the_same_images(tmp_path: Path) -> None:
    made = {"webdataset": in_tars, "folders": in_folders, "parquet": in_parquet}
    sets = {layout: open_folder(str(make(tmp_path / layout))) for layout, make in made.items()}
    assert all(images.layout == layout for layout, images in sets.items())
    assert [sorted(contents(images)) for images in sets.values()] == 3 * [sorted(zip(IMAGES, LABELS, strict=True))]


def test_labels_of_folders_follow_classnames_and_not_the_alphabet(tmp_path: Path) -> None:
    images = open_folder(str(with_texts(in_folders(tmp_path), CLASSES[::-1])))
    labels = {
        Path(sample.file).parent.name: label for sample, label in zip(images.samples, images.class_labels, strict=True)
    }
    assert labels == {"cat": 2, "red bus": 1, "собака": 0}


def test_prompts_are_every_template_by_class(tmp_path: Path) -> None:
    assert open_folder(str(in_tars(tmp_path))).prompts()[1:] == [
        ["a red bus.", "the red bus"],
        ["a собака.", "the собака"],
    ]


def test_the_sets_of_the_sample_can_be_read(sample: Path) -> None:
    for name, classes in (("cifar10", 10), ("caltech101", None)):
        images = open_folder(str(sample / "eval" / name))
        assert classes in (None, len(images.classnames))
        assert set(images.class_labels.tolist()) == set(range(len(images.classnames)))


def test_a_set_at_a_url_is_the_same(tmp_path: Path) -> None:
    url = upload(in_tars(tmp_path / "pets"), "memory://own-sets/pets")
    images = open_folder(url)
    assert images.name == "pets"
    assert contents(images) == list(zip(IMAGES, LABELS, strict=True))
    assert images.digest() == open_folder(str(tmp_path / "pets")).digest()


def test_class_folders_at_a_url_are_refused_as_they_would_be_read_one_by_one(tmp_path: Path) -> None:
    message = refused(upload(in_folders(tmp_path / "pets"), "memory://own-sets/folders"))
    assert "memory://own-sets/folders holds no .tar" in message
    assert "class folders must be local; pack them into tars" in message


def test_an_image_without_a_label_is_named(tmp_path: Path) -> None:
    write_tar(with_texts(tmp_path) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": b"0", "1.jpg": make_jpeg()})
    assert "a.tar: 1 has no .cls" in refused(tmp_path)


@pytest.mark.parametrize("label", [b"", b"cat", b"1.5", b"\xff"])
def test_a_label_that_is_no_integer_is_named(tmp_path: Path, label: bytes) -> None:
    write_tar(with_texts(tmp_path) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": label})
    assert "0.cls holds" in refused(tmp_path)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_named(tmp_path: Path, label: int) -> None:
    labelled = {"0.jpg": make_jpeg(), "0.cls": b"0", "1.jpg": make_jpeg(), "1.cls": str(label).encode()}
    write_tar(with_texts(tmp_path) / "a.tar", labelled)
    assert f"a.tar: 1 has label {label}, but there are 3 classes" in refused(tmp_path)


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    rows = [{"image": make_jpeg(), "label": label} for label in (0, None)]
    write_parquet(with_texts(tmp_path) / "a.parquet", rows)
    assert "a.parquet:1 has no label" in refused(tmp_path)


def test_a_table_without_labels_says_which_columns_it_has(tmp_path: Path) -> None:
    write_parquet(with_texts(tmp_path) / "a.parquet", [{"image": make_jpeg(), "size": 3}])
    message = refused(tmp_path)
    assert "a.parquet has no column of labels or captions, only image, size" in message


def test_a_folder_that_is_no_class_is_named(tmp_path: Path) -> None:
    (in_folders(tmp_path) / "horse").mkdir()
    assert "horse is not a class of classnames.txt" in refused(tmp_path)


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    assert "holds no labelled image" in refused(with_texts(tmp_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere is no folder" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("made", [in_tars, in_parquet])
def test_a_set_in_files_without_class_names_is_refused(made: Callable[[Path], Path], tmp_path: Path) -> None:
    (made(tmp_path) / "classnames.txt").unlink()
    assert f"{tmp_path}/classnames.txt does not exist" in refused(tmp_path)


# -- class folders alone ----------------------------------------------------------------------------------------------

NO_TEMPLATES = 'no templates.txt: the only prompt is "a photo of a {c}."'


@pytest.mark.parametrize("made", [in_tars, in_parquet, in_folders])
def test_a_set_without_templates_has_the_usual_one_and_says_so(made: Callable[[Path], Path], tmp_path: Path) -> None:
    (made(tmp_path) / "templates.txt").unlink()
    images = open_folder(str(tmp_path))
    assert (images.classnames, images.templates) == (tuple(CLASSES), ("a photo of a {c}.",))
    assert images.notes == (NO_TEMPLATES,)


def plain(folder: Path, *classes: str) -> Path:
    """Class folders with an image each, and nothing else."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.jpg").write_bytes(IMAGES[number])
    return folder


def test_class_folders_alone_are_a_set_whose_classes_are_the_names_of_the_folders(tmp_path: Path) -> None:
    images = open_folder(str(plain(tmp_path, "red_bus", "Golden-Retriever", "cat", "собака")))
    assert images.classnames == ("Golden Retriever", "cat", "red bus", "собака")
    assert images.prompts()[0] == ["a photo of a Golden Retriever."]
    assert [(s.key, int(c)) for s, c in zip(images.samples, images.class_labels, strict=True)] == [
        *(("Golden-Retriever/0", 0), ("cat/0", 1), ("red_bus/0", 2), ("собака/0", 3)),
    ]
    names = "class names are those of the folders, with spaces for _ and - (Golden Retriever, cat, red bus, ...)"
    assert images.notes == (f"no classnames.txt: {names}", NO_TEMPLATES)
    (tmp_path / "templates.txt").write_text("the {c}\n")
    assert open_folder(str(tmp_path)).templates == ("the {c}",)


@pytest.mark.parametrize("test", ["test", "val"])
def test_the_classes_of_both_splits_count_as_torchvision_has_them(test: str, tmp_path: Path) -> None:
    plain(tmp_path / test, "bus", "dog")
    plain(tmp_path / "train", "ant", "bus", "dog")
    (tmp_path / "val").mkdir(exist_ok=True)
    tested, trained = open_folder(str(tmp_path)), open_folder(str(tmp_path), "train")
    assert tested.classnames == trained.classnames == ("ant", "bus", "dog")
    assert (tested.class_labels.tolist(), trained.class_labels.tolist()) == ([1, 2], [0, 1, 2])
    assert "1 of 3 classes have no image, such as ant: means per class are over the others" in tested.notes


@pytest.mark.parametrize(
    ("folders", "what"),
    [
        (("0", "1"), "has no classnames.txt, and its class folders are numbers, such as 0"),
        (("n01440764", "n01443537"), "numbers, such as n01440764"),
        (("red_bus", "red-bus"), "the class folders red-bus and red_bus would have one class name, 'red bus'"),
        (("cat",), "has one class, 'cat'"),
    ],
)
def test_class_folders_that_name_no_classes_are_refused(folders: tuple[str, ...], what: str, tmp_path: Path) -> None:
    assert what in refused(plain(tmp_path, *folders))


def test_a_mistyped_folder_is_answered_with_one_that_is_like_it(tmp_path: Path) -> None:
    in_tars(tmp_path / "pets")
    assert f"did you mean '{tmp_path}/pets'?" in refused(tmp_path / "pest")


def test_a_single_class_is_refused_since_any_model_would_be_right(tmp_path: Path) -> None:
    write_tar(with_texts(tmp_path, ["cat"]) / "a.tar", {"0.jpg": make_jpeg(), "0.cls": b"0"})
    assert "has one class, 'cat'" in refused(tmp_path)


def test_a_truncated_tar_is_refused_since_its_accuracy_would_mislead(tmp_path: Path) -> None:
    tar = in_tars(tmp_path) / "a.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    assert "a.tar: broken after" in refused(tmp_path)


def test_a_truncated_table_is_refused_too(tmp_path: Path) -> None:
    table = in_parquet(tmp_path) / "test-00001-of-00002.parquet"
    table.write_bytes(table.read_bytes()[:3000])
    assert "test-00001-of-00002.parquet is damaged" in refused(tmp_path)


def test_a_table_whose_labels_are_overwritten_is_refused(tmp_path: Path) -> None:
    table = in_parquet(tmp_path) / "test-00001-of-00002.parquet"
    place = pq.ParquetFile(table).metadata.row_group(0).column(1).data_page_offset
    data = table.read_bytes()
    table.write_bytes(data[:place] + 8 * b"\xff" + data[place + 8 :])
    assert "test-00001-of-00002.parquet is damaged" in refused(tmp_path)


def test_a_table_of_other_columns_than_the_first_is_named(tmp_path: Path) -> None:
    write_parquet(in_parquet(tmp_path) / "test-00002.parquet", [{"image": make_jpeg(), "class": 1}])
    assert "test-00002.parquet has no column 'label', only image, class" in refused(tmp_path)


def test_two_sets_of_one_name_are_refused_since_results_go_by_name(tmp_path: Path) -> None:
    paths = [str(in_tars(tmp_path / place / "pets")) for place in ("here", "there")]
    with pytest.raises(SourceError, match="two sets are called 'pets'"):
        open_folders(tuple(paths))
    paths[1] = str(in_tars(tmp_path / "zoo"))
    assert [images.name for images in open_folders(tuple(paths))] == ["pets", "zoo"]


# -- labels by name, and several of them ------------------------------------------------------------------------------


def test_labels_by_name_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    spelled = ["Собака", "cat", "Red_Bus"]
    write_parquet(
        with_texts(tmp_path) / "a.parquet", [{"image": make_jpeg(), "label": spelled[i]} for i in (1, 2, 0, 1)]
    )
    assert open_folder(str(tmp_path)).class_labels.tolist() == [0, 1, 2, 0]


def test_labels_that_count_other_names_are_turned_into_places_in_classnames(tmp_path: Path) -> None:
    """As Hugging Face writes them: numbers, with their names in the file's metadata."""
    said = {"info": {"features": {"label": {"names": ["red bus", "собака", "cat"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": 3 * [make_jpeg()], "label": [0, 1, 2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), with_texts(tmp_path) / "a.parquet")
    assert open_folder(str(tmp_path)).class_labels.tolist() == [1, 2, 0]


def test_a_label_by_a_name_that_there_is_not_is_named(tmp_path: Path) -> None:
    rows = [{"image": make_jpeg(), "label": name} for name in ("cat", "horse")]
    write_parquet(with_texts(tmp_path) / "a.parquet", rows)
    assert "'horse' is not in classnames.txt" in refused(tmp_path)


def test_class_folders_may_be_spelled_otherwise_or_numbered(tmp_path: Path) -> None:
    for names in (["Cat", "red_bus", "Собака"], ["0", "1", "2"]):
        folder = with_texts(tmp_path / names[0])
        for name in names:
            (folder / name).mkdir()
            (folder / name / "0.jpg").write_bytes(make_jpeg())
        labels = [int(label) for label in open_folder(str(folder)).class_labels]
        assert sorted(labels) == [0, 1, 2]


def test_classes_that_differ_in_marks_or_alphabet_alone_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    classes = ["c", "c++", "c#", "кот 1", "пёс 1"]
    for name in with_texts(tmp_path, classes) and classes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(make_jpeg())
    images = open_folder(str(tmp_path))
    for sample, label in zip(images.samples, images.class_labels, strict=True):
        assert Path(sample.file).parent.name == classes[label]
    (tmp_path / "c++").rename(tmp_path / "C-")
    assert "C- is not a class of classnames.txt" in refused(tmp_path)


def test_an_image_of_several_classes_has_a_row_of_marks(tmp_path: Path) -> None:
    marks = {"0": [1, 0, 1], "1": [0, 0, 0], "2": [0, 1, 0]}
    members = {}
    for key, row in marks.items():
        np.save(sink := io.BytesIO(), np.array(row))
        members |= {f"{key}.jpg": make_jpeg(), f"{key}.npy": sink.getvalue()}
    write_tar(with_texts(tmp_path) / "a.tar", members)
    labels = open_folder(str(tmp_path)).class_labels
    assert labels.dtype == bool
    assert labels.astype(int).tolist() == list(marks.values())


# -- captions ---------------------------------------------------------------------------------------------------------

CAPTIONS = [["a cat", "a cat on a mat"], ["a bus"], ["a dog.", "собака", "the dog"]]


def test_images_with_captions_need_no_class_names(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i, texts in enumerate(CAPTIONS):
        members |= {f"{i}.jpg": IMAGES[i], f"{i}.txt": "\n".join([*texts, " ", ""]).encode()}
    write_tar(tmp_path / "coco" / "a.tar", members)
    images = open_folder(str(tmp_path / "coco"))
    assert images.captions == tuple(map(tuple, CAPTIONS))
    assert (images.labels, images.classnames, images.templates) == (None, (), ())
    assert [read_encoded(s) for s in images.samples] == IMAGES[:3]


def test_captions_may_be_a_column(tmp_path: Path) -> None:
    rows = [{"image": make_jpeg(seed=i), "caption": texts} for i, texts in enumerate(CAPTIONS)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert open_folder(str(tmp_path)).captions == tuple(map(tuple, CAPTIONS))


def test_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "0.txt": b"a cat", "1.jpg": make_jpeg(), "1.txt": b"\n \n"})
    assert "1 images have no caption, such as 1" in refused(tmp_path)


def test_labels_for_some_and_captions_for_others_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(), "0.txt": b"a cat", "1.jpg": make_jpeg(), "1.cls": b"0"})
    assert "has labels for some images and captions for others" in refused(tmp_path)


def test_the_caption_beside_a_label_is_not_what_is_measured(tmp_path: Path) -> None:
    members = {"0.jpg": make_jpeg(), "0.txt": b"a cat", "0.cls": b"1", "1.jpg": make_jpeg(), "1.cls": b"0"}
    write_tar(with_texts(tmp_path) / "a.tar", members | {"1.txt": b"a dog"})
    assert open_folder(str(tmp_path)).class_labels.tolist() == [1, 0]


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [in_tars, in_parquet, in_folders])
def test_training_images_lie_beside_the_test_images(made: Callable[[Path], Path], tmp_path: Path) -> None:
    made(with_texts(tmp_path) / "test")
    made(tmp_path / "train")
    for path in (*tmp_path.glob("train/*.tar"), *tmp_path.glob("train/*.parquet")):
        path.rename(path.with_name(path.name.replace("test-", "")))
    for split in ("test", "train"):
        for name in ("classnames.txt", "templates.txt"):
            (tmp_path / split / name).unlink()
    (next(p for p in sorted((tmp_path / "train").rglob("*")) if p.is_file())).unlink()
    test, train = open_folder(str(tmp_path)), open_folder(str(tmp_path), "train")
    assert sorted(contents(test)) == sorted(zip(IMAGES, LABELS, strict=True))
    assert 0 < len(train.samples) < len(test.samples)
    assert all("/train/" in sample.file for sample in train.samples)
    assert (train.classnames, train.split) == (test.classnames, "train")


def test_tars_may_be_called_by_their_split(tmp_path: Path) -> None:
    with_texts(tmp_path)
    for name, label in (("train-0", 0), ("train-1", 1), ("test-0", 2)):
        write_tar(tmp_path / f"{name}.tar", {"0.jpg": make_jpeg(), "0.cls": str(label).encode()})
    assert open_folder(str(tmp_path)).class_labels.tolist() == [2]
    assert open_folder(str(tmp_path), "train").class_labels.tolist() == [0, 1]
    (tmp_path / "test-0.tar").rename(tmp_path / "0.tar")
    assert open_folder(str(tmp_path)).class_labels.tolist() == [2], "what is called otherwise is the test split"


@pytest.mark.parametrize("made", [in_tars, in_parquet, in_folders])
def test_a_folder_without_splits_is_the_test_split(made: Callable[[Path], Path], tmp_path: Path) -> None:
    assert "holds no labelled image" in refused(made(tmp_path), "train")


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_hold_every_readable_image_once_under_its_place(tmp_path: Path, batch_size: int) -> None:
    images = open_folder(str(in_tars(tmp_path)))
    sizes = {sample.size: place for place, sample in enumerate(images.samples)}
    assert len(sizes) == len(LABELS)
    broken = 4

    def preprocess(data: bytes) -> torch.Tensor:
        if sizes[len(data)] == broken:
            raise DecodeError(Status.UNDECODABLE, "broken")
        return torch.full((3, 2, 2), sizes[len(data)], dtype=torch.uint8)

    batches = list(images.batches(preprocess, batch_size))
    assert all(len(pixels) == len(places) <= batch_size for pixels, places in batches)
    places = torch.cat([places for _, places in batches])
    assert places.tolist() == [place for place in range(len(LABELS)) if place != broken]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches])[:, 0, 0, 0].long(), places)


def test_an_image_that_is_broken_or_was_never_there_is_left_out_and_one_that_is_gone_since_is_an_error(
    tmp_path: Path,
) -> None:
    images = open_folder(str(in_folders(tmp_path)))

    def preprocess(data: bytes) -> torch.Tensor:
        decode_rgb(data)
        return torch.zeros(3, 2, 2)

    Path(images.samples[2].file).write_bytes(bytes(images.samples[2].size))
    images.samples[4] = images.samples[4]._replace(file=str(tmp_path / "no.jpg"), size=-1)
    assert torch.cat([places for _, places in images.batches(preprocess, 4)]).tolist() == [0, 1, 3, 5, 6]
    Path(images.samples[5].file).unlink()
    with pytest.raises(UnreadableError, match="has changed since the set was opened"):
        list(images.batches(preprocess, 4))


def test_the_digest_is_of_keys_sizes_and_labels_and_not_of_places(tmp_path: Path) -> None:
    here, there = (open_folder(str(in_tars(tmp_path / name))) for name in ("here", "there"))
    assert here.digest() == there.digest()
    (tmp_path / "other").mkdir()
    other = {f"{i:02d}.{kind}": data for i in range(4) for kind, data in (("jpg", IMAGES[i]), ("cls", b"0"))}
    write_tar(in_tars(tmp_path / "other") / "a.tar", other)
    assert open_folder(str(tmp_path / "other")).digest() != here.digest()


# -- what lies there and is not used ----------------------------------------------------------------------------------


def pets(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A set in class folders below test/, an image each; the folder of the split."""
    for number, name in enumerate(classes):
        (folder / "test" / name).mkdir(parents=True)
        (folder / "test" / name / "0.jpg").write_bytes(IMAGES[number])
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "templates.txt").write_text("a {c}\n")
    return folder / "test"


def keys_and_notes(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    images = open_folder(str(folder))
    return [sample.key for sample in images.samples], images.notes


def test_linked_folders_are_followed_and_what_else_is_in_a_class_folder_is_counted(tmp_path: Path) -> None:
    test, elsewhere = pets(tmp_path / "pets"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.JPG").write_bytes(IMAGES[2])
    for link, target in {
        "cat/more": elsewhere,
        "cat/loop": "..",
        "cat/gone.jpg": "nowhere.jpg",
        "loop": "..",
    }.items():
        (test / link).symlink_to(target)
    for name in ("cat/notes.md", "cat/._0.jpg", "dog/.thumbs/0.jpg"):
        (test / name).parent.mkdir(exist_ok=True)
        (test / name).write_bytes(b"x")
    Path(os.fsdecode(bytes(test / "dog") + b"/caf\xe9.jpg")).write_bytes(IMAGES[0])
    keys, notes = keys_and_notes(tmp_path / "pets")
    assert keys == ["cat/0", "cat/more/1", "dog/0"]
    assert sorted(notes) == [
        f"files that end in .md: 1, {test}/cat/notes.md",
        f"hidden files: 1, {test}/cat/._0.jpg",
        f"hidden folders: 1, {test}/dog/.thumbs",
        f"links back to a folder that they are in: 2, such as {test}/loop",
        f"links to files that do not exist: 1, {test}/cat/gone.jpg",
        f"names that are not UTF-8 (rename them): 1, {test}/dog/caf\\xe9.jpg",
    ]


def test_no_layout_hides_another_in_silence(tmp_path: Path) -> None:
    folder, test = tmp_path / "pets", pets(tmp_path / "pets")
    for name in ("test/0.jpg", "0.jpg", "LICENSE.md", "test/extra.zip"):
        (folder / name).write_bytes(IMAGES[0])
    for name in ("val", "testing", "train", "training", "others"):
        (folder / name).mkdir()
    write_tar(folder / "archive.tar", {"cat/0.jpg": IMAGES[0], "cat/readme.txt": b"x"})
    write_parquet(folder / "metadata.parquet", [{"file": "0.jpg"}])
    keys, notes = keys_and_notes(folder)
    assert keys == ["cat/0", "dog/0"]
    assert sorted(notes) == sorted(
        [
            f"not used: {folder}/archive.tar: cat/0 has no .cls, .npy or .txt",
            f".tar files beside the class folders: 1, {folder}/archive.tar",
            f".parquet files beside the class folders: 1, {folder}/metadata.parquet",
            f"images beside the class folders: 2, such as {folder}/0.jpg",
            f"files that end in .md: 1, {folder}/LICENSE.md",
            f"files that end in .zip (unpack them): 1, {test}/extra.zip",
            f"splits that are not used: 3, such as {folder}/testing",
            f"folders beside the class folders: 1, {folder}/others",
        ]
    )
    for split in ("test", "train"):
        write_tar(folder / f"{split}-0.tar", {"0.jpg": IMAGES[0], "0.cls": b"1"})
    images = open_folder(str(folder))
    assert (images.layout, len(images.samples)) == ("webdataset", 1)
    assert f".parquet files beside the tars: 1, {folder}/metadata.parquet" in images.notes
    assert not any("train-0.tar" in note for note in images.notes)  # which a probe reads


def test_files_of_a_folder_of_all_splits_are_not_taken_for_others(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "pets")
    for split in ("train", "test", "val"):
        write_parquet(folder / "data" / f"{split}-0.parquet", [{"image": IMAGES[0], "label": 0}])
    notes = open_folder(str(folder)).notes
    assert notes == (
        "2 of 3 classes have no image, such as red bus: means per class are over the others",
        f"splits that are not used: 1, {folder}/data/val-0.parquet",
    )


def test_classes_without_an_image_and_folders_of_one_class_are_said(tmp_path: Path) -> None:
    test = pets(tmp_path / "pets", ("cat", "dog", "ant"))
    (test / "ant" / "0.jpg").unlink()
    (test / "Cat").mkdir()
    (test / "Cat" / "1.jpg").write_bytes(IMAGES[1])
    keys, notes = keys_and_notes(tmp_path / "pets")
    assert keys == ["Cat/1", "cat/0", "dog/0"]
    assert notes == (
        f"the folders Cat and cat of {test} are taken for the same class",
        "1 of 3 classes have no image, such as ant: means per class are over the others",
    )


def test_members_of_tars_that_are_not_used_are_counted(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "pets")
    sample = {f"{i}.jpg": IMAGES[i] for i in range(3)} | {f"{i}.cls": b"%d" % i for i in range(3)}
    others = {"0.json": b"{}", "1.json": b"{}", "1.txt": b"a bus", "._0.jpg": b"x", "2.mask.png": IMAGES[0]}
    write_tar(folder / "a.TAR", sample | others)
    images, tar = open_folder(str(folder)), folder / "a.TAR"
    assert images.class_labels.tolist() == [0, 1, 2]
    assert sorted(images.notes) == [
        f"hidden members of tars: 1, {tar}: ._0.jpg",
        f"labels or captions of images that have a label already: 1, {tar}: 1.txt",
        f"members of tars that end in .json: 2, such as {tar}: 0.json",
        f"members whose extension has more than one part (a key ends at the first dot): 1, {tar}: 2.mask.png",
    ]


def test_a_set_without_an_image_says_what_is_there_instead(tmp_path: Path) -> None:
    folder = with_texts(tmp_path / "pets")
    (folder / "0.jpg").write_bytes(IMAGES[0])
    said = refused(folder)
    assert f"holds no labelled image\n  - images: 1, {folder}/0.jpg" in said


def test_many_reasons_are_a_bounded_number_of_notes(tmp_path: Path) -> None:
    test = pets(tmp_path / "pets")
    for number in range(30):
        (test / "cat" / f"0.x{number}").write_bytes(b"x")
    notes = open_folder(str(tmp_path / "pets")).notes
    assert len(notes) == 11
    assert notes[-1] == "and 20 more"


def test_a_file_of_another_kind_under_an_images_name_is_not_decoded(tmp_path: Path) -> None:
    """PostScript would reach Ghostscript: in sets too only the formats that dimefm.images.decode allows are opened."""
    test = pets(tmp_path / "pets")
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    (test / "cat" / "1.jpg").write_bytes(eps.getvalue())
    images = open_folder(str(tmp_path / "pets"))
    places = [places_B.tolist() for _, places_B in images.batches(lambda data: decode_rgb(data)[:, :8, :8], 8)]
    assert places == [[0, 2]]
    assert images.samples[1].key == "cat/1"


def test_folders_that_a_system_keeps_are_no_classes(tmp_path: Path) -> None:
    folder, test = tmp_path / "pets", pets(tmp_path / "pets")
    (test / "@eaDir").mkdir()
    (folder / "__MACOSX").mkdir()
    keys, notes = keys_and_notes(folder)
    assert keys == ["cat/0", "dog/0"]
    assert len(notes) == 1
    assert notes[0].startswith("folders of thumbnails, of deleted files or of unfinished output")
    assert ": 2, such as " in notes[0]
