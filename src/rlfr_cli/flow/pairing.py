"""Which latent is a target, and which is its condition.

Latents are packed, [tokens, tapped states, hidden], without padding; sequence i is the rows
``sequence_offsets[i] : sequence_offsets[i + 1]``: its last prompt tokens, then its response tokens. Only
response tokens are targets. A response token is valid when every pairing in use has its neighbour inside
its own sequence; the others (the last token, with ``next``) are left out of losses, shaping, means and
counts.

Shapes: R sequences, K response tokens, M valid ones, P pairings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.states import State, states_in_order


@dataclass(frozen=True)
class Pairing:
    """Where the condition of the target h[k] comes from.

    ``next`` (published name: token_pre) is h[k + shift], ``previous`` (token_post) h[k - shift], and ``self``
    (identity) h[k], whatever the shift.
    """

    context: Context
    shift: int = 1

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ConfigError(f"a context shift of {self.shift} was given; it must be 1 or more")

    @property
    def step(self) -> int:
        """Packed distance from the target to its condition."""
        return {Context.NEXT: self.shift, Context.PREVIOUS: -self.shift, Context.SELF: 0}[self.context]


@dataclass(frozen=True)
class TappedLayers:
    """The decoder blocks whose latents are targets: column j of the latents is block ``indices[j]``.

    ``context`` is the state that conditions come from (``None``: the target's own). Where it is none of the
    targets' blocks, its column lies behind theirs.
    """

    indices: tuple[int, ...]
    num_blocks: int
    context: State | None = None

    @property
    def tapped(self) -> tuple[State, ...]:
        """What the columns of the latents are, in order."""
        return states_in_order(self.indices, () if self.context is None else (self.context,))

    @property
    def positions(self) -> tuple[float, ...]:
        """The network's layer input, block index / number of blocks."""
        return tuple(index / self.num_blocks for index in self.indices)

    def condition_column(self, target_column: int) -> int:
        return target_column if self.context is None else self.tapped.index(self.context)


@dataclass(frozen=True)
class PairedTokens:
    """Packed indices of the valid response tokens and of their conditions."""

    targets_M: Tensor
    conditions_PM: Tensor
    sequence_M: Tensor
    position_M: Tensor  # zero-based place in the response
    valid_K: Tensor  # over all response tokens, packed in order
    response_offsets: Tensor  # [R + 1], into the K response tokens

    @property
    def num_valid(self) -> int:
        return self.targets_M.numel()

    @property
    def valid_per_response_R(self) -> Tensor:
        """How many valid tokens each response has."""
        return torch.bincount(self.sequence_M, minlength=self.response_offsets.numel() - 1)

    def over_responses(self, values_M: Tensor, fill: float = 0.0) -> Tensor:
        """Values of valid tokens [M, ...] to all response tokens [K, ...], ``fill`` where not valid."""
        out_K = values_M.new_full((self.valid_K.numel(), *values_M.shape[1:]), fill)
        out_K[self.valid_K.to(values_M.device)] = values_M
        return out_K

    def select(self, keep_M: Tensor) -> PairedTokens:
        """The same responses with only the valid tokens that ``keep_M`` (bool) marks."""
        valid_K = self.valid_K.clone()
        valid_K[self.valid_K] = keep_M
        return PairedTokens(
            targets_M=self.targets_M[keep_M],
            conditions_PM=self.conditions_PM[:, keep_M],
            sequence_M=self.sequence_M[keep_M],
            position_M=self.position_M[keep_M],
            valid_K=valid_K,
            response_offsets=self.response_offsets,
        )


@dataclass(frozen=True)
class PairedLatents:
    """Packed latents [tokens, columns, hidden], and how to read targets and conditions off them.

    ``statistics`` (one row a column) normalise both. What is read is detached and float32.
    """

    latents_NJD: Tensor
    paired: PairedTokens
    layers: TappedLayers
    statistics: LatentStatistics | None = None

    @property
    def device(self) -> torch.device:
        return self.latents_NJD.device

    @property
    def latent_size(self) -> int:
        return self.latents_NJD.shape[-1]

    def targets(self, column: int, rows: slice) -> Tensor:
        """Targets [n, D] of some valid tokens."""
        return self._take(self.paired.targets_M[rows], column)

    def conditions(self, column: int, pairing: int, rows: slice) -> Tensor:
        """Their conditions [n, D] by one pairing."""
        return self._take(self.paired.conditions_PM[pairing, rows], self.layers.condition_column(column))

    def select(self, keep_M: Tensor) -> PairedLatents:
        """The same latents with only the valid tokens that ``keep_M`` (bool) marks."""
        return replace(self, paired=self.paired.select(keep_M.to(self.paired.targets_M.device)))

    def _take(self, indices: Tensor, column: int) -> Tensor:
        latents_ND = self.latents_NJD.detach()[indices.to(self.device), column]
        return latents_ND.float() if self.statistics is None else self.statistics.apply_column(latents_ND, column)


def prompt_tokens_needed(pairings: Sequence[Pairing]) -> int:
    """How many of the last prompt tokens a sequence must hold: the largest shift, 1 at least."""
    return max(1, *(abs(pairing.step) for pairing in pairings))


def pair_tokens(
    sequence_offsets: Tensor,
    num_prompt: int | Tensor,
    pairings: Sequence[Pairing],
    device: torch.device | str | None = None,
) -> PairedTokens:
    """Pair every valid response token with its conditions.

    Args:
        sequence_offsets: int64 [R + 1].
        num_prompt: prompt tokens at the start of each sequence, one number or [R]; a sequence that is no
            longer than that (an empty one too) has no response tokens.
        pairings: one or more; a token is valid when all of them have their neighbour.
        device: where the indices go, by default that of ``sequence_offsets``.
    """
    if not pairings:
        raise ConfigError("no context pairing was given; at least one is needed")
    offsets = sequence_offsets.to(device=device or sequence_offsets.device, dtype=torch.int64)
    lengths_R = offsets.diff()
    prompt_R = torch.as_tensor(num_prompt, device=offsets.device).expand_as(lengths_R).minimum(lengths_R)
    response_lengths_R = lengths_R - prompt_R
    response_offsets = torch.cat([offsets.new_zeros(1), response_lengths_R.cumsum(0)])

    sequences = torch.arange(lengths_R.numel(), device=offsets.device)
    sequence_K = torch.repeat_interleave(sequences, response_lengths_R)
    position_K = torch.arange(sequence_K.numel(), device=offsets.device) - response_offsets[sequence_K]
    packed_K = offsets[sequence_K] + prompt_R[sequence_K] + position_K

    steps_P = torch.tensor([pairing.step for pairing in pairings], device=offsets.device)
    neighbours_PK = packed_K + steps_P[:, None]
    inside_PK = (neighbours_PK >= offsets[sequence_K]) & (neighbours_PK < offsets[sequence_K + 1])
    valid_K = inside_PK.all(dim=0)
    return PairedTokens(
        targets_M=packed_K[valid_K],
        conditions_PM=neighbours_PK[:, valid_K],
        sequence_M=sequence_K[valid_K],
        position_M=position_K[valid_K],
        valid_K=valid_K,
        response_offsets=response_offsets,
    )
