"""The gap between the engine that drew the tokens and the trainer that learns from them, measured and corrected.

d = trainer's log-probability - engine's, at the same temperature; the ratio exp(d) of a token, or of a response (its
summed d), is the importance weight of what was drawn. The weight of a token's loss is the ratio cut at a cap
(``truncate``), or the ratio where it lies within [1 / cap, cap] and 0 elsewhere (``mask``). Sources: Yao et al., "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); Liu et al. (2025) for masking.

Shapes: R responses, K response tokens packed in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_cli.errors import WorkError
from rlfr_cli.rl.choices import Correction, RatioLevel
from rlfr_cli.rl.policy_loss import LARGEST_LOG_RATIO


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    correction: Correction = Correction.TRUNCATE
    level: RatioLevel = RatioLevel.TOKEN
    cap: float = 2.0


def importance_ratios(
    trainer_K: Tensor, engine_K: Tensor, response_offsets: Tensor, level: RatioLevel = RatioLevel.TOKEN
) -> Tensor:
    """Ratios [K] of trainer to engine; at ``sequence`` level each token has its response's product."""
    difference_K = trainer_K - engine_K
    if level is RatioLevel.SEQUENCE:
        lengths_R = response_offsets.diff()
        response_K = torch.repeat_interleave(torch.arange(lengths_R.numel(), device=difference_K.device), lengths_R)
        sums_R = difference_K.new_zeros(lengths_R.numel()).index_add(0, response_K, difference_K)
        difference_K = sums_R[response_K]
    return difference_K.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def correction_weights(ratios_K: Tensor, options: CorrectionOptions) -> Tensor:
    """Weights [K] of the tokens' losses, 1 everywhere with ``none``."""
    if options.correction is Correction.NONE:
        return torch.ones_like(ratios_K)
    if options.correction is Correction.TRUNCATE:
        return ratios_K.clamp(max=options.cap)
    inside_K = (ratios_K <= options.cap) & (ratios_K >= 1 / options.cap)
    return torch.where(inside_K, ratios_K, 0.0)


def gap_metrics(
    trainer_K: Tensor, engine_K: Tensor, response_offsets: Tensor, clip: tuple[float, float], options: CorrectionOptions
) -> dict[str, float]:
    """The gap as it is, and what the correction does about it.

    ``engine/kl_to_trainer`` is the mean k3 estimate of KL(engine, trainer) in nats; ``engine/outside_clip_fraction``
    the share of tokens whose ratio lies outside ``clip`` before the trainer has made a step, ``_corrected`` the same
    of the ratios divided by their weights (1 where nothing was cut, masked tokens left out).
    """
    gap_K = trainer_K - engine_K
    ratios_K = importance_ratios(trainer_K, engine_K, response_offsets)
    weights_K = correction_weights(importance_ratios(trainer_K, engine_K, response_offsets, options.level), options)
    kept_K = weights_K > 0
    left_K = torch.where(kept_K, ratios_K / weights_K.clamp(min=1e-9), 1.0)
    low, high = clip
    cut_K = (weights_K == 0) | (weights_K == options.cap) if options.correction is not Correction.NONE else ~kept_K
    return {
        "engine/kl_to_trainer": float((torch.exp(gap_K.clamp(max=LARGEST_LOG_RATIO)) - 1 - gap_K).mean()),
        "engine/logprob_gap_max": float(gap_K.abs().max()),
        "engine/ratio_max": float(ratios_K.max()),
        "engine/outside_clip_fraction": _share((ratios_K < low) | (ratios_K > high)),
        "engine/outside_clip_fraction_corrected": _share(kept_K & ((left_K < low) | (left_K > high))),
        "engine/cut_fraction": _share(cut_K),
        "engine/weight_mean": float(weights_K.mean()),
    }


def check_engine(
    engine: Sequence[Tensor], now: Sequence[Tensor], before: Sequence[Tensor] | None, tolerance: float
) -> float:
    """Check log-probabilities of the same tokens by engine and trainer, after the weights went over.

    Args:
        engine, now: [T] by the engine, and by the trainer whose weights it should have.
        before: [T] by the trainer as it was at the last check, or None.
        tolerance: largest mean of (engine - now)^2 / 2, which is the KL in nats where it is small.

    Returns:
        That mean.

    Raises:
        WorkError: it is too large, or the engine is far closer to the weights before: it did not take the new ones.
    """
    engine_K, now_K = torch.cat(list(engine)), torch.cat(list(now)).to("cpu", torch.float32)
    gap_K = engine_K.to(now_K) - now_K
    kl = float(gap_K.square().mean() / 2)
    if not kl <= tolerance:
        raise WorkError(
            f"the generation engine's weights are not the trainer's: log-probabilities of {len(now_K)} tokens differ "
            f"by {float(gap_K.abs().mean()):.3g} nats in the mean (KL {kl:.3g}, --engine-tolerance {tolerance})",
            hint="the engine keeps stale or wrong weights; try another --dtype, or --engine hf, and report it",
        )
    if before is not None:
        before_K = torch.cat(list(before)).to(now_K)
        to_now, to_before = float(gap_K.abs().mean()), float((engine_K.to(now_K) - before_K).abs().mean())
        if to_now > 2 * to_before:
            raise WorkError(
                f"the generation engine did not take the trainer's new weights: its log-probabilities of {len(now_K)} "
                f"tokens are {to_before:.3g} nats from the weights before and {to_now:.3g} from those now",
                hint="try --engine hf, and report it",
            )
    return kl


def _share(flags_K: Tensor) -> float:
    return float(flags_K.float().mean())
