"""The optimiser steps on one rollout batch: minibatches of responses, micro-batches of tokens.

Reads a measured batch and its advantages, changes the policy's weights. The loss is a mean over the whole minibatch
(``rl/policy_loss.py``), so micro-batches change speed and memory, not the loss. A response whose advantages are all
0 has no gradient, so its forward and backward pass is left out; it still counts in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rlfr_cli.config.train_rl import OptimiserConfig, PolicyLossConfig
from rlfr_cli.engines.training import TrainingEngine
from rlfr_cli.errors import WorkError
from rlfr_cli.flow.noise import Key, keyed_generator
from rlfr_cli.policy.batching import token_budget_batches
from rlfr_cli.policy.forward import TokenSequence, response_logprobs
from rlfr_cli.rl.policy_loss import (
    PolicyLossOptions,
    PolicyLossSums,
    combine_sums,
    kl_estimate,
    policy_loss,
    token_weights,
)


@dataclass(frozen=True)
class TrainingBatch:
    """A measured rollout batch; lists have one tensor [T] a response.

    Attributes:
        sequences: prompts and responses.
        old_logprobs: of the policy before the first step.
        advantages: of each token.
        reference_logprobs: of the reference policy, or None where there is none.
        temperature: that of sampling; logits are divided by it.
        max_new_tokens: what the constant-length mean divides by.
    """

    sequences: list[TokenSequence]
    old_logprobs: list[torch.Tensor]
    advantages: list[torch.Tensor]
    reference_logprobs: list[torch.Tensor] | None
    temperature: float
    max_new_tokens: int


@dataclass
class UpdateCounts:
    """What must outlive a step, and a checkpoint: optimiser steps tried, and those skipped."""

    optimiser_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass
class _Sums:
    """Detached numbers of one rollout batch's optimiser steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[PolicyLossSums] = field(default_factory=list)
    kl: float = 0.0
    kl_tokens: int = 0


def update_policy(
    engine: TrainingEngine,
    batch: TrainingBatch,
    optimiser: OptimiserConfig,
    loss_config: PolicyLossConfig,
    counts: UpdateCounts,
    learning_rate: Callable[[int], float],
    key: tuple[Key, ...],
) -> dict[str, float]:
    """Train on a rollout batch and return metrics.

    Args:
        counts: changed in place.
        learning_rate: of the optimiser step with this number, from 0.
        key: names the order of the responses, seed included.

    Raises:
        WorkError: loss or gradient was not finite in ``max_bad_steps`` steps in a row.
    """
    sums = _Sums()
    model = engine.policy.model
    model.train()
    rate = 0.0
    for epoch in range(optimiser.epochs_per_batch):
        for responses in _minibatches(len(batch.sequences), optimiser.minibatch_responses, (*key, epoch)):
            rate = learning_rate(counts.optimiser_steps)
            loss = _accumulate(engine, batch, responses, optimiser, loss_config, sums)
            outcome = engine.step(rate)
            counts.optimiser_steps += 1
            sums.losses.append(loss)
            sums.norms.append(outcome.gradient_norm)
            counts.skipped_in_a_row = 0 if outcome.stepped else counts.skipped_in_a_row + 1
            counts.skipped_steps += not outcome.stepped
            if counts.skipped_in_a_row >= optimiser.max_bad_steps:
                model.eval()
                raise WorkError(
                    f"loss or gradient was not finite in {counts.skipped_in_a_row} optimiser steps in a row "
                    f"(loss {loss}, gradient norm {outcome.gradient_norm})",
                    hint="start another run with a lower --learning-rate and, as --model, the last checkpoint's model/",
                )
    model.eval()
    return _metrics(sums, counts, rate)


def _minibatches(num_responses: int, size: int, key: tuple[Key, ...]) -> list[list[int]]:
    """Response indices in a shuffled order, cut into optimiser batches; a batch that takes all keeps their order."""
    if num_responses <= size:
        return [list(range(num_responses))]
    order = torch.randperm(num_responses, generator=keyed_generator("cpu", *key, "minibatches")).tolist()
    return [order[start : start + size] for start in range(0, num_responses, size)]


def _accumulate(
    engine: TrainingEngine,
    batch: TrainingBatch,
    responses: Sequence[int],
    optimiser: OptimiserConfig,
    config: PolicyLossConfig,
    sums: _Sums,
) -> float:
    """Add the gradient of one minibatch's loss, micro-batch by micro-batch; return the loss."""
    lengths = [len(batch.sequences[index].response) for index in responses]
    weights = token_weights(config.aggregation, torch.tensor(lengths), constant_length=batch.max_new_tokens).split(
        lengths
    )
    weight_of = dict(zip(responses, weights, strict=True))
    needed = [
        index for index in responses if batch.reference_logprobs is not None or bool(batch.advantages[index].any())
    ]
    total = 0.0
    token_counts = [len(batch.sequences[index]) for index in needed]
    for rows in token_budget_batches(token_counts, optimiser.tokens_per_micro_batch):
        loss = _micro_batch_loss(engine, batch, [needed[row] for row in rows], weight_of, config, sums)
        engine.backward(loss)
        total += float(loss.detach())
    return total


def _micro_batch_loss(
    engine: TrainingEngine,
    batch: TrainingBatch,
    indices: Sequence[int],
    weight_of: dict[int, torch.Tensor],
    config: PolicyLossConfig,
    sums: _Sums,
) -> torch.Tensor:
    device = engine.policy.placement.device
    sequences = [batch.sequences[index] for index in indices]
    logprobs_K, _ = response_logprobs(engine.policy, sequences, batch.temperature)
    offsets = torch.tensor([0, *(len(s.response) for s in sequences)], device=device).cumsum(0)
    weights_K = torch.cat([weight_of[index] for index in indices]).to(device)
    loss, part = policy_loss(
        logprobs_K,
        torch.cat([batch.old_logprobs[index] for index in indices]),
        torch.cat([batch.advantages[index] for index in indices]),
        weights_K,
        loss_options(config),
        offsets,
    )
    sums.parts.append(part)
    if batch.reference_logprobs is not None:
        reference_K = torch.cat([batch.reference_logprobs[index] for index in indices])
        kl_K = kl_estimate(logprobs_K, reference_K, config.kl_estimator)
        sums.kl += float(kl_K.detach().sum())
        sums.kl_tokens += len(kl_K)
        loss = loss + config.kl_coef * (kl_K * weights_K).sum()
    return loss


def loss_options(config: PolicyLossConfig) -> PolicyLossOptions:
    """The options of the loss as the mathematics takes them; 0 is off on the command line, None here."""
    return PolicyLossOptions(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ratio_cap=config.ratio_cap or None,
        dual_clip=config.dual_clip or None,
        ratio_level=config.ratio_level,
    )


def _metrics(sums: _Sums, counts: UpdateCounts, rate: float) -> dict[str, float]:
    metrics = {
        "policy/loss": sum(sums.losses) / len(sums.losses),
        "policy/gradient_norm": sum(sums.norms) / len(sums.norms),
        "policy/learning_rate": rate,
        "policy/skipped_steps": counts.skipped_steps,
    }
    if sums.parts:
        metrics.update({f"policy/{name}": value for name, value in combine_sums(sums.parts).metrics().items()})
    if sums.kl_tokens:
        metrics["policy/kl_to_reference"] = sums.kl / sums.kl_tokens
    return metrics
