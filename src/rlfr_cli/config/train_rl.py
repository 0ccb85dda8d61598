"""Options of `rlfr train-rl`: GRPO with or without the flow reward. Defaults are the published numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlfr_cli.config.common import (
    CommonConfig,
    GradingConfig,
    ProblemsConfig,
    PromptConfig,
    SamplingConfig,
    refuse_float16,
)
from rlfr_cli.config.extract_latents import DEFAULT_LAYER_FRACTIONS
from rlfr_cli.config.fields import ConfigGroup, group, option
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig, Normalisation, ScoreSource
from rlfr_cli.config.schedules import Schedule
from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.choices import Aggregation, Estimator, KLEstimator, RatioLevel


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
        0.0, help="Bounds the loss of a negative advantage at this times its size; 0 is off.", minimum=0
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
    kl_coef: float = option(0.0, help="Weight of the KL to the reference policy in the loss.", minimum=0)
    kl_estimator: KLEstimator = option(KLEstimator.K3, help="Estimate of that KL from the drawn tokens.")


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
        help="Rule that weights responses or tokens of the reference; repeated, weights multiply.",
        metavar="RULE",
    )
    flow_warmup: int = option(10, help="With --new-flow: batches before the first flow reward is paid.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class RunEvalConfig(ConfigGroup):
    """Evaluation during the run."""

    eval_data: str | None = option(None, help="Held-out problems; none for no evaluation.", path=True)
    eval_every: int = option(10, help="Steps between evaluations.", minimum=1)
    eval_samples: int = option(4, help="Responses drawn for each problem.", minimum=1)
    eval_temperature: float = option(1.0, help="Temperature of the evaluation.", minimum=0)
    eval_limit: int | None = option(None, help="Take only the first N problems.", minimum=1, metavar="N")


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigGroup):
    """Checkpoints and logs."""

    save_every: int = option(50, help="Steps between checkpoints; the last step always has one.", minimum=1)
    keep_checkpoints: int = option(2, help="Newest checkpoints that are kept.", minimum=1)
    tensorboard: bool = option(True, help="Write TensorBoard events into the run folder.")
    wandb: str | None = option(None, help="Project of Weights & Biases to log to.", metavar="PROJECT")


@dataclass(frozen=True, kw_only=True)
class TrainRlConfig(CommonConfig):
    model: str = option(help="The policy to train: a Hugging Face model folder or name.", short="-m", path=True)
    flow: Path | None = option(None, help="Flow that pays token rewards; without it plain RLVR.", path=True)
    new_flow: bool = option(False, help="Begin with a new flow and fit it online only.")
    scores: ScoreSource = option(
        ScoreSource.FLOW, help="What is shaped into token rewards; random is the control of the same size."
    )
    out: Path = option(Path("run"), help="Run folder.", short="-o", path=True)
    resume: bool = option(False, help="Go on from the last checkpoint of the run folder.", display=True)
    problems: ProblemsConfig = group(ProblemsConfig)
    prompt: PromptConfig = group(PromptConfig)
    rollout: RolloutConfig = group(RolloutConfig, panel="Rollouts")
    sampling: SamplingConfig = group(SamplingConfig)
    grading: GradingConfig = group(GradingConfig)
    optimiser: OptimiserConfig = group(OptimiserConfig, panel="Optimiser")
    policy_loss: PolicyLossConfig = group(PolicyLossConfig, panel="Policy loss")
    flow_reward: FlowRewardConfig = group(FlowRewardConfig, panel="Flow reward")
    online: OnlineConfig = group(OnlineConfig, panel="Online reference")
    network: NetworkConfig = group(NetworkConfig, panel="New flow")
    layer_fraction: tuple[float, ...] = option(
        DEFAULT_LAYER_FRACTIONS,
        help="With --new-flow: tap the block at this fraction of the depth; may be repeated.",
        panel="New flow",
        minimum=0,
        maximum=1,
    )
    allow_other_weights: bool = option(
        False, help="Accept a flow that was fitted on other weights of the same architecture."
    )
    evaluation: RunEvalConfig = group(RunEvalConfig, panel="Evaluation")
    run: RunConfig = group(RunConfig, panel="Run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self)
        if self.overwrite and self.resume:
            raise ConfigError("--overwrite and --resume exclude each other: one deletes what the other continues")
        if self.flow is not None and self.new_flow:
            raise ConfigError("--flow and --new-flow exclude each other, got both")
        if self.flow is None and not self.new_flow and self.scores is not ScoreSource.FLOW:
            raise ConfigError("--scores random takes the layers of a flow and needs --flow or --new-flow")
        if self.new_flow and self.online.online_steps == 0:
            raise ConfigError("--new-flow with --online-steps 0 would leave the flow as it begins")
        if not self.new_flow and (self.network != NetworkConfig() or self.layer_fraction != DEFAULT_LAYER_FRACTIONS):
            raise ConfigError(
                "options of a new flow (--context, --shift, --depth, --layer-fraction …) are given without --new-flow",
                hint="a flow file brings its own; leave them out",
            )
        if self.new_flow and self.network.normalisation is not Normalisation.NONE:
            raise ConfigError("--new-flow has no statistics to normalise latents with; fit one with `rlfr fit-flow`")
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ConfigError(
                f"--top-p {self.sampling.top_p} and --top-k {self.sampling.top_k} draw from another distribution than "
                "the one that is trained",
                hint="train with --top-p 1 --top-k 0",
            )
        if self.sampling.temperature == 0:
            raise ConfigError("--temperature 0 gives every response of a group alike; train with one above 0")
        samples = self.evaluation.eval_samples
        if self.evaluation.eval_temperature == 0 and samples > 1:
            raise ConfigError(
                f"--eval-temperature 0 gives the same response every time, got --eval-samples {samples}",
                hint="use --eval-samples 1, or a temperature above 0",
            )
        if self.policy_loss.kl_coef > 0 and self.policy_loss.reference_model is None:
            raise ConfigError("--kl-coef needs --reference-model")
