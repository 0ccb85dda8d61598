"""`rlfr train-rl`: GRPO with the flow reward, or without it (plain RLVR).

Reads a policy, problems and, if any, a flow; writes a run folder: checkpoints (model and flow), metrics, rollouts.
A step, in the order of DESIGN:
  1. draw a group of responses to each problem of the step, grade and reward them (``rl/rollouts.py``);
  2. one forward pass: old log-probabilities, entropies, latents; score them with the flow as it was
     (``rl/measuring.py``); advantages from outcome and flow rewards (``rl/advantages.py``);
  3. optimiser steps on the policy (``rl/updating.py``, ``rl/policy_loss.py``);
  4. the flow learns from accepted responses (``rl/online.py``).
Every random number is keyed by (seed, step), so a resumed run needs counters, weights and moments only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.flow_file import FlowHeader, check_flow_fits, flow_fingerprint, read_flow_header
from rlfr_cli.artifacts.rollouts import rollout_table
from rlfr_cli.artifacts.run_folder import RunFolder, step_of
from rlfr_cli.config.common import ProblemsConfig
from rlfr_cli.config.engine import EngineName, WeightTransfer
from rlfr_cli.config.fields import to_table
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.config.lora import LoraCheckpoint
from rlfr_cli.config.rl import OnlineConfig
from rlfr_cli.config.train_rl import CoefficientConfig, TrainRlConfig
from rlfr_cli.engines.opening import EngineChoice, choose_engine
from rlfr_cli.engines.ranks import Ranks, open_ranks
from rlfr_cli.errors import ConfigError, Stopped, StoppedAtOnce, during_work
from rlfr_cli.flow.reference import ReferenceRules
from rlfr_cli.grading.pool import GradingPool
from rlfr_cli.grading.rewards import RewardFunction, load_reward
from rlfr_cli.policy.adapters import Adapters, plan_adapters
from rlfr_cli.policy.loading import resolve_placement, stored_dtype_of
from rlfr_cli.policy.tapping import tapped_layers
from rlfr_cli.report.run_logs import RunLogs
from rlfr_cli.rl.choices import KLEstimator, KLPlace
from rlfr_cli.rl.rollouts import PromptedProblem
from rlfr_cli.stages.common import (
    ModelInput,
    PromptedProblems,
    grading_pool,
    open_model,
    prompt_problems,
    reward_inputs,
)
from rlfr_cli.stages.flows import new_header
from rlfr_cli.stages.latent_sequences import LatentSequences, check_latents_fit
from rlfr_cli.stages.rules import load_rules, rule_inputs
from rlfr_cli.stages.trainer import StopRequest, Trainer

EXPERT_TOKENS = 8192  # of an expert response, prompt tokens included, as in the published fit


@dataclass(frozen=True)
class Plan:
    """Everything checked and opened, no weights loaded.

    Attributes:
        header: of the flow, or None for plain RLVR.
        expert: latents of expert responses for the online update, if any.
        engine: what draws the responses; chosen, not open.
        total_steps: rollout batches of the whole run.
        adapters: what is trained in place of the policy's own weights, or None.
    """

    config: TrainRlConfig
    model: ModelInput
    problems: PromptedProblems
    heldout: PromptedProblems | None
    header: FlowHeader | None
    expert: LatentSequences | None
    engine: EngineChoice
    rules: ReferenceRules
    reward: RewardFunction
    total_steps: int
    inputs: dict[str, Any]
    adapters: Adapters | None

    def describe(self) -> dict[str, Any]:
        """What the run will do, in numbers."""
        rollout, optimiser = self.config.rollout, self.config.optimiser
        responses = rollout.prompts_per_step * rollout.group_size
        minibatches = math.ceil(responses / optimiser.minibatch_responses)
        return {
            "out": str(self.config.out),
            "steps": self.total_steps,
            "problems": len(self.problems.prompted),
            "responses_per_step": responses,
            "optimiser_steps": self.total_steps * minibatches * optimiser.epochs_per_batch,
            "trained": self.trained_text(),
            "flow": self.flow_text(),
            "checkpoint_bytes": self.checkpoint_bytes(),
        }

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: weights, moments, float32 weights if stored otherwise, adapters, flow."""
        stored = sum(file.stat().st_size for file in self.model.folder.glob("*.safetensors"))
        itemsize = stored_dtype_of(self.model.config).itemsize
        parameters = stored // itemsize
        flow = 0
        if self.header is not None:
            width, depth = self.header.width, self.header.depth
            flow = 12 * ((14 + 10 * depth) * width**2 + 4 * width * self.header.num_frequencies) // 2
        if self.adapters is None:
            return stored + parameters * (8 if itemsize == 4 else 12) + flow
        merged = stored if self.config.lora.checkpoint is LoraCheckpoint.MERGED else 0
        return merged + 16 * self.adapters.num_parameters + flow

    def trained_text(self) -> str:
        """What the optimiser steps."""
        if self.adapters is None:
            return "the whole policy"
        adapters = self.adapters
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in adapters.targets))
        return f"adapters of rank {adapters.rank} on {layers}: {adapters.num_parameters:,} weights"

    def flow_text(self) -> str:
        """Which flow pays token rewards, and whether it learns."""
        if self.header is None:
            scores = self.config.scores
            return "none: plain RLVR" if scores.needs_flow else f"none; tokens are paid by their {scores}"
        contexts = ", ".join(self.header.contexts)
        begin = "new" if self.config.new_flow else str(self.config.flow)
        online = self.config.online.online_steps
        update = f"{online} online steps a batch" if online else "kept as it is"
        return f"{begin}, blocks {list(self.header.layer_indices)}, context {contexts}, {update}"


def run(config: TrainRlConfig) -> dict[str, Any] | None:
    """Train a policy; returns a summary, and None in all processes but the first.

    Raises:
        RlfrError: anything wrong with config, inputs or run folder, before work starts.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    with open_ranks(
        resolve_placement(config.device, config.dtype).device,
        timeout=timedelta(minutes=config.training.collective_timeout),
    ) as ranks:
        if not ranks.alone:
            config = replace(config, device=str(ranks.device))
            # What is said once is said by rank 0; errors are said by whoever meets them.
            console.set_quiet(console.is_quiet() or not ranks.is_first)
        return _run(config, ranks)


def _run(config: TrainRlConfig, ranks: Ranks) -> dict[str, Any] | None:
    with grading_pool(config.grading) as pool:
        plan = _plan(config, pool, ranks)
        _check_ranks(config, ranks)
        if config.dry_run:
            RunFolder.check_for_writing(
                config.out,
                config=to_table(config, for_artifact=True),
                inputs=plan.inputs,
                overwrite=config.overwrite,
                resume=config.resume,
            )
            return {"dry_run": True, **plan.describe()}
        if not ranks.is_first:
            ranks.barrier()  # until rank 0 has opened the folder
            _follow(plan, RunFolder.open(config.out), pool, ranks)
            return None
        folder = RunFolder.create(
            config.out,
            config=to_table(config, for_artifact=True),
            inputs=plan.inputs,
            overwrite=config.overwrite,
            resume=config.resume,
        )
        ranks.barrier()
        for difference in folder.version_differences:
            console.warn(f"{config.out} was begun with other versions: {difference}")
        done = folder.latest_step()
        ranks.broadcast(done)
        if done >= plan.total_steps:
            console.log(f"{config.out} is complete already ({done} steps); nothing to do")
            return _summary(plan, folder)
        if folder.resumed:
            console.log(f"resuming {config.out} after step {done}")
        console.log(f"training for {plan.total_steps} steps; {plan.trained_text()}; flow: {plan.flow_text()}")
        with during_work():
            try:
                _train(plan, folder, pool, ranks)
            except KeyboardInterrupt:
                raise StoppedAtOnce(
                    f"stopped at once; {config.out} keeps its last checkpoint, of step {folder.latest_step()}",
                    hint="the same command with --resume goes on",
                ) from None
        return _summary(plan, folder)


def _follow(plan: Plan, folder: RunFolder, pool: GradingPool, ranks: Ranks) -> None:
    """The run of every rank but the first, which reads and writes for them all and says what happens."""
    if ranks.broadcast(0) < plan.total_steps:
        with during_work(), suppress(Stopped):
            _train(plan, folder, pool, ranks)


def _check_ranks(config: TrainRlConfig, ranks: Ranks) -> None:
    if config.rollout.prompts_per_step < ranks.world_size:
        raise ConfigError(
            f"{ranks.world_size} processes share out --prompts-per-step {config.rollout.prompts_per_step}",
            hint="start no more processes than problems of a step",
        )


def _plan(config: TrainRlConfig, pool: GradingPool, ranks: Ranks) -> Plan:
    rules = load_rules(config.online.accept, "--accept")
    reward = load_reward(config.grading.reward)
    model = open_model(config.model, config)
    adapters = None
    if config.lora.rank > 0:
        adapters = plan_adapters(config.lora, model.config, config.trust_remote_code)
    header = _flow_header(config, model)
    new_tokens = config.sampling.max_new_tokens
    problems = prompt_problems(config.problems, config.prompt, model, pool, new_tokens)
    inputs = {
        "model": model.fingerprint.to_dict(),
        **problems.inputs(),
        **reward_inputs(config.grading, config.prompt),
        **rule_inputs(config.online.accept),
    }
    heldout_config, heldout = _heldout_problems(config), None
    if heldout_config is not None:
        heldout = prompt_problems(heldout_config, config.prompt, model, pool, new_tokens)
        inputs["heldout_problems"] = heldout.fingerprint
    if config.flow is not None:
        inputs["flow"] = flow_fingerprint(config.flow)
    expert = _expert_latents(config, header)
    if expert is not None:
        inputs["expert_latents"] = expert.fingerprints[0]
    if config.policy_loss.reference_model is not None:
        reference = open_model(config.policy_loss.reference_model, config)
        if reference.fingerprint.vocab_size != model.fingerprint.vocab_size:
            raise ConfigError(
                f"--reference-model has a vocabulary of {reference.fingerprint.vocab_size}, the policy one of "
                f"{model.fingerprint.vocab_size}"
            )
        inputs["reference_model"] = reference.fingerprint.to_dict()
    if header is None:
        _warn_of_unused(config)
    else:
        shift = max(pairing["shift"] for pairing in header.pairings)
        _check_prompts(problems.prompted, shift)
    loss = config.policy_loss
    if loss.kl_coef > 0 and loss.kl_in is KLPlace.LOSS and loss.kl_estimator is KLEstimator.K1 and not loss.kl_ratio:
        console.warn("--kl-estimator k1 in the loss has a gradient of mean 0, no pull to the reference; use k2 or k3")
    total_steps = config.rollout.steps or math.ceil(
        config.rollout.episodes * len(problems.prompted) / config.rollout.prompts_per_step
    )
    engine = _engine(config, model, [problems] if heldout is None else [problems, heldout], ranks)
    if config.generation.engine is EngineName.AUTO:
        inputs["engine"] = str(engine.name)
    return Plan(config, model, problems, heldout, header, expert, engine, rules, reward, total_steps, inputs, adapters)


def _engine(config: TrainRlConfig, model: ModelInput, asked: Sequence[PromptedProblems], ranks: Ranks) -> EngineChoice:
    """The generation engine: on a GPU of its own, or on the trainer's, where it sleeps while that works."""
    on_gpu = model.placement.device.type == "cuda"
    devices: tuple[int, ...] = ()
    if config.separation.engine_device:
        processes = int(ranks.max(ranks.local_rank)) + 1
        devices = engine_devices(config, model.placement.device, ranks.local_rank, processes)
    choice = choose_engine(
        config.generation,
        config.sampling,
        model,
        [entry.prompt_token_ids for problems in asked for entry in problems.prompted],
        sleeps=on_gpu and not devices,
        weight_transfer=(WeightTransfer.NCCL if devices else WeightTransfer.IPC) if on_gpu else WeightTransfer.FILE,
        devices=devices,
    )
    if config.separation.overlap:
        check_overlap(config, choice, ranks)
    return choice


def engine_devices(config: TrainRlConfig, device: torch.device, local_rank: int, processes: int) -> tuple[int, ...]:
    """The GPUs of this process's vLLM, out of those that --engine-device names.

    Args:
        device: of the trainer.
        local_rank: its place on its machine.
        processes: of the machine that has the most of them.

    Raises:
        ConfigError: no GPUs at all, too few, too many, or the trainer's own.
    """
    given = config.separation.engine_device
    listed = " ".join(f"--engine-device {index}" for index in given)
    if device.type != "cuda":
        raise ConfigError(
            f"{listed}: the trainer's --device is {device}, where vLLM is apart from it already", hint="leave it out"
        )
    own = device.index or 0
    if own in given:
        raise ConfigError(
            f"{listed}: GPU {own} is the trainer's",
            hint="training processes take the first GPUs of a machine; give vLLM those after them",
        )
    size = config.generation.tensor_parallel_size * config.generation.data_parallel_size
    mine = given[local_rank * size : (local_rank + 1) * size]
    if len(mine) < size:
        raise ConfigError(
            f"{listed}: process {local_rank + 1} of this machine has none left; each one's vLLM takes {size}",
            hint="give more GPUs, start fewer processes, or lower --tensor-parallel-size and --data-parallel-size",
        )
    if unused := given[processes * size :]:
        raise ConfigError(
            f"{listed}: GPU {', '.join(map(str, unused))} would do nothing; {processes} training "
            f"{'process' if processes == 1 else 'processes'} of a machine, each with a vLLM on {size}, take "
            f"{processes * size}",
            hint="leave it out, or raise --data-parallel-size or --tensor-parallel-size",
        )
    return mine


def check_overlap(config: TrainRlConfig, choice: EngineChoice, ranks: Ranks) -> None:
    """Refuse an overlap that cannot be.

    Raises:
        ConfigError: the engine is the trainer's own model, or sleeps on its GPU, or processes would have to agree on
            rounds of dynamic sampling while they train.
    """
    if choice.name is EngineName.HF:
        raise ConfigError("--overlap: --engine auto chose hf, where the trainer's own model draws")
    if choice.model.placement.device.type == "cuda" and not config.separation.engine_device:
        raise ConfigError(
            "--overlap needs GPUs on which vLLM can draw while the trainer works", hint="give it one by --engine-device"
        )
    if config.rollout.dynamic_sampling and not ranks.alone:
        raise ConfigError("--overlap and --dynamic-sampling exclude each other where several processes train")


def _warn_of_unused(config: TrainRlConfig) -> None:
    """Say so when options of the flow, or of rewards for tokens, differ from their defaults and nothing reads them."""
    if config.online != OnlineConfig() or config.allow_other_weights:
        console.warn("neither --flow nor --new-flow: the options of the flow's online update are not used")
    paid = config.flow_reward != FlowRewardConfig() or config.coefficient != CoefficientConfig()
    if paid and not config.has_token_rewards:
        console.warn("neither --flow nor --new-flow: plain RLVR, and the options of the flow reward are not used")


def _expert_latents(config: TrainRlConfig, header: FlowHeader | None) -> LatentSequences | None:
    """Expert latents that fit the flow; None without them, or without a flow.

    Raises:
        MismatchError: they are of another model, or of other layers than the flow's.
    """
    if config.online.expert_latents is None or header is None:
        return None
    latents = LatentSequences([config.online.expert_latents], EXPERT_TOKENS)
    check_latents_fit(header, latents.folders[0])
    return latents.of_states(header.tapped)


def _heldout_problems(config: TrainRlConfig) -> ProblemsConfig | None:
    """The columns of the training problems, with the held-out file and its limit."""
    evaluation = config.evaluation
    if evaluation.eval_data is None:
        return None
    return replace(config.problems, data=evaluation.eval_data, limit=evaluation.eval_limit)


def _flow_header(config: TrainRlConfig, model: ModelInput) -> FlowHeader | None:
    if config.flow is not None:
        header = read_flow_header(config.flow)
        for warning in check_flow_fits(
            header,
            model=model.fingerprint,
            allow_other_weights=config.allow_other_weights,
            other_weights="error",
        ):
            console.warn(warning)
        return header
    if not config.new_flow:
        return None
    layers = tapped_layers(model.fingerprint.num_blocks, config.layer_fraction)
    return new_header(config.network, model=model.fingerprint, layer_indices=layers, rms_epsilon=model.rms_epsilon)


def _check_prompts(prompted: Sequence[PromptedProblem], shift: int) -> None:
    for entry in prompted:
        if len(entry.prompt_token_ids) < shift:
            raise ConfigError(
                f"problem {entry.problem.problem_id}: its prompt has {len(entry.prompt_token_ids)} tokens, and the "
                f"flow's shift of {shift} needs as many"
            )


def _train(plan: Plan, folder: RunFolder, pool: GradingPool, ranks: Ranks) -> None:
    """The loop over steps; each may end in an evaluation, a checkpoint, or the stop that was asked for.

    All ranks go through it side by side; what is written is written by rank 0.
    """
    config = plan.config
    begun, checkpoint = ranks.broadcast((bool(folder.read_metrics()), folder.latest_checkpoint()))
    start = 0 if checkpoint is None else step_of(checkpoint)
    with (
        Trainer(plan, folder, pool, checkpoint, ranks) as trainer,
        StopRequest() as stop,
        RunLogs(config, folder.path, start) if ranks.is_first else nullcontext() as logs,
    ):
        # A run that was stopped before its first checkpoint has this line already.
        if plan.heldout is not None and start == 0 and not begun:
            metrics = trainer.evaluate(0)
            if logs is not None:
                logs.add(folder, 0, metrics)
        with console.progress("training", total=plan.total_steps, unit="steps", done=start) as bar:
            for step in range(start + 1, plan.total_steps + 1):
                result = trainer.step(step)
                metrics = result.metrics
                last = step == plan.total_steps
                if plan.heldout is not None and (last or step % config.evaluation.eval_every == 0):
                    metrics |= trainer.evaluate(step)
                if logs is not None:
                    folder.write_rollouts(step, rollout_table(result.rows, run=True))
                    logs.add(folder, step, metrics)
                    bar.advance(1, note=_note(metrics))
                stopping = ranks.any(stop.requested)
                if last or stopping or step % config.run.save_every == 0:
                    trainer.save(step)
                if stopping and not last:
                    raise Stopped(
                        f"stopped after step {step} of {plan.total_steps}; its checkpoint is in {config.out}",
                        hint="the same command with --resume goes on",
                    )


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"reward {metrics['rollout/reward']:.3f}", f"accuracy {metrics['rollout/accuracy']:.3f}"]
    if metrics.get("eval/accuracy") is not None:
        parts.append(f"held-out {metrics['eval/accuracy']:.3f}")
    if metrics.get("flow/loss") is not None:
        parts.append(f"flow loss {metrics['flow/loss']:.3g}")
    return ", ".join(parts)


def _summary(plan: Plan, folder: RunFolder) -> dict[str, Any]:
    metrics = folder.read_metrics()
    last = metrics[-1] if metrics else {}
    evaluations = [line for line in metrics if line.get("eval/accuracy") is not None]
    checkpoint = folder.latest_checkpoint()
    summary: dict[str, Any] = {
        "out": str(plan.config.out),
        "steps": folder.latest_step(),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "reward": last.get("rollout/reward"),
        "accuracy": last.get("rollout/accuracy"),
        "skipped_optimiser_steps": last.get("policy/skipped_steps"),
    }
    if evaluations:
        summary["heldout_accuracy_first"] = evaluations[0]["eval/accuracy"]
        summary["heldout_accuracy_last"] = evaluations[-1]["eval/accuracy"]
    return summary
