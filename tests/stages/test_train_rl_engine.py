"""`train-rl` with an engine that has weights of its own: they go over, and stale ones stop the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlfr_cli.config.rl import CorrectionConfig, OptimiserConfig, RolloutConfig
from rlfr_cli.config.train_rl import RunConfig, RunEvalConfig
from rlfr_cli.errors import Stopped, WorkError
from rlfr_cli.policy.loading import load_policy, resolve_placement
from rlfr_cli.stages import train_rl
from rlfr_cli.stages.generating import EngineOfRun
from rlfr_cli.stages.trainer import Trainer
from stages.copying_engine import CopyingEngine
from stages.tiny_stages import TinyArtifacts, bytes_of, interrupt_after, rows_of_metrics, train_config


def run_config(tiny: TinyArtifacts, out: Path, **options: Any) -> Any:
    values: dict[str, Any] = {
        "rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=2),
        "optimiser": OptimiserConfig(learning_rate=3e-4, minibatch_responses=12, warmup_fraction=0),
        "run": RunConfig(tensorboard=False, save_every=1, keep_checkpoints=9),
    }
    return train_config(tiny.policy, tiny.problems, out, **{**values, **options})


def test_a_run_with_a_copy_is_the_run_with_the_model_itself(
    tiny: TinyArtifacts, tmp_path: Path, engines: list[CopyingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(
        tiny,
        tmp_path / "copy",
        evaluation=RunEvalConfig(eval_data=str(tiny.problems), eval_every=1, eval_samples=1, eval_limit=2),
        correction=CorrectionConfig(correction="none"),
    )
    train_rl.run(config)
    (engine,) = engines
    # Evaluation 0, then for each step: draw, train, evaluate. Weights go over once after each training.
    assert engine.calls == [
        *("wake", "check", "generate", "sleep"),
        *("wake", "generate", "sleep", "wake", "load", "check", "generate", "sleep"),
        *("wake", "generate", "sleep", "wake", "load", "check", "generate", "sleep"),
        "close",
    ]
    monkeypatch.undo()
    train_rl.run(run_config(tiny, tmp_path / "own", evaluation=config.evaluation))
    assert bytes_of(tmp_path / "copy" / "rollouts") == bytes_of(tmp_path / "own" / "rollouts")
    copy, own = (tmp_path / name / "checkpoints" / "step-000002" / "model" for name in ("copy", "own"))
    assert bytes_of(copy) == bytes_of(own)


def test_the_correction_is_on_by_default_and_measured(
    tiny: TinyArtifacts, tmp_path: Path, engines: list[CopyingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose weights are a little off: the ratios differ from 1, within the tolerance."""
    real = CopyingEngine.load_weights

    def off(engine: CopyingEngine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        generator = torch.Generator().manual_seed(0)
        real(engine, ((n, w + 0.002 * torch.randn(w.shape, generator=generator)) for n, w in weights))

    monkeypatch.setattr(CopyingEngine, "load_weights", off)
    train_rl.run(run_config(tiny, tmp_path, correction=CorrectionConfig(tolerance=1.0)))
    first, second = rows_of_metrics(tmp_path)
    assert first["engine/kl_to_trainer"] < 1e-6
    assert second["engine/kl_to_trainer"] > 1e-5
    assert second["engine/weight_mean"] != 1
    assert second["engine/weight_mean"] == pytest.approx(1, abs=0.1)


def test_an_engine_that_does_not_take_the_weights_stops_the_run(
    tiny: TinyArtifacts, tmp_path: Path, engines: list[CopyingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyingEngine, "load_weights", lambda engine, weights: None)
    with pytest.raises(WorkError, match=r"did not take the trainer's new weights|are not the trainer's") as caught:
        train_rl.run(run_config(tiny, tmp_path))
    assert caught.value.exit_code == 1
    assert len(rows_of_metrics(tmp_path)) == 1


def test_a_resumed_run_sends_its_weights_before_it_draws(
    tiny: TinyArtifacts, tmp_path: Path, engines: list[CopyingEngine]
) -> None:
    train_rl.run(run_config(tiny, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 1)
        with pytest.raises(Stopped):
            train_rl.run(run_config(tiny, tmp_path / "broken"))
    train_rl.run(run_config(tiny, tmp_path / "broken", resume=True))
    assert engines[-1].calls[:4] == ["wake", "load", "check", "generate"]
    assert bytes_of(tmp_path / "broken" / "rollouts") == bytes_of(tmp_path / "whole" / "rollouts")


def test_rollouts_far_from_the_trainer_stop_the_run(tiny: TinyArtifacts, random_model: Path) -> None:
    class Other:
        name = "other"

    policy = load_policy(random_model, resolve_placement("cpu", "float32"))
    run = EngineOfRun(Other(), policy, CorrectionConfig(tolerance=0.1), [], stale=False)  # type: ignore[arg-type]
    run.check_gap(0.09)
    for gap in (0.2, float("nan")):
        with pytest.raises(WorkError, match=r"--engine-tolerance 0\.1"):
            run.check_gap(gap)
