"""The summary of scores: separation, shares and tokens, by hand."""

from __future__ import annotations

import pytest

from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.artifacts.scores import ScoreRow, score_table
from rlfr_cli.report.scores import ScoreSummary


def scored(problem: str, sample: int, scores: list[float | None], rewards: list[float | None]) -> ScoreRow:
    return ScoreRow(problem_id=problem, sample_index=sample, deviation=scores, score=scores, flow_reward=rewards)


def answered(problem: str, sample: int, tokens: list[int], logprob: float, correct: bool) -> RolloutRow:
    return RolloutRow(
        problem_id=problem,
        sample_index=sample,
        problem="p",
        answer=["1"],
        prompt_token_ids=[0],
        response_token_ids=tokens,
        response_logprobs=[logprob] * len(tokens),
        response="r",
        finish_reason="stop",
        reward=float(correct),
        correct=correct,
        grade="correct" if correct else "wrong",
    )


def summary_of(scores: list[ScoreRow], rows: list[RolloutRow], examples: int = 0) -> dict:
    summary = ScoreSummary(seed=0, examples=examples, tokenizer=None)
    summary.add(score_table(scores), rollout_table(rows))
    return summary.result()


def test_auc_is_one_where_every_wrong_response_scores_higher() -> None:
    scores = [scored("a", 0, [1.0, 1.0, None], [0.0, 0.0, None]), scored("a", 1, [3.0, 5.0, None], [-0.01, 0.0, None])]
    rows = [answered("a", 0, [1, 2, 3], -0.9, True), answered("a", 1, [1, 2, 3], -0.1, False)]
    result = summary_of(scores, rows)
    assert result["wrong_scores_higher"]["auc"]["value"] == 1.0
    assert result["wrong_scores_higher"]["auc_within_problem"]["value"] == 1.0
    # The wrong response was the likelier one, so the control points the other way.
    assert result["control_negative_logprob"]["auc"]["value"] == 0.0
    assert result["score_of_correct"] == 1.0
    assert result["score_of_wrong"] == 4.0
    assert result["flow_reward_sum_of_wrong"] == pytest.approx(-0.01)


def test_shares_count_valid_tokens_only() -> None:
    result = summary_of(
        [scored("a", 0, [1.0, 2.0, None], [-0.01, 0.0, None])], [answered("a", 0, [1, 2, 3], -0.5, True)]
    )
    assert result["valid_tokens"] == 2
    assert result["share_of_tokens_rewarded"] == 0.5


def test_the_most_penalised_token_is_the_one_with_the_lowest_reward() -> None:
    tokens = [7, 8] * 5 + [9]
    scores = [scored("a", 0, [2.0, 1.0] * 5 + [None], [-0.01, 0.0] * 5 + [None])]
    result = summary_of(scores, [answered("a", 0, tokens, -0.5, True)], examples=1)
    assert [row["token"] for row in result["most_penalised_tokens"]] == ["7"]
    assert [row["token"] for row in result["least_penalised_tokens"]] == ["8"]


def test_ungraded_responses_have_no_separation() -> None:
    summary = ScoreSummary(seed=0, examples=0, tokenizer=None)
    summary.add_unlabelled(score_table([scored("0", 0, [1.0, None], [0.0, None])]), [[1, 2]])
    assert "wrong_scores_higher" not in summary.result()
