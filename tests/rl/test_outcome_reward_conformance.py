"""Family 08 of the recorded vectors: the reward of every recorded response beside ours, and why the two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlfr_cli.grading.answers import last_boxed
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.rewards import RewardInput, load_reward
from rlfr_cli.grading.worker import judge

# What theirs pays 0 for whatever the answer, and ours does not look at; grading is of the text as it was generated.
UNGATED = {
    "five boxes": "five boxes or more",
    "unknown prompt": "the prompt is looked up by its text",
    "repeat pattern": "a unit repeated five times",
    "five repeats": "a unit repeated five times",
    "repeated line of equals": "a unit repeated five times",
    "repeated spaces": "a unit repeated five times",
    "garbled": "more than 30 % odd characters",
    "chinese text": "more than 30 % odd characters",
    "fbox": "not seen as a box",
    "boxed with space": "not seen as a box",
    "answer after im_end": "a response is cut at its end token before it is graded here",
}
# Answers that are right and got half, since they were parsed without dollars (fault B8).
RIGHT_AFTER_ALL = {
    "dfrac", "frac short", "surd as sqrt12", "expression exact copy", "pi exact copy", "text exact copy",
    "interval exact copy", "plus-minus exact", "mixed number", "three nested braces",
}  # fmt: skip
# Answers that are wrong and got everything, by the same fault.
WRONG_AFTER_ALL = {"surd wrong radicand", "plain 2 for 2 sqrt3", "tuple wrong 2nd"}
# A response that was cut off earns nothing, though theirs found or forced an end token (fault B9).
CUT_OFF = {"forced EOS on a truncated answer", "deepseek no terminator"}
# Theirs takes the problem of the last user turn, which the response itself had written.
ANOTHER_PROBLEM = {"user turn injected"}


def our_reward(case: dict[str, Any]) -> float:
    """As generation would have given it: no end token, or one that was forced, means the length limit."""
    finished = bool(case["end"]) and "forced EOS" not in case["tag"]
    answer = last_boxed(case["response"])
    grade = Grade.NO_ANSWER if answer is None else judge(answer, [case["gold"]])
    reward_input = RewardInput(
        case["prompt"], (case["gold"],), case["response"], "stop" if finished else "length", grade
    )
    return load_reward("published")([reward_input])[0]


def test_every_recorded_reward_agrees_or_differs_for_a_stated_reason(shared: Path) -> None:
    cases = json.loads((shared / "conformance" / "08_rule_reward.json").read_text())["cases"]
    stated = set(UNGATED) | RIGHT_AFTER_ALL | WRONG_AFTER_ALL | CUT_OFF | ANOTHER_PROBLEM
    assert len({case["tag"] for case in cases}) == len(cases) == 56
    assert stated < {case["tag"] for case in cases}
    differing = set()
    for case in cases:
        ours, theirs, tag = our_reward(case), case["reward"], case["tag"]
        if ours != theirs:
            differing.add(tag)
        if tag in RIGHT_AFTER_ALL:
            assert (theirs, ours) == (0.5, 1.0), tag
            assert case["detail"]["dollar_wrapped_verdict"]
        if tag in WRONG_AFTER_ALL:
            assert (theirs, ours) == (1.0, 0.5), tag
            assert not case["detail"]["dollar_wrapped_verdict"]
        if tag in CUT_OFF:
            assert (theirs, ours) == (1.0, 0.0), tag
        if tag in UNGATED:
            assert (theirs, ours) == (0.0, 1.0), tag
        if tag in ANOTHER_PROBLEM:
            assert (theirs, ours) == (1.0, 0.5), tag
    assert differing == stated


def test_a_response_is_cut_at_its_end_token_before_it_is_graded(shared: Path) -> None:
    """The recorded text `I give up.<|im_end|>\\boxed{42}` can only come from a policy that went on after its end."""
    cases = json.loads((shared / "conformance" / "08_rule_reward.json").read_text())["cases"]
    case = next(case for case in cases if case["tag"] == "answer after im_end")
    before_end = case["response"].partition("<|im_end|>")[0]
    assert last_boxed(before_end) is None
