"""Sizes of a velocity network agree with the network; what takes part in which pass is counted once."""

from __future__ import annotations

import pytest
from torch import nn

from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes
from rlfr_cli.planning.flow_sizes import FlowSizes

SMALL = FlowSizes(latent_size=24, width=16, depth=3, states=2, layers=2, pairings=1, num_frequencies=8)


@pytest.mark.parametrize(("latent_size", "width", "depth"), [(24, 16, 3), (16, 24, 1), (16, 16, 4)])
def test_parameters_are_those_of_the_network(latent_size: int, width: int, depth: int) -> None:
    network = VelocityNetwork(
        VelocitySizes(latent_size=latent_size, condition_size=latent_size, width=width, depth=depth)
    )
    sizes = FlowSizes(latent_size=latent_size, width=width, depth=depth, states=1, layers=1, pairings=1)
    assert sizes.parameters == sum(parameter.numel() for parameter in network.parameters())
    matrices = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    assert sizes.of_condition + sizes.of_noise + sizes.of_scalars == matrices


def test_scoring_shares_conditions_between_draws_and_modulations_between_draws_alone() -> None:
    one = SMALL.scoring_flops(1, 1)
    per_draw = SMALL.scoring_flops(1, 2) - one
    assert per_draw == 2 * 2 * SMALL.of_noise  # two layers, two operations a weight
    per_timestep = SMALL.scoring_flops(2, 1) - one
    assert per_timestep == per_draw + 2 * 2 * (3 * 3 + 2) * 16**2
    assert one == per_timestep + 2 * 2 * 24 * 16


def test_fitting_takes_three_passes_for_each_layer_context_and_repeat() -> None:
    once = SMALL.fitting_flops(1)
    assert SMALL.fitting_flops(4) == 4 * once
    matrices = SMALL.of_condition + SMALL.of_noise + SMALL.of_scalars // 2  # the layer's embedding runs once
    assert once == 2 * 3 * 2 * matrices


def test_chunks_bound_all_but_the_noise_of_a_step() -> None:
    short, long = (SMALL.fitting_bytes(tokens, 100, casts=False) for tokens in (100, 1000))
    assert long - short == 4 * 900 * SMALL.latent_size
    assert SMALL.scoring_bytes(10**6, 1, 1, casts=False) == SMALL.scoring_bytes(4096, 1, 1, casts=False)


def test_autocast_copies_the_weights_and_halves_most_of_the_passes() -> None:
    wide = FlowSizes(latent_size=512, width=512, depth=4, states=1, layers=1, pairings=1)
    full, half = (wide.fitting_bytes(4096, 4096, casts=casts) for casts in (False, True))
    assert 0.5 * full < half - 2 * wide.parameters < 0.7 * full
