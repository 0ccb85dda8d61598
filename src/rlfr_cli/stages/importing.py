"""Import a published ``flow_model.bin``: the only pickle that rlfr reads, by this option, with ``weights_only``."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import torch

from rlfr_cli.artifacts.flow_file import FlowHeader
from rlfr_cli.errors import ArtifactError, MismatchError, MissingInputError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.published import from_published
from rlfr_cli.stages.flows import new_flow


def import_published(path: Path, header: FlowHeader, device: torch.device) -> tuple[FlowHeader, Flow]:
    """Header and flow of a published file.

    Args:
        path: the state dict that the published fitting wrote.
        header: context, its shift and layer, layers and model, which the file does not hold; its sizes are replaced.

    Raises:
        MissingInputError: there is no such file.
        ArtifactError: it is no state dict.
        MismatchError: its sizes do not fit the model.
    """
    if not path.is_file():
        raise MissingInputError(f"--init-from {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ArtifactError(
            f"{path} is not a state dict that can be read safely: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArtifactError(f"{path} does not hold a dict of tensors")
    sizes, weights = from_published(state, rms_epsilon=header.rms_epsilon)
    if sizes.latent_size != header.latent_size:
        raise MismatchError(
            f"{path} was fitted on latents of size {sizes.latent_size}; this model's have {header.latent_size}",
            hint="extract latents with the model that it was fitted on",
        )
    if sizes.condition_size != header.condition_size:
        raise MismatchError(
            f"{path} takes conditions of size {sizes.condition_size}; this model's latents have "
            f"{header.condition_size}",
            hint="extract latents with the model that it was fitted on",
        )
    header = replace(
        header,
        condition_size=sizes.condition_size,
        width=sizes.width,
        depth=sizes.depth,
        num_frequencies=sizes.num_frequencies,
        time_scale=1.0,
    )
    flow = new_flow(header, 0, device)
    flow.network.load_state_dict({name: value.float() for name, value in weights.items()})
    return header, flow
