"""What per-token measurements say of a flow: numbers for ``diagnosis.json``. Arrays in, rows of numbers out.

Every measure stands beside the score of the flow, so that what a simple quantity does as well is seen to be so. A
measure of a response is the mean over its tokens. Areas under the curve are of wrong against correct responses: above
one half, wrong ones have the larger values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlfr_cli.grading.statistics import Estimate, bootstrap_mean, mean_with_interval, problem_areas
from rlfr_cli.report.chains import Place
from rlfr_cli.report.diagnosis_statistics import (
    MatchedAuc,
    clustered_spearman,
    identity_share,
    means_elsewhere,
    partial_auc,
    residuals,
)
from rlfr_cli.report.scores import separation

# What the flow must go beyond. Length is that of the whole response, so it says nothing of single tokens.
RESPONSE_CONTROLS = ("negative_logprob", "entropy", "length", "latent_norm", "token_identity")
TOKEN_CONTROLS = ("negative_logprob", "entropy", "latent_norm", "token_identity")
PARTIAL = "score_beyond_controls"


@dataclass(frozen=True)
class ResponseTable:
    """One entry a response.

    Attributes:
        wrong: not correct; means nothing where not graded.
        length: response tokens, valid or not; so ``negative_logprob`` and ``entropy``, the means over them.
    """

    problem_ids: list[str]
    graded: np.ndarray
    wrong: np.ndarray
    length: np.ndarray
    negative_logprob: np.ndarray
    entropy: np.ndarray

    @property
    def of_both_classes(self) -> bool:
        return len(set(self.wrong[self.graded].tolist())) == 2


@dataclass(frozen=True)
class TokenTable:
    """One entry a valid token, in order of responses.

    Attributes:
        response: row of the response.
        position: zero-based place in the response.
        latent_norm: root mean square of the latent, mean over layers.
        random_latents: score of random latents of the same mean and variance by channel.
        shuffled_context: score with the conditions shuffled within the response.
        places: where the token stands in a chain, for the tokens that are compared there.
        first_wrong: the first wrong token of its response.
    """

    response: np.ndarray
    token_id: np.ndarray
    position: np.ndarray
    score: np.ndarray
    flow_reward: np.ndarray
    negative_logprob: np.ndarray
    entropy: np.ndarray
    latent_norm: np.ndarray
    random_latents: np.ndarray
    shuffled_context: np.ndarray
    places: list[Place | None]
    first_wrong: np.ndarray

    def over_responses(self, values: np.ndarray, num_responses: int) -> np.ndarray:
        """Mean over each response's valid tokens, NaN where it has none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.bincount(self.response, values, num_responses) / np.bincount(
                self.response, minlength=num_responses
            )


def token_measures(tokens: TokenTable) -> dict[str, np.ndarray]:
    """The score and its controls, by token [N]."""
    return {
        "score": tokens.score,
        "negative_logprob": tokens.negative_logprob,
        "entropy": tokens.entropy,
        "latent_norm": tokens.latent_norm,
        "token_identity": means_elsewhere(tokens.score, tokens.token_id, tokens.response),
        "random_latents": tokens.random_latents,
        "shuffled_context": tokens.shuffled_context,
    }


def separation_of_responses(responses: ResponseTable, tokens: TokenTable, *, seed: int) -> dict[str, Any]:
    """How well each measure separates wrong from correct responses, overall and within problems.

    All are compared on the same responses: those that are graded and have every measure, so no empty ones.
    """
    count = len(responses.problem_ids)
    measures = {name: tokens.over_responses(values, count) for name, values in token_measures(tokens).items()}
    measures |= {
        "negative_logprob": responses.negative_logprob,
        "entropy": responses.entropy,
        "length": responses.length.astype(float),
    }
    order = ("score", *RESPONSE_CONTROLS, "random_latents", "shuffled_context")
    usable = responses.graded & np.isfinite(np.stack(list(measures.values()))).all(axis=0)
    estimates = {
        name: separation(measures[name], responses.wrong, usable, responses.problem_ids, seed=seed) for name in order
    }
    ids = [name for name, ok in zip(responses.problem_ids, usable, strict=True) if ok]
    wrong = responses.wrong[usable]
    controls_NC = np.stack([measures[name][usable] for name in RESPONSE_CONTROLS], axis=1)
    partial = partial_auc(measures["score"][usable], controls_NC, wrong, ids, seed=seed)
    areas = {name: problem_areas(measures[name][usable], wrong, ids) for name in order}
    rows = [_row(name, overall, within) for name, (overall, within) in estimates.items()]
    rows.append(_row(PARTIAL, None, partial))
    best = _best_control({name: within for name, (_, within) in estimates.items()}, RESPONSE_CONTROLS)
    return {
        "compared": int(usable.sum()),
        "rows": rows,
        "best_control": best,
        "above_best_control": _interval(_paired(areas, best, seed=seed)),
        "above_shuffled_context": _interval(_paired(areas, "shuffled_context", seed=seed)),
    }


def _row(name: str, overall: Estimate | None, within: Estimate) -> dict[str, Any]:
    overall = overall or Estimate(None, None, None, 0)
    return {
        "measure": name,
        "auc": overall.value,
        "low": overall.low,
        "high": overall.high,
        "within_problems": within.value,
        "within_low": within.low,
        "within_high": within.high,
        "problems": within.count,
    }


def _best_control(areas: dict[str, Estimate], controls: tuple[str, ...]) -> str | None:
    """The control that separates most, in whichever direction."""
    known = {name: abs(value - 0.5) for name in controls if (value := areas[name].value) is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _paired(areas: dict[str, dict[object, float]], other: str | None, *, seed: int) -> Estimate:
    """Area of the score less that of another measure, turned so that it is above one half, paired by problem."""
    if other is None:
        return Estimate(None, None, None, 0)
    values = areas[other]
    turned = other in RESPONSE_CONTROLS and bool(values) and np.mean(list(values.values())) < 0.5
    differences = [area - (1 - values[name] if turned else values[name]) for name, area in areas["score"].items()]
    return bootstrap_mean(differences, seed=seed, is_share=False)


def separation_of_tokens(responses: ResponseTable, tokens: TokenTable, *, seed: int) -> dict[str, Any]:
    """How far the first wrong token of wrong responses stands out, by each measure.

    It is compared with the tokens of correct responses at the same place of a chain: same step, same number, same
    digit. Tokens and their controls are taken less their place's mean where the controls are taken out.
    """
    at = np.array([place is not None for place in tokens.places], dtype=bool)
    wrong_responses = int((responses.wrong & responses.graded).sum())
    measures = {name: values[at] for name, values in token_measures(tokens).items()}
    places = [place for place in tokens.places if place is not None]
    clusters = [responses.problem_ids[row] for row in tokens.response[at]]
    matched = MatchedAuc(tokens.first_wrong[at], places, clusters, seed=seed)
    found = {"wrong_responses": wrong_responses, "located": int(tokens.first_wrong.sum())}
    if not matched.num_positives:
        return {**found, "compared": 0, "rows": [], "best_control": None, "above_best_control": _interval(None)}
    used = matched.tokens
    left = np.zeros(len(used))
    controls_NC = np.stack([measures[name][used] for name in TOKEN_CONTROLS], axis=1)
    left[used] = residuals(
        measures["score"][used], controls_NC, [place for place, ok in zip(places, used, strict=True) if ok]
    )
    areas = {name: matched.area(values) for name, values in measures.items()}
    best = _best_control(areas, TOKEN_CONTROLS)
    assert best is not None
    turned = (areas[best].value or 0.0) < 0.5
    rows = [
        {"measure": name, "auc": area.value, "low": area.low, "high": area.high, "problems": area.count}
        for name, area in {**areas, PARTIAL: matched.area(left)}.items()
    ]
    return {
        **found,
        "compared": matched.num_positives,
        "with_tokens": int(used.sum()) - matched.num_positives,
        "rows": rows,
        "best_control": best,
        "above_best_control": _interval(
            matched.difference(measures["score"], -measures[best] if turned else measures[best])
        ),
    }


def correlations(responses: ResponseTable, tokens: TokenTable, *, seed: int) -> list[dict[str, Any]]:
    """Rank correlation of the token score with simple quantities, over all valid tokens."""
    _, identity, counts = np.unique(tokens.token_id, return_inverse=True, return_counts=True)
    quantities = {
        "latent norm": tokens.latent_norm,
        "position in response": tokens.position,
        "response length": responses.length[tokens.response],
        "token frequency": counts[identity],
        "entropy": tokens.entropy,
        "log-probability": -tokens.negative_logprob,
    }
    clusters = [responses.problem_ids[row] for row in tokens.response]
    rows = []
    for name, values in quantities.items():
        estimate = clustered_spearman(tokens.score, values, clusters, seed=seed)
        rows.append({"with": name, "spearman": estimate.value, "low": estimate.low, "high": estimate.high})
    return rows


def explained_by_identity(tokens: TokenTable) -> dict[str, Any]:
    """Share of the token scores' variance that token identity explains."""
    return identity_share(tokens.score, tokens.token_id, tokens.response)


def reward_of_classes(responses: ResponseTable, tokens: TokenTable) -> dict[str, Any]:
    """Summed flow reward of correct and of wrong responses, and how much more wrong ones get within a problem."""
    sums = np.bincount(tokens.response, tokens.flow_reward, len(responses.problem_ids))
    graded, wrong = responses.graded, responses.wrong
    by_problem: dict[str, tuple[list[float], list[float]]] = {}
    for name, is_wrong, value in zip(
        np.array(responses.problem_ids, dtype=object)[graded], wrong[graded], sums[graded], strict=True
    ):
        by_problem.setdefault(name, ([], []))[int(is_wrong)].append(value)
    differences = [[np.mean(bad) - np.mean(good)] for good, bad in by_problem.values() if good and bad]
    correct_sums, wrong_sums = sums[graded & ~wrong], sums[graded & wrong]
    return {
        "sum_of_correct": float(correct_sums.mean()) if len(correct_sums) else None,
        "sum_of_wrong": float(wrong_sums.mean()) if len(wrong_sums) else None,
        "wrong_less_correct_within_problems": _interval(mean_with_interval(differences, is_share=False)),
        "share_of_tokens_rewarded": float((tokens.flow_reward != 0).mean()) if len(tokens.score) else None,
    }


def by_token(tokens: TokenTable) -> dict[int, tuple[int, float, float]]:
    """Count, sum of flow rewards and sum of scores of each token id, for ``report.scores.token_examples``."""
    ids, at = np.unique(tokens.token_id, return_inverse=True)
    sums = [np.bincount(at), np.bincount(at, tokens.flow_reward), np.bincount(at, tokens.score)]
    return {int(i): (int(n), float(r), float(s)) for i, n, r, s in zip(ids, *sums, strict=True)}


def _interval(estimate: Estimate | None) -> dict[str, Any]:
    estimate = estimate or Estimate(None, None, None, 0)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "problems": estimate.count}
