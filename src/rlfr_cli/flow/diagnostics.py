"""What a score is held against: the same flow on latents or contexts that carry less, and its own noise draws.

If the score says something of how a token's latent follows its context, it must lose by having the context shuffled,
and it must say nothing on random latents of the same scale. If it is more than its noise, two draws must agree.

Shapes: M valid tokens, J layers, K timesteps, S draws, D latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlfr_cli.flow.deviation import NoiseSource, chunk_noise, draw_errors, score_weights
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import DEFAULT_TOKENS_PER_CHUNK, autocast, chunks, noised_latents
from rlfr_cli.flow.noise import Key, keyed_generator
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import PairedLatents

TOKENS_PER_CHUNK_OF_DRAWS = 512  # the noise of 32 draws of as many tokens is 235 MB at D = 3,584


def shuffle_conditions(pairs: PairedLatents, seed: int, response_keys: Sequence[Key]) -> PairedLatents:
    """The same targets, each with the conditions of a random valid token of its own response."""
    paired = pairs.paired
    orders, start = [], 0
    for key, count in zip(response_keys, paired.valid_per_response_R.tolist(), strict=True):
        generator = keyed_generator("cpu", seed, "shuffled context", key)
        orders.append(start + torch.randperm(count, generator=generator))
        start += count
    order_M = torch.cat(orders).to(paired.conditions_PM.device)
    return replace(pairs, paired=replace(paired, conditions_PM=paired.conditions_PM[:, order_M]))


def only_pairing(pairs: PairedLatents, pairing: int) -> PairedLatents:
    """The same valid tokens, conditioned by one of the pairings alone."""
    conditions_PM = pairs.paired.conditions_PM[pairing : pairing + 1]
    return replace(pairs, paired=replace(pairs.paired, conditions_PM=conditions_PM))


def random_latents(
    latents: Sequence[Tensor], statistics: LatentStatistics, seed: int, response_keys: Sequence[Key]
) -> list[Tensor]:
    """Normal numbers of each channel's mean and deviation in the place of every latent [tokens, J, D]."""
    drawn = []
    for key, latents_TJD in zip(response_keys, latents, strict=True):
        generator = keyed_generator(latents_TJD.device, seed, "random latents", key)
        normal_TJD = torch.randn(latents_TJD.shape, generator=generator, device=latents_TJD.device)
        drawn.append(statistics.mean_JD + statistics.std_JD * normal_TJD)
    return drawn


@torch.no_grad()
def draw_scores(
    flow: Flow,
    pairs: PairedLatents,
    noise: NoiseSource,
    *,
    timesteps: Sequence[float],
    num_draws: int,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Score [M, S] of every valid token by each noise draw alone; ``Flow.deviations`` gives the mean over draws."""
    weights_K = score_weights(timesteps).to(pairs.device)
    times_K = torch.tensor(timesteps, dtype=torch.float32, device=pairs.device)
    layers, num_pairings = flow.layers, pairs.paired.conditions_PM.shape[0]
    scores_MS = torch.zeros(pairs.paired.num_valid, num_draws, device=pairs.device)
    for rows in chunks(pairs.paired.num_valid, TOKENS_PER_CHUNK_OF_DRAWS):
        for column, (index, position) in enumerate(zip(layers.indices, layers.positions, strict=True)):
            conditions = [pairs.conditions(column, pairing, rows) for pairing in range(num_pairings)]
            draws = [chunk_noise(noise, pairs.paired, rows, index, draw) for draw in range(num_draws)]
            with autocast(pairs.device, autocast_dtype):
                errors_nSK = draw_errors(
                    flow.network, pairs.targets(column, rows), conditions, draws, times_K, position
                )
            scores_MS[rows] += (errors_nSK * weights_K).mean(dim=-1) / len(layers.indices)
    return scores_MS


@torch.no_grad()
def channel_errors(
    flow: Flow,
    pairs: PairedLatents,
    noise: NoiseSource,
    *,
    timesteps: Sequence[float],
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squared velocity error [J, D] by channel, summed over tokens, timesteps and pairings of one draw, float64."""
    sums_JD = torch.zeros(len(flow.layers.indices), pairs.latent_size, dtype=torch.float64)
    for rows in chunks(pairs.paired.num_valid, DEFAULT_TOKENS_PER_CHUNK):
        for column, (index, position) in enumerate(zip(flow.layers.indices, flow.layers.positions, strict=True)):
            targets = pairs.targets(column, rows)
            drawn = chunk_noise(noise, pairs.paired, rows, index, 0)
            at = torch.tensor([position], device=pairs.device)
            for pairing in range(pairs.paired.conditions_PM.shape[0]):
                conditions = pairs.conditions(column, pairing, rows)
                for timestep in timesteps:
                    time = torch.tensor([timestep], device=pairs.device)
                    with autocast(pairs.device, autocast_dtype):
                        velocity = flow.network(noised_latents(targets, drawn, time), time, conditions, at)
                    sums_JD[column] += (velocity.float() - (targets - drawn)).square().double().sum(dim=0).cpu()
    return sums_JD


def in_flow_units(statistics: LatentStatistics, flow: Flow) -> LatentStatistics:
    """Statistics of raw latents as the flow sees these: scaled by its own, where it has some."""
    own = flow.statistics
    if own is None:
        return statistics
    return LatentStatistics((statistics.mean_JD - own.mean_JD) / own.scale_JD, statistics.std_JD / own.scale_JD)


def num_top_channels(num_channels: int, fraction: float = 0.01) -> int:
    """How many channels the top share is: 1 at least, rounded up."""
    return max(1, math.ceil(fraction * num_channels))


def top_channel_share(values_D: Tensor, fraction: float = 0.01) -> float:
    """Share of the sum that lies in the largest channels; ``num_top_channels`` / D where all are equal."""
    top = values_D.double().topk(num_top_channels(values_D.numel(), fraction)).values.sum()
    return float(top / values_D.double().sum())
