"""Choose the training engine that the options and the number of processes ask for, and open it."""

from __future__ import annotations

import torch

from rlfr_cli.config.rl import OptimiserConfig
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.engines.deepspeed import DeepSpeedEngine
from rlfr_cli.engines.deepspeed_settings import deepspeed_settings
from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.engines.replicated import ReplicatedEngine
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training import TrainingEngine
from rlfr_cli.policy.loading import Policy


def open_training_engine(
    policy: Policy,
    ranks: Ranks,
    config: TrainingEngineConfig,
    optimiser: OptimiserConfig,
    *,
    stored_dtype: torch.dtype,
) -> TrainingEngine:
    """The engine for these processes: plain PyTorch for ZeRO stage 0, else DeepSpeed.

    Args:
        policy: loaded with float32 weights; an engine of DeepSpeed changes it in place.
        stored_dtype: dtype of the checkpoints' ``model/``.

    Raises:
        MissingPackageError: DeepSpeed is needed and not installed.
        ConfigError: the user's DeepSpeed file contradicts the options.
    """
    betas, decay = (optimiser.beta1, optimiser.beta2), optimiser.weight_decay
    stage = config.resolve_stage(ranks.world_size)
    if stage > 0:
        settings = deepspeed_settings(
            config,
            stage=stage,
            bfloat16=policy.placement.dtype == torch.bfloat16,
            clip_norm=optimiser.clip_norm,
            pin_memory=ranks.device.type == "cuda",
        )
        return DeepSpeedEngine(
            policy,
            ranks,
            settings,
            stored_dtype=stored_dtype,
            betas=betas,
            weight_decay=decay,
            gradient_checkpointing=optimiser.gradient_checkpointing,
        )
    if ranks.alone:
        return SingleProcessEngine(
            policy,
            stored_dtype=stored_dtype,
            betas=betas,
            weight_decay=decay,
            clip_norm=optimiser.clip_norm,
            gradient_checkpointing=optimiser.gradient_checkpointing,
        )
    return ReplicatedEngine(
        policy,
        ranks,
        stored_dtype=stored_dtype,
        betas=betas,
        weight_decay=decay,
        clip_norm=optimiser.clip_norm,
        gradient_checkpointing=optimiser.gradient_checkpointing,
    )
