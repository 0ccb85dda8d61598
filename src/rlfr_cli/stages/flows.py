"""Between a flow on disk and a flow in memory: the header and tensors of a flow file, and ``Flow``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.flow_file import STATISTICS, FlowHeader, read_flow, save_flow
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.errors import ArtifactError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.noise import keyed_seed
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes
from rlfr_cli.states import parse_state, state_of_model


def new_header(
    config: NetworkConfig,
    *,
    model: ModelFingerprint,
    layer_indices: tuple[int, ...],
    rms_epsilon: float,
) -> FlowHeader:
    """The header of a flow that is about to be fitted.

    Raises:
        ConfigError: ``--context-layer`` names a block that the model does not have.
    """
    context = config.context_layer
    return FlowHeader(
        latent_size=model.hidden_size,
        condition_size=model.hidden_size,
        width=config.width or model.hidden_size,
        depth=config.depth,
        num_frequencies=256,
        rms_epsilon=rms_epsilon,
        time_scale=config.time_scale,
        layer_indices=layer_indices,
        num_blocks=model.num_blocks,
        pairings=tuple(
            {"context": str(context), "shift": 1 if context is Context.SELF else config.shift}
            for context in config.context
        ),
        context_layer=None if context is None else str(state_of_model(context, model.num_blocks)),
        normalisation="channel" if config.normalisation is Normalisation.CHANNEL else "none",
        model=model,
    )


def new_flow(header: FlowHeader, seed: int, device: torch.device) -> Flow:
    """A flow with fresh weights; those depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "flow weights"))
        network = VelocityNetwork(sizes_of(header))
    return _assemble(header, network.to(device), None)


def load_flow(path: Path, device: torch.device) -> tuple[FlowHeader, Flow]:
    """A flow file as it was fitted.

    Raises:
        ArtifactError: the file is cut, altered, or its tensors do not fit its header.
    """
    header, tensors = read_flow(path)
    statistics = None
    if header.normalisation == "channel":
        statistics = LatentStatistics(*(tensors.pop(name) for name in STATISTICS)).to(device)
    network = VelocityNetwork(sizes_of(header))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: its tensors do not fit its header: {str(error).splitlines()[-1].strip()}",
            hint="fit the flow again",
        ) from error
    return header, _assemble(header, network.to(device), statistics)


def write_flow(path: Path, header: FlowHeader, flow: Flow) -> None:
    """Write a flow with its statistics, whole or not at all."""
    tensors = dict(flow.network.state_dict())
    if flow.statistics is not None:
        tensors |= dict(zip(STATISTICS, (flow.statistics.mean_JD, flow.statistics.std_JD), strict=True))
    save_flow(path, header, tensors)


def sizes_of(header: FlowHeader) -> VelocitySizes:
    """Sizes of the velocity network that a header speaks of."""
    return VelocitySizes(
        latent_size=header.latent_size,
        condition_size=header.condition_size,
        width=header.width,
        depth=header.depth,
        num_frequencies=header.num_frequencies,
        rms_epsilon=header.rms_epsilon,
        time_scale=header.time_scale,
    )


def with_policy_step(header: FlowHeader, model: ModelFingerprint, step: int, steps: int) -> FlowHeader:
    """The header of a checkpoint's flow: its policy, the policy's step, and optimiser steps of the flow."""
    return replace(header, model=model, policy_step=step, steps=steps)


def _assemble(header: FlowHeader, network: VelocityNetwork, statistics: LatentStatistics | None) -> Flow:
    context = None if header.context_layer is None else parse_state(header.context_layer)
    return Flow(
        network=network,
        layers=TappedLayers(header.layer_indices, header.num_blocks, context),
        pairings=tuple(Pairing(Context(p["context"]), p["shift"]) for p in header.pairings),
        statistics=statistics,
    )
