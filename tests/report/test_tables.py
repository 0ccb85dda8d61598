"""Numbers, durations and tables as people read them."""

from __future__ import annotations

import pytest

from rlfr_cli.report.tables import format_duration, format_value, summary_lines, text_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (12345, "12,345"),
        (0.000123456, "0.0001235"),
        (123456.7, "123,457"),
        (float("nan"), "nan"),
        ([0.25, 0.5], "0.25, 0.5"),
        ([], "-"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (187, "3 min 7 s"), (7500, "2 h 5 min"), (100800, "1 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_numbers_sit_right_and_words_left() -> None:
    rows = [{"name": "a", "loss": 0.5}, {"name": "longer", "loss": 12.25, "note": "x"}]
    assert text_table(rows) == [
        "name     loss  note",
        "a         0.5  -",
        "longer  12.25  x",
    ]
    assert text_table(rows, ["loss"]) == [" loss", "  0.5", "12.25"]
    assert text_table([], ["loss"]) == ["loss"]


def test_summaries_are_flat_and_aligned() -> None:
    summary = {"out": "runs", "flow": {"loss": 0.5}, "layers": [{"layer": 7}]}
    assert summary_lines(summary) == ["out        runs", "flow/loss  0.5", "", "layers", "  layer", "      7"]


def test_an_estimate_is_one_line_with_its_interval() -> None:
    estimate = {"value": 0.631, "low": 0.5731, "high": 0.69, "count": 44}
    assert summary_lines({"auc": estimate}) == ["auc  0.631 (0.5731 to 0.69, n = 44)"]


def test_an_estimate_that_the_data_cannot_give_is_a_dash() -> None:
    assert summary_lines({"auc": {"value": None, "low": None, "high": None, "count": 0}}) == ["auc  -"]
