"""Mean and standard deviation of latents, per tapped state and channel.

``StatisticsAccumulator`` streams over packed latents [tokens, states, hidden] and merges batches in float64
(Chan, Golub and LeVeque, 1979); ``LatentStatistics`` is what a flow file keeps, and what is applied to
target and condition alike before noise. The same numbers are the Gaussian that a flow has to beat
(``baselines.py``).

Shapes: N tokens, J columns of latents, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A channel that never moved in the fit's tokens is only centred: dividing by its deviation would blow it up.
SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class LatentStatistics:
    """Float32 statistics [J, D]; column j is column j of the latents."""

    mean_JD: Tensor
    std_JD: Tensor

    @classmethod
    def identity(cls, num_columns: int, hidden_size: int) -> LatentStatistics:
        """Statistics that change nothing."""
        return cls(torch.zeros(num_columns, hidden_size), torch.ones(num_columns, hidden_size))

    @property
    def scale_JD(self) -> Tensor:
        """What latents are divided by: the standard deviation, or 1 where a channel never moved."""
        return torch.where(self.std_JD > SMALLEST_STD, self.std_JD, torch.ones_like(self.std_JD))

    def to(self, device: torch.device | str) -> LatentStatistics:
        return LatentStatistics(self.mean_JD.to(device), self.std_JD.to(device))

    def apply(self, latents_NJD: Tensor) -> Tensor:
        """Latents [N, J, D] in units of their standard deviation, float32."""
        assert latents_NJD.shape[-2:] == self.mean_JD.shape, (latents_NJD.shape, self.mean_JD.shape)
        return (latents_NJD.float() - self.mean_JD) / self.scale_JD

    def apply_column(self, latents_ND: Tensor, column: int) -> Tensor:
        """The same for the latents [N, D] of one column."""
        return (latents_ND.float() - self.mean_JD[column]) / self.scale_JD[column]


class StatisticsAccumulator:
    """Running count, mean and sum of squared distances from the mean, in float64."""

    def __init__(self, num_columns: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_JD = torch.zeros(num_columns, hidden_size, dtype=torch.float64, device=device)
        self.squares_JD = torch.zeros_like(self.mean_JD)

    def update(self, latents_NJD: Tensor) -> None:
        """Add tokens [N, J, D]; none is fine."""
        num_new = latents_NJD.shape[0]
        if num_new == 0:
            return
        latents = latents_NJD.to(device=self.mean_JD.device, dtype=torch.float64)
        mean_JD = latents.mean(dim=0)
        self._merge(num_new, mean_JD, (latents - mean_JD).square().sum(dim=0))

    def cpu(self) -> StatisticsAccumulator:
        """The same in main memory, where ranks exchange what they have seen."""
        copy = StatisticsAccumulator(*self.mean_JD.shape)
        copy.count, copy.mean_JD, copy.squares_JD = self.count, self.mean_JD.cpu(), self.squares_JD.cpu()
        return copy

    def merge(self, other: StatisticsAccumulator) -> None:
        """Add what another accumulator (another part or rank) has seen."""
        if other.count:
            self._merge(other.count, other.mean_JD, other.squares_JD)

    def _merge(self, count: int, mean_JD: Tensor, squares_JD: Tensor) -> None:
        total = self.count + count
        difference_JD = mean_JD - self.mean_JD
        self.mean_JD = self.mean_JD + difference_JD * (count / total)
        self.squares_JD = self.squares_JD + squares_JD + difference_JD.square() * (self.count * count / total)
        self.count = total

    def finish(self) -> LatentStatistics:
        """The statistics so far, float32; the variance is the mean square (divided by the count)."""
        variance_JD = self.squares_JD / max(self.count, 1)
        return LatentStatistics(self.mean_JD.float(), variance_JD.sqrt().float())
