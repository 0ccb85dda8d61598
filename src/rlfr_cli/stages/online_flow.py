"""The flow of a training run: what it pays at a step, what it learns from, and what a checkpoint keeps of it.

Reads the flow that the plan names or a checkpoint's; writes ``flow.safetensors`` and, under ``trainer/``, its moments
and the buffer of accepted responses. The reference of an online update is, in this order: accepted responses of the
batch at hand, those of recent batches (``--buffer-responses``), expert latents (``--expert-latents``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.config.train_rl import TrainRlConfig
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.flow_ranks import check_same_flow
from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.flow.reference import TokenFacts
from rlfr_cli.policy.forward import TokenSequence, forward_batches
from rlfr_cli.policy.loading import Policy
from rlfr_cli.rl.measuring import Measurement, sequences_of
from rlfr_cli.rl.metrics import Metrics
from rlfr_cli.rl.online import update_flow
from rlfr_cli.rl.reference_buffer import ReferenceBuffer
from rlfr_cli.rl.schedule import learning_rate_at
from rlfr_cli.stages.choosing_draws import RESPONSES_TO_CHOOSE_ON, with_chosen_draws
from rlfr_cli.stages.flows import load_flow, new_flow, with_policy_step, write_flow

if TYPE_CHECKING:
    from rlfr_cli.stages.train_rl import Plan

FLOW_OPTIMISER = "flow_optimiser.safetensors"
BUFFER = "reference_buffer.safetensors"
FLOW_WEIGHT_DECAY, FLOW_CLIP_NORM = 0.01, 1.0


@dataclass(frozen=True)
class Reference:
    """One response to learn from: latents [prompt tokens kept + T, J, D] and token weights [T]."""

    latents: torch.Tensor
    weights: torch.Tensor


def coefficient_at(config: TrainRlConfig, step: int, total_steps: int) -> float:
    """--flow-coef at a step from 1, by its schedule; 0 while a new flow warms up."""
    if config.new_flow and step <= config.online.flow_warmup:
        return 0.0
    course = config.coefficient
    return config.flow_reward.coef * learning_rate_at(
        step - 1,
        total_steps,
        1.0,
        warmup_fraction=course.warmup_fraction,
        schedule=course.schedule,
        final_fraction=course.final_fraction,
    )


class OnlineFlow:
    """A flow that pays token rewards and learns from what was accepted.

    Args:
        plan: what `train-rl` has checked; it has a flow's header.
        policy: the one that is trained.
        checkpoint: its flow and state are taken, in place of the plan's.
        ranks: the processes that train together: each holds the same flow and learns from its own responses.
    """

    def __init__(self, plan: Plan, policy: Policy, checkpoint: Path | None, ranks: Ranks) -> None:
        assert plan.header is not None
        self.plan, self.config, self.policy, self.ranks = plan, plan.config, policy, ranks
        self.header = plan.header
        device = policy.placement.device
        path = self.config.flow if checkpoint is None else checkpoint / "flow.safetensors"
        if path is None:
            self.flow = new_flow(self.header, self.config.seed, device)
        else:
            self.header, self.flow = load_flow(path, device)
        self.optimiser = NamedAdamW(
            self.flow.network.named_parameters(), weight_decay=FLOW_WEIGHT_DECAY, clip_norm=FLOW_CLIP_NORM
        )
        # The newest of each process, as many together as asked for.
        self.buffer = ReferenceBuffer(-(-self.config.online.buffer_responses // ranks.world_size))
        self.steps, self.empty_references = 0, 0
        self.num_draws: int | None = None
        self.draw_agreement: float | None = None

    @property
    def learns(self) -> bool:
        return self.config.online.online_steps > 0

    def choose_draws(self, rows: Sequence[RolloutRow]) -> None:
        """With --draw-agreement, and once a run: measure how many draws a score needs, on rank 0's first responses."""
        if self.config.flow_reward.draw_agreement == 0 or self.num_draws is not None:
            return
        chosen = list(rows[:RESPONSES_TO_CHOOSE_ON])
        read = self._read(sequences_of(chosen))
        reward, choice = with_chosen_draws(
            self.config.flow_reward,
            self.flow,
            [latents for latents, _ in read],
            [(row.problem_id, row.sample_index) for row in chosen],
            num_prompt=self.flow.num_prompt,
            seed=self.config.seed,
            placement=self.policy.placement,
        )
        self.num_draws, self.draw_agreement = self.ranks.broadcast((reward.num_draws, choice.agreement))

    def reward(self, coefficient: float) -> FlowRewardConfig:
        """From deviation to flow reward at this coefficient, with the draws that were chosen."""
        reward = self.config.flow_reward
        return replace(reward, coef=coefficient, num_draws=self.num_draws or reward.num_draws, draw_agreement=0.0)

    def read_buffer(self) -> list[Reference]:
        """Latents and token weights of the buffered responses, by the policy as it is."""
        if not self.learns or not len(self.buffer):
            return []
        kept = list(self.buffer.kept)
        read = self._read([entry.sequence for entry in kept])
        return [
            Reference(latents, entry.weight * self.plan.rules.token_weights(tokens))
            for entry, (latents, tokens) in zip(kept, read, strict=True)
        ]

    def _read(self, sequences: Sequence[TokenSequence]) -> list[tuple[torch.Tensor, TokenFacts]]:
        """Latents of some responses, in their order, and what rules may know of their tokens."""
        read: list[tuple[torch.Tensor, TokenFacts] | None] = [None] * len(sequences)
        for batch in forward_batches(
            self.policy,
            sequences,
            temperature=self.config.sampling.temperature,
            tapped=self.flow.tapped,
            num_prompt=self.flow.num_prompt,
            tokens_per_batch=self.config.optimiser.tokens_per_micro_batch,
        ):
            for place, index in enumerate(batch.indices):
                read[index] = batch.latents[place], TokenFacts(batch.entropies[place], batch.logprobs[place])
        return [entry for entry in read if entry is not None]

    def update(
        self,
        step: int,
        rows: Sequence[RolloutRow],
        measured: Measurement,
        weights: Sequence[float],
        buffered: Sequence[Reference],
    ) -> Metrics:
        """Learn from the accepted responses of a batch that was scored, of the buffer, and from experts."""
        if not self.learns:
            return {}
        rules, online = self.plan.rules, self.config.online
        reference = [
            Reference(
                latents,
                weights[index] * rules.token_weights(TokenFacts(measured.entropies[index], measured.logprobs[index])),
            )
            for index, latents in sorted(measured.latents.items())
        ]
        reference = [entry for entry in [*reference, *buffered] if bool(entry.weights.any())]
        self.empty_references += not self.ranks.any(bool(reference))
        experts = self._experts(step, reference)
        used = [*reference, *experts]
        metrics: Metrics = dict(
            update_flow(
                self.flow,
                self.optimiser,
                {number: entry.latents for number, entry in enumerate(used)},
                {number: entry.weights for number, entry in enumerate(used)},
                online,
                self.config.flow_reward.timestep,
                (self.config.seed, step),
                self.policy.placement.dtype,
                self.ranks,
            )
        )
        check_same_flow(self.flow, self.ranks)
        self.buffer.add(sequences_of(rows), weights)
        self.steps += int(metrics["flow/steps"] or 0)
        counts = [sum(weight > 0 for weight in weights), len(weights), len(buffered), len(experts)]
        accepted, responses, from_buffer, expert = self.ranks.sum(torch.tensor(counts)).tolist()
        metrics["flow/accepted_fraction"] = accepted / responses
        metrics["flow/batches_without_accepted"] = self.empty_references
        if online.buffer_responses:
            metrics["flow/buffered_responses"] = from_buffer
        if self.plan.expert is not None:
            metrics["flow/expert_responses"] = expert
        return metrics

    def _experts(self, step: int, reference: Sequence[Reference]) -> list[Reference]:
        """Expert responses, as many as their share asks for, that together weigh that share of the whole."""
        expert = self.plan.expert
        if expert is None or not reference:
            return []
        share = self.config.online.expert_share
        odds = share / (1 - share)
        rank_key = () if self.ranks.alone else (self.ranks.rank,)
        generator = keyed_generator("cpu", self.config.seed, "expert responses", step, *rank_key)
        order = torch.randperm(len(expert.places), generator=generator).tolist()
        chosen = order[: max(1, round(odds * len(reference)))]
        surplus = expert.info.num_prompt_tokens - self.flow.num_prompt
        latents = [expert.read(index)[surplus:].to(self.flow.device) for index in chosen]
        tokens = sum(len(sequence) - self.flow.num_prompt for sequence in latents)
        weight = odds * float(sum(entry.weights.sum() for entry in reference)) / tokens
        return [
            Reference(sequence, torch.full((len(sequence) - self.flow.num_prompt,), weight, device=self.flow.device))
            for sequence in latents
        ]

    # Checkpoints

    def save(self, folder: Path, step: int, policy: ModelFingerprint, buffers: Sequence[ReferenceBuffer]) -> None:
        """Write the flow into a checkpoint, and its state into ``trainer/``.

        Args:
            policy: the checkpoint's.
            buffers: of every process, in rank order.
        """
        header = with_policy_step(self.header, policy, step, self.header.steps + self.steps)
        write_flow(folder / "flow.safetensors", header, self.flow)
        moments = {name: tensor.contiguous() for name, tensor in self.optimiser.state_tensors().items()}
        save_file(moments, folder / "trainer" / FLOW_OPTIMISER)
        together = ReferenceBuffer(sum(map(len, buffers)))
        for buffer in buffers:
            together.kept.extend(buffer.kept)
        if len(together):
            save_file(together.tensors(), folder / "trainer" / BUFFER)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors; the flow's header counts its steps."""
        return {
            "empty_references": self.empty_references,
            "num_draws": self.num_draws,
            "draw_agreement": self.draw_agreement,
        }

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Take moments, buffer and counts of a checkpoint, whose flow is loaded already."""
        self.optimiser.load_state_tensors(load_file(checkpoint / "trainer" / FLOW_OPTIMISER))
        if (checkpoint / "trainer" / BUFFER).is_file():
            together = ReferenceBuffer(self.config.online.buffer_responses + self.ranks.world_size)
            together.load(load_file(checkpoint / "trainer" / BUFFER))
            self.buffer.kept.extend(self.ranks.share(list(together.kept)))
        self.empty_references = state["empty_references"]
        self.num_draws, self.draw_agreement = state["num_draws"], state["draw_agreement"]
