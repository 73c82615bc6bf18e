"""Pages of evaluations and of latency: what they show of real results of two tiny models on small sets."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from cache_schemas import SchemaError
from dimefm.cli import cli
from dimefm.errors import StoreError
from dimefm.evaluation.config import EvaluationConfig
from dimefm.evaluation.evaluate import evaluate
from dimefm.evaluation.predicted import read_predicted
from dimefm.evaluation.results import read_results
from dimefm.inspection.info import examine
from dimefm.pages.evaluation_page import evaluation_sections
from dimefm.pages.page import Block, Cell, Chart, Gallery, Section, Table, Words
from dimefm.pages.report import make_page, report
from tests.latency.test_latency import measured, timing
from tests.latency.test_latency import written as measurements
from tests.making import encoded, write_tar, write_text
from tests.pages.browser import Browser
from tests.tiny_clip import write_clip

HOSTILE = "<img src=x onerror=alert(1)>\u202e{{ 7*7 }}\"'</td>"
INERT = HOSTILE.replace("\u202e", "\\u202e")
CLASSES, IMAGES = [HOSTILE, "dog", "a | cat"], 60


def colour(number: int) -> tuple[int, int, int]:
    return 37 * number % 256, 91 * number % 256, 151 * number % 256


def plain(number: int) -> bytes:
    """An image of one colour, which no other has."""
    return encoded(Image.new("RGB", (40, 30), colour(number)), "PNG")


def npy(labels: list[int], classes: int) -> bytes:
    many, sink = np.zeros(classes, np.float32), io.BytesIO()
    many[labels] = 1
    np.save(sink, many)
    return sink.getvalue()


def write_set(folder: Path, classes: list[str], images: int, split: str = "test", kind: str = "cls") -> str:
    members: dict[str, bytes] = {}
    for n in range(images):
        said = {"cls": str(n % len(classes or "a")).encode(), "txt": f"picture {n}\nor so".encode()}
        said["npy"] = npy([n % 3, (n + 1) % 3], 3) if n else npy([], 3)
        members[f"{HOSTILE}{n:03d}.png"] = plain(n)
        members[f"{HOSTILE}{n:03d}.{kind}"] = said[kind]
    write_tar(folder / split / "0.tar", members)
    if kind != "txt":
        write_text(folder / "classnames.txt", classes)
        write_text(folder / "templates.txt", ["a photo of a {c}."])
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_name: str) -> Path:
    """A folder with evaluations/teacher and evaluations/student, and the sets that they were measured on. The teacher
    alone has a set of many classes, and a set without predictions."""
    root = tmp_path_factory.mktemp("evaluations")
    pets = write_set(root / "pets", CLASSES, IMAGES)
    write_set(root / "pets", CLASSES, 36, "train")
    both = [
        pets,
        write_set(root / "several", ["x", "y", "z"], 30, kind="npy"),
        write_set(root / "said", [], 12, kind="txt"),
    ]
    many = write_set(root / "many", [f"class {n}" for n in range(25)], 100)
    student = f"local-dir:{write_clip(root / 'student', image_seed=1, scale=3, width=128)}"
    for name, model, folders in (("teacher", teacher_name, [*both, many]), ("student", student, both)):
        words: dict[str, Any] = {"out": str(root / "evaluations"), "name": name, "device": "cpu", "threads": 1}
        evaluate(EvaluationConfig(model=model, folders=tuple(folders), predictions=True, **words))
        few = {"tasks": ("few-shot",), "shots": (4, 8), "seeds": (0, 1), "solver": "lbfgs"}
        evaluate(EvaluationConfig(model=model, folders=(pets,), **few, **words))
    shutil.rmtree(root / "several")
    return root


@pytest.fixture(scope="module")
def sections(made: Path) -> dict[str, Section]:
    return {one.title: one for one in evaluation_sections([str(made / "evaluations")])}


def rows_of(made: Path, model: str, title: str = "own-pets") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(
        made / "evaluations" / model / "predictions" / f"{title}.zero-shot.parquet"
    ).to_pylist()
    return found


def blocks(section: Section, kind: type[Block], named: str = "") -> list[Any]:
    return [one for one in section.blocks if isinstance(one, kind) and named in (getattr(one, "caption", "") or named)]


def words_of(table: Table) -> list[list[str]]:
    return [[cell.words if isinstance(cell, Cell) else cell for cell in row] for row in table.rows]


def test_models_stand_side_by_side_in_a_browser(made: Path, browser: Browser, tmp_path: Path) -> None:
    out = report([str(made / "evaluations")], str(tmp_path / "page.html"))
    browser.open(Path(out))

    assert browser.texts("h2") == [
        "Results of 2 models", "own-pets: zero-shot", "own-several: zero-shot", "own-many: zero-shot"
    ]  # fmt: skip
    bars = "return document.querySelectorAll('.drawing[aria-label^=\"zero-shot\"] rect').length"
    assert browser.run(bars) == 7  # three sets of both models, and one of the teacher
    results = "//figure[figcaption[starts-with(normalize-space(), 'Results')]]"
    column = f"""const rows = document.evaluate("{results}//tbody/tr/td[5]", document, null, 7);
        return Array.from({{length: rows.snapshotLength}}, (_, n) => Number(rows.snapshotItem(n).dataset.value))"""
    before = browser.run(column)
    assert before != sorted(before)
    browser.press(browser.driver.find_element("xpath", f"{results}//th[5]/button"), "ENTER")
    assert browser.run(column) == sorted(before)
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.querySelectorAll('[onerror], img:not([src^=data])').length") == 0
    assert any(INERT in words for words in browser.texts(".gallery li span"))
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_wrong_images_are_those_of_the_predictions_and_their_pictures_theirs(
    made: Path, browser: Browser, tmp_path: Path
) -> None:
    browser.open(Path(report([str(made / "evaluations")], str(tmp_path / "page.html"))))
    read = """return [...document.querySelectorAll('#s2 .gallery')].map(figure => [
        figure.querySelector('figcaption').firstChild.textContent, [...figure.querySelectorAll('li')].map(card => [
            card.querySelector('b').textContent, [...card.querySelectorAll('span')].map(line => line.textContent),
            card.querySelector('img').naturalWidth, card.querySelector('img').src])])"""
    browser.run("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    browser.driver.execute_async_script(
        "Promise.all([...document.images].map(image => image.decode())).then(arguments[0])"
    )
    (every, all_wrong), (lost, student_wrong) = browser.run(read)

    teacher, student = rows_of(made, "teacher"), rows_of(made, "student")
    pairs = list(zip(teacher, student, strict=True))
    wrong = [pair for pair in pairs if not pair[0]["correct"] and not pair[1]["correct"]]
    fell = [pair for pair in pairs if pair[0]["correct"] and not pair[1]["correct"]]
    assert wrong
    assert fell
    for caption, cards, found in ((every, all_wrong, wrong), (lost, student_wrong, fell)):
        found.sort(key=lambda pair: -min(max(one["scores"]) for one in pair))
        assert re.findall(r"[\d,]+", caption)[-1] == str(len(found))
        assert len(cards) == min(24, len(found))
        for (title, lines, width, uri), pair in zip(cards, found, strict=False):
            names = [
                CLASSES[n].replace("\u202e", "\\u202e") for n in (pair[0]["label"], *(p["prediction"] for p in pair))
            ]
            assert title == names[0]
            assert [line.split(": ", 1)[0] for line in lines[:2]] == ["teacher", "student"]
            for line, taken, one in zip(lines, names[1:], pair, strict=False):
                assert f": {taken} {max(one['scores']):.0%}" in line
                assert ("(true class" in line) is not one["correct"]
            assert lines[2] == pair[0]["key"].replace("\u202e", "\\u202e")
            assert width > 0
            shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
            middle = np.asarray(shown)[10, 10].astype(int)
            assert np.abs(middle - colour(int(pair[0]["key"][-3:]))).max() < 12


def test_the_table_of_results_has_all_that_was_measured(made: Path, sections: dict[str, Section]) -> None:
    (table,) = blocks(sections["Results of 2 models"], Table, "Results")
    rows = {(row[0], row[1], row[2]): row for row in words_of(table)}
    results = {name: read_results(str(made / "evaluations" / name)) for name in ("teacher", "student")}
    assert (
        len(rows) == 4 + 3 + 2 * 2
    )  # sets of the teacher, of the student, and few-shot of both by the number of shots
    for name, of in results.items():
        for one in of:
            if one.protocol == "zero-shot":
                row = rows[one.title, "zero-shot", name]
                assert row[3] == one.metric
                assert row[4] == f"{100 * one.value:.1f}"
                assert row[5] == "{:.1f} to {:.1f}".format(*(100 * end for end in one.interval))
                reference = next(o.value for o in results["teacher"] if o.key == one.key)
                assert row[6] == f"{one.value / reference:.1%}"
    assert re.fullmatch(
        r"image R@1 \S+, image R@5 \S+, image R@10 \S+, text R@1.*", rows["own-said", "zero-shot", "student"][8]
    )
    assert "±" in rows["own-pets", "few-shot-4/honest, lbfgs", "student"][4]
    assert any("chosen by" in row[9] for row in rows.values())


def test_few_shot_is_drawn_over_shots_and_lacking_predictions_are_named(sections: dict[str, Section]) -> None:
    first = sections["Results of 2 models"]
    titles = [chart.title for chart in blocks(first, Chart)]
    assert titles == ["zero-shot", "own-pets: few-shot, honest, lbfgs"]
    curve = blocks(first, Chart)[1].svg
    assert curve.count("<polyline") == 2
    assert len(re.findall(r'<line class="s[01]"', curve)) == 4  # deviations of two models at two numbers of shots
    said = " ".join(words.text for words in blocks(first, Words))
    assert "student has no predictions of few-shot on own-pets; dimefm evaluate local-dir:" in said
    assert "SET --task few-shot --predictions keeps them" in said
    assert "own-said" not in said  # a set of captions has none


def test_each_class_is_counted_and_what_it_is_taken_for(made: Path, sections: dict[str, Section]) -> None:
    section = sections["own-pets: zero-shot"]
    (table,) = blocks(section, Table, "Right")
    of = {name: rows_of(made, name) for name in ("teacher", "student")}
    for name, count, *shares in words_of(table):
        label = CLASSES.index(name)
        those = {model: [row["correct"] for row in rows if row["label"] == label] for model, rows in of.items()}
        assert int(count) == len(those["teacher"])
        assert shares == [f"{np.mean(right):.1%}" for right in those.values()]
    charts = blocks(section, Chart)
    assert [chart.title for chart in charts] == [
        "Right, by class", "teacher: what is taken for what", "student: what is taken for what"
    ]  # fmt: skip
    assert charts[1].svg.count("<rect") == 9
    taken = [row for row in of["student"] if row["label"] == 1]
    share = sum(row["prediction"] == 2 for row in taken) / len(taken)
    assert f"dog as a | cat: {share:.1%}<" in charts[2].svg

    (agreement,) = blocks(section, Table, "Agreement")
    same = np.mean([a["prediction"] == b["prediction"] for a, b in zip(*of.values(), strict=True)])
    assert words_of(agreement)[0][:3] == ["teacher", "student", f"{same:.1%}"]


def test_many_classes_have_a_table_of_confusions(made: Path, sections: dict[str, Section]) -> None:
    """Of the one model that has this set."""
    section = sections["own-many: zero-shot"]
    assert not blocks(section, Chart)
    (table,) = blocks(section, Table, "What is taken")
    pairs: dict[tuple[str, str], int] = {}
    for row in rows_of(made, "teacher", "own-many"):
        if not row["correct"]:
            key = f"class {row['label']}", f"class {row['prediction']}"
            pairs[key] = pairs.get(key, 0) + 1
    shown = {(row[0], row[1]): int(row[3]) for row in words_of(table)}
    assert len(shown) == min(20, len(pairs))
    assert all(pairs[pair] == count for pair, count in shown.items())
    assert sorted(shown.values()) == sorted(pairs.values())[-len(shown) :]


def test_pictures_that_are_gone_are_counted_in_one_warning(made: Path, sections: dict[str, Section]) -> None:
    """Of a set in which an image may have several labels."""
    section = sections["own-several: zero-shot"]
    cards = [card for gallery in blocks(section, Gallery) for card in gallery.cards]
    assert cards
    assert {card.image for card in cards} == {None}
    (warning,) = [words.text for words in blocks(section, Words) if words.warning]
    rows = {card.lines[-1] for card in cards}
    assert warning.startswith(f"{len(rows)} of {len(rows)} pictures cannot be shown, such as: ")
    right = [row["correct"] for row in rows_of(made, "teacher", "own-several") if 1 in row["label"]]
    (table,) = blocks(section, Table, "Right")
    assert {row[0]: row[2] for row in words_of(table)}["y"] == f"{np.mean(right):.1%}"
    assert not [chart for chart in blocks(section, Chart) if "taken for" in chart.title]


def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "evaluations", tmp_path / "evaluations")
    return tmp_path / "evaluations"


def test_predictions_of_other_images_and_older_ones_are_told_apart(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    path = folder / "student" / "predictions" / "own-pets.zero-shot.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 40).replace_schema_metadata(table.schema.metadata), path)
    shutil.rmtree(folder / "teacher" / "features")
    found = {one.title: one for one in evaluation_sections([str(folder)])}
    teacher, student = (found[f"own-pets: zero-shot ({name})"] for name in ("teacher", "student"))
    assert not blocks(teacher, Table, "Agreement")
    (gone,) = [words.text for words in blocks(teacher, Words) if words.warning]
    assert "the features of own-pets, which say where its images lie, are gone" in gone
    assert any("not those of its result" in words.text for words in blocks(student, Words) if words.warning)


def test_two_models_of_one_name_are_told_apart(made: Path, tmp_path: Path) -> None:
    """And one that has no result is named."""
    other = copied(made, tmp_path)
    (other / "teacher" / "results.jsonl").write_text("")
    first = evaluation_sections([str(made / "evaluations"), str(other), str(other / "student")])[0]
    (models,) = blocks(first, Table, "Models")
    here, there = str(made / "evaluations" / "student"), str(other / "student")
    assert [row[0] for row in models.rows] == [str(made / "evaluations" / "teacher"), here, there]
    said = [words.text for words in blocks(first, Words) if words.warning]
    assert said == [f"{other / 'teacher'} has no result yet"]


def test_damaged_predictions_are_an_error(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    path = folder / "student" / "predictions" / "own-pets.zero-shot.parquet"
    table = pq.read_table(path)
    far = table.set_column(3, "prediction", [[3] * len(table)])
    pq.write_table(far.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(StoreError, match="none of 3 classes"):
        evaluation_sections([str(folder)])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="no predictions that can be read"):
        evaluation_sections([str(folder)])


def test_a_class_with_a_line_end_in_its_name_moves_no_other(made: Path) -> None:
    path = made / "evaluations" / "teacher" / "predictions" / "own-pets.zero-shot.parquet"
    table = pq.read_table(path)
    other = made / "line end.parquet"
    pq.write_table(table.replace_schema_metadata({"classes": "\n".join(["a\nb", "c", "d"])}), other)
    assert read_predicted(str(path)).classes == CLASSES
    assert read_predicted(str(other)).classes == ["class 0", "class 1", "class 2"]


def test_latency_is_shown_beside_accuracy(made: Path, browser: Browser, tmp_path: Path) -> None:
    """The file lies in a folder of several places."""
    folder = copied(made, tmp_path)
    weights = {name: str(read_results(str(folder / name))[0].model["weights"]) for name in ("teacher", "student")}
    models = [
        measured(name=HOSTILE, weights=weights["teacher"], image=(timing(1, 40.0), timing(64, 10.0))),
        measured(name="student", weights=weights["student"], image=(timing(1, 2.0), timing(64, 0.5))),
    ]
    measurements(tmp_path / "latency.json", models)
    browser.open(Path(report([str(tmp_path)], str(tmp_path / "page.html"))))

    assert browser.texts("h2")[-1] == f"Speed: {tmp_path / 'latency.json'}"
    drawing = browser.one(".drawing[aria-label^='Accuracy against latency']")
    value = {name: read_results(str(folder / name)) for name in weights}
    mean = {name: np.mean([one.value for one in of if one.protocol == "zero-shot" and one.title != "own-many"])
            for name, of in value.items()}  # fmt: skip
    assert drawing.get_attribute("aria-label").endswith(
        f"teacher: 40, {100 * mean['teacher']:.4g}; student: 2, {100 * mean['student']:.4g}"
    )
    assert len(drawing.find_elements("css selector", "circle")) == 2
    assert INERT in browser.texts("td:first-child")
    shutil.rmtree(folder / "student")
    (section,) = [one for one in make_page([str(tmp_path)]).sections if one.title.startswith("Speed")]
    assert blocks(section, Chart)[0].title == "Accuracy against latency"


def test_info_describes_latency_whatever_its_file_is_called(tmp_path: Path) -> None:
    path = measurements(tmp_path / "speed of mine.json", [measured(), measured(weights="v", name="other")])
    found = CliRunner().invoke(cli, ["info", path])
    assert "the speed of 2 models" in found.output
    assert "2 ms per image in batches of 1, 1,000 images/s in batches of 8" in " ".join(found.output.split())
    facts = json.loads(CliRunner().invoke(cli, ["info", path, "--json"]).stdout)
    assert (facts["artefact"], facts["quiet"], len(facts["models"])) == ("latency", True, 2)

    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(SchemaError):
        examine(str(tmp_path / "latency.json"))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(StoreError, match="is a file, and info describes folders"):
        examine(str(tmp_path / "other.json"))
