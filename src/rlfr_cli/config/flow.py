"""Option groups that describe a flow and its rewards, shared by `fit-flow`, `score` and `train-rl`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context, Normalise


class Normalisation(StrEnum):
    """How latents are scaled before the flow sees them."""

    NONE = "none"
    CHANNEL = "channel"


class ScoreSource(StrEnum):
    """What is shaped into token rewards: the flow's scores, or random ones as the control."""

    FLOW = "flow"
    RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ConfigGroup):
    """The velocity network and what it is told."""

    context: tuple[Context, ...] = option(
        (Context.NEXT,), help="Which neighbour conditions a token; repeated, the pairings are averaged."
    )
    shift: int = option(1, help="Distance of that neighbour, in tokens.", minimum=1)
    depth: int = option(4, help="Residual blocks; published: 4 up to 3B, 6 for 7B and 8B.", minimum=1)
    width: int | None = option(None, help="Width of the blocks; the hidden size of the policy by default.", minimum=1)
    time_scale: float = option(
        1.0, help="Multiplies time and layer before their embedding; published: 1.", exclusive_minimum=0
    )
    normalisation: Normalisation = option(
        Normalisation.NONE,
        help="Scale latents by mean and deviation of the training tokens, or not (published).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.context)) != len(self.context) or not self.context:
            raise ConfigError(f"--context must name one or several different contexts, got {list(self.context)}")


@dataclass(frozen=True, kw_only=True)
class FlowRewardConfig(ConfigGroup):
    """From deviation to the reward of a token."""

    timestep: tuple[float, ...] = option(
        (0.8,),
        help="Time at which the deviation is measured; may be repeated.",
        exclusive_minimum=0,
        exclusive_maximum=1,
    )
    num_draws: int = option(1, help="Noise draws averaged for a score.", minimum=1)
    score_normalisation: Normalise = option(Normalise.MINMAX, help="Scaling of scores within a response.")
    power: float = option(1.0, help="Exponent of the scaled score, sign kept.", exclusive_minimum=0)
    threshold: float = option(
        0.6, help="Scaled scores not above this are dropped; 0 or less is off.", flag="--flow-threshold"
    )
    top_k: int = option(15, help="Tokens of a response that keep a flow reward; 0 or less is off.", flag="--flow-top-k")
    coef: float = option(0.01, help="Flow reward = -coef × shaped score.", flag="--flow-coef", minimum=0)
    centre_reward: bool = option(
        False, help="Subtract the response's mean flow reward, so that it sums to 0 over the response."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timestep:
            raise ConfigError("--timestep must name at least one time")
