"""Tiny configs of the stages, and what their tests do alike: compare folders, interrupt, run the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.config.common import GradingConfig, ProblemsConfig, SamplingConfig
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.config.extract_latents import ExtractLatentsConfig
from rlfr_cli.config.fit_flow import FitFlowConfig, FitOptimiserConfig
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.config.score import ScoreConfig
from rlfr_cli.config.train_rl import OptimiserConfig, RolloutConfig, RunConfig, TrainRlConfig

MAX_NEW_TOKENS = 32  # an easy problem's solution takes 20 to 25


@dataclass(frozen=True)
class TinyArtifacts:
    """The embedded policy, some of its problems, and what the first stages make of them.

    Attributes:
        policy: the embedded model folder (8 blocks, hidden size 128).
        problems: easy problems, about a third of which the policy answers.
        expert: expert solutions of other problems.
        rollouts: four responses to each problem, two problems a shard.
        latents: of the rollouts, blocks 2 and 5, in float32.
        flow: fitted on these latents for a few steps.
    """

    policy: Path
    problems: Path
    expert: Path
    rollouts: Path
    latents: Path
    flow: Path


def problems_of(data: Path, **options: Any) -> ProblemsConfig:
    return ProblemsConfig(data=str(data), **{"id_column": "id", **options})


def sampling_of(**options: Any) -> SamplingConfig:
    return SamplingConfig(**{"max_new_tokens": MAX_NEW_TOKENS, **options})


def sample_config(model: Path, data: Path, out: Path, **options: Any) -> SampleConfig:
    """Four responses to each problem, two problems a shard."""
    values: dict[str, Any] = {
        "problems": problems_of(data),
        "sampling": sampling_of(),
        "group_size": 4,
        "problems_per_shard": 2,
        "device": "cpu",
    }
    return SampleConfig(**{**values, "model": str(model), "out": out, **options})


def eval_config(model: Path, data: Path, out: Path, **options: Any) -> EvalConfig:
    values: dict[str, Any] = {
        "problems": problems_of(data),
        "sampling": sampling_of(),
        "num_samples": 4,
        "problems_per_shard": 2,
        "device": "cpu",
    }
    return EvalConfig(**{**values, "model": str(model), "out": out, **options})


def extract_config(model: Path, out: Path, **options: Any) -> ExtractLatentsConfig:
    values: dict[str, Any] = {"problems_per_shard": 2, "device": "cpu"}
    return ExtractLatentsConfig(**{**values, "model": str(model), "out": out, **options})


def fit_config(
    latents: Path | Sequence[Path],
    out: Path,
    *,
    network: NetworkConfig | None = None,
    optimiser: dict[str, Any] | None = None,
    **options: Any,
) -> FitFlowConfig:
    """Ten steps of a network that is narrower than the latents."""
    steps: dict[str, Any] = {"steps": 10, "sequences_per_step": 8, "learning_rate": 3e-3, "warmup_fraction": 0.0}
    values: dict[str, Any] = {"holdout_fraction": 0.25, "device": "cpu"}
    return FitFlowConfig(
        **{**values, **options},
        latents=(latents,) if isinstance(latents, Path) else tuple(latents),
        out=out,
        network=network or NetworkConfig(width=24, depth=1),
        optimiser=FitOptimiserConfig(**{**steps, **(optimiser or {})}),
    )


def score_config(flow: Path, out: Path, **options: Any) -> ScoreConfig:
    values: dict[str, Any] = {"problems_per_shard": 2, "device": "cpu"}
    return ScoreConfig(**{**values, "flow": flow, "out": out, **options})


def train_config(model: Path, data: Path, out: Path, **options: Any) -> TrainRlConfig:
    """Three steps of three groups of four, with a learning rate that moves the weights."""
    values: dict[str, Any] = {
        "problems": problems_of(data),
        "rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=3),
        "sampling": sampling_of(),
        "grading": GradingConfig(reward="accuracy"),
        "optimiser": OptimiserConfig(learning_rate=1e-4, minibatch_responses=6),
        "run": RunConfig(tensorboard=False),
        "device": "cpu",
    }
    return TrainRlConfig(**{**values, "model": str(model), "out": out, **options})


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Let ``owner.name`` end its ``calls``-th call by raising, after its work is done: Ctrl-C at that moment."""
    real = getattr(owner, name)
    seen = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        result = real(*args, **kwargs)
        seen += 1
        if seen == calls:
            raise error
        return result

    monkeypatch.setattr(owner, name, interrupted)


def start_rlfr(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "rlfr_cli.cli", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "NO_COLOR": "1"}, **{**pipes, **options})


def rlfr(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the real command."""
    process = start_rlfr(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def rows_of_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, one object a step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
