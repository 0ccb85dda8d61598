"""The velocity network: its arithmetic by hand, its start, and what may be shared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlfr_cli.flow.velocity import (
    OutputLayer,
    ResidualBlock,
    RMSNorm,
    ScalarEmbedding,
    VelocityNetwork,
    VelocitySizes,
)


def random_network(time_scale: float = 1.0) -> VelocityNetwork:
    torch.manual_seed(0)
    sizes = VelocitySizes(latent_size=5, condition_size=4, width=8, depth=2, time_scale=time_scale)
    network = VelocityNetwork(sizes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, epsilon=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    # mean of squares of (3, 4) is 12.5
    wanted = torch.tensor([[3 / math.sqrt(12.5), 40 / math.sqrt(12.5)]])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), wanted)


def test_block_and_output_by_hand() -> None:
    """Width 1: RMS(3) = 1, so the block is 3 + gate * silu(2 * (1 * (1 + scale) + shift))."""
    block, output = ResidualBlock(1, epsilon=0.0), OutputLayer(1, 1, epsilon=0.0)
    for parameter in (*block.parameters(), *output.parameters()):
        nn.init.zeros_(parameter)
    for weight in (block.in_ln.weight, block.mlp[2].weight, output.norm_final.weight):
        nn.init.ones_(weight)
    nn.init.constant_(block.mlp[0].weight, 2.0)
    nn.init.constant_(output.linear.weight, 10.0)
    shift, scale, gate = torch.tensor([[0.7]]), torch.tensor([[-0.4]]), torch.tensor([[5.0]])
    inner = 2 * (0.6 + 0.7)
    after_block = 3 + 5 * inner / (1 + math.exp(-inner))
    assert block(torch.tensor([[3.0]]), (shift, scale, gate)).item() == pytest.approx(after_block)
    assert output(torch.tensor([[3.0]]), (shift, scale)).item() == pytest.approx(13.0)
    block.adaLN_modulation[1].bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert [part.item() for part in block.modulation(torch.zeros(1, 1))] == [1, 2, 3]


def test_features_are_cosines_then_sines() -> None:
    embedding = ScalarEmbedding(num_features=4, width=4, scale=2.0)
    seen = []
    embedding.mlp = nn.Sequential(nn.Linear(4, 4))
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding(torch.tensor([0.5]))
    # frequencies 10000^0 = 1 and 10000^(-1/2) = 0.01; the angle is 0.5 * 2 * f
    wanted = torch.tensor([[math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]])
    torch.testing.assert_close(seen[0], wanted)


def test_a_new_network_has_no_velocity() -> None:
    network = VelocityNetwork(VelocitySizes(latent_size=5, condition_size=4, width=8, depth=3))
    velocity = network(torch.randn(6, 5), torch.rand(6), torch.randn(6, 4), torch.rand(6))
    assert torch.equal(velocity, torch.zeros(6, 5))


def test_one_time_and_layer_for_all_equals_one_a_token() -> None:
    network, noised, conditions = random_network(), torch.randn(6, 5), torch.randn(6, 4)
    shared = network(noised, torch.tensor([0.8]), conditions, torch.tensor([0.25]))
    each = network(noised, torch.full((6,), 0.8), conditions, torch.full((6,), 0.25))
    torch.testing.assert_close(shared, each)


def test_time_layer_and_condition_all_matter() -> None:
    network, noised, conditions = random_network(), torch.randn(6, 5), torch.randn(6, 4)
    base = network(noised, torch.tensor([0.8]), conditions, torch.tensor([0.25]))
    for other in (
        network(noised, torch.tensor([0.2]), conditions, torch.tensor([0.25])),
        network(noised, torch.tensor([0.8]), conditions, torch.tensor([0.75])),
        network(noised, torch.tensor([0.8]), conditions + 1, torch.tensor([0.25])),
    ):
        assert (other - base).abs().max() > 1e-3


def test_time_scale_multiplies_time_and_layer() -> None:
    scaled, plain = random_network(time_scale=3.0), random_network()
    values = torch.tensor([0.1, 0.3])
    torch.testing.assert_close(scaled.embed_times(values), plain.embed_times(3 * values))
    torch.testing.assert_close(scaled.embed_layers(values), plain.embed_layers(3 * values))


def test_frequencies_are_not_in_the_state() -> None:
    assert not [key for key in random_network().state_dict() if "freq" in key]
