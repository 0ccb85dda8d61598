"""What each process of the tests of many processes runs: a list of tasks, whose results rank 0 leaves in files.

    torchrun --nproc-per-node 2 deepspeed_script.py TASKS.json OUT

A task is the keyword arguments of ``Task``. Without a launcher it runs in one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rlfr_cli.policy.logprobs
from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.config.rl import OptimiserConfig
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.engines.ranks import Ranks, open_ranks
from rlfr_cli.engines.training import TrainingEngine
from rlfr_cli.engines.training_engines import open_training_engine
from rlfr_cli.policy.adapters import add_adapters, plan_adapters
from rlfr_cli.policy.forward import response_logprobs
from rlfr_cli.policy.loading import Placement, Policy, load_policy
from tiny_policies import CPU, CPU_BF16, random_sequences

SEQUENCES = random_sequences([(4, 9), (7, 3), (3, 12), (5, 5), (6, 7), (2, 1)])
NUM_TOKENS = sum(len(sequence.response) for sequence in SEQUENCES)
# Where a response's share begins, for each rank of so many; in step 2 the first rank has all responses.
STARTS = {1: [0, 6], 2: [0, 4, 6], 4: [0, 3, 4, 5, 6]}
OPTIMISER = OptimiserConfig(weight_decay=0.01, clip_norm=0.5)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One engine's life; steps are numbered from 1.

    Attributes:
        name: of the result's files.
        model: folder of the policy.
        engine: of ``TrainingEngineConfig``.
        load: a trainer folder to go on from.
        steps: first and last.
        save: a folder for ``model/`` and ``trainer/``.
        spoil: nan or inf, for the last rank's loss in a step before the others.
        whole_policy: run the plain model, each rank a number of times of its own, and then one more step.
        chunk_elements: of ``policy/logprobs.py``.
        lora_rank: of adapters that are trained in place of the policy; 0 for none.
        dies: a rank that is killed after its steps.
    """

    name: str
    model: str
    engine: dict[str, Any] = field(default_factory=dict)
    load: str | None = None
    steps: tuple[int, int] = (1, 3)
    rate: float = 1e-3
    save: str | None = None
    bfloat16: bool = False
    stored: str = "float32"
    spoil: str | None = None
    whole_policy: bool = False
    checkpointing: bool = False
    chunk_elements: int = 2**26
    lora_rank: int = 0
    dies: int | None = None


def share(step: int, rank: int, world_size: int) -> list[int]:
    """Responses of a rank at a step."""
    if step == 2:
        return list(range(len(SEQUENCES))) if rank == 0 else []
    starts = STARTS[world_size]
    return list(range(starts[rank], starts[rank + 1]))


def part_of_loss(engine: TrainingEngine, responses: list[int]) -> Tensor:
    """A share of a mean over the tokens of all responses."""
    rows = [SEQUENCES[index] for index in responses]
    logprobs, entropies = engine.run(lambda: response_logprobs(engine.policy, rows, 0.7))
    return (-logprobs + 0.1 * entropies).sum() / NUM_TOKENS


def train(
    engine: TrainingEngine, ranks: Ranks, steps: tuple[int, int], rate: float = 1e-3, spoil: str | None = None
) -> list[dict[str, Any]]:
    """Steps on the fixed batch, two responses a micro-batch, each after a pass without gradients."""
    done = []
    for step in range(steps[0], steps[1] + 1):
        engine.policy.model.eval()
        with torch.no_grad():
            part_of_loss(engine, [0, 1])
        engine.policy.model.train()
        mine = share(step, ranks.rank, ranks.world_size)
        parts = [mine[start : start + 2] for start in range(0, len(mine), 2)]
        count = int(ranks.max(len(parts)))
        total = 0.0
        for number in range(count):
            last = number == count - 1
            if number >= len(parts):
                engine.idle_backward(last=last)
                continue
            loss = part_of_loss(engine, parts[number])
            if spoil is not None and number == 0 and ranks.rank == ranks.world_size - 1:
                loss = loss * torch.nan if spoil == "nan" else loss + torch.inf
            engine.backward(loss, last=last)
            total += float(loss.detach())
        outcome = engine.step(rate)
        loss_of_all = float(ranks.sum(torch.tensor(total, dtype=torch.float64)))
        done.append({"loss": loss_of_all, "norm": outcome.gradient_norm, "stepped": outcome.stepped})
    return done


def logits_of_plain_model(engine: TrainingEngine, times: int = 1) -> Tensor:
    """Logits of a short prompt, from so many forward passes of the model by itself."""
    ids = torch.tensor([SEQUENCES[0].prompt])
    with torch.no_grad():
        for _ in range(times):
            logits: Tensor = engine.policy.model(input_ids=ids, use_cache=False).logits
    return logits


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.named_weights()}


def policy_to_train(folder: Path, placement: Placement, lora_rank: int) -> Policy:
    """With float32 weights, or with adapters of this rank."""
    if lora_rank == 0:
        return load_policy(folder, placement, weights_dtype=torch.float32)
    policy = load_policy(folder, placement)
    add_adapters(policy, plan_adapters(LoraConfig(rank=lora_rank), policy.model.config), seed=0)
    return policy


def run_task(task: Task, ranks: Ranks, out: Path) -> None:
    """Open an engine, do what the task says, and leave ``NAME.json`` and ``NAME….safetensors``."""
    placement = CPU_BF16 if task.bfloat16 else CPU
    engine = open_training_engine(
        policy_to_train(Path(task.model), placement, task.lora_rank),
        ranks,
        TrainingEngineConfig(**task.engine),
        replace(OPTIMISER, gradient_checkpointing=task.checkpointing),
        stored_dtype=getattr(torch, task.stored),
    )
    rlfr_cli.policy.logprobs.CHUNK_ELEMENTS = task.chunk_elements

    def keep(tensors: Mapping[str, Tensor], suffix: str) -> None:
        if ranks.is_first:
            save_file(dict(tensors), out / f"{task.name}{suffix}.safetensors")

    if task.load is not None:
        engine.load(Path(task.load))
    found: dict[str, Any] = {}
    keep(weights_of(engine), ".before")
    if task.spoil is not None:
        found["spoiled"] = train(engine, ranks, (1, 1), spoil=task.spoil)
        keep(weights_of(engine), ".spoiled")
    found["steps"] = train(engine, ranks, task.steps, task.rate)
    keep(weights_of(engine), "")
    if task.save is not None:
        engine.save(Path(task.save) / "model", Path(task.save) / "trainer")
    if task.whole_policy:
        with engine.whole_policy():
            gathered = ranks.gather(logits_of_plain_model(engine, 1 + 2 * ranks.rank))
        keep({str(rank): logits for rank, logits in enumerate(gathered or [])}, ".logits")
        found["after"] = train(engine, ranks, (task.steps[1] + 1, task.steps[1] + 1), task.rate)
        keep(weights_of(engine), ".after")
    if ranks.is_first:
        found["parameter_dtypes"] = sorted({str(p.dtype) for p in engine.policy.model.parameters()})
        (out / f"{task.name}.json").write_text(json.dumps(found))
    if task.dies is not None:
        if task.dies == ranks.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        train(engine, ranks, (1, 100))


def write_tasks(path: Path, tasks: list[Task]) -> None:
    path.write_text(json.dumps([asdict(task) for task in tasks]))


def main(tasks: Path, out: Path) -> None:
    with open_ranks(torch.device("cpu")) as ranks:
        for values in json.loads(tasks.read_text()):
            run_task(Task(**values), ranks, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
