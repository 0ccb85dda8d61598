"""One part of the work a rank: what torchrun and srun tell a process of its place among the others.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. srun sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID; the
batch script of a job, in which no step runs, has SLURM_PROCID and SLURM_NTASKS too but is one process, so only the
step's own count is believed. Parts need nothing of each other, so no process group is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rlfr_cli.config.fields import StageConfig

Config = TypeVar("Config", bound=StageConfig)

LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Rank:
    """A process among those that a launcher started.

    Attributes:
        launcher: torchrun or srun.
        index: its place among all, from 0.
        count: how many there are, more than one.
        local: its place on its machine, from 0; None where that is not said.
    """

    launcher: str
    index: int
    count: int
    local: int | None


def rank_of(environment: Mapping[str, str]) -> Rank | None:
    """The rank that the environment names; None for a process that works alone.

    torchrun comes before srun, which may have started it once a machine.
    """
    for launcher, *names in LAUNCHERS:
        index, count, local = (_number(environment.get(name)) for name in names)
        if index is not None and count is not None and count > 1:
            return Rank(launcher, index, count, local)
    return None


def take_part(config: Config, rank: Rank) -> Config:
    """Give a rank its share of a stage that works in parts: part 3/8 for rank 2 of 8, on a GPU of its own.

    A config that names a part keeps it, and a stage without parts is left alone. ``--device cuda:N`` is kept too, and
    so is the device of a vLLM that spreads over several GPUs, which are those that its process is shown.

    Raises:
        ConfigError: the rank is not below the number of ranks.
    """
    values: Any = config
    if not hasattr(config, "part") or values.part is not None:
        return config
    device = values.device if _spreads_over_gpus(values) else _device(values.device, rank)
    return dataclasses.replace(values, part=f"{rank.index + 1}/{rank.count}", device=device)


def _spreads_over_gpus(config: Any) -> bool:
    engine = getattr(config, "generation", None) or getattr(config, "reading", None)
    return engine is not None and engine.tensor_parallel_size * engine.data_parallel_size > 1


def _device(device: str, rank: Rank) -> str:
    if device not in ("auto", "cuda") or rank.local is None:
        return device
    import torch  # not with this module, which the command line imports for every command

    # Where each process is shown one GPU only, as by `srun --gpus-per-task 1`, that one is cuda:0 for all.
    count = torch.cuda.device_count()
    return f"cuda:{rank.local % count}" if count else device


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
