"""Controls and baselines in place of the flow's scores: on the same tokens, keyed by response, of the right sign."""

from __future__ import annotations

import math

import pytest
import torch

from rlfr_cli.config.flow import FlowRewardConfig, ScoreSource
from rlfr_cli.rl.measuring import flow_rewards
from rlfr_cli.rl.token_scores import shuffled_scores, token_scores

NAN = math.nan
FLOW = [torch.tensor([3.0, 1.0, 2.0, NAN]), torch.tensor([5.0, NAN])]
LOGPROBS = [torch.tensor([-0.5, -4.0, -1.0, -2.0]), torch.tensor([-0.1, -0.2])]
ENTROPIES = [torch.tensor([0.1, 0.2, 0.9, 0.3]), torch.tensor([0.4, 0.5])]
KEYS = ["a", "b"]


def of(source: ScoreSource, flow: list[torch.Tensor] | None = FLOW) -> list[list[float]]:
    return [scores.tolist() for scores in token_scores(source, flow, LOGPROBS, ENTROPIES, KEYS, 7)]


def test_the_flow_pays_for_its_own_scores() -> None:
    assert of(ScoreSource.FLOW)[0][:3] == [3, 1, 2]


@pytest.mark.parametrize("source", list(ScoreSource))
def test_every_source_stands_on_the_valid_tokens_of_the_flow(source: ScoreSource) -> None:
    assert [[value != value for value in row] for row in of(source)] == [[False, False, False, True], [False, True]]


def test_baselines_need_no_flow_and_score_every_token() -> None:
    assert of(ScoreSource.LIKELIHOOD, None) == [pytest.approx([0.5, 4, 1, 2]), pytest.approx([0.1, 0.2])]
    assert of(ScoreSource.ENTROPY, None) == [pytest.approx([0.1, 0.2, 0.9, 0.3]), pytest.approx([0.4, 0.5])]
    assert [source for source in ScoreSource if not source.needs_flow] == [ScoreSource.LIKELIHOOD, ScoreSource.ENTROPY]


def test_likelihood_penalises_the_least_likely_token() -> None:
    rewards = flow_rewards(token_scores(ScoreSource.LIKELIHOOD, None, LOGPROBS, ENTROPIES, KEYS, 7), FlowRewardConfig())
    assert rewards[0].tolist() == pytest.approx([0, -0.01, 0, 0])


def test_shuffled_scores_are_the_same_numbers_elsewhere() -> None:
    scores = [torch.arange(40.0), torch.arange(100.0, 140.0)]
    scores[0][3] = NAN
    dealt = shuffled_scores(7, KEYS, scores)
    for mine, theirs in zip(dealt, scores, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert mine.nan_to_num().sort().values.tolist() == theirs.nan_to_num().sort().values.tolist()
        assert not torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    # As much is paid for a response, whatever the order.
    for mine, theirs in zip(
        flow_rewards(dealt, FlowRewardConfig()), flow_rewards(scores, FlowRewardConfig()), strict=True
    ):
        assert float(mine.sum()) == pytest.approx(float(theirs.sum()))
        assert int((mine != 0).sum()) == int((theirs != 0).sum()) > 0


def test_the_order_is_keyed_by_response_and_seed() -> None:
    scores = [torch.arange(40.0), torch.arange(40.0)]
    first, second = shuffled_scores(7, KEYS, scores)
    swapped = shuffled_scores(7, KEYS[::-1], scores)
    assert torch.equal(first, swapped[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffled_scores(8, KEYS, scores)[0])
