"""Noise depends on its keys and on nothing else."""

from __future__ import annotations

import hashlib

import torch

from rlfr_cli.flow.noise import keyed_generator, keyed_seed, response_noise


def test_seed_by_hand() -> None:
    digest = hashlib.sha256(b'[7, "problem-1", 3]').hexdigest()
    assert keyed_seed(7, "problem-1", 3) == int(digest[:16], 16) // 2
    assert 0 <= keyed_seed("x") < 2**63


def test_keys_are_not_confused() -> None:
    seeds = [keyed_seed(1, 23), keyed_seed(12, 3), keyed_seed("1", 23), keyed_seed(123), keyed_seed(23, 1)]
    assert len(set(seeds)) == len(seeds)


def test_equal_keys_give_equal_bits() -> None:
    draws = [torch.randn(9, generator=keyed_generator("cpu", 1, "a")) for _ in range(2)]
    assert torch.equal(*draws)


def test_response_layer_and_draw_change_the_noise() -> None:
    def noise(seed: int = 0, key: str = "a", layer: int = 7, draw: int = 0) -> torch.Tensor:
        return response_noise(seed, key, layer, draw, num_tokens=4, size=3)

    assert torch.equal(noise(), noise())
    for other in (noise(seed=1), noise(key="b"), noise(layer=8), noise(draw=1)):
        assert not torch.equal(noise(), other)


def test_noise_is_standard_normal() -> None:
    noise = response_noise(0, "a", 1, 0, num_tokens=500, size=100)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
