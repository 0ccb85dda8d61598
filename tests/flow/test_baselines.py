"""The Gaussian in closed form against simulation, and against every other linear predictor."""

from __future__ import annotations

import pytest
import torch

from rlfr_cli.flow.baselines import (
    VelocityErrors,
    gaussian_error,
    gaussian_error_on,
    gaussian_velocity,
    share_of_gaussian_removed,
    zero_error_on,
)
from rlfr_cli.flow.normalisation import LatentStatistics

MEAN, STD = torch.tensor([1.0, -4.0, 0.0]), torch.tensor([0.5, 3.0, 8.0])


def simulate(t: float, mean: torch.Tensor = MEAN, std: torch.Tensor = STD) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = mean + std * torch.randn(200_000, 3, generator=generator)
    noise = torch.randn(200_000, 3, generator=generator)
    return latents, noise, t * latents + (1 - t) * noise


def test_by_hand() -> None:
    """m = 1, s = 2, t = 0.5: V = 1.25, g = (0.5 * 4 - 0.5) / 1.25 = 1.2, error 4 / 1.25 = 3.2."""
    mean, std = torch.tensor([1.0]), torch.tensor([2.0])
    velocity = gaussian_velocity(torch.tensor([[3.0]]), torch.tensor([0.5]), mean, std)
    torch.testing.assert_close(velocity, torch.tensor([[1 + 1.2 * 2.5]]))
    assert float(gaussian_error(0.5, std)) == pytest.approx(3.2)
    # one latent at 4: q = 9, error (0.25 * 9 + 0.25 * 16) / 1.25^2 = 4
    assert float(gaussian_error_on(0.5, mean, std, torch.tensor([[4.0]]))) == pytest.approx(4.0)
    assert float(zero_error_on(torch.tensor([[4.0]]))) == 17.0


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8, 0.95])
def test_error_agrees_with_simulation(t: float) -> None:
    latents, noise, noised = simulate(t)
    wanted = latents - noise
    velocity = gaussian_velocity(noised, torch.tensor([t]), MEAN, STD)
    measured = (velocity - wanted).square().mean()
    assert float(measured) == pytest.approx(float(gaussian_error(t, STD)), rel=0.01)
    assert float(wanted.square().mean()) == pytest.approx(float(zero_error_on(latents)), rel=0.01)
    for factor in (0.9, 1.1):  # no other slope is better
        other = MEAN + factor * (velocity - MEAN)
        assert (other - wanted).square().mean() > measured


def test_error_on_other_latents_agrees_with_simulation() -> None:
    """Held-out latents with another mean and variance than the Gaussian was fitted with."""
    latents, noise, noised = simulate(0.7, MEAN + 2, STD * 1.5)
    velocity = gaussian_velocity(noised, torch.tensor([0.7]), MEAN, STD)
    measured = float((velocity - (latents - noise)).square().mean())
    assert float(gaussian_error_on(0.7, MEAN, STD, latents)) == pytest.approx(measured, rel=0.01)
    assert measured > 1.2 * float(gaussian_error(0.7, STD))


def test_streamed_errors() -> None:
    timesteps = (0.3, 0.8)
    gaussian = LatentStatistics(MEAN[None].repeat(2, 1), STD[None].repeat(2, 1))
    whole, half = (VelocityErrors(gaussian, 2, timesteps) for _ in range(2))
    latents, noise, _ = simulate(0.8)
    perfect_but_for_one = torch.full((len(latents),), 0.25)
    first, second = slice(0, 50_000), slice(50_000, None)
    whole.update(1, 1, latents[first], noise[first], perfect_but_for_one[first])
    half.update(1, 1, latents[second], noise[second], perfect_but_for_one[second])
    whole.merge(half)
    assert whole.counts_JK.tolist() == [[0, 0], [0, 200_000]]
    assert float(whole.flow_JK[1, 1]) == 0.25
    assert float(whole.gaussian_JK[1, 1]) == pytest.approx(float(gaussian_error(0.8, STD)), rel=0.01)
    assert float(whole.zero_JK[1, 1]) == pytest.approx(float(zero_error_on(latents)), rel=0.01)
    assert float(whole.share_removed_JK[1, 1]) == pytest.approx(1 - 0.25 / float(whole.gaussian_JK[1, 1]), rel=1e-6)


def test_share_removed() -> None:
    flow, gaussian = torch.tensor([0.0, 5.0, 10.0, 15.0]), torch.tensor(10.0)
    assert share_of_gaussian_removed(flow, gaussian).tolist() == [1.0, 0.5, 0.0, -0.5]
