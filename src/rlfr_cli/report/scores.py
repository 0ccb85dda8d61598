"""What scores of responses show: separation of wrong from correct, share of rewarded tokens, tokens by penalty.

Reads score tables and the rollouts they belong to; gives numbers for a summary. A response's score is the mean over
its valid tokens. The control is the mean negative log-probability of the response's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from rlfr_cli.grading.statistics import Estimate, auc_with_interval, within_problem_auc

MIN_OCCURRENCES = 5


class ScoreSummary:
    """Collects score tables, then sums them up.

    Args:
        seed: of the bootstrap.
        examples: most and least penalised tokens that are named.
        tokenizer: turns token ids into text; None leaves ids.
    """

    def __init__(self, seed: int, examples: int, tokenizer: Any) -> None:
        self.seed, self.examples, self.tokenizer = seed, examples, tokenizer
        self.scores: list[float] = []
        self.negative_logprobs: list[float] = []
        self.wrong: list[bool] = []
        self.graded: list[bool] = []
        self.problem_ids: list[str] = []
        self.reward_sums: list[float] = []
        self.valid_tokens = self.rewarded_tokens = 0
        self.by_token: dict[int, tuple[int, float, float]] = {}

    def add(self, scores: pa.Table, rollouts: pa.Table) -> None:
        """Scores of rollouts, row by row."""
        names = set(rollouts.column_names)
        for score, rollout in zip(scores.to_pylist(), rollouts.to_pylist(), strict=True):
            self._add_tokens(score, rollout["response_token_ids"])
            logprobs = rollout.get("response_logprobs") if "response_logprobs" in names else None
            self.negative_logprobs.append(-float(np.mean(logprobs)) if logprobs else float("nan"))
            self.wrong.append(not rollout["correct"])
            self.graded.append(rollout["grade"] != "ungraded")
            self.problem_ids.append(score["problem_id"])

    def add_unlabelled(self, scores: pa.Table, token_ids: Sequence[Sequence[int]]) -> None:
        """Scores of latents, which carry no grades."""
        for score, ids in zip(scores.to_pylist(), token_ids, strict=True):
            self._add_tokens(score, ids)
            self.negative_logprobs.append(float("nan"))
            self.wrong.append(False)
            self.graded.append(False)
            self.problem_ids.append(score["problem_id"])

    def _add_tokens(self, score: dict[str, Any], token_ids: Sequence[int]) -> None:
        valid = [value for value in score["score"] if value is not None]
        self.scores.append(float(np.mean(valid)) if valid else float("nan"))
        self.valid_tokens += len(valid)
        self.reward_sums.append(sum(value or 0.0 for value in score["flow_reward"]))
        for token, value, reward in zip(token_ids, score["score"], score["flow_reward"], strict=True):
            if value is None:
                continue
            self.rewarded_tokens += reward != 0
            count, total_reward, total_score = self.by_token.get(token, (0, 0.0, 0.0))
            self.by_token[token] = (count + 1, total_reward + reward, total_score + value)

    def result(self) -> dict[str, Any]:
        """The numbers; separation only where there are graded responses of both kinds."""
        scores = np.array(self.scores)
        summary: dict[str, Any] = {
            "mean_score": float(np.nanmean(scores)) if np.isfinite(scores).any() else None,
            "valid_tokens": self.valid_tokens,
            "share_of_tokens_rewarded": self.rewarded_tokens / max(1, self.valid_tokens),
        }
        graded = np.array(self.graded)
        wrong = np.array(self.wrong)
        if graded.any():
            summary["score_of_correct"] = _mean(scores[graded & ~wrong])
            summary["score_of_wrong"] = _mean(scores[graded & wrong])
            rewards = np.array(self.reward_sums)
            summary["flow_reward_sum_of_correct"] = _mean(rewards[graded & ~wrong])
            summary["flow_reward_sum_of_wrong"] = _mean(rewards[graded & wrong])
            summary["wrong_scores_higher"] = self._separation(scores)
            summary["control_negative_logprob"] = self._separation(np.array(self.negative_logprobs))
        summary.update(self._tokens())
        return summary

    def _separation(self, values: np.ndarray) -> dict[str, Any]:
        """AUC of wrong against correct, overall and within problems, each with its 95 % interval."""
        overall, within = separation(values, self.wrong, self.graded, self.problem_ids, seed=self.seed)
        return {"auc": asdict(overall), "auc_within_problem": asdict(within)}

    def _tokens(self) -> dict[str, Any]:
        return token_examples(self.by_token, self.examples, self._text)

    def _text(self, token: int) -> str:
        return str(token) if self.tokenizer is None else repr(self.tokenizer.decode([token]))


def separation(
    values: np.ndarray, wrong: ArrayLike, graded: ArrayLike, problem_ids: Sequence[str], *, seed: int
) -> tuple[Estimate, Estimate]:
    """AUC of wrong against correct responses, overall (DeLong) and within problems (bootstrap over problems).

    Only responses that are graded and whose value is finite count.
    """
    usable = np.asarray(graded, dtype=bool) & np.isfinite(values)
    labels = np.asarray(wrong, dtype=bool)[usable]
    ids = [name for name, ok in zip(problem_ids, usable, strict=True) if ok]
    return auc_with_interval(values[usable], labels), within_problem_auc(values[usable], labels, ids, seed=seed)


def token_examples(
    by_token: Mapping[int, tuple[int, float, float]], examples: int, text: Callable[[int], str]
) -> dict[str, Any]:
    """Tokens by mean flow reward, those seen at least ``MIN_OCCURRENCES`` times.

    Args:
        by_token: count, sum of flow rewards and sum of scores of each token id.
        examples: most rows of each end.
    """
    rows: list[dict[str, Any]] = [
        {"token": text(token), "count": count, "mean_flow_reward": reward / count, "mean_score": score / count}
        for token, (count, reward, score) in by_token.items()
        if count >= MIN_OCCURRENCES
    ]
    rows.sort(key=lambda row: (row["mean_flow_reward"], -row["count"]))
    if not rows or not examples:
        return {}
    half = min(examples, (len(rows) + 1) // 2)
    return {"most_penalised_tokens": rows[:half], "least_penalised_tokens": rows[-half:][::-1]}


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
