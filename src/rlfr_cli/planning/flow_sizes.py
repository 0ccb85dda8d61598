"""Sizes of a velocity network: parameters, bytes while it is fitted and while it scores, operations a token.

The network is that of ``flow/velocity.py``: D latent size, W width, b blocks, F sinusoidal features; its matrices hold
3 D W + (4 + 5 b) W² + 2 F W weights. A token is one target: a latent of one layer, with one context. What the condition
decides (its embedding and all modulations) is computed once for all draws.

The bytes a token while fitting and scoring are sums of c D + c' W + c'' b W + c''' F, whose factors were counted with
torch's allocator over networks of eight shapes (``benchmarks/memory.py`` checks them on further ones).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_cli.engines.flow_ranks import BUCKET_ELEMENTS
from rlfr_cli.flow.matching import DEFAULT_TOKENS_PER_CHUNK


@dataclass(frozen=True, kw_only=True)
class FlowSizes:
    """A velocity network and how it is used.

    Attributes:
        states: columns of the latents: the targets' layers, and those that only serve as conditions.
        layers: layers whose latents are targets.
        pairings: contexts of each target.
    """

    latent_size: int
    width: int
    depth: int
    states: int
    layers: int
    pairings: int
    num_frequencies: int = 256

    def summing_bytes(self, gpus: int) -> int:
        """Of the sum of gradients over GPUs: a bucket of them, and its sum."""
        return 8 * min(self.parameters, BUCKET_ELEMENTS) if gpus > 1 else 0

    @property
    def of_condition(self) -> int:
        """Weights of the matrices that run once for each condition: its embedding, and all modulations."""
        return self.latent_size * self.width + (3 * self.depth + 2) * self.width**2

    @property
    def of_noise(self) -> int:
        """Weights of the matrices that run for each draw of noise: in, blocks, out."""
        return 2 * self.latent_size * self.width + 2 * self.depth * self.width**2

    @property
    def of_scalars(self) -> int:
        """Weights of the matrices that embed time, and those that embed the layer."""
        return 2 * (self.num_frequencies * self.width + self.width**2)

    @property
    def parameters(self) -> int:
        width = self.width
        biases_and_norms = 2 * width + 4 * width + self.depth * 6 * width + 3 * width + self.latent_size
        return self.of_condition + self.of_noise + self.of_scalars + biases_and_norms

    def fitting_flops(self, repeats: int) -> float:
        """Operations of a token of the fit, forward and backward, over layers, pairings and repeats."""
        matrices = self.of_condition + self.of_noise + self.of_scalars // 2
        return 6 * matrices * self.layers * self.pairings * repeats

    def scoring_flops(self, timesteps: int, draws: int) -> float:
        """Operations of a token of the score."""
        embedded = 2 * self.latent_size * self.width
        modulated = 2 * (3 * self.depth + 2) * self.width**2
        return self.layers * self.pairings * (embedded + timesteps * (modulated + draws * 2 * self.of_noise))

    def fitting_bytes(self, tokens: float, chunk: int, *, casts: bool) -> float:
        """What the fit holds beside weights, moments, gradients and latents: noise of all tokens, a chunk's passes."""
        size, width, deep = self.latent_size, self.width, self.depth * self.width
        if casts:
            passes = 31 * size + 27 * width + 24 * deep + self.num_frequencies
        else:
            passes = 32 * size + 38 * width + 44 * deep + 4 * self.num_frequencies
        return 4 * tokens * size + min(tokens, chunk) * passes + (2 * self.parameters if casts else 0)

    def scoring_bytes(self, tokens: float, timesteps: int, draws: int, *, casts: bool) -> float:
        """What scoring holds beside weights and latents: a chunk's conditions, noise of each draw, one pass.

        From the second timestep or context on, the modulations of the one before still exist.
        """
        size, width, deep = self.latent_size, self.width, self.depth * self.width
        drawn = 4 * (self.pairings - 1 + draws) * size
        if casts:
            passes, modulations = 16 * size + 17 * width + 6 * deep, 5 * deep
        else:
            passes, modulations = 14 * size + 26 * width + 12 * deep, 12 * deep + 8 * width
        again = modulations if timesteps * self.pairings > 1 else 0
        return min(tokens, DEFAULT_TOKENS_PER_CHUNK) * (drawn + passes + again) + (2 * self.parameters if casts else 0)

    def latents_bytes(self, tokens: float, itemsize: float) -> float:
        """Latents of so many tokens, all states."""
        return tokens * self.states * self.latent_size * itemsize
