"""Streaming statistics agree with those of everything at once."""

from __future__ import annotations

import torch

from rlfr_cli.flow.normalisation import LatentStatistics, StatisticsAccumulator


def test_by_hand() -> None:
    accumulator = StatisticsAccumulator(1, 1)
    for value in (1.0, 3.0, 8.0):
        accumulator.update(torch.tensor([[[value]]]))
    statistics = accumulator.finish()
    assert float(statistics.mean_JD) == 4.0
    torch.testing.assert_close(statistics.std_JD, torch.tensor([[(26 / 3) ** 0.5]]))  # (9 + 1 + 16) / 3
    torch.testing.assert_close(statistics.apply(torch.tensor([[[8.0]]])), torch.tensor([[[4 / (26 / 3) ** 0.5]]]))


def test_streaming_and_merging_equal_one_pass() -> None:
    torch.manual_seed(0)
    latents = torch.randn(50, 2, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([1e4, 0.0, -3.0])
    one, first, second = (StatisticsAccumulator(2, 3) for _ in range(3))
    one.update(latents)
    first.update(latents[:7])
    first.update(latents[7:7])
    first.update(latents[7:20])
    second.update(latents[20:])
    first.merge(second)
    first.merge(StatisticsAccumulator(2, 3))
    wanted = latents.double()
    for statistics in (one.finish(), first.finish()):
        torch.testing.assert_close(statistics.mean_JD, wanted.mean(dim=0).float())
        torch.testing.assert_close(statistics.std_JD, wanted.std(dim=0, correction=0).float())
    normalised = one.finish().apply(latents)
    torch.testing.assert_close(normalised.std(dim=0, correction=0), torch.ones(2, 3), rtol=1e-3, atol=1e-3)


def test_identity_and_columns() -> None:
    latents = torch.randn(4, 2, 3)
    assert torch.equal(LatentStatistics.identity(2, 3).apply(latents), latents)
    statistics = LatentStatistics(torch.randn(2, 3), torch.rand(2, 3) + 0.5)
    torch.testing.assert_close(statistics.apply(latents)[:, 1], statistics.apply_column(latents[:, 1], 1))


def test_a_channel_that_never_moved_is_only_centred() -> None:
    accumulator = StatisticsAccumulator(1, 1)
    accumulator.update(torch.full((5, 1, 1), 7.0))
    assert float(accumulator.finish().apply(torch.tensor([[[9.0]]]))) == 2.0
