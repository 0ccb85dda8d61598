"""Reference rules: which responses, and which of their tokens, a flow may learn from.

A rule weights a response or a token; weights multiply. `train-rl --accept RULE` and `sample --keep RULE`
use the same rules by the same names. Pure functions of facts about responses; tensors appear only for token
rules. ``T`` is a response's tokens.

    correct                  graded correct, and finished by its end token
    finished                 finished by its end token
    reward                   weight = the outcome reward, 0 if negative
    min-reward=X             reward at least X
    min-length=N max-length=N  response tokens, end token included
    max-group-share=X        at most this share of the problem's responses is correct (problems that are still hard)
    min-entropy=Q            only tokens whose entropy is at least the response's Q-quantile

A rule is a function of :class:`ResponseFacts`. ``@TokenRule`` marks one of :class:`TokenFacts`, and ``@BoundRule``
a function of a number that returns either: the rule ``name=NUMBER``. A user's own rules are made the same way;
``stages/rules.py`` finds them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlfr_cli.errors import ConfigError

# A file's path may hold an equals sign of its own.
RULE_TEXT = re.compile(r"(?P<name>.+\.py:\w+|[^=]*)(?:=(?P<bound>.*))?", re.DOTALL)


@dataclass(frozen=True)
class ResponseFacts:
    """What rules may know of a response.

    Attributes:
        accepted: graded correct and finished by its end token.
        finished: finished by its end token.
        reward: outcome reward.
        length: response tokens, end token included.
        group_share: share of its problem's responses that are accepted.
        problem_id: names the problem.
        problem: the problem's text.
        response: the response's text.
        grade: ``correct``, ``wrong``, ``no_answer``, ``unparseable``, ``timeout`` or ``ungraded``.
    """

    accepted: bool
    finished: bool
    reward: float
    length: int
    group_share: float
    problem_id: str = ""
    problem: str = ""
    response: str = ""
    grade: str = "ungraded"


@dataclass(frozen=True)
class TokenFacts:
    """What rules may know of a response's tokens, in nats, of the policy before it trains on them.

    Attributes:
        entropies_T: of the distribution that each token was drawn from, at the temperature of sampling.
        logprobs_T: of each token in that distribution.
    """

    entropies_T: torch.Tensor
    logprobs_T: torch.Tensor


ResponseRule = Callable[[ResponseFacts], float]


@dataclass(frozen=True)
class TokenRule:
    """Marks a function that gives weights [T] to a response's tokens: ``@TokenRule``."""

    function: Callable[[TokenFacts], torch.Tensor]

    def __call__(self, tokens: TokenFacts) -> torch.Tensor:
        return self.function(tokens)


@dataclass(frozen=True)
class BoundRule:
    """Marks a function of a number that returns a rule: ``@BoundRule``. It refuses a number by ValueError."""

    function: Callable[[float], ResponseRule | TokenRule]

    def __call__(self, bound: float) -> ResponseRule | TokenRule:
        return self.function(bound)


Rule = ResponseRule | TokenRule | BoundRule


def _min_entropy(quantile: float) -> TokenRule:
    if not 0 <= quantile <= 1:
        raise ValueError("a quantile lies between 0 and 1")

    def weights_T(tokens: TokenFacts) -> torch.Tensor:
        entropies_T = tokens.entropies_T
        return (entropies_T >= entropies_T.quantile(quantile)).float() if len(entropies_T) else entropies_T

    return TokenRule(weights_T)


RULES: dict[str, Rule] = {
    "correct": lambda facts: float(facts.accepted),
    "finished": lambda facts: float(facts.finished),
    "reward": lambda facts: max(0.0, facts.reward),
    "min-reward": BoundRule(lambda bound: lambda facts: float(facts.reward >= bound)),
    "min-length": BoundRule(lambda bound: lambda facts: float(facts.length >= bound)),
    "max-length": BoundRule(lambda bound: lambda facts: float(facts.length <= bound)),
    "max-group-share": BoundRule(lambda bound: lambda facts: float(facts.group_share <= bound)),
    "min-entropy": BoundRule(_min_entropy),
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

    def token_weights(self, tokens: TokenFacts) -> torch.Tensor:
        """Weights [T] of a response's tokens."""
        weights_T = torch.ones_like(tokens.entropies_T)
        for rule in self.token_rules:
            weights_T = weights_T * rule(tokens)
        return weights_T


def split_rule(text: str) -> tuple[str, str | None]:
    """``min-length=5`` as name and bound; no bound is None."""
    match = RULE_TEXT.fullmatch(text)
    assert match is not None  # any text is a name, or a name, an equals sign and more
    return match["name"], match["bound"]


def parse_rules(names: Sequence[str], flag: str, own: Mapping[str, Callable[[], Rule]] | None = None) -> ReferenceRules:
    """Rules by name.

    Args:
        flag: the option they came from, for errors.
        own: loads the rules that are not built in, by name.

    Raises:
        ConfigError: an unknown rule, a bound that is no number or out of range, one too many, or a missing one.
    """
    own = own or {}
    response_rules: list[ResponseRule] = []
    token_rules: list[TokenRule] = []
    for text in names:
        name, bound = split_rule(text)
        if name not in RULES and name not in own:
            known = [f"{key}=NUMBER" if isinstance(rule, BoundRule) else key for key, rule in RULES.items()]
            raise ConfigError(
                f"{flag} {text}: no such rule", hint=f"rules are {', '.join([*known, *own])}, and FILE.py:FUNCTION"
            )
        rule = RULES[name] if name in RULES else own[name]()
        if isinstance(rule, BoundRule):
            rule = _with_bound(rule, name, bound, f"{flag} {text}")
        elif bound is not None:
            raise ConfigError(
                f"{flag} {text}: {name} takes no number", hint="a rule of your own that takes one is marked @BoundRule"
            )
        if isinstance(rule, TokenRule):
            token_rules.append(rule)
        else:
            response_rules.append(rule)
    return ReferenceRules(tuple(names), tuple(response_rules), tuple(token_rules))


def _with_bound(rule: BoundRule, name: str, bound_text: str | None, given: str) -> ResponseRule | TokenRule:
    try:
        bound = float(bound_text or "")
        if not math.isfinite(bound):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{given}: {name} needs a number, such as {name}=0.5") from None
    try:
        return rule(bound)
    except ValueError as error:  # how a rule says that it does not take this number
        raise ConfigError(f"{given}: {error}") from error


def group_shares(accepted: Sequence[bool], group_ids: Sequence[object]) -> list[float]:
    """Share of accepted responses in each response's group."""
    totals: dict[object, list[int]] = {}
    for is_accepted, group in zip(accepted, group_ids, strict=True):
        counts = totals.setdefault(group, [0, 0])
        counts[0] += is_accepted
        counts[1] += 1
    return [totals[group][0] / totals[group][1] for group in group_ids]
