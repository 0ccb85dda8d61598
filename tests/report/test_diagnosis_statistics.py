"""Each statistic of a diagnosis on numbers worked out by hand, and on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlfr_cli.grading.statistics import within_problem_auc
from rlfr_cli.report.diagnosis_statistics import (
    MatchedAuc,
    clustered_spearman,
    draw_agreement,
    draws_needed,
    identity_share,
    jaccard,
    means_elsewhere,
    partial_auc,
    residuals,
    spearman,
)


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)  # 1 - 6 × 2 / (4 × 15)
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 1, 5]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [1]))


def test_clustered_spearman_is_spearman_with_an_interval_around_it() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=300)
    y = -x + generator.normal(size=300)
    estimate = clustered_spearman(x, y, np.arange(300) // 10, seed=0)
    assert estimate.value == pytest.approx(spearman(x, y))
    assert estimate.low < estimate.value < estimate.high < -0.5
    assert estimate.count == 30
    assert clustered_spearman(x, np.ones(300), np.arange(300), seed=0).value is None


def test_an_interval_over_clusters_is_wider_than_over_tokens_where_these_are_copies() -> None:
    generator = np.random.default_rng(0)
    x, y = np.repeat(generator.normal(size=(2, 20)), 10, axis=1)
    clusters = np.repeat(np.arange(20), 10)
    wide = clustered_spearman(x, y, clusters, seed=0)
    narrow = clustered_spearman(x, y, np.arange(200), seed=0)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_token_identity_alone_uses_other_responses_only() -> None:
    scores = np.array([1.0, 5.0, 2.0, 7.0, 4.0])
    token_ids = np.array([8, 8, 8, 9, 8])
    responses = np.array([0, 0, 1, 1, 2])
    # Token 8: response 0 sees 2 and 4, response 1 sees 1, 5 and 4, response 2 sees 1, 5 and 2. Token 9 is in response
    # 1 alone, and gets the mean of the others' tokens 1, 5 and 4.
    np.testing.assert_allclose(means_elsewhere(scores, token_ids, responses), [3, 3, 10 / 3, 10 / 3, 8 / 3])


def test_variance_explained_by_identity_by_hand() -> None:
    scores = np.array([1.0, 3.0, 5.0, 7.0])
    share = identity_share(scores, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    # R² = 1 - 4 / 20; adjusted 1 - 0.2 × 3 / 2. Guesses elsewhere are 3, 1, 7, 5 (errors 16); means elsewhere are
    # 5, 3, 5, 3 (errors 16, 0, 0, 16).
    assert share == {"adjusted": pytest.approx(0.7), "cross_validated": pytest.approx(0.5), "identities": 2}


def test_identities_that_mean_nothing_explain_nothing() -> None:
    generator = np.random.default_rng(0)
    token_ids, responses = generator.integers(200, size=1000), np.arange(1000) // 20
    share = identity_share(generator.normal(size=1000), token_ids, responses)
    assert abs(share["adjusted"]) < 0.05  # 200 identities of 1,000 tokens: R² itself is 0.2
    assert share["cross_validated"] < 0
    assert identity_share(np.ones(4), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))["adjusted"] is None


def test_residuals_by_hand() -> None:
    control = np.array([[0.0], [2.0], [10.0], [12.0]])
    values = np.array([1.0, 5.0, 3.0, 7.0])  # slope 2 within each group
    np.testing.assert_allclose(residuals(values, control, ["a", "a", "b", "b"]), 0, atol=1e-12)
    np.testing.assert_allclose(
        residuals(np.array([1.0, 5.0, 7.0, 3.0]), control, ["a", "a", "b", "b"]), [-2, 2, 2, -2], atol=1e-12
    )


def problems_of(seed: int, num_problems: int = 60) -> tuple[np.ndarray, ...]:
    """Noise, a control that makes responses wrong, labels, and problems of eight responses."""
    generator = np.random.default_rng(seed)
    problem_ids = np.repeat(np.arange(num_problems), 8)
    control, noise = generator.normal(size=(2, len(problem_ids)))
    wrong = control + 0.5 * generator.normal(size=len(problem_ids)) > 0
    return noise, control, wrong, problem_ids


def test_partial_auc_of_a_score_that_is_its_control_and_noise_is_chance() -> None:
    noise, control, wrong, problem_ids = problems_of(3)
    score = control + 0.3 * noise
    assert within_problem_auc(score, wrong, problem_ids.tolist(), seed=0).low > 0.8
    estimate = partial_auc(score, control[:, None], wrong, problem_ids, seed=0)
    assert estimate.low < 0.5 < estimate.high
    assert estimate.count > 50


def test_partial_auc_finds_what_is_beyond_the_controls_and_its_sign() -> None:
    noise, control, wrong, problem_ids = problems_of(1)
    useless = noise[:, None]
    for sign in (1, -1):
        estimate = partial_auc(sign * control + noise, useless, wrong, problem_ids, seed=0)
        raw = within_problem_auc(sign * control, wrong, problem_ids.tolist(), seed=0)
        assert estimate.value == pytest.approx(raw.value, abs=0.02)
        assert (estimate.low > 0.5) == (sign > 0)
        assert (estimate.high < 0.5) == (sign < 0)


def test_partial_auc_of_controls_that_are_constant_is_the_plain_one() -> None:
    noise, control, wrong, problem_ids = problems_of(2)
    by_problem = 1e3 + 1.7 * problem_ids[:, None]
    estimate = partial_auc(control + noise, by_problem, wrong, problem_ids, seed=0)
    plain = within_problem_auc(control + noise, wrong, problem_ids.tolist(), seed=0)
    assert (estimate.value, estimate.count) == (pytest.approx(plain.value), plain.count)


def test_partial_auc_needs_a_problem_with_both_classes() -> None:
    estimate = partial_auc(np.arange(4.0), np.zeros((4, 1)), np.array([1, 1, 0, 0]), ["a", "a", "b", "b"], seed=0)
    assert (estimate.value, estimate.count) == (None, 0)


def test_matched_auc_compares_within_a_place_and_counts_each_positive_once() -> None:
    scores = np.array([5.0, 1.0, 9.0, 4.0, 0.0, 8.0, 3.0])
    positive = np.array([True, False, False, True, False, False, True])
    places = ["a", "a", "a", "b", "b", "b", "c"]
    # 5 beats 1 of 1 and 9; 4 beats 0 of 0 and 8; 3 has nothing to be compared with.
    matched = MatchedAuc(positive, places, list("pqrpqrp"), seed=0)
    assert matched.area(scores).value == pytest.approx(0.5)
    assert matched.num_positives == 2
    assert matched.tokens.tolist() == [True] * 6 + [False]
    scores[0] = 10.0
    assert matched.area(scores).value == pytest.approx(0.75)
    assert matched.area(-scores).value == pytest.approx(0.25)
    assert matched.area(np.ones(7)).value == pytest.approx(0.5)


def test_matched_auc_of_a_place_with_more_negatives_weighs_no_more() -> None:
    scores = np.array([1.0, 0.0, 1.0, 2.0, 2.0, 2.0])
    positive = np.array([True, False, True, False, False, False])
    assert MatchedAuc(positive, list("aabbbb"), list("pqrstu"), seed=0).area(scores).value == pytest.approx(0.5)


def test_matched_auc_intervals_hold_the_value_and_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    positive = np.arange(400) % 4 == 0
    places, clusters = generator.integers(5, size=400).tolist(), (np.arange(400) // 10).tolist()
    scores = generator.normal(size=400) + positive
    matched = MatchedAuc(positive, places, clusters, seed=0)
    area = matched.area(scores)
    assert 0.5 < area.low < area.value < area.high < 0.9
    assert area.count == 40
    shifted = scores + 1e-9 * generator.normal(size=400)
    same = matched.difference(scores, shifted)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert matched.difference(scores, generator.normal(size=400)).low > 0
    assert MatchedAuc(np.zeros(400, dtype=bool), places, clusters, seed=0).area(scores).value is None


def test_agreement_of_draws_by_hand() -> None:
    first = np.array([[1.0, 1.0], [2.0, 4.0], [3.0, 0.0]])
    second = np.array([[1.0, 1.0], [3.0, 2.0], [2.0, 0.0]])
    rows = draw_agreement(first, second, lambda scores: scores == scores.max(), (1, 2))
    assert rows[0] == (pytest.approx(0.5), 0.0)  # 1, 2, 3 against 1, 3, 2; the best is another token
    assert rows[1] == (pytest.approx(spearman([1, 3, 1.5], [1, 2.5, 1])), 1.0)


def test_jaccard_by_hand() -> None:
    assert jaccard(np.array([True, True, False]), np.array([False, True, True])) == pytest.approx(1 / 3)
    assert math.isnan(jaccard(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)))


def test_draws_needed_by_hand() -> None:
    assert draws_needed(0.5, 1) == 19  # 0.95 × 0.5 / (0.5 × 0.05)
    assert draws_needed(0.95, 16) == 16
    assert draws_needed(0.8, 1) == 5  # 4.75
    assert draws_needed(0.99, 16) == 4  # 3.07
    assert draws_needed(1.0, 16) == 1
    assert draws_needed(0.0, 1) is None
    assert draws_needed(-0.2, 1) is None
