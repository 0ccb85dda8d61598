"""Weights of adapters: as many as PEFT makes, and layers that are not counted are refused."""

from __future__ import annotations

import pytest

from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ConfigError
from rlfr_cli.planning.adapter_sizes import adapter_parameters
from rlfr_cli.planning.model_sizes import model_sizes
from rlfr_cli.policy.adapters import plan_adapters
from tiny_models import FAMILIES, make_config


@pytest.mark.parametrize("target", [(), ("o_proj",), ("mlp.down_proj", "o_proj")])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_as_peft_makes(family: str, target: tuple[str, ...]) -> None:
    config, lora = make_config(family), LoraConfig(rank=5, target=target)
    assert adapter_parameters(model_sizes(config.to_dict()), lora) == plan_adapters(lora, config).num_parameters


def test_none_without_a_rank() -> None:
    assert adapter_parameters(model_sizes(make_config("llama").to_dict()), LoraConfig()) == 0


def test_a_layer_that_is_not_counted_is_refused_with_those_that_are() -> None:
    sizes = model_sizes(make_config("llama").to_dict())
    with pytest.raises(ConfigError, match=r"--lora-target qkv_proj: .* llama model .* q_proj, k_proj"):
        adapter_parameters(sizes, LoraConfig(rank=5, target=("q_proj", "qkv_proj")))
