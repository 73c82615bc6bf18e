"""Counts with their nouns, rates, and lines of 80 characters."""

from __future__ import annotations

import pytest

from dimefm.system.wording import counted, hanging, rate, three_digits


def test_a_count_of_one_has_a_noun_in_the_singular() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2462)] == ["0 shards", "1 shard", "2,462 shards"]
    assert [counted(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]


@pytest.mark.parametrize(
    ("count", "seconds", "shown"),
    [
        (8120, 10, "812 images/s"),
        (34, 10, "3.4 images/s"),
        (1, 12.5, "one image in 12.5 s"),
        (0, 3, "no image"),
        (4, 0, "4,000,000,000 images/s"),
    ],
)
def test_a_slow_rate_is_not_shown_as_nothing(count: int, seconds: float, shown: str) -> None:
    assert rate(count, seconds, "image") == shown


def test_lines_are_broken_between_words() -> None:
    path = "/a/folder" * 12
    shown = hanging("  texts  ", f"{'of two words ' * 9}and {path}").splitlines()
    assert [len(line) <= 80 for line in shown] == [True, True, False]
    assert all(line.startswith(" " * 9) for line in shown[1:])
    assert shown[-1].strip() == path
    assert hanging("a  ", "") == "a  "


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01954, "0.0195"), (4.05, "4.05"), (70.24, "70.2"), (99.97, "100"), (10_000, "10,000"), (2.4e-5, "0.000024")],
)
def test_three_digits_are_no_power_of_ten(value: float, text: str) -> None:
    assert three_digits(value) == text
