"""`rlfr plan`: what a recipe would take of memory, disk and time, and which option would make it fit.

Reads a model's config.json and a recipe, and writes nothing. Inputs that the recipe names are not opened: how many
problems and tokens there are is said by options. The formulas are in the modules of ``planning/``, each in its first
lines; how near they come to what torch allocates is measured by ``benchmarks/memory.py``. Guesses, and what was not
measured, are among what is printed.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from rlfr_cli import console
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.fields import StageConfig, leaf_options
from rlfr_cli.config.plan import PLANNED, PlanConfig
from rlfr_cli.config.recipe import read_recipe, resolve
from rlfr_cli.planning.model_sizes import read_model_sizes
from rlfr_cli.planning.reinforcement import state_of, zero_stage
from rlfr_cli.planning.remedies import NAMES, disk_remedy, memory_remedy, plan_stage
from rlfr_cli.planning.setting import Recipe, Setting
from rlfr_cli.planning.stages import StagePlan
from rlfr_cli.report import plan_tables
from rlfr_cli.report.plan_tables import GB

NOTHING = "nothing that was tried"

# What a command asks for and an estimate does not open.
GIVEN = {"model": "-", "data": "-", "flow": "-"}
# Where a stage has several sources, and the one that is taken where the recipe names none: expert solutions, and their
# latents; for `score` the rollouts of `sample`.
SOURCES = {
    "extract-latents": ("rollouts", "data"),
    "fit-flow": ("latents", "rollouts", "data"),
    "score": ("rollouts", "latents"),
}
SOURCE = {"extract-latents": ("data", "-"), "fit-flow": ("latents", ["-"]), "score": ("rollouts", "-")}


def run(config: PlanConfig, *, recipe: Path | None = None, preset: str | None = None) -> dict[str, Any]:
    """Estimate; returns tables and sentences.

    Args:
        recipe: a TOML file; only the stages that it names are planned, unless `config` names some.
        preset: a named set of options.

    Raises:
        RlfrError: the model's config or the recipe cannot be read.
    """
    model = read_model_sizes(Path(config.model).expanduser())
    if not model.known:
        console.warn(f"a {model.family} model is counted as if its blocks were those of a llama")
    setting = Setting(model, config, with_layout(read_configs(recipe, preset), config))
    plans = [plan_stage(setting, name) for name in config.stage or named_stages(recipe)]
    return {
        **plan_tables.model_facts(setting),
        **plan_tables.tables(plans, setting),
        "fit": [fit_of(setting, plan) for plan in plans],
        "assumptions": plan_tables.assumptions(setting, zero_stage(setting)),
    }


def named_stages(recipe: Path | None) -> list[str]:
    """The stages that have a table in a recipe, in order of work; all where none has."""
    tables = {} if recipe is None else tomllib.loads(recipe.read_text(encoding="utf-8"))
    return [name for name in PLANNED if name in tables] or list(PLANNED)


def read_configs(recipe: Path | None, preset: str | None) -> Recipe:
    """The config of each stage by recipe, preset and defaults; paths that nothing names are made up."""
    named = {} if recipe is None else read_recipe(recipe)
    configs: dict[str, Any] = {}
    for name, field in NAMES.items():
        cls: type[StageConfig] = COMMANDS[name].config
        there = named.get(name, {})
        flags: dict[tuple[str, ...], Any] = {
            leaf.path: GIVEN[leaf.path[-1]] for leaf in leaf_options(cls) if leaf.required and leaf.path not in there
        }
        if name in SOURCES and not any((key,) in there for key in SOURCES[name]):
            key, value = SOURCE[name]
            flags[key,] = value
        if name == "score":
            flags["model",] = "-"
        configs[field] = resolve(cls, command=name, flags=flags, recipe=recipe, preset=preset)
    return Recipe(**configs)


def with_layout(recipe: Recipe, config: PlanConfig) -> Recipe:
    """The recipe with the engines and ZeRO stage that the command line asks for."""
    changed: dict[str, Any] = {}
    for name in ("sample", "train", "evaluate"):
        stage: Any = getattr(recipe, name)
        engine = config.engine or (stage.generation.engine if config.tensor_parallel is None else EngineName.VLLM)
        spread = config.tensor_parallel or stage.generation.tensor_parallel_size
        generation = dataclasses.replace(stage.generation, engine=engine, tensor_parallel_size=spread)
        changed[name] = dataclasses.replace(stage, generation=generation)
    training = recipe.train.training
    training = dataclasses.replace(
        training,
        zero_stage=training.zero_stage if config.zero is None else config.zero,
        offload_optimiser=training.offload_optimiser or config.offload_optimiser,
    )
    changed["train"] = dataclasses.replace(changed["train"], training=training)
    return dataclasses.replace(recipe, **changed)


def fit_of(setting: Setting, plan: StagePlan) -> dict[str, Any]:
    """Whether a stage fits, and what would make it."""
    plan_config = setting.plan
    room = (plan_config.gpu_memory - plan_config.process_memory) * GB
    row: dict[str, Any] = {"stage": plan.name, "fits": True, "needs": _needs(setting, plan), "would_fit_with": None}
    remedies = []
    if plan.most.total > room:
        remedy = memory_remedy(setting, plan.name, lambda other: other.most.total <= room)
        words = NOTHING
        if remedy is not None:
            words = f"{remedy.text}: {_needs(remedy.setting, plan_stage(remedy.setting, plan.name))}"
        remedies.append(words)
    needed, disk = sum(plan.disk.values()), plan_config.disk
    if disk is not None and needed > disk * GB:
        remedy = disk_remedy(setting, plan.name, lambda other: sum(other.disk.values()) <= disk * GB)
        row["needs"] += f"; {needed / GB:,.1f} of {disk:g} GB of disk"
        remedies.append(f"for the disk: {NOTHING if remedy is None else remedy.text}")
    if remedies:
        row |= {"fits": False, "would_fit_with": "; ".join(remedies)}
    return row


def _needs(setting: Setting, plan: StagePlan) -> str:
    """`update takes 48.7 of 78 GB`, and what lies in main memory."""
    room = setting.plan.gpu_memory - setting.plan.process_memory
    moved = state_of(setting).in_main_memory * setting.plan.gpus if plan.name == "train-rl" else 0
    beside = f", and {moved / GB:,.0f} GB of main memory" if moved else ""
    return f"{plan.most.name} takes {plan.most.total / GB:,.1f} of {room:g} GB{beside}"
