"""Known sets in every layout: each image with the label that it was written with, and what torchvision reads there."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets as published

from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names, load_definitions, templates
from dimefm.datasets.image_set import ImageSet
from dimefm.datasets.known_sets import find_sets, open_set
from dimefm.datasets.layouts import letters_and_digits, natural_order
from dimefm.errors import SourceError
from tests.making import make_jpeg, upload, write_parquet, write_tar
from tests.synthetic_published import trust
from tests.synthetic_sets import (
    IMAGES,
    Items,
    as_read,
    as_written,
    forms_of,
    labels_of,
    layout_of,
    members,
    missing_images,
    write_set,
)

pytest_plugins = ["tests.s3"]

KNOWN = load_definitions()
LOCAL = ("folders", "torchvision", "original", "karpathy")
CASES = [(name, form) for name, definition in KNOWN.items() for form in forms_of(definition)]
SPECIAL = ("torchvision", "original", "karpathy")  # forms that have a reader for one set alone


def few(cases: list[tuple[str, str]]) -> list[Any]:
    """All cases. One that differs from another only in the set, not in form, task or reader, is marked slow."""
    seen: set[tuple[str, str]] = set()
    found = []
    for name, form in cases:
        kind = (KNOWN[name].task, form)
        odd = form in SPECIAL or (name, form) == ("objectnet", "folders")
        found.append(pytest.param(name, form, marks=() if odd or kind not in seen else pytest.mark.slow))
        seen.add(kind)
    return found


def opened(root: Path | str, name: str, split: str = "test", unpacked: Path | str = "unpacked") -> ImageSet:
    """The set, which must be there."""
    images = open_set(KNOWN[name], str(root), split, str(unpacked))
    assert images is not None
    return images


def only_first(captions_of: dict[bytes, Any]) -> dict[bytes, Any]:
    return {key: captions[:1] for key, captions in captions_of.items()}


# -- every set in every form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), few(CASES))
def test_every_image_has_the_label_it_was_written_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    items, definition = write_set(name, form, tmp_path / "root" / name), KNOWN[name]
    trust(monkeypatch, tmp_path)
    for split in definition.splits:
        images = open_set(definition, str(tmp_path / "root"), split, str(tmp_path / "unpacked"))
        if split not in items:
            assert images is None
            continue
        assert images is not None
        wanted = as_written(items, split)
        assert as_read(images) == (
            only_first(wanted) if (form, definition.task) == ("parquet-names", "retrieval") else wanted
        )
        assert len({sample.key for sample in images.samples}) == IMAGES
        assert images.layout == ("folders" if (name, form) == ("imagenet1k", "torchvision") else layout_of(form))
        assert list(images.classnames) == class_names(definition)
        assert list(images.templates) == templates(definition)
        assert images.partial == differences(definition, split)
        assert images.notes == (
            ("folders that are no class of the set: 1, zipper_pull",)
            if (name, form) == ("objectnet", "folders")
            else ()
        )


def differences(definition: SetDefinition, split: str) -> tuple[str, ...]:
    """What the copy lacks of the published set."""
    found = missing_images(definition, split)
    if definition.task != "retrieval":
        labels = labels_of(definition, split)
        occurring = {label for said in labels for label in (said if isinstance(said, tuple) else (said,))}
        if len(occurring) < definition.class_count:
            found.append(f"{len(occurring)} of {definition.class_count} classes occur")
    return tuple(found)


def test_a_set_of_the_published_size_is_not_partial(tmp_path: Path) -> None:
    images = {"test": 500, "train": 8500}
    write_set("hateful_memes", "flat", tmp_path / "hateful_memes", images["test"])
    assert opened(tmp_path, "hateful_memes").partial == ()
    assert opened(tmp_path, "hateful_memes", "train").partial == (f"500 of {images['train']} images",)


# -- what torchvision unpacks -----------------------------------------------------------------------------------------

TORCHVISION: dict[str, Callable[[str, str], Any]] = {
    "caltech101": lambda root, split: published.Caltech101(root),
    "cifar10": lambda root, split: published.CIFAR10(root, split == "train"),
    "cifar100": lambda root, split: published.CIFAR100(root, split == "train"),
    "country211": lambda root, split: published.Country211(root, split.replace("val", "valid")),
    "dtd": published.DTD,
    "eurosat": lambda root, split: published.EuroSAT(root),
    "fgvc_aircraft": published.FGVCAircraft,
    "flowers102": published.Flowers102,
    "food101": published.Food101,
    "gtsrb": published.GTSRB,
    "imagenet1k": lambda root, split: published.ImageNet(root, split.replace("test", "val")),
    "mnist": lambda root, split: published.MNIST(root, split == "train"),
    "oxford_pets": lambda root, split: published.OxfordIIITPet(root, split.replace("train", "trainval")),
    "patch_camelyon": published.PCAM,
    "rendered_sst2": published.RenderedSST2,
    "stanford_cars": published.StanfordCars,
}
NAMED = {"caltech101": "categories", "imagenet1k": "wnids"}  # where not in `classes`
COUNTED = ("cifar10", "cifar100", "flowers102", "gtsrb", "mnist", "oxford_pets", "patch_camelyon", "stanford_cars")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_reads_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root, definition = tmp_path / name, KNOWN[name]
    items = write_set(name, "torchvision", root)
    if name == "imagenet1k":
        torch.save(({wnid: (wnid,) for wnid in class_folders(definition)}, []), root / "meta.bin")
    trust(monkeypatch, root)
    for split in items:
        dataset = TORCHVISION[name](str(root), split)
        names = class_folders(definition) if name in COUNTED else getattr(dataset, NAMED.get(name, "classes"), None)
        if names is None or (name, split) == ("gtsrb", "train"):  # it counts the class folders that there are
            names = sorted({Path(path).parent.name for path, _ in dataset._samples})
        labels = {letters_and_digits(folder): label for label, folder in enumerate(class_folders(definition))}
        there = {
            image.convert("RGB").tobytes(): labels[letters_and_digits(names[int(label)])]
            for image, label in (dataset[i] for i in range(len(dataset)))
        }
        assert there == as_read(opened(tmp_path, name, split, tmp_path / "unpacked"))


def test_torchvision_reads_the_same_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test split has both test parts, and its labels the order of the file."""
    write_set("fer2013", "torchvision", tmp_path / "fer-2013")
    trust(monkeypatch, tmp_path)
    emotions = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    place = class_folders(KNOWN["fer2013"]).index
    dataset = published.FER2013(tmp_path / "fer-2013", "test")
    there = {image.convert("RGB").tobytes(): place(emotions[label]) for image, label in dataset}
    parts = [as_read(opened(tmp_path, "fer2013", split, tmp_path / "unpacked")) for split in ("val", "test")]
    assert there == parts[0] | parts[1]


def test_torchvision_lists_the_same_images_of_voc2007(tmp_path: Path) -> None:
    write_set("voc2007", "torchvision", tmp_path / "voc2007")
    dataset = published.VOCDetection(tmp_path / "voc2007", "2007", "test")
    assert [sample.file for sample in opened(tmp_path, "voc2007").samples] == dataset.images


@pytest.mark.parametrize("name", [name for name, form in CASES if form == "torchvision" and KNOWN[name].classes])
def test_torchvisions_own_folder_may_be_the_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    items = write_set(name, "torchvision", tmp_path)  # what torchvision has as its root is the root of all sets
    trust(monkeypatch, tmp_path)
    assert as_read(opened(tmp_path, name, "test", tmp_path / "unpacked")) == as_written(items)


@pytest.mark.parametrize(
    ("name", "inner"),
    [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("voc2007", "VOCdevkit/VOC2007")],
)
def test_files_may_be_in_the_sets_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inner: str
) -> None:
    items = write_set(name, "torchvision", tmp_path / "there")
    trust(monkeypatch, tmp_path)
    (tmp_path / "root").mkdir()
    (tmp_path / "there" / inner).rename(tmp_path / "root" / name)
    assert as_read(opened(tmp_path / "root", name, "test", tmp_path / "unpacked")) == as_written(items)


def test_arrays_are_unpacked_once_and_again_where_they_changed(tmp_path: Path) -> None:
    items = write_set("mnist", "torchvision", tmp_path / "mnist")
    first = opened(tmp_path, "mnist", "test", tmp_path / "unpacked")
    second = opened(tmp_path, "mnist", "test", tmp_path / "unpacked")
    assert first.files == second.files
    labels = tmp_path / "mnist" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes(9 - item.said for item in items["test"]))
    third = opened(tmp_path, "mnist", "test", tmp_path / "unpacked")
    assert third.class_labels.tolist() == [9 - label for label in first.class_labels]


def test_mnist_may_be_compressed(tmp_path: Path) -> None:
    items = write_set("mnist", "torchvision", tmp_path / "there")
    for path in sorted((tmp_path / "there").rglob("*-ubyte")):
        (tmp_path / "root" / "mnist").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "mnist" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert as_read(opened(tmp_path / "root", "mnist", "test", tmp_path / "unpacked")) == as_written(items)


# -- folders and splits -----------------------------------------------------------------------------------------------


def test_a_folder_may_be_called_by_an_alias(tmp_path: Path) -> None:
    for name, alias in ((name, alias) for name, d in KNOWN.items() for alias in d.aliases):
        root = tmp_path / name / "aliases" / alias
        form = "flat" if "webdataset" in KNOWN[name].layouts else forms_of(KNOWN[name])[0]
        items = write_set(name, form, root / alias, images=2)
        images = opened(root, name)
        assert as_read(images) == as_written(items), alias
        assert images.where.startswith(str(root / alias))
        assert find_sets((alias,), str(root)) == ([KNOWN[name]], {name: str(root / alias)})


def test_the_name_comes_before_an_alias_and_what_is_there_before_what_is_not(tmp_path: Path) -> None:
    write_set("dtd", "flat", tmp_path / "wds_vtab-dtd")
    (tmp_path / "dtd").mkdir()
    assert opened(tmp_path, "dtd").where == str(tmp_path / "wds_vtab-dtd")
    write_set("dtd", "flat", tmp_path / "dtd")
    assert opened(tmp_path, "dtd").where == str(tmp_path / "dtd")
    assert open_set(KNOWN["mnist"], str(tmp_path), "test", "unpacked") is None


SPLITS = [
    *(("dtd", folder, "test") for folder in ("test", "testing", "Test", ".")),
    *(("dtd", folder, "val") for folder in ("val", "valid", "validation", "dev")),
    *(("dtd", folder, "train") for folder in ("train", "training", "Train")),
    *(("imagenet_a", folder, "test") for folder in ("val", "validation", "test", ".")),
]


@pytest.mark.parametrize(("name", "folder", "split", "form"), [
    pytest.param(*names, form, marks=() if (place + at) % 3 == 0 else pytest.mark.slow)
    for place, names in enumerate(SPLITS) for at, form in enumerate(("folders", "flat", "parquet-numbers"))
])  # fmt: skip
def test_a_split_goes_by_several_names(tmp_path: Path, name: str, folder: str, split: str, form: str) -> None:
    """In a folder of that name, or without one; ImageNet's test images are called val."""
    items = write_set(name, form, tmp_path / "there" / name)
    source = tmp_path / "there" / name / (split if form == "folders" else "")
    target = tmp_path / "root" / name / folder
    target.mkdir(parents=True)
    for path in source.iterdir():
        if form == "folders" or path.name.startswith(split):
            path.rename(target / (path.name if form == "folders" else "0" + path.suffix))
    others = [s for s in KNOWN[name].splits if s not in (split, "test")]
    assert all(open_set(KNOWN[name], str(tmp_path / "root"), s, "unpacked") is None for s in others)
    if split != "test":
        with pytest.raises(SourceError, match="has no test images"):
            opened(tmp_path / "root", name)
    assert as_read(opened(tmp_path / "root", name, split)) == as_written(items, split)


def test_tars_without_a_split_are_the_test_split_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    items = write_set("mnist", "flat", tmp_path / "there")["test"]
    for number, item in enumerate(items):
        write_tar(tmp_path / "mnist" / f"{number}.tar", members(KNOWN["mnist"], [item], "jpg"))
    (tmp_path / "there" / "train-00000.tar").rename(tmp_path / "mnist" / "train-00000.tar")
    images = opened(tmp_path, "mnist")
    assert images.class_labels.tolist() == [item.said for item in items]
    assert sorted(f"{i}.tar" for i in range(12)) != sorted((f"{i}.tar" for i in range(12)), key=natural_order)
    assert len(opened(tmp_path, "mnist", "train").samples) == IMAGES


# -- names of the classes ---------------------------------------------------------------------------------------------


def renamed(
    tmp_path: Path, change: Callable[[list[str]], list[str]], name: str = "oxford_pets"
) -> tuple[ImageSet, Items]:
    """A set whose classnames.txt was changed."""
    items = write_set(name, "webdataset", tmp_path / name)
    path = tmp_path / name / "classnames.txt"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    return opened(tmp_path, name), items


def test_names_are_the_same_whatever_their_case_and_marks(tmp_path: Path) -> None:
    images, items = renamed(tmp_path, lambda names: [name.upper().replace(" ", "_") for name in names])
    assert as_read(images) == as_written(items)
    assert list(images.classnames) == class_names(KNOWN["oxford_pets"])
    assert images.notes == ()


def test_names_that_the_definition_does_not_have_are_used_and_said(tmp_path: Path) -> None:
    images, items = renamed(tmp_path, lambda names: [*names[:-1], "hamster"])
    assert images.classnames[-1] == "hamster"
    named = {key: images.classnames[label] for key, label in as_read(images).items()}
    wanted = {key: class_names(KNOWN["oxford_pets"])[label] for key, label in as_written(items).items()}
    assert all(named[key] in (wanted[key], "hamster") for key in wanted)
    folder = "class names and templates are those of the folder"
    assert f"{folder} (1 of 37 are not in the definition, such as 'hamster')" in images.partial


def test_a_name_that_two_classes_have_gives_no_label(tmp_path: Path) -> None:
    """Two of ImageNet's classes are called missile: as the folder of one, its name would say the wrong thing."""
    names = class_names(KNOWN["imagenet_sketch"])
    assert [label for label, name in enumerate(names) if name == "missile"] == [657, 744]
    for folder in ("n01440764", "n01443537", "missile"):
        (tmp_path / "sketch" / folder).mkdir(parents=True)
        (tmp_path / "sketch" / folder / "0.jpg").write_bytes(make_jpeg())
    with pytest.raises(Exception, match="sketch/missile is not a class of ImageNet-Sketch"):
        opened(tmp_path, "imagenet_sketch")


def test_hidden_files_and_thumbnails_are_counted(tmp_path: Path) -> None:
    items = write_set("mnist", "folders", tmp_path / "mnist")
    (tmp_path / "mnist" / "test" / ".cache").mkdir()
    (tmp_path / "mnist" / "test" / "3" / "._000.jpeg").write_bytes(b"x")
    (tmp_path / "mnist" / "test" / "3" / "Thumbs.db").write_bytes(b"x")
    images = opened(tmp_path, "mnist")
    test = tmp_path / "mnist" / "test"
    assert as_read(images) == as_written(items)
    assert images.notes == (
        f"hidden files: 1, {test}/3/._000.jpeg",
        f"files that end in .db: 1, {test}/3/Thumbs.db",
        f"hidden folders: 1, {test}/.cache",
    )


# -- at a URL ---------------------------------------------------------------------------------------------------------


AT_A_URL = [case for case in CASES if case[0] in ("oxford_pets", "voc2007", "flickr30k") and case[1] not in LOCAL]


@pytest.mark.parametrize(("name", "form"), few(AT_A_URL))
def test_a_set_at_a_url_is_that_of_the_disk(tmp_path: Path, s3: str, name: str, form: str) -> None:
    items = write_set(name, form, tmp_path / KNOWN[name].aliases[0])
    upload(tmp_path, f"{s3}/sets")
    images = opened(f"{s3}/sets", name)
    assert images.where == f"{s3}/sets/{KNOWN[name].aliases[0]}"
    assert as_read(images) == as_read(opened(tmp_path, name))
    assert set(as_read(images)) == set(as_written(items))
    assert images.digest() == opened(tmp_path, name).digest()
    assert find_sets((name,), f"{s3}/sets")[1] == {name: images.where}


def test_what_is_not_at_a_url_is_not_there(s3: str) -> None:
    assert open_set(KNOWN["mnist"], f"{s3}/sets", "test", "unpacked") is None


def test_imagenets_labelled_test_images_are_its_validation_split(tmp_path: Path) -> None:
    """Its own test images, which Hugging Face keeps beside them, have the label -1."""
    items = write_set("imagenet1k", "parquet-numbers", tmp_path / "imagenet1k")
    data = tmp_path / "imagenet1k" / "data"
    (here,) = (path for path in (tmp_path / "imagenet1k").rglob("test*.parquet"))
    data.mkdir(exist_ok=True)
    here.rename(data / "validation-00000-of-00001.parquet")
    write_parquet(data / "test-00000-of-00001.parquet", [{"image": make_jpeg(), "label": -1}])
    assert as_read(opened(tmp_path, "imagenet1k")) == as_written(items)


def test_objectnet_is_read_as_it_is_downloaded(tmp_path: Path) -> None:
    items = write_set("objectnet", "folders", tmp_path / "there")
    whole = tmp_path / "objectnet" / "objectnet-1.0"
    whole.mkdir(parents=True)
    (tmp_path / "there" / "test").rename(whole / "images")
    assert as_read(opened(tmp_path, "objectnet")) == as_written(items)
