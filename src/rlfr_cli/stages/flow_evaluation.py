"""Judge a flow: velocity error by timestep and layer, beside zero velocity and the per-channel Gaussian.

Raw velocity error falls with t for any predictor of latents with large variance, so it says nothing alone; what counts
is the share of the Gaussian's error that the flow removes (``flow/baselines.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.flow.baselines import VelocityErrors
from rlfr_cli.flow.deviation import NoiseSource, chunk_noise, keyed_noise, layer_errors
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import DEFAULT_TOKENS_PER_CHUNK, autocast, chunks
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import PairedLatents
from rlfr_cli.stages.latent_sequences import LatentSource

TIMESTEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SEQUENCES_AT_ONCE = 16
MAX_SEQUENCES = 256


@torch.no_grad()
def evaluate_velocity(
    flow: Flow,
    gaussian: LatentStatistics,
    data: LatentSource,
    sequences: Sequence[int],
    seed: int,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Errors by layer and timestep.

    Args:
        gaussian: statistics of the fit's training tokens, in the latents' own units.
        data: with the flow's tapped states as columns.
        sequences: which sequences to judge on; at most ``MAX_SEQUENCES`` are taken.
        ranks: processes that share the sequences out, with the same flow.

    Returns:
        Rows ``layer``, ``timestep``, ``flow``, ``gaussian``, ``zero`` (errors) and ``share_of_gaussian_removed``.
    """
    units = gaussian
    if flow.statistics is not None:
        units = LatentStatistics.identity(*gaussian.mean_JD.shape).to(flow.device)
    errors = VelocityErrors(units, len(flow.layers.indices), TIMESTEPS)
    chosen = ranks.share(sequences[:MAX_SEQUENCES])
    for start in range(0, len(chosen), SEQUENCES_AT_ONCE):
        part = chosen[start : start + SEQUENCES_AT_ONCE]
        pairs = flow.pair([latents.to(flow.device) for latents in data.read_many(part)], data.info.num_prompt_tokens)
        add_velocity_errors(errors, flow, pairs, keyed_noise(seed, [f"judged {index}" for index in part], pairs), dtype)
    for sums_JK in (errors.counts_JK, errors.flow_sum_JK, errors.zero_sum_JK, errors.gaussian_sum_JK):
        sums_JK.copy_(ranks.sum(sums_JK))
    return velocity_rows(flow, errors)


@torch.no_grad()
def add_velocity_errors(
    errors: VelocityErrors, flow: Flow, pairs: PairedLatents, noise: NoiseSource, dtype: torch.dtype
) -> None:
    """Add the errors of all valid tokens of a batch, of the flow and of the baselines, on one noise draw."""
    times_K = torch.tensor(errors.timesteps, device=flow.device)
    for rows in chunks(pairs.paired.num_valid, DEFAULT_TOKENS_PER_CHUNK):
        for column, (layer, position) in enumerate(zip(flow.layers.indices, flow.layers.positions, strict=True)):
            targets = pairs.targets(column, rows)
            drawn = chunk_noise(noise, pairs.paired, rows, layer, 0)
            conditions = [pairs.conditions(column, pairing, rows) for pairing in range(len(flow.pairings))]
            with autocast(flow.device, dtype):
                errors_nK = layer_errors(flow.network, targets, conditions, [drawn], times_K, position)
            for k in range(len(errors.timesteps)):
                errors.update(column, k, targets, drawn, errors_nK[:, k])


def velocity_rows(flow: Flow, errors: VelocityErrors) -> list[dict[str, Any]]:
    """One row a layer and timestep, as ``evaluate_velocity`` gives them."""
    return [
        {
            "layer": layer,
            "timestep": timestep,
            "flow": float(errors.flow_JK[column, k]),
            "gaussian": float(errors.gaussian_JK[column, k]),
            "zero": float(errors.zero_JK[column, k]),
            "share_of_gaussian_removed": float(errors.share_removed_JK[column, k]),
        }
        for column, layer in enumerate(flow.layers.indices)
        for k, timestep in enumerate(errors.timesteps)
    ]


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the flow beats the Gaussian, in words that claim no more than that."""
    worse = [row for row in rows if row["share_of_gaussian_removed"] <= 0]
    shares = [row["share_of_gaussian_removed"] for row in rows]
    won = len(rows) - len(worse)
    if not worse:
        text = (
            f"the flow beats the per-channel Gaussian at every layer and timestep: it removes {min(shares):.0%} to "
            f"{max(shares):.0%} of its velocity error"
        )
    elif won == 0:
        text = (
            "this flow does NOT beat a per-channel Gaussian at any layer and timestep: it has learnt less than the "
            "mean and variance of each channel, so its scores are mostly scale; fit longer or on more latents"
        )
    else:
        text = (
            f"this flow beats the per-channel Gaussian at {won} of {len(rows)} layers and timesteps (by up to "
            f"{max(shares):.0%} of its velocity error), and does NOT at {_places(worse)}: do not reward there, or fit "
            "longer or on more latents"
        )
    return {"beats_gaussian": not worse, "text": text}


def _places(rows: Sequence[dict[str, Any]]) -> str:
    """``t = 0.95 (blocks 2, 4), t = 0.1 (block 2)``."""
    layers: dict[float, list[int]] = {}
    for row in rows:
        layers.setdefault(row["timestep"], []).append(row["layer"])
    return ", ".join(
        f"t = {timestep} (block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))})"
        for timestep, blocks in layers.items()
    )
