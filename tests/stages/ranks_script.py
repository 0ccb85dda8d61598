"""Run `train-rl` in a process that torchrun has started, with responses that depend on the problem alone.

    torchrun --nproc_per_node 2 tests/stages/ranks_script.py MODEL PROBLEMS FLOW OUT STEPS [OPTIONS AS JSON]

The hf engine has one generator a call, so its tokens depend on how problems are shared out. Here every group is drawn
in a call of its own, keyed by its problem: then two processes must train as one does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.config.rl import OnlineConfig, OptimiserConfig, PolicyLossConfig, RolloutConfig
from rlfr_cli.config.train_rl import RunConfig
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.rl.rollouts import Responder
from rlfr_cli.stages import train_rl
from stages.tiny_stages import train_config

real = Responder.respond


def respond(
    self: Responder, problems: Any, num_samples: int, sampling: Any, *, key: Any, first_samples: Any = None
) -> Any:
    rows = []
    firsts = first_samples or [0] * len(problems)
    for problem, first in zip(problems, firsts, strict=True):
        name = (*key[:3], problem.problem.problem_id)
        rows += real(self, [problem], num_samples, sampling, key=name, first_samples=[first])
    return rows


def main() -> None:
    model, problems, flow, out, steps = sys.argv[1:6]
    options = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    if "RANK" in os.environ:
        Path(f"{out}.pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    Responder.respond = respond  # type: ignore[method-assign]
    values: dict[str, Any] = {
        "flow": Path(flow),
        "rollout": RolloutConfig(
            **{"prompts_per_step": 3, "group_size": 4, "steps": int(steps), **options.pop("rollout", {})}
        ),
        "optimiser": OptimiserConfig(learning_rate=1e-4, minibatch_responses=8, warmup_fraction=0.0),
        "lora": LoraConfig(**options.pop("lora", {})),
        "policy_loss": PolicyLossConfig(**options.pop("policy_loss", {})),
        "online": OnlineConfig(**options.pop("online", {"online_steps": 0})),
        "training": TrainingEngineConfig(**options.pop("training", {})),
        "run": RunConfig(tensorboard=False, **{"save_every": 1, "keep_checkpoints": 9, **options.pop("run", {})}),
    }
    train_rl.run(train_config(Path(model), Path(problems), Path(out), **values, **options))


if __name__ == "__main__":
    main()
