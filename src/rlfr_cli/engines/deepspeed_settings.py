"""The settings that DeepSpeed is given: those that the options decide, good defaults, and the user's own JSON file.

Three layers: what the options decide stands; what the user's file says wins over the defaults. A file may hold "auto",
as those for transformers do: such entries count as left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import read_json
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.errors import ConfigError

Settings = dict[str, Any]

# Sections that would replace what rlfr does itself.
OURS = {
    "optimizer": "rlfr steps with AdamW: use --learning-rate, --beta1, --beta2 and --weight-decay",
    "scheduler": "rlfr sets the learning rate: use --schedule and --warmup-fraction",
}


def deepspeed_settings(
    config: TrainingEngineConfig, *, stage: int, bfloat16: bool, clip_norm: float, pin_memory: bool
) -> Settings:
    """DeepSpeed's settings for a run.

    Args:
        stage: 1, 2 or 3, as ``config.resolve_stage`` gives it.
        bfloat16: compute dtype; else float32.
        clip_norm: largest gradient norm.
        pin_memory: whether offloaded tensors lie in page-locked memory, which a GPU copies from while it computes.

    Raises:
        ConfigError: the user's file contradicts the options.
    """
    decided = _decided(config, stage, bfloat16, clip_norm)
    if config.deepspeed_config is None:
        return _merge(_defaults(bfloat16, pin_memory, decided), decided)
    given = _without_auto(read_json(config.deepspeed_config))
    for section, way_out in OURS.items():
        if section in given:
            raise ConfigError(f"{config.deepspeed_config} has a section {section!r}: {way_out}")
    _refuse_contradictions(config.deepspeed_config, given, decided)
    _refuse_nvme(config.deepspeed_config, given)
    merged = _merge(given, decided)
    return _merge(_defaults(bfloat16, pin_memory, merged), merged)


def _decided(config: TrainingEngineConfig, stage: int, bfloat16: bool, clip_norm: float) -> Settings:
    zero: Settings = {"stage": stage}
    if config.offload_optimiser:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        # One loss a backward pass, already a share of the whole batch's mean: see DeepSpeedEngine.backward.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "mean",
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        # The float32 weights that AdamW steps lie in DeepSpeed's optimiser, whatever the model computes in.
        "bf16": {
            "enabled": bfloat16,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # torch's fused AdamW steps offloaded partitions too, and needs no compiler at run time.
        "zero_force_ds_cpu_optimizer": False,
    }


def _defaults(bfloat16: bool, pin_memory: bool, chosen: Settings) -> Settings:
    """What neither an option nor the user has chosen."""
    zero: Settings = {}
    for name in ("offload_optimizer", "offload_param"):
        if chosen["zero_optimization"].get(name, {}).get("device", "none") != "none":
            zero[name] = {"pin_memory": pin_memory}
    settings: Settings = {"zero_optimization": zero}
    if bfloat16:
        # bfloat16 has 8 bits: sums over micro-batches and ranks are made in float32.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _without_auto(settings: Mapping[str, Any]) -> Settings:
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _refuse_contradictions(path: Path, given: Mapping[str, Any], decided: Mapping[str, Any], prefix: str = "") -> None:
    for key, ours in decided.items():
        theirs = given.get(key, ours)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            _refuse_contradictions(path, theirs, ours, f"{prefix}{key}.")
        elif theirs != ours:
            raise ConfigError(
                f"{path} sets {prefix}{key} to {theirs!r}, and rlfr's options make it {ours!r}",
                hint=f"leave {prefix}{key} out of the file, or change the option",
            )


def _refuse_nvme(path: Path, given: Mapping[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        device = given.get("zero_optimization", {}).get(name, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{path} sets zero_optimization.{name}.device to {device!r}; rlfr reads and writes optimiser state in "
                "memory only: none or cpu"
            )
