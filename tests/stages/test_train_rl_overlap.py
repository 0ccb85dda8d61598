"""`train-rl --overlap`: every batch but the first is drawn by the policy of one step earlier; nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.config.engine import EngineConfig, EngineName, SeparationConfig
from rlfr_cli.config.rl import OptimiserConfig, RolloutConfig
from rlfr_cli.config.train_rl import RunConfig, RunEvalConfig, TrainRlConfig
from rlfr_cli.engines.opening import EngineChoice
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.errors import ConfigError, Stopped, WorkError
from rlfr_cli.policy.forward import TokenSequence, response_logprobs
from rlfr_cli.policy.loading import Placement, load_policy, resolve_placement
from rlfr_cli.stages import train_rl
from rlfr_cli.stages.trainer import Trainer
from stages.copying_engine import CopyingEngine
from stages.tiny_stages import TinyArtifacts, bytes_of, interrupt_after, rows_of_metrics, train_config

STEPS = 4
CPU = torch.device("cpu")


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, engines: list[CopyingEngine]) -> list[CopyingEngine]:
    """Engines that runs open from now on; `auto` chooses them, under the name of vLLM."""
    real = train_rl.choose_engine
    monkeypatch.setattr(
        train_rl, "choose_engine", lambda *given, **options: replace(real(*given, **options), name=EngineName.VLLM)
    )
    return engines


def overlap_config(tiny: TinyArtifacts, out: Path, **options: Any) -> TrainRlConfig:
    values: dict[str, Any] = {
        "generation": EngineConfig(engine="auto"),
        "separation": SeparationConfig(overlap=True),
        "rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=STEPS),
        "optimiser": OptimiserConfig(learning_rate=3e-4, minibatch_responses=12, warmup_fraction=0),
        "run": RunConfig(tensorboard=False, save_every=1, keep_checkpoints=9),
    }
    return train_config(tiny.policy, tiny.problems, out, **{**values, **options})


def rows_of(run: Path, step: int) -> list[RolloutRow]:
    return list(iter_rollouts(run / "rollouts" / f"step-{step:06d}"))


def gap(model: Path, rows: list[RolloutRow]) -> float:
    """Largest difference of the rows' log-probabilities to the model's."""
    policy = load_policy(model, resolve_placement("cpu", "float32"))
    sequences = [TokenSequence(tuple(row.prompt_token_ids), tuple(row.response_token_ids)) for row in rows]
    theirs_K, _ = response_logprobs(policy, sequences, 1.0)
    drawn_K = torch.tensor([value for row in rows for value in row.response_logprobs or ()])
    return float((theirs_K.detach() - drawn_K).abs().max())


def test_a_batch_is_drawn_by_the_policy_of_one_step_earlier(
    tiny: TinyArtifacts, tmp_path: Path, apart: list[CopyingEngine]
) -> None:
    train_rl.run(overlap_config(tiny, tmp_path))
    models = [tiny.policy, *(tmp_path / "checkpoints" / f"step-{step:06d}" / "model" for step in range(1, STEPS + 1))]
    for step, drew, trained in [(1, 0, 0), (2, 0, 1), (3, 1, 2), (4, 2, 3)]:
        rows = rows_of(tmp_path, step)
        assert gap(models[drew], rows) < 1e-4, step
        if step in (2, 3):  # step 3, whose outcomes are all equal, moves no weight
            assert gap(models[trained], rows) > 1e-3, step
    metrics = rows_of_metrics(tmp_path)
    assert [row["rollout/policy_age"] for row in metrics] == [0, 1, 1, 1]
    assert metrics[0]["engine/kl_to_trainer"] < 1e-8 < 1e-7 < metrics[2]["engine/kl_to_trainer"]
    assert metrics[2]["engine/weight_mean"] != 1
    (engine,) = apart
    # Weights go over before a batch that is drawn ahead, and after the batch in hand.
    assert engine.calls == [
        *("wake", "check", "generate", "sleep", "generate"),
        *("load", "check", "generate") * (STEPS - 2),
        "close",
    ]


def test_problems_are_those_of_a_run_without_overlap(
    tiny: TinyArtifacts, tmp_path: Path, apart: list[CopyingEngine]
) -> None:
    train_rl.run(overlap_config(tiny, tmp_path / "ahead"))
    train_rl.run(overlap_config(tiny, tmp_path / "in-turn", separation=SeparationConfig()))
    assert bytes_of(tmp_path / "ahead" / "rollouts" / "step-000001") == bytes_of(
        tmp_path / "in-turn" / "rollouts" / "step-000001"
    )
    for step in range(1, STEPS + 1):
        names = [
            [(row.problem_id, row.sample_index) for row in rows_of(tmp_path / run, step)]
            for run in ("ahead", "in-turn")
        ]
        assert names[0] == names[1]


def test_an_evaluation_waits_for_the_batch_and_uses_the_weights_of_its_step(
    tiny: TinyArtifacts, tmp_path: Path, apart: list[CopyingEngine]
) -> None:
    """The engine itself refuses weights while it draws (CopyingEngine); the batch begun before stays one step old."""
    evaluation = RunEvalConfig(eval_data=str(tiny.problems), eval_every=1, eval_samples=1, eval_limit=2)
    train_rl.run(overlap_config(tiny, tmp_path, evaluation=evaluation))
    assert gap(tmp_path / "checkpoints" / "step-000001" / "model", rows_of(tmp_path, 3)) < 1e-4
    (engine,) = apart
    step_2 = engine.calls[engine.calls.index("load") :]
    # After step 1: weights, evaluation, and in step 2 the batch of step 3 at once, by the same weights.
    assert step_2[:7] == ["load", "check", "generate", "sleep", "generate", "wake", "load"]


def test_a_stopped_run_goes_on_with_the_problems_that_come_next(
    tiny: TinyArtifacts, tmp_path: Path, apart: list[CopyingEngine]
) -> None:
    """What was drawn ahead is lost with the stop, and is neither skipped nor counted."""
    train_rl.run(overlap_config(tiny, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 2)
        with pytest.raises(Stopped):
            train_rl.run(overlap_config(tiny, tmp_path / "broken"))
    train_rl.run(overlap_config(tiny, tmp_path / "broken", resume=True))
    for step in (3, 4):
        broken, whole = (rows_of(tmp_path / run, step) for run in ("broken", "whole"))
        assert [row.problem_id for row in broken] == [row.problem_id for row in whole]
    assert [row["rollout/policy_age"] for row in rows_of_metrics(tmp_path / "broken")] == [0, 1, 0, 1]


def test_a_failure_while_drawing_ahead_stops_the_run(
    tiny: TinyArtifacts, tmp_path: Path, apart: list[CopyingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CopyingEngine.generate

    def fail_third(engine: CopyingEngine, *given: Any, **options: Any) -> Any:
        if engine.calls.count("generate") == 2:
            raise WorkError("vLLM failed: out of memory")
        return real(engine, *given, **options)

    monkeypatch.setattr(CopyingEngine, "generate", fail_third)
    with pytest.raises(WorkError, match="out of memory"):
        train_rl.run(overlap_config(tiny, tmp_path))
    assert len(rows_of_metrics(tmp_path)) == 2
    assert apart[0].calls[-1] == "close"


def test_the_trainers_own_model_cannot_draw_ahead(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--overlap is for an engine apart") as caught:
        overlap_config(tiny, tmp_path, generation=EngineConfig())
    assert "--engine vllm" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="auto chose hf"):
        train_rl.run(overlap_config(tiny, tmp_path))


def choice_on(device: str) -> EngineChoice:
    class Model:
        placement = Placement(torch.device(device), torch.bfloat16)

    return EngineChoice(EngineName.VLLM, Model(), 1)  # type: ignore[arg-type]


def test_on_a_gpu_overlap_needs_another_one(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = overlap_config(tiny, tmp_path)
    with pytest.raises(ConfigError, match="needs GPUs") as caught:
        train_rl.check_overlap(config, choice_on("cuda:0"), ALONE)
    assert "--engine-device" in str(caught.value.hint)
    train_rl.check_overlap(config, choice_on("cpu"), ALONE)
    apart = replace(config, separation=SeparationConfig(overlap=True, engine_device=(1,)))
    train_rl.check_overlap(apart, choice_on("cuda:0"), ALONE)


def test_several_processes_cannot_agree_on_rounds_while_they_train(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rollout = RolloutConfig(prompts_per_step=2, dynamic_sampling=True, steps=1)
    config = overlap_config(tiny, tmp_path, rollout=rollout)
    train_rl.check_overlap(config, choice_on("cpu"), ALONE)
    with pytest.raises(ConfigError, match="--dynamic-sampling"):
        train_rl.check_overlap(config, choice_on("cpu"), Ranks(0, 2, 0, CPU))


def test_engine_devices_go_to_the_processes_of_a_machine_in_order(tiny: TinyArtifacts, tmp_path: Path) -> None:
    def devices(local_rank: int, device: str = "cuda:0", processes: int = 4, **sizes: int) -> tuple[int, ...]:
        config = overlap_config(
            tiny,
            tmp_path,
            generation=EngineConfig(engine="vllm", **sizes),
            separation=SeparationConfig(engine_device=(4, 5, 6, 7)),
        )
        return train_rl.engine_devices(config, torch.device(device), local_rank, processes)

    assert [devices(rank) for rank in range(4)] == [(4,), (5,), (6,), (7,)]
    assert [devices(rank, processes=2, tensor_parallel_size=2) for rank in range(2)] == [(4, 5), (6, 7)]
    assert devices(0, processes=1, data_parallel_size=4) == (4, 5, 6, 7)
    with pytest.raises(ConfigError, match=r"GPU 6, 7 would do nothing; 2 training processes .* vLLM on 1, take 2"):
        devices(0, processes=2)
    with pytest.raises(ConfigError, match=r"GPU 6, 7 would do nothing; 1 training process .* on 2, take 2"):
        devices(0, processes=1, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="process 3 of this machine has none left; each one's vLLM takes 2"):
        devices(2, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="GPU 5 is the trainer's"):
        devices(1, "cuda:5")
    with pytest.raises(ConfigError, match="--device is cpu"):
        devices(0, "cpu")
    with pytest.raises(ConfigError, match="names a GPU twice: 1, 1"):
        overlap_config(tiny, tmp_path, separation=SeparationConfig(engine_device=(1, 1)))
