"""Options of processes that train together, and of the engine that spreads weights and their states over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.errors import ConfigError

TRAINING_ENGINE_PANEL = "Training engine"


@dataclass(frozen=True, kw_only=True)
class TogetherConfig(ConfigGroup):
    """How processes that a launcher has started wait for each other."""

    collective_timeout: float = option(
        120.0,
        help="Minutes that a training process waits for one that is alive and does not come; a dead one ends the run "
        "at once.",
        exclusive_minimum=0,
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingEngineConfig(TogetherConfig):
    """One process in plain PyTorch, or DeepSpeed; checkpoints are the same, so a resumed run may change all of it."""

    zero_stage: int | None = option(
        None,
        help="What the training processes share out: 0 nothing; 1 optimiser state and float32 weights; 2 gradients "
        "too; 3 the weights too. 1 to 3 need DeepSpeed. The default is 2, and 0 in one process.",
        minimum=0,
        maximum=3,
        path=True,
    )
    offload_optimiser: bool = option(
        False, help="Keep optimiser state and float32 weights in main memory, and step there.", path=True
    )
    offload_parameters: bool = option(
        False, help="With --zero-stage 3: keep weights in main memory while they are not in use.", path=True
    )
    deepspeed_config: Path | None = option(
        None,
        help="A JSON file of further DeepSpeed settings; one that contradicts another option is refused.",
        metavar="FILE",
        path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage == 0 and (named := self._deepspeed_options()):
            raise ConfigError(
                f"{' and '.join(named)} need DeepSpeed, which --zero-stage 0 does without",
                hint="use --zero-stage 1, 2 or 3",
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError(
                f"--offload-parameters needs --zero-stage 3, got {self.zero_stage}: in the other stages every process "
                "computes with whole weights"
            )

    def resolve_stage(self, num_processes: int) -> int:
        """The stage for so many processes; 0 for one process that asks for nothing of DeepSpeed."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 2 if num_processes > 1 or self._deepspeed_options() else 0

    def _deepspeed_options(self) -> list[str]:
        given = {
            "--offload-optimiser": self.offload_optimiser,
            "--offload-parameters": self.offload_parameters,
            "--deepspeed-config": self.deepspeed_config is not None,
        }
        return [name for name, is_given in given.items() if is_given]
