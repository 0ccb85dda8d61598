"""What each stage but train-rl takes: bytes of one GPU by phase, bytes on disk, operations.

The most a stage holds is what it would with responses of full length; disk and operations count expected lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlfr_cli.artifacts.latents import latents_bytes
from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.config.train_rl import TrainRlConfig
from rlfr_cli.planning.memory import (
    MicroBatch,
    Numbers,
    Parts,
    Phase,
    add,
    cache_bytes,
    reading,
    sampling,
)
from rlfr_cli.planning.setting import VLLM_ROWS, Setting
from rlfr_cli.planning.work import Work, drawing_flops, reading_flops

# Of a token: its id and, as a guess, its text; of a response token its log-probability too.
PROMPT_TOKEN, RESPONSE_TOKEN = 4 + 4, 4 + 4 + 4
SCORE_TOKEN = 3 * 4
Drawing = SampleConfig | EvalConfig | TrainRlConfig


@dataclass(frozen=True)
class StagePlan:
    """An estimate; `disk` is what stays, by artifact."""

    name: str
    phases: tuple[Phase, ...]
    disk: Mapping[str, float]
    work: Work

    @property
    def most(self) -> Phase:
        """The phase that takes most of a GPU."""
        return max(self.phases, key=lambda phase: phase.total)


def uses_vllm(config: Drawing) -> bool:
    """Whether vLLM draws; `auto` takes it on a GPU."""
    return config.generation.engine is not EngineName.HF


def drawing(setting: Setting, config: Drawing, numbers: Numbers, responses: float, group: int) -> Parts:
    """Cache, logits and passing activations of generation; with vLLM its own weights too.

    Args:
        responses: asked of one engine at once.
        group: responses to one prompt.
    """
    prompt, most = setting.plan.prompt_tokens, config.sampling.max_new_tokens
    if uses_vllm(config):
        spread = config.generation.tensor_parallel_size
        rows = min(config.generation.max_num_seqs or VLLM_ROWS, responses)
        cache = rows * (prompt + most) * cache_bytes(setting.model, numbers.compute)
        weights = numbers.compute * setting.model.parameters
        return {"weights": weights / spread, "kv_cache": cache / spread}
    rows = min(max(1, config.sampling.tokens_per_batch // (prompt + most)), responses)
    return sampling(setting.model, numbers, rows, prompt, most, min(rows, 1 + rows / group)).parts


def plan_generation(setting: Setting, name: str, config: SampleConfig | EvalConfig) -> StagePlan:
    """`sample` and `eval`."""
    group = config.group_size if isinstance(config, SampleConfig) else config.num_samples
    model, prompt = setting.model, setting.plan.prompt_tokens
    problems = setting.num_problems(config.problems)
    responses, tokens = problems * group, setting.response_tokens(config.sampling.max_new_tokens)
    numbers = setting.numbers(config)
    parts = drawing(setting, config, numbers, min(problems, config.problems_per_shard) * group, group)
    if not uses_vllm(config):
        parts = add(parts, {"weights": numbers.weight * model.parameters})
    work = Work(
        tokens=responses * tokens,
        gpus=setting.plan.gpus,
        generation=drawing_flops(model, problems, responses, prompt, tokens),
    )
    disk = {"rollouts": rollout_bytes(responses, prompt, tokens, RESPONSE_TOKEN)}
    return StagePlan(name, (Phase("generate", add(parts)),), disk, work)


def plan_extraction(setting: Setting) -> StagePlan:
    """`extract-latents`."""
    config, model = setting.recipe.extract, setting.model
    responses, tokens = setting.responses_read()
    blocks, states = setting.blocks_extracted()
    kept = responses * (tokens + config.max_shift)
    shards = -(-responses // config.problems_per_shard)
    reads = read_responses(setting, setting.numbers(config), config.tokens_per_batch, blocks, states)
    disk = latents_bytes(kept, states, model.hidden_size, str(config.store), num_shards=shards)
    flops = reading_flops(model, responses, setting.plan.prompt_tokens, tokens, blocks, head=False)
    work = Work(responses * tokens, setting.plan.gpus, other={"reading": flops})
    return StagePlan("extract-latents", (Phase("read", add(reads)),), {"latents": disk}, work)


def plan_fit(setting: Setting) -> StagePlan:
    """`fit-flow`, whose steps are shared out over the GPUs; each holds the whole flow."""
    config, model, flow = setting.recipe.fit, setting.model, setting.flow_sizes()
    options, numbers = config.optimiser, setting.numbers(config, trains=True)
    responses, tokens = setting.responses_read()
    used = min(tokens + 1, options.max_sequence_tokens)
    training = responses - min(config.max_holdout_sequences, round(config.holdout_fraction * responses))
    steps = options.steps if options.steps is not None else options.epochs * training / options.sequences_per_step
    longest = max(used, min(setting.recipe.sample.sampling.max_new_tokens + 1, options.max_sequence_tokens))
    at_once = -(-min(options.sequences_per_step, training) // setting.plan.gpus) * longest
    resting = {"weights": 4 * flow.parameters, "optimiser": 8 * flow.parameters}
    # Sequences as they were read, and packed.
    latents = {"latents": 2 * flow.latents_bytes(at_once, 4 if str(config.store) == "int8" else 2)}
    fitting = flow.fitting_bytes(at_once, config.tokens_per_chunk, casts=numbers.casts)
    step = add(resting, latents, {"gradients": 4 * flow.parameters, "activations": fitting})
    foreach = 4 * flow.parameters if numbers.on_gpu else 0  # a step of all weights at once
    stepping = {"gradients": 4 * flow.parameters, "activations": max(foreach, flow.summing_bytes(setting.plan.gpus))}
    phases = [Phase("fit", step), Phase("optimiser step", add(resting, stepping))]
    seen = steps * options.sequences_per_step * used
    other = {"flow": seen * flow.fitting_flops(options.noise_repeats)}
    if config.model is not None:
        blocks = setting.blocks_tapped()
        reads = read_responses(setting, setting.numbers(config), config.tokens_per_batch, blocks, flow.states)
        phases.insert(0, Phase("read", add(resting, reads)))
        policy = {"weights": setting.numbers(config).weight * model.decoder_parameters(blocks)}
        phases[1:] = [Phase(phase.name, add(phase.parts, policy)) for phase in phases[1:]]
        read = steps * options.sequences_per_step
        other["reading"] = reading_flops(model, read, setting.plan.prompt_tokens, used, blocks, head=False)
    disk = {"flow": 4 * flow.parameters, "its fit": 16 * flow.parameters}
    return StagePlan("fit-flow", tuple(phases), disk, Work(seen, setting.plan.gpus, other=other))


def plan_scoring(setting: Setting) -> StagePlan:
    """`score` of the rollouts of `sample`, or of latents."""
    config, model, flow, sample = setting.recipe.score, setting.model, setting.flow_sizes(), setting.recipe.sample
    reward, numbers = config.flow_reward, setting.numbers(config)
    problems = min(setting.num_problems(sample.problems), config.limit or setting.plan.num_problems)
    responses, tokens = problems * sample.group_size, setting.response_tokens(sample.sampling.max_new_tokens)
    held = {"flow": 4 * flow.parameters}
    scoring = flow.scoring_bytes(
        config.tokens_per_batch, len(reward.timestep), reward.num_draws, casts=numbers.compute < 4
    )
    # As they were read (tapped, then stacked) and as they are paired.
    copies = 2 if config.latents is not None else 3
    latents = {"latents": copies * flow.latents_bytes(config.tokens_per_batch, numbers.weight)}
    other = {"flow": responses * tokens * flow.scoring_flops(len(reward.timestep), reward.num_draws)}
    phases = [Phase("score", add(held, latents, {"flow": scoring}))]
    if config.latents is None:
        blocks = setting.blocks_tapped()
        policy = {"weights": numbers.weight * model.decoder_parameters(blocks)}
        reads = read_responses(setting, numbers, config.tokens_per_batch, blocks, flow.states)
        phases = [Phase("read", add(held, reads)), Phase("score", add(phases[0].parts, policy))]
        other["reading"] = reading_flops(model, responses, setting.plan.prompt_tokens, tokens, blocks, head=False)
    each = SCORE_TOKEN + (4 * len(reward.timestep) * flow.layers if config.per_layer else 0)
    work = Work(responses * tokens, setting.plan.gpus, other=other)
    return StagePlan("score", tuple(phases), {"scores": responses * tokens * each}, work)


def read_responses(setting: Setting, numbers: Numbers, tokens_per_batch: int, blocks: int, states: int) -> Parts:
    """A truncated decoder, a batch that passes through it, and the latents of the batch, stacked."""
    longest = setting.plan.prompt_tokens + setting.recipe.sample.sampling.max_new_tokens
    batch = MicroBatch(max(tokens_per_batch, longest), 0)
    weights = {"weights": numbers.weight * setting.model.decoder_parameters(blocks)}
    latents = {"latents": 2 * batch.tokens * states * setting.model.hidden_size * numbers.weight}
    return add(weights, latents, reading(setting.model, numbers, batch, blocks, head=False).parts)


def rollout_bytes(responses: float, prompt: float, response: float, response_token: float) -> float:
    """Rollouts on disk, with this many bytes a response token."""
    return responses * (prompt * PROMPT_TOKEN + response * response_token)
