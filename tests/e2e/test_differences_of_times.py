"""A benchmark that takes differences of times says where a busy machine left nothing to tell."""

from __future__ import annotations

from benchmarks.measure import excess
from benchmarks.processes import Usage
from benchmarks.stage1 import show, steady


def test_a_difference_counts_only_above_its_own_spread() -> None:
    assert excess([30.0, 32.0, 31.0], [10.0, 10.5, 11.0]) == 20.0
    assert excess([30.0, 90.0, 31.0], [29.0, 20.0, 80.0]) is None
    assert excess([10.0, 10.0, 10.0], [12.0, 12.0, 12.0]) is None
    assert excess([10.0], [10.0]) is None


def test_what_was_not_measured_is_no_rate() -> None:
    calm = [(Usage(10 + n, {"work": 5.0, "rest": 1.0}), Usage(30 + n, {"work": 25.0, "rest": 1.0})) for n in range(3)]
    wall, cpu, rest = steady(calm, 100)
    assert (wall, cpu, rest) == (0.2, 0.2, None)
    busy = [(Usage(60.0, {"work": 5.0}), Usage(30.0, {"work": 25.0})), calm[0]]
    assert steady(busy, 100)[0] is None
    assert show(None, "{:.2f}x".format) == "not measured"
    assert show(0.5, "{:.2f}x".format) == "0.50x"
