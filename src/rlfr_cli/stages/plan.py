"""`rlfr plan`: what a recipe would take of memory, disk and time, and which option would make it fit.

Reads a model's config.json and a recipe, and writes nothing. Inputs that the recipe names are not opened: how many
problems and tokens there are is said by options. The formulas are in the modules of ``planning/``, each in its first
lines; how near they come to what torch allocates is measured by ``benchmarks/memory.py``. Guesses, and what was not
measured, are among what is printed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from rlfr_cli import console
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.fields import StageConfig, leaf_options
from rlfr_cli.config.plan import PLANNED, PlanConfig
from rlfr_cli.config.recipe import read_recipe, resolve
from rlfr_cli.planning.memory import Phase
from rlfr_cli.planning.model_sizes import read_model_sizes
from rlfr_cli.planning.reinforcement import zero_stage
from rlfr_cli.planning.remedies import GB, NAMES, disk_remedy, memory_remedy, plan_stage
from rlfr_cli.planning.setting import Recipe, Setting
from rlfr_cli.planning.stages import StagePlan
from rlfr_cli.report import plan_tables

# What a command asks for and an estimate does not open; responses are expert solutions unless the recipe says otherwise.
GIVEN = {"model": "-", "data": "-", "flow": "-"}
SOURCES = {
    "extract-latents": (("rollouts",), ("data",)),
    "fit-flow": (("latents",), ("rollouts",), ("data",)),
    "score": (("rollouts",), ("latents",)),
}
SOURCE_GIVEN = {"extract-latents": ("data", "-"), "fit-flow": ("latents", ["-"]), "score": ("rollouts", "-")}


def run(config: PlanConfig, *, recipe: Path | None = None, preset: str | None = None) -> dict[str, Any]:
    """Estimate; returns tables and sentences.

    Args:
        recipe: a TOML file; only the stages that it names are planned, unless `config` names some.
        preset: a named set of options.

    Raises:
        RlfrError: the model's config or the recipe cannot be read.
    """
    model = read_model_sizes(config.model)
    if not model.known:
        console.warn(f"a {model.family} model is counted as if its blocks were those of a llama")
    setting = Setting(model, config, read_configs(recipe, preset))
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
        if name in SOURCES and not any(path in there for path in SOURCES[name]):
            key, value = SOURCE_GIVEN[name]
            flags[key,] = value
        if name == "score":
            flags["model",] = "-"
        configs[field] = resolve(cls, command=name, flags=flags, recipe=recipe, preset=preset)
    return Recipe(**configs)


def fit_of(setting: Setting, plan: StagePlan) -> dict[str, Any]:
    """Whether a stage fits, and what would make it."""
    room, disk = (setting.plan.gpu_memory - setting.plan.process_memory) * GB, setting.plan.disk
    row: dict[str, Any] = {
        "stage": plan.name,
        "fits": True,
        "needs": _phase_text(plan.most, setting),
        "would_fit_with": None,
    }
    if plan.most.total > room:
        remedy = memory_remedy(setting, plan.name, lambda other: other.most.total <= room)
        row |= {"fits": False, "would_fit_with": "nothing that was tried"}
        if remedy is not None:
            most = plan_stage(remedy.setting, plan.name).most
            row["would_fit_with"] = f"{remedy.text}: {_phase_text(most, setting)}"
    needed = sum(plan.disk.values())
    if disk is not None and needed > disk * GB:
        remedy = disk_remedy(setting, plan.name, lambda other: sum(other.disk.values()) <= disk * GB)
        words = "nothing that was tried" if remedy is None else remedy.text
        earlier = f"{row['would_fit_with']}; " if row["would_fit_with"] else ""
        row |= {"fits": False, "needs": f"{row['needs']}; {needed / GB:,.1f} of {disk:g} GB of disk"}
        row["would_fit_with"] = f"{earlier}disk: {words}"
    return row


def _phase_text(phase: Phase, setting: Setting) -> str:
    room = setting.plan.gpu_memory - setting.plan.process_memory
    return f"{phase.name} takes {phase.total / GB:,.1f} of {room:g} GB"
