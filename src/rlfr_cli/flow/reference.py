"""Reference rules: which responses, and which of their tokens, a flow may learn from.

A rule weights a response or a token; weights multiply. `train-rl --accept RULE` and `sample --keep RULE`
use the same rules by the same names. Pure functions of facts about responses; tensors appear only for token
rules.

    correct                  graded correct, and finished by its end token
    finished                 finished by its end token
    reward                   weight = the outcome reward, 0 if negative
    min-reward=X             reward at least X
    min-length=N max-length=N  response tokens, end token included
    max-group-share=X        at most this share of the problem's responses is correct (problems that are still hard)
    min-entropy=Q            only tokens whose entropy is at least the response's Q-quantile
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlfr_cli.errors import ConfigError


@dataclass(frozen=True)
class ResponseFacts:
    """What rules may know of a response.

    Attributes:
        accepted: graded correct and finished by its end token.
        finished: finished by its end token.
        reward: outcome reward.
        length: response tokens.
        group_share: share of its problem's responses that are accepted.
    """

    accepted: bool
    finished: bool
    reward: float
    length: int
    group_share: float


ResponseRule = Callable[[ResponseFacts], float]
TokenRule = Callable[[torch.Tensor], torch.Tensor]

PLAIN_RULES: dict[str, ResponseRule] = {
    "correct": lambda facts: float(facts.accepted),
    "finished": lambda facts: float(facts.finished),
    "reward": lambda facts: max(0.0, facts.reward),
}
BOUND_RULES: dict[str, Callable[[float], ResponseRule]] = {
    "min-reward": lambda bound: lambda facts: float(facts.reward >= bound),
    "min-length": lambda bound: lambda facts: float(facts.length >= bound),
    "max-length": lambda bound: lambda facts: float(facts.length <= bound),
    "max-group-share": lambda bound: lambda facts: float(facts.group_share <= bound),
}
TOKEN_RULES: dict[str, Callable[[float], TokenRule]] = {
    "min-entropy": lambda quantile: (
        lambda entropies_T: (entropies_T >= entropies_T.quantile(quantile)).float() if len(entropies_T) else entropies_T
    ),
}


@dataclass(frozen=True)
class ReferenceRules:
    """Several rules as one: weights multiply."""

    names: tuple[str, ...]
    response_rules: tuple[ResponseRule, ...]
    token_rules: tuple[TokenRule, ...]

    def response_weight(self, facts: ResponseFacts) -> float:
        """Weight of a response, 0 for one that is left out."""
        weight = 1.0
        for rule in self.response_rules:
            weight *= rule(facts)
        return weight

    def token_weights(self, entropies_T: torch.Tensor) -> torch.Tensor:
        """Weights [T] of a response's tokens by their entropies [T] in nats."""
        weights_T = torch.ones_like(entropies_T)
        for rule in self.token_rules:
            weights_T = weights_T * rule(entropies_T)
        return weights_T


def parse_rules(names: Sequence[str], flag: str) -> ReferenceRules:
    """Rules by name.

    Args:
        flag: the option they came from, for errors.

    Raises:
        ConfigError: an unknown rule, a bound that is no number, or a missing one.
    """
    response_rules: list[ResponseRule] = []
    token_rules: list[TokenRule] = []
    for text in names:
        name, equals, bound_text = text.partition("=")
        if name in PLAIN_RULES and not equals:
            response_rules.append(PLAIN_RULES[name])
            continue
        if name not in BOUND_RULES and name not in TOKEN_RULES:
            known = [*PLAIN_RULES, *(f"{rule}=NUMBER" for rule in (*BOUND_RULES, *TOKEN_RULES))]
            raise ConfigError(f"{flag} {text}: no such rule", hint=f"rules are {', '.join(known)}")
        try:
            bound = float(bound_text)
            if not math.isfinite(bound):
                raise ValueError
        except ValueError:
            raise ConfigError(f"{flag} {text}: {name} needs a number, such as {name}=0.5") from None
        if name in TOKEN_RULES:
            if not 0 <= bound <= 1:
                raise ConfigError(f"{flag} {text}: a quantile lies between 0 and 1")
            token_rules.append(TOKEN_RULES[name](bound))
        else:
            response_rules.append(BOUND_RULES[name](bound))
    return ReferenceRules(tuple(names), tuple(response_rules), tuple(token_rules))


def group_shares(accepted: Sequence[bool], group_ids: Sequence[object]) -> list[float]:
    """Share of accepted responses in each response's group."""
    totals: dict[object, list[int]] = {}
    for is_accepted, group in zip(accepted, group_ids, strict=True):
        counts = totals.setdefault(group, [0, 0])
        counts[0] += is_accepted
        counts[1] += 1
    return [totals[group][0] / totals[group][1] for group in group_ids]
