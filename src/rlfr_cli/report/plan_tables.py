"""The tables of `rlfr plan`: estimates in, rows in GB, PFLOP and hours out. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlfr_cli.planning.memory import PARTS
from rlfr_cli.planning.setting import Setting
from rlfr_cli.planning.stages import Drawing, StagePlan, uses_vllm

GB, PFLOP, TFLOP = 1e9, 1e15, 1e12
KINDS = ("reading", "training", "flow")
UTILISATION_OF_ENGINE = {True: 0.1, False: 0.01}  # vLLM, transformers


def model_facts(setting: Setting) -> dict[str, Any]:
    """The model and, if any stage may use one, the flow."""
    model, flow = setting.model, setting.flow_sizes()
    return {
        "model": f"{model.family}, {model.num_blocks} blocks of {model.hidden_size}, vocabulary {model.vocab_size}",
        "parameters": model.parameters,
        **({"adapter_parameters": adapters} if (adapters := setting.adapter_weights()) else {}),
        "flow_parameters": flow.parameters,
    }


def tables(plans: Sequence[StagePlan], setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Memory of one GPU by stage, phase and part; disk; operations and hours."""
    return {
        "gpu_memory_gb": [row for plan in plans for row in _memory_rows(plan)],
        "disk_gb": [row for plan in plans for row in _disk_rows(plan)],
        "work": [_work_row(plan, setting) for plan in plans],
    }


def _memory_rows(plan: StagePlan) -> list[dict[str, Any]]:
    return [
        {
            "stage": plan.name,
            "phase": phase.name,
            **{part: phase.parts.get(part, 0) / GB for part in PARTS},
            "total": phase.total / GB,
        }
        for phase in plan.phases
    ]


def _disk_rows(plan: StagePlan) -> list[dict[str, Any]]:
    return [{"stage": plan.name, "artifact": name, "gb": size / GB} for name, size in plan.disk.items()]


def _work_row(plan: StagePlan, setting: Setting) -> dict[str, Any]:
    work = plan.work
    kinds = {"generation": work.generation, **{kind: work.other.get(kind, 0) for kind in KINDS}}
    return {
        "stage": plan.name,
        "million_tokens": work.tokens / 1e6,
        **{f"{kind}_pflop": flops / PFLOP for kind, flops in kinds.items()},
        "gpus": work.gpus,
        "hours": work.hours(
            setting.plan.gpu_flops * TFLOP, setting.plan.utilisation, generation_utilisation(setting, plan.name)
        ),
    }


def generation_utilisation(setting: Setting, stage: str) -> float:
    """The share that generation reaches: as given, or the guess for the stage's engine."""
    recipe = setting.recipe
    configs: dict[str, Drawing] = {"sample": recipe.sample, "eval": recipe.evaluate, "train-rl": recipe.train}
    if setting.plan.generation_utilisation is not None or stage not in configs:
        return setting.plan.generation_utilisation or 1.0
    return UTILISATION_OF_ENGINE[uses_vllm(configs[stage])]


def assumptions(setting: Setting, stage: int) -> list[dict[str, str]]:
    """What the numbers rest on, and which of it was never measured."""
    plan, recipe = setting.plan, setting.recipe
    problems = setting.num_problems(recipe.train.problems)
    shares = {name: generation_utilisation(setting, name) for name in ("sample", "train-rl", "eval")}
    reached = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    lines = [
        f"{problems:,} problems, prompts of {plan.prompt_tokens} tokens, responses of "
        f"{setting.response_tokens(recipe.train.sampling.max_new_tokens)} in train-rl, one round of sampling a step",
        f"memory: tensors, at most; beside them {plan.process_memory:g} GB of each GPU for the process (a guess)",
        "latents that train-rl keeps: as if every response were accepted",
        f"hours: {plan.gpu_flops:g} TFLOP/s of a GPU, of which reading and training reach {plan.utilisation:g} and "
        f"generation {reached} (guesses); grading, loading and writing take none",
        "tensors were compared with torch's allocator on a CPU only, see docs/plan.md",
    ]
    if stage > 0:
        lines.append(f"ZeRO stage {stage}: by DeepSpeed's documented defaults, not measured")
    if setting.adapter_weights():
        lines.append("adapters: the policy's own weights in --dtype, without moments or gradients; not measured")
    if any(uses_vllm(config) for config in (recipe.sample, recipe.train, recipe.evaluate)):
        lines.append("vLLM: its weights and a cache for what is drawn at once; it takes more if there is more")
    return [{"assumption": line} for line in lines]
