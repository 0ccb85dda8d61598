"""Options of `rlfr plan`: what a recipe would take of memory, disk and time, before any of it is spent."""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.fields import StageConfig, option

PLANNED = ("sample", "extract-latents", "fit-flow", "score", "train-rl", "eval")
WORK, LAYOUT, GPUS = "Work", "Layout", "GPUs"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(StageConfig):
    """A GB is 10^9 bytes. Names differ from those of groups of other commands, which `[common]` may hold."""

    model: str = option(
        help="The policy: a Hugging Face model folder, or its config.json alone; no weights are read.",
        short="-m",
        path=True,
    )
    stage: tuple[str, ...] = option(
        (), help="Plan this stage; may be repeated. Those that the recipe names, or all, by default.", choices=PLANNED
    )

    gpus: int = option(1, help="GPUs that share the work.", panel=GPUS, minimum=1)
    gpu_memory: float = option(80.0, help="GB of one GPU.", panel=GPUS, exclusive_minimum=0)
    process_memory: float = option(
        2.0,
        help="GB of one GPU that are no tensors: CUDA's context, workspaces of libraries, what an allocator cannot "
        "reuse. A guess.",
        panel=GPUS,
        minimum=0,
    )
    gpu_flops: float = option(
        989.0,
        help="TFLOP/s of one GPU in dense bfloat16: those of an H100 or H200 by default.",
        panel=GPUS,
        exclusive_minimum=0,
    )
    utilisation: float = option(
        0.4, help="Share of these that training and reading reach. A guess.", panel=GPUS, exclusive_minimum=0, maximum=1
    )
    generation_utilisation: float | None = option(
        None,
        help="Share of these that generation reaches; a guess of 0.1 with vLLM and 0.01 with transformers by default.",
        panel=GPUS,
        exclusive_minimum=0,
        maximum=1,
    )
    disk: float | None = option(None, help="GB of free disk; not looked at by default.", panel=GPUS, minimum=0)

    num_problems: int = option(
        10000,
        help="Problems, and expert solutions; fewer where the recipe has --limit.",
        flag="--problems",
        panel=WORK,
        minimum=1,
    )
    prompt_tokens: int = option(256, help="Tokens of a prompt.", panel=WORK, minimum=1)
    response_tokens: int | None = option(
        None,
        help="Tokens of a response on average; --max-new-tokens by default. A batch in memory is of full length.",
        panel=WORK,
        minimum=1,
    )
    plain_rlvr: bool = option(False, help="Plan train-rl without a flow.", panel=WORK)

    engine: EngineName | None = option(None, help="Generation engine, in place of the recipe's.", panel=LAYOUT)
    tensor_parallel: int | None = option(
        None,
        help="With vllm: GPUs over which a model is spread, in place of the recipe's.",
        flag="--tensor-parallel-size",
        panel=LAYOUT,
        minimum=1,
    )
    zero: int | None = option(
        None,
        help="ZeRO stage of train-rl, in place of the recipe's; by default 2 with several GPUs, and 0 with one.",
        flag="--zero-stage",
        panel=LAYOUT,
        minimum=0,
        maximum=3,
    )
    offload_optimiser: bool = option(
        False, help="Keep train-rl's optimiser state in main memory, whatever the recipe says.", panel=LAYOUT
    )
