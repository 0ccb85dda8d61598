"""From scores to flow rewards, within each response and over its valid tokens.

Min-max to [0, 1] or [-1, 1]; sign(x) |x|^power; what is not above the threshold becomes 0; then only the
largest (signed: half of them the most positive, half the most negative) stay. flow reward = -coefficient *
shaped value, and, when centred, less the response's mean. A response whose scores are all equal gives
zeros. Between equal values the earlier token is kept.

Shapes: K response tokens packed in order, R responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_cli.flow.choices import Normalise


@dataclass(frozen=True, kw_only=True)
class ShapingOptions:
    """``threshold`` and ``top_k`` are off at 0 or less."""

    normalise: Normalise = Normalise.MINMAX
    power: float = 1.0
    threshold: float = 0.6
    top_k: int = 15
    coefficient: float = 0.01
    centre: bool = False


@dataclass(frozen=True)
class ShapedScores:
    """Both [K], and 0 where a token is not valid."""

    shaped_K: Tensor
    flow_reward_K: Tensor


def shape_scores(scores_K: Tensor, valid_K: Tensor, response_offsets: Tensor, options: ShapingOptions) -> ShapedScores:
    """Shape the scores of all response tokens.

    Args:
        scores_K: scores; what stands at tokens that are not valid is never read.
        valid_K: which tokens have a score.
        response_offsets: int64 [R + 1].
    """
    num_responses = response_offsets.numel() - 1
    response_K = torch.repeat_interleave(
        torch.arange(num_responses, device=scores_K.device), response_offsets.diff().to(scores_K.device)
    )
    response_M, x_M = response_K[valid_K], scores_K[valid_K].float()
    signed = options.normalise is Normalise.MINMAX_SIGNED
    if options.normalise is not Normalise.NONE:
        x_M = minmax(x_M, response_M, num_responses, signed=signed)
    if options.power != 1:
        x_M = x_M.sign() * x_M.abs() ** options.power
    if options.threshold > 0:
        above_M = (x_M.abs() if signed else x_M) > options.threshold
        x_M = torch.where(above_M, x_M, 0.0)
    if options.top_k > 0:
        x_M = torch.where(top_mask(x_M, response_M, options.top_k, signed=signed), x_M, 0.0)

    reward_M = 0.0 - options.coefficient * x_M  # not -0.0 where nothing is taken
    if options.centre:
        reward_M = reward_M - response_mean(reward_M, response_M, num_responses)[response_M]
    shaped_K, flow_reward_K = torch.zeros_like(scores_K).float(), torch.zeros_like(scores_K).float()
    shaped_K[valid_K], flow_reward_K[valid_K] = x_M, reward_M
    return ShapedScores(shaped_K, flow_reward_K)


def minmax(x_M: Tensor, response_M: Tensor, num_responses: int, *, signed: bool) -> Tensor:
    """(x - lowest) / (highest - lowest) within each response, mapped to [-1, 1] if signed; 0 if constant."""
    empty_R = x_M.new_zeros(num_responses)
    lowest_M = empty_R.scatter_reduce(0, response_M, x_M, "amin", include_self=False)[response_M]
    highest_M = empty_R.scatter_reduce(0, response_M, x_M, "amax", include_self=False)[response_M]
    span_M = highest_M - lowest_M
    share_M = (x_M - lowest_M) / torch.where(span_M > 0, span_M, 1.0)
    return torch.where(span_M > 0, 2 * share_M - 1 if signed else share_M, 0.0)


def top_mask(x_M: Tensor, response_M: Tensor, top_k: int, *, signed: bool) -> Tensor:
    """Marks each response's ``top_k`` largest; signed: its top_k // 2 most positive and most negative."""
    if not signed:
        return rank_descending(x_M, response_M) < top_k
    half = top_k // 2
    positive_M = (rank_descending(x_M, response_M) < half) & (x_M > 0)
    return positive_M | ((rank_descending(-x_M, response_M) < half) & (x_M < 0))


def rank_descending(x_M: Tensor, response_M: Tensor) -> Tensor:
    """Rank from 0 of each value within its response: the largest first, the earlier first among equals."""
    by_value = torch.argsort(x_M, descending=True, stable=True)
    order = by_value[torch.argsort(response_M[by_value], stable=True)]
    counts_R = torch.bincount(response_M)
    starts_R = counts_R.cumsum(0) - counts_R
    ranks_M = torch.empty_like(order)
    ranks_M[order] = torch.arange(order.numel(), device=order.device) - starts_R[response_M[order]]
    return ranks_M


def response_mean(x_M: Tensor, response_M: Tensor, num_responses: int) -> Tensor:
    """Mean [R] over each response's valid tokens, 0 where it has none."""
    sums_R = x_M.new_zeros(num_responses).index_add_(0, response_M, x_M)
    return sums_R / torch.bincount(response_M, minlength=num_responses).clamp(min=1)
