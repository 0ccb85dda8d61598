"""Rules of the user's own beside those built in: how they are found, what they see, what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fake_packages import group, install
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.flow.reference import ResponseFacts, TokenFacts
from rlfr_cli.stages.rules import facts_of, load_rules, rule_inputs

GOOD = ResponseFacts(accepted=True, finished=True, reward=0.5, length=20, group_share=0.25, problem_id="p7")
TOKENS = TokenFacts(entropies_T=torch.tensor([3.0, 1.0, 4.0]), logprobs_T=torch.tensor([-0.1, -2.0, -3.0]))

MY_RULES = """
import torch
from rlfr_cli.flow.reference import BoundRule, TokenRule

def brief(facts): return 3 / facts.length
def wordy(facts): return "words" in facts.response
def value(facts): return VALUE
def plain(tokens): return VALUE

@TokenRule
def surprising(tokens): return tokens.logprobs_T < -1

@TokenRule
def tokens_value(tokens): return VALUE

@BoundRule
def at_most(bound):
    if bound < 1: raise ValueError("a response has one token at least")
    return lambda facts: facts.length <= bound

@BoundRule
def surprise(bound): return TokenRule(lambda tokens: (tokens.logprobs_T < -bound) * 2.0)

@BoundRule
def bound_value(bound): return VALUE
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return write_rules(tmp_path, "None")


def write_rules(folder: Path, value: str) -> Path:
    """The rules above, of which some give this value."""
    path = folder / "my_rules.py"
    path.write_text(f"{MY_RULES}\nimport math\nVALUE = {value}\n")
    return path


def weight(*names: str, facts: ResponseFacts = GOOD) -> float:
    return load_rules(names, "--keep").response_weight(facts)


def token_weights(*names: str) -> list[float]:
    return load_rules(names, "--accept").token_weights(TOKENS).tolist()


def test_a_rule_from_a_file_multiplies_with_the_others(rules: Path) -> None:
    assert weight(f"{rules}:brief") == 3 / 20
    assert weight(f"{rules}:brief", "reward", f"{rules}:brief") == 3 / 20 * 0.5 * 3 / 20
    assert weight(f"{rules}:brief", "correct", facts=replace(GOOD, accepted=False)) == 0
    assert weight(f"{rules}:wordy", facts=replace(GOOD, response="in words")) == 1
    assert weight(f"{rules}:wordy") == 0


def test_a_rule_from_a_file_with_a_number(rules: Path) -> None:
    assert weight(f"{rules}:at_most=20") == 1
    assert weight(f"{rules}:at_most=19") == 0


def test_token_rules_from_a_file_multiply_with_the_others(rules: Path) -> None:
    assert token_weights(f"{rules}:surprising") == [0, 1, 1]
    assert token_weights(f"{rules}:surprise=2.5") == [0, 0, 2]
    assert token_weights(f"{rules}:surprise=0", "min-entropy=0.5") == [2, 0, 2]
    assert token_weights(f"{rules}:surprising", f"{rules}:brief", f"{rules}:surprise=0.05") == [0, 2, 2]
    both = load_rules([f"{rules}:surprising", f"{rules}:brief"], "--accept")
    assert both.response_weight(GOOD) == 3 / 20
    assert both.token_weights(TOKENS).dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("math.nan", "nan"),
        ("math.inf", "inf"),
        ("-0.5", "-0.5"),
        ("None", "None"),
        ("'0.5'", "'0.5'"),
        ("torch.ones(2)", "tensor([1., 1.])"),
        ("[1.0] * 1000", "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...]"),
    ],
)
def test_a_bad_weight_names_rule_value_and_problem(tmp_path: Path, value: str, seen: str) -> None:
    path = write_rules(tmp_path, value)
    with pytest.raises(InputError) as caught:
        weight(f"{path}:value")
    assert caught.value.message == f"the rule {path}:value gave {seen} for a response to problem p7"
    assert "0 or more" in str(caught.value.hint)


def test_a_weight_of_zero_is_a_weight(tmp_path: Path) -> None:
    assert weight(f"{write_rules(tmp_path, '0')}:value") == 0


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("torch.tensor([1.0, math.nan, 1.0])", "the weight nan"),
        ("torch.tensor([1.0, 1.0, math.inf])", "the weight inf"),
        ("torch.tensor([0.0, -2.0, 1.0])", r"the weight -2\.0"),
        ("torch.ones(2)", r"a tensor of shape \[2\]"),
        ("torch.ones(3, 1)", r"a tensor of shape \[3, 1\]"),
        ("torch.tensor(1.0)", r"a tensor of shape \[\]"),
        ("[1.0, 1.0, 1.0]", r"\[1\.0, 1\.0, 1\.0\]"),
        ("0.5", r"0\.5"),
    ],
)
def test_bad_token_weights_name_rule_and_value(tmp_path: Path, value: str, seen: str) -> None:
    path = write_rules(tmp_path, value)
    with pytest.raises(
        InputError, match=rf"my_rules\.py:tokens_value gave {seen} for a response of 3 tokens"
    ) as caught:
        token_weights(f"{path}:tokens_value")
    assert "3 finite numbers" in str(caught.value.hint)


def test_a_bound_rule_names_its_number_too(tmp_path: Path) -> None:
    path = write_rules(tmp_path, "lambda facts: -1")
    with pytest.raises(InputError, match=r"bound_value=2\.5 gave -1 "):
        weight(f"{path}:bound_value=2.50")


@pytest.mark.parametrize("value", ["None", "1.0", "at_most"])
def test_a_bound_rule_that_returns_no_rule_is_refused(tmp_path: Path, value: str) -> None:
    path = write_rules(tmp_path, value)
    with pytest.raises(ConfigError, match=r"--keep .*my_rules\.py:bound_value=2: .* in place of a rule"):
        weight(f"{path}:bound_value=2")


def test_a_number_is_refused_missing_or_too_much_before_work(rules: Path) -> None:
    with pytest.raises(ConfigError, match=r"--keep .*:at_most: .* needs a number"):
        weight(f"{rules}:at_most")
    with pytest.raises(ConfigError, match=r"--keep .*:at_most=much: .* needs a number"):
        weight(f"{rules}:at_most=much")
    with pytest.raises(ConfigError, match=r"--keep .*:at_most=0: a response has one token at least"):
        weight(f"{rules}:at_most=0")
    with pytest.raises(ConfigError, match=r"--keep .*:brief=2: .*:brief takes no number") as caught:
        weight(f"{rules}:brief=2")
    assert "@BoundRule" in str(caught.value.hint)


def test_what_is_missing_is_named(rules: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no rule file"):
        weight(f"{tmp_path}/none.py:brief")
    with pytest.raises(ConfigError, match="has no function 'breif'") as caught:
        weight(f"{rules}:breif")
    assert str(caught.value.hint).endswith("my_rules.py:brief?")


def test_an_error_inside_a_rule_is_the_users_to_see(tmp_path: Path) -> None:
    path = tmp_path / "rules.py"
    path.write_text("def rule(facts): return unheard\n")
    with pytest.raises(NameError, match="unheard"):
        weight(f"{path}:rule")


PACKAGE = "from rlfr_cli.flow.reference import BoundRule\ndef brief(facts): return 0.25\n" + (
    "@BoundRule\ndef scaled(bound): return lambda facts: bound * facts.reward\n"
)


def test_rules_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["brief = good_rules:brief", "scaled = good_rules:scaled", "lost = good_rules:lost"]
    install(monkeypatch, tmp_path, "good_rules", group("rlfr.rules", lines), PACKAGE)
    assert weight("brief", "reward") == 0.125
    assert weight("brief", "scaled=3") == 0.25 * 3 * 0.5
    with pytest.raises(ConfigError, match="scaled needs a number"):
        weight("scaled")
    with pytest.raises(ConfigError, match="no such rule") as caught:
        weight("breef")
    for name in ("correct", "min-length=NUMBER", "brief", "scaled", "FILE.py:FUNCTION"):
        assert name in str(caught.value.hint)
    with pytest.raises(InputError, match=r"'lost' of the package good_rules 1\.2"):
        weight("lost")


def test_a_built_in_rule_wins_over_a_packages_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["correct = hiding_rules:zero", "min-length = hiding_rules:zero"]
    install(monkeypatch, tmp_path, "hiding_rules", group("rlfr.rules", lines), "def zero(facts): return 0\n")
    assert weight("correct", "min-length=3", "min-length=4") == 1
    said = capsys.readouterr().err
    assert "--keep correct is the rule of rlfr itself" in said
    assert said.count("hiding_rules 1.2 is not used") == 2
    with pytest.raises(ConfigError) as caught:
        weight("corect")
    assert str(caught.value.hint).count("correct") == 1
    assert weight("finished") == 1
    assert capsys.readouterr().err == ""
    assert rule_inputs(["correct", "min-length=3"]) == {}


def test_inputs_are_digests_of_files_and_versions_of_packages(
    rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "good_rules", group("rlfr.rules", ["scaled = good_rules:scaled"]), version="2.0")
    digest = hashlib.sha256(rules.read_bytes()).hexdigest()
    given = ["correct", f"{rules}:brief", f"{rules}:at_most=5", f"{rules}:at_most=6", "scaled=1"]
    assert rule_inputs(given) == {
        "rules": {f"{rules}:brief": digest, f"{rules}:at_most": digest, "scaled": "good_rules 2.0"}
    }
    assert rule_inputs([]) == rule_inputs(["correct", "min-entropy=0.5"]) == {}


def test_facts_of_rows() -> None:
    row = RolloutRow(
        problem_id="a",
        sample_index=0,
        problem="1 + 1?",
        answer=["2"],
        prompt_token_ids=[5],
        response_token_ids=[6, 7, 1],
        response_logprobs=None,
        response="two",
        finish_reason="stop",
        reward=0.75,
        correct=True,
        grade="correct",
    )
    cut = replace(row, sample_index=1, finish_reason="length", reward=None)
    wrong = replace(row, problem_id="b", grade="wrong", correct=False, response_token_ids=[1])
    texts = {"problem": "1 + 1?", "response": "two"}
    assert facts_of([row, cut, wrong]) == [
        ResponseFacts(True, True, 0.75, 3, 0.5, problem_id="a", grade="correct", **texts),
        ResponseFacts(False, False, 0.0, 3, 0.5, problem_id="a", grade="correct", **texts),
        ResponseFacts(False, True, 0.75, 1, 0.0, problem_id="b", grade="wrong", **texts),
    ]
