"""What a flow has to beat: zero velocity, and the per-channel Gaussian in closed form.

For one channel let x1 ~ N(m, s^2) and e ~ N(0, 1) be independent, x_t = t x1 + (1 - t) e, u = x1 - e. (x_t,
u) is jointly normal with Var(x_t) = V = t^2 s^2 + (1 - t)^2 and Cov(u, x_t) = t s^2 - (1 - t), so the best
predictor is

    E[u | x_t] = m + g (x_t - t m),    g = (t s^2 - (1 - t)) / V.

Its expected error is Var(u) - Cov^2 / V = ((s^2 + 1) V - (t s^2 - (1 - t))^2) / V = s^2 / V. On other
latents, put q = mean of (x1 - m)^2: since u - E[u | x_t] = (1 - g t)(x1 - m) - (1 + g (1 - t)) e, with 1 -
g t = (1 - t) / V and 1 + g (1 - t) = t s^2 / V, the error is ((1 - t)^2 q + t^2 s^4) / V^2, which is s^2 /
V again for q = s^2. Zero velocity has the error mean of x1^2, plus 1.

``VelocityErrors`` streams the errors of flow and baselines on the same held-out tokens and noise.

Shapes: N tokens, D latent size, J layers, K timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlfr_cli.flow.normalisation import LatentStatistics


def mixture_variance(t: float | Tensor, std: Tensor) -> Tensor:
    """V = t^2 s^2 + (1 - t)^2, the variance of x_t."""
    return (t * std) ** 2 + (1 - t) ** 2


def gaussian_velocity(noised_ND: Tensor, times_N: Tensor, mean_D: Tensor, std_D: Tensor) -> Tensor:
    """E[u | x_t], [N, D], of the per-channel Gaussian; times are [N], or [1] for all."""
    t = times_N[:, None]
    gain = (t * std_D**2 - (1 - t)) / mixture_variance(t, std_D)
    return mean_D + gain * (noised_ND - t * mean_D)


def gaussian_error(t: float, std_D: Tensor) -> Tensor:
    """Expected error s^2 / V, averaged over channels, on latents of the Gaussian itself."""
    return (std_D**2 / mixture_variance(t, std_D)).mean()


def gaussian_error_on(t: float, mean_D: Tensor, std_D: Tensor, latents_ND: Tensor) -> Tensor:
    """Error [] of the Gaussian's predictor on given latents, averaged over all noise in closed form."""
    distance_D = (latents_ND - mean_D).square().mean(dim=0)
    variance_D = mixture_variance(t, std_D)
    return (((1 - t) ** 2 * distance_D + t**2 * std_D**4) / variance_D**2).mean()


def zero_error_on(latents_ND: Tensor) -> Tensor:
    """Error [] of v = 0 on given latents, averaged over all noise: the same at every timestep."""
    return latents_ND.square().mean() + 1


def share_of_gaussian_removed(flow_error: Tensor, gaussian_error: Tensor) -> Tensor:
    """1 - flow / Gaussian: 0 is no better than the Gaussian, below 0 is worse, 1 is no error left."""
    return 1 - flow_error / gaussian_error


class VelocityErrors:
    """Running mean errors of a flow, of zero velocity and of the Gaussian, by layer and timestep.

    Args:
        gaussian: statistics of the fit's training tokens, in the units that the flow sees: the identity where
            latents are normalised. Column j is layer j.
        timesteps: where errors are taken.
    """

    def __init__(self, gaussian: LatentStatistics, num_layers: int, timesteps: tuple[float, ...]) -> None:
        self.gaussian = gaussian
        self.timesteps = timesteps
        self.counts_JK = torch.zeros(num_layers, len(timesteps), dtype=torch.float64)
        self.flow_sum_JK = torch.zeros_like(self.counts_JK)
        self.zero_sum_JK = torch.zeros_like(self.counts_JK)
        self.gaussian_sum_JK = torch.zeros_like(self.counts_JK)

    def update(self, layer: int, timestep: int, targets_ND: Tensor, noise_ND: Tensor, flow_errors_N: Tensor) -> None:
        """Add tokens of one layer and timestep (indices), with the flow's errors for the same noise."""
        times = torch.tensor([self.timesteps[timestep]], device=targets_ND.device)
        mean_D = self.gaussian.mean_JD[layer].to(targets_ND.device)
        std_D = self.gaussian.std_JD[layer].to(targets_ND.device)
        noised_ND = times * targets_ND + (1 - times) * noise_ND
        wanted_ND = targets_ND - noise_ND
        missed_ND = gaussian_velocity(noised_ND, times, mean_D, std_D) - wanted_ND
        at = (layer, timestep)
        self.counts_JK[at] += targets_ND.shape[0]
        self.flow_sum_JK[at] += float(flow_errors_N.double().sum())
        self.zero_sum_JK[at] += float(wanted_ND.double().square().mean(dim=-1).sum())
        self.gaussian_sum_JK[at] += float(missed_ND.double().square().mean(dim=-1).sum())

    def merge(self, other: VelocityErrors) -> None:
        """Add what another part or rank has seen."""
        self.counts_JK += other.counts_JK
        self.flow_sum_JK += other.flow_sum_JK
        self.zero_sum_JK += other.zero_sum_JK
        self.gaussian_sum_JK += other.gaussian_sum_JK

    @property
    def flow_JK(self) -> Tensor:
        return self.flow_sum_JK / self.counts_JK

    @property
    def zero_JK(self) -> Tensor:
        return self.zero_sum_JK / self.counts_JK

    @property
    def gaussian_JK(self) -> Tensor:
        return self.gaussian_sum_JK / self.counts_JK

    @property
    def share_removed_JK(self) -> Tensor:
        """Share of the Gaussian's error that the flow removes."""
        return share_of_gaussian_removed(self.flow_JK, self.gaussian_JK)
