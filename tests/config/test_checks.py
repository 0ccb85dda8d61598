"""Checks of configs that look at more than one option, or at what an option means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.config.common import ProblemsConfig, SamplingConfig
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.config.rl import OnlineConfig, PolicyLossConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.config.train_rl import TrainRlConfig
from rlfr_cli.errors import ConfigError


def test_training_refuses_float16_and_sampling_does_not() -> None:
    problems = ProblemsConfig(data="d")
    with pytest.raises(ConfigError, match="float16"):
        TrainRlConfig(model="m", problems=problems, dtype="float16")
    with pytest.raises(ConfigError, match="float16"):
        FitFlowConfig(latents=(Path("l"),), dtype="float16")
    assert SampleConfig(model="m", problems=problems, dtype="float16").dtype == "float16"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="--stop"):
        SamplingConfig(stop=("###", ""))


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (PolicyLossConfig, {"kl_coef": 0.1}, "--kl-coef needs --reference-model"),
        (PolicyLossConfig, {"kl_in": "reward", "reference_model": "m"}, "--kl-in reward pays for nothing"),
        (PolicyLossConfig, {"kl_ratio": True}, "--kl-ratio"),
        (PolicyLossConfig, {"kl_ratio": True, "kl_coef": 1, "kl_in": "reward", "reference_model": "m"}, "--kl-ratio"),
        (PolicyLossConfig, {"dual_clip": 1.0}, "--dual-clip must be above 1"),
        (PolicyLossConfig, {"ratio_cap": 0.5}, "--ratio-cap must be above 1"),
        (PolicyLossConfig, {"entropy_advantage_cap": 1.0}, "--entropy-advantage-cap"),
        (OnlineConfig, {"online_steps": 0, "buffer_responses": 8}, "--online-steps is 0"),
        (OnlineConfig, {"online_steps": 0, "expert_latents": "l"}, "--online-steps is 0"),
        (OnlineConfig, {"expert_share": 1.0}, "--expert-share"),
        (FlowRewardConfig, {"antithetic": True, "num_draws": 3}, "--antithetic takes draws in pairs"),
        (FlowRewardConfig, {"draw_agreement": 0.9, "num_draws": 8, "max_draws": 4}, "--max-draws 4"),
        (FlowRewardConfig, {"draw_agreement": 1.0}, "--draw-agreement"),
    ],
)
def test_options_of_one_group_that_contradict_each_other_are_refused(
    group: type, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        group(**options)


def test_a_flow_coefficient_may_be_negative_and_an_even_number_of_draws_antithetic() -> None:
    reward = FlowRewardConfig(coef=-0.01, antithetic=True, num_draws=2)
    assert (reward.coef, reward.num_draws) == (-0.01, 2)
