"""Weights of low-rank adapters: rank x (inputs + outputs) of each layer that gets them, by the layers' usual names."""

from __future__ import annotations

from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ConfigError
from rlfr_cli.planning.model_sizes import ModelSizes

FUSED = ("phi3",)  # families with one matrix for queries, keys and values, and one for gate and up


def adapter_parameters(model: ModelSizes, config: LoraConfig) -> int:
    """Weights that train-rl steps in place of the policy's; 0 where it trains the whole policy.

    Raises:
        ConfigError: a target is not among the layers that are counted.
    """
    layers = _inputs_and_outputs(model)
    names = [target.rpartition(".")[2] for target in config.target] or list(layers)
    unknown = [name for name in names if name not in layers]
    if config.rank > 0 and unknown:
        raise ConfigError(
            f"--lora-target {' '.join(unknown)}: the layers of a {model.family} model are counted by the names "
            f"{', '.join(layers)}"
        )
    return config.rank * model.num_blocks * sum(layers[name] for name in set(names)) if config.rank > 0 else 0


def _inputs_and_outputs(model: ModelSizes) -> dict[str, int]:
    hidden, query, key, inner = model.hidden_size, model.query_size, model.key_size, model.intermediate_size
    ends = {"o_proj": query + hidden, "down_proj": inner + hidden}
    if model.family in FUSED:
        return {"qkv_proj": hidden + query + 2 * key, "gate_up_proj": hidden + 2 * inner, **ends}
    return {
        "q_proj": hidden + query,
        "k_proj": hidden + key,
        "v_proj": hidden + key,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        **ends,
    }
