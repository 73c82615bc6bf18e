"""Tables for people to read."""

from dimefm.system.markdown_table import markdown_table

ROWS = [("stage", "seconds"), ("retrieve", "4")]


def test_columns_of_numbers_are_aligned_right() -> None:
    assert markdown_table(ROWS, align="lr") == ["| stage | seconds |", "| --- | ---: |", "| retrieve | 4 |"]


def test_padded_columns_are_equally_wide() -> None:
    wanted = ["| stage    | seconds |", "| -------- | ------- |", "| retrieve | 4       |"]
    assert markdown_table(ROWS, padded=True) == wanted
