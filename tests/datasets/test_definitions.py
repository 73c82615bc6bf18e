"""The definitions of the evaluation sets: against what was published, and against each other."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

import pytest

from cache_schemas import SchemaError
from cache_schemas.evaluation import SetDefinition
from dimefm.datasets.definitions import class_folders, class_names, load_definitions, parse_definition, templates

# The published facts of every set: classes, test images, metric. A new set of no published table goes to OTHERS.
ELEVATER = {
    "caltech101": (102, 6084, "mean_per_class"),
    "cifar10": (10, 10000, "accuracy"),
    "cifar100": (100, 10000, "accuracy"),
    "country211": (211, 21100, "accuracy"),
    "dtd": (47, 1880, "accuracy"),
    "eurosat": (10, 5000, "accuracy"),
    "fer2013": (7, 3589, "accuracy"),
    "fgvc_aircraft": (100, 3333, "mean_per_class"),
    "food101": (101, 25250, "accuracy"),
    "gtsrb": (43, 12630, "accuracy"),
    "hateful_memes": (2, 500, "roc_auc"),
    "kitti_distance": (4, 711, "accuracy"),
    "mnist": (10, 10000, "accuracy"),
    "flowers102": (102, 6149, "mean_per_class"),
    "oxford_pets": (37, 3669, "mean_per_class"),
    "patch_camelyon": (2, 32768, "accuracy"),
    "rendered_sst2": (2, 1821, "accuracy"),
    "resisc45": (45, 25200, "accuracy"),
    "stanford_cars": (196, 8041, "accuracy"),
    "voc2007": (20, 4952, "map_11_point"),
}
SHIFTS = {
    "imagenetv2": (1000, 10000, "accuracy"),
    "imagenet_a": (200, 7500, "accuracy"),
    "imagenet_r": (200, 30000, "accuracy"),
    "imagenet_sketch": (1000, 50889, "accuracy"),
    "objectnet": (113, 18574, "accuracy"),
}
OTHERS = {
    "imagenet1k": (1000, 50000, "accuracy"),
    "coco_captions": (0, 5000, "recall"),
    "flickr30k": (0, 1000, "recall"),
}
PUBLISHED = ELEVATER | SHIFTS | OTHERS
# Images for training and validation; None where there is no such split.
TRAINING = {
    "caltech101": (3060, None),
    "dtd": (1880, 1880),
    "eurosat": (5000, 5000),
    "fer2013": (28709, 3589),
    "gtsrb": (26640, 12569),
    "kitti_distance": (6347, 423),
    "patch_camelyon": (262144, 32768),
    "voc2007": (2501, 2510),
    "imagenetv2": (None, None),
    "coco_captions": (113287, 5000),
    "flickr30k": (29000, 1014),
}
# A class name and its folder, where a wrong order would show.
PAIRS = [
    ("caltech101", 4, "background", "BACKGROUND_Google"),
    ("caltech101", 37, "off-center face", "Faces"),
    ("caltech101", 101, "yin and yang symbol", "yin_yang"),
    ("cifar100", 0, "apple", "apple"),
    ("cifar100", 47, "maple tree", "maple_tree"),
    ("country211", 65, "United Kingdom", "GB"),
    ("country211", 206, "Kosovo", "XK"),
    ("eurosat", 2, "brushland or shrubland", "HerbaceousVegetation"),
    ("fer2013", 6, "surprised", "surprise"),
    ("fgvc_aircraft", 36, "An-12", "An-12"),
    ("fgvc_aircraft", 73, "F-A-18", "F/A-18"),
    ("food101", 16, "cheese plate", "cheese_plate"),
    ("gtsrb", 14, "stop", "00014"),
    ("oxford_pets", 5, "Bengal", "Bengal"),
    ("oxford_pets", 36, "yorkshire terrier", "yorkshire_terrier"),
    ("resisc45", 30, "railway station", "railway_station"),
    ("stanford_cars", 0, "AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
    ("imagenet1k", 0, "tench", "n01440764"),
    ("imagenet1k", 999, "toilet paper", "n15075141"),
    ("imagenet_a", 0, "stingray", "n01498041"),
    ("imagenet_r", 199, "acorn", "n12267677"),
    ("imagenet_sketch", 1, "goldfish", "n01443537"),
    ("objectnet", 32, "bath towel", "full_sized_towel"),
    ("objectnet", 112, "wok", "wok"),
]


def raw(room: str, name: str) -> Any:
    """The contents of a JSON file that ships in a room of dimefm."""
    return json.loads((resources.files(f"dimefm.{room}") / name).read_text(encoding="utf-8"))


def suite(name: str) -> dict[str, SetDefinition]:
    return {n: d for n, d in load_definitions().items() if d.suite == name}


def test_every_definition_has_its_line_of_published_facts() -> None:
    known = load_definitions()
    for name in known.keys() - PUBLISHED.keys():
        pytest.fail(
            f"{name}.json is new: add {name!r}: (classes, test images, metric) to OTHERS in this file, as its authors "
            "published them. The numbers are given twice so that a slip in the definition is found"
        )
    for name in PUBLISHED.keys() - known.keys():
        pytest.fail(f"{name} has published facts in this file, but no dimefm/datasets/sets/{name}.json")
    assert list(known) == sorted(known)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_is_as_published(name: str) -> None:
    definition = load_definitions()[name]
    assert (definition.class_count, definition.splits["test"], definition.metric) == PUBLISHED[name]
    assert definition.problems() == []
    assert all((definition.title, definition.licence, definition.get, definition.layouts, definition.sources))


@pytest.mark.parametrize("name", TRAINING)
def test_training_images_are_as_published(name: str) -> None:
    splits = load_definitions()[name].splits
    assert (splits.get("train"), splits.get("val")) == TRAINING[name]


def test_the_published_suites_have_just_their_sets() -> None:
    closed = "the mean of this suite is compared with published ones: a new set belongs to another suite"
    assert set(suite("elevater")) == set(ELEVATER), closed
    assert set(suite("robustness")) == set(SHIFTS), closed
    assert set(suite("imagenet")) == {"imagenet1k"}, closed


def test_tasks_and_resizing() -> None:
    assert {"coco_captions", "flickr30k"} <= set(suite("retrieval"))
    assert all(d.task == "retrieval" for d in suite("retrieval").values())
    others = {name: load_definitions()[name] for name in ("imagenet1k", *SHIFTS, *ELEVATER)}
    assert {name: d.task for name, d in others.items() if d.task != "classification"} == {"voc2007": "multilabel"}
    assert [name for name, d in others.items() if d.resize == "squash"] == ["kitti_distance"]


def test_elevater_has_20_sets_under_its_own_names() -> None:
    names = [d.elevater for d in suite("elevater").values()]
    assert len(set(names)) == len(names) == 20
    assert None not in names
    assert all(d.elevater is None for d in load_definitions().values() if d.suite != "elevater")


def test_no_folder_name_means_two_sets() -> None:
    owner: dict[str, str] = {}
    for definition in load_definitions().values():
        assert len(set(definition.aliases)) == len(definition.aliases)
        assert definition.name not in definition.aliases
        for alias in (definition.name, *definition.aliases):
            assert owner.setdefault(alias.casefold(), definition.name) == definition.name, alias


@pytest.mark.parametrize("name", [name for name, d in load_definitions().items() if d.task != "retrieval"])
def test_names_templates_and_folders_of_every_class(name: str) -> None:
    definition = load_definitions()[name]
    names, folders = class_names(definition), class_folders(definition)
    assert len(names) == len(folders) == definition.class_count
    assert all(names)
    if name != "imagenetv2":  # its folders are numbers; of open_clip's names, two stand for two classes
        assert len(set(folders)) == len(folders)
    found = templates(definition)
    assert len(found) == len(set(found))
    assert all(t.count("{c}") == 1 and "{" not in t.replace("{c}", "") for t in found)


@pytest.mark.parametrize(("name", "label", "of_class", "folder"), PAIRS)
def test_names_and_folders_have_the_order_of_the_labels(name: str, label: int, of_class: str, folder: str) -> None:
    definition = load_definitions()[name]
    assert (class_names(definition)[label], class_folders(definition)[label]) == (of_class, folder)


def test_a_retrieval_set_has_no_classes() -> None:
    definition = load_definitions()["flickr30k"]
    assert class_names(definition) == class_folders(definition) == templates(definition) == []


@pytest.mark.parametrize("name", ["imagenet1k", *SHIFTS])
def test_imagenet_and_its_shifts_use_the_80_templates(name: str) -> None:
    found = templates(load_definitions()[name])
    assert len(found) == 80
    assert found[0] == "a bad photo of a {c}."
    assert found[-1] == "a tattoo of the {c}."


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_subsets_are_200_ids_of_imagenet_in_order(name: str) -> None:
    subset = load_definitions()[name].subset
    assert len(subset) == 200
    assert list(subset) == sorted(subset)
    assert set(subset) < set(class_folders(load_definitions()["imagenet1k"]))


def test_the_first_of_a_classs_synonyms_is_its_name() -> None:
    expected = ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]
    assert class_names(load_definitions()["fer2013"]) == expected


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"class_count": 11}, "classes: has 10 entries, but class_count is 11"),
        ({"templates": ["a photo"]}, "templates: 'a photo' has no {c}"),
        ({"templates": []}, "templates: give either templates or templates_from"),
        ({"splits": {"train": 1}}, "splits: has no test split"),
        ({"metric": "top1"}, "metric: expected one of"),
        ({"colour": "red"}, "colour: unknown field"),
        ({"name": "cifar11"}, "name: is 'cifar11', but the file is cifar10.json"),
    ],
)
def test_what_is_wrong_with_a_definition_is_said_with_its_file(change: dict[str, object], problem: str) -> None:
    with pytest.raises(SchemaError, match=r"^cifar10\.json") as error:
        parse_definition(json.dumps(raw("datasets", "sets/cifar10.json") | change), "cifar10.json")
    assert problem in str(error.value)


def test_a_definition_that_is_no_json_is_named() -> None:
    with pytest.raises(SchemaError, match=r"^cifar10\.json.*\n.*not JSON"):
        parse_definition("{", "cifar10.json")


def test_published_results() -> None:
    rows = raw("evaluation", "published.json")
    columns = ("imagenet1k", "elevater", "elevater_linear_probe", "robustness")
    assert all(set(row) == {"model", "source", "text_corpus", "values"} for row in rows)
    assert [tuple(row["values"][c] for c in columns) for row in rows] == [
        (0.665, 0.564, 0.792, 0.502),
        (0.661, 0.577, 0.794, None),
        (0.676, None, None, None),
    ]
    assert rows[2]["text_corpus"] is None


def test_the_baseline_has_a_line_for_every_shift() -> None:
    baseline = raw("evaluation", "baseline.json")
    assert set(baseline) == {"source", "models", "fit"}
    assert set(baseline["models"]) == set(baseline["fit"]) == set(SHIFTS)
    # A ResNet-50 of torchvision: 76.1% on ImageNet-1k, and what is published for it elsewhere, roughly.
    expected = {"imagenetv2": 0.633, "imagenet_a": 0.0, "imagenet_r": 0.362, "imagenet_sketch": 0.241, "objectnet": 0.3}
    for name, line in baseline["fit"].items():
        x = math.log(0.761 / (1 - 0.761))
        accuracy = 1 / (1 + math.exp(-(line["slope"] * x + line["intercept"])))
        assert accuracy == pytest.approx(expected[name], abs=0.08), name
