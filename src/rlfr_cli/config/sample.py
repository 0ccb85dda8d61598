"""Options of `rlfr sample`: a policy answers problems, and the responses are graded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.common import (
    CommonConfig,
    GradingConfig,
    ProblemsConfig,
    PromptConfig,
    SamplingConfig,
    check_part,
)
from rlfr_cli.config.engine import EngineConfig
from rlfr_cli.config.fields import group, option
from rlfr_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SampleConfig(CommonConfig):
    model: str = option(help="The policy: a Hugging Face model folder or name.", short="-m", path=True)
    problems: ProblemsConfig = group(ProblemsConfig)
    prompt: PromptConfig = group(PromptConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    grading: GradingConfig = group(GradingConfig)
    generation: EngineConfig = group(EngineConfig, panel="Generation engine")
    out: Path = option(Path("rollouts"), help="Folder for the rollouts.", short="-o", path=True)
    group_size: int = option(8, help="Responses drawn for each problem.", minimum=1)
    keep: tuple[str, ...] = option(
        (),
        help="Keep only responses that this rule accepts, such as correct or FILE.py:FUNCTION; may be repeated.",
        metavar="RULE",
    )
    problems_per_shard: int = option(
        64, help="Problems in one unit of work, which is one shard and has its own random numbers.", minimum=1
    )
    part: str | None = option(None, help="Do only this share of the work, such as 3/16.", metavar="I/N", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.part)
        if self.sampling.temperature == 0 and self.group_size > 1:
            raise ConfigError(
                f"--temperature 0 gives the same response every time, got --group-size {self.group_size}",
                hint="use --group-size 1, or a temperature above 0",
            )
