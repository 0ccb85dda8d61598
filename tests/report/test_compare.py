"""Evaluations side by side claim no more than their intervals."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfr_cli.errors import MismatchError
from rlfr_cli.report.compare import Evaluation, compare


def evaluation(name: str, shares: list[float]) -> Evaluation:
    return Evaluation(name, Path(name), {str(i): share for i, share in enumerate(shares)}, 4)


def test_accuracy_is_the_mean_over_problems_in_percent() -> None:
    result = compare([evaluation("base", [0.0, 0.25, 0.5, 1.0])])
    assert result["accuracies"][0]["avg@4"] == "43.8"
    assert result["differences"] == []


def test_a_difference_has_the_sign_of_later_less_earlier() -> None:
    low, high = [0.0, 0.25] * 20, [0.75, 1.0] * 20
    gain = compare([evaluation("base", low), evaluation("trained", high)])["differences"][0]
    assert gain["difference"] == "trained - base"
    assert gain["points"] == "+75.0"
    assert gain["this run shows"] == "a gain"
    loss = compare([evaluation("base", high), evaluation("trained", low)])["differences"][0]
    assert loss["points"] == "-75.0"
    assert loss["this run shows"] == "a loss"


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    first, second = [0.0, 1.0] * 10, [1.0, 0.0] * 10
    row = compare([evaluation("a", first), evaluation("b", second)])["differences"][0]
    assert row["this run shows"] == "no difference"


def test_evaluations_of_other_problems_are_refused() -> None:
    with pytest.raises(MismatchError, match="different problems"):
        compare([evaluation("a", [0.0]), evaluation("b", [0.0, 1.0])])
