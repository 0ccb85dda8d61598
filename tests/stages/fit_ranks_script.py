"""Fits of `fit-flow` in one of several processes, one after the other in one process group.

    RANK=0 WORLD_SIZE=2 … python tests/stages/fit_ranks_script.py POLICY ROLLOUTS LATENTS OUT TASK [TASK …]

A task is a key of ``fits``. After ``stop:`` or ``kill:`` the last rank is told to stop, or killed, after five steps.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.engines.ranks import open_ranks
from rlfr_cli.errors import Stopped
from rlfr_cli.flow.choices import Context
from rlfr_cli.stages import fit_flow, fitting
from stages.tiny_stages import fit_config

STEPS_BEFORE_THE_END = 5
KILLED = "killed"  # a file that is made when a rank is
NETWORK = NetworkConfig(
    width=24, depth=1, normalisation=Normalisation.CHANNEL, context=(Context.NEXT, Context.PREVIOUS)
)
# Of 24 sequences 20 are fitted, in steps of seven, and four are held out: no number of ranks divides all of these.
UNEVEN: dict[str, Any] = {"steps": 9, "sequences_per_step": 7, "learning_rate": 1e-3, "noise_repeats": 2}
# Every rank but one has nothing to do in a step.
SINGLE: dict[str, Any] = {"steps": 3, "sequences_per_step": 1, "learning_rate": 1e-3}


def fits(policy: Path, rollouts: Path, latents: Path, out: Path) -> dict[str, FitFlowConfig]:
    """Fits by the name of their folder."""
    live: dict[str, Any] = {
        "model": str(policy),
        "rollouts": rollouts,
        "layer_index": (2, 5),
        "store": StoreDtype.FLOAT32,
        "optimiser": {**UNEVEN, "steps": 3},
    }
    tasks: dict[str, tuple[Any, dict[str, Any]]] = {
        "uneven": (latents, {"optimiser": UNEVEN, "eval_every": 3}),
        "single": (latents, {"optimiser": SINGLE, "holdout_fraction": 0.0}),
        "live": ((), live),
    }
    return {
        name: fit_config(source, out / name / "flow.safetensors", network=NETWORK, **options)
        for name, (source, options) in tasks.items()
    }


def end_after_five_steps(number: signal.Signals, out: Path) -> None:
    real = fitting.Fit._train_step

    def train_step(self: fitting.Fit) -> float:
        loss = real(self)
        if self.step == STEPS_BEFORE_THE_END:
            (out / KILLED).touch()
            os.kill(os.getpid(), number)
        return loss

    fitting.Fit._train_step = train_step  # type: ignore[method-assign]


def main() -> None:
    policy, rollouts, latents, out = map(Path, sys.argv[1:5])
    with open_ranks(torch.device("cpu")) as ranks:
        fit_flow.open_ranks = lambda *_, **__: nullcontext(ranks)  # type: ignore[assignment]
        for task in sys.argv[5:]:
            end, _, name = task.rpartition(":")
            if end and ranks.rank == ranks.world_size - 1:
                end_after_five_steps({"stop": signal.SIGTERM, "kill": signal.SIGKILL}[end], out)
            try:
                summary = fit_flow.run(fits(policy, rollouts, latents, out)[name])
            except Stopped as stopped:
                print(f"rank {ranks.rank}: {stopped.message}", file=sys.stderr)
            else:
                assert (summary is None) == (not ranks.is_first)


if __name__ == "__main__":
    main()
