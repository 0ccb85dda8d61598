"""Option groups of reinforcement learning: rollouts, optimiser, policy loss, online reference of the flow.

Defaults are the published numbers. Which options exclude each other is said in ``config/train_rl.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.config.schedules import Schedule
from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.choices import Aggregation, Correction, Estimator, KLEstimator, KLPlace, RatioLevel, UniformGroups


class OnlineTimes(StrEnum):
    """Times at which the online update fits the flow."""

    FIT = "fit"
    REWARDING = "rewarding"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(ConfigGroup):
    """How many responses a step draws, and for how long."""

    prompts_per_step: int = option(128, help="Problems of one rollout batch.", minimum=1)
    group_size: int = option(8, help="Responses drawn for each problem.", minimum=2)
    steps: int | None = option(None, help="Rollout batches, in place of --episodes.", minimum=1)
    episodes: float = option(5.0, help="Passes over the problems.", exclusive_minimum=0)
    dynamic_sampling: bool = option(
        False,
        help="Draw further problems in place of those whose outcome rewards are all equal, until --prompts-per-step "
        "groups differ (DAPO).",
    )
    max_sampling_rounds: int = option(8, help="With --dynamic-sampling: rounds of a step at most.", minimum=2)
    uniform_groups: UniformGroups | None = option(
        None,
        help="Groups of equal outcome rewards: keep them, so that token rewards are their only signal, or drop them "
        "from the loss and its mean. Kept by default; with --dynamic-sampling and a flow it must be chosen.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(ConfigGroup):
    """AdamW on float32 weights."""

    learning_rate: float = option(1e-6, help="Highest learning rate.", exclusive_minimum=0)
    beta1: float = option(0.9, help="AdamW's first beta.", minimum=0, exclusive_maximum=1)
    beta2: float = option(0.95, help="AdamW's second beta.", minimum=0, exclusive_maximum=1)
    weight_decay: float = option(0.0, help="Weight decay of AdamW.", minimum=0)
    clip_norm: float = option(1.0, help="Largest gradient norm.", exclusive_minimum=0)
    schedule: Schedule = option(Schedule.COSINE, help="Course of the learning rate after the warm-up.")
    warmup_fraction: float = option(0.03, help="Share of the steps with a rising rate.", minimum=0, maximum=1)
    final_fraction: float = option(0.1, help="Last learning rate as a share of the highest.", minimum=0, maximum=1)
    minibatch_responses: int = option(128, help="Responses of one optimiser step.", minimum=1)
    epochs_per_batch: int = option(1, help="Passes over a rollout batch.", minimum=1)
    tokens_per_micro_batch: int = option(
        16384,
        help="Most tokens, padding included, of one backward pass; does not change the loss.",
        minimum=1,
    )
    gradient_checkpointing: bool = option(False, help="Compute activations again in the backward pass.")
    max_bad_steps: int = option(
        3,
        help="Optimiser steps in a row with a loss or gradient that is not finite before the run stops.",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(ConfigGroup):
    """The clipped policy loss."""

    clip_low: float = option(0.2, help="Ratios below 1 - this are clipped.", minimum=0, maximum=1)
    clip_high: float = option(0.2, help="Ratios above 1 + this are clipped.", minimum=0)
    ratio_cap: float = option(0.0, help="Largest ratio, as published 3; 0 is off.", minimum=0)
    dual_clip: float = option(
        0.0, help="Bounds the loss of a negative advantage at this times its size, above 1; 0 is off.", minimum=0
    )
    ratio_level: RatioLevel = option(RatioLevel.TOKEN, help="Ratio of each token, or of the whole response (GSPO).")
    aggregation: Aggregation = option(
        Aggregation.RESPONSE_MEAN,
        help="Mean over a response's tokens and then over responses (published), over all tokens (DAPO), or over "
        "responses of --max-new-tokens (Dr. GRPO).",
    )
    estimator: Estimator = option(
        Estimator.GROUP_NORM,
        help="Outcome rewards less their group's mean and divided by its deviation (published), less the mean only, "
        "less the mean of the others, or less the mean and then whitened over the batch (REINFORCE++).",
    )
    discount: float = option(1.0, help="Discount of later rewards.", minimum=0, maximum=1)
    reference_model: str | None = option(
        None, help="Reference policy: its KL is measured, and with --kl-coef paid for.", path=True
    )
    kl_coef: float = option(0.0, help="Weight of the KL to the reference policy.", minimum=0)
    kl_estimator: KLEstimator = option(KLEstimator.K3, help="Estimate of that KL from the drawn tokens.")
    kl_in: KLPlace = option(
        KLPlace.LOSS, help="Pay for that KL in the loss (GRPO), or in each token's reward, by k1 usually (PPO)."
    )
    kl_ratio: bool = option(
        False, help="Multiply the KL in the loss by the probability ratio, as TRL does: unbiased off-policy."
    )
    entropy_coef: float = option(
        0.0, help="Weight of the tokens' entropy, averaged as the loss is, that the loss is lowered by.", minimum=0
    )
    entropy_advantage: float = option(
        0.0,
        help="Adds this times a token's entropy to its advantage (Cheng et al., 2025, with 0.4); 0 is off.",
        minimum=0,
    )
    entropy_advantage_cap: float = option(
        2.0, help="What is added is at most the advantage's size divided by this.", exclusive_minimum=1
    )
    mask_cut_off: bool = option(
        False,
        help="Leave responses that were cut off out of the loss; they still count in their group's mean reward.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.dual_clip <= 1:
            raise ConfigError(f"--dual-clip must be above 1, or 0 for none, got {self.dual_clip}")
        if 0 < self.ratio_cap <= 1:
            raise ConfigError(f"--ratio-cap must be above 1, or 0 for none, got {self.ratio_cap}")
        if self.kl_coef > 0 and self.reference_model is None:
            raise ConfigError("--kl-coef needs --reference-model")
        if self.kl_ratio and (self.kl_in is KLPlace.REWARD or self.kl_coef == 0):
            raise ConfigError("--kl-ratio is for a KL that is paid for in the loss: it needs --kl-coef, --kl-in loss")
        if self.kl_in is KLPlace.REWARD and self.kl_coef == 0:
            raise ConfigError("--kl-in reward pays for nothing with --kl-coef 0", hint="give --kl-coef, such as 0.001")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(ConfigGroup):
    """The online update of the flow on the policy's own accepted responses."""

    online_steps: int = option(
        1,
        help="AdamW steps of the flow on each rollout batch, after it was scored; 0 keeps the flow as it is.",
        minimum=0,
    )
    online_learning_rate: float = option(1e-4, help="Learning rate of these steps.", exclusive_minimum=0)
    online_timesteps: OnlineTimes = option(
        OnlineTimes.FIT,
        help="Times at which the flow is fitted: those of fit-flow, or the rewarding ones (published).",
    )
    online_noise_repeats: int = option(1, help="Draws of noise and time for each token.", minimum=1)
    accept: tuple[str, ...] = option(
        ("correct",),
        help="Rule that weights responses or tokens of the reference, or FILE.py:FUNCTION; repeated, weights multiply.",
        metavar="RULE",
    )
    buffer_responses: int = option(
        0,
        help="Accepted responses of earlier batches, the newest, that each online update also learns from; their "
        "latents are taken anew from the policy as it is.",
        minimum=0,
    )
    expert_latents: Path | None = option(
        None, help="Latents of expert responses to mix into each online update.", path=True
    )
    expert_share: float = option(
        0.25,
        help="With --expert-latents: their share of the update's weight.",
        exclusive_minimum=0,
        exclusive_maximum=1,
    )
    flow_warmup: int = option(10, help="With --new-flow: batches before the first flow reward is paid.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.online_steps == 0 and (self.buffer_responses or self.expert_latents is not None):
            raise ConfigError("--buffer-responses and --expert-latents feed the online update; --online-steps is 0")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(ConfigGroup):
    """The gap between the generation engine and the trainer; nothing of it applies to an engine that shares weights."""

    correction: Correction = option(
        Correction.TRUNCATE,
        help="Importance sampling of tokens that the engine drew from a slightly other policy: weight their loss by "
        "the truncated ratio, mask those whose ratio is too far from 1, or neither.",
        flag="--engine-correction",
    )
    level: RatioLevel = option(
        RatioLevel.TOKEN, help="Ratio of each token, or of the whole response.", flag="--engine-correction-level"
    )
    cap: float = option(2.0, help="Where ratios are cut.", flag="--engine-correction-cap", exclusive_minimum=1)
    tolerance: float = option(
        0.05,
        help="Largest mean KL in nats between engine and trainer, on a few tokens after the weights went over and on "
        "each rollout batch; beyond it the run stops, since the engine's weights are then stale or wrong.",
        flag="--engine-tolerance",
        exclusive_minimum=0,
    )
