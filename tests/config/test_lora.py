"""Options of adapters: off without a rank, and refused where nothing would read them."""

from __future__ import annotations

from typing import Any

import pytest

from rlfr_cli.config.lora import LoraCheckpoint, LoraConfig
from rlfr_cli.errors import ConfigError


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoraConfig(rank=8).resolved_alpha == 16
    assert LoraConfig(rank=8, alpha=4).resolved_alpha == 4
    assert LoraConfig().rank == 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"alpha": 8}, "--lora-alpha"),
        ({"target": ("q_proj",)}, "--lora-target"),
        ({"checkpoint": LoraCheckpoint.ADAPTER}, "--lora-checkpoint"),
        ({"alpha": 8, "target": ("q_proj",)}, "--lora-alpha and --lora-target"),
    ],
)
def test_options_without_a_rank_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: without --lora-rank") as caught:
        LoraConfig(**given)
    assert "--lora-rank" in str(caught.value.hint)


@pytest.mark.parametrize("given", [{"rank": -1}, {"rank": 4, "alpha": 0}, {"rank": 4, "checkpoint": "both"}])
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        LoraConfig(**given)
