"""A flow in memory: what it pairs, and that scores are finite and belong to the response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlfr_cli.errors import WorkError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import Pairing
from tiny_policies import HIDDEN, tiny_flow


def sequences(num_prompt: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_prompt + length, 2, HIDDEN, generator=generator) for length in (4, 1, 6)]


def scores(flow: Flow, latents: list[Tensor], keys: list[str], seed: int = 0) -> list[Tensor]:
    pairs = flow.pair(latents)
    result = flow.deviations(pairs, keys, seed=seed, timesteps=(0.8,))
    lengths = [len(sequence) - flow.num_prompt for sequence in latents]
    return list(pairs.paired.over_responses(result.score_M, torch.nan).split(lengths))


@pytest.mark.parametrize(
    ("pairings", "num_prompt"),
    [
        ((Pairing(Context.SELF),), 1),
        ((Pairing(Context.NEXT, 3),), 3),
        ((Pairing(Context.PREVIOUS, 2), Pairing(Context.NEXT)), 2),
    ],
)
def test_prompt_tokens_reach_as_far_as_the_largest_shift(pairings: tuple[Pairing, ...], num_prompt: int) -> None:
    flow = tiny_flow()
    flow.pairings = pairings
    assert flow.num_prompt == num_prompt


def test_only_response_tokens_with_a_neighbour_are_targets() -> None:
    pairs = tiny_flow(context=Context.NEXT).pair(sequences())
    assert pairs.paired.valid_K.tolist() == [True] * 3 + [False] + [False] + [True] * 5 + [False]
    assert pairs.paired.targets_M.tolist() == [1, 2, 3, 8, 9, 10, 11, 12]
    assert pairs.paired.conditions_PM.tolist() == [[2, 3, 4, 9, 10, 11, 12, 13]]
    previous = tiny_flow(context=Context.PREVIOUS).pair(sequences())
    assert previous.paired.conditions_PM.tolist() == [[0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12]]


def test_more_prompt_tokens_than_needed_change_no_target() -> None:
    flow = tiny_flow(context=Context.PREVIOUS)
    longer = sequences(num_prompt=3)
    ours, wanted = flow.pair(longer, num_prompt=3), flow.pair([sequence[2:] for sequence in longer])
    for column in (0, 1):
        torch.testing.assert_close(ours.targets(column, slice(None)), wanted.targets(column, slice(None)))
        torch.testing.assert_close(ours.conditions(column, 0, slice(None)), wanted.conditions(column, 0, slice(None)))


def test_statistics_normalise_targets_and_conditions() -> None:
    flow = tiny_flow(context=Context.PREVIOUS)
    flow.statistics = LatentStatistics(torch.full((2, HIDDEN), 3.0), torch.full((2, HIDDEN), 2.0))
    latents = sequences()
    pairs = flow.pair(latents)
    torch.testing.assert_close(pairs.targets(1, slice(0, 1))[0], (latents[0][1, 1] - 3) / 2)
    torch.testing.assert_close(pairs.conditions(1, 0, slice(0, 1))[0], (latents[0][0, 1] - 3) / 2)


def test_scores_belong_to_the_response_whatever_it_is_scored_with() -> None:
    flow, latents, keys = tiny_flow(), sequences(), ["a", "b", "c"]
    together = scores(flow, latents, keys)
    backwards = scores(flow, latents[::-1], keys[::-1])[::-1]
    for index in range(3):
        alone = scores(flow, [latents[index]], [keys[index]])[0]
        torch.testing.assert_close(alone, together[index], equal_nan=True)
        torch.testing.assert_close(backwards[index], together[index], equal_nan=True)
    assert float((scores(flow, latents, ["x", "b", "c"])[0] - together[0]).nan_to_num().abs().max()) > 0
    assert float((scores(flow, latents, keys, seed=1)[0] - together[0]).nan_to_num().abs().max()) > 0


def test_a_score_that_is_not_finite_is_an_error_with_a_hint() -> None:
    latents = sequences()
    latents[0][2, 0, 5] = float("inf")
    with pytest.raises(WorkError, match="not finite") as caught:
        scores(tiny_flow(), latents, ["a", "b", "c"])
    assert caught.value.hint


def test_response_keys_differ_between_problems_and_samples() -> None:
    keys = {response_key(problem, sample) for problem in ("1", "11", "2") for sample in (0, 1, 11)}
    assert len(keys) == 9
    assert response_key("1", 11) != response_key("11", 1)
