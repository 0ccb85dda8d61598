"""The rules of the answer: what an interval means, what two of them allow to say, and the paragraph that says it."""

from __future__ import annotations

from typing import Any

import pytest

from rlfr_cli.report.diagnosis import PARTIAL
from rlfr_cli.report.diagnosis_words import NAMES, answer, conclude, side

ABOVE, BELOW, CHANCE, WIDE = (0.7, 0.6, 0.8), (0.3, 0.2, 0.4), (0.5, 0.48, 0.52), (0.6, 0.4, 0.8)
MEASURES = [name for name in NAMES if name != PARTIAL]


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


# The paragraph


def results_of(
    score: tuple[float, float, float] = ABOVE,
    beyond: tuple[float, float, float] = ABOVE,
    problems: int = 40,
    **facts: Any,
) -> dict[str, Any]:
    """Results with this area of the score and this one less all controls, for responses and for tokens alike."""
    areas = dict.fromkeys(MEASURES, CHANCE) | {
        "negative_logprob": (0.65, 0.6, 0.7),
        "score": score,
        PARTIAL: beyond,
    }
    better = {"value": 0.05, "low": 0.01, "high": 0.09, "problems": problems}
    values: dict[str, Any] = {
        "both_classes": True,
        "why_one_class": None,
        "separation": {
            "rows": [
                {"measure": name, "within_problems": v, "within_low": lo, "within_high": hi, "problems": problems}
                for name, (v, lo, hi) in areas.items()
            ],
            "best_control": "negative_logprob",
            "above_best_control": better,
            "above_shuffled_context": better,
        },
        "first_wrong_token": {
            "rows": [
                {"measure": name, "auc": v, "low": lo, "high": hi, "problems": problems}
                for name, (v, lo, hi) in areas.items()
                if name != "length"
            ],
            "compared": 123,
            "best_control": "negative_logprob",
            "above_best_control": better,
        },
        "flow_reward": {
            "wrong_less_correct_within_problems": {"value": -0.02, "low": -0.03, "high": -0.01, "problems": problems}
        },
        "velocity_error": {"verdict": "the flow beats the Gaussian"},
        "token_identity": {"cross_validated": 0.25},
        "noise_agreement": {"rows": [{"draws": 1, "spearman": 0.8}], "draws_needed": 5},
    }
    return values | facts


@pytest.mark.parametrize(
    ("score", "beyond", "expected"),
    [
        (ABOVE, ABOVE, "yes"),
        (ABOVE, CHANCE, "no"),
        (BELOW, ABOVE, "no"),
        (ABOVE, WIDE, "cannot tell"),
        (WIDE, WIDE, "cannot tell"),
    ],
)
def test_the_paragraph_says_the_answer_and_both_areas(
    score: tuple[float, float, float], beyond: tuple[float, float, float], expected: str
) -> None:
    concluded = conclude(results_of(score, beyond))
    assert concluded["responses"] == concluded["first_wrong_tokens"] == expected
    words = concluded["in_words"]
    assert f"beyond simple quantities? {expected.capitalize()}." in words
    assert f"first wrong token beyond them? {expected.capitalize()}." in words
    for area in (score, beyond):
        assert words.count("{:.3f} ({:.3f} to {:.3f})".format(*area)) >= 2
    assert "for 123 first wrong tokens" in words
    assert ("the wrong way round" in words) == (score == BELOW)
    assert ("no more than chance" in words) == (beyond == CHANCE)
    assert ("which may be chance" in words) == (WIDE in (score, beyond))


def test_the_best_control_and_the_shuffled_context_are_named_with_the_difference() -> None:
    results = results_of()
    words = conclude(results)["in_words"]
    assert "separates most is negative log-probability, 0.650" in words
    assert words.count("better by 0.050 (0.010 to 0.090)") == 2
    assert "with the true one the area is larger by 0.050 (0.010 to 0.090)" in words
    worse = {"value": -0.05, "low": -0.09, "high": -0.01, "problems": 40}
    results["separation"] |= {"above_best_control": worse}
    assert "the score is worse by 0.050 (0.010 to 0.090)" in conclude(results)["in_words"]
    results["separation"] |= {"above_best_control": {**worse, "high": 0.02}}
    assert "not shown to be better or worse (-0.050, -0.090 to +0.020)" in conclude(results)["in_words"]
    results["separation"] |= {"above_best_control": {**worse, "problems": 9}}
    assert "not known to be better or worse" in conclude(results)["in_words"]


def test_the_number_of_problems_is_said_and_whether_it_is_too_small() -> None:
    assert "Of the problems, 40 have both wrong and correct responses: there" in conclude(results_of())["in_words"]
    few = conclude(results_of(problems=2))
    assert few["responses"] == "cannot tell"
    assert "Cannot tell. Of the problems, only 2 have both wrong and correct responses, too few" in few["in_words"]
    assert "only 1 has both" in conclude(results_of(problems=1))["in_words"]


def test_a_context_that_lowers_the_area_is_said_to_without_calling_it_worse() -> None:
    results = results_of()
    results["separation"] |= {"above_shuffled_context": {"value": -0.05, "low": -0.09, "high": -0.01, "problems": 40}}
    assert "with the true one the area is smaller by 0.050 (0.010 to 0.090)" in conclude(results)["in_words"]


def test_a_control_that_falls_where_responses_are_wrong_is_also_given_as_it_is_compared() -> None:
    results = results_of()
    assert "turned round" not in conclude(results)["in_words"]
    for part, keys in (
        ("separation", ("within_problems", "within_low", "within_high")),
        ("first_wrong_token", ("auc", "low", "high")),
    ):
        row = next(row for row in results[part]["rows"] if row["measure"] == "negative_logprob")
        row |= dict(zip(keys, (0.3, 0.2, 0.4), strict=True))
    assert conclude(results)["in_words"].count("0.300 (0.200 to 0.400), turned round 0.700: the score is") == 2


@pytest.mark.parametrize(
    ("low", "high", "meaning"),
    [
        (-0.03, -0.01, "wrong responses are penalised more"),
        (0.01, 0.03, "wrong responses are penalised LESS than correct ones"),
        (-0.03, 0.01, "neither kind is seen to be penalised more"),
    ],
)
def test_the_reward_is_read_by_its_sign(low: float, high: float, meaning: str) -> None:
    difference = {"value": (low + high) / 2, "low": low, "high": high, "problems": 40}
    words = conclude(results_of(flow_reward={"wrong_less_correct_within_problems": difference}))["in_words"]
    assert f"is {(low + high) / 2:+.4f} ({low:+.4f} to {high:+.4f}): {meaning}." in words


def test_without_both_classes_or_a_located_token_the_reason_is_said() -> None:
    nothing = {"rows": [], "compared": 0, "best_control": None, "above_best_control": {}}
    concluded = conclude(
        results_of(both_classes=False, why_one_class="every graded response is wrong", first_wrong_token=nothing)
    )
    assert concluded["first_wrong_tokens"] == "cannot tell"
    assert "Cannot tell: every graded response is wrong." in concluded["in_words"]
    assert "Cannot tell: no first wrong token could be located." in concluded["in_words"]


def test_random_latents_that_separate_cast_doubt() -> None:
    results = results_of()
    assert "Random latents" not in conclude(results)["in_words"]
    row = next(row for row in results["separation"]["rows"] if row["measure"] == "random_latents")
    row |= {"within_problems": 0.6, "within_low": 0.55, "within_high": 0.65}
    assert "Random latents separate too, 0.600" in conclude(results)["in_words"]


def test_what_the_score_is_made_of_is_said() -> None:
    words = conclude(results_of())["in_words"]
    assert "The flow beats the Gaussian." in words
    assert "Token identity alone explains 25% of the variance of token scores." in words
    assert "with a correlation of 0.80; about 5 draws would reach 0.95." in words
    enough = {"rows": [{"draws": 1, "spearman": 0.97}], "draws_needed": 1}
    assert conclude(results_of(noise_agreement=enough))["in_words"].endswith("with a correlation of 0.97.")
    nothing = conclude(results_of(token_identity={"cross_validated": -0.1}))["in_words"]
    assert "Token identity alone explains 0%" in nothing
