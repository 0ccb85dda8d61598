"""From a measured rollout batch to what the optimiser trains on: token rewards, advantages, masks.

A token's reward is its flow reward less, with ``--kl-in reward``, kl_coef times its KL to the reference policy; the
outcome sits on the last token (``rl/advantages.py``). Groups of equal outcome rewards stay or go
(``--uniform-groups``); cut-off responses may be masked. Pure: rows and measurements in, a batch out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.rl import PolicyLossConfig
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.rl.advantages import advantages, entropy_shaped
from rlfr_cli.rl.choices import KLEstimator, KLPlace, UniformGroups
from rlfr_cli.rl.correction import CorrectionOptions, correction_weights, importance_ratios
from rlfr_cli.rl.measuring import Measurement, sequences_of
from rlfr_cli.rl.policy_loss import kl_estimate
from rlfr_cli.rl.updating import TrainingBatch


@dataclass(frozen=True)
class BuiltBatch:
    """The batch, and what it was made of.

    Attributes:
        batch: of the responses that are trained on.
        advantages: [T] of every response of the rollout batch, 0 for those left out.
        kl_to_reference: mean k3 over all response tokens in nats, None without a reference policy.
    """

    batch: TrainingBatch
    advantages: list[torch.Tensor]
    kl_to_reference: float | None


@dataclass(frozen=True)
class WholeBatch:
    """The rollout batch of all ranks, in rank order, on the CPU: for metrics and for the rollouts on disk.

    Attributes:
        in_loss: how many responses are trained on.
        kl_to_reference: as in ``BuiltBatch``.
    """

    rows: list[RolloutRow]
    measured: Measurement
    advantages: list[torch.Tensor]
    in_loss: int
    kl_to_reference: float | None


def gather_batch(
    ranks: Ranks, rows: Sequence[RolloutRow], measured: Measurement, built: BuiltBatch
) -> WholeBatch | None:
    """The batch of all ranks at rank 0, without latents; None elsewhere."""
    tokens = sum(map(len, measured.logprobs))
    mine = WholeBatch(list(rows), measured, built.advantages, sum(built.batch.in_loss), built.kl_to_reference)
    if ranks.alone:
        return mine
    names = ("logprobs", "entropies", "deviations", "scores", "flow_rewards")
    lists = {name: [tensor.cpu() for tensor in getattr(measured, name)] for name in names}
    advantages = [tensor.cpu() for tensor in built.advantages]
    parts = ranks.gather((mine.rows, lists, advantages, mine.in_loss, mine.kl_to_reference, tokens))
    if parts is None:
        return None
    joined: dict[str, Any] = {name: [tensor for part in parts for tensor in part[1][name]] for name in names}
    kl = [(part[4], part[5]) for part in parts if part[4] is not None]
    return WholeBatch(
        [row for part in parts for row in part[0]],
        Measurement(**joined),
        [tensor for part in parts for tensor in part[2]],
        sum(part[3] for part in parts),
        sum(value * count for value, count in kl) / sum(count for _, count in kl) if kl else None,
    )


def uniform_groups(rewards: Sequence[float], group_size: int) -> list[bool]:
    """For each response, whether its group's outcome rewards are all equal; groups stand together."""
    flags = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        flags += [len(set(group)) == 1] * len(group)
    return flags


def build_training_batch(
    rows: Sequence[RolloutRow],
    measured: Measurement,
    reference_logprobs: Sequence[torch.Tensor] | None,
    config: PolicyLossConfig,
    *,
    group_size: int,
    uniform: UniformGroups,
    correction: CorrectionOptions | None,
    temperature: float,
    max_new_tokens: int,
    ranks: Ranks = ALONE,
) -> BuiltBatch:
    """Advantages and masks of a rollout batch whose groups of ``group_size`` stand together.

    Args:
        reference_logprobs: [T] of each response by the reference policy, or None.
        correction: of the gap to the engine that drew the rows; None where it shares the trainer's weights.
        temperature: that of sampling.
        max_new_tokens: what the constant-length mean divides by.
        ranks: the processes that each build a part of the batch.
    """
    flags = uniform_groups([row.reward or 0.0 for row in rows], group_size)
    kept = [index for index, flag in enumerate(flags) if not (flag and uniform is UniformGroups.DROP)]
    all_advantages = [torch.zeros_like(logprobs_T) for logprobs_T in measured.logprobs]
    found = _advantages(rows, kept, measured, reference_logprobs, config, group_size, ranks)
    for index, advantages_T in zip(kept, found, strict=True):
        all_advantages[index] = advantages_T
    in_loss = config.kl_coef > 0 and config.kl_in is KLPlace.LOSS
    sequences = sequences_of(rows)
    batch = TrainingBatch(
        sequences=[sequences[index] for index in kept],
        old_logprobs=[measured.logprobs[index] for index in kept],
        advantages=[all_advantages[index] for index in kept],
        reference_logprobs=[reference_logprobs[index] for index in kept] if reference_logprobs and in_loss else None,
        corrections=None if correction is None else _corrections(rows, kept, measured, correction),
        in_loss=[not (config.mask_cut_off and rows[index].finish_reason == "length") for index in kept],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    return BuiltBatch(batch, all_advantages, _mean_kl(measured, reference_logprobs))


def _advantages(
    rows: Sequence[RolloutRow],
    kept: Sequence[int],
    measured: Measurement,
    reference_logprobs: Sequence[torch.Tensor] | None,
    config: PolicyLossConfig,
    group_size: int,
    ranks: Ranks,
) -> Sequence[torch.Tensor]:
    """Advantages [T] of the kept responses, of which a rank may have none."""
    lengths = [len(measured.logprobs[index]) for index in kept]
    nothing = measured.logprobs[0].new_zeros(0)
    token_rewards_K = torch.cat([nothing, *(measured.flow_rewards[index] for index in kept)])
    device = token_rewards_K.device
    if reference_logprobs is not None and config.kl_in is KLPlace.REWARD:
        kl = [kl_estimate(measured.logprobs[i], reference_logprobs[i], config.kl_estimator) for i in kept]
        token_rewards_K = token_rewards_K - config.kl_coef * torch.cat([nothing, *kl])
    advantages_K = advantages(
        torch.tensor([rows[index].reward or 0.0 for index in kept], device=device),
        torch.tensor([index // group_size for index in kept], dtype=torch.int64, device=device),
        token_rewards_K,
        torch.tensor([0, *lengths], device=device).cumsum(0),
        estimator=config.estimator,
        discount=config.discount,
        total=ranks.sum,
    )
    if config.entropy_advantage > 0:
        entropies_K = torch.cat([nothing, *(measured.entropies[index] for index in kept)])
        advantages_K = entropy_shaped(
            advantages_K, entropies_K, scale=config.entropy_advantage, cap=config.entropy_advantage_cap
        )
    return advantages_K.split(lengths)


def _corrections(
    rows: Sequence[RolloutRow], kept: Sequence[int], measured: Measurement, options: CorrectionOptions
) -> list[torch.Tensor]:
    """Weights [T] of the kept responses' losses by the ratio of trainer to engine."""
    weights = []
    for index in kept:
        trainer_T = measured.logprobs[index]
        engine_T = torch.tensor(rows[index].response_logprobs).to(trainer_T)
        offsets = torch.tensor([0, len(trainer_T)], device=trainer_T.device)
        weights.append(correction_weights(importance_ratios(trainer_T, engine_T, offsets, options.level), options))
    return weights


def _mean_kl(measured: Measurement, reference_logprobs: Sequence[torch.Tensor] | None) -> float | None:
    if reference_logprobs is None:
        return None
    return float(kl_estimate(torch.cat(measured.logprobs), torch.cat(list(reference_logprobs)), KLEstimator.K3).mean())
