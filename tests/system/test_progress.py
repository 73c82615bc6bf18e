"""One line of progress in all commands: rate and time left from steady work, on a terminal and in a log."""

import io
from collections.abc import Callable

import pytest

from dimefm.system import progress
from dimefm.system.progress import Progress


class Stream(io.StringIO):
    """Standard error, which may be a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """A clock that goes on only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Stream:
    stream = Stream(terminal=terminal)
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def encode(wait: Wait) -> None:
    """Forty seconds of start-up, then an image a second."""
    with Progress("encoding", 100, "image") as bar:
        wait(40)
        for done in range(10, 101, 10):
            bar.at(done)
            wait(10.5)


def test_a_log_has_a_line_every_ten_seconds_of_work_and_start_up_is_left_out(
    monkeypatch: pytest.MonkeyPatch, wait: Wait
) -> None:
    stream = shown(monkeypatch, terminal=False)
    encode(wait)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "encoding: 10 of 100 images (10%), time left: measuring"
    assert lines[1] == "encoding: 20 of 100 images (20%), one image in 1.1 s, 1m24s left"
    assert lines[-1] == "encoding: 100 of 100 images (100%), one image in 1.2 s, took 2m25s"
    assert len(lines) == 11


def test_a_terminal_shows_the_same_in_one_line_that_ends_once(monkeypatch: pytest.MonkeyPatch, wait: Wait) -> None:
    stream = shown(monkeypatch, terminal=True)
    encode(wait)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    lines = [line.strip() for line in text.split("\r")]
    assert lines[1] == "encoding: 0 of 100 images (0%), time left: measuring"
    assert "encoding: 20 of 100 images (20%), one image in 1.1 s, 1m24s left" in lines
    assert lines[-1] == "encoding: 100 of 100 images (100%), one image in 1.2 s, took 2m25s"


def test_the_rate_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch, wait: Wait) -> None:
    stream = shown(monkeypatch, terminal=False)
    with Progress("encoding", 100_000, "image") as bar:
        for minute in range(1, 60):
            for second in range(60):
                wait(1)
                bar.at(60 * minute + second if minute < 50 else 3000 + 600 * (minute - 50) + 10 * second)
    lines = stream.getvalue().splitlines()
    assert "1.0 images/s" in lines[200]
    assert ", 10.0 images/s, " in lines[-2]


def test_an_error_ends_the_line_of_a_terminal_and_says_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, ends in ((True, "\n"), (False, "")):
        stream = shown(monkeypatch, terminal=terminal)
        with pytest.raises(KeyError), Progress("indexing", 2, "text"):
            raise KeyError
        assert stream.getvalue().endswith(ends)
        assert "took" not in stream.getvalue()


def test_notes_and_work_within_other_work_leave_nothing_of_a_longer_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown(monkeypatch, terminal=True)
    with Progress("training", 1000, "step") as outer:
        with Progress("to", 1, "text") as inner:
            inner.at(1)
        outer.note("x")
    longest = 0
    for line in stream.getvalue().split("\r")[1:]:
        assert len(line.rstrip("\n")) >= longest
        longest = 0 if line.endswith("\n") else len(line.rstrip())
    assert "training: 0 of 1,000: x" in stream.getvalue()


def test_one_image_is_no_plural_and_a_terminal_line_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown(monkeypatch, terminal=True)
    monkeypatch.setattr(progress, "_columns", lambda: 40)
    with Progress("encoding", 1, "image") as bar:
        bar.at(1)
    first, last = stream.getvalue().split("\r")[1:]
    assert len(first) == 39
    assert last.rstrip() == "encoding: 1 of 1 image (100%), took 0s"


def test_names_that_others_gave_cannot_write_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown(monkeypatch, terminal=False)
    with Progress("a\x1b[2Jb", 1, "image") as bar:
        bar.note("c\x1bd")
    assert "\x1b" not in stream.getvalue()
