"""Launch tasks of ``deepspeed_script.py`` in several processes, and read what they leave."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.deepspeed_script import (
    OPTIMISER,
    Task,
    logits_of_plain_model,
    policy_to_train,
    train,
    weights_of,
    write_tasks,
)
from rlfr_cli.engines.ranks import ALONE
from rlfr_cli.engines.single import SingleProcessEngine
from tiny_policies import CPU

SCRIPT = Path(__file__).with_name("deepspeed_script.py")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Results:
    """What the tasks of one launch have left in a folder."""

    folder: Path

    def told(self, task: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{task}.json").read_text())
        return found

    def weights(self, task: str, when: str = "") -> Weights:
        return load_file(self.folder / f"{task}{when}.safetensors")


def processes_environment() -> dict[str, str]:
    """One thread a process, and this checkout's package."""
    source = str(SCRIPT.parent.parent.parent / "src")
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def launch(folder: Path, tasks: list[Task], num_processes: int) -> subprocess.CompletedProcess[str]:
    """Run the script, with torchrun where there are several processes."""
    write_tasks(folder / "tasks.json", tasks)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.run(
        [
            sys.executable,
            *(torchrun if num_processes > 1 else []),
            str(SCRIPT),
            str(folder / "tasks.json"),
            str(folder),
        ],
        env=processes_environment(),
        capture_output=True,
        text=True,
        timeout=480,  # a machine that others use too
    )


def launch_well(folder: Path, tasks: list[Task], num_processes: int) -> Results:
    """Run the script, which must end well and leave standard output alone."""
    done = launch(folder, tasks, num_processes)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == ""
    return Results(folder)


@dataclass(frozen=True)
class Reference:
    """Three steps and a fourth of the single-process engine, saved after the third."""

    folder: Path
    first: Weights
    steps: list[dict[str, Any]]
    third: Weights
    logits: Tensor
    fourth_step: dict[str, Any]
    fourth: Weights


def single_engine(model: Path, lora_rank: int = 0) -> SingleProcessEngine:
    return SingleProcessEngine(
        policy_to_train(model, CPU, lora_rank),
        stored_dtype=torch.float32,
        betas=(OPTIMISER.beta1, OPTIMISER.beta2),
        weight_decay=OPTIMISER.weight_decay,
        clip_norm=OPTIMISER.clip_norm,
    )


def make_reference(model: Path, folder: Path, lora_rank: int = 0) -> Reference:
    engine = single_engine(model, lora_rank)
    first = weights_of(engine)
    steps = train(engine, ALONE, (1, 3))
    third, logits = weights_of(engine), logits_of_plain_model(engine)
    engine.save(folder / "model", folder / "trainer")
    fourth_step = train(engine, ALONE, (4, 4))[0]
    return Reference(folder, first, steps, third, logits, fourth_step, weights_of(engine))


def norm_of_difference(ours: Weights, theirs: Weights) -> float:
    assert ours.keys() == theirs.keys()
    return math.sqrt(sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs))


def assert_same_update(ours: Weights, theirs: Weights, start: Weights, share: float = 1e-4) -> None:
    """Weights that differ by no more than a share of the norm of the update from ``start``."""
    update = norm_of_difference(theirs, start)
    assert update > 0
    assert norm_of_difference(ours, theirs) <= share * update


def assert_same_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for here, there in zip(ours, theirs, strict=True):
        assert abs(here["loss"] - there["loss"]) <= 1e-5
        assert abs(here["norm"] - there["norm"]) <= 1e-5 * there["norm"]
        assert here["stepped"]
