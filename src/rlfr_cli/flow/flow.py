"""A flow: the velocity network with all that says how to use it. Tensor in, tensor out.

It holds what a flow file's header holds (layers, pairings) and its statistics, so that fitting, scoring and
the online update cannot disagree about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_cli.errors import WorkError
from rlfr_cli.flow.deviation import DeviationResult, deviations, keyed_noise
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import PairedLatents, Pairing, TappedLayers, pair_tokens, prompt_tokens_needed
from rlfr_cli.flow.velocity import VelocityNetwork
from rlfr_cli.states import State


@dataclass
class Flow:
    """A velocity network, the layers and pairings it was fitted with, and its statistics if any, of every column."""

    network: VelocityNetwork
    layers: TappedLayers
    pairings: tuple[Pairing, ...]
    statistics: LatentStatistics | None = None

    @property
    def tapped(self) -> tuple[State, ...]:
        """What must be tapped of the policy, in the order of the latents' columns."""
        return self.layers.tapped

    @property
    def num_prompt(self) -> int:
        """Last prompt tokens that a latent sequence must begin with."""
        return prompt_tokens_needed(self.pairings)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def pair(self, latents: Sequence[Tensor], num_prompt: int | None = None) -> PairedLatents:
        """Pack latent sequences [prompt tokens kept + T, J, D] and pair their tokens.

        Args:
            latents: one tensor a response, on the flow's device.
            num_prompt: prompt tokens at the start of each; by default as many as the flow needs.
        """
        lengths = [len(sequence) for sequence in latents]
        offsets = torch.tensor([0, *lengths], dtype=torch.int64, device=self.device).cumsum(0)
        paired = pair_tokens(offsets, self.num_prompt if num_prompt is None else num_prompt, self.pairings)
        packed_NJD = torch.cat(list(latents))
        assert packed_NJD.shape[1] == len(self.tapped), (packed_NJD.shape, self.tapped)
        return PairedLatents(packed_NJD, paired, self.layers, self.statistics)

    def deviations(
        self,
        pairs: PairedLatents,
        response_keys: Sequence[str],
        *,
        seed: int,
        timesteps: Sequence[float],
        num_draws: int = 1,
        antithetic: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ) -> DeviationResult:
        """Deviation and score of every valid token; see ``deviation.py``.

        Raises:
            WorkError: a score is not finite.
        """
        noise = keyed_noise(seed, response_keys, pairs, antithetic=antithetic)
        result = deviations(
            self.network, pairs, noise, timesteps=timesteps, num_draws=num_draws, autocast_dtype=autocast_dtype
        )
        if not bool(result.score_M.isfinite().all()):
            raise WorkError(
                "the flow gave scores that are not finite numbers",
                hint="check the flow and the latents with `rlfr show --verify`; float16 may overflow",
            )
        return result


def response_key(problem_id: str, sample_index: int) -> str:
    """The key of a response's noise; the same wherever the response is scored."""
    return f"{problem_id}\n{sample_index}"
