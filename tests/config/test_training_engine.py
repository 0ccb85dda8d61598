"""Which combinations of the training engine's options are refused, and which stage the others mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "alone", "several"),
    [
        ({}, 0, 2),
        ({"zero_stage": 0}, 0, 0),
        ({"zero_stage": 3}, 3, 3),
        ({"offload_optimiser": True}, 2, 2),
        ({"deepspeed_config": Path("d.json")}, 2, 2),
    ],
)
def test_the_stage_follows_from_the_options_and_the_number_of_processes(
    options: dict[str, Any], alone: int, several: int
) -> None:
    config = TrainingEngineConfig(**options)
    assert (config.resolve_stage(1), config.resolve_stage(8)) == (alone, several)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "--zero-stage must be an integer, at least 0, at most 3, got 4"),
        ({"zero_stage": 0, "offload_optimiser": True}, "--offload-optimiser need"),
        ({"zero_stage": 0, "deepspeed_config": Path("d.json")}, "--deepspeed-config need"),
        ({"zero_stage": 2, "offload_parameters": True}, "--offload-parameters needs --zero-stage 3, got 2"),
        ({"offload_parameters": True}, "--offload-parameters needs --zero-stage 3, got None"),
        ({"collective_timeout": 0.0}, "--collective-timeout must be a finite number, above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingEngineConfig(**options)
