"""Options of `rlfr train-rl`: GRPO with or without the flow reward. Defaults are the published numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.common import (
    CommonConfig,
    GradingConfig,
    ProblemsConfig,
    PromptConfig,
    SamplingConfig,
    refuse_float16,
)
from rlfr_cli.config.engine import EngineConfig, EngineName, SeparationConfig
from rlfr_cli.config.extract_latents import DEFAULT_LAYER_FRACTIONS
from rlfr_cli.config.fields import ConfigGroup, group, option
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig, Normalisation, ScoreSource
from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.config.rl import CorrectionConfig, OnlineConfig, OptimiserConfig, PolicyLossConfig, RolloutConfig
from rlfr_cli.config.schedules import Schedule
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CoefficientConfig(ConfigGroup):
    """The course of --flow-coef over the run."""

    schedule: Schedule = option(
        Schedule.CONSTANT, help="Course of --flow-coef after its warm-up.", flag="--flow-coef-schedule"
    )
    warmup_fraction: float = option(
        0.0,
        help="Share of the run's steps in which --flow-coef rises from 0.",
        flag="--flow-coef-warmup-fraction",
        minimum=0,
        maximum=1,
    )
    final_fraction: float = option(
        0.0,
        help="What a falling --flow-coef ends at, as a share of it.",
        flag="--flow-coef-final-fraction",
        minimum=0,
        maximum=1,
    )


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
        ScoreSource.FLOW,
        help="What is shaped into token rewards: the flow's scores; random ones or the flow's in random order, the "
        "controls of the same size; a token's negative log-probability or entropy, baselines that need no flow.",
    )
    out: Path = option(Path("run"), help="Run folder.", short="-o", path=True)
    resume: bool = option(False, help="Go on from the last checkpoint of the run folder.", display=True)
    problems: ProblemsConfig = group(ProblemsConfig)
    prompt: PromptConfig = group(PromptConfig)
    rollout: RolloutConfig = group(RolloutConfig, panel="Rollouts")
    sampling: SamplingConfig = group(SamplingConfig)
    generation: EngineConfig = group(EngineConfig, panel="Generation engine")
    correction: CorrectionConfig = group(CorrectionConfig, panel="Generation engine")
    separation: SeparationConfig = group(SeparationConfig, panel="Generation engine")
    grading: GradingConfig = group(GradingConfig)
    optimiser: OptimiserConfig = group(OptimiserConfig, panel="Optimiser")
    lora: LoraConfig = group(LoraConfig, panel="LoRA")
    training: TrainingEngineConfig = group(TrainingEngineConfig, panel="Training engine")
    policy_loss: PolicyLossConfig = group(PolicyLossConfig, panel="Policy loss")
    flow_reward: FlowRewardConfig = group(FlowRewardConfig, panel="Flow reward")
    coefficient: CoefficientConfig = group(CoefficientConfig, panel="Flow reward")
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
        if not self.has_flow and self.scores in (ScoreSource.RANDOM, ScoreSource.SHUFFLED):
            raise ConfigError(f"--scores {self.scores} stands on a flow's scores and needs --flow or --new-flow")
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
        apart = self.separation
        if self.generation.engine is EngineName.HF and (apart.overlap or apart.engine_device):
            flag = "--overlap" if apart.overlap else "--engine-device"
            raise ConfigError(
                f"{flag} is for an engine apart from the trainer, and with --engine hf the trainer's own model draws",
                hint="add --engine vllm, or leave it out",
            )
        if len(set(apart.engine_device)) < len(apart.engine_device):
            raise ConfigError(f"--engine-device names a GPU twice: {', '.join(map(str, apart.engine_device))}")
        rollout = self.rollout
        if rollout.dynamic_sampling and self.has_token_rewards and rollout.uniform_groups is None:
            raise ConfigError(
                "--dynamic-sampling replaces groups of equal outcome rewards, and token rewards still say something of "
                "these: --uniform-groups must be given",
                hint="--uniform-groups keep trains on them too, --uniform-groups drop leaves them out",
            )

    @property
    def has_flow(self) -> bool:
        """Whether a flow is at hand, given or new."""
        return self.flow is not None or self.new_flow

    @property
    def has_token_rewards(self) -> bool:
        """Whether tokens are paid for anything but the outcome."""
        return self.has_flow or not self.scores.needs_flow
