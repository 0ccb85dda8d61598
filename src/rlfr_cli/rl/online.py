"""The online update: the flow learns from the policy's accepted responses of a batch that it has already scored.

Reads the latents that the scoring pass kept, changes the flow's weights and nothing else: latents are detached, so no
gradient reaches the policy. Weights come from the reference rules (``flow/reference.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from rlfr_cli.config.rl import OnlineConfig, OnlineTimes
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.flow_ranks import accumulate_over_ranks
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import choose_times, sample_times
from rlfr_cli.flow.noise import Key, keyed_generator


def update_flow(
    flow: Flow,
    optimiser: NamedAdamW,
    latents: Mapping[int, torch.Tensor],
    weights: Mapping[int, torch.Tensor],
    config: OnlineConfig,
    timesteps: Sequence[float],
    key: tuple[Key, ...],
    autocast_dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """AdamW steps of the flow on accepted responses, each with fresh noise.

    Args:
        latents: [prompt tokens kept + T, J, D] by response.
        weights: [T] by response, of the reference rules.
        timesteps: the rewarding ones, for ``--online-timesteps rewarding``.
        key: names the noise, seed and step included.
        ranks: processes that hold the same flow, each with responses of its own or none, which follow those of the
            ranks before it; noise, times and steps are those of one process that has them all.

    Returns:
        ``flow/loss`` (mean over the steps), ``flow/gradient_norm`` and ``flow/steps``: 0 steps where no valid
        token was accepted, and then no loss.
    """
    chosen = [index for index in sorted(latents) if bool(weights[index].any())]
    pairs, weights_M = None, torch.zeros(0, device=flow.device)
    if chosen:
        pairs = flow.pair([latents[index] for index in chosen])
        weights_M = torch.cat([weights[index] for index in chosen]).to(flow.device)[pairs.paired.valid_K]
    if float(ranks.sum(weights_M.double().sum().cpu())) == 0:
        return {"flow/steps": 0}
    draw_times = sample_times
    if config.online_timesteps is OnlineTimes.REWARDING:
        draw_times = partial(choose_times, timesteps)
    losses, norms, steps = [], [], 0
    for step in range(config.online_steps):
        result = accumulate_over_ranks(
            flow.network,
            pairs,
            keyed_generator(flow.device, *key, "online", step),
            ranks,
            weights_M=weights_M,
            noise_repeats=config.online_noise_repeats,
            draw_times=draw_times,
            autocast_dtype=autocast_dtype,
        )
        loss = float(result.loss)
        outcome = optimiser.step(config.online_learning_rate, loss_is_finite=loss == loss)
        losses.append(loss)
        norms.append(outcome.gradient_norm)
        steps += outcome.stepped
    return {
        "flow/loss": sum(losses) / len(losses),
        "flow/gradient_norm": sum(norms) / len(norms),
        "flow/steps": steps,
    }
