"""How far each response token's latent deviates from the flow: the deviation and the score.

At each rewarding timestep t: err_t = mean over D of (v(x_t, t, c, l / L) - u)^2, with x_t and u as in
``matching.py``. Deviation = mean over timesteps of err_t; score = mean over timesteps of t / (1 - t) *
err_t; then both are averaged over draws, pairings and layers.

Noise comes from a generator keyed by (seed, response, layer, draw) and is shared by timesteps and pairings,
so padding, batch, order and chunks never change which noise a token meets. Draws share conditions and
modulations.

Shapes: M valid tokens, J layers, K timesteps, S draws, P pairings, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.matching import (
    DEFAULT_TOKENS_PER_CHUNK,
    autocast,
    chunks,
    noised_latents,
    squared_errors,
)
from rlfr_cli.flow.noise import Key, response_noise
from rlfr_cli.flow.pairing import PairedLatents, PairedTokens
from rlfr_cli.flow.velocity import VelocityNetwork

# (sequence, layer index, draw) to noise [response tokens, D]
NoiseSource = Callable[[int, int, int], Tensor]


@dataclass(frozen=True)
class DeviationResult:
    """Float32, of valid tokens; ``PairedTokens.over_responses`` puts them among all response tokens."""

    deviation_M: Tensor
    score_M: Tensor
    errors_MJK: Tensor  # per layer and timestep, mean over draws and pairings


def score_weights(timesteps: Sequence[float]) -> Tensor:
    """t / (1 - t) for each timestep, which must lie in (0, 1)."""
    if not timesteps or not all(0 < t < 1 for t in timesteps):
        raise ConfigError(f"rewarding timesteps {list(timesteps)} were given; each must lie between 0 and 1")
    times = torch.tensor(timesteps, dtype=torch.float64)
    return (times / (1 - times)).float()


def keyed_noise(
    seed: int, response_keys: Sequence[Key], pairs: PairedLatents, *, antithetic: bool = False
) -> NoiseSource:
    """Noise of a response's own generator; ``antithetic``: each odd draw is the one before it, negated."""
    response_lengths = pairs.paired.response_offsets.diff().tolist()
    if len(response_keys) != len(response_lengths):
        raise ValueError(f"{len(response_keys)} response keys were given for {len(response_lengths)} responses")

    def noise(sequence: int, layer_index: int, draw: int) -> Tensor:
        drawn = response_noise(
            seed,
            response_keys[sequence],
            layer_index,
            draw // 2 if antithetic else draw,
            num_tokens=response_lengths[sequence],
            size=pairs.latent_size,
            device=pairs.device,
        )
        return -drawn if antithetic and draw % 2 else drawn

    return noise


def chunk_noise(noise: NoiseSource, paired: PairedTokens, rows: slice, layer_index: int, draw: int) -> Tensor:
    """The noise rows [n, D] of some valid tokens, whichever responses they belong to."""
    sequences, counts = paired.sequence_M[rows].unique_consecutive(return_counts=True)
    positions = paired.position_M[rows].split(counts.tolist())
    pieces = []
    for sequence, position in zip(sequences.tolist(), positions, strict=True):
        response = noise(sequence, layer_index, draw)
        pieces.append(response[position.to(response.device)])
    return torch.cat(pieces)


def layer_errors(
    network: VelocityNetwork,
    targets_nD: Tensor,
    conditions_PnC: Sequence[Tensor],
    noise_SnD: Sequence[Tensor],
    times_K: Tensor,
    layer_position: float,
) -> Tensor:
    """Errors [n, K] of one layer, mean over pairings and draws."""
    return draw_errors(network, targets_nD, conditions_PnC, noise_SnD, times_K, layer_position).mean(dim=1)


def draw_errors(
    network: VelocityNetwork,
    targets_nD: Tensor,
    conditions_PnC: Sequence[Tensor],
    noise_SnD: Sequence[Tensor],
    times_K: Tensor,
    layer_position: float,
) -> Tensor:
    """Errors [n, S, K] of one layer and each noise draw, mean over pairings."""
    layer = network.embed_layers(torch.tensor([layer_position], device=targets_nD.device))
    fixed_KW = network.embed_times(times_K) + layer
    errors_nSK = targets_nD.new_zeros(targets_nD.shape[0], len(noise_SnD), times_K.numel())
    for conditions in conditions_PnC:
        condition_nW = network.embed_condition(conditions)
        for k in range(times_K.numel()):
            modulation = network.modulate(condition_nW + fixed_KW[k])
            for draw, noise in enumerate(noise_SnD):
                velocity = network.velocity(noised_latents(targets_nD, noise, times_K[k : k + 1]), modulation)
                errors_nSK[:, draw, k] += squared_errors(velocity, targets_nD, noise)
    return errors_nSK / len(conditions_PnC)


@torch.no_grad()
def deviations(
    network: VelocityNetwork,
    pairs: PairedLatents,
    noise: NoiseSource,
    *,
    timesteps: Sequence[float] = (0.8,),
    num_draws: int = 1,
    tokens_per_chunk: int = DEFAULT_TOKENS_PER_CHUNK,
    autocast_dtype: torch.dtype | None = None,
) -> DeviationResult:
    """Deviation and score of every valid token.

    Args:
        noise: usually ``keyed_noise(seed, response_keys, pairs)``.
        timesteps: rewarding timesteps, each in (0, 1) and with its own weight in the score.
        num_draws: noise draws to average; with antithetic noise an even number, or a pair is cut.
        tokens_per_chunk: bounds memory, about tokens_per_chunk * width * (3 * depth + num_draws) numbers.
        autocast_dtype: what the network computes in; errors are taken and summed in float32.
    """
    weights_K = score_weights(timesteps).to(pairs.device)
    times_K = torch.tensor(timesteps, dtype=torch.float32, device=pairs.device)
    layers, paired = pairs.layers, pairs.paired
    errors_MJK = torch.zeros(paired.num_valid, len(layers.indices), len(timesteps), device=pairs.device)
    for rows in chunks(paired.num_valid, tokens_per_chunk):
        for column, (index, position) in enumerate(zip(layers.indices, layers.positions, strict=True)):
            conditions = [pairs.conditions(column, p, rows) for p in range(paired.conditions_PM.shape[0])]
            draws = [chunk_noise(noise, paired, rows, index, draw) for draw in range(num_draws)]
            with autocast(pairs.device, autocast_dtype):
                errors_MJK[rows, column] = layer_errors(
                    network, pairs.targets(column, rows), conditions, draws, times_K, position
                )
    return DeviationResult(
        deviation_M=errors_MJK.mean(dim=(1, 2)),
        score_M=(errors_MJK * weights_K).mean(dim=(1, 2)),
        errors_MJK=errors_MJK,
    )
