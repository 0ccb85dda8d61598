"""What `train-rl` takes: bytes of one GPU by phase of a step, bytes on disk, operations.

A rollout batch is shared out over the GPUs. From the measuring pass to the flow's online update a GPU keeps the latents
of every response that the flow may learn from; counted are all of them, as if every response were accepted. The
online update packs them once more and draws noise for all their tokens at once.
"""

from __future__ import annotations

import math

from rlfr_cli.config.lora import LoraCheckpoint
from rlfr_cli.flow.matching import DEFAULT_TOKENS_PER_CHUNK
from rlfr_cli.planning.flow_sizes import FlowSizes
from rlfr_cli.planning.memory import MicroBatch, Numbers, Parts, Phase, add, largest, reading, updating
from rlfr_cli.planning.setting import Setting
from rlfr_cli.planning.stages import RESPONSE_TOKEN, StagePlan, drawing, rollout_bytes
from rlfr_cli.planning.training_state import TrainingState, training_state
from rlfr_cli.planning.work import Work, drawing_flops, reading_flops, training_flops

TRAINING_COLUMNS = 6 * 4  # float32 numbers of a response token that training adds to rollouts


def plan_training(setting: Setting) -> StagePlan:
    """`train-rl`."""
    flow = None if setting.plan.plain_rlvr else setting.flow_sizes()
    return StagePlan("train-rl", _phases(setting, flow), _disk(setting, flow), _work(setting, flow))


def state_of(setting: Setting) -> TrainingState:
    """Weights, moments and gradients of one GPU."""
    config = setting.recipe.train
    return training_state(
        setting.model,
        setting.numbers(config, trains=True),
        zero_stage(setting),
        setting.plan.gpus,
        adapters=setting.adapter_weights(),
        offload_optimiser=config.training.offload_optimiser,
        offload_parameters=config.training.offload_parameters,
    )


def zero_stage(setting: Setting) -> int:
    """What train-rl shares out, with one process a GPU."""
    return setting.recipe.train.training.resolve_stage(setting.plan.gpus)


def longest_response(setting: Setting) -> int:
    """Tokens of a prompt and a response of full length."""
    return setting.plan.prompt_tokens + setting.recipe.train.sampling.max_new_tokens


def micro_batch(setting: Setting, responses: float) -> MicroBatch:
    """The largest micro-batch out of so many responses of full length."""
    config, longest = setting.recipe.train, longest_response(setting)
    tokens = min(responses * longest, max(config.optimiser.tokens_per_micro_batch, longest))
    return MicroBatch(tokens, tokens * config.sampling.max_new_tokens / longest)


def _phases(setting: Setting, flow: FlowSizes | None) -> tuple[Phase, ...]:
    config, model, gpus, state = setting.recipe.train, setting.model, setting.plan.gpus, state_of(setting)
    numbers, reward = state.numbers, config.flow_reward
    responses = config.rollout.prompts_per_step * config.rollout.group_size / gpus
    resting, latents = add(state.resting, _reference(setting)), {"latents": 0.0}
    if flow is not None:
        learns = config.online.online_steps > 0
        resting = add(resting, {"flow": (12 if learns else 4) * flow.parameters})
        tokens = responses * (setting.response_tokens(config.sampling.max_new_tokens) + config.network.shift)
        kept = tokens + config.online.buffer_responses / gpus * longest_response(setting)
        latents = {"latents": flow.latents_bytes(kept, numbers.weight) if learns else 0.0}
    draws = drawing(setting, config, numbers, responses, config.rollout.group_size)
    whole = {"weights": state.whole}
    # A minibatch is drawn from the responses of all GPUs, and one may have to do most of it.
    minibatch = min(config.optimiser.minibatch_responses, responses)
    whole_batch, batch = micro_batch(setting, responses), micro_batch(setting, minibatch)
    reads = [reading(model, numbers, whole_batch, model.num_blocks).parts]
    measured = latents
    if flow is not None:
        of_batch = flow.latents_bytes(whole_batch.predicted, numbers.weight)
        measured = {"latents": max(latents["latents"], of_batch)}
        scoring = flow.scoring_bytes(
            whole_batch.predicted, len(reward.timestep), reward.num_draws, casts=numbers.compute < 4
        )
        # As they were tapped and as they are paired, beside those that are kept.
        reads.append({"flow": scoring, "latents": 2 * of_batch})
    after = add(resting, latents)
    gradients = {"gradients": state.gradients}
    frozen = setting.adapter_weights() > 0
    update = updating(model, numbers, batch, checkpointing=config.optimiser.gradient_checkpointing, frozen=frozen)
    phases = [
        Phase("generate", add(resting, whole, draws)),
        largest("measure", *(add(resting, measured, whole, read) for read in reads)),
        Phase("update", add(after, gradients, update.parts)),
        Phase("optimiser step", add(after, gradients, {"optimiser": state.stepping})),
    ]
    if flow is not None and config.online.online_steps > 0:
        phases.append(Phase("flow update", add(after, _flow_update(setting, flow, kept, numbers))))
    return tuple(phases)


def _flow_update(setting: Setting, flow: FlowSizes, kept: float, numbers: Numbers) -> Parts:
    """Beside the kept latents of so many tokens: those of experts, all packed, and the passes of the fit."""
    online = setting.recipe.train.online
    odds = 0 if online.expert_latents is None else online.expert_share / (1 - online.expert_share)
    # Passes of a chunk and all tokens' noise; afterwards sums over GPUs, and the step of all weights at once.
    passes = flow.fitting_bytes((1 + odds) * kept, DEFAULT_TOKENS_PER_CHUNK, casts=numbers.compute < 4)
    afterwards = max(4 * flow.parameters, flow.summing_bytes(setting.plan.gpus))
    return {
        "latents": (1 + 2 * odds) * flow.latents_bytes(kept, numbers.weight),
        "flow": 4 * flow.parameters + max(passes, afterwards),
    }


def _reference(setting: Setting) -> Parts:
    """Weights of the reference policy, taken to be of the policy's size."""
    config = setting.recipe.train
    if config.policy_loss.reference_model is None:
        return {}
    return {"weights": setting.numbers(config).weight * setting.model.parameters}


def num_steps(setting: Setting) -> int:
    """Rollout batches of the run."""
    rollout = setting.recipe.train.rollout
    if rollout.steps is not None:
        return rollout.steps
    return math.ceil(rollout.episodes * setting.num_problems(setting.recipe.train.problems) / rollout.prompts_per_step)


def _disk(setting: Setting, flow: FlowSizes | None) -> dict[str, float]:
    config, model, prompt = setting.recipe.train, setting.model, setting.plan.prompt_tokens
    responses = num_steps(setting) * config.rollout.prompts_per_step * config.rollout.group_size
    tokens = setting.response_tokens(config.sampling.max_new_tokens)
    weights, adapters = model.stored_bytes * model.parameters, setting.adapter_weights()
    if adapters:
        merged = weights if config.lora.checkpoint is LoraCheckpoint.MERGED else 0
        policy = merged + 16 * adapters  # twice in float32, with two moments
    else:
        policy = weights + (8 if model.stored_bytes == 4 else 12) * model.parameters
    checkpoint = policy + (0 if flow is None else 12 * flow.parameters)
    # One more lies beside those that are kept while it is written.
    return {
        "rollouts": rollout_bytes(responses, prompt, tokens, RESPONSE_TOKEN + TRAINING_COLUMNS),
        "checkpoints": (config.run.keep_checkpoints + 1) * checkpoint,
    }


def _work(setting: Setting, flow: FlowSizes | None) -> Work:
    config, model, prompt = setting.recipe.train, setting.model, setting.plan.prompt_tokens
    steps, group, optimiser = num_steps(setting), config.rollout.group_size, config.optimiser
    responses = steps * config.rollout.prompts_per_step * group
    tokens = setting.response_tokens(config.sampling.max_new_tokens)
    policies = 1 if config.policy_loss.reference_model is None else 2
    other = {
        "reading": policies * reading_flops(model, responses, prompt, tokens, model.num_blocks, head=True),
        "training": optimiser.epochs_per_batch
        * training_flops(
            model,
            responses,
            prompt,
            tokens,
            checkpointing=optimiser.gradient_checkpointing,
            frozen=setting.adapter_weights() > 0,
        ),
    }
    if flow is not None:
        reward, online = config.flow_reward, config.online
        scores = flow.scoring_flops(len(reward.timestep), reward.num_draws)
        fits = online.online_steps * flow.fitting_flops(online.online_noise_repeats)
        other["flow"] = responses * tokens * (scores + fits)
    drawn = drawing_flops(model, responses / group, responses, prompt, tokens)
    return Work(responses * tokens, setting.plan.gpus, generation=drawn + _evaluation(setting, steps), other=other)


def _evaluation(setting: Setting, steps: int) -> float:
    """Operations of the run's evaluations on held-out problems, the first before its first step."""
    config, prompt = setting.recipe.train, setting.plan.prompt_tokens
    evaluation = config.evaluation
    if evaluation.eval_data is None:
        return 0.0
    problems = min(setting.plan.num_problems, evaluation.eval_limit or setting.plan.num_problems)
    times = 1 + math.ceil(steps / evaluation.eval_every)
    tokens = setting.response_tokens(config.sampling.max_new_tokens)
    return times * drawing_flops(setting.model, problems, problems * evaluation.eval_samples, prompt, tokens)
