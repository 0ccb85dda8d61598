"""`--draw-agreement`: measure on a few responses how many noise draws a score needs, and say so.

Done before any output is opened, so that the number is part of the config that an artifact remembers; every part of the
work measures on the same first responses and comes to the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlfr_cli import console
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.flow.draws import DrawChoice, choose_num_draws
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.noise import keyed_seed
from rlfr_cli.policy.batching import token_budget_batches
from rlfr_cli.policy.forward import TokenSequence, decoder_latents
from rlfr_cli.policy.loading import Placement, load_decoder
from rlfr_cli.policy.tapping import tap
from rlfr_cli.stages.common import ModelInput
from rlfr_cli.stages.responses import Responses

RESPONSES_TO_CHOOSE_ON = 32


def with_chosen_draws(
    reward: FlowRewardConfig,
    flow: Flow,
    latents: Sequence[torch.Tensor],
    names: Sequence[tuple[str, int]],
    *,
    num_prompt: int,
    seed: int,
    placement: Placement,
) -> tuple[FlowRewardConfig, DrawChoice]:
    """The same options with the number of draws that agrees as ``--draw-agreement`` wants, and what was measured.

    Args:
        latents: [prompt tokens kept + T, J, D] of some responses.
        names: (problem_id, sample_index) of these.
    """
    choice = choose_num_draws(
        flow,
        flow.pair(list(latents), num_prompt),
        [response_key(*name) for name in names],
        seed=keyed_seed(seed, "choosing draws"),
        timesteps=reward.timestep,
        wanted=reward.draw_agreement,
        num_draws=reward.num_draws,
        max_draws=reward.max_draws,
        antithetic=reward.antithetic,
        autocast_dtype=placement.dtype,
    )
    text = f"{choice.num_draws} noise draws: two such scores agree at {choice.agreement:.3f}"
    if choice.reached:
        console.log(text)
    else:
        console.warn(f"{text}, below --draw-agreement {reward.draw_agreement}; --max-draws is {reward.max_draws}")
    return replace(reward, num_draws=choice.num_draws), choice


def chosen_on_rollouts(
    reward: FlowRewardConfig, flow: Flow, model: ModelInput, responses: Responses, seed: int, tokens_per_batch: int
) -> FlowRewardConfig:
    """The options with the draws chosen on the first responses of some rollouts."""
    unit = responses.units[0][:RESPONSES_TO_CHOOSE_ON]
    sequences: list[TokenSequence] = responses.sequences(unit)
    decoder = load_decoder(model.folder, model.placement, flow.tapped)
    latents: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    with tap(decoder, flow.tapped) as taps:
        for batch in token_budget_batches([len(s) for s in sequences], tokens_per_batch):
            chosen = [sequences[index] for index in batch]
            kept = decoder_latents(decoder, taps, chosen, flow.num_prompt, model.placement.device)
            for index, sequence_latents in zip(batch, kept, strict=True):
                latents[index] = sequence_latents
    names = responses.names(unit)
    return with_chosen_draws(
        reward, flow, latents, names, num_prompt=flow.num_prompt, seed=seed, placement=model.placement
    )[0]
