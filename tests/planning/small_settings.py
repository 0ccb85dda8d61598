"""Models and settings that the tests of planning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlfr_cli.config.plan import PlanConfig
from rlfr_cli.planning.model_sizes import model_sizes
from rlfr_cli.planning.setting import Setting
from rlfr_cli.stages.plan import read_configs, with_layout

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make_setting(model: dict[str, Any], recipe: Path | None = None, preset: str | None = None, **plan: Any) -> Setting:
    """A setting as `rlfr plan` makes it."""
    config = PlanConfig(model="m", **plan)
    return Setting(model_sizes(model), config, with_layout(read_configs(recipe, preset), config))
