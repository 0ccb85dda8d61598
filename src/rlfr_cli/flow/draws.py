"""How many noise draws a score needs: as many as it takes for two scores of different draws to agree.

Agreement is the mean over responses of the rank correlation (Spearman) of two scores of a response's valid tokens, each
the mean over as many draws of its own. Ranks are what shaping goes by. Draws are doubled until it is reached.

Shapes: M valid tokens, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_cli.flow.deviation import keyed_noise
from rlfr_cli.flow.diagnostics import draw_scores
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.pairing import PairedLatents


@dataclass(frozen=True)
class DrawChoice:
    """A number of draws and the agreement measured with it; ``reached`` says whether it is the wanted one."""

    num_draws: int
    agreement: float
    reached: bool


def choose_num_draws(
    flow: Flow,
    pairs: PairedLatents,
    response_keys: Sequence[str],
    *,
    seed: int,
    timesteps: Sequence[float],
    wanted: float,
    num_draws: int,
    max_draws: int,
    antithetic: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> DrawChoice:
    """The first of ``num_draws``, twice, four times … it that agrees as ``wanted``, or the last within ``max_draws``.

    Args:
        pairs: of some responses, a few dozen are enough.
        response_keys: as for :meth:`Flow.deviations`; the draws are further ones of the same generators.
    """
    noise = keyed_noise(seed, response_keys, pairs, antithetic=antithetic)
    while True:
        scores_MS = draw_scores(
            flow, pairs, noise, timesteps=timesteps, num_draws=2 * num_draws, autocast_dtype=autocast_dtype
        )
        first_M, second_M = scores_MS[:, :num_draws].mean(dim=1), scores_MS[:, num_draws:].mean(dim=1)
        agreement = mean_rank_correlation(first_M, second_M, pairs.paired.valid_per_response_R.tolist())
        # Without a response to measure on, the agreement is NaN, and more draws would not change that.
        if not agreement < wanted or 2 * num_draws > max_draws:
            return DrawChoice(num_draws, agreement, agreement >= wanted)
        num_draws *= 2


def mean_rank_correlation(first_M: Tensor, second_M: Tensor, tokens_per_response: Sequence[int]) -> float:
    """Mean over responses with three valid tokens or more; NaN without one. Equal values rank in token order."""
    correlations = []
    for a, b in zip(first_M.split(list(tokens_per_response)), second_M.split(list(tokens_per_response)), strict=True):
        if len(a) >= 3:
            ranks = torch.stack([a.argsort(stable=True).argsort(), b.argsort(stable=True).argsort()]).double()
            correlations.append(float(torch.corrcoef(ranks)[0, 1]))
    return sum(correlations) / len(correlations) if correlations else float("nan")
