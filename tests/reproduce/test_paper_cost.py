"""The forecast of the paper's job: floors by arithmetic, or what a GPU was measured to do."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache_schemas import SchemaError, to_plain
from cache_schemas.rates import MeasuredRates
from dimefm.reproduce.paper_cost import paper_cost_table
from dimefm.reproduce.stages import main
from dimefm.system import gpu_rates
from dimefm.system.gpu_rates import measured_rates, read_rates

RATES = MeasuredRates(
    card="NVIDIA H100 80GB HBM3",
    date="2026-01-02",
    command="python -m benchmarks gpu --out results",
    teacher_images_per_second=4000.0,
    teacher_texts_per_second=80_000.0,
    exact_scores_per_second=2e11,
    student_images_per_second=20_000.0,
    online_student_images_per_second=3000.0,
)


def hours(text: str) -> dict[str, tuple[float, str]]:
    """GPU hours of each stage, and what they are by."""
    lines = [line for line in text.splitlines() if line.startswith(("cache-", "retrieve", "train-"))]
    pattern = r"(\S+) .* (\d+\.\d\d)  (arithmetic|measurement)"
    found = [re.match(pattern, line) for line in lines]
    return {match[1]: (float(match[2]), match[3]) for match in found if match}


def test_without_a_measurement_hours_are_floors() -> None:
    text = paper_cost_table((), (), None)
    found = hours(text)
    assert {by for _, by in found.values()} == {"arithmetic"}
    assert found["cache-images"][0] == pytest.approx(40e6 * 162e9 / 788e12 / 3600, abs=0.01)
    # Each score costs a product of the width, and is written and read once.
    exact = 40e6 * 28.4e6 * (2 * 768 / 788e12 + 8 / 4.3e12) / 3600
    assert found["retrieve,"][0] == pytest.approx(exact, abs=0.01)
    assert "floors by arithmetic at 788 TFLOP/s" in text
    assert "measured on" not in text


def test_with_one_hours_are_its_and_the_card_and_command_are_named() -> None:
    text = paper_cost_table((), (), RATES)
    expected = {
        "cache-images": 40e6 / 4000, "cache-texts": 28.4e6 / 80_000,
        "retrieve,": 40e6 * 28.4e6 / 2e11, "train-student": 4e9 / 20_000,
    }  # fmt: skip
    assert hours(text) == {name: (round(seconds / 3600, 2), "measurement") for name, seconds in expected.items()}
    assert "online instead of cached: 370 GPU hours against 58" in text
    assert "measured on one NVIDIA H100 80GB HBM3, 2026-01-02, by: python -m benchmarks gpu --out results" in text
    assert "floors" not in text


def test_what_was_not_measured_stays_a_floor() -> None:
    text = paper_cost_table((), (), dataclasses.replace(RATES, exact_scores_per_second=None))
    assert [by for _, by in hours(text).values()] == ["measurement", "measurement", "arithmetic", "measurement"]
    assert "other GPU hours are floors" in text
    assert "measured on one NVIDIA H100" in text


def test_rates_are_read_from_a_file_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rates.resources, "files", lambda package: tmp_path)
    assert measured_rates() is None
    (tmp_path / "measured.json").write_text(json.dumps(to_plain(RATES)))
    assert measured_rates() == RATES
    result = CliRunner().invoke(main, ["--scale", "paper", "--dry-run"])
    assert "measured on one NVIDIA H100 80GB HBM3" in result.output
    (tmp_path / "measured.json").write_text("{}")
    result = CliRunner().invoke(main, ["--scale", "paper", "--dry-run"])
    assert result.exit_code == 1
    assert f"{tmp_path / 'measured.json'} is not a valid MeasuredRates document:\n  - card: missing" in result.output


def test_the_rates_that_come_with_the_package_are_valid() -> None:
    measured_rates()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"card": None}, "card: expected a string, found None"),
        ({"command": " "}, "command: is empty"),
        ({"teacher_images_per_second": 0}, "teacher_images_per_second: expected a rate above 0, found 0"),
        ({"exact_scores_per_second": float("nan")}, "exact_scores_per_second: expected a rate above 0, found nan"),
        ({"student_images_per_second": "fast"}, "student_images_per_second: expected a number"),
        ({"texts_per_second": 1.0}, "texts_per_second: unknown field"),
    ],
)
def test_rates_that_are_none_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_rates(json.dumps({**to_plain(RATES), **change}), "measured.json")
    assert problem in str(caught.value)


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"measured.json is not a valid MeasuredRates(?s:.*)not JSON"):
        read_rates("{", "measured.json")
