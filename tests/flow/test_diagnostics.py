"""What a score is held against: shuffled contexts, random latents, single draws, channels."""

from __future__ import annotations

import pytest
import torch

from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.deviation import keyed_noise
from rlfr_cli.flow.diagnostics import (
    channel_errors,
    draw_scores,
    in_flow_units,
    only_pairing,
    random_latents,
    shuffle_conditions,
    top_channel_share,
)
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes

KEYS = ["a\n0", "b\n0", "c\n0"]
TIMES = (0.5, 0.8)


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    network = VelocityNetwork(VelocitySizes(latent_size=6, condition_size=6, width=8, depth=1))
    for parameter in network.parameters():  # a new network is zero everywhere
        torch.nn.init.normal_(parameter, std=0.3)
    statistics = LatentStatistics(torch.randn(2, 6), torch.rand(2, 6) + 0.5)
    return Flow(network, TappedLayers((1, 2), 4), (Pairing(Context.NEXT), Pairing(Context.PREVIOUS)), statistics)


@pytest.fixture
def latents() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1 + length, 2, 6) for length in (9, 2, 14)]


def test_shuffling_moves_conditions_within_their_response_and_leaves_targets(
    flow: Flow, latents: list[torch.Tensor]
) -> None:
    pairs = flow.pair(latents)
    shuffled = shuffle_conditions(pairs, 0, KEYS)
    assert torch.equal(shuffled.paired.targets_M, pairs.paired.targets_M)
    assert not torch.equal(shuffled.paired.conditions_PM, pairs.paired.conditions_PM)
    for sequence in range(3):
        of = pairs.paired.sequence_M == sequence
        for before, after in zip(pairs.paired.conditions_PM, shuffled.paired.conditions_PM, strict=True):
            assert sorted(after[of].tolist()) == sorted(before[of].tolist())


def test_shuffling_belongs_to_the_response_not_to_the_batch(flow: Flow, latents: list[torch.Tensor]) -> None:
    together = shuffle_conditions(flow.pair(latents), 0, KEYS).paired
    alone = shuffle_conditions(flow.pair(latents[2:]), 0, KEYS[2:]).paired
    start = len(latents[0]) + len(latents[1])
    assert torch.equal(together.conditions_PM[:, together.sequence_M == 2] - start, alone.conditions_PM)


def test_random_latents_have_the_mean_and_deviation_of_each_channel() -> None:
    statistics = LatentStatistics(torch.tensor([[5.0, -3.0]]), torch.tensor([[0.1, 4.0]]))
    (drawn,) = random_latents([torch.zeros(20000, 1, 2)], statistics, 0, ["a"])
    torch.testing.assert_close(drawn.mean(0), statistics.mean_JD, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), statistics.std_JD, atol=0.1, rtol=0.02)
    (again,) = random_latents([torch.zeros(20000, 1, 2)], statistics, 0, ["b"])
    assert not torch.equal(drawn, again)


def test_the_mean_over_draws_is_the_score(flow: Flow, latents: list[torch.Tensor]) -> None:
    pairs = flow.pair(latents)
    by_draw = draw_scores(flow, pairs, keyed_noise(7, KEYS, pairs), timesteps=TIMES, num_draws=3)
    for num in (1, 3):
        whole = flow.deviations(pairs, KEYS, seed=7, timesteps=TIMES, num_draws=num).score_M
        torch.testing.assert_close(by_draw[:, :num].mean(1), whole)


def test_the_mean_over_pairings_is_the_score(flow: Flow, latents: list[torch.Tensor]) -> None:
    pairs = flow.pair(latents)
    parts = [flow.deviations(only_pairing(pairs, p), KEYS, seed=7, timesteps=TIMES).score_M for p in (0, 1)]
    whole = flow.deviations(pairs, KEYS, seed=7, timesteps=TIMES).score_M
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)
    assert not torch.allclose(parts[0], parts[1])


def test_errors_by_channel_add_up_to_the_deviation(flow: Flow, latents: list[torch.Tensor]) -> None:
    pairs = flow.pair(latents)
    sums = channel_errors(flow, pairs, keyed_noise(7, KEYS, pairs), timesteps=TIMES)
    deviation = flow.deviations(pairs, KEYS, seed=7, timesteps=TIMES).deviation_M.double().sum()
    assert float(sums.sum()) / (6 * 2 * 2 * 2) == pytest.approx(float(deviation), rel=1e-4)  # channels, layers, …


def test_statistics_in_the_units_of_the_flow_are_those_of_the_normalised_latents(flow: Flow) -> None:
    torch.manual_seed(2)
    latents_NJD = 3 * torch.randn(500, 2, 6) + 1
    raw = LatentStatistics(latents_NJD.mean(0), latents_NJD.std(0, correction=0))
    assert flow.statistics is not None
    seen = flow.statistics.apply(latents_NJD)
    units = in_flow_units(raw, flow)
    torch.testing.assert_close(units.mean_JD, seen.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(units.std_JD, seen.std(0, correction=0), atol=1e-4, rtol=1e-4)


def test_share_of_the_top_channels_by_hand() -> None:
    values = torch.ones(200)
    assert top_channel_share(values) == pytest.approx(0.01)
    values[7] = 101.0
    assert top_channel_share(values) == pytest.approx(102 / 300)
    assert top_channel_share(torch.tensor([1.0, 3.0])) == pytest.approx(0.75)  # one channel at least
