"""How many draws a score needs: until two scores of different draws agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlfr_cli.flow.deviation import keyed_noise
from rlfr_cli.flow.diagnostics import draw_scores
from rlfr_cli.flow.draws import DrawChoice, choose_num_draws, mean_rank_correlation
from rlfr_cli.flow.flow import Flow
from tiny_policies import HIDDEN, tiny_flow

KEYS = ["a", "b", "c"]


def latents(scale: float = 1.0) -> list[torch.Tensor]:
    """Tokens of different norms, so that their scores differ by more than noise."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.linspace(0.2, 3.0, 25)[torch.randperm(25, generator=generator)]
    return [torch.randn(25, 2, HIDDEN, generator=generator) * scale * norms[:, None, None] for _ in KEYS]


def choose(wanted: float, flow: Flow | None = None, scale: float = 1.0, **options: Any) -> DrawChoice:
    flow = flow or tiny_flow()
    return choose_num_draws(
        flow,
        flow.pair(latents(scale)),
        KEYS,
        seed=0,
        timesteps=(0.8,),
        wanted=wanted,
        **{"num_draws": 1, "max_draws": 64, **options},
    )


def test_the_number_is_the_first_that_agrees_as_wanted() -> None:
    flow = tiny_flow()
    pairs = flow.pair(latents(0.3))
    scores_MS = draw_scores(flow, pairs, keyed_noise(0, KEYS, pairs), timesteps=(0.8,), num_draws=128)
    tokens = pairs.paired.valid_per_response_R.tolist()

    def agreement(num: int) -> float:
        return mean_rank_correlation(scores_MS[:, :num].mean(1), scores_MS[:, num : 2 * num].mean(1), tokens)

    measured = {num: agreement(num) for num in (1, 2, 4, 8, 16, 32, 64)}
    assert measured[64] > measured[1] + 0.1
    wanted = (measured[2] + max(measured[4], measured[8])) / 2
    first = next(num for num, value in measured.items() if value >= wanted)
    choice = choose(wanted, scale=0.3)
    assert choice.num_draws == first > 1
    assert choice.agreement == pytest.approx(measured[first])
    assert choice.reached


def test_the_largest_number_is_said_not_to_be_enough() -> None:
    choice = choose(0.999, scale=0.3, max_draws=4)
    assert choice.num_draws == 4
    assert not choice.reached
    assert 0 < choice.agreement < 0.999


def test_antithetic_draws_keep_their_pairs_together() -> None:
    """Of a score that is linear in the noise nothing is left after one pair: two pairs then agree exactly."""
    choice = choose(0.5, num_draws=2, antithetic=True)
    assert choice.num_draws % 2 == 0
    alone = choose(0.5, num_draws=2)
    assert choice.agreement != alone.agreement


def test_responses_too_short_to_rank_end_the_search() -> None:
    flow = tiny_flow()
    pairs = flow.pair([torch.randn(3, 2, HIDDEN)])
    choice = choose_num_draws(flow, pairs, ["a"], seed=0, timesteps=(0.8,), wanted=0.9, num_draws=1, max_draws=1024)
    assert (choice.num_draws, choice.reached) == (1, False)
    assert choice.agreement != choice.agreement


def test_rank_correlation_by_hand() -> None:
    """Ranks 0 1 2 3 against 0 1 3 2: 1 - 6 × 2 / (4 × 15) = 0.8; reversed: -1; a response of two tokens is left out."""
    first = torch.tensor([1.0, 2, 3, 4, 9, 8, 7, 0, 1])
    second = torch.tensor([1.0, 2, 4, 3, 1, 2, 3, 0, 1])
    assert mean_rank_correlation(first, second, [4, 3, 2]) == pytest.approx((0.8 - 1) / 2)
