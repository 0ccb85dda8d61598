"""Latents in 8 bits: x ≈ centre + unit × scale × q, where q is an int8.

Latents have a few massive channels, and some have a massive mean beside a small deviation. So each number is first
taken in units of its channel (median and median absolute deviation, which massive tokens do not move), and then rounded
to 127 steps of the largest such number of its token and state: an error of one size in every channel, about a
hundredth of the channel's deviation. ``benchmarks/latents_8bit.py`` compares this with other ways.

Shapes: N tokens of a shard, J tapped states, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8 = "int8"
STEPS = 127
MAD_TO_STD = 1.4826  # of a normal distribution
SAMPLED_TOKENS = 1024  # that a channel's units come from: sorting all would take longer than the rounding
TOKENS_AT_ONCE = 4096  # in float32 beside the shard


@dataclass(frozen=True)
class Int8Latents:
    """Rounded latents q [N, J, D] int8; scale [N, J], centre and unit [J, D] float32."""

    q_NJD: Tensor
    scale_NJ: Tensor
    centre_JD: Tensor
    unit_JD: Tensor

    def decode(self) -> Tensor:
        """Latents [N, J, D] in float32."""
        return self.q_NJD.float().mul_(self.scale_NJ[..., None]).mul_(self.unit_JD).add_(self.centre_JD)


def encode_int8(latents_NJD: Tensor) -> Int8Latents:
    """Round the latents of a shard, of any float dtype; each is off by at most half of scale × unit."""
    centre_JD, unit_JD = _channel_units(latents_NJD)
    parts = [_round(part_NJD.float(), centre_JD, unit_JD) for part_NJD in latents_NJD.split(TOKENS_AT_ONCE)]
    q_NJD, scale_NJ = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Int8Latents(q_NJD, scale_NJ, centre_JD, unit_JD)


def int8_bytes(num_tokens: int, num_states: int, hidden_size: int, num_shards: int) -> int:
    """Bytes of so many tokens' numbers and scales, and of the units of so many shards."""
    float_size = torch.float32.itemsize
    return num_states * (num_tokens * (hidden_size + float_size) + num_shards * 2 * hidden_size * float_size)


def _channel_units(latents_NJD: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and unit [J, D] of the channels, from tokens spread evenly over the shard."""
    if len(latents_NJD) == 0:
        return torch.zeros(latents_NJD.shape[1:]), torch.ones(latents_NJD.shape[1:])
    sample_NJD = latents_NJD[:: -(-len(latents_NJD) // SAMPLED_TOKENS)].float()
    centre_JD = sample_NJD.median(dim=0).values
    distance_NJD = (sample_NJD - centre_JD).abs()
    unit_JD = MAD_TO_STD * distance_NJD.median(dim=0).values
    # Where more than half of the tokens agree, the mean distance; where all do, any unit will do.
    unit_JD = torch.where(unit_JD > 0, unit_JD, distance_NJD.mean(dim=0))
    return centre_JD, torch.where(unit_JD > 0, unit_JD, 1.0)


def _round(latents_NJD: Tensor, centre_JD: Tensor, unit_JD: Tensor) -> tuple[Tensor, Tensor]:
    in_units_NJD = (latents_NJD - centre_JD).div_(unit_JD)
    scale_NJ = in_units_NJD.abs().amax(dim=-1) / STEPS
    # A token that lies on every centre has no largest number; any scale gives its zeros.
    divisor_NJ = torch.where(scale_NJ > 0, scale_NJ, 1.0)
    q_NJD = in_units_NJD.div_(divisor_NJ[..., None]).round_().clamp_(-STEPS, STEPS).to(torch.int8)
    return q_NJD, scale_NJ
