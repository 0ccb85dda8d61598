"""The statistics of ``rlfr diagnose``: arrays in, numbers out. Plain NumPy.

Intervals are of 95 %, and resample whole problems, since responses to one problem are not independent.
Shapes: N tokens or responses, C controls, P problems (or other clusters), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlfr_cli.grading.statistics import Estimate, midranks, percentile_interval, wilson_interval

NUM_RESAMPLES = 2000


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where a side is constant or has fewer than two values."""
    rank_x, rank_y = (midranks(np.asarray(values, dtype=np.float64)) for values in (x, y))
    if len(rank_x) < 2 or np.ptp(rank_x) == 0 or np.ptp(rank_y) == 0:
        return math.nan
    return float(np.corrcoef(rank_x, rank_y)[0, 1])


def clustered_spearman(x: np.ndarray, y: np.ndarray, clusters: Sequence[object], *, seed: int) -> Estimate:
    """Rank correlation over all tokens; the bootstrap resamples clusters, with the ranks as they are."""
    ranks = [midranks(np.asarray(values, dtype=np.float64)) for values in (x, y)]
    codes, num_clusters = _codes(clusters)
    if len(codes) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return Estimate(None, None, None, num_clusters)
    a, b = (rank - rank.mean() for rank in ranks)
    sums_P6 = np.stack(
        [np.bincount(codes, values, num_clusters) for values in (np.ones_like(a), a, b, a * a, b * b, a * b)], axis=1
    )
    value = float(_correlation(sums_P6.sum(axis=0)))
    if num_clusters < 2:
        return Estimate(value, None, None, num_clusters)
    resampled = _correlation(_resample_weights(num_clusters, seed) @ sums_P6)
    return Estimate(value, *percentile_interval(resampled[np.isfinite(resampled)]), num_clusters)


def _correlation(sums: np.ndarray) -> np.ndarray:
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))


def means_elsewhere(scores: np.ndarray, token_ids: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Each token's score as its identity alone tells it: the mean score of the same token id in other responses.

    A token id of one response only gets the mean of all tokens of other responses.
    """
    tokens, num_tokens = _codes(token_ids)
    rows, num_rows = _codes(responses)
    pair = tokens * num_rows + rows
    at = np.unique(pair, return_inverse=True)[1]
    own_count, own_sum = np.bincount(at), np.bincount(at, scores)
    count = np.bincount(tokens, minlength=num_tokens)[tokens] - own_count[at]
    total = np.bincount(tokens, scores, num_tokens)[tokens] - own_sum[at]
    other_count = len(scores) - np.bincount(rows, minlength=num_rows)[rows]
    other_total = scores.sum() - np.bincount(rows, scores, num_rows)[rows]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, other_total / other_count)


def identity_share(scores: np.ndarray, token_ids: np.ndarray, responses: np.ndarray) -> dict[str, Any]:
    """Share of the token scores' variance that token identity explains.

    Returns:
        ``adjusted``: 1 - (1 - R²)(n - 1) / (n - k) for k identities; ``cross_validated``: 1 - sum of squared errors
        of ``means_elsewhere`` over that of the mean of other responses; ``identities``: k.
    """
    tokens, num_tokens = _codes(token_ids)
    means = np.bincount(tokens, scores) / np.bincount(tokens)
    total = float(((scores - scores.mean()) ** 2).sum())
    if total == 0 or len(scores) <= num_tokens:
        return {"adjusted": None, "cross_validated": None, "identities": num_tokens}
    left = float(((scores - means[tokens]) ** 2).sum())
    elsewhere = means_elsewhere(scores, token_ids, responses)
    baseline = means_elsewhere(scores, np.zeros_like(token_ids), responses)
    error, most = (float(((scores - guess) ** 2).sum()) for guess in (elsewhere, baseline))
    return {
        "adjusted": 1 - left / total * (len(scores) - 1) / (len(scores) - num_tokens),
        "cross_validated": 1 - error / most if math.isfinite(error / most) else None,
        "identities": num_tokens,
    }


def residuals(values: np.ndarray, controls_NC: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """What least squares on the controls leaves of the values, both less their group's mean."""
    y, x_NC = _within(values, controls_NC, groups)
    return y - x_NC @ _solve(x_NC.T @ x_NC, x_NC.T @ y)


def partial_auc(
    scores: np.ndarray, controls_NC: np.ndarray, wrong: np.ndarray, problem_ids: Sequence[object], *, seed: int
) -> Estimate:
    """Within-problem area of what the controls leave of the score.

    Score and controls are taken less their problem's mean; least squares takes the controls out; then, in each problem
    with wrong and correct responses, the area under the curve of what is left, averaged over these problems. Each
    resample of problems fits its own coefficients. By Frisch, Waugh and Lovell this asks what the coefficient of the
    score asks in a linear regression of wrong on score, controls and problem. It sees linear controls only.
    """
    codes, num_problems = _codes(problem_ids)
    shares = np.bincount(codes, wrong, num_problems) / np.bincount(codes)
    kept = ((shares > 0) & (shares < 1))[codes]
    if not kept.any():
        return Estimate(None, None, None, 0)
    codes, num_problems = _codes(codes[kept])
    wrong = wrong[kept].astype(bool)
    y, x_NC = _within(scores[kept], controls_NC[kept], codes)
    grams_PCC = np.stack([x_NC[codes == p].T @ x_NC[codes == p] for p in range(num_problems)])
    moments_PC = np.stack([x_NC[codes == p].T @ y[codes == p] for p in range(num_problems)])
    pairs = [np.stack(np.meshgrid(*_both(codes == p, wrong)), axis=-1).reshape(-1, 2) for p in range(num_problems)]
    problem = np.repeat(np.arange(num_problems), [len(rows) for rows in pairs])
    first, second = np.concatenate(pairs).T
    dy, dx_C = y[first] - y[second], x_NC[first] - x_NC[second]
    smallest = 1e-9 * np.abs(y).max()

    def areas(weights_P: np.ndarray) -> np.ndarray:
        left = dy - dx_C @ _solve(np.tensordot(weights_P, grams_PCC, 1), weights_P @ moments_PC)
        left[np.abs(left) < smallest] = 0  # few responses and many controls: nothing is left but rounding
        return np.bincount(problem, (left > 0) + 0.5 * (left == 0)) / np.bincount(problem)

    whole = areas(np.ones(num_problems))
    if num_problems < 2:
        return Estimate(float(whole.mean()), *wilson_interval(float(whole.mean()), 1), 1)
    resampled = np.array([w @ areas(w) / num_problems for w in _resample_weights(num_problems, seed)])
    return Estimate(float(whole.mean()), *percentile_interval(resampled), num_problems)


class MatchedAuc:
    """Chance that a positive token scores above a negative one at the same place, ties half.

    Every positive counts once. Several scores of the same tokens share their resamples, so that differences are paired.

    Args:
        positive: which tokens are the positives [N].
        places: tokens are compared within a place only; positives without a negative there are left out.
        clusters: what the bootstrap resamples.
    """

    def __init__(
        self, positive: np.ndarray, places: Sequence[object], clusters: Sequence[object], *, seed: int
    ) -> None:
        self.clusters, self.num_clusters = _codes(clusters)
        place, _ = _codes(places)
        negatives = {code: np.flatnonzero((place == code) & ~positive) for code in np.unique(place[positive])}
        self.pairs = [
            (token, negatives[place[token]])
            for token in np.flatnonzero(positive).tolist()
            if len(negatives[place[token]])
        ]
        self.weights_RP = np.zeros((0, self.num_clusters))
        if self.num_clusters > 1:
            self.weights_RP = _resample_weights(self.num_clusters, seed)
        self.counts_PP = self._by_clusters(lambda token, others: np.ones(len(others)))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.resampled_counts_R = ((self.weights_RP @ self.counts_PP) * self.weights_RP).sum(axis=1)

    @property
    def tokens(self) -> np.ndarray:
        """Marks the tokens that are compared [N]."""
        used = np.zeros(len(self.clusters), dtype=bool)
        for token, others in self.pairs:
            used[token] = used[others] = True
        return used

    @property
    def num_positives(self) -> int:
        return len(self.pairs)

    def area(self, scores: np.ndarray) -> Estimate:
        """The area of some scores [N]; ``count`` is the number of clusters with a positive."""
        value, resampled = self._areas(scores)
        return self._estimate(value, resampled)

    def difference(self, scores: np.ndarray, others: np.ndarray) -> Estimate:
        """How much larger the area of the scores is than that of the others."""
        (a, resampled_a), (b, resampled_b) = self._areas(scores), self._areas(others)
        return self._estimate(a - b, resampled_a - resampled_b)

    def _estimate(self, value: float, resampled_R: np.ndarray) -> Estimate:
        count = len({int(self.clusters[token]) for token, _ in self.pairs})
        if count < 2:
            return Estimate(value if self.pairs else None, None, None, count)
        return Estimate(value, *percentile_interval(resampled_R[np.isfinite(resampled_R)]), count)

    def _areas(self, scores: np.ndarray) -> tuple[float, np.ndarray]:
        won_PP = self._by_clusters(
            lambda token, others: (scores[token] > scores[others]) + 0.5 * (scores[token] == scores[others])
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = ((self.weights_RP @ won_PP) * self.weights_RP).sum(axis=1) / self.resampled_counts_R
        return float(won_PP.sum() / max(1, len(self.pairs))), resampled

    def _by_clusters(self, values: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """Sums over pairs, each positive of weight 1, by the positive's cluster and the negative's."""
        sums_PP = np.zeros((self.num_clusters, self.num_clusters))
        for token, others in self.pairs:
            row = np.bincount(self.clusters[others], values(token, others), self.num_clusters)
            sums_PP[self.clusters[token]] += row / len(others)
        return sums_PP


def draw_agreement(
    first_TS: np.ndarray, second_TS: np.ndarray, selected: Callable[[np.ndarray], np.ndarray], nums: Sequence[int]
) -> list[tuple[float, float]]:
    """How far one response's scores agree between two independent sets of draws [T, S], for the first n of each.

    Args:
        selected: marks the tokens that are paid for, from scores [T].
        nums: the numbers of draws n.

    Returns:
        For each n the rank correlation, and the Jaccard index of the selected tokens; NaN where it is not defined.
    """
    rows = []
    for num in nums:
        a, b = first_TS[:, :num].mean(axis=1), second_TS[:, :num].mean(axis=1)
        rows.append((spearman(a, b), jaccard(selected(a), selected(b))))
    return rows


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the tokens in either set that are in both; NaN where both are empty."""
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else math.nan


def draws_needed(agreement: float, num_draws: int, wanted: float = 0.95) -> int | None:
    """Draws whose mean agrees that well, from the agreement of means of ``num_draws`` (Spearman and Brown).

    n = num_draws × wanted (1 - agreement) / (agreement (1 - wanted)); None where they do not agree at all.
    """
    if not agreement > 0:
        return None
    return max(1, math.ceil(num_draws * wanted * (1 - agreement) / (agreement * (1 - wanted)) - 1e-9))


def _codes(names: Sequence[object] | np.ndarray) -> tuple[np.ndarray, int]:
    """Names as numbers from 0, in order of appearance, and how many."""
    known: dict[object, int] = {}
    listed = names.tolist() if isinstance(names, np.ndarray) else names
    codes = np.array([known.setdefault(name, len(known)) for name in listed], dtype=np.int64)
    return codes, len(known)


def _resample_weights(num_clusters: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each resample, [R, P]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), NUM_RESAMPLES).astype(float)


def _within(
    values: np.ndarray, controls_NC: np.ndarray, groups: Sequence[object] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values and controls less their group's means; controls in units of what is left, 0 where nothing is."""
    codes, num_groups = _codes(groups)
    columns = np.column_stack([values, controls_NC]).astype(np.float64)
    sums = np.stack([np.bincount(codes, column, num_groups) for column in columns.T], axis=1)
    columns -= (sums / np.bincount(codes)[:, None])[codes]
    scale_C = columns[:, 1:].std(axis=0)
    # Rounding leaves something of a control that is constant in every group.
    flat_C = scale_C <= 1e-9 * np.maximum(1.0, np.abs(controls_NC).max(axis=0, initial=0.0))
    return columns[:, 0], columns[:, 1:] * np.where(flat_C, 0.0, 1 / np.where(flat_C, 1.0, scale_C))


def _solve(gram_CC: np.ndarray, moments_C: np.ndarray) -> np.ndarray:
    """Least squares coefficients; of controls that say the same, the shortest."""
    return np.linalg.pinv(gram_CC, rcond=1e-10, hermitian=True) @ moments_C


def _both(rows: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.flatnonzero(rows & wrong), np.flatnonzero(rows & ~wrong)
