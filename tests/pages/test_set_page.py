"""Pages of labelled sets, in a browser."""

import io
from pathlib import Path

import numpy as np
import pytest

from dimefm.pages import set_page
from dimefm.pages.report import report
from tests.making import make_jpeg, read_tar, write_tar
from tests.pages.browser import Browser

HOSTILE = "<script>document.title=1</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"


def opened(browser: Browser, folder: Path, place: Path | str) -> None:
    browser.open(Path(report([str(place)], str(folder / "page.html"))))


def rows(browser: Browser) -> list[list[str]]:
    return [[cell.text for cell in row.find_elements("css selector", "td")] for row in browser.all("tbody tr")]


def test_classes_are_counted_and_have_pictures(browser: Browser, cifar10: str, tmp_path: Path) -> None:
    opened(browser, tmp_path, cifar10)

    members = read_tar(Path(cifar10) / "test-00000.tar", 400)
    labels = [int(data) for name, data in members.items() if name.endswith(".cls")]
    names = (Path(cifar10) / "classnames.txt").read_text().splitlines()
    counts = [labels.count(place) for place in range(10)]
    assert rows(browser) == [[name, f"{count} ({count / 200:.1%})"] for name, count in zip(names, counts, strict=True)]
    cards = [one.split("\n") for one in browser.texts(".gallery li")]
    assert [name for name, _ in cards] == [name for name in names for _ in range(3)]
    of_key = {name.removesuffix(".cls"): int(data) for name, data in members.items() if name.endswith(".cls")}
    assert [names[of_key[key]] for _, key in cards] == [name for name, _ in cards]
    assert browser.widths(".gallery img") == [32] * 30


def test_hostile_classes_several_labels_and_a_broken_image(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_page, "_LISTED", 2)
    members = {}
    for key, flags in (("a", [1, 1, 0]), ("b", [0, 1, 0]), ("c", [0, 1, 0]), ("d", [1, 0, 0])):
        sink = io.BytesIO()
        np.save(sink, np.array(flags))
        members |= {f"{key}.jpg": b"no image" if key == "d" else make_jpeg(), f"{key}.npy": sink.getvalue()}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classnames.txt").write_text(f"{HOSTILE}\nmany\nnone\n")
    write_tar(tmp_path / "set" / "test-0.tar", members)
    opened(browser, tmp_path, tmp_path / "set")

    assert rows(browser) == [["many", "3 (75.0%)"], [HOSTILE, "2 (50.0%)"]]
    assert "the largest 2 of 3 classes" in browser.texts("figcaption")[0]
    assert browser.texts(".gallery li b") == [HOSTILE] * 2 + ["many"] * 3
    assert browser.widths(".gallery img") == [48] * 4
    (warning,) = browser.texts(".warning")
    assert warning.startswith("1 of 5 pictures cannot be shown")


def test_captions_take_the_place_of_classes(browser: Browser, tmp_path: Path) -> None:
    members = {f"{n}.{end}": data for n in range(3) for end, data in (("jpg", make_jpeg()), ("txt", HOSTILE.encode()))}
    write_tar(tmp_path / "set" / "test.tar", members)
    opened(browser, tmp_path, tmp_path / "set")

    assert browser.texts("h2") == ["set: labelled set", "set: test images"]
    assert browser.texts(".gallery li") == [f"{n}\n{HOSTILE}" for n in range(3)]
    assert browser.widths(".gallery img") == [48] * 3
    assert browser.all("table") == []
