"""Deviation and score: by hand, and unchanged by batch, order, padding, chunks and what else is scored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.deviation import DeviationResult, deviations, keyed_noise, score_weights
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import PairedLatents, Pairing, TappedLayers, pair_tokens
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes

SIZE = 6
LAYERS = TappedLayers((1, 2, 3), 4)
NEXT, PREVIOUS = Pairing(Context.NEXT), Pairing(Context.PREVIOUS)


def random_network() -> VelocityNetwork:
    torch.manual_seed(0)
    network = VelocityNetwork(VelocitySizes(latent_size=SIZE, condition_size=SIZE, width=8, depth=2))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def random_sequences() -> dict[str, Tensor]:
    """Latents by response key: one prompt token and some response tokens, one response without any."""
    torch.manual_seed(1)
    lengths = {"a": 6, "b": 1, "c": 3, "d": 8}
    return {key: torch.randn(length, 3, SIZE) for key, length in lengths.items()}


def pack(sequences: dict[str, Tensor], pairings: tuple[Pairing, ...] = (NEXT,)) -> PairedLatents:
    offsets = torch.tensor([0, *(len(latents) for latents in sequences.values())]).cumsum(0)
    return PairedLatents(torch.cat(list(sequences.values())), pair_tokens(offsets, 1, pairings), LAYERS)


def score(sequences: dict[str, Tensor], pairings: tuple = (NEXT,), **options) -> DeviationResult:
        latents_BSJD[row, : len(latents)] = latents
        valid_BS[row, 1 : len(latents) - 1] = True
    for column, index in enumerate(LAYERS.indices):
        noise_BSD = torch.zeros(len(sequences), longest, SIZE)
        for row, latents in enumerate(sequences.values()):
            noise_BSD[row, 1 : len(latents)] = noise_of(row, index, 0)
        target, condition = latents_BSJD[..., column, :], latents_BSJD[..., column, :].roll(-1, dims=1)
        noised = 0.8 * target + 0.2 * noise_BSD
        with torch.no_grad():
            velocity = network(
                noised.flatten(0, 1),
                torch.full((valid_BS.numel(),), 0.8),
                condition.flatten(0, 1),
                torch.full((valid_BS.numel(),), index / 4),
            ).view_as(target)
        scores.append(4 * (velocity - (target - noise_BSD)).square().mean(dim=-1))
    wanted = torch.stack(scores).mean(dim=0)[valid_BS]
    torch.testing.assert_close(score(sequences).score_M, wanted, rtol=1e-5, atol=1e-5)


def test_pairings_and_draws_are_averaged() -> None:
    sequences = {"d": random_sequences()["d"]}
    both = score(sequences, (NEXT, PREVIOUS)).score_M  # the last token has no next
    following, before = score(sequences, (NEXT,)).score_M, score(sequences, (PREVIOUS,)).score_M[:-1]
    torch.testing.assert_close(both, (following + before) / 2)

    pairs, network = pack(sequences), random_network()
    noise = keyed_noise(5, ["d"], pairs)
    one, two = (
        deviations(network, pairs, lambda s, j, _, draw=draw: noise(s, j, draw)).score_M for draw in (0, 1)
    )
    torch.testing.assert_close(score(sequences, num_draws=2).score_M, (one + two) / 2)


def test_antithetic_draws_come_in_opposite_pairs() -> None:
    pairs = pack(random_sequences())
    noise = keyed_noise(5, list("abcd"), pairs, antithetic=True)
    assert torch.equal(noise(0, 1, 1), -noise(0, 1, 0))
    assert torch.equal(noise(0, 1, 0), keyed_noise(5, list("abcd"), pairs)(0, 1, 0))
    assert not torch.equal(noise(0, 1, 2).abs(), noise(0, 1, 0).abs())


def test_statistics_act_on_target_and_condition() -> None:
    sequences = {"d": random_sequences()["d"]}
    statistics = LatentStatistics(torch.full((3, SIZE), 2.0), torch.full((3, SIZE), 5.0))
    pairs = pack({"d": sequences["d"] * 5 + 2})
    scaled = PairedLatents(pairs.latents_NJD, pairs.paired, LAYERS, statistics)
    ours = deviations(random_network(), scaled, keyed_noise(5, ["d"], scaled))
    torch.testing.assert_close(ours.score_M, score(sequences).score_M, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close_and_results_are_float32() -> None:
    exact, rough = score(random_sequences()), score(random_sequences(), autocast_dtype=torch.bfloat16)
    assert rough.score_M.dtype == torch.float32
    assert not torch.equal(exact.score_M, rough.score_M)
    torch.testing.assert_close(exact.score_M, rough.score_M, rtol=0.03, atol=0.03)


def test_no_valid_token() -> None:
    result = score({"b": random_sequences()["b"]})
    assert result.score_M.shape == (0,)
    assert result.errors_MJK.shape == (0, 3, 1)


def test_refusals() -> None:
    for timesteps in ((), (0.0,), (1.0,), (0.5, 1.2)):
        with pytest.raises(ConfigError, match="rewarding timesteps"):
            score_weights(timesteps)
    with pytest.raises(ValueError, match="response keys"):
        keyed_noise(0, ["a"], pack(random_sequences()))
