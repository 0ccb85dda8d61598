"""Reference rules of a stage: those built in and the user's own, the facts they are given, what artifacts remember.

A rule of the user's own is a function in a file (``FILE.py:FUNCTION``) or one that an installed package offers under
the entry point group ``rlfr.rules``. It is run as the trusted code of the user that it is; only what it returns is
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from reprlib import repr as short_repr
from typing import Any

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.errors import InputError
from rlfr_cli.extensions import (
    FILE_SPEC,
    Kind,
    extension_fingerprint,
    find_extension,
    finite_number,
    installed_names,
    warning_if_hidden,
)
from rlfr_cli.flow.reference import (
    RULES,
    BoundRule,
    ReferenceRules,
    ResponseFacts,
    ResponseRule,
    Rule,
    TokenFacts,
    TokenRule,
    group_shares,
    parse_rules,
    split_rule,
)
from rlfr_cli.grading.rewards import is_accepted


def load_rules(names: Sequence[str], flag: str) -> ReferenceRules:
    """The rules that an option names. A rule that is built in wins over a package's of the same name, with a warning.

    Args:
        flag: the option they came from, for errors.

    Raises:
        RlfrError: an unknown rule, a bound that it does not take, or a file or package that cannot be used.
    """
    for name in dict.fromkeys(split_rule(text)[0] for text in names):
        if name in RULES and (hidden := warning_if_hidden(name, Kind.RULE)):
            console.warn(f"{flag} {hidden}")
    installed = [name for name in installed_names(Kind.RULE) if name not in RULES]
    files = [name for name, _ in map(split_rule, names) if FILE_SPEC.fullmatch(name)]
    return parse_rules(names, flag, {name: partial(_load, name) for name in (*installed, *files)})


def rule_inputs(names: Sequence[str]) -> dict[str, Any]:
    """Fingerprints of the files and packages that rules come from, by rule; nothing for those built in."""
    fingerprints = {
        name: extension_fingerprint(name, Kind.RULE) for name, _ in map(split_rule, names) if name not in RULES
    }
    return {"rules": fingerprints} if fingerprints else {}


def facts_of(rows: Sequence[RolloutRow]) -> list[ResponseFacts]:
    """What rules may know of each response; ``rows`` are all responses to their problems."""
    accepted = [is_accepted(row.grade, row.finish_reason) for row in rows]
    shares = group_shares(accepted, [row.problem_id for row in rows])
    return [
        ResponseFacts(
            accepted=ok,
            finished=row.finish_reason == "stop",
            reward=row.reward or 0.0,
            length=len(row.response_token_ids),
            group_share=share,
            problem_id=row.problem_id,
            problem=row.problem,
            response=row.response,
            grade=row.grade,
        )
        for row, ok, share in zip(rows, accepted, shares, strict=True)
    ]


def _load(name: str) -> Rule:
    function = find_extension(name, Kind.RULE)
    assert function is not None  # a file's, or the name of an installed one
    if not isinstance(function, BoundRule):
        return _checked(function, name)

    def with_bound(bound: float) -> ResponseRule | TokenRule:
        rule = function(bound)
        if isinstance(rule, BoundRule) or not callable(rule):
            raise ValueError(f"{name} returned {short_repr(rule)} in place of a rule, which is a function of facts")
        return _checked(rule, f"{name}={bound:g}")

    return BoundRule(with_bound)


def _checked(rule: Callable[..., Any], name: str) -> ResponseRule | TokenRule:
    """A user's rule with its result checked, so that a slip is an error at once and not a bad reference."""
    if isinstance(rule, TokenRule):
        return TokenRule(partial(_token_weights, rule, name))
    return partial(_response_weight, rule, name)


def _response_weight(rule: Callable[..., Any], name: str, facts: ResponseFacts) -> float:
    value = rule(facts)
    number = finite_number(value)
    if number is None or number < 0:
        raise InputError(
            f"the rule {name} gave {short_repr(value)} for a response to problem {facts.problem_id}",
            hint="return a finite number, 0 or more; mark a rule for tokens @TokenRule, one with a number @BoundRule",
        )
    return number


def _token_weights(rule: TokenRule, name: str, tokens: TokenFacts) -> torch.Tensor:
    value = rule(tokens)
    entropies_T = tokens.entropies_T
    if not isinstance(value, torch.Tensor):
        seen = short_repr(value)
    elif value.shape != entropies_T.shape:
        seen = f"a tensor of shape {list(value.shape)}"
    elif len(wrong := value[~(value.isfinite() & (value >= 0))]):
        seen = f"the weight {wrong[0].item()}"
    else:
        return value.to(entropies_T)
    raise InputError(
        f"the rule {name} gave {seen} for a response of {len(entropies_T)} tokens",
        hint=f"return a tensor of {len(entropies_T)} finite numbers, each 0 or more",
    )
