"""The flow that `fit-flow` starts from: a new one, one of ours that goes on (``--init-from``), or a published one.

What does not fit the latents, or contradicts the options, is refused here, before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlfr_cli import console
from rlfr_cli.artifacts.flow_file import FlowHeader, check_flow_fits
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.errors import ConfigError, InputError, MismatchError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.policy.loading import resolve_placement
from rlfr_cli.stages.flows import load_flow, new_flow, new_header
from rlfr_cli.stages.importing import import_published
from rlfr_cli.stages.latent_sequences import LatentSource

PUBLISHED_SUFFIXES = (".bin", ".pt", ".pth")

# Options of a network, and where a flow's header has them.
NETWORK_FACTS = {
    "context": "pairings",
    "shift": "pairings",
    "context_layer": "context_layer",
    "depth": "depth",
    "width": "width",
    "time_scale": "time_scale",
    "normalisation": "normalisation",
}


def initial_flow(config: FitFlowConfig, data: LatentSource) -> tuple[FlowHeader, Flow]:
    """Header and flow that a fit starts from: new, a flow of ours, or a published one.

    Raises:
        ConfigError: network options that contradict the flow of ``--init-from``, or a context layer that the model
            does not have.
        MismatchError: that flow is of another architecture or other layers than the latents.
    """
    device = resolve_placement(config.device, config.dtype).device
    fresh = new_header(
        config.network,
        model=data.info.model,
        layer_indices=data.info.layer_indices,
        rms_epsilon=data.rms_epsilon,
    )
    if config.init_from is None:
        return fresh, new_flow(fresh, config.seed, device)
    if config.init_from.suffix in PUBLISHED_SUFFIXES:
        header, flow = import_published(config.init_from, fresh, device)
        # Published flows were fitted on latents as they are; statistics put in afterwards would change what they see.
        _check_options_agree(config, fresh, replace(header, normalisation="none"))
        return header, flow
    header, flow = load_flow(config.init_from, device)
    _check_options_agree(config, fresh, header)
    for warning in check_flow_fits(header, model=data.info.model):
        console.warn(warning)
    if header.layer_indices != data.info.layer_indices:
        raise MismatchError(
            f"{config.init_from} was fitted on blocks {list(header.layer_indices)}, and the latents hold blocks "
            f"{list(data.info.layer_indices)}",
            hint="extract latents of the flow's blocks with --layer-index, or fit a new flow without --init-from",
        )
    return replace(header, model=data.info.model, heldout_loss=None, train_loss=None, policy_step=None), flow


def _check_options_agree(config: FitFlowConfig, fresh: FlowHeader, header: FlowHeader) -> None:
    """Refuse network options that contradict the flow that is continued; those left at their default say nothing."""
    for option, fact in NETWORK_FACTS.items():
        given = getattr(config.network, option) != getattr(NetworkConfig(), option)
        wanted, there = getattr(fresh, fact), getattr(header, fact)
        if given and wanted != there:
            raise ConfigError(
                f"{config.init_from} was fitted with {fact} {there}; --{option.replace('_', '-')} asks for {wanted}",
                hint="leave the option out, or fit a new flow without --init-from",
            )


def check_neighbours(header: FlowHeader, data: LatentSource, training: Sequence[int]) -> None:
    """Refuse latents in which no response token has the neighbour that conditions it.

    Raises:
        MismatchError: fewer prompt tokens are kept than the shift reaches back.
        InputError: every response of the training sequences is too short.
    """
    shift = max(pairing["shift"] for pairing in header.pairings)
    if shift > data.info.num_prompt_tokens:
        raise MismatchError(
            f"a shift of {shift} needs as many prompt tokens, and the latents keep {data.info.num_prompt_tokens}",
            hint=f"extract latents with --max-shift {shift}, or fit with a smaller --shift",
        )
    behind = max(pairing["shift"] * (pairing["context"] == Context.NEXT) for pairing in header.pairings)
    longest = max(map(data.response_tokens, training))
    if longest <= behind:
        raise InputError(
            f"no token has its neighbour: the longest of {len(training)} responses has {longest} tokens of which "
            f"{behind} have none behind them",
            hint="take more tokens of a response with --max-sequence-tokens, or fit with a smaller --shift",
        )
