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
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.errors import WorkError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import accumulate_matching_gradients, choose_times, sample_times
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
        ranks: processes that hold the same flow, each with responses of its own or none; gradients are summed.

    Returns:
        ``flow/loss`` (mean over the steps), ``flow/gradient_norm`` and ``flow/steps``: 0 steps where no valid
        token was accepted, and then no loss.
    """
    chosen = [index for index in sorted(latents) if bool(weights[index].any())]
    pairs, weights_M = None, torch.zeros(0, device=flow.device)
    if chosen:
        pairs = flow.pair([latents[index] for index in chosen])
        weights_M = torch.cat([weights[index] for index in chosen]).to(flow.device)[pairs.paired.valid_K]
    total_weight = float(ranks.sum(weights_M.double().sum().cpu()))
    if total_weight == 0:
        return {"flow/steps": 0}
    rank_key = () if ranks.alone else ("rank", ranks.rank)
    draw_times = sample_times
    if config.online_timesteps is OnlineTimes.REWARDING:
        draw_times = partial(choose_times, timesteps)
    losses, norms, steps = [], [], 0
    for step in range(config.online_steps):
        error_sum = 0.0
        if pairs is not None:
            result = accumulate_matching_gradients(
                flow.network,
                pairs,
                keyed_generator(flow.device, *key, "online", step, *rank_key),
                weights_M=weights_M,
                total_weight=None if ranks.alone else total_weight,
                noise_repeats=config.online_noise_repeats,
                draw_times=draw_times,
                autocast_dtype=autocast_dtype,
            )
            error_sum = float(result.loss) if ranks.alone else float(result.error_sum) / total_weight
        loss = float(ranks.sum(torch.tensor(error_sum, dtype=torch.float64)))
        if not ranks.alone:
            _sum_gradients(flow, ranks)
        outcome = optimiser.step(config.online_learning_rate, loss_is_finite=loss == loss)
        losses.append(loss)
        norms.append(outcome.gradient_norm)
        steps += outcome.stepped
    return {
        "flow/loss": sum(losses) / len(losses),
        "flow/gradient_norm": sum(norms) / len(norms),
        "flow/steps": steps,
    }


def _sum_gradients(flow: Flow, ranks: Ranks) -> None:
    """Give each rank the sum of all ranks' gradients; one without responses has none of its own."""
    parameters = list(flow.network.parameters())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    for parameter, total in zip(parameters, ranks.sum(flat).split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).clone()


def check_same_flow(flow: Flow, ranks: Ranks) -> None:
    """Check that every rank holds the same flow.

    Raises:
        WorkError: they differ.
    """
    if ranks.alone:
        return
    digest = [float(parameter.detach().double().sum()) for parameter in flow.network.parameters()]
    if any(other != digest for other in ranks.all_gather(digest)):
        raise WorkError("the flows of the training processes differ after their online update", hint="report it")
