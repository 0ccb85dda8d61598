"""The trainer behind `train-rl`: the policy, its optimiser, and one method for each phase of a step.

Reads what the plan names or a run's last checkpoint; writes checkpoints. ``stages/train_rl.py`` has the order,
``stages/online_flow.py`` the flow's part of it.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.files import canonical_json, read_json, write_atomically
from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.engines.generation import Sampling
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.engines.training_engines import open_training_engine
from rlfr_cli.flow.noise import keyed_seed
from rlfr_cli.grading.pool import GradingPool
from rlfr_cli.grading.rewards import is_accepted
from rlfr_cli.grading.statistics import mean_with_interval
from rlfr_cli.policy.adapters import add_adapters
from rlfr_cli.policy.forward import forward_batches
from rlfr_cli.policy.loading import Policy, disable_dropout, load_policy, resolve_model_folder, stored_dtype_of
from rlfr_cli.rl.choices import Correction, UniformGroups
from rlfr_cli.rl.correction import CorrectionOptions
from rlfr_cli.rl.measuring import Measurement, measure, sequences_of
from rlfr_cli.rl.metrics import (
    Metrics,
    advantage_metrics,
    flow_metrics,
    measurement_metrics,
    rollout_metrics,
)
from rlfr_cli.rl.rollouts import Responder
from rlfr_cli.rl.schedule import learning_rate_at
from rlfr_cli.rl.training_batch import BuiltBatch, WholeBatch, build_training_batch, gather_batch
from rlfr_cli.rl.updating import TrainingBatch, UpdateCounts, update_policy
from rlfr_cli.stages.adapter_checkpoints import BASE, write_adapters
from rlfr_cli.stages.common import sampling_of
from rlfr_cli.stages.drawing import Drawing, Drawn
from rlfr_cli.stages.generating import EngineOfRun
from rlfr_cli.stages.online_flow import OnlineFlow, coefficient_at
from rlfr_cli.stages.rules import facts_of

if TYPE_CHECKING:
    from rlfr_cli.stages.train_rl import Plan

STATE = "state.json"
NO_CORRECTION = CorrectionOptions(correction=Correction.NONE)


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
        checkpoint: the run's last one, to go on from; None for a new run.
        ranks: the processes that train together. Each draws, grades, measures and learns from its share of the
            problems; rank 0 alone writes.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, pool: GradingPool, checkpoint: Path | None, ranks: Ranks = ALONE
    ) -> None:
        self.plan, self.config, self.folder, self.ranks = plan, plan.config, folder, ranks
        self.placement = plan.model.placement
        self.policy = self._load_policy(checkpoint)
        disable_dropout(self.policy.model)
        self.engine = open_training_engine(
            self.policy,
            ranks,
            self.config.training,
            self.config.optimiser,
            stored_dtype=stored_dtype_of(plan.model.config),
        )
        self.reference = self._reference_policy()
        self.generator = EngineOfRun(
            plan.engine.open(self.policy),
            self.engine,
            self.config.correction,
            [entry.prompt_token_ids for entry in plan.problems.prompted],
            stale=checkpoint is not None,
        )
        self.responder = Responder(self.generator.engine, pool, plan.reward)
        self.drawing = Drawing(plan, self.responder, self.generator, ranks)
        self.counts = UpdateCounts()
        self.online = None if plan.header is None else OnlineFlow(plan, self.policy, checkpoint, ranks)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _load_policy(self, checkpoint: Path | None) -> Policy:
        """The policy with the weights that are trained in float32; adapters are put into the base model anew."""
        adapters, base = self.plan.adapters, self.plan.model.folder
        if adapters is None:
            folder = base if checkpoint is None else checkpoint / "model"
            return load_policy(folder, self.placement, weights_dtype=torch.float32)
        policy = load_policy(base, self.placement)
        add_adapters(policy, adapters, keyed_seed(self.config.seed, "adapters"))
        return policy

    def _reference_policy(self) -> Policy | None:
        name = self.config.policy_loss.reference_model
        if name is None:
            return None
        reference = load_policy(resolve_model_folder(name), self.placement)
        reference.model.requires_grad_(False)
        return reference

    # A step

    def step(self, step: int) -> StepResult:
        """One rollout batch: draw, measure, train the policy, train the flow."""
        started = time.perf_counter()
        batch = self.drawing.batch(step)
        rows = batch.rows
        drawn = time.perf_counter()
        weights = self._reference_weights(rows)
        coefficient = coefficient_at(self.config, step, self.plan.total_steps)
        with self.engine.whole_policy():
            if self.online is not None:
                self.online.choose_draws(rows)
            measured = self._measure(step, rows, weights, coefficient)
            buffered = self.online.read_buffer() if self.online is not None else []
        built = self._build(rows, measured)
        scored = time.perf_counter()
        whole = gather_batch(self.ranks, rows, measured, built)
        measures = self._metrics_of_batch(whole, batch, coefficient)
        if batch.age == 0:  # of an older one the gap is the policy's own step as well
            self.generator.check_gap(self.ranks.broadcast(measures.get("engine/kl_to_trainer") or 0.0))
        self.generator.changed(built.batch.sequences)
        policy_metrics = self._update_policy(step, built.batch)
        updated = time.perf_counter()
        flow_update = self.online.update(step, rows, measured, weights, buffered) if self.online is not None else {}
        finished = time.perf_counter()

        if whole is None:
            return StepResult({}, [])
        tokens = sum(len(row.response_token_ids) for row in whole.rows)
        metrics: dict[str, Any] = {
            **measures,
            **policy_metrics,
            **flow_update,
            "time/sample_s": drawn - started,
            "time/measure_s": scored - drawn,
            "time/update_s": updated - scored,
            "time/flow_s": finished - updated,
            "time/step_s": finished - started,
            "time/tokens_per_s": tokens / (finished - started),
        }
        self._annotate(whole)
        return StepResult(metrics, whole.rows)

    def _metrics_of_batch(self, whole: WholeBatch | None, batch: Drawn, coefficient: float) -> Metrics:
        """What is known of the rollout batch of all ranks before training on it; nothing but at rank 0."""
        if whole is None:
            return {}
        rows, measured = whole.rows, whole.measured
        correction = self.generator.correction or NO_CORRECTION
        return {
            **rollout_metrics(rows, self.config.rollout.group_size),
            "rollout/responses": len(rows),
            "rollout/sampling_rounds": batch.rounds,
            **({"rollout/policy_age": batch.age} if self.config.separation.overlap else {}),
            "rollout/trained_fraction": whole.in_loss / len(rows),
            **measurement_metrics(rows, measured, self._clip(), correction),
            **advantage_metrics(whole.advantages),
            **({} if whole.kl_to_reference is None else {"policy/kl_to_reference": whole.kl_to_reference}),
            **flow_metrics(rows, measured),
            **({"flow/coef": coefficient} if measured.scores else {}),
            **({"flow/num_draws": self.online.num_draws} if self.online is not None and self.online.num_draws else {}),
        }

    def _reference_weights(self, rows: list[RolloutRow]) -> list[float]:
        """Weight of each response in the online update, 0 for one that is left out."""
        return [self.plan.rules.response_weight(facts) for facts in facts_of(rows)]

    def _measure(self, step: int, rows: list[RolloutRow], weights: list[float], coefficient: float) -> Measurement:
        learns = self.online is not None and self.online.learns
        reward = replace(self.config.flow_reward, coef=coefficient)
        return measure(
            self.policy,
            None if self.online is None else self.online.flow,
            rows,
            [learns and weight > 0 for weight in weights],
            temperature=self.config.sampling.temperature,
            reward=reward if self.online is None else self.online.reward(coefficient),
            scores_from=self.config.scores,
            key=(self.config.seed, step),
            tokens_per_batch=self.config.optimiser.tokens_per_micro_batch,
        )

    def _build(self, rows: list[RolloutRow], measured: Measurement) -> BuiltBatch:
        rollout = self.config.rollout
        uniform = rollout.uniform_groups
        if uniform is None:
            uniform = UniformGroups.DROP if rollout.dynamic_sampling else UniformGroups.KEEP
        return build_training_batch(
            rows,
            measured,
            self._reference_logprobs(rows),
            self.config.policy_loss,
            group_size=rollout.group_size,
            uniform=uniform,
            correction=self.generator.correction,
            temperature=self.config.sampling.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            ranks=self.ranks,
        )

    def _clip(self) -> tuple[float, float]:
        """Ratios that the loss does not clip."""
        return 1 - self.config.policy_loss.clip_low, 1 + self.config.policy_loss.clip_high

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

    def _update_policy(self, step: int, batch: TrainingBatch) -> dict[str, float | None]:
        optimiser, rollout = self.config.optimiser, self.config.rollout
        responses = rollout.prompts_per_step * rollout.group_size
        planned = -(-responses // optimiser.minibatch_responses) * optimiser.epochs_per_batch

        def learning_rate(done: int, of: int) -> float:
            # A batch of another size than planned takes the same stretch of the schedule.
            return learning_rate_at(
                (step - 1) * planned + done * planned / of,
                self.plan.total_steps * planned,
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
            self.ranks,
        )

    def _annotate(self, whole: WholeBatch) -> None:
        """Put what training computed beside each response."""
        measured = whole.measured
        for index, row in enumerate(whole.rows):
            row.advantage = whole.advantages[index].tolist()
            row.entropy = measured.entropies[index].tolist()
            row.trainer_logprobs = measured.logprobs[index].tolist()
            row.flow_reward = measured.flow_rewards[index].tolist()
            if measured.deviations:
                row.deviation = _with_nulls(measured.deviations[index])
            if measured.scores:
                row.score = _with_nulls(measured.scores[index])

    # Evaluation and checkpoints

    def evaluate(self, step: int) -> Metrics:
        """Accuracy on the held-out problems, with its 95 % interval; nothing but at rank 0."""
        assert self.plan.heldout is not None
        started = time.perf_counter()
        evaluation, sampling = self.config.evaluation, sampling_of(self.config.sampling)
        self.drawing.wait()
        with self.generator.ready():
            rows = self.responder.respond(
                self.ranks.share(self.plan.heldout.prompted),
                evaluation.eval_samples,
                Sampling(**{**asdict(sampling), "temperature": evaluation.eval_temperature}),
                key=(self.config.seed, "evaluation", step, *self.drawing.rank_key()),
            )
        parts = self.ranks.gather(rows)
        if parts is None:
            return {}
        rows = [row for part in parts for row in part]
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
        """Write a checkpoint: a plain model folder, or adapters; the flow, and what a resumed run needs."""
        buffers = None if self.online is None else self.ranks.gather(self.online.buffer)
        if not self.ranks.is_first:
            # Weights are gathered together, and rank 0 alone writes them.
            self.engine.save(self.folder.path / "model", self.folder.path / "trainer")
            self.ranks.barrier()
            return
        adapted = self.plan.adapters is not None
        extra = {BASE: self.plan.model.fingerprint.to_dict()} if adapted else {}
        with self.folder.checkpoint(step, keep=self.config.run.keep_checkpoints, extra=extra) as folder:
            self.engine.save(folder / "model", folder / "trainer")
            policy = write_adapters(folder, self.plan) if adapted else None
            if self.online is not None:
                self.online.save(folder, step, policy or model_fingerprint(folder / "model"), buffers or [])
            state = {
                "step": step,
                "counts": asdict(self.counts),
                "problems_drawn": self.drawing.problems_drawn,
                "flow": None if self.online is None else self.online.state(),
            }
            write_atomically(folder / "trainer" / STATE, canonical_json(state))
        self.ranks.barrier()

    def _restore(self, checkpoint: Path) -> None:
        self.engine.load(checkpoint / "trainer")
        state = read_json(checkpoint / "trainer" / STATE)
        self.counts = UpdateCounts(**state["counts"])
        self.drawing.problems_drawn = state["problems_drawn"]
        if self.online is not None:
            self.online.restore(checkpoint, state["flow"])

    def close(self) -> None:
        """Give back engines and graders."""
        self.drawing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_nulls(values_T: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in values_T.tolist()]
