"""Options of `rlfr score`: the flow reward of every token of responses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.common import CommonConfig, check_page_file, check_part
from rlfr_cli.config.fields import group, option
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(CommonConfig):
    flow: Path = option(help="The flow that `rlfr fit-flow` wrote.", path=True)
    model: str | None = option(
        None, help="The policy whose latents are scored; not needed with --latents.", short="-m", path=True
    )
    rollouts: Path | None = option(None, help="Responses to score.", path=True)
    latents: Path | None = option(None, help="Latents to score, in place of --rollouts.", path=True)
    out: Path = option(Path("scores"), help="Folder for the scores.", short="-o", path=True)
    flow_reward: FlowRewardConfig = group(FlowRewardConfig, panel="Flow reward")
    per_layer: bool = option(False, help="Also keep the deviation of each layer and timestep.")
    examples: int = option(8, help="Most and least penalised tokens that are shown.", minimum=0, display=True)
    html: Path | None = option(
        None, help="Also write a page on which tokens are shaded by what they were paid.", metavar="FILE", path=True
    )
    html_responses: int = option(
        500, help="Responses on that page at most, whole groups evenly spread.", metavar="N", minimum=1, display=True
    )
    limit: int | None = option(None, help="Score only the first N problems.", minimum=1, metavar="N")
    tokens_per_batch: int = option(16384, help="Most tokens, padding included, of one forward pass.", minimum=1)
    problems_per_shard: int = option(64, help="Problems in one unit of work, which is one shard.", minimum=1)
    part: str | None = option(None, help="Do only this share of the work, such as 3/16.", metavar="I/N", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.part)
        check_page_file(self.html)
        if (self.rollouts is None) == (self.latents is None):
            seen = "neither" if self.rollouts is None else "both"
            raise ConfigError(f"exactly one of --rollouts and --latents must be given, got {seen}")
        if self.rollouts is not None and self.model is None:
            raise ConfigError("--rollouts needs --model, whose latents are scored")
        if self.latents is not None and self.limit is not None:
            raise ConfigError(
                "--limit counts the problems of --rollouts; of --latents all are scored",
                hint="leave it out, or extract fewer latents with `rlfr extract-latents --limit`",
            )
        if self.latents is not None and self.html is not None:
            raise ConfigError(
                "--html shows problems and responses, which --latents does not hold",
                hint="give --rollouts and --model in place of --latents",
            )
