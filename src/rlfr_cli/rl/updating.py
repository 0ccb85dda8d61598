"""The optimiser steps on one rollout batch: minibatches of responses, micro-batches of tokens.

Reads a measured batch and its advantages, changes the policy's weights. The loss is a mean over the whole minibatch
(``rl/policy_loss.py``), so micro-batches change speed and memory, not the loss. A response without a gradient (all
advantages 0, or masked) is left out of forward and backward passes; it still counts in the mean over responses.

Several processes hold a part of the batch each. A minibatch is drawn from the whole of it, as in one process; each rank
takes its own responses of the minibatch, weighted for the mean over all, and does as many passes as the busiest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rlfr_cli.config.rl import OptimiserConfig, PolicyLossConfig
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.engines.training import StepOutcome, TrainingEngine
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
    probability_ratios,
    token_weights,
)


@dataclass(frozen=True)
class TrainingBatch:
    """A measured rollout batch; lists have one tensor [T] a response.

    Attributes:
        sequences: prompts and responses.
        old_logprobs: of the policy before the first step.
        advantages: of each token.
        reference_logprobs: of the reference policy where its KL is paid for in the loss, else None.
        corrections: weights of each token's policy loss for the gap to the generation engine, or None for none.
        in_loss: False for a masked response: its tokens count nowhere, and it counts in the mean over responses.
        temperature: that of sampling; logits are divided by it.
        max_new_tokens: what the constant-length mean divides by.
    """

    sequences: list[TokenSequence]
    old_logprobs: list[torch.Tensor]
    advantages: list[torch.Tensor]
    reference_logprobs: list[torch.Tensor] | None
    corrections: list[torch.Tensor] | None
    in_loss: list[bool]
    temperature: float
    max_new_tokens: int


@dataclass
class UpdateCounts:
    """What must outlive a step, and a checkpoint: optimiser steps tried, and those skipped."""

    optimiser_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class _WholeBatch:
    """Of the responses of all ranks, in rank order: how many tokens count in the loss, and where this rank's begin."""

    lengths: list[int]
    start: int


def _whole_batch(batch: TrainingBatch, ranks: Ranks) -> _WholeBatch:
    lengths = [
        len(sequence.response) if counts else 0 for sequence, counts in zip(batch.sequences, batch.in_loss, strict=True)
    ]
    by_rank = ranks.all_gather(lengths)
    return _WholeBatch([length for part in by_rank for length in part], sum(map(len, by_rank[: ranks.rank])))


@dataclass
class _Sums:
    """Detached numbers of one rollout batch's optimiser steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[PolicyLossSums] = field(default_factory=list)

    def over(self, ranks: Ranks) -> _Sums:
        """The sums of all ranks; gradient norms are the same on each."""
        if ranks.alone:
            return self
        losses = ranks.sum(torch.tensor(self.losses, dtype=torch.float64)).tolist()
        found = ranks.all_gather(combine_sums(self.parts).to("cpu") if self.parts else None)
        return _Sums(losses, self.norms, [part for part in found if part is not None])


def update_policy(
    engine: TrainingEngine,
    batch: TrainingBatch,
    optimiser: OptimiserConfig,
    loss_config: PolicyLossConfig,
    counts: UpdateCounts,
    learning_rate: Callable[[int, int], float],
    key: tuple[Key, ...],
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """Train on a rollout batch and return metrics; one without responses changes nothing.

    Args:
        counts: changed in place.
        learning_rate: after so many of the batch's optimiser steps, and how many these are.
        key: names the order of the responses, seed included.
        ranks: the processes that train together; the metrics are of all of them.

    Raises:
        WorkError: loss or gradient was not finite in ``max_bad_steps`` steps in a row.
    """
    sums = _Sums()
    model = engine.policy.model
    model.train()
    whole = _whole_batch(batch, ranks)
    minibatches = [
        responses
        for epoch in range(optimiser.epochs_per_batch)
        for responses in _minibatches(len(whole.lengths), optimiser.minibatch_responses, (*key, epoch))
    ]
    rate = learning_rate(0, max(1, len(minibatches)))
    for number, responses in enumerate(minibatches):
        rate = learning_rate(number, len(minibatches))
        loss, passes = _accumulate(engine, batch, whole, responses, optimiser, loss_config, sums, ranks)
        # Without a pass there is no gradient to step by, and an engine of several processes expects one.
        outcome = engine.step(rate) if passes or ranks.alone else StepOutcome(0.0, True)
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
    return _metrics(sums.over(ranks), counts, rate)


def _minibatches(num_responses: int, size: int, key: tuple[Key, ...]) -> list[list[int]]:
    """Response indices in a shuffled order, cut into optimiser batches; a batch that takes all keeps their order."""
    if num_responses == 0:
        return []
    if num_responses <= size:
        return [list(range(num_responses))]
    order = torch.randperm(num_responses, generator=keyed_generator("cpu", *key, "minibatches")).tolist()
    return [order[start : start + size] for start in range(0, num_responses, size)]


def _accumulate(
    engine: TrainingEngine,
    batch: TrainingBatch,
    whole: _WholeBatch,
    responses: Sequence[int],
    optimiser: OptimiserConfig,
    config: PolicyLossConfig,
    sums: _Sums,
    ranks: Ranks,
) -> tuple[float, int]:
    """Add the gradient of one minibatch's loss, micro-batch by micro-batch.

    Args:
        responses: of the minibatch, counted over all ranks.

    Returns:
        This rank's share of the loss, and how many passes each rank has made.
    """
    lengths = [whole.lengths[index] for index in responses]
    weights = token_weights(
        config.aggregation,
        torch.tensor(lengths),
        num_responses=len(responses),
        constant_length=batch.max_new_tokens,
    ).split(lengths)
    mine = range(whole.start, whole.start + len(batch.sequences))
    weight_of = {index - whole.start: weight for index, weight in zip(responses, weights, strict=True) if index in mine}
    every_token_counts = batch.reference_logprobs is not None or config.entropy_coef > 0
    needed = [
        index
        for index in weight_of
        if batch.in_loss[index] and (every_token_counts or bool(batch.advantages[index].any()))
    ]
    total = 0.0
    token_counts = [len(batch.sequences[index]) for index in needed]
    micro_batches = list(token_budget_batches(token_counts, optimiser.tokens_per_micro_batch))
    passes = round(ranks.max(len(micro_batches)))
    for number in range(passes):
        last = number == passes - 1
        if number < len(micro_batches):
            chosen = [needed[row] for row in micro_batches[number]]
            loss = _micro_batch_loss(engine, batch, chosen, weight_of, config, sums)
            engine.backward(loss, last=last)
            total += float(loss.detach())
        else:
            engine.idle_backward(last=last)
    return total, passes


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
    logprobs_K, entropies_K = engine.run(lambda: response_logprobs(engine.policy, sequences, batch.temperature))
    offsets = torch.tensor([0, *(len(s.response) for s in sequences)], device=device).cumsum(0)
    weights_K = torch.cat([weight_of[index] for index in indices]).to(device)
    corrected_K = weights_K
    if batch.corrections is not None:
        corrected_K = weights_K * torch.cat([batch.corrections[index] for index in indices])
    loss, part = policy_loss(
        logprobs_K,
        torch.cat([batch.old_logprobs[index] for index in indices]),
        torch.cat([batch.advantages[index] for index in indices]),
        corrected_K,
        loss_options(config),
        offsets,
    )
    sums.parts.append(part)
    if batch.reference_logprobs is not None:
        reference_K = torch.cat([batch.reference_logprobs[index] for index in indices])
        kl_K = kl_estimate(logprobs_K, reference_K, config.kl_estimator)
        if config.kl_ratio:
            old_K = torch.cat([batch.old_logprobs[index] for index in indices])
            kl_K = kl_K * probability_ratios(logprobs_K - old_K, config.ratio_level, offsets)
        loss = loss + config.kl_coef * (kl_K * weights_K).sum()
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * (entropies_K * weights_K).sum()
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


def _metrics(sums: _Sums, counts: UpdateCounts, rate: float) -> dict[str, float | None]:
    steps = len(sums.losses)
    metrics: dict[str, float | None] = {
        "policy/loss": sum(sums.losses) / steps if steps else None,
        "policy/gradient_norm": sum(sums.norms) / steps if steps else None,
        "policy/learning_rate": rate,
        "policy/skipped_steps": counts.skipped_steps,
    }
    if sums.parts:
        metrics.update({f"policy/{name}": value for name, value in combine_sums(sums.parts).metrics().items()})
    return metrics
