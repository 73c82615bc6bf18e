"""Pages in a real browser: what they show, what can be done in them, and that nothing in them is more than text."""

from pathlib import Path

import pytest

from dimefm.pages.charts import Bar, Line, bar_chart, histogram, line_chart, point_map, scatter_chart, shade_chart
from dimefm.pages.page import Block, Card, Cell, Chart, Dot, Facts, Gallery, Page, Section, Table, Words, render
from tests.pages.browser import Browser

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e\x1b[31m{{ 7*7 }}</title>--><svg/onload=alert(3)>"
)
INERT = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")


def charts(name: str) -> list[Chart]:
    """A chart of each kind, with a name in each place that takes one."""
    bars = [Bar(0.5, name, (0.4, 0.6)), None]
    return [
        line_chart(name, [Line(name, [(1, 1.0), (2, 0.5), (3, 0.2)]), Line("other", [(1, 2.0), (3, 0.1)])], name, name),
        histogram(name, [0, 1, 2], [(name, [3, 4]), ("other", [1, 0])], name, name, note=name),
        bar_chart(name, [name, "b"], [(name, bars), ("other", bars)], name),
        point_map(name, [Dot(0, 0, name), Dot(1, 1, "second", 1)], [name, "other"]),
        scatter_chart(name, [(name, 1, 2), ("b", 2, 3)], name, name, joined=True),
        shade_chart(name, [name, "b"], [name, "b"], [[1, 0], [0.5, 0.5]], name, name),
    ]


def page(*blocks: Block, name: str = "page") -> Page:
    return Page(name, name, [Section(name, blocks)])


def write(folder: Path, made: Page) -> Path:
    path = folder / "page.html"
    path.write_text(render(made), encoding="utf-8")
    return path


def test_hostile_names_are_text_wherever_they_stand(browser: Browser, tmp_path: Path) -> None:
    blocks = [
        Words(HOSTILE, warning=True),
        Facts([(HOSTILE, HOSTILE)]),
        Table((HOSTILE, "n"), [(HOSTILE, Cell(HOSTILE, 1.0, share=0.5))], "lr", HOSTILE),
        Gallery([Card(None, HOSTILE, [HOSTILE])], HOSTILE),
        *charts(HOSTILE),
    ]
    browser.open(write(tmp_path, page(*blocks, name=HOSTILE)))

    assert browser.driver.title == INERT
    assert browser.texts("h1, h2, dt, dd, td:first-child, .warning, li b") == [INERT] * 7
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.querySelectorAll('[onerror], [onload], img:not([src^=data])').length") == 0


def test_a_script_that_got_in_would_not_run(browser: Browser, tmp_path: Path) -> None:
    path = write(tmp_path, page(Words("here")))
    path.write_text(path.read_text().replace("here", "<script>document.title = 'run'</script><img src=x onerror=1>"))
    browser.open(path)

    refused = browser.errors()
    assert browser.driver.title == "page"
    assert any("Content Security Policy" in one["message"] for one in refused)


def test_every_kind_of_chart_is_drawn_within_its_frame(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(tmp_path, page(*charts("name"))))

    shapes = """return [...document.querySelectorAll('.drawing svg')].map(
        svg => svg.querySelectorAll('rect, circle, polyline').length)"""
    assert browser.run(shapes) == [7, 3, 2, 2, 3, 4]
    outside = """return [...document.querySelectorAll('.drawing svg')].filter(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('rect, circle, polyline')].some(part => {
            const box = part.getBoundingClientRect();
            return box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2;
        });
    }).length"""
    assert browser.run(outside) == 0


def test_tables_are_sorted_by_numbers_and_by_words(browser: Browser, tmp_path: Path) -> None:
    rows = [("b", Cell("1,000", 1000.0)), ("a", Cell("20", 20.0)), ("c", Cell("3.5 %", 3.5))]
    browser.open(write(tmp_path, page(Table(("name", "count"), rows, "lr"))))
    name, count = browser.all("th button")

    count.click()
    assert browser.texts("td:first-child") == ["c", "a", "b"]
    count.click()
    assert browser.texts("td:first-child") == ["b", "a", "c"]
    assert browser.run("return document.querySelector('th[aria-sort]').ariaSort") == "descending"
    browser.press(name, "ENTER")
    assert browser.texts("td:first-child") == ["a", "b", "c"]


def test_filters_leave_the_rows_that_have_all_words(browser: Browser, tmp_path: Path) -> None:
    table = Table(("n", "word"), [(str(n), "odd" if n % 2 else "even") for n in range(20)], "rl")
    gallery = Gallery([Card(None, f"picture {n}", ["odd" if n % 2 else "even"]) for n in range(20)])
    browser.open(write(tmp_path, page(table, gallery)))

    browser.type(".table input", "Even 1")
    assert browser.texts("td:first-child") == ["10", "12", "14", "16", "18"]
    assert browser.texts(".table output") == ["5 of 20"]
    assert len(browser.all(".gallery li")) == 20
    browser.type(".gallery input", "picture 17")
    assert browser.texts(".gallery li b") == ["picture 17"]


def test_the_keyboard_reads_charts_and_maps(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(tmp_path, page(*charts("name"))))
    drawing = browser.one(".drawing[aria-label^='name: name over']")

    browser.press(drawing, "ARROW_RIGHT")
    browser.press(drawing, "ARROW_RIGHT")
    assert browser.texts(".readout")[0] == "name 2: name 0.5"
    dots = browser.one(".map .drawing")
    browser.press(dots, "ARROW_RIGHT")
    assert browser.texts("#tip") == ["name"]
    browser.press(dots, "ARROW_RIGHT")
    assert browser.texts("#tip") == ["second"]
    browser.press(dots, "ESCAPE")
    assert browser.texts("#tip") == []


@pytest.mark.parametrize("width", [500, 1200])
def test_no_page_is_wider_than_its_window(browser: Browser, tmp_path: Path, width: int) -> None:
    long = "x" * 300
    table = Table((long, "n"), [(long, "1")] * 3, "lr", long)
    browser.resize(width)
    browser.open(write(tmp_path, page(Facts([(long[:30], long)]), table, *charts(long), name=long)))

    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.resize(1200)


def test_text_stands_out_from_the_page_in_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(tmp_path, page(Words("here"))))
    colours = "const s = getComputedStyle(document.documentElement); return [s.backgroundColor, s.color]"
    found = {}
    for theme in ("light", "dark"):
        feature = [{"name": "prefers-color-scheme", "value": theme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        found[theme] = browser.run(colours)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    assert found == {
        "light": ["rgb(255, 255, 255)", "rgb(28, 36, 48)"],
        "dark": ["rgb(20, 24, 31)", "rgb(230, 234, 240)"],
    }
