"""`dimefm watch`: a real Chromium shows what a run logs as it is logged, and keeps what its reader has done."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache_schemas import Run
from dimefm.cli import cli
from dimefm.pages.server import PageServer, Request
from dimefm.pages.watch import WatchedRun
from dimefm.training.read_metrics import read_metrics
from tests.pages.browser import Browser
from tests.pages.runs import append, finish, train, validation, write
from tests.pages.serving import Serving
from tests.processes import Command, Gate

HEAVY = {"torch", "torchvision", "open_clip", "timm", "transformers", "tensorboard", "ray", "faiss", "matplotlib"}


def logged(step: int) -> dict[str, float]:
    """Enough values for a table that can be filtered."""
    return {"loss": 5.0 - step / 50, **{f"teacher{n}_cosine": n / 20 for n in range(1, 15)}, "lr": 0.1, "epoch": 0}


def wait_for(found: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def state(browser: Browser) -> str:
    return "".join(browser.texts("#state"))


def test_a_new_step_appears_and_what_the_reader_did_stays(like: Run, tmp_path: Path, browser: Browser) -> None:
    run = write(tmp_path / "run", like, [train(n, **logged(n)) for n in (10, 20)])
    with Serving("watch", run) as served:
        browser.open(served.url)
        wait_for(lambda: state(browser).startswith("training: 20 of 100 steps; last update "))
        browser.run("document.documentElement.style.scrollBehavior = 'auto'")  # else places change for a while
        browser.type(".filter input", "cosine 0.5")
        browser.press(browser.all("th button")[1], "ENTER")
        browser.press(browser.all("th button")[1], "ENTER")
        for _ in range(2):
            browser.press(browser.one(".drawing"), "ARROW_RIGHT")
        browser.run("const i = document.querySelector('.filter input'); i.focus(); i.setSelectionRange(2, 4);")
        browser.run("document.querySelector('.filter').closest('figure').scrollIntoView({ behavior: 'instant' })")
        kept = """const i = document.querySelector('.filter input');
            return [i === document.activeElement, i.value, i.selectionStart, i.selectionEnd,
                document.querySelector('th[aria-sort]').ariaSort, document.querySelector('.readout').value,
                [...document.querySelectorAll('tbody tr:not([hidden]) td:first-child')].map(t => t.textContent)]"""
        place = "return document.activeElement.getBoundingClientRect().top"
        before, top = browser.run(kept), browser.run(place)
        names = ["teacher 11: cosine", "teacher 10: cosine"]
        assert before == [True, "cosine 0.5", 2, 4, "descending", "step 20: loss 4.6", names]

        append(run, train(30, **{**logged(30), "brand_new": 1.0}), validation(30, pets=0.5))
        wait_for(lambda: state(browser).startswith("training: 30 of 100 steps"))
        assert browser.run("return document.querySelectorAll('svg')[0].querySelectorAll('circle').length") == 3
        assert "Validation during training" in browser.texts("h2")  # above the table, which has not moved all the same
        assert browser.run(kept) == before
        assert browser.run(place) == pytest.approx(top, abs=2)

        finish(run, 100)
        wait_for(lambda: state(browser).startswith("finished: 100 steps"))


def test_a_training_run_is_watched_to_its_end(tiny_run: list[str], tmp_path: Path, browser: Browser) -> None:
    """It is held where its first checkpoint is written, and so at work until the second is due."""
    run, gate = tmp_path / "run", Gate(tmp_path / "gate")
    gate.close(at="open *step-00000002.pt*")
    training = Command([*tiny_run, "--out", str(run), "--set", "log_every=1"], gate)
    training.wait_until(gate.waiting)
    with Serving("watch", str(run)) as served:
        browser.open(served.url)
        wait_for(lambda: state(browser).startswith("training: 4 of 8 steps"))
        assert browser.texts("figcaption")[:2] == ["Loss", "Parts of the loss"]
        assert browser.texts("figure:nth-of-type(2) .legend li") == ["vl", "pvl", "centred"]

        gate.open()
        training.finish()
        wait_for(lambda: state(browser).startswith("finished: 8 steps"))
        assert browser.run("return document.querySelectorAll('svg')[0].querySelectorAll('circle').length") == 8
        last = read_metrics(str(run))[-1]["loss"]
        assert browser.texts("td")[:3] == ["loss", f"{last:,.4g}", "8"]


def test_ctrl_c_ends_it_with_its_port_free(like: Run, tmp_path: Path, browser: Browser) -> None:
    with Serving("watch", write(tmp_path / "run", like, [train(10, loss=1.0)]), "--quiet") as served:
        browser.open(served.url)
        wait_for(lambda: state(browser).startswith("training"))
        assert served.stop(signal.SIGINT) == (128 + signal.SIGINT, "Stopped by Ctrl-C: the page is served no more\n")
        PageServer({}, served.port).server_close()
    wait_for(lambda: state(browser) == "dimefm watch has ended, or does not answer: this page is as it was")
    browser.forget()  # it logs that its questions are not answered


def test_sections_are_sent_where_they_are_new(like: Run, tmp_path: Path) -> None:
    run = write(tmp_path / "run", like, [train(10, loss=1.0, images_per_second=1.0)], log_every=50)
    watched = WatchedRun(run)

    def ask(version: str) -> dict[str, object]:
        return dict(json.loads(watched.now(Request({"version": version})).body))

    first = ask("")
    assert "Loss" in str(first["sections"])
    again = ask(str(first["version"]))
    assert again["sections"] is None
    assert again["state"] == "training"
    append(run, train(20, loss=1.0, images_per_second=1.0))
    newer = ask(str(first["version"]))
    assert newer["version"] != first["version"]
    assert newer["sections"] is not None

    def heard(seconds: float) -> None:
        for file in (tmp_path / "run").iterdir():
            os.utime(file, (time.time() - seconds,) * 2)

    heard(500)  # a line of 50 steps of 4 images comes every 200 seconds
    assert ask("")["words"] == "training: 20 of 100 steps"
    heard(700)
    assert re.fullmatch(r"not heard of for 70\d s, after 20 of 100 steps", str(ask("")["words"]))


@pytest.mark.parametrize(
    ("path", "what"),
    [("runs/none", "runs/none does not exist"), ("runs", "runs is not a run folder: it has no run.json"),
     ("s3://bucket/run", "a run to watch must be a local path")],
)  # fmt: skip
def test_what_is_no_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    result = CliRunner().invoke(cli, ["watch", path])
    assert result.exit_code == 1
    assert what in result.output
    assert "remedy: " in result.output


def test_a_port_that_is_in_use_is_an_error(like: Run, tmp_path: Path) -> None:
    with PageServer({}, 0) as server:
        run = write(tmp_path / "run", like, [])
        result = CliRunner().invoke(cli, ["watch", run, "--port", str(server.port)])
    assert result.exit_code == 1
    assert f"Error: port {server.port} of 127.0.0.1 is in use\n  remedy: give another --port" in result.output


@pytest.mark.parametrize("command", ["watch", "report"])
def test_torch_is_not_imported(like: Run, tmp_path: Path, command: str) -> None:
    run = write(tmp_path / "run", like, [train(10, loss=1.0)])
    out = ["--out", str(tmp_path / "page.html")] if command == "report" else []
    with Serving(command, run, *out, importtime=True) as served:
        _, imports = served.stop(signal.SIGINT)
    loaded = {line.rpartition("|")[2].strip() for line in imports.splitlines() if "|" in line}
    assert "dimefm.pages.run_reading" in loaded
    assert not loaded & HEAVY
