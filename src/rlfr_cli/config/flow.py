"""Option groups that describe a flow and its rewards, shared by `fit-flow`, `score` and `train-rl`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context, Normalise
from rlfr_cli.states import parse_state


class Normalisation(StrEnum):
    """How latents are scaled before the flow sees them."""

    NONE = "none"
    CHANNEL = "channel"


class ScoreSource(StrEnum):
    """What is shaped into token rewards: the flow's scores, or what they are compared with."""

    FLOW = "flow"
    RANDOM = "random"  # uniform numbers on the same tokens
    SHUFFLED = "shuffled"  # the flow's scores, in random order within each response
    LIKELIHOOD = "likelihood"  # negative log-probability of the token
    ENTROPY = "entropy"  # entropy of the distribution that the token was drawn from

    @property
    def needs_flow(self) -> bool:
        """Whether it is made of a flow's scores or stands on its valid tokens."""
        return self in (ScoreSource.FLOW, ScoreSource.RANDOM, ScoreSource.SHUFFLED)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ConfigGroup):
    """The velocity network and what it is told."""

    context: tuple[Context, ...] = option(
        (Context.NEXT,), help="Which neighbour conditions a token; repeated, the pairings are averaged."
    )
    shift: int = option(1, help="Distance of that neighbour, in tokens.", minimum=1)
    context_layer: str | None = option(
        None,
        help="Layer of that neighbour: the index of a block, or final-norm, which the output head reads; the layer of "
        "the token itself by default.",
        metavar="BLOCK|final-norm",
    )
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
        if self.context_layer is not None:
            parse_state(self.context_layer)


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
    antithetic: bool = option(False, help="Take draws in pairs of opposite noise; --num-draws is then even.")
    draw_agreement: float = option(
        0.0,
        help="Double --num-draws until two scores of as many other draws rank a response's tokens alike with this mean "
        "correlation, on the first responses; 0 is off.",
        minimum=0,
        exclusive_maximum=1,
    )
    max_draws: int = option(64, help="With --draw-agreement: draws at most.", minimum=1)
    score_normalisation: Normalise = option(Normalise.MINMAX, help="Scaling of scores within a response.")
    power: float = option(1.0, help="Exponent of the scaled score, sign kept.", exclusive_minimum=0)
    threshold: float = option(
        0.6, help="Scaled scores not above this are dropped; 0 or less is off.", flag="--flow-threshold"
    )
    top_k: int = option(15, help="Tokens of a response that keep a flow reward; 0 or less is off.", flag="--flow-top-k")
    coef: float = option(
        0.01, help="Flow reward = -coef × shaped score; a negative one rewards what deviates.", flag="--flow-coef"
    )
    centre_reward: bool = option(
        False, help="Subtract the response's mean flow reward, so that it sums to 0 over the response."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timestep:
            raise ConfigError("--timestep must name at least one time")
        if self.antithetic and self.num_draws % 2:
            raise ConfigError(f"--antithetic takes draws in pairs, got --num-draws {self.num_draws}")
        if self.draw_agreement > 0 and self.max_draws < self.num_draws:
            raise ConfigError(f"--max-draws {self.max_draws} is below --num-draws {self.num_draws}")
