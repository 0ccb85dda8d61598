"""Which options would make a stage fit.

Each option is tried alone, in order, its mildest value first: activations computed again, smaller batches, state
shared out or moved to main memory, a model spread for generation; for disk, latents in 8 bits or on the fly, fewer
checkpoints. Where none does, they are piled up until they do, and each is then taken back as far as the rest allows,
the last first; then with twice as many GPUs, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.planning.reinforcement import longest_response, plan_training, zero_stage
from rlfr_cli.planning.setting import Recipe, Setting
from rlfr_cli.planning.stages import StagePlan, plan_extraction, plan_fit, plan_generation, plan_scoring, uses_vllm

MOST_GPUS = 1024
NAMES = {
    "sample": "sample",
    "extract-latents": "extract",
    "fit-flow": "fit",
    "score": "score",
    "train-rl": "train",
    "eval": "evaluate",
}
ON_THE_FLY = "fit-flow --model with --rollouts or --data, which takes latents on the fly"


@dataclass(frozen=True)
class Change:
    """An option as a user would write it, and what it does to a setting."""

    text: str
    apply: Callable[[Setting], Setting]


@dataclass(frozen=True)
class Remedy:
    """What to give, and the setting with it."""

    text: str
    setting: Setting


Fits = Callable[[Setting], bool]
Step = Callable[[Setting, str], Iterator[Change]]  # mildest first


def plan_stage(setting: Setting, name: str) -> StagePlan:
    """The estimate of one stage."""
    recipe = setting.recipe
    if name in ("sample", "eval"):
        return plan_generation(setting, name, recipe.sample if name == "sample" else recipe.evaluate)
    plans = {"extract-latents": plan_extraction, "fit-flow": plan_fit, "score": plan_scoring, "train-rl": plan_training}
    return plans[name](setting)


def memory_remedy(setting: Setting, name: str, fits: Callable[[StagePlan], bool]) -> Remedy | None:
    """What lets a stage fit into the GPU's memory; None where nothing does."""
    generation: list[Step] = [_smaller_generation, _spread_generation]
    steps: dict[str, list[Step]] = {
        "sample": generation,
        "eval": generation,
        "extract-latents": [_smaller_reading],
        "score": [_smaller_reading],
        "fit-flow": [_smaller_chunks],
        "train-rl": [_checkpointing, _smaller_micro_batch, _higher_stage, _offload, *generation],
    }

    def fits_with(other: Setting) -> bool:
        return fits(plan_stage(other, name))

    found = _changes(setting, name, fits_with, steps[name])
    more = setting
    while found is None and name == "train-rl" and more.plan.gpus < MOST_GPUS:
        more = _doubled_gpus(more)
        rest = [] if fits_with(more) else _changes(more, name, fits_with, steps[name])
        if rest is not None:
            return _remedy(more, [Change(f"--gpus {more.plan.gpus}", lambda same: same), *rest])
    return None if found is None else _remedy(setting, found)


def disk_remedy(setting: Setting, name: str, fits: Callable[[StagePlan], bool]) -> Remedy | None:
    """What lets a stage fit onto the disk; None where nothing does."""
    steps: dict[str, list[Step]] = {"extract-latents": [_eight_bits], "train-rl": [_fewer_checkpoints]}
    found = _changes(setting, name, lambda other: fits(plan_stage(other, name)), steps.get(name, []))
    if found is None:
        return Remedy(ON_THE_FLY, setting) if name == "extract-latents" else None
    return _remedy(setting, found)


def _remedy(setting: Setting, changes: Sequence[Change]) -> Remedy:
    return Remedy(" ".join(change.text for change in changes), _applied(setting, changes))


def _applied(setting: Setting, changes: Sequence[Change]) -> Setting:
    return reduce(lambda changed, change: change.apply(changed), changes, setting)


def _changes(setting: Setting, name: str, fits: Fits, steps: Sequence[Step]) -> list[Change] | None:
    """One change that is enough, or else several of which each is needed."""
    for step in steps:
        for change in step(setting, name):
            if fits(change.apply(setting)):
                return [change]
    piled: list[list[Change]] = []
    for step in steps:
        forms = list(step(_applied(setting, [forms[-1] for forms in piled]), name))
        piled += [forms] if forms else []
        if fits(_applied(setting, [forms[-1] for forms in piled])):
            break
    else:
        return None
    chosen: list[Change | None] = [forms[-1] for forms in piled]
    for place, forms in reversed(list(enumerate(piled))):
        for option in (None, *forms):
            tried = [*chosen[:place], option, *chosen[place + 1 :]]
            if fits(_applied(setting, [change for change in tried if change is not None])):
                chosen = tried
                break
    return [change for change in chosen if change is not None]


def _checkpointing(setting: Setting, name: str) -> Iterator[Change]:
    if not setting.recipe.train.optimiser.gradient_checkpointing:
        yield _option(name, "--gradient-checkpointing", "optimiser.gradient_checkpointing", True)


def _smaller_micro_batch(setting: Setting, name: str) -> Iterator[Change]:
    for tokens in _halved(setting.recipe.train.optimiser.tokens_per_micro_batch, longest_response(setting)):
        yield _option(name, f"--tokens-per-micro-batch {tokens}", "optimiser.tokens_per_micro_batch", tokens)


def _higher_stage(setting: Setting, name: str) -> Iterator[Change]:
    for stage in range(zero_stage(setting) + 1, 4) if setting.plan.gpus > 1 else ():
        yield _option(name, f"--zero-stage {stage}", "training.zero_stage", stage)


def _offload(setting: Setting, name: str) -> Iterator[Change]:
    training = setting.recipe.train.training
    if not training.offload_optimiser:
        if training.zero_stage == 0:
            moved = dataclasses.replace(training, zero_stage=1, offload_optimiser=True)
            yield _option(name, "--zero-stage 1 --offload-optimiser", "training", moved)
        else:
            yield _option(name, "--offload-optimiser", "training.offload_optimiser", True)
    if training.zero_stage == 3 and not training.offload_parameters:
        moved = dataclasses.replace(training, offload_optimiser=True, offload_parameters=True)
        yield _option(name, "--zero-stage 3 --offload-optimiser --offload-parameters", "training", moved)


def _smaller_generation(setting: Setting, name: str) -> Iterator[Change]:
    config: Any = getattr(setting.recipe, NAMES[name])
    longest = setting.plan.prompt_tokens + config.sampling.max_new_tokens
    for tokens in () if uses_vllm(config) else _halved(config.sampling.tokens_per_batch, longest):
        yield _option(name, f"--tokens-per-batch {tokens}", "sampling.tokens_per_batch", tokens)


def _spread_generation(setting: Setting, name: str) -> Iterator[Change]:
    config: Any = getattr(setting.recipe, NAMES[name])
    spread = config.generation.tensor_parallel_size if uses_vllm(config) else 1
    while (spread := 2 * spread) <= setting.plan.gpus and setting.model.num_heads % spread == 0:
        engine = dataclasses.replace(config.generation, engine=EngineName.VLLM, tensor_parallel_size=spread)
        yield _option(name, f"--engine vllm --tensor-parallel-size {spread}", "generation", engine)


def _smaller_reading(setting: Setting, name: str) -> Iterator[Change]:
    config: Any = getattr(setting.recipe, NAMES[name])
    longest = setting.plan.prompt_tokens + setting.recipe.sample.sampling.max_new_tokens
    for tokens in _halved(config.tokens_per_batch, longest):
        yield _option(name, f"--tokens-per-batch {tokens}", "tokens_per_batch", tokens)


def _smaller_chunks(setting: Setting, name: str) -> Iterator[Change]:
    for tokens in _halved(setting.recipe.fit.tokens_per_chunk, 256):
        yield _option(name, f"--tokens-per-chunk {tokens}", "tokens_per_chunk", tokens)


def _eight_bits(setting: Setting, name: str) -> Iterator[Change]:
    if setting.recipe.extract.store is not StoreDtype.INT8:
        yield _option(name, "--store int8", "store", StoreDtype.INT8)


def _fewer_checkpoints(setting: Setting, name: str) -> Iterator[Change]:
    if setting.recipe.train.run.keep_checkpoints > 1:
        yield _option(name, "--keep-checkpoints 1", "run.keep_checkpoints", 1)


def _doubled_gpus(setting: Setting) -> Setting:
    """Twice the GPUs, with what train-rl shares out between several by itself unless it was asked for more."""
    more = dataclasses.replace(setting, plan=dataclasses.replace(setting.plan, gpus=2 * setting.plan.gpus))
    if zero_stage(more) > 0:
        return more
    return with_option(more, "train-rl", "training.zero_stage", None)


def _halved(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value


def _option(stage: str, text: str, key: str, value: Any) -> Change:
    return Change(text, lambda setting: with_option(setting, stage, key, value))


def with_option(setting: Setting, stage: str, key: str, value: Any) -> Setting:
    """The setting with one option or group of a stage, by its recipe key."""
    field = NAMES[stage]
    config = _replaced(getattr(setting.recipe, field), key.split("."), value)
    recipe: Recipe = dataclasses.replace(setting.recipe, **{field: config})
    return dataclasses.replace(setting, recipe=recipe)


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})
