"""A published ``flow_model.bin``'s state dict to ours, and back. Dicts of tensors in, dicts of tensors out.

Theirs has our names after the prefix ``model.`` and, beside them, the two buffers of frequencies, which we
derive. The file holds neither context, shift, layers, model nor the RMS epsilon: the caller has to know
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rlfr_cli.errors import MismatchError
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes, sinusoid_frequencies

PREFIX = "model."
FREQUENCY_KEYS = (f"{PREFIX}time_embed.freqs", f"{PREFIX}layer_embed.freqs")
# Frequencies lie in (0, 1]; a file saved from a bfloat16 module holds them rounded.
FREQUENCY_TOLERANCE = 0.005


def published_sizes(state: Mapping[str, Tensor], *, rms_epsilon: float, time_scale: float = 1.0) -> VelocitySizes:
    """Sizes read off the shapes of a published state dict.

    Raises:
        MismatchError: a tensor that fixes a size is missing.
    """

    def shape(name: str) -> torch.Size:
        if PREFIX + name not in state:
            raise MismatchError(
                f"the published flow has no tensor {PREFIX + name}; it has {len(state)} others",
                hint="give the flow_model.bin that the published fitting writes, not a language model",
            )
        return state[PREFIX + name].shape

    width, latent_size = shape("input_proj.weight")
    pattern = re.compile(re.escape(PREFIX) + r"res_blocks\.(\d+)\.")
    blocks = {int(match[1]) for match in map(pattern.match, state) if match}
    return VelocitySizes(
        latent_size=latent_size,
        condition_size=shape("cond_embed.weight")[1],
        width=width,
        depth=len(blocks),
        num_frequencies=shape("time_embed.mlp.0.weight")[1],
        rms_epsilon=rms_epsilon,
        time_scale=time_scale,
    )


def from_published(
    state: Mapping[str, Tensor], *, rms_epsilon: float, time_scale: float = 1.0
) -> tuple[VelocitySizes, dict[str, Tensor]]:
    """Sizes and our state dict of a published one.

    Raises:
        MismatchError: tensors missing, left over or of a shape that does not fit; other frequencies.
    """
    sizes = published_sizes(state, rms_epsilon=rms_epsilon, time_scale=time_scale)
    for key in FREQUENCY_KEYS:
        _check_frequencies(key, state, sizes)
    ours = {key.removeprefix(PREFIX): value for key, value in state.items() if key not in FREQUENCY_KEYS}
    with torch.device("meta"):
        expected = {key: value.shape for key, value in VelocityNetwork(sizes).state_dict().items()}
    missing, extra = sorted(expected.keys() - ours.keys()), sorted(ours.keys() - expected.keys())
    if missing or extra:
        raise MismatchError(
            f"the published flow does not fit {sizes}: missing {missing}, left over {extra}",
            hint="check that the file is whole and was saved by the published fitting",
        )
    for key, wanted in expected.items():
        if ours[key].shape != wanted:
            raise MismatchError(
                f"{PREFIX + key} has shape {list(ours[key].shape)}, but the published flow's other tensors "
                f"ask for {list(wanted)}",
                hint="check that the file is whole and was saved by the published fitting",
            )
    return sizes, ours


def to_published(state: Mapping[str, Tensor], sizes: VelocitySizes) -> dict[str, Tensor]:
    """The state dict that the published code loads.

    Raises:
        MismatchError: the network scales its time, which the published one cannot express.
    """
    if sizes.time_scale != 1:
        raise MismatchError(
            f"a flow with time scale {sizes.time_scale} was given; the published network has none but 1",
            hint="fit with time scale 1 to use a flow with the published code",
        )
    published = {PREFIX + key: value for key, value in state.items()}
    frequencies = sinusoid_frequencies(sizes.num_frequencies)[None]
    return published | {key: frequencies.clone() for key in FREQUENCY_KEYS}


def _check_frequencies(key: str, state: Mapping[str, Tensor], sizes: VelocitySizes) -> None:
    wanted = sinusoid_frequencies(sizes.num_frequencies)
    stored = state.get(key, wanted).float().flatten().cpu()
    if stored.shape != wanted.shape or (stored - wanted).abs().max() > FREQUENCY_TOLERANCE:
        raise MismatchError(
            f"{key} holds {stored.numel()} frequencies that are not the {wanted.numel()} of "
            f"10000^(-i / {wanted.numel()})",
            hint="this flow was fitted with other time features, which this network does not have",
        )
