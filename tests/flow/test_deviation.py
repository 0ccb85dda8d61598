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
    pairs = pack(sequences, pairings)
    return deviations(random_network(), pairs, keyed_noise(5, list(sequences), pairs), **options)


def by_response(sequences: dict[str, Tensor], result: DeviationResult) -> dict[str, Tensor]:
    lengths = [len(latents) - 1 for latents in sequences.values()]
    scores_K = pack(sequences).paired.over_responses(result.score_M, torch.nan)
    return dict(zip(sequences, scores_K.split(lengths), strict=True))


def test_a_new_network_by_hand() -> None:
    """With v = 0 the error is the mean of (latent - noise)^2 at any t, times t / (1 - t) in the score."""
    network = VelocityNetwork(VelocitySizes(latent_size=2, condition_size=2, width=4, depth=1))
    latents = torch.tensor([[9.0, 9.0], [2.0, 1.0], [9.0, 9.0]])[:, None]
    pairs = PairedLatents(latents, pair_tokens(torch.tensor([0, 3]), 1, [NEXT]), TappedLayers((1,), 2))
    noise = torch.tensor([[1.0, 4.0], [0.0, 0.0]])
    result = deviations(network, pairs, lambda *_: noise, timesteps=(0.5, 0.8))
    assert result.deviation_M.tolist() == [5.0]
    torch.testing.assert_close(result.score_M, torch.tensor([5 * (1 + 4) / 2]))


def test_each_timestep_has_its_own_weight() -> None:
    torch.testing.assert_close(score_weights([0.5, 0.8, 0.9]), torch.tensor([1.0, 4.0, 9.0]))
    both = score(random_sequences(), timesteps=(0.5, 0.9))
    half, late = (score(random_sequences(), timesteps=(t,)) for t in (0.5, 0.9))
    torch.testing.assert_close(both.score_M, (half.score_M + late.score_M) / 2)
    torch.testing.assert_close(both.deviation_M, (half.deviation_M + late.deviation_M) / 2)
    reverse = score(random_sequences(), timesteps=(0.9, 0.5))
    torch.testing.assert_close(both.score_M, reverse.score_M)
    torch.testing.assert_close(late.score_M, 9 * late.deviation_M)


def test_scoring_twice_gives_the_same_bits() -> None:
    first, second = score(random_sequences(), num_draws=2), score(random_sequences(), num_draws=2)
    assert torch.equal(first.errors_MJK, second.errors_MJK)
    assert torch.equal(first.score_M, second.score_M)


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize("order", ["abcd", "dcba", "bd", "d"])
def test_batch_order_and_chunks_change_nothing(order: str, tokens_per_chunk: int) -> None:
    everything = random_sequences()
    wanted = by_response(everything, score(everything))
    some = {key: everything[key] for key in order}
    ours = by_response(some, score(some, tokens_per_chunk=tokens_per_chunk))
    for key in order:
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_noise_belongs_to_the_response() -> None:
    """The same latents under another key score differently, so noise is not shared between responses."""
    sequences = random_sequences()
    renamed = {"x": sequences["a"]}
    gap = score(renamed).score_M - score({"a": sequences["a"]}).score_M
    assert gap.abs().min() > 1e-3


def test_packed_equals_padded() -> None:
    """Another implementation: pad, run the network on everything, keep valid tokens."""
    sequences = {key: latents for key, latents in random_sequences().items() if len(latents) > 1}
    pairs, network = pack(sequences), random_network()
    noise_of = keyed_noise(5, list(sequences), pairs)
    longest = max(len(latents) for latents in sequences.values())
    latents_BSJD = torch.zeros(len(sequences), longest, 3, SIZE)
    valid_BS = torch.zeros(len(sequences), longest, dtype=torch.bool)
    scores = []
    for row, latents in enumerate(sequences.values()):
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
    one, two = (deviations(network, pairs, lambda s, j, _, draw=draw: noise(s, j, draw)).score_M for draw in (0, 1))
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
