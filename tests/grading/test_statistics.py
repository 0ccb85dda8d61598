import itertools
import math

import numpy as np
import pytest

from rlfr_cli.grading.statistics import (
    auc_with_interval,
    majority_at_k,
    mean_with_interval,
    paired_difference,
    pass_at_k,
    student_t_quantile,
    wilson_interval,
    within_problem_auc,
)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    outcomes = [True, True, False, False, False, False]
    for k in range(1, 7):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_undefined(n, c, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_majority():
    assert majority_at_k(["1", "2", "2"], [True, False, False], 3) == 0.0
    assert majority_at_k(["1", "2", "2"], [False, True, True], 3) == 1.0
    # a tie goes to the first seen
    assert majority_at_k(["1", "2"], [True, False], 2) == 1.0
    # equal numbers and equal texts are one answer
    assert majority_at_k(["3", "7.0", "7"], [False, True, True], 3) == 1.0
    assert majority_at_k(["3", "x + 1", "x+1"], [False, True, True], 3) == 1.0
    # no answer, no vote
    assert majority_at_k([None, None, "7"], [False, False, True], 3) == 1.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    # blocks (1, 2) and (2, 2); the fifth sample is left out
    assert majority_at_k(["1", "2", "2", "2", "1"], [True, False, False, False, True], 2) == 0.5


def test_student_t_quantiles():
    """Printed tables."""
    table = {
        1: 12.706,
        2: 4.303,
        3: 3.182,
        4: 2.776,
        5: 2.571,
        10: 2.228,
        29: 2.045,
        100: 1.984,
        10**6: 1.960,
    }
    for degrees, quantile in table.items():
        assert student_t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_mean_with_interval_is_clustered_by_problem():
    # means 1, 0.5, 0: mean 0.5, s = 0.5, t(2) = 4.3027; cut to [0, 1]
    estimate = mean_with_interval([[1, 1, 1, 1], [1, 0], [0]])
    assert (estimate.value, estimate.low, estimate.high, estimate.count) == (0.5, 0.0, 1.0, 3)
    free = mean_with_interval([[1, 1, 1, 1], [1, 0], [0]], is_share=False)
    assert free.high == pytest.approx(0.5 + 4.30265 * 0.5 / math.sqrt(3), abs=1e-4)
    assert free.low == pytest.approx(0.5 - 4.30265 * 0.5 / math.sqrt(3), abs=1e-4)
    # more samples of the same problems say nothing new
    assert mean_with_interval([[0.2] * 9, [0.6] * 9, [0.4]]) == mean_with_interval([[0.2], [0.6], [0.4]])


def test_equal_means_do_not_claim_certainty():
    estimate = mean_with_interval([[1, 1]] * 10)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert mean_with_interval([[0]] * 10).high == pytest.approx(1 - estimate.low)
    assert mean_with_interval([[3.0]] * 4, is_share=False).low is None
    assert mean_with_interval([]).value is None


def test_wilson_by_hand():
    assert wilson_interval(0.5, 4) == pytest.approx((0.1500, 0.8500), abs=1e-4)


def test_paired_difference():
    estimate = paired_difference([[1], [1], [1, 0]], [[0], [1], [0, 0]])
    # differences 1, 0, 0.5
    assert estimate.value == 0.5
    assert estimate.low == pytest.approx(0.5 - 4.30265 * 0.5 / math.sqrt(3), abs=1e-4)
    assert paired_difference([[0], [1], [0, 0]], [[1], [1], [1, 0]]).value == -0.5
    same = paired_difference([[1], [0]] * 10, [[1], [0]] * 10)
    assert same.value == 0
    assert same.high == pytest.approx(1 - 0.05 ** (1 / 20))
    assert same.low == -same.high
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([[1]], [[1], [0]])


def test_auc_by_hand():
    # pairs won by the positives 3, 1: against 2 and 0: 2 + 1 of 4
    estimate = auc_with_interval([3, 1, 2, 0], [1, 1, 0, 0])
    assert estimate.value == 0.75
    # placements 1, 0.5 and 0.5, 1: variance (0.125 + 0.125) / 2
    assert estimate.low == pytest.approx(0.75 - 1.959964 * math.sqrt(0.125))
    assert estimate.high == 1.0
    assert auc_with_interval([-3, -1, -2, 0], [1, 1, 0, 0]).value == 0.25
    assert auc_with_interval([1, 1], [1, 0]).value == 0.5


def test_auc_where_little_is_known():
    assert auc_with_interval([1, 2], [1, 1]).value is None
    perfect = auc_with_interval([3, 2, 1, 0], [1, 1, 0, 0])
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(wilson_interval(1.0, 2)[0])


def test_auc_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    labels = np.arange(120) < 60
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1))
    estimates = [auc_with_interval(generator.normal(size=120) + labels, labels) for _ in range(400)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.91 < covered < 0.98


def test_within_problem_auc_is_blind_to_difficulty():
    # scores follow the problem alone: across problems they predict, within one they do not
    scores, labels = [9, 9, 9, 1, 1, 1], [1, 1, 0, 1, 0, 0]
    assert auc_with_interval(scores, labels).value > 0.6
    assert within_problem_auc(scores, labels, ["a"] * 3 + ["b"] * 3, seed=0).value == 0.5


def test_within_problem_auc():
    scores, labels, problems = [2, 1, 1, 2, 5, 3], [1, 0, 1, 0, 1, 1], list("aabbcc")
    estimate = within_problem_auc(scores, labels, problems, seed=1)
    # a 1, b 0, c has one class
    assert (estimate.value, estimate.low, estimate.high, estimate.count) == (0.5, 0.0, 1.0, 2)
    assert estimate == within_problem_auc(scores, labels, problems, seed=1)
    assert within_problem_auc([1, 2], [1, 1], "ab", seed=0).value is None
    one = within_problem_auc([2, 1], [1, 0], "aa", seed=0)
    assert one.value == 1.0
    assert one.low < 0.3
