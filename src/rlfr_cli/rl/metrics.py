"""Metrics of a rollout batch: what is logged of responses, advantages and the flow. Lists in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.grading.rewards import is_accepted
from rlfr_cli.grading.statistics import auc_with_interval
from rlfr_cli.rl.correction import CorrectionOptions, gap_metrics
from rlfr_cli.rl.measuring import Measurement

Metrics = dict[str, float | int | None]


def rollout_metrics(rows: Sequence[RolloutRow], group_size: int) -> Metrics:
    """Reward, accuracy, length, grades and groups of a batch whose groups stand together."""
    count = len(rows)
    rewards = [row.reward or 0.0 for row in rows]
    groups = [rewards[start : start + group_size] for start in range(0, count, group_size)]
    return {
        "rollout/reward": sum(rewards) / count,
        "rollout/accuracy": sum(is_accepted(row.grade, row.finish_reason) for row in rows) / count,
        "rollout/response_tokens": sum(len(row.response_token_ids) for row in rows) / count,
        "rollout/cut_off_fraction": sum(row.finish_reason == "length" for row in rows) / count,
        "rollout/zero_variance_group_fraction": sum(len(set(group)) == 1 for group in groups) / len(groups),
        "grader/no_answer_fraction": sum(row.grade == "no_answer" for row in rows) / count,
        "grader/unparseable_fraction": sum(row.grade == "unparseable" for row in rows) / count,
        "grader/timeout_fraction": sum(row.grade == "timeout" for row in rows) / count,
    }


def measurement_metrics(
    rows: Sequence[RolloutRow], measured: Measurement, clip: tuple[float, float], correction: CorrectionOptions
) -> Metrics:
    """Entropy, and the distance between the engine's and the trainer's log-probabilities of the same tokens."""
    logprobs_K = torch.cat(measured.logprobs)
    engine_K = torch.tensor([value for row in rows for value in row.response_logprobs or ()]).to(logprobs_K)
    offsets = torch.tensor([0, *map(len, measured.logprobs)], device=logprobs_K.device).cumsum(0)
    return {
        "policy/entropy": float(torch.cat(measured.entropies).mean()),
        **gap_metrics(logprobs_K, engine_K, offsets, clip, correction),
    }


def advantage_metrics(advantages: Sequence[torch.Tensor]) -> Metrics:
    """Mean, spread and sign of the token advantages."""
    advantages_K = torch.cat(list(advantages))
    return {
        "advantage/mean": float(advantages_K.mean()),
        "advantage/std": float(advantages_K.std()) if len(advantages_K) > 1 else 0.0,
        "advantage/min": float(advantages_K.min()),
        "advantage/max": float(advantages_K.max()),
        "advantage/negative_fraction": float((advantages_K < 0).float().mean()),
    }


def flow_metrics(rows: Sequence[RolloutRow], measured: Measurement) -> Metrics:
    """Deviation of correct and of wrong responses and its AUC, share of tokens rewarded, summed flow rewards.

    ``flow/auc`` is the chance that a wrong response deviates more than a correct one; None without both kinds. Without
    a flow there are no deviations, and without scores nothing at all.
    """
    wrong = [not is_accepted(row.grade, row.finish_reason) for row in rows]
    metrics: Metrics = {}
    if measured.deviations:
        means = [float(deviations_T.nanmean()) for deviations_T in measured.deviations]
        usable = [index for index, mean in enumerate(means) if mean == mean]
        auc = auc_with_interval([means[i] for i in usable], [wrong[i] for i in usable])
        metrics |= {
            "flow/deviation": _mean([means[i] for i in usable]),
            "flow/deviation_correct": _mean([means[i] for i in usable if not wrong[i]]),
            "flow/deviation_wrong": _mean([means[i] for i in usable if wrong[i]]),
            "flow/auc": auc.value,
        }
    if measured.scores:
        sums = [float(rewards_T.sum()) for rewards_T in measured.flow_rewards]
        rewarded = sum(int((rewards_T != 0).sum()) for rewards_T in measured.flow_rewards)
        valid = sum(int((~scores_T.isnan()).sum()) for scores_T in measured.scores)
        metrics |= {
            "flow/rewarded_fraction": rewarded / max(1, valid),
            "flow/reward_sum_correct": _mean([value for value, bad in zip(sums, wrong, strict=True) if not bad]),
            "flow/reward_sum_wrong": _mean([value for value, bad in zip(sums, wrong, strict=True) if bad]),
        }
    return metrics


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
