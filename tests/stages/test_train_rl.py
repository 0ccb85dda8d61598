"""`train-rl`: what a step does to policy and flow, what a run leaves on disk, and that stops change no bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.flow_file import read_flow, read_flow_header
from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.artifacts.scores import iter_scores
from rlfr_cli.config.common import GradingConfig
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig, Normalisation, ScoreSource
from rlfr_cli.config.train_rl import (
    OnlineConfig,
    OptimiserConfig,
    PolicyLossConfig,
    RolloutConfig,
    RunConfig,
    RunEvalConfig,
)
from rlfr_cli.errors import ConfigError, MismatchError, OutputInUseError, Stopped, WorkError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import keyed_seed
from rlfr_cli.rl import updating
from rlfr_cli.stages import score, train_rl
from rlfr_cli.stages.drawing import Drawing, Drawn
from rlfr_cli.stages.trainer import Trainer
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    interrupt_after,
    rows_of_metrics,
    sampling_of,
    score_config,
    start_rlfr,
    train_config,
)

STEPS = 4
ROLLOUT_KEYS = {
    "step", "rollout/reward", "rollout/accuracy", "rollout/responses", "rollout/sampling_rounds",
    "rollout/trained_fraction", "rollout/response_tokens", "rollout/cut_off_fraction",
    "rollout/zero_variance_group_fraction", "grader/no_answer_fraction", "grader/unparseable_fraction",
    "grader/timeout_fraction", "engine/logprob_gap_max", "engine/kl_to_trainer",
    "engine/ratio_max", "engine/outside_clip_fraction", "engine/outside_clip_fraction_corrected",
    "engine/cut_fraction", "engine/weight_mean",
    "advantage/mean", "advantage/std", "advantage/min", "advantage/max", "advantage/negative_fraction",
    "policy/entropy", "policy/loss", "policy/gradient_norm", "policy/learning_rate", "policy/skipped_steps",
    "policy/clip_fraction", "policy/approximate_kl", "policy/ratio_mean", "policy/ratio_max",
    "time/sample_s", "time/measure_s", "time/update_s", "time/flow_s", "time/step_s", "time/tokens_per_s",
}  # fmt: skip
FLOW_KEYS = {
    "flow/deviation", "flow/deviation_correct", "flow/deviation_wrong", "flow/auc", "flow/rewarded_fraction",
    "flow/reward_sum_correct", "flow/reward_sum_wrong", "flow/coef",
}  # fmt: skip
ONLINE_KEYS = {
    "flow/loss", "flow/gradient_norm", "flow/steps", "flow/accepted_fraction", "flow/batches_without_accepted",
}  # fmt: skip
EVALUATION_KEYS = {
    "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/response_tokens", "eval/cut_off_fraction",
    "time/eval_s",
}  # fmt: skip


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in rows_of_metrics(run)]


def rows_of(run: Path, step: int) -> list[RolloutRow]:
    return list(iter_rollouts(run / "rollouts" / f"step-{step:06d}"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flow_tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_flow(path)[1]


def full_config(tiny: TinyArtifacts, out: Path, **options: Any) -> Any:
    """A run with everything: a flow that learns, an evaluation, checkpoints every second step."""
    values: dict[str, Any] = {
        "flow": tiny.flow,
        "rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=STEPS),
        "evaluation": RunEvalConfig(eval_data=str(tiny.problems), eval_every=3, eval_samples=2, eval_limit=2),
        "run": RunConfig(tensorboard=False, save_every=2),
    }
    return train_config(tiny.policy, tiny.problems, out, **{**values, **options})


def plain_config(tiny: TinyArtifacts, out: Path, **options: Any) -> Any:
    """One step without a flow, unless told otherwise."""
    values: dict[str, Any] = {"rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=1)}
    return train_config(tiny.policy, tiny.problems, out, **{**values, **options})


@pytest.fixture(scope="module")
def unbroken(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train_rl.run(full_config(tiny, out))
    return out


# What a step does


def test_every_step_and_evaluation_is_logged_with_all_metrics(unbroken: Path) -> None:
    lines = rows_of_metrics(unbroken)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0].keys() == {"step", *EVALUATION_KEYS}
    for line in lines[1:]:
        evaluated = line["step"] in (3, 4)
        assert line.keys() == ROLLOUT_KEYS | FLOW_KEYS | ONLINE_KEYS | (EVALUATION_KEYS if evaluated else set())


def test_metrics_are_those_of_the_rollouts_on_disk(unbroken: Path) -> None:
    for line in rows_of_metrics(unbroken)[1:]:
        rows = rows_of(unbroken, line["step"])
        assert len(rows) == 12
        assert line["rollout/reward"] == pytest.approx(np.mean([row.reward for row in rows]))
        assert line["rollout/accuracy"] == pytest.approx(np.mean([row.correct for row in rows]))
        assert line["policy/entropy"] == pytest.approx(np.mean(np.concatenate([row.entropy for row in rows])), rel=1e-4)
        advantages = np.concatenate([row.advantage for row in rows])
        assert line["advantage/mean"] == pytest.approx(advantages.mean(), abs=1e-5)
        assert line["advantage/negative_fraction"] == pytest.approx((advantages < 0).mean())
        gaps = [np.subtract(row.response_logprobs, row.trainer_logprobs) for row in rows]
        assert line["engine/logprob_gap_max"] == pytest.approx(np.abs(np.concatenate(gaps)).max(), rel=1e-3)
        assert line["engine/logprob_gap_max"] < 1e-3
        deviations = [np.mean([v for v in row.deviation if v is not None]) for row in rows]
        assert line["flow/deviation"] == pytest.approx(np.mean(deviations), rel=1e-4)
        assert line["flow/accepted_fraction"] == line["rollout/accuracy"]


def test_an_advantage_is_the_outcome_in_its_group_plus_later_flow_rewards(unbroken: Path) -> None:
    for step in (1, STEPS):
        rows = rows_of(unbroken, step)
        for start in range(0, 12, 4):
            group = rows[start : start + 4]
            rewards = np.array([row.reward for row in group])
            std = rewards.std(ddof=1)
            for row in group:
                outcome = 0.0 if std == 0 else (row.reward - rewards.mean()) / (std + 1e-9)
                per_token = np.array(row.flow_reward)
                per_token[-1] += outcome
                np.testing.assert_allclose(row.advantage, per_token[::-1].cumsum()[::-1], atol=1e-5)
                assert min(row.flow_reward) == pytest.approx(-0.01), "the highest score pays the whole coefficient"
                assert row.flow_reward[-1] == 0, "the last token has no next one"
                assert row.score[-1] is None


def test_a_batch_is_scored_with_the_flow_as_it_was(tiny: TinyArtifacts, unbroken: Path, tmp_path: Path) -> None:
    """`rlfr score` with the flow and policy before a step gives the step's scores; those after it do not."""
    after_two = checkpoint(unbroken, 2)

    def apart(step: int, flow: Path, model: Path, name: str) -> float:
        rollouts = unbroken / "rollouts" / f"step-{step:06d}"
        seed = keyed_seed(0, step)
        score.run(score_config(flow, tmp_path / name, model=str(model), rollouts=rollouts, seed=seed))
        pairs = zip(iter_scores(tmp_path / name), iter_rollouts(rollouts), strict=True)
        return max(float(np.abs(np.subtract(s.score[:-1], r.score[:-1])).max()) for s, r in pairs)

    assert apart(1, tiny.flow, tiny.policy, "first") < 1e-3
    assert apart(3, after_two / "flow.safetensors", after_two / "model", "third") < 1e-3
    assert apart(3, tiny.flow, after_two / "model", "other flow") > 1e-2


def test_the_policy_moves_towards_tokens_with_an_advantage(tiny: TinyArtifacts, tmp_path: Path) -> None:
    optimiser = OptimiserConfig(learning_rate=3e-4, warmup_fraction=0.0, schedule="constant")
    train_rl.run(plain_config(tiny, tmp_path, optimiser=optimiser))
    rows = rows_of(tmp_path, 1)
    assert len({row.reward for row in rows}) == 2, "the test needs right and wrong responses"
    model = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path, 1) / "model")
    gain = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt_token_ids, *row.response_token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, len(row.prompt_token_ids) - 1 : -1].log_softmax(-1)
        now = logprobs.gather(-1, torch.tensor(row.response_token_ids)[:, None])[:, 0]
        gain += float(((now - torch.tensor(row.trainer_logprobs)) * torch.tensor(row.advantage)).sum())
    assert gain > 0


def test_the_flow_learns_from_accepted_responses(tiny: TinyArtifacts, unbroken: Path) -> None:
    before, after = flow_tensors(tiny.flow), flow_tensors(checkpoint(unbroken, STEPS) / "flow.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "norm.weight")
    header = read_flow_header(checkpoint(unbroken, STEPS) / "flow.safetensors")
    updates = sum(line["flow/steps"] for line in rows_of_metrics(unbroken)[1:])
    assert updates > 0
    assert header.steps == read_flow_header(tiny.flow).steps + updates
    assert header.policy_step == STEPS
    assert header.model == model_fingerprint(checkpoint(unbroken, STEPS) / "model")


def test_without_online_steps_the_flow_stays_as_it_is(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = plain_config(tiny, tmp_path, flow=tiny.flow, online=OnlineConfig(online_steps=0))
    train_rl.run(config)
    before, after = flow_tensors(tiny.flow), flow_tensors(checkpoint(tmp_path, 1) / "flow.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    line = rows_of_metrics(tmp_path)[0]
    assert line.keys() == ROLLOUT_KEYS | FLOW_KEYS
    assert line["flow/rewarded_fraction"] > 0


def test_a_batch_without_accepted_responses_is_counted_and_leaves_the_flow(tiny: TinyArtifacts, tmp_path: Path) -> None:
    train_rl.run(plain_config(tiny, tmp_path, flow=tiny.flow, online=OnlineConfig(accept=("min-length=99",))))
    line = rows_of_metrics(tmp_path)[0]
    assert (line["flow/steps"], line["flow/accepted_fraction"], line["flow/batches_without_accepted"]) == (0, 0, 1)
    before, after = flow_tensors(tiny.flow), flow_tensors(checkpoint(tmp_path, 1) / "flow.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_plain_rlvr_has_no_flow_anywhere(tiny: TinyArtifacts, tmp_path: Path) -> None:
    train_rl.run(plain_config(tiny, tmp_path))
    assert rows_of_metrics(tmp_path)[0].keys() == ROLLOUT_KEYS
    for row in rows_of(tmp_path, 1):
        assert row.deviation is row.score is None
        assert set(row.flow_reward) == {0}
        assert len(set(row.advantage)) == 1, "the outcome alone is the same for every token"
    assert not (checkpoint(tmp_path, 1) / "flow.safetensors").exists()


def test_a_new_flow_learns_before_it_pays(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = train_config(
        tiny.policy,
        tiny.problems,
        tmp_path,
        new_flow=True,
        network=NetworkConfig(width=16, depth=1, context=(Context.PREVIOUS,)),
        layer_fraction=(0.5,),
        online=OnlineConfig(flow_warmup=2),
    )
    train_rl.run(config)
    lines = rows_of_metrics(tmp_path)
    assert [line["flow/rewarded_fraction"] > 0 for line in lines] == [False, False, True]
    assert all(line["flow/steps"] == (line["rollout/accuracy"] > 0) for line in lines)
    header = read_flow_header(checkpoint(tmp_path, 3) / "flow.safetensors")
    assert header.layer_indices == (4,)
    assert header.pairings == ({"context": "previous", "shift": 1},)


def test_random_scores_pay_tokens_that_have_nothing_to_do_with_the_flow(tiny: TinyArtifacts, tmp_path: Path) -> None:
    train_rl.run(plain_config(tiny, tmp_path / "random", flow=tiny.flow, scores=ScoreSource.RANDOM))
    train_rl.run(plain_config(tiny, tmp_path / "flow", flow=tiny.flow))
    drawn = []
    for row, other in zip(rows_of(tmp_path / "random", 1), rows_of(tmp_path / "flow", 1), strict=True):
        assert row.response_token_ids == other.response_token_ids
        assert row.deviation == other.deviation, "what is reported stays the flow's"
        assert row.score[-1] is None
        drawn += row.score[:-1]
        assert min(row.flow_reward) == pytest.approx(-0.01)
    assert 0 <= min(drawn) < 0.02
    assert 0.98 < max(drawn) < 1
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.06)


def test_the_kl_to_the_policy_itself_is_zero_before_the_first_update(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = plain_config(
        tiny,
        tmp_path,
        rollout=RolloutConfig(prompts_per_step=3, group_size=4, steps=2),
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup_fraction=0.0),
        policy_loss=PolicyLossConfig(reference_model=str(tiny.policy), kl_coef=0.1),
    )
    train_rl.run(config)
    first, second = rows_of_metrics(tmp_path)
    assert first["policy/kl_to_reference"] == pytest.approx(0, abs=1e-9)
    assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert second["policy/kl_to_reference"] > 1e-6


def test_micro_batches_change_memory_and_not_the_step(tiny: TinyArtifacts, tmp_path: Path) -> None:
    norms = []
    for name, budget in (("one", 16384), ("many", 40)):
        optimiser = OptimiserConfig(learning_rate=1e-4, tokens_per_micro_batch=budget)
        train_rl.run(plain_config(tiny, tmp_path / name, optimiser=optimiser, flow=tiny.flow))
        line = rows_of_metrics(tmp_path / name)[0]
        norms.append([line["policy/loss"], line["policy/gradient_norm"], line["flow/deviation"]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-6)


def test_a_reward_of_the_users_is_what_is_trained_on(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = tmp_path / "rewards.py"
    reward.write_text("def short(inputs):\n    return [-float(len(item.response)) for item in inputs]\n")
    config = plain_config(tiny, tmp_path / "run", grading=GradingConfig(reward=f"{reward}:short"))
    train_rl.run(config)
    for row in rows_of(tmp_path / "run", 1):
        assert row.reward == -len(row.response)
    reward.write_text("def short(inputs):\n    return [0.0 for item in inputs]\n")
    with pytest.raises(OutputInUseError, match=r"inputs\.reward"):
        train_rl.run(replace(config, resume=True))


def test_groups_of_equal_rewards_move_nothing_and_can_be_saved(random_model: Path, tiny: TinyArtifacts) -> None:
    """A policy that is never right: no advantage, no gradient, no optimiser state; and it still resumes."""
    out = random_model.parent / "run"
    config = train_config(
        random_model, tiny.problems, out, rollout=RolloutConfig(prompts_per_step=2, group_size=2, steps=1)
    )
    train_rl.run(config)
    line = rows_of_metrics(out)[0]
    assert line["rollout/zero_variance_group_fraction"] == 1
    assert (line["policy/loss"], line["policy/gradient_norm"]) == (0, 0)
    before, after = (
        load_file(random_model / "model.safetensors"),
        load_file(checkpoint(out, 1) / "model/model.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    longer = replace(config, rollout=RolloutConfig(prompts_per_step=2, group_size=2, steps=2), resume=True)
    assert train_rl.run(longer)["steps"] == 2


# What a run leaves on disk


def test_a_checkpoint_is_a_plain_model_folder(tiny: TinyArtifacts, unbroken: Path) -> None:
    folder = checkpoint(unbroken, STEPS) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(tiny.policy).state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)
    tokenizer, base = (AutoTokenizer.from_pretrained(path) for path in (folder, tiny.policy))
    assert tokenizer("1+2=3;\\boxed{3}")["input_ids"] == base("1+2=3;\\boxed{3}")["input_ids"]
    assert tokenizer.chat_template == base.chat_template
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names


def test_latest_names_the_newest_checkpoint_and_older_ones_go(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path
) -> None:
    assert steps_of(unbroken) == ["step-000002", "step-000004"]
    assert (unbroken / "latest").read_text() == "step-000004\n"
    train_rl.run(train_config(tiny.policy, tiny.problems, tmp_path, run=RunConfig(
        tensorboard=False, save_every=1, keep_checkpoints=1)))  # fmt: skip
    assert steps_of(tmp_path) == ["step-000003"]


def test_the_summary_says_where_the_run_ended(tiny: TinyArtifacts, unbroken: Path) -> None:
    summary = train_rl.run(full_config(tiny, unbroken, resume=True))  # complete: nothing is done
    lines = rows_of_metrics(unbroken)
    assert summary["steps"] == STEPS
    assert summary["checkpoint"] == str(checkpoint(unbroken, STEPS))
    assert summary["heldout_accuracy_first"] == lines[0]["eval/accuracy"]
    assert summary["heldout_accuracy_last"] == lines[-1]["eval/accuracy"]


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plan = train_rl.run(full_config(tiny, tmp_path / "run", dry_run=True))
    assert (plan["steps"], plan["responses_per_step"], plan["optimiser_steps"]) == (4, 12, 8)
    assert "blocks [2, 5], context next 1" in plan["flow"]
    assert list(tmp_path.iterdir()) == []
    assert train_rl.run(plain_config(tiny, tmp_path / "run", dry_run=True))["flow"] == "none: plain RLVR"


def test_episodes_count_passes_over_the_problems(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rollout = RolloutConfig(prompts_per_step=4, group_size=2, episodes=5.0)
    plan = train_rl.run(plain_config(tiny, tmp_path, rollout=rollout, dry_run=True))
    assert plan["steps"] == 8, "30 prompts, 4 a step"


def test_a_used_folder_is_refused_with_all_ways_out(tiny: TinyArtifacts, unbroken: Path) -> None:
    before = bytes_of(unbroken)
    with pytest.raises(OutputInUseError, match="already holds a run") as caught:
        train_rl.run(full_config(tiny, unbroken))
    assert all(way in str(caught.value.hint) for way in ("--resume", "--overwrite", "--out"))
    with pytest.raises(OutputInUseError, match=r"config\.policy_loss\.clip_low: 0\.2 there, 0\.1 here"):
        train_rl.run(full_config(tiny, unbroken, resume=True, policy_loss=PolicyLossConfig(clip_low=0.1)))
    assert bytes_of(unbroken) == before


def test_overwrite_begins_again_and_leaves_other_files(tiny: TinyArtifacts, tmp_path: Path) -> None:
    train_rl.run(plain_config(tiny, tmp_path, seed=1))
    first = bytes_of(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    train_rl.run(plain_config(tiny, tmp_path, overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (
        bytes_of(tmp_path)["checkpoints/step-000001/model/model.safetensors"]
        != (first["checkpoints/step-000001/model/model.safetensors"])
    )
    assert [line["step"] for line in rows_of_metrics(tmp_path)] == [1]


def test_a_run_goes_on_with_more_steps(tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = plain_config(tiny, tmp_path)
    train_rl.run(config)
    assert train_rl.run(replace(config, resume=True))["steps"] == 1
    assert "complete already (1 steps); nothing to do" in capsys.readouterr().err
    longer = replace(config, rollout=replace(config.rollout, steps=2), resume=True)
    assert train_rl.run(longer)["steps"] == 2
    assert "after step 1" in capsys.readouterr().err
    assert [line["step"] for line in rows_of_metrics(tmp_path)] == [1, 2]


# Stops


def assert_same_run(run: Path, other: Path) -> None:
    assert untimed(run) == untimed(other)
    for folder in ("rollouts", "checkpoints"):
        ours, theirs = bytes_of(run / folder), bytes_of(other / folder)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after the third step was logged, whose checkpoint is not due: the step is done again."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, RunFolder, "log_metrics", 4, SystemExit)
        with pytest.raises(SystemExit):
            train_rl.run(full_config(tiny, tmp_path))
    assert [line["step"] for line in rows_of_metrics(tmp_path)] == [0, 1, 2, 3]
    train_rl.run(full_config(tiny, tmp_path, resume=True))
    assert_same_run(tmp_path, unbroken)


def test_a_run_that_died_before_its_first_checkpoint_is_begun_again(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "step", 2, SystemExit)
        with pytest.raises(SystemExit):
            train_rl.run(full_config(tiny, tmp_path, resume=True))
    train_rl.run(full_config(tiny, tmp_path, resume=True))
    assert_same_run(tmp_path, unbroken)


def test_a_bfloat16_policy_resumes_bit_for_bit_and_stays_bfloat16(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(tmp_path / "policy")

    def config(name: str, **options: Any) -> Any:
        run = RunConfig(tensorboard=False, save_every=1)
        return train_config(tmp_path / "policy", tiny.problems, tmp_path / name, run=run, **options)

    train_rl.run(config("whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 2, SystemExit)
        with pytest.raises(SystemExit):
            train_rl.run(config("stopped"))
    train_rl.run(config("stopped", resume=True))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    last = checkpoint(tmp_path / "whole", 3)
    assert {value.dtype for value in load_file(last / "model/model.safetensors").values()} == {torch.bfloat16}
    exact = load_file(last / "trainer/weights.safetensors")
    assert {value.dtype for value in exact.values()} == {torch.float32}
    rounded = load_file(last / "model/model.safetensors")["model.norm.weight"]
    assert torch.equal(exact["model.norm.weight"].bfloat16(), rounded)
    loaded = AutoModelForCausalLM.from_pretrained(last / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_ctrl_c_twice_stops_at_once_and_says_what_is_kept(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, Drawing, "batch", 2)
    with pytest.raises(Stopped, match="keeps its last checkpoint, of step 1") as caught:
        train_rl.run(train_config(tiny.policy, tiny.problems, tmp_path, run=RunConfig(tensorboard=False, save_every=1)))
    assert "--resume" in str(caught.value.hint)


def test_a_stop_asked_for_in_a_step_comes_after_its_checkpoint(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Drawing.batch

    def draw(self: Drawing, step: int) -> Drawn:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, step)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Drawing, "batch", draw)
    with pytest.raises(Stopped, match="stopped after step 1 of 3") as caught:
        train_rl.run(train_config(tiny.policy, tiny.problems, tmp_path))
    assert caught.value.exit_code == 130
    assert "--resume" in str(caught.value.hint)
    assert steps_of(tmp_path) == ["step-000001"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def arguments_of(tiny: TinyArtifacts, out: Path) -> list[object]:
    """The command line of ``full_config``, with a checkpoint at every step."""
    return [
        "train-rl", "--model", tiny.policy, "--data", tiny.problems, "--id-column", "id", "--flow", tiny.flow,
        "--out", out, "--prompts-per-step", 3, "--group-size", 4, "--steps", STEPS, "--max-new-tokens", 32,
        "--reward", "accuracy", "--learning-rate", 1e-4, "--minibatch-responses", 6, "--device", "cpu",
        "--eval-data", tiny.problems, "--eval-every", 3, "--eval-samples", 2, "--eval-limit", 2,
        "--save-every", 1, "--no-tensorboard",
    ]  # fmt: skip


def wait_for(process: Any, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_step_resumes(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_rlfr(*arguments_of(tiny, tmp_path / "run"))
    wait_for(process, lambda: (tmp_path / "run" / "latest").exists())
    time.sleep(0.2)  # into the second step
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run = RunConfig(tensorboard=False, save_every=1)
    train_rl.run(full_config(tiny, tmp_path / "run", run=run, resume=True))
    assert f"resuming {tmp_path / 'run'} after step" in capsys.readouterr().err
    assert untimed(tmp_path / "run") == untimed(unbroken)
    last = f"step-{STEPS:06d}"
    assert bytes_of(tmp_path / "run/checkpoints" / last) == bytes_of(unbroken / "checkpoints" / last)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_names_resume(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*arguments_of(tiny, tmp_path), "--save-every", 100]
    process = start_rlfr(*arguments)
    wait_for(process, lambda: (tmp_path / "metrics.jsonl").exists())  # the evaluation before the first step
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopping after this step" in said
    assert "the same command with --resume goes on" in said
    stopped_at = RunFolder.open(tmp_path).latest_step()
    assert 1 <= stopped_at < STEPS
    assert rows_of_metrics(tmp_path)[-1]["step"] == stopped_at
    train_rl.run(full_config(tiny, tmp_path, resume=True, run=RunConfig(tensorboard=False, save_every=100)))
    assert untimed(tmp_path) == untimed(unbroken)


# Losses that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the policy loss NaN in some of its calls, counted from 1."""
    real, seen = updating.policy_loss, 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        loss, sums = real(*args, **kwargs)
        return (loss * torch.nan if seen in calls else loss), sums

    monkeypatch.setattr(updating, "policy_loss", poisoned)


def test_a_loss_that_is_not_finite_skips_its_step_and_is_counted(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1})
    optimiser = OptimiserConfig(learning_rate=1e-4)
    summary = train_rl.run(plain_config(tiny, tmp_path, flow=tiny.flow, optimiser=optimiser))
    assert summary["skipped_optimiser_steps"] == 1
    line = rows_of_metrics(tmp_path)[0]
    assert line["policy/loss"] is None
    before, after = (
        load_file(tiny.policy / "model.safetensors"),
        load_file(checkpoint(tmp_path, 1) / "model/model.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing was stepped"


def test_losses_that_stay_not_finite_stop_the_run(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, *range(3, 100)})  # the first alone is forgiven
    config = train_config(
        tiny.policy,
        tiny.problems,
        tmp_path,
        flow=tiny.flow,
        optimiser=OptimiserConfig(max_bad_steps=2, minibatch_responses=12),
        run=RunConfig(tensorboard=False, save_every=1),
        rollout=RolloutConfig(prompts_per_step=3, group_size=4, steps=9),
    )
    with pytest.raises(WorkError, match="2 optimiser steps in a row") as caught:
        train_rl.run(config)
    assert caught.value.exit_code == 1
    assert "--learning-rate" in str(caught.value.hint)
    assert [line["step"] for line in rows_of_metrics(tmp_path)] == [1, 2, 3]
    assert steps_of(tmp_path) == ["step-000002", "step-000003"]
    weights = load_file(checkpoint(tmp_path, 3) / "model/model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


# What is refused


def test_a_flow_of_other_weights_needs_to_be_allowed(tiny: TinyArtifacts, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(tmp_path / "model")
    config = train_config(
        tmp_path / "model", tiny.problems, tmp_path / "run", flow=tiny.flow,
        rollout=RolloutConfig(prompts_per_step=1, group_size=2, steps=1),
    )  # fmt: skip
    with pytest.raises(MismatchError, match="other weights") as caught:
        train_rl.run(config)
    assert "--allow-other-weights" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
    assert train_rl.run(replace(config, allow_other_weights=True))["steps"] == 1


def test_a_checkpoint_trains_on_with_its_own_flow(unbroken: Path, tiny: TinyArtifacts, tmp_path: Path) -> None:
    last = checkpoint(unbroken, STEPS)
    config = train_config(last / "model", tiny.problems, tmp_path / "run", flow=last / "flow.safetensors", dry_run=True)
    assert train_rl.run(config)["dry_run"]


def test_a_flow_of_another_architecture_is_refused(tiny: TinyArtifacts, random_model: Path, tmp_path: Path) -> None:
    config = train_config(random_model, tiny.problems, tmp_path / "run", flow=tiny.flow, allow_other_weights=True)
    with pytest.raises(MismatchError, match="another architecture"):
        train_rl.run(config)
    assert not (tmp_path / "run").exists()


def test_a_reference_model_of_another_vocabulary_is_refused(
    tiny: TinyArtifacts, random_model: Path, tmp_path: Path
) -> None:
    loss = PolicyLossConfig(reference_model=str(random_model))
    with pytest.raises(ConfigError, match="vocabulary"):
        train_rl.run(plain_config(tiny, tmp_path / "run", policy_loss=loss))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"top_p": 0.9}}, "--top-p 0.9"),
        ({"sampling": {"top_k": 5}}, "--top-k 5"),
        ({"sampling": {"temperature": 0.0}}, "--temperature 0"),
        ({"scores": ScoreSource.RANDOM}, "--scores random"),
        ({"flow": Path("f"), "new_flow": True}, "--flow and --new-flow"),
        ({"network": NetworkConfig(context=(Context.SELF,))}, "without --new-flow"),
        ({"flow": Path("f"), "network": NetworkConfig(shift=2)}, "without --new-flow"),
        ({"flow": Path("f"), "layer_fraction": (0.5,)}, "without --new-flow"),
        ({"new_flow": True, "online": OnlineConfig(online_steps=0)}, "--online-steps 0"),
        ({"new_flow": True, "network": NetworkConfig(normalisation=Normalisation.CHANNEL)}, "no statistics"),
        ({"scores": ScoreSource.SHUFFLED}, "--scores shuffled"),
        (
            {"scores": ScoreSource.LIKELIHOOD, "rollout": RolloutConfig(dynamic_sampling=True)},
            "--uniform-groups must be given",
        ),
        ({"overwrite": True, "resume": True}, "--overwrite and --resume"),
        ({"evaluation": RunEvalConfig(eval_temperature=0.0)}, "--eval-samples 4"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    if "sampling" in options:
        options = {**options, "sampling": sampling_of(**options["sampling"])}
    with pytest.raises(ConfigError, match=message):
        train_config(Path("m"), Path("d"), Path("o"), **options)


def test_an_unknown_rule_is_refused_with_the_rules_there_are(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--accept corect: no such rule") as caught:
        train_rl.run(plain_config(tiny, tmp_path / "run", flow=tiny.flow, online=OnlineConfig(accept=("corect",))))
    assert "min-entropy=NUMBER" in str(caught.value.hint)


def test_flow_rewards_are_the_penalty_that_was_asked_for(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = FlowRewardConfig(coef=0.5, top_k=3, threshold=0.0, centre_reward=True)
    train_rl.run(plain_config(tiny, tmp_path, flow=tiny.flow, flow_reward=reward))
    for row in rows_of(tmp_path, 1):
        valid = np.array(row.flow_reward[:-1])
        assert valid.sum() == pytest.approx(0, abs=1e-5)
        assert (valid < 0).sum() == 3
        highest = np.argsort(row.score[:-1])[-3:]
        assert set(np.flatnonzero(valid < 0)) == set(highest)


def test_flow_options_without_a_flow_are_said_to_be_unused(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_rl.run(plain_config(tiny, tmp_path / "run", dry_run=True))
    assert "not used" not in capsys.readouterr().err
    train_rl.run(plain_config(tiny, tmp_path / "run", dry_run=True, flow_reward=FlowRewardConfig(coef=0.5)))
    assert "not used" in capsys.readouterr().err


def test_a_dry_run_tells_the_size_of_a_checkpoint(tiny: TinyArtifacts, tmp_path: Path) -> None:
    told = train_rl.run(full_config(tiny, tmp_path / "dry", dry_run=True))["checkpoint_bytes"]
    config = full_config(tiny, tmp_path / "run")
    train_rl.run(config)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    written = sum(file.stat().st_size for file in newest.rglob("*.safetensors"))
    assert abs(told - written) < 0.05 * written
