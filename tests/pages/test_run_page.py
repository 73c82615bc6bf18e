"""The page of training runs: what it draws of one and of several, and what it says of a log that lacks something."""

import json
import re
from pathlib import Path

from cache_schemas import Run
from cache_schemas.run import FurtherTeacher
from dimefm.pages.page import Chart, Facts, Section, Table, Words
from dimefm.pages.report import report
from dimefm.pages.run_page import run_sections
from dimefm.training.run_folder import read_run, write_run
from tests.pages.browser import Browser
from tests.pages.runs import append, finish, train, validation, write

HOSTILE = "<script>alert(1)</script>\u202e'\""


def charts(sections: list[Section]) -> dict[str, Chart]:
    return {block.title: block for section in sections for block in section.blocks if isinstance(block, Chart)}


def words(sections: list[Section], *, warning: bool) -> str:
    found = [block for section in sections for block in section.blocks if isinstance(block, Words)]
    return "\n".join(block.text for block in found if block.warning == warning)


def rows(sections: list[Section], caption: str) -> list[list[str]]:
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    (table,) = [one for one in tables if one.caption.startswith(caption)]
    return [list(table.head), *([cell if isinstance(cell, str) else cell.words for cell in row] for row in table.rows)]


def lines(chart: Chart) -> dict[str, str]:
    """The lines of a chart by their names, with what they go from and to."""
    return dict(re.findall(r"(\S+) from (\S+ to [^\s;]+)", chart.alt))


def points(chart: Chart) -> list[int]:
    """How many points each line of a chart has."""
    return [len(line.split()) for line in re.findall(r'points="([^"]*)"', chart.svg)]


def usual(step: int) -> dict[str, float]:
    return {"grad_norm": 2.0, "lr": 1e-3, "epoch": 0, "images_per_second": 900.0 + step, "data_wait": 0.1}


def test_a_run_is_drawn_with_all_that_it_has_logged(like: Run, tmp_path: Path) -> None:
    run = write(tmp_path / "run", like, [train(n, loss=4.0 - n / 50, vl=6.0, pvl=2.0, **usual(n)) for n in (50, 100)])
    append(run, validation(100, pets=0.25, cars=0.5))
    finish(run, 100)
    sections = run_sections([run])

    titles = ["run: training run", "Loss", "Validation during training", "Learning rate, gradient and speed", "Numbers"]
    assert [section.title for section in sections] == titles
    facts = next(block for block in sections[0].blocks if isinstance(block, Facts))
    assert ("steps", "100 of 100, batches of 4") in facts.rows
    drawn = charts(sections)
    assert {title: lines(chart) for title, chart in drawn.items()} == {
        "Loss": {"loss": "3 to 2"},
        "Parts of the loss": {"vl": "6 to 6", "pvl": "2 to 2"},
        "Accuracy on labelled sets": {"pets": "0.25 to 0.25", "cars": "0.5 to 0.5"},
        "Learning rate": {"rate": "0.001 to 0.001"},
        "Norm of the gradient": {"norm": "2 to 2"},
        "Images per second": {"images/s": "950 to 1000"},
        "Share of the time spent waiting for data": {"share": "0.1 to 0.1"},
    }
    assert rows(sections, "The last and the best")[1:4] == [
        ["loss", "2", "100", "2", "100"],
        ["vl", "6", "100", "6", "50"],
        ["pvl", "2", "100", "2", "50"],
    ]
    assert words(sections, warning=False) + words(sections, warning=True) == ""


def test_runs_over_each_other_with_what_differs(like: Run, tmp_path: Path) -> None:
    loss = like.config["loss"]
    assert isinstance(loss, dict)
    small = write(tmp_path / "a" / "run", like, [train(n, loss=1 / n, vl=1 / n) for n in (10, 20)])
    append(small, validation(20, pets=0.5), train(30, loss=1 / 30), validation(30, pets=0.4))
    large = write(
        tmp_path / "b" / "run", like, [train(n, loss=2 / n, cosine=2 / n) for n in (10, 20)],
        batch_size=64, lr=0.5, loss={**loss, "cosine": 1.0}, crop_scale=[0.5, 1.0],
    )  # fmt: skip
    append(large, validation(20, pets=0.45))
    sections = run_sections([small, large])

    drawn = charts(sections)
    assert lines(drawn["Loss"]) == {"a/run": "0.1 to 0.03333", "b/run": "0.2 to 0.1"}
    assert drawn["Loss"].note == "These runs minimise different losses: their values cannot be compared."
    assert [axis.split()[1] for axis in re.findall(r'data-x="([^"]*)"', drawn["Loss, over images seen"].svg)] == [
        "1500"
    ]
    assert lines(drawn["vl"]).keys() == {"a/run"}
    assert lines(drawn["cosine"]).keys() == {"b/run"}
    assert "s1" in drawn["cosine"].svg  # the colour of the second run, in all charts
    assert "Accuracy on pets, over images seen" in drawn
    assert rows(sections, "What differs") == [
        ["field", "a/run", "b/run"],
        ["batch_size", "4", "64"],
        ["lr", "0.008", "0.5"],
        ["loss.cosine", "0.0", "1.0"],
        ["crop_scale", "0.6, 1.0", "0.5, 1.0"],
    ]
    assert [row[:7] for row in rows(sections, "How far")] == [
        ["run", "steps", "images seen", "loss last", "loss lowest", "pets last", "pets best"],
        ["a/run", "30 of 100", "120", "0.03333", "0.03333 (30)", "0.4", "0.5 (20)"],
        ["b/run", "20 of 100", "1,280", "0.1", "0.1 (20)", "0.45", "0.45 (20)"],
    ]
    assert [section.title for section in sections][-2:] == ["a/run: training run", "b/run: training run"]


def test_runs_of_the_same_batches_and_config_say_so(like: Run, tmp_path: Path) -> None:
    runs = [write(tmp_path / name, like, [train(10, loss=1.0)]) for name in ("one", "other")]
    sections = run_sections(runs)
    assert "The configs of these runs are the same." in words(sections, warning=False)
    assert "Loss, over images seen" not in charts(sections)
    assert charts(sections)["Loss"].note == ""


def test_what_is_missing_is_said(like: Run, tmp_path: Path) -> None:
    new = run_sections([write(tmp_path / "new", like, [])])
    assert [section.title for section in new] == ["new: training run"]
    assert words(new, warning=False).splitlines() == [
        "It is not finished: 0 of 100 steps are done, and it has no checkpoint yet.",
        "It has logged no step yet.",
        "It has no validation yet.",
    ]
    without = write(tmp_path / "without", like, [train(50, loss=1.0)], val=[])
    finish(without, 50)
    assert words(run_sections([without]), warning=False).splitlines() == [
        "It is not finished: 50 of 100 steps are done, and its last checkpoint is of step 50.",
        "It is not validated: it has no val.",
    ]
    both = run_sections([str(tmp_path / "new"), without])
    assert lines(charts(both)["Loss"]) == {"without": "1 to 1"}
    assert rows(both, "How far")[1] == ["new", "0 of 100", "none", "none", "none"]


def test_lines_of_steps_that_were_done_again_are_left_out(like: Run, tmp_path: Path) -> None:
    """After step 20 it was resumed at step 10: neither the first line of step 20 nor that of step 30 counts."""
    run = write(tmp_path / "run", like, [train(10, loss=9.0), train(20, loss=8.0), validation(30, pets=0.9)])
    append(run, train(30, loss=7.0), train(20, loss=6.0), validation(20, pets=0.1))
    sections = run_sections([run])
    assert lines(charts(sections)["Loss"]) == {"loss": "9 to 6"}
    assert points(charts(sections)["Loss"]) == [2]
    assert lines(charts(sections)["Accuracy on labelled sets"]) == {"pets": "0.1 to 0.1"}
    assert "It was resumed: 3 lines of steps that were done again are left out" in words(sections, warning=False)


def test_a_log_with_gaps_is_drawn_as_far_as_it_goes(like: Run, tmp_path: Path) -> None:
    run = write(tmp_path / "run", like, [train(n, loss=None if n == 20 else 1.0, grad_norm=None) for n in (10, 20, 30)])
    append(run, train(40, loss=float("nan"), lr=0.1), '{"event": "train", "step": 50, "lo')
    (tmp_path / "run" / "stopped-at.json").write_text(json.dumps({"step": 45}))
    sections = run_sections([run])
    assert points(charts(sections)["Loss"]) == [2]
    assert "Norm of the gradient" not in charts(sections)
    assert words(sections, warning=True).splitlines() == [
        "It stopped at step 45, whose loss or gradient was not finite: stopped-at.json in its folder says more.",
        "It logged no finite loss at 2 steps, first 20; it is not drawn there.",
        "It logged no finite grad_norm at 3 steps, first 10; it is not drawn there.",
        "It has 1 line in metrics.jsonl that is cut short and left out.",
    ]
    finish(run, 60)  # it went on since
    append(run, "\n", train(70, loss=None))
    assert "stopped at" not in words(run_sections([run]), warning=True)
    assert ("last", "loss not finite, no image") in next(
        b for b in run_sections([run])[0].blocks if isinstance(b, Facts)
    ).rows


def test_several_teachers_and_a_text_tower_have_charts_of_their_own(like: Run, tmp_path: Path) -> None:
    values = {"teacher1_loss": 1.0, "teacher1_vl": 2.0, "teacher2_loss": 3.0, "teacher2_logit_scale": 90.0}
    run = write(tmp_path / "run", like, [train(10, loss=1.0, **values, text_loss=0.5, text_cosine=0.4)])
    document = read_run(run)
    more = FurtherTeacher(teacher=document.teacher, images_identity="x", images_data="y")
    write_run(run, Run(**{**vars(document), "more_teachers": (more,)}))
    sections = run_sections([run])
    drawn = {title: set(lines(chart)) for title, chart in charts(sections).items()}
    assert drawn["Parts of the loss, teacher 1"] == {"loss", "vl"}
    assert drawn["Parts of the loss, teacher 2"] == {"loss"}
    assert drawn["Parts of the loss, text tower"] == {"loss", "cosine"}
    assert drawn["teacher 2: logit_scale"] == {"scale"}
    facts = next(block for block in sections[0].blocks if isinstance(block, Facts))
    assert [name for name, _ in facts.rows].count("teacher") == 2


def test_in_a_browser(like: Run, tmp_path: Path, browser: Browser) -> None:
    """Names of sets are the user's: they are text. A thousand lines are drawn with their peaks."""
    long = [train(n, loss=5.0 if n == 777 else 1.0) for n in range(1, 1001)]
    for name in ("one", "other"):
        run = write(tmp_path / "runs" / name, like, long, steps=1000)
        append(run, validation(1000, **{HOSTILE: 0.5}))
    page = report([str(tmp_path / "runs")], str(tmp_path / "page.html"))
    browser.open(Path(page))

    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert f"Accuracy on {shown}" in browser.texts("figcaption")
    assert browser.run("return document.scripts.length") == 1
    assert browser.texts("nav a")[0] == "Training runs"
    drawing = browser.one(".drawing[aria-label^='Loss']")
    browser.press(drawing, "ARROW_RIGHT")
    assert browser.texts(".readout")[0].startswith("step ")
    assert "one 1, other 1" in browser.texts(".readout")[0]
    peaks = "return [...document.querySelectorAll('svg')[0].querySelectorAll('polyline')].map(l => " \
            "Math.min(...[...l.points].map(p => p.y)) < 15 && l.points.length <= 400)"  # fmt: skip
    assert browser.run(peaks) == [True, True]
    for width in (500, 1200):
        browser.resize(width)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
