"""Options of `rlfr eval`: how often a policy is right."""

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
class EvalConfig(CommonConfig):
    model: str = option(help="The policy: a Hugging Face model folder or name.", short="-m", path=True)
    problems: ProblemsConfig = group(ProblemsConfig)
    prompt: PromptConfig = group(PromptConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    grading: GradingConfig = group(GradingConfig)
    generation: EngineConfig = group(EngineConfig, panel="Generation engine")
    out: Path = option(Path("eval"), help="Folder for the results.", short="-o", path=True)
    num_samples: int = option(1, help="Responses drawn for each problem.", short="-n", minimum=1)
    k: tuple[int, ...] = option(
        (),
        help="Report pass@k and majority@k for this k; may be repeated. By default the powers of two up to "
        "--num-samples.",
        minimum=1,
    )
    problems_per_shard: int = option(
        64, help="Problems in one unit of work, which is one shard and has its own random numbers.", minimum=1
    )
    part: str | None = option(None, help="Do only this share of the work, such as 3/16.", metavar="I/N", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.part)
        too_large = [k for k in self.k if k > self.num_samples]
        if too_large:
            raise ConfigError(f"--k {too_large[0]} needs as many samples, got --num-samples {self.num_samples}")
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"--temperature 0 gives the same response every time, got --num-samples {self.num_samples}",
                hint="use --num-samples 1, or a temperature above 0",
            )
