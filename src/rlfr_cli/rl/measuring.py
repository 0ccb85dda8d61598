"""Measure a rollout batch once, before its first optimiser step: old log-probabilities, entropies, latents, scores.

One forward pass of the policy gives all of it. Scores are of the flow as it was before it learned from this batch.
Shapes: R responses of T tokens each, J tapped layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.flow import FlowRewardConfig, ScoreSource
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.noise import Key, keyed_seed
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores
from rlfr_cli.policy.forward import ForwardBatch, TokenSequence, forward_batches
from rlfr_cli.policy.loading import Policy
from rlfr_cli.rl.token_scores import token_scores


@dataclass
class Measurement:
    """What is known of each response before training on it; lists have one tensor [T] a response.

    Attributes:
        logprobs: of the policy that is about to be trained, in nats.
        entropies: in nats.
        deviations: NaN where a token is not valid; empty without a flow.
        scores: what is shaped into flow rewards, NaN where a token has none; empty where nothing is.
        flow_rewards: 0 where a token has no score.
        latents: [prompt tokens kept + T, J, D] of the responses that the flow may learn from, by index.
    """

    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor]
    deviations: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    flow_rewards: list[torch.Tensor] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)


def sequences_of(rows: Sequence[RolloutRow]) -> list[TokenSequence]:
    """Prompts and responses of rollout rows."""
    return [TokenSequence(row.prompt_token_ids, row.response_token_ids) for row in rows]


def measure(
    policy: Policy,
    flow: Flow | None,
    rows: Sequence[RolloutRow],
    keep_latents: Sequence[bool],
    *,
    temperature: float,
    reward: FlowRewardConfig,
    scores_from: ScoreSource,
    key: tuple[Key, ...],
    tokens_per_batch: int,
) -> Measurement:
    """Measure a rollout batch.

    Args:
        flow: None for plain RLVR.
        keep_latents: which responses' latents to keep for the online update.
        temperature: that of sampling.
        reward: from deviation to flow reward, with the coefficient and the draws of this step.
        scores_from: what is shaped into flow rewards; the deviations reported are the flow's either way.
        key: names the noise of the scores: seed and step.
        tokens_per_batch: budget of a padded batch.
    """
    empty = torch.empty(0)
    measured = Measurement([empty] * len(rows), [empty] * len(rows))
    if flow is not None:
        measured.deviations, measured.scores = [empty] * len(rows), [empty] * len(rows)
    batches = forward_batches(
        policy,
        sequences_of(rows),
        temperature=temperature,
        tapped=() if flow is None else flow.tapped,
        num_prompt=1 if flow is None else flow.num_prompt,
        tokens_per_batch=tokens_per_batch,
    )
    for batch in batches:
        for place, index in enumerate(batch.indices):
            measured.logprobs[index], measured.entropies[index] = (
                batch.logprobs[place],
                batch.entropies[place],
            )
            if keep_latents[index] and batch.latents:
                # In the compute dtype, as stored latents are: in float32 a batch of a 7B model would take 30 GB.
                measured.latents[index] = batch.latents[place].to(policy.placement.dtype)
        if flow is not None:
            _score_batch(measured, flow, batch, rows, reward, key, policy.placement.dtype)
    if flow is None and scores_from.needs_flow:
        measured.flow_rewards = [torch.zeros_like(logprobs_T) for logprobs_T in measured.logprobs]
        return measured
    measured.scores = token_scores(
        scores_from,
        measured.scores if flow is not None else None,
        measured.logprobs,
        measured.entropies,
        [response_key(row.problem_id, row.sample_index) for row in rows],
        keyed_seed(*key),
    )
    measured.flow_rewards = flow_rewards(measured.scores, reward)
    return measured


def flow_rewards(scores: Sequence[torch.Tensor], reward: FlowRewardConfig) -> list[torch.Tensor]:
    """Shaped flow rewards [T] of each response, from its scores [T] with NaN where a token is not valid."""
    options = ShapingOptions(
        normalise=reward.score_normalisation,
        power=reward.power,
        threshold=reward.threshold,
        top_k=reward.top_k,
        coefficient=reward.coef,
        centre=reward.centre_reward,
    )
    lengths = [len(scores_T) for scores_T in scores]
    scores_K = torch.cat(list(scores))
    offsets = torch.tensor([0, *lengths], device=scores_K.device).cumsum(0)
    shaped = shape_scores(scores_K.nan_to_num(), ~scores_K.isnan(), offsets, options)
    return list(shaped.flow_reward_K.split(lengths))


def _score_batch(
    measured: Measurement,
    flow: Flow,
    batch: ForwardBatch,
    rows: Sequence[RolloutRow],
    reward: FlowRewardConfig,
    key: tuple[Key, ...],
    dtype: torch.dtype,
) -> None:
    keys = [response_key(rows[index].problem_id, rows[index].sample_index) for index in batch.indices]
    pairs = flow.pair(batch.latents)
    result = flow.deviations(
        pairs,
        keys,
        seed=keyed_seed(*key),
        timesteps=reward.timestep,
        num_draws=reward.num_draws,
        antithetic=reward.antithetic,
        autocast_dtype=dtype,
    )
    lengths = [len(logprobs_T) for logprobs_T in batch.logprobs]
    deviations = pairs.paired.over_responses(result.deviation_M, torch.nan).split(lengths)
    scores = pairs.paired.over_responses(result.score_M, torch.nan).split(lengths)
    for place, index in enumerate(batch.indices):
        measured.deviations[index], measured.scores[index] = deviations[place], scores[place]
