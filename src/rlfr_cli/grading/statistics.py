"""Numbers for a table of results, each with its 95 % interval. Arrays in, small records out.

Responses to one problem are not independent, so intervals treat the problem as the unit. None stands for
what the data cannot say, such as the area under a curve of one class.

Sources: pass@k, Chen et al. 2021 (arXiv 2107.03374), eq. 1; Wilson 1927; DeLong et al. 1988.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from rlfr_cli.grading.numbers import plain_number

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; ``count`` is the number of independent units behind it."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased for the chance with k fresh samples.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples is not defined")
    misses = num_samples - num_correct
    return 1.0 - float(np.prod(1.0 - k / np.arange(misses + 1, num_samples + 1))) if misses >= k else 1.0


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """How often the most frequent answer of k samples is correct, over consecutive blocks of k samples.

    The n samples give floor(n / k) blocks, which are independent, and a remainder that is left out. Ties go
    to the answer seen first; samples without an answer have no vote, and a block without votes is wrong.
    Answers are the same when they are equal numbers, or equal texts but for spaces. The grade of the winner
    is that of its first sample.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"majority@{k} of {len(answers)} samples is not defined")
    samples = list(zip(answers, correct, strict=True))
    blocks = [samples[start : start + k] for start in range(0, len(samples) - k + 1, k)]
    return float(np.mean([_majority_is_correct(block) for block in blocks]))


def _majority_is_correct(block: Sequence[tuple[str | None, bool]]) -> bool:
    votes: dict[object, int] = {}
    first_grade: dict[object, bool] = {}
    for answer, is_correct in block:
        if answer is None:
            continue
        value = plain_number(answer.strip())
        key = "".join(answer.split()) if value is None else value
        votes[key] = votes.get(key, 0) + 1
        first_grade.setdefault(key, bool(is_correct))
    return first_grade[max(votes, key=lambda key: votes[key])] if votes else False


def mean_with_interval(values_by_problem: Sequence[ArrayLike], *, is_share: bool = True) -> Estimate:
    """Mean over problems of each problem's mean value, m ± t(0.975, n-1) × s / sqrt(n) over the n means.

    Args:
        values_by_problem: the values of each problem's samples; none may be empty.
        is_share: values lie in [0, 1]. The interval is cut to that range, and where all means are equal, so
            that s = 0 says nothing, it is Wilson's for a share of n. Otherwise it is None then.
    """
    means = _problem_means(values_by_problem)
    if len(means) == 0:
        return Estimate(None, None, None, 0)
    value = float(means.mean())
    if len(means) < 2 or np.ptp(means) == 0:
        low, high = wilson_interval(value, len(means)) if is_share else (None, None)
        return Estimate(value, low, high, len(means))
    half = _half_width(means)
    low, high = value - half, value + half
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, low, high, len(means))


def paired_difference(a_by_problem: Sequence[ArrayLike], b_by_problem: Sequence[ArrayLike]) -> Estimate:
    """Mean over problems of mean(a) - mean(b), of shares in [0, 1], with the t interval of the differences.

    Where all n differences are equal, a share of up to 1 - 0.05^(1/n) of problems may still differ unseen
    ("rule of three"): the interval is the value ± that share, within [-1, 1].
    """
    a, b = _problem_means(a_by_problem), _problem_means(b_by_problem)
    if len(a) != len(b):
        raise ValueError(f"pairs need the same problems: {len(a)} against {len(b)}")
    differences = a - b
    count = len(differences)
    if count == 0:
        return Estimate(None, None, None, 0)
    value = float(differences.mean())
    constant = count < 2 or np.ptp(differences) == 0
    half = 1 - (1 - CONFIDENCE) ** (1 / count) if constant else _half_width(differences)
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0), count)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share seen in ``count`` trials; never of zero width."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def auc_with_interval(scores: ArrayLike, labels: ArrayLike) -> Estimate:
    """Chance that a positive scores above a negative, ties half, with DeLong's interval.

    All None without both classes. Where DeLong's variance is 0 or needs a second example of a class, the
    interval is Wilson's for the smaller class. ``count`` is the number of examples.
    """
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if score.shape != label.shape:
        raise ValueError(f"{score.size} scores for {label.size} labels")
    positive, negative = score[label], score[~label]
    p, n = len(positive), len(negative)
    if min(p, n) == 0:
        return Estimate(None, None, None, len(score))
    ranks = midranks(np.concatenate([positive, negative]))
    # Each positive's share of negatives below it, and each negative's share of positives above it.
    below = (ranks[:p] - midranks(positive)) / n
    above = 1 - (ranks[p:] - midranks(negative)) / p
    value = float(below.mean())
    variance = below.var(ddof=1) / p + above.var(ddof=1) / n if min(p, n) > 1 else 0.0
    if variance <= 1e-15:
        return Estimate(value, *wilson_interval(value, min(p, n)), len(score))
    half = _Z * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(score))


def within_problem_auc(
    scores: ArrayLike,
    labels: ArrayLike,
    problem_ids: Sequence[object],
    *,
    seed: int,
    num_resamples: int = 2000,
) -> Estimate:
    """Mean over problems with both classes of the problem's own area under the curve.

    What it measures cannot come from problems being easy or hard. The interval is the 2.5 and 97.5 percentile
    of ``num_resamples`` bootstrap means over problems; Wilson's for n problems where all areas are equal.
    ``count`` is the number of problems with both classes.
    """
    areas = problem_areas(scores, labels, problem_ids)
    return bootstrap_mean(list(areas.values()), seed=seed, num_resamples=num_resamples)


def problem_areas(scores: ArrayLike, labels: ArrayLike, problem_ids: Sequence[object]) -> dict[object, float]:
    """The area under the curve of each problem that has both classes."""
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    rows: dict[object, list[int]] = {}
    for row, problem_id in enumerate(problem_ids):
        rows.setdefault(problem_id, []).append(row)
    areas = {name: auc_with_interval(score[index], label[index]).value for name, index in rows.items()}
    return {name: area for name, area in areas.items() if area is not None}


def bootstrap_mean(values: Sequence[float], *, seed: int, num_resamples: int = 2000, is_share: bool = True) -> Estimate:
    """Mean with the 2.5 and 97.5 percentile of bootstrap means.

    Args:
        is_share: values lie in [0, 1], and the interval is Wilson's where all are equal; otherwise None then.
    """
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    if count == 0:
        return Estimate(None, None, None, 0)
    value = float(array.mean())
    if count < 2 or np.ptp(array) == 0:
        low, high = wilson_interval(value, count) if is_share else (None, None)
        return Estimate(value, low, high, count)
    generator = np.random.default_rng(seed)
    resampled = [array[generator.integers(count, size=count)].mean() for _ in range(num_resamples)]
    return Estimate(value, *percentile_interval(np.array(resampled)), count)


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of bootstrap values."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def student_t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t, by bisection on its series (Abramowitz and Stegun 26.7.3 and 4)."""
    if degrees > 1000:  # the normal quantile is within 0.13 % from here on
        return _Z
    steps = np.arange(1, (degrees - 1) // 2) if degrees % 2 else np.arange(1, degrees // 2)
    factors = 2 * steps / (2 * steps + 1) if degrees % 2 else (2 * steps - 1) / (2 * steps)

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        series = 1 + float(np.cumprod(factors * math.cos(angle) ** 2).sum())
        if degrees % 2 == 0:
            return math.sin(angle) * series
        tail = math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0
        return 2 / math.pi * (angle + tail)

    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _problem_means(values_by_problem: Sequence[ArrayLike]) -> np.ndarray:
    arrays = [np.asarray(values, dtype=np.float64) for values in values_by_problem]
    if any(array.size == 0 for array in arrays):
        raise ValueError("a problem without values has no mean")
    return np.array([array.mean() for array in arrays])


def _half_width(means: np.ndarray) -> float:
    return student_t_quantile(len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
