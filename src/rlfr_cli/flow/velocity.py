"""The velocity network: v(x_t, t, condition, layer), tensor in, tensor out.

y = E_layer(l / L) + W_c c + b_c + E_time(t), where E(s) = Linear SiLU Linear of [cos(s f), sin(s f)] and
f_i = 10000^(-i / 128). A block is x <- x + gate * MLP(RMS(x)(1 + scale) + shift), with (shift, scale, gate)
= Linear(SiLU(y)); the output is Linear(RMS(x)(1 + scale) + shift). Source: section 1 of the findings on the
published implementation; submodule names are its own, so that a published state dict loads
(``published.py``).

What does not depend on the noise is computed apart, so that several draws and timesteps share it: the
condition's embedding (once a token), the time's and the layer's (once a distinct value), and from their sum
the shifts, scales and gates of all blocks (once a token and timestep; three fifths of the work of a block).

Shapes: N tokens, D latent size, C condition size, W width, F sinusoidal features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True)
class VelocitySizes:
    """Everything that fixes the network's shapes and arithmetic.

    ``rms_epsilon`` is the language model's own; ``time_scale`` multiplies time and layer in the sinusoids.
    """

    latent_size: int
    condition_size: int
    width: int
    depth: int
    num_frequencies: int = 256
    rms_epsilon: float = 1e-6
    time_scale: float = 1.0


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of each block, and shift and scale of the output, each [N, W] or [1, W]."""

    blocks: tuple[tuple[Tensor, Tensor, Tensor], ...]
    output: tuple[Tensor, Tensor]


def sinusoid_frequencies(num_features: int, device: torch.device | None = None) -> Tensor:
    """Angular frequencies [F / 2], always float32: bfloat16 would round them by up to 0.4 %."""
    half = num_features // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(LONGEST_PERIOD) * steps / half)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, the division in float32 whatever the compute dtype."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_NW: Tensor) -> Tensor:
        x_float = x_NW.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return normed.to(x_NW.dtype) * self.weight.to(x_NW.dtype)


class ScalarEmbedding(nn.Module):
    """A number in [0, 1] to a vector of ``width``; the frequencies are derived, never stored."""

    def __init__(self, num_features: int, width: int, scale: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values_N: Tensor) -> Tensor:
        frequencies = sinusoid_frequencies(self.num_features, values_N.device)
        angles = values_N.float()[:, None] * self.scale * frequencies
        features_NF = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return self.mlp(features_NF.to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.in_ln = RMSNorm(width, epsilon)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def modulation(self, activated_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = self.adaLN_modulation[1](activated_NW).chunk(3, dim=-1)
        return shift, scale, gate

    def forward(self, x_NW: Tensor, modulation: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shift, scale, gate = modulation
        return x_NW + gate * self.mlp(self.in_ln(x_NW) * (1 + scale) + shift)


class OutputLayer(nn.Module):
    def __init__(self, width: int, latent_size: int, epsilon: float) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width, epsilon)
        self.linear = nn.Linear(width, latent_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, activated_NW: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.adaLN_modulation[1](activated_NW).chunk(2, dim=-1)
        return shift, scale

    def forward(self, x_NW: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale = modulation
        return self.linear(self.norm_final(x_NW) * (1 + scale) + shift)


class VelocityNetwork(nn.Module):
    """The velocity field of the reference latents; modulation and output start at zero, so v = 0 at first."""

    def __init__(self, sizes: VelocitySizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, epsilon = sizes.width, sizes.rms_epsilon
        self.input_proj = nn.Linear(sizes.latent_size, width)
        self.time_embed = ScalarEmbedding(sizes.num_frequencies, width, sizes.time_scale)
        self.layer_embed = ScalarEmbedding(sizes.num_frequencies, width, sizes.time_scale)
        self.cond_embed = nn.Linear(sizes.condition_size, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width, epsilon) for _ in range(sizes.depth))
        self.final_layer = OutputLayer(width, sizes.latent_size, epsilon)
        self._start_at_zero()

    @property
    def blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.res_blocks))

    def _start_at_zero(self) -> None:
        modulated = [block.adaLN_modulation for block in self.blocks] + [self.final_layer.adaLN_modulation]
        for module in (*modulated, self.final_layer.linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def embed_condition(self, conditions_NC: Tensor) -> Tensor:
        """Conditions [N, C] to [N, W]: once a token, for all timesteps and draws."""
        return self.cond_embed(conditions_NC.to(self.cond_embed.weight.dtype))

    def embed_times(self, times: Tensor) -> Tensor:
        """Times [n] to [n, W]; pass distinct values and let rows broadcast."""
        return self.time_embed(times)

    def embed_layers(self, layer_positions: Tensor) -> Tensor:
        """Layer positions (block index / number of blocks) [n] to [n, W]; pass distinct values."""
        return self.layer_embed(layer_positions)

    def modulate(self, embedding_NW: Tensor) -> Modulation:
        """The sum of the three embeddings, [N, W], to every block's modulation: shared by all draws."""
        activated_NW = functional.silu(embedding_NW)
        return Modulation(
            blocks=tuple(block.modulation(activated_NW) for block in self.blocks),
            output=self.final_layer.modulation(activated_NW),
        )

    def velocity(self, noised_ND: Tensor, modulation: Modulation) -> Tensor:
        """Velocity [N, D] at the noised latents [N, D], in the network's compute dtype."""
        x_NW = self.input_proj(noised_ND.to(self.input_proj.weight.dtype))
        for block, block_modulation in zip(self.blocks, modulation.blocks, strict=True):
            x_NW = block(x_NW, block_modulation)
        return self.final_layer(x_NW, modulation.output)

    def forward(self, noised_ND: Tensor, times_N: Tensor, conditions_NC: Tensor, layers_N: Tensor) -> Tensor:
        """Velocity [N, D]; times and layers are [N], or [1] where one value holds for all."""
        embedding_NW = self.embed_layers(layers_N) + self.embed_condition(conditions_NC) + self.embed_times(times_N)
        return self.velocity(noised_ND, self.modulate(embedding_NW))
