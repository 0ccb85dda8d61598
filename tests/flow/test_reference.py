"""Reference rules: each one by hand, their product, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.reference import (
    BoundRule,
    ResponseFacts,
    TokenFacts,
    TokenRule,
    group_shares,
    parse_rules,
    split_rule,
)

GOOD = ResponseFacts(accepted=True, finished=True, reward=1.0, length=20, group_share=0.25)
CUT_OFF = replace(GOOD, accepted=False, finished=False, reward=0.0)
WRONG = replace(GOOD, accepted=False, reward=0.5)


def weight(rules: str | list[str], facts: ResponseFacts) -> float:
    return parse_rules([rules] if isinstance(rules, str) else rules, "--accept").response_weight(facts)


@pytest.mark.parametrize(
    ("rule", "good", "cut_off", "wrong"),
    [("correct", 1, 0, 0), ("finished", 1, 0, 1), ("reward", 1, 0, 0.5), ("min-reward=0.5", 1, 0, 1)],
)
def test_rules_on_outcomes(rule: str, good: float, cut_off: float, wrong: float) -> None:
    assert [weight(rule, facts) for facts in (GOOD, CUT_OFF, WRONG)] == [good, cut_off, wrong]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("min-length=20", True),
        ("min-length=21", False),
        ("max-length=20", True),
        ("max-length=19", False),
        ("max-group-share=0.25", True),
        ("max-group-share=0.2", False),
        ("min-reward=1", True),
        ("min-reward=1.5", False),
    ],
)
def test_bounds_are_inclusive(rule: str, kept: bool) -> None:
    assert weight(rule, GOOD) == float(kept)


def test_a_negative_reward_weighs_nothing() -> None:
    assert weight("reward", replace(GOOD, reward=-2.0)) == 0
    assert weight("reward", replace(GOOD, reward=2.5)) == 2.5


def test_weights_multiply() -> None:
    assert weight(["reward", "finished"], WRONG) == 0.5
    assert weight(["reward", "correct"], WRONG) == 0
    assert weight(["reward", "reward"], WRONG) == 0.25
    assert weight([], CUT_OFF) == 1


def test_tokens_of_high_entropy() -> None:
    """The 0.5-quantile of 1, 2, 3, 4 is 2.5; equal entropies all stay."""
    entropies = torch.tensor([3.0, 1.0, 4.0, 2.0])

    def kept(rules: list[str], values: torch.Tensor = entropies) -> list[float]:
        return parse_rules(rules, "--accept").token_weights(TokenFacts(values, -values)).tolist()

    assert kept(["min-entropy=0.5"]) == [1, 0, 1, 0]
    assert kept(["min-entropy=1"]) == [0, 0, 1, 0]
    assert kept(["min-entropy=0"]) == kept(["correct"]) == kept([]) == [1, 1, 1, 1]
    assert kept(["min-entropy=0.5"], torch.full((3,), 0.7)) == [1, 1, 1]
    assert kept(["min-entropy=0.5"], torch.zeros(0)) == []


def test_token_rules_weigh_no_response_and_response_rules_no_token() -> None:
    rules = parse_rules(["min-entropy=0.9", "correct"], "--accept")
    assert rules.names == ("min-entropy=0.9", "correct")
    assert (len(rules.response_rules), len(rules.token_rules)) == (1, 1)
    assert rules.response_weight(GOOD) == 1


@pytest.mark.parametrize("text", ["corect", "min_length=3", "", "=1", "file.py:rule"])
def test_an_unknown_rule_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--keep .*no such rule") as caught:
        parse_rules([text], "--keep")
    for name in ("correct", "finished", "reward", "min-length=NUMBER", "max-group-share=NUMBER", "min-entropy=NUMBER"):
        assert name in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["min-length", "min-length=", "max-length=ten", "min-entropy=high"])
def test_a_bound_that_is_no_number_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a number, such as .*=0\.5"):
        parse_rules([text], "--accept")


@pytest.mark.parametrize("text", ["min-entropy=1.5", "min-entropy=-0.1"])
def test_a_quantile_outside_0_to_1_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        parse_rules([text], "--accept")


def test_group_shares_by_hand() -> None:
    assert group_shares([True, False, True, True], ["a", "a", "b", "a"]) == [2 / 3, 2 / 3, 1, 2 / 3]


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf"])
def test_a_bound_that_is_not_finite_is_refused(bound: str) -> None:
    with pytest.raises(ConfigError, match="needs a number"):
        parse_rules([f"min-length={bound}"], "--accept")


def test_a_number_for_a_rule_that_takes_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--keep correct=1: correct takes no number"):
        parse_rules(["correct=1"], "--keep")


def test_rules_that_are_not_built_in_are_loaded_by_name_and_only_when_named() -> None:
    own = {
        "half": lambda: lambda facts: 0.5,
        "times": lambda: BoundRule(lambda bound: lambda facts: bound),
        "sure": lambda: TokenRule(lambda tokens: (tokens.logprobs_T > -1).float()),
        "lost": lambda: pytest.fail("nobody named it"),
        "correct": lambda: pytest.fail("the built-in rule wins"),
    }
    rules = parse_rules(["half", "times=3", "correct", "sure"], "--accept", own)
    assert rules.response_weight(GOOD) == 1.5
    assert rules.response_weight(WRONG) == 0
    assert rules.token_weights(TokenFacts(torch.ones(2), torch.tensor([-0.5, -2.0]))).tolist() == [1, 0]
    with pytest.raises(ConfigError) as caught:
        parse_rules(["hlf"], "--accept", own)
    assert "half, times" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("correct", ("correct", None)),
        ("min-length=5", ("min-length", "5")),
        ("min-length=", ("min-length", "")),
        ("a=b", ("a", "b")),
        ("a=b=c", ("a", "b=c")),
        ("runs=3/rules.py:brief", ("runs=3/rules.py:brief", None)),
        ("runs=3/rules.py:brief=0.5", ("runs=3/rules.py:brief", "0.5")),
        ("", ("", None)),
    ],
)
def test_a_rule_is_a_name_and_perhaps_a_number(text: str, parts: tuple[str, str | None]) -> None:
    assert split_rule(text) == parts
