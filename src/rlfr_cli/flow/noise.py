"""Noise that belongs to a response, not to a batch.

A generator is seeded by a hash of its keys, so that the noise of (seed, response, layer, draw) is the same
in any batch, order, part or chunk. Equal keys give equal numbers on one kind of device; a CPU and a GPU
differ.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

Key = int | str


def keyed_seed(*keys: Key) -> int:
    """The first 63 bits of the SHA-256 of the keys' JSON; 1 and "1" are different keys."""
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(device: torch.device | str, *keys: Key) -> torch.Generator:
    """A generator on ``device`` whose numbers depend on ``keys`` alone."""
    return torch.Generator(device=device).manual_seed(keyed_seed(*keys))


def response_noise(
    seed: int,
    response_key: Key,
    layer_index: int,
    draw: int,
    *,
    num_tokens: int,
    size: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise [num_tokens, size] in float32 for all tokens of one response.

    ``num_tokens`` counts every response token, valid or not, so that no row depends on which are valid.
    """
    generator = keyed_generator(device, seed, response_key, layer_index, draw)
    return torch.randn(num_tokens, size, generator=generator, device=device, dtype=torch.float32)
