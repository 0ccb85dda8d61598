"""Checks of configs that look at more than one option, or at what an option means."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfr_cli.config.common import ProblemsConfig, SamplingConfig
from rlfr_cli.config.fit_flow import FitFlowConfig
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
