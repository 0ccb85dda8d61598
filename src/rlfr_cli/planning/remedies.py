"""Which option would make a stage fit: each is tried alone, in order, then the first two together, three, and so on.

Options that change no result come first: activations computed again, smaller batches, state shared out or moved to main
memory, a model spread for generation, latents in 8 bits or on the fly; then more GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.planning.reinforcement import longest_response, plan_training, state_of, zero_stage
from rlfr_cli.planning.setting import Recipe, Setting
from rlfr_cli.planning.stages import StagePlan, plan_extraction, plan_fit, plan_generation, plan_scoring

GB = 1e9
MOST_GPUS = 1024
NAMES = {
    "sample": "sample", "extract-latents": "extract", "fit-flow": "fit", "score": "score",
    "train-rl": "train", "eval": "evaluate",
}  # fmt: skip

Fits = Callable[[StagePlan], bool]


@dataclass(frozen=True)
class Remedy:
    """What to give, and the setting with it."""

    text: str
    setting: Setting


def plan_stage(setting: Setting, name: str) -> StagePlan:
    """The estimate of one stage."""
    recipe = setting.recipe
    if name in ("sample", "eval"):
        return plan_generation(setting, name, recipe.sample if name == "sample" else recipe.evaluate)
    plans = {"extract-latents": plan_extraction, "fit-flow": plan_fit, "score": plan_scoring, "train-rl": plan_training}
    return plans[name](setting)


def memory_remedy(setting: Setting, name: str, fits: Fits) -> Remedy | None:
    """The first that lets a stage fit into the GPU's memory; None where nothing does."""
    steps = {
        "sample": [_smaller_generation, _spread_generation],
        "eval": [_smaller_generation, _spread_generation],
        "extract-latents": [_smaller_reading],
        "score": [_smaller_reading],
        "fit-flow": [_smaller_chunks],
        "train-rl": [
            _checkpointing, _smaller_micro_batch, _higher_stage, _offload, _smaller_generation, _spread_generation,
            _more_gpus,
        ],
    }[name]  # fmt: skip
    return _first(setting, name, fits, steps)


def disk_remedy(setting: Setting, name: str, fits: Fits) -> Remedy | None:
    """The first that lets a stage fit onto the disk; None where nothing does."""
    steps = {"extract-latents": [_eight_bits], "train-rl": [_fewer_checkpoints]}.get(name, [])
    remedy = _first(setting, name, fits, steps)
    if remedy is None and name == "extract-latents":
        return Remedy("no extract-latents: fit-flow --model with --rollouts or --data takes latents on the fly", setting)
    return remedy


Step = Callable[[Setting, str], Iterator[Remedy]]


def _first(setting: Setting, name: str, fits: Fits, steps: list[Step]) -> Remedy | None:
    for step in steps:
        for remedy in step(setting, name):
            if fits(plan_stage(remedy.setting, name)):
                return remedy
    texts: list[str] = []
    for step in steps:
        last = None
        for last in step(setting, name):
            if fits(plan_stage(last.setting, name)):
                return Remedy(", ".join([*texts, last.text]), last.setting)
        if last is not None:
            texts, setting = [*texts, last.text], last.setting
    return None


# Each yields its mildest form first.


def _checkpointing(setting: Setting, name: str) -> Iterator[Remedy]:
    if not setting.recipe.train.optimiser.gradient_checkpointing:
        yield Remedy("--gradient-checkpointing", with_option(setting, name, "optimiser.gradient_checkpointing", True))


def _smaller_micro_batch(setting: Setting, name: str) -> Iterator[Remedy]:
    key, now = "optimiser.tokens_per_micro_batch", setting.recipe.train.optimiser.tokens_per_micro_batch
    for tokens in _halved(now, longest_response(setting)):
        yield Remedy(f"--tokens-per-micro-batch {tokens}", with_option(setting, name, key, tokens))


def _higher_stage(setting: Setting, name: str) -> Iterator[Remedy]:
    for stage in range(zero_stage(setting) + 1, 4) if setting.plan.gpus > 1 else ():
        yield Remedy(f"--zero-stage {stage}", with_plan(setting, zero=stage))


def _offload(setting: Setting, name: str) -> Iterator[Remedy]:
    if not setting.plan.offload_optimiser:
        moved = with_plan(setting, offload_optimiser=True, zero=max(1, zero_stage(setting)))
        needed = state_of(moved).in_main_memory * setting.plan.gpus / GB
        yield Remedy(f"--offload-optimiser ({needed:,.0f} GB of main memory)", moved)


def _smaller_generation(setting: Setting, name: str) -> Iterator[Remedy]:
    config: Any = getattr(setting.recipe, NAMES[name])
    if setting.uses_vllm(config.generation):
        return
    for tokens in _halved(config.sampling.tokens_per_batch, setting.plan.prompt_tokens + config.sampling.max_new_tokens):
        key = "sampling.tokens_per_batch"
        yield Remedy(f"--tokens-per-batch {tokens}", with_option(setting, name, key, tokens))


def _spread_generation(setting: Setting, name: str) -> Iterator[Remedy]:
    config: Any = getattr(setting.recipe, NAMES[name])
    spread = setting.tensor_parallel(config.generation)
    while (spread := 2 * spread) <= setting.plan.gpus and setting.model.num_heads % spread == 0:
        chosen = with_plan(setting, engine=EngineName.VLLM, tensor_parallel=spread)
        yield Remedy(f"--engine vllm --tensor-parallel-size {spread}", chosen)


def _smaller_reading(setting: Setting, name: str) -> Iterator[Remedy]:
    config: Any = getattr(setting.recipe, NAMES[name])
    longest = setting.plan.prompt_tokens + setting.recipe.sample.sampling.max_new_tokens
    for tokens in _halved(config.tokens_per_batch, longest):
        yield Remedy(f"--tokens-per-batch {tokens}", with_option(setting, name, "tokens_per_batch", tokens))


def _smaller_chunks(setting: Setting, name: str) -> Iterator[Remedy]:
    for tokens in _halved(setting.recipe.fit.tokens_per_chunk, 256):
        yield Remedy(f"--tokens-per-chunk {tokens}", with_option(setting, name, "tokens_per_chunk", tokens))


def _more_gpus(setting: Setting, name: str) -> Iterator[Remedy]:
    gpus, stage = setting.plan.gpus, zero_stage(setting)
    while (gpus := 2 * gpus) <= MOST_GPUS:
        yield Remedy(f"--gpus {gpus} --zero-stage {max(2, stage)}", with_plan(setting, gpus=gpus, zero=max(2, stage)))


def _eight_bits(setting: Setting, name: str) -> Iterator[Remedy]:
    if setting.recipe.extract.store is not StoreDtype.INT8:
        yield Remedy("--store int8", with_option(setting, name, "store", StoreDtype.INT8))


def _fewer_checkpoints(setting: Setting, name: str) -> Iterator[Remedy]:
    if setting.recipe.train.run.keep_checkpoints > 1:
        yield Remedy("--keep-checkpoints 1", with_option(setting, name, "run.keep_checkpoints", 1))


def _halved(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value


def with_plan(setting: Setting, **changes: Any) -> Setting:
    """The setting with other options of `rlfr plan`."""
    return dataclasses.replace(setting, plan=dataclasses.replace(setting.plan, **changes))


def with_option(setting: Setting, stage: str, key: str, value: Any) -> Setting:
    """The setting with one option of a stage, by its recipe key."""
    field = NAMES[stage]
    config = _replaced(getattr(setting.recipe, field), key.split("."), value)
    recipe: Recipe = dataclasses.replace(setting.recipe, **{field: config})
    return dataclasses.replace(setting, recipe=recipe)


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})
