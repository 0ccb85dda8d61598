"""Options of `rlfr diagnose`: whether a flow's scores say anything, before GPUs are spent on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.common import CommonConfig
from rlfr_cli.config.fields import group, option
from rlfr_cli.config.flow import FlowRewardConfig


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(CommonConfig):
    flow: Path = option(help="The flow that `rlfr fit-flow` wrote.", path=True)
    model: str = option(help="The policy whose latents the flow judges.", short="-m", path=True)
    rollouts: Path = option(help="Graded responses of that policy, several to a problem.", path=True)
    out: Path = option(Path("diagnosis"), help="Folder for diagnosis.json and the plots.", short="-o", path=True)
    flow_reward: FlowRewardConfig = group(FlowRewardConfig, panel="Flow reward")
    temperature: float | None = option(
        None,
        help="Divides the logits for log-probabilities and entropies; by default that of the rollouts, or 1 where "
        "they do not name it.",
        minimum=0,
    )
    examples: int = option(8, help="Most and least penalised tokens that are listed.", minimum=0)
    limit: int | None = option(None, help="Take only the first N problems.", minimum=1, metavar="N")
    tokens_per_batch: int = option(16384, help="Most tokens, padding included, of one forward pass.", minimum=1)
