"""Options of low-rank adapters (LoRA): what is trained in place of the whole policy, and what checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.errors import ConfigError


class LoraCheckpoint(StrEnum):
    """What a checkpoint of adapters holds beside them: the model with them merged into it, or nothing."""

    MERGED = "merged"
    ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ConfigGroup):
    """Train adapters of a policy whose own weights stay as they are. Without a rank the whole policy is trained."""

    rank: int = option(
        0,
        help="Rank of the adapters that are trained, with the policy's own weights left as they are; 0 trains the "
        "whole policy.",
        flag="--lora-rank",
        minimum=0,
        metavar="N",
    )
    alpha: float | None = option(
        None,
        help="An adapter's output counts alpha / rank times; 2 x rank when left out.",
        flag="--lora-alpha",
        exclusive_minimum=0,
    )
    target: tuple[str, ...] = option(
        (),
        help="Linear layers of the decoder blocks that get adapters, such as q_proj; may be repeated. All of them when "
        "left out.",
        flag="--lora-target",
        metavar="NAME",
    )
    checkpoint: LoraCheckpoint = option(
        LoraCheckpoint.MERGED,
        help="What checkpoints hold beside adapters: merged is a plain model folder too; with adapter, `rlfr merge` "
        "makes that when it is wanted.",
        flag="--lora-checkpoint",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            "--lora-alpha": self.alpha is not None,
            "--lora-target": bool(self.target),
            "--lora-checkpoint": self.checkpoint is not LoraCheckpoint.MERGED,
        }
        named = [name for name, is_given in given.items() if is_given]
        if self.rank == 0 and named:
            raise ConfigError(
                f"{' and '.join(named)}: without --lora-rank no adapters are trained",
                hint="add --lora-rank 16, or leave this out",
            )

    @property
    def resolved_alpha(self) -> float:
        """``--lora-alpha``, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha
