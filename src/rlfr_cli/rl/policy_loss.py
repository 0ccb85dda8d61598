"""The clipped policy loss on packed response tokens, and its parts.

Per token -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) with ratio = exp(logprob - old logprob), then
a weighted sum: ``token_weights`` gives weights that make it a mean over the whole optimiser batch, so that
losses and gradients of micro-batches and ranks add up to it. Sources: PPO (Schulman et al., 2017), DAPO (Yu
et al., 2025) for separate bounds and the token mean, Ye et al. (2020) for the dual clip, GSPO (Zheng et
al., 2025) for the sequence ratio, Dr. GRPO (Liu et al., 2025) for the constant length.

Shapes: R responses, K response tokens packed in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.choices import Aggregation, KLEstimator, RatioLevel

# A larger log-ratio is far outside every clip; its exponential would overflow and make the gradient NaN.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """``ratio_cap`` caps the ratio for A of either sign (published: 3); ``dual_clip``, above 1, bounds
    the loss of a negative advantage at dual_clip * |A|. Both are off as None.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    dual_clip: float | None = None
    ratio_level: RatioLevel = RatioLevel.TOKEN


@dataclass(frozen=True)
class PolicyLossSums:
    """Detached sums over tokens, to be combined over the micro-batches and ranks of an optimiser step."""

    num_tokens: Tensor
    clipped: Tensor  # tokens whose clipped term was the smaller one
    kl: Tensor  # k3 of (old policy, policy), never negative
    ratio: Tensor
    ratio_max: Tensor

    def to(self, device: str) -> PolicyLossSums:
        """The same on another device."""
        return PolicyLossSums(*(getattr(self, field.name).to(device) for field in fields(self)))

    def metrics(self) -> dict[str, float]:
        tokens = max(float(self.num_tokens), 1.0)
        return {
            "clip_fraction": float(self.clipped) / tokens,
            "approximate_kl": float(self.kl) / tokens,
            "ratio_mean": float(self.ratio) / tokens,
            "ratio_max": float(self.ratio_max),
        }


def combine_sums(parts: Sequence[PolicyLossSums]) -> PolicyLossSums:
    """The sums of several micro-batches, one at least."""
    return PolicyLossSums(
        num_tokens=torch.stack([part.num_tokens for part in parts]).sum(),
        clipped=torch.stack([part.clipped for part in parts]).sum(),
        kl=torch.stack([part.kl for part in parts]).sum(),
        ratio=torch.stack([part.ratio for part in parts]).sum(),
        ratio_max=torch.stack([part.ratio_max for part in parts]).max(),
    )


def token_weights(
    aggregation: Aggregation,
    response_lengths_R: Tensor,
    *,
    num_responses: int | None = None,
    num_tokens: int | None = None,
    constant_length: int | None = None,
) -> Tensor:
    """Weights [K] with which per-token terms sum to the mean over an optimiser batch.

    Args:
        response_lengths_R: tokens of each response at hand; one of length 0 counts nowhere.
        num_responses: responses (with tokens) of the whole optimiser batch, by default those at hand.
        num_tokens: response tokens of the whole optimiser batch, by default those at hand.
        constant_length: what ``constant-length`` divides by beside the responses, such as ``max_new_tokens``.
    """
    lengths_R = response_lengths_R.double()
    if num_responses is None:
        num_responses = int((lengths_R > 0).sum())
    if num_tokens is None:
        num_tokens = int(lengths_R.sum())
    if aggregation is Aggregation.RESPONSE_MEAN:
        weights_R = 1 / (lengths_R.clamp(min=1) * max(num_responses, 1))
    elif aggregation is Aggregation.TOKEN_MEAN:
        weights_R = torch.full_like(lengths_R, 1 / max(num_tokens, 1))
    elif constant_length is None:
        raise ConfigError("the aggregation constant-length needs a constant length")
    else:
        weights_R = torch.full_like(lengths_R, 1 / (max(num_responses, 1) * constant_length))
    return torch.repeat_interleave(weights_R, response_lengths_R).float()


def policy_loss(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    advantages_K: Tensor,
    weights_K: Tensor,
    options: PolicyLossOptions,
    response_offsets: Tensor | None = None,
) -> tuple[Tensor, PolicyLossSums]:
    """Loss [] with a gradient to ``logprobs_K``, and detached sums.

    Args:
        weights_K: from ``token_weights`` of the whole optimiser batch, the slice of these tokens.
        response_offsets: needed for the sequence ratio, which takes whole responses.
    """
    assert logprobs_K.shape == old_logprobs_K.shape == advantages_K.shape == weights_K.shape
    difference_K = logprobs_K.float() - old_logprobs_K.detach().float()
    ratio_K = probability_ratios(difference_K, options.ratio_level, response_offsets, largest=options.ratio_cap)

    plain_K = ratio_K * advantages_K
    clipped_K = ratio_K.clamp(1 - options.clip_low, 1 + options.clip_high) * advantages_K
    gain_K = torch.minimum(plain_K, clipped_K)
    if options.dual_clip is not None:
        floor_K = options.dual_clip * advantages_K
        gain_K = torch.where(advantages_K < 0, torch.maximum(gain_K, floor_K), gain_K)
    loss = -(gain_K * weights_K).sum()

    ratio_K = ratio_K.detach()
    sums = PolicyLossSums(
        num_tokens=torch.tensor(float(ratio_K.numel()), device=ratio_K.device),
        clipped=(clipped_K < plain_K).detach().float().sum(),
        kl=kl_estimate(-difference_K.detach().clamp(max=LARGEST_LOG_RATIO), 0.0, KLEstimator.K3).sum(),
        ratio=ratio_K.sum(),
        ratio_max=ratio_K.max() if ratio_K.numel() else ratio_K.new_zeros(()),
    )
    return loss, sums


def probability_ratios(
    difference_K: Tensor, level: RatioLevel, response_offsets: Tensor | None = None, *, largest: float | None = None
) -> Tensor:
    """Ratios [K] of the policy to the old one from log-probabilities' differences, capped at ``largest``."""
    if level is RatioLevel.SEQUENCE:
        assert response_offsets is not None, "the sequence ratio needs response_offsets"
        difference_K = mean_over_response(difference_K, response_offsets)
    return difference_K.clamp(max=LARGEST_LOG_RATIO if largest is None else math.log(largest)).exp()


def mean_over_response(values_K: Tensor, response_offsets: Tensor) -> Tensor:
    """Each token's response mean [K], with gradient to every token of the response."""
    lengths_R = response_offsets.diff()
    response_K = torch.repeat_interleave(torch.arange(lengths_R.numel(), device=values_K.device), lengths_R)
    sums_R = values_K.new_zeros(lengths_R.numel()).index_add(0, response_K, values_K)
    return (sums_R / lengths_R.clamp(min=1))[response_K]


def kl_estimate(
    logprobs_K: Tensor, other_logprobs_K: Tensor | float, estimator: KLEstimator = KLEstimator.K3
) -> Tensor:
    """KL(policy, other) estimated token by token [K]; k3 is unbiased and never negative."""
    difference_K = logprobs_K - other_logprobs_K
    if estimator is KLEstimator.K1:
        return difference_K
    if estimator is KLEstimator.K2:
        return difference_K.square() / 2
    return torch.exp(-difference_K) - 1 + difference_K
