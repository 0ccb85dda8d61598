"""The rules of the answer: what an interval means, and what two of them allow to say."""

from __future__ import annotations

import pytest

from rlfr_cli.report.diagnosis_words import answer, side


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ((0.6, 0.51, 0.7, 40), "above"),
        ((0.4, 0.3, 0.49, 40), "below"),
        ((0.6, 0.5, 0.7, 40), "unclear"),  # touches chance
        ((0.5, 0.48, 0.52, 40), "none"),
        ((0.51, 0.48, 0.54, 40), "unclear"),  # reaches what might matter
        ((0.9, 0.8, 1.0, 9), "unclear"),  # too few problems
        ((None, None, None, 0), "unclear"),
        ((0.7, None, None, 40), "unclear"),
    ],
)
def test_side_of_an_interval(estimate: tuple[float, float, float, int], expected: str) -> None:
    assert side(*estimate) == expected


@pytest.mark.parametrize(
    ("score", "beyond", "expected"),
    [
        ("above", "above", "yes"),
        ("above", "unclear", "cannot tell"),
        ("unclear", "above", "cannot tell"),
        ("unclear", "unclear", "cannot tell"),
        ("above", "none", "no"),
        ("above", "below", "no"),
        ("below", "above", "no"),
        ("none", "unclear", "no"),
    ],
)
def test_the_answer_is_yes_only_if_both_intervals_are_above_chance(score: str, beyond: str, expected: str) -> None:
    assert answer(score, beyond) == expected
