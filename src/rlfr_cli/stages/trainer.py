"""The trainer behind `train-rl`: policy, flow and their optimisers, and one method for each phase of a step.

Reads what the plan names or a run's last checkpoint; writes checkpoints. ``stages/train_rl.py`` has the order.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import load_file, save_file

from rlfr_cli import console
from rlfr_cli.artifacts.files import canonical_json, read_json, write_atomically
from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.generation import Sampling
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.flow.reference import ResponseFacts, group_shares
from rlfr_cli.grading.pool import GradingPool
from rlfr_cli.grading.rewards import is_accepted
from rlfr_cli.grading.statistics import mean_with_interval
from rlfr_cli.ordering import shuffled_items
from rlfr_cli.policy.forward import forward_batches
from rlfr_cli.policy.loading import Policy, disable_dropout, load_policy, resolve_model_folder
from rlfr_cli.rl.advantages import advantages
from rlfr_cli.rl.measuring import Measurement, measure, sequences_of
from rlfr_cli.rl.metrics import (
    Metrics,
    advantage_metrics,
    flow_metrics,
    measurement_metrics,
    rollout_metrics,
)
from rlfr_cli.rl.online import update_flow
from rlfr_cli.rl.rollouts import Responder
from rlfr_cli.rl.schedule import learning_rate_at
from rlfr_cli.rl.updating import TrainingBatch, UpdateCounts, update_policy
from rlfr_cli.stages.common import sampling_of
from rlfr_cli.stages.flows import load_flow, new_flow, with_policy_step, write_flow

if TYPE_CHECKING:
    from rlfr_cli.stages.train_rl import Plan

STATE = "state.json"
FLOW_OPTIMISER = "flow_optimiser.safetensors"
FLOW_WEIGHT_DECAY, FLOW_CLIP_NORM = 0.01, 1.0


@dataclass
class StepResult:
    """A step's metrics, and its rollouts with what training computed of them."""

    metrics: dict[str, Any]
    rows: list[RolloutRow]


class StopRequest:
    """Remembers Ctrl-C or SIGTERM until the step is done; a second Ctrl-C stops at once."""

    requested = False

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        console.warn("stopping after this step; its checkpoint will be saved (Ctrl-C again stops at once)")


class Trainer:
    """Everything that a run holds in memory.

    Args:
        plan: what `train-rl` has checked.
        folder: the run folder; a resumed one is continued from its last checkpoint.
        pool: graders.
    """

    def __init__(self, plan: Plan, folder: RunFolder, pool: GradingPool) -> None:
        self.plan, self.config, self.folder = plan, plan.config, folder
        self.placement = plan.model.placement
        checkpoint = folder.latest_checkpoint()
        model_folder = plan.model.folder if checkpoint is None else checkpoint / "model"
        self.policy = load_policy(model_folder, self.placement, weights_dtype=torch.float32)
        disable_dropout(self.policy.model)
        optimiser = self.config.optimiser
        self.engine = SingleProcessEngine(
            self.policy,
            stored_dtype=getattr(plan.model.config, "dtype", None) or torch.float32,
            betas=(optimiser.beta1, optimiser.beta2),
            weight_decay=optimiser.weight_decay,
            clip_norm=optimiser.clip_norm,
            gradient_checkpointing=optimiser.gradient_checkpointing,
        )
        self.reference = self._reference_policy()
        self.responder = Responder(HfEngine(self.policy, self.config.sampling.tokens_per_batch), pool, plan.reward)
        self.counts, self.flow_steps, self.empty_references = UpdateCounts(), 0, 0
        self._open_flow(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _reference_policy(self) -> Policy | None:
        name = self.config.policy_loss.reference_model
        if name is None:
            return None
        reference = load_policy(resolve_model_folder(name), self.placement)
        reference.model.requires_grad_(False)
        return reference

    def _open_flow(self, checkpoint: Path | None) -> None:
        """The flow and its optimiser, or None and None for plain RLVR."""
        self.flow, self.flow_optimiser, self.header = None, None, self.plan.header
        if self.header is None:
            return
        device = self.placement.device
        path = self.config.flow if checkpoint is None else checkpoint / "flow.safetensors"
        if path is None:
            self.flow = new_flow(self.header, self.config.seed, device)
        else:
            self.header, self.flow = load_flow(path, device)
        self.flow_optimiser = NamedAdamW(
            self.flow.network.named_parameters(), weight_decay=FLOW_WEIGHT_DECAY, clip_norm=FLOW_CLIP_NORM
        )

    # A step

    def step(self, step: int) -> StepResult:
        """One rollout batch: draw, measure, train the policy, train the flow."""
        started = time.perf_counter()
        rows = self._draw(step)
        drawn = time.perf_counter()
        weights = self._reference_weights(rows)
        measured = self._measure(step, rows, weights)
        batch = self._training_batch(rows, measured)
        scored = time.perf_counter()
        policy_metrics = self._update_policy(step, batch)
        updated = time.perf_counter()
        flow_metrics_now = self._update_flow(step, measured, weights)
        finished = time.perf_counter()

        tokens = sum(len(row.response_token_ids) for row in rows)
        metrics: dict[str, Any] = {
            **rollout_metrics(rows, self.config.rollout.group_size),
            **measurement_metrics(rows, measured),
            **advantage_metrics(batch.advantages),
            **policy_metrics,
            **(flow_metrics(rows, measured) if self.flow is not None else {}),
            **flow_metrics_now,
            "time/sample_s": drawn - started,
            "time/measure_s": scored - drawn,
            "time/update_s": updated - scored,
            "time/flow_s": finished - updated,
            "time/step_s": finished - started,
            "time/tokens_per_s": tokens / (finished - started),
        }
        self._annotate(rows, measured, batch)
        return StepResult(metrics, rows)

    def _draw(self, step: int) -> list[RolloutRow]:
        prompted = self.plan.problems.prompted
        chosen = shuffled_items(
            len(prompted), self.config.rollout.prompts_per_step, step, self.config.seed, "problem order"
        )
        return self.responder.respond(
            [prompted[index] for index in chosen],
            self.config.rollout.group_size,
            sampling_of(self.config.sampling),
            key=(self.config.seed, "rollouts", step),
        )

    def _reference_weights(self, rows: list[RolloutRow]) -> list[float]:
        """Weight of each response in the online update, 0 for one that is left out."""
        accepted = [is_accepted(row.grade, row.finish_reason) for row in rows]
        size = self.config.rollout.group_size
        shares = group_shares(accepted, [index // size for index in range(len(rows))])
        return [
            self.plan.rules.response_weight(
                ResponseFacts(ok, row.finish_reason == "stop", row.reward or 0.0, len(row.response_token_ids), share)
            )
            for row, ok, share in zip(rows, accepted, shares, strict=True)
        ]

    def _measure(self, step: int, rows: list[RolloutRow], weights: list[float]) -> Measurement:
        online = self.flow is not None and self.config.online.online_steps > 0
        warming_up = self.config.new_flow and step <= self.config.online.flow_warmup
        return measure(
            self.policy,
            self.flow,
            rows,
            [online and weight > 0 for weight in weights],
            temperature=self.config.sampling.temperature,
            reward=self.config.flow_reward,
            scores_from=self.config.scores,
            pay_flow_reward=not warming_up,
            key=(self.config.seed, step),
            tokens_per_batch=self.config.optimiser.tokens_per_micro_batch,
        )

    def _training_batch(self, rows: list[RolloutRow], measured: Measurement) -> TrainingBatch:
        device = self.placement.device
        lengths = [len(row.response_token_ids) for row in rows]
        size = self.config.rollout.group_size
        advantages_K = advantages(
            torch.tensor([row.reward for row in rows], device=device),
            torch.arange(len(rows), device=device) // size,
            torch.cat(measured.flow_rewards),
            torch.tensor([0, *lengths], device=device).cumsum(0),
            estimator=self.config.policy_loss.estimator,
            discount=self.config.policy_loss.discount,
        )
        return TrainingBatch(
            sequences=sequences_of(rows),
            old_logprobs=measured.logprobs,
            advantages=list(advantages_K.split(lengths)),
            reference_logprobs=self._reference_logprobs(rows),
            temperature=self.config.sampling.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
        )

    def _reference_logprobs(self, rows: list[RolloutRow]) -> list[torch.Tensor] | None:
        if self.reference is None:
            return None
        logprobs = [torch.empty(0)] * len(rows)
        for batch in forward_batches(
            self.reference,
            sequences_of(rows),
            temperature=self.config.sampling.temperature,
            tokens_per_batch=self.config.optimiser.tokens_per_micro_batch,
        ):
            for index, row_logprobs in zip(batch.indices, batch.logprobs, strict=True):
                logprobs[index] = row_logprobs
        return logprobs

    def _update_policy(self, step: int, batch: TrainingBatch) -> dict[str, float]:
        optimiser, rollout = self.config.optimiser, self.config.rollout
        responses = rollout.prompts_per_step * rollout.group_size
        minibatches = -(-responses // optimiser.minibatch_responses) * optimiser.epochs_per_batch

        def learning_rate(optimiser_step: int) -> float:
            return learning_rate_at(
                optimiser_step,
                self.plan.total_steps * minibatches,
                optimiser.learning_rate,
                warmup_fraction=optimiser.warmup_fraction,
                schedule=optimiser.schedule,
                final_fraction=optimiser.final_fraction,
            )

        return update_policy(
            self.engine,
            batch,
            optimiser,
            self.config.policy_loss,
            self.counts,
            learning_rate,
            (self.config.seed, "update", step),
        )

    def _update_flow(self, step: int, measured: Measurement, weights: list[float]) -> Metrics:
        if self.flow is None or self.flow_optimiser is None or self.config.online.online_steps == 0:
            return {}
        token_weights = {
            index: weights[index] * self.plan.rules.token_weights(measured.entropies[index])
            for index in measured.latents
        }
        metrics: Metrics = dict(
            update_flow(
                self.flow,
                self.flow_optimiser,
                measured.latents,
                token_weights,
                self.config.online,
                self.config.flow_reward.timestep,
                (self.config.seed, step),
                self.placement.dtype,
            )
        )
        self.flow_steps += int(metrics["flow/steps"] or 0)
        self.empty_references += not measured.latents
        metrics["flow/accepted_fraction"] = sum(weight > 0 for weight in weights) / len(weights)
        metrics["flow/batches_without_accepted"] = self.empty_references
        return metrics

    def _annotate(self, rows: list[RolloutRow], measured: Measurement, batch: TrainingBatch) -> None:
        """Put what training computed beside each response."""
        for index, row in enumerate(rows):
            row.advantage = batch.advantages[index].tolist()
            row.entropy = measured.entropies[index].tolist()
            row.trainer_logprobs = measured.logprobs[index].tolist()
            row.flow_reward = measured.flow_rewards[index].tolist()
            if measured.scores:
                row.deviation = _with_nulls(measured.deviations[index])
                row.score = _with_nulls(measured.scores[index])

    # Evaluation and checkpoints

    def evaluate(self, step: int) -> Metrics:
        """Accuracy on the held-out problems, with its 95 % interval."""
        assert self.plan.heldout is not None
        started = time.perf_counter()
        evaluation, sampling = self.config.evaluation, sampling_of(self.config.sampling)
        rows = self.responder.respond(
            self.plan.heldout.prompted,
            evaluation.eval_samples,
            Sampling(**{**asdict(sampling), "temperature": evaluation.eval_temperature}),
            key=(self.config.seed, "evaluation", step),
        )
        accepted = [is_accepted(row.grade, row.finish_reason) for row in rows]
        count = evaluation.eval_samples
        estimate = mean_with_interval([accepted[i : i + count] for i in range(0, len(accepted), count)])
        return {
            "eval/accuracy": estimate.value,
            "eval/accuracy_low": estimate.low,
            "eval/accuracy_high": estimate.high,
            "eval/response_tokens": sum(len(row.response_token_ids) for row in rows) / len(rows),
            "eval/cut_off_fraction": sum(row.finish_reason == "length" for row in rows) / len(rows),
            "time/eval_s": time.perf_counter() - started,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint: a plain model folder, the flow, and what a resumed run needs."""
        with self.folder.checkpoint(step, keep=self.config.run.keep_checkpoints) as folder:
            self.engine.save(folder / "model", folder / "trainer")
            if self.flow is not None and self.header is not None and self.flow_optimiser is not None:
                header = with_policy_step(
                    self.header,
                    model_fingerprint(folder / "model"),
                    step,
                    self.header.steps + self.flow_steps,
                )
                write_flow(folder / "flow.safetensors", header, self.flow)
                moments = {name: t.contiguous() for name, t in self.flow_optimiser.state_tensors().items()}
                save_file(moments, folder / "trainer" / FLOW_OPTIMISER)
            state = {
                "step": step,
                "counts": asdict(self.counts),
                "empty_references": self.empty_references,
            }
            write_atomically(folder / "trainer" / STATE, canonical_json(state))

    def _restore(self, checkpoint: Path) -> None:
        self.engine.load(checkpoint / "trainer")
        state = read_json(checkpoint / "trainer" / STATE)
        self.counts = UpdateCounts(**state["counts"])
        self.empty_references = state["empty_references"]
        if self.flow_optimiser is not None:
            # The flow's header already counts the steps taken before the checkpoint.
            self.flow_optimiser.load_state_tensors(load_file(checkpoint / "trainer" / FLOW_OPTIMISER))

    def close(self) -> None:
        """Give back engines and graders."""
        self.responder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_nulls(values_T: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in values_T.tolist()]
