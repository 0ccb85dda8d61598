"""What each process of ``test_deepspeed.py`` runs: a list of tasks, whose results rank 0 leaves in files.

    torchrun --nproc-per-node 2 deepspeed_script.py TASKS.json OUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rlfr_cli.policy.logprobs
from rlfr_cli.config.rl import OptimiserConfig
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.engines.ranks import Ranks, open_ranks
from rlfr_cli.engines.training import TrainingEngine
from rlfr_cli.engines.training_engines import open_training_engine
from rlfr_cli.policy.forward import response_logprobs
from rlfr_cli.policy.loading import load_policy
from tiny_policies import CPU, CPU_BF16, random_sequences

SEQUENCES = random_sequences([(4, 9), (7, 3), (3, 12), (5, 5), (6, 7), (2, 1)])
NUM_TOKENS = sum(len(sequence.response) for sequence in SEQUENCES)
RATE = 1e-3
OPTIMISER = OptimiserConfig(weight_decay=0.01, clip_norm=0.5)
Step = dict[str, Any]


def share(step: int, rank: int, world_size: int) -> list[int]:
    """Responses of a rank at a step: in the second step the first rank has them all, else they are dealt unevenly."""
    if step == 1:
        return list(range(len(SEQUENCES))) if rank == 0 else []
    ends = [0, *(len(SEQUENCES) - 2 * (world_size - 1 - place) for place in range(world_size))]
    if world_size > 3:
        ends = [0, 3, 4, 5, 6]
    return list(range(ends[rank], ends[rank + 1]))


def part_of_loss(engine: TrainingEngine, responses: list[int]) -> Tensor:
    """A share of a mean over the tokens of all responses."""
    rows = [SEQUENCES[index] for index in responses]
    logprobs, entropies = engine.run(lambda: response_logprobs(engine.policy, rows, 0.7))
    return (-logprobs + 0.1 * entropies).sum() / NUM_TOKENS


def train(engine: TrainingEngine, ranks: Ranks, steps: range, rate: float = RATE, spoil: str = "") -> list[Step]:
    """Steps on the fixed batch, two responses a micro-batch; ``spoil`` makes the last rank's first loss bad."""
    engine.policy.model.train()
    done = []
    for step in steps:
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
            if number == 0 and ranks.rank == ranks.world_size - 1 and spoil:
                loss = loss * torch.nan if spoil == "nan" else loss + torch.inf
            engine.backward(loss, last=last)
            total += float(loss.detach())
        outcome = engine.step(rate)
        loss_of_all = float(ranks.sum(torch.tensor(total, dtype=torch.float64)))
        done.append({"loss": loss_of_all, "norm": outcome.gradient_norm, "stepped": outcome.stepped})
    return done


def logits_of_whole_policy(engine: TrainingEngine, times: int) -> Tensor:
    """Logits of a short prompt, from so many forward passes of the plain model."""
    ids = torch.tensor([SEQUENCES[0].prompt])
    with torch.no_grad():
        for _ in range(times):
            logits: Tensor = engine.policy.model(input_ids=ids, use_cache=False).logits
    return logits


def run_task(task: dict[str, Any], ranks: Ranks, out: Path) -> None:
    """Open an engine and do what the task says, in the order of its keys."""
    placement = CPU_BF16 if task.get("bfloat16") else CPU
    policy = load_policy(Path(task["model"]), placement, weights_dtype=torch.float32)
    engine = open_training_engine(
        policy,
        ranks,
        TrainingEngineConfig(**task.get("engine", {})),
        OPTIMISER,
        stored_dtype=getattr(torch, task.get("stored", "float32")),
        gradient_checkpointing=task.get("checkpointing", False),
    )
    found: dict[str, Any] = {}
    rlfr_cli.policy.logprobs.CHUNK_ELEMENTS = task.get("chunk_elements", 2**26)
    if "load" in task:
        engine.load(Path(task["load"]))
    before = weights_of(engine)
    if "spoil" in task:
        found["spoiled"] = train(engine, ranks, range(1), spoil=task["spoil"])
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
    first, last = task.get("steps", (0, 0))
    found["steps"] = train(engine, ranks, range(first, last), task.get("rate", RATE))
    save_result(weights_of(engine), ranks, out / f"{task['name']}.safetensors")
    if "save" in task:
        engine.save(Path(task["save"]) / "model", Path(task["save"]) / "trainer")
    if "whole" in task:
        with engine.whole_policy():
            logits = logits_of_whole_policy(engine, 1 + 2 * ranks.rank)
        gathered = ranks.gather(logits)
        if gathered is not None:
            save_file({str(rank): one for rank, one in enumerate(gathered)}, out / f"{task['name']}.logits")
        found["after"] = train(engine, ranks, range(last, last + 1))
        save_result(weights_of(engine), ranks, out / f"{task['name']}.after.safetensors")
    if ranks.is_first:
        (out / f"{task['name']}.json").write_text(json.dumps(found))
    if "die" in task and ranks.rank == task["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if "die" in task:
        train(engine, ranks, range(3))


def weights_of(engine: TrainingEngine) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.named_weights()}


def save_result(weights: dict[str, Tensor], ranks: Ranks, path: Path) -> None:
    if ranks.is_first:
        save_file(weights, path)


def main() -> None:
    tasks, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with open_ranks(torch.device("cpu")) as ranks:
        for task in tasks:
            started = time.perf_counter()
            run_task(task, ranks, out)
            print(f"{task['name']}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
