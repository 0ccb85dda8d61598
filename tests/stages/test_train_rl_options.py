"""`train-rl`: options of reinforcement learning that change what a step draws, pays, trains on and remembers."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.config.common import GradingConfig
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig, ScoreSource
from rlfr_cli.config.rl import OnlineConfig, OptimiserConfig, PolicyLossConfig, RolloutConfig
from rlfr_cli.config.train_rl import CoefficientConfig, RunConfig
from rlfr_cli.errors import ConfigError, MismatchError, Stopped
from rlfr_cli.flow.choices import Normalise
from rlfr_cli.rl.choices import Aggregation, Estimator, KLEstimator, KLPlace, RatioLevel, UniformGroups
from rlfr_cli.stages import extract_latents, train_rl
from rlfr_cli.stages.online_flow import OnlineFlow, coefficient_at
from rlfr_cli.stages.trainer import Trainer
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    extract_config,
    interrupt_after,
    rows_of_metrics,
    sampling_of,
    train_config,
)


def one_step(tiny: TinyArtifacts, out: Path, **options: Any) -> tuple[dict[str, Any], list[RolloutRow]]:
    """Metrics and rollouts of a run of one step."""
    values: dict[str, Any] = {"rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=1)}
    train_rl.run(train_config(tiny.policy, tiny.problems, out, **{**values, **options}))
    return rows_of_metrics(out)[0], list(iter_rollouts(out / "rollouts" / "step-000001"))


def weights_of(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")


def groups_of(rows: list[RolloutRow], size: int = 4) -> list[list[float]]:
    return [[row.reward or 0.0 for row in rows[i : i + size]] for i in range(0, len(rows), size)]


# Dynamic sampling


def dynamic(uniform: UniformGroups | None = None, **options: Any) -> RolloutConfig:
    values = {"prompts_per_step": 3, "group_size": 4, "steps": 1, "dynamic_sampling": True, "max_sampling_rounds": 6}
    return RolloutConfig(**{**values, "uniform_groups": uniform, **options})


def test_dynamic_sampling_draws_until_enough_groups_differ(tiny: TinyArtifacts, tmp_path: Path) -> None:
    metrics, rows = one_step(tiny, tmp_path, rollout=dynamic())
    groups = groups_of(rows)
    varied = [len(set(group)) > 1 for group in groups]
    assert sum(varied) == 3 or metrics["rollout/sampling_rounds"] == 6
    assert len(groups) > 3, "this seed should meet a uniform group"
    assert metrics["rollout/responses"] == len(rows)
    assert metrics["rollout/trained_fraction"] == pytest.approx(sum(varied) / len(groups))
    # No two responses of a step share a name, even where a problem came twice.
    assert len({(row.problem_id, row.sample_index) for row in rows}) == len(rows)
    for group, differs in zip(range(0, len(rows), 4), varied, strict=True):
        assert differs == any(any(row.advantage or ()) for row in rows[group : group + 4])


def test_uniform_groups_are_trained_by_the_flow_where_they_stay(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = FlowRewardConfig(threshold=0.0, top_k=0)
    kept, rows = one_step(tiny, tmp_path / "a", flow=tiny.flow, flow_reward=reward, rollout=dynamic(UniformGroups.KEEP))
    dropped, _ = one_step(tiny, tmp_path / "b", flow=tiny.flow, flow_reward=reward, rollout=dynamic(UniformGroups.DROP))
    assert kept["rollout/trained_fraction"] == 1
    assert dropped["rollout/trained_fraction"] < 1
    uniform = [group for group, values in enumerate(groups_of(rows)) if len(set(values)) == 1]
    for group in uniform:
        assert all(any(row.advantage or ()) for row in rows[4 * group : 4 * group + 4])
    assert not torch.equal(*(weights_of(tmp_path / run)["model.norm.weight"] for run in "ab"))


def test_a_step_without_a_differing_group_trains_nothing(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """A reward that is always the same."""
    (tmp_path / "same.py").write_text("def same(inputs):\n    return [1.0] * len(inputs)\n")
    metrics, rows = one_step(
        tiny,
        tmp_path / "run",
        rollout=dynamic(max_sampling_rounds=2),
        grading=GradingConfig(reward=f"{tmp_path}/same.py:same"),
    )
    assert len(rows) == 2 * 3 * 4
    assert metrics["policy/loss"] is None
    assert metrics["rollout/trained_fraction"] == 0
    before = load_file(tiny.policy / "model.safetensors")
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(after[name], before[name].float().to(after[name].dtype)) for name in after)


def test_a_step_begins_where_the_last_one_ended(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """Six problems: two steps of dynamic sampling take them in one shuffled order, none twice before all came once."""
    config = train_config(tiny.policy, tiny.problems, tmp_path, rollout=dynamic(steps=3))
    train_rl.run(config)
    asked: list[str] = []
    for step in (1, 2, 3):
        rows = list(iter_rollouts(tmp_path / "rollouts" / f"step-{step:06d}"))
        asked += [row.problem_id for row in rows[::4]]
    for start in range(0, len(asked) - 5, 6):
        assert len(set(asked[start : start + 6])) == 6


# What is paid and trained on


def test_cut_off_responses_can_be_left_out_of_the_loss(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sampling = sampling_of(max_new_tokens=22)
    plain, rows = one_step(tiny, tmp_path / "a", sampling=sampling)
    masked, _ = one_step(tiny, tmp_path / "b", sampling=sampling, policy_loss=PolicyLossConfig(mask_cut_off=True))
    cut = sum(row.finish_reason == "length" for row in rows)
    assert 0 < cut < len(rows)
    assert plain["rollout/trained_fraction"] == 1
    assert masked["rollout/trained_fraction"] == pytest.approx(1 - cut / len(rows))


def test_the_coefficient_follows_its_schedule() -> None:
    config = train_config(
        Path("m"),
        Path("d"),
        Path("o"),
        flow=Path("f"),
        flow_reward=FlowRewardConfig(coef=0.2),
        coefficient=CoefficientConfig(schedule="linear", warmup_fraction=0.2, final_fraction=0.5),
    )
    course = [coefficient_at(config, step, 10) for step in range(1, 11)]
    assert course[:2] == pytest.approx([0.1, 0.2])
    assert course[2:] == pytest.approx([0.2 * (0.5 + 0.5 * (1 - n / 8)) for n in range(1, 9)])
    assert course[-1] == pytest.approx(0.1)
    constant = replace(config, coefficient=CoefficientConfig())
    assert [coefficient_at(constant, step, 10) for step in (1, 10)] == [0.2, 0.2]


def test_a_new_flow_pays_nothing_until_its_warm_up_is_over(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = train_config(
        tiny.policy,
        tiny.problems,
        tmp_path,
        new_flow=True,
        network=NetworkConfig(width=24, depth=1),
        online=OnlineConfig(flow_warmup=1),
        rollout=RolloutConfig(prompts_per_step=3, group_size=4, steps=2),
    )
    train_rl.run(config)
    assert [line["flow/coef"] for line in rows_of_metrics(tmp_path)] == [0.0, 0.01]
    assert [line["flow/rewarded_fraction"] > 0 for line in rows_of_metrics(tmp_path)] == [False, True]


@pytest.mark.parametrize("source", [ScoreSource.LIKELIHOOD, ScoreSource.ENTROPY])
def test_baselines_pay_without_a_flow(
    source: ScoreSource, tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, rows = one_step(tiny, tmp_path, scores=source)
    assert f"tokens are paid by their {source}" in capsys.readouterr().err
    assert metrics["flow/coef"] == 0.01
    assert "flow/deviation" not in metrics
    for row in rows:
        values = row.entropy if source is ScoreSource.ENTROPY else [-value for value in row.trainer_logprobs or ()]
        assert row.score == pytest.approx(values)
        paid = np.flatnonzero(row.flow_reward)
        assert np.argmax(row.score or ()) in paid or not len(paid)
        assert min(row.flow_reward or (0.0,)) == pytest.approx(-0.01)


def test_shuffled_scores_pay_each_response_as_much_as_the_flow_does(tiny: TinyArtifacts, tmp_path: Path) -> None:
    _, real = one_step(tiny, tmp_path / "a", flow=tiny.flow)
    _, shuffled = one_step(tiny, tmp_path / "b", flow=tiny.flow, scores=ScoreSource.SHUFFLED)
    for one, other in zip(real, shuffled, strict=True):
        assert one.deviation == pytest.approx(other.deviation, nan_ok=True)
        assert sorted(one.score[:-1]) == pytest.approx(sorted(other.score[:-1]))
        assert sum(one.flow_reward) == pytest.approx(sum(other.flow_reward))
    assert any(one.flow_reward != other.flow_reward for one, other in zip(real, shuffled, strict=True))


def test_kl_in_the_reward_changes_advantages_and_is_logged(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """The policy is its own reference at the first step: the KL is 0, and from the second it is paid for."""
    loss = PolicyLossConfig(
        reference_model=str(tiny.policy), kl_coef=5.0, kl_in=KLPlace.REWARD, kl_estimator=KLEstimator.K1
    )
    rollout = RolloutConfig(prompts_per_step=3, group_size=4, steps=2)
    optimiser = OptimiserConfig(learning_rate=1e-3, minibatch_responses=12, warmup_fraction=0)
    for name, policy_loss in (("paid", loss), ("plain", replace(loss, kl_coef=0.0, kl_in=KLPlace.LOSS))):
        config = train_config(
            tiny.policy, tiny.problems, tmp_path / name, rollout=rollout, policy_loss=policy_loss, optimiser=optimiser
        )
        train_rl.run(config)
    paid, plain = (rows_of_metrics(tmp_path / name) for name in ("paid", "plain"))
    assert paid[0]["policy/kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert paid[1]["policy/kl_to_reference"] > 1e-5
    # The first step is the same; the second draws the same responses and pays for them differently.
    assert paid[0]["advantage/std"] == pytest.approx(plain[0]["advantage/std"], rel=1e-4)
    assert paid[1]["rollout/reward"] == plain[1]["rollout/reward"]
    assert abs(paid[1]["advantage/mean"] - plain[1]["advantage/mean"]) > 1e-4


def test_draws_are_chosen_once_and_remembered(tiny: TinyArtifacts, tmp_path: Path) -> None:
    def config(out: Path, **options: Any) -> Any:
        return train_config(
            tiny.policy,
            tiny.problems,
            out,
            flow=tiny.flow,
            flow_reward=FlowRewardConfig(draw_agreement=0.9, max_draws=8),
            rollout=RolloutConfig(prompts_per_step=3, group_size=4, steps=2),
            run=RunConfig(tensorboard=False, save_every=1),
            **options,
        )

    train_rl.run(config(tmp_path / "run"))
    lines = rows_of_metrics(tmp_path / "run")
    assert lines[0]["flow/num_draws"] == lines[1]["flow/num_draws"] > 1
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 1)
        with pytest.raises(Stopped):
            train_rl.run(config(tmp_path / "broken"))
    train_rl.run(config(tmp_path / "broken", resume=True))
    assert [line["flow/num_draws"] for line in rows_of_metrics(tmp_path / "broken")] == [
        line["flow/num_draws"] for line in lines
    ]


# The online reference


def test_the_buffer_feeds_later_updates_and_survives_a_stop(tiny: TinyArtifacts, tmp_path: Path) -> None:
    def config(out: Path, buffer: int, **options: Any) -> Any:
        return train_config(
            tiny.policy,
            tiny.problems,
            out,
            flow=tiny.flow,
            online=OnlineConfig(buffer_responses=buffer),
            run=RunConfig(tensorboard=False, save_every=1, keep_checkpoints=9),
            **options,
        )

    train_rl.run(config(tmp_path / "whole", 5))
    train_rl.run(config(tmp_path / "without", 0))
    whole, without = rows_of_metrics(tmp_path / "whole"), rows_of_metrics(tmp_path / "without")
    assert whole[0]["flow/buffered_responses"] == 0
    assert 0 < whole[-1]["flow/buffered_responses"] <= 5
    assert "flow/buffered_responses" not in without[0]
    assert whole[0]["flow/loss"] == without[0]["flow/loss"]
    assert whole[-1]["flow/loss"] != without[-1]["flow/loss"]

    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 2)
        with pytest.raises(Stopped):
            train_rl.run(config(tmp_path / "broken", 5))
    train_rl.run(config(tmp_path / "broken", 5, resume=True))
    assert bytes_of(tmp_path / "broken" / "checkpoints") == bytes_of(tmp_path / "whole" / "checkpoints")


def test_expert_latents_have_their_share_of_the_updates_weight(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = tmp_path / "experts"
    extract_latents.run(
        extract_config(tiny.policy, experts, data=str(tiny.expert), layer_index=(2, 5), max_shift=2, id_column="id")
    )
    seen: list[tuple[float, float]] = []
    real = OnlineFlow._experts

    def watched(self: OnlineFlow, step: int, reference: Any) -> Any:
        found = real(self, step, reference)
        seen.append(tuple(float(sum(e.weights.sum() for e in part)) for part in (reference, found)))
        return found

    monkeypatch.setattr(OnlineFlow, "_experts", watched)
    online = OnlineConfig(expert_latents=experts, expert_share=0.4)
    metrics, _ = one_step(tiny, tmp_path / "run", flow=tiny.flow, online=online)
    (policy_weight, expert_weight), *_ = seen
    assert policy_weight > 0
    assert expert_weight / (policy_weight + expert_weight) == pytest.approx(0.4)
    assert metrics["flow/expert_responses"] >= 1
    plain, _ = one_step(tiny, tmp_path / "plain", flow=tiny.flow)
    assert plain["flow/loss"] != metrics["flow/loss"]
    assert "expert_latents" in RunFolder.open(tmp_path / "run").config["inputs"]


def test_expert_latents_of_other_blocks_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "experts", data=str(tiny.expert), layer_index=(3,), id_column="id")
    )
    config = train_config(
        tiny.policy,
        tiny.problems,
        tmp_path / "run",
        flow=tiny.flow,
        online=OnlineConfig(expert_latents=tmp_path / "experts"),
    )
    with pytest.raises(MismatchError, match=r"blocks \[2, 5\].*blocks \[3\]"):
        train_rl.run(config)
    assert not (tmp_path / "run").exists()


# All options together

CHOICES: dict[str, dict[str, list[Any]]] = {
    "policy_loss": {
        "clip_high": [0.2, 0.28],
        "ratio_cap": [0.0, 3.0],
        "dual_clip": [0.0, 3.0],
        "ratio_level": list(RatioLevel),
        "aggregation": list(Aggregation),
        "estimator": list(Estimator),
        "discount": [1.0, 0.9],
        "reference_model": [None, "policy"],
        "kl_coef": [0.0, 0.1],
        "kl_estimator": list(KLEstimator),
        "kl_in": list(KLPlace),
        "kl_ratio": [False, True],
        "entropy_coef": [0.0, 0.01],
        "entropy_advantage": [0.0, 0.4],
        "mask_cut_off": [False, True],
    },
    "flow_reward": {
        "timestep": [(0.8,), (0.5, 0.8)],
        "num_draws": [1, 2],
        "antithetic": [False, True],
        "draw_agreement": [0.0, 0.3],
        "score_normalisation": list(Normalise),
        "power": [1.0, 2.0],
        "threshold": [0.6, 0.0],
        "top_k": [15, 0],
        "coef": [0.01, -0.01],
        "centre_reward": [False, True],
    },
    "online": {
        "online_steps": [1, 2, 0],
        "online_timesteps": ["fit", "rewarding"],
        "online_noise_repeats": [1, 2],
        "accept": [("correct",), ("finished", "min-entropy=0.5"), ("reward", "max-group-share=0.9")],
        "buffer_responses": [0, 4],
    },
    "rollout": {
        "prompts_per_step": [2],
        "group_size": [3],
        "steps": [1],
        "dynamic_sampling": [False, True],
        "max_sampling_rounds": [2],
        "uniform_groups": [None, UniformGroups.KEEP, UniformGroups.DROP],
    },
    "coefficient": {"schedule": ["constant", "cosine"], "warmup_fraction": [0.0, 0.5]},
    "optimiser": {"minibatch_responses": [6, 4], "gradient_checkpointing": [False, True], "learning_rate": [1e-4]},
}
GROUPS = {
    "policy_loss": PolicyLossConfig,
    "flow_reward": FlowRewardConfig,
    "online": OnlineConfig,
    "rollout": RolloutConfig,
    "coefficient": CoefficientConfig,
    "optimiser": OptimiserConfig,
}


def random_options(drawn: random.Random, tiny: TinyArtifacts) -> dict[str, Any]:
    """Every option at random; raises ConfigError where they contradict each other."""
    options: dict[str, Any] = {"scores": drawn.choice(list(ScoreSource))}
    options |= drawn.choice([{}, {"flow": tiny.flow}, {"flow": tiny.flow}, {"new_flow": True}])
    if "new_flow" in options:
        options["network"] = NetworkConfig(width=24, depth=1, context=drawn.choice([("next",), ("previous", "self")]))
    for name, choices in CHOICES.items():
        values = {key: drawn.choice(found) for key, found in choices.items()}
        if values.get("reference_model"):
            values["reference_model"] = str(tiny.policy)
        options[name] = GROUPS[name](**values)
    return options


def test_the_choices_name_every_option_of_the_loss_and_the_flow_reward() -> None:
    left_out = {
        "policy_loss": {"clip_low", "entropy_advantage_cap"},
        "flow_reward": {"max_draws"},
        "online": {"online_learning_rate", "expert_latents", "expert_share", "flow_warmup"},
        "rollout": {"episodes"},
    }
    for name, unnamed in left_out.items():
        fields = {field.name for field in dataclasses.fields(GROUPS[name])}
        assert fields == CHOICES[name].keys() | unnamed, name


@pytest.mark.slow
def test_any_options_train_or_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """Draws over all options: each is refused, or its step gives finite weights and metrics."""
    drawn = random.Random(0)
    trained = refused = 0
    while trained < 12:
        try:
            options = random_options(drawn, tiny)
            config = train_config(tiny.policy, tiny.problems, tmp_path / str(trained), **options)
        except ConfigError:
            refused += 1
            continue
        train_rl.run(config)
        metrics = rows_of_metrics(tmp_path / str(trained))[0]
        numbers = [value for value in metrics.values() if value is not None]
        assert np.isfinite(numbers).all(), (options, metrics)
        assert all(bool(t.isfinite().all()) for t in weights_of(tmp_path / str(trained)).values()), options
        trained += 1
    assert refused > 0
