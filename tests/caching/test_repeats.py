"""Repeats are found part by part; the first of equal values is none."""

from __future__ import annotations

from array import array

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm.caching.repeats import as_array, hashes_of, repeats

values = st.lists(st.integers(-40, 40) | st.integers(-(2**63), 2**63 - 1), max_size=60)


@given(values)
def test_every_place_whose_value_came_before_is_found_once(numbers: list[int]) -> None:
    found = [int(place) for places in repeats(as_array(array("q", numbers))) for place in places]
    assert sorted(found) == [place for place, value in enumerate(numbers) if value in numbers[:place]]


@given(values, st.lists(st.booleans(), min_size=60, max_size=60))
def test_only_those_asked_about_count(numbers: list[int], among: list[bool]) -> None:
    asked = np.array(among[: len(numbers)], bool)
    found = [int(place) for places in repeats(as_array(array("q", numbers)), asked) for place in places]
    kept = [(place, value) for place, value in enumerate(numbers) if among[place]]
    assert sorted(found) == [p for i, (p, value) in enumerate(kept) if value in [v for _, v in kept[:i]]]


@pytest.mark.parametrize("numbers", [[], [7], [-1, -1, -1]])
def test_few_values(numbers: list[int]) -> None:
    assert sum(len(places) for places in repeats(as_array(array("q", numbers)))) == max(0, len(numbers) - 1)


def test_hashes_tell_strings_apart_and_are_the_same_wherever_they_are_made() -> None:
    """Whatever stands before and behind a string in its buffer, and in whichever process: the numbers are fixed."""
    strings = ["", "a", "ab", "a\0", "\0", "eight___", "eight___9", "né", *(f"key-{n:06d}" for n in range(2000)), "a"]
    hashes = hashes_of(pa.chunked_array([strings[:3], strings[3:]])).tolist()
    assert len(set(hashes)) == len(set(strings)) == len(strings) - 1
    assert hashes[1] == hashes[-1] == 2561433631590116626
    assert (
        hashes
        == hashes_of(pa.chunked_array([pa.array(["before", *strings, "behind"]).slice(1, len(strings))])).tolist()
    )
    spread = np.bincount(np.array(hashes) & 15, minlength=16)
    assert spread.min() > 80  # of 125
    assert not len(hashes_of(pa.chunked_array([], pa.string())))
