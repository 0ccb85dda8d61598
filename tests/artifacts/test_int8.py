"""Latents in 8 bits: how far a number may be off, and what massive channels and tokens do to the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlfr_cli.artifacts.int8 import SAMPLED_TOKENS, TOKENS_AT_ONCE, encode_int8, int8_bytes


def latents_with_massive_channels(num_tokens: int = 600) -> Tensor:
    """[N, 2, 64]: deviations of 0.5 to 5, a channel around 150 with deviation 20, one around −90 with deviation 1."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(num_tokens, 2, 64, generator=generator) * torch.linspace(0.5, 5, 64)
    latents[..., 7] = 150 + 20 * torch.randn(num_tokens, 2, generator=generator)
    latents[..., 11] = -90 + torch.randn(num_tokens, 2, generator=generator)
    return latents


def errors_in_deviations(latents: Tensor) -> Tensor:
    """Root mean square error [J, D] of each channel, in its standard deviations."""
    error = encode_int8(latents).decode() - latents
    return error.square().mean(0).sqrt() / latents.std(0)


def test_each_number_is_off_by_half_a_step_at_most() -> None:
    latents = latents_with_massive_channels()
    rounded = encode_int8(latents)
    step = rounded.scale_NJ[..., None] * rounded.unit_JD
    off = (rounded.decode() - latents).abs()
    assert bool((off <= 0.5001 * step + 1e-5 * latents.abs()).all())
    assert float(off.max()) > 0.4 * float(step.min())
    assert rounded.q_NJD.dtype == torch.int8
    assert int(rounded.q_NJD.abs().amax(-1).min()) == 127, "the largest of each token takes the last step"


def test_by_hand() -> None:
    latents = torch.tensor([[[0.0, 10.0]], [[1.0, 30.0]], [[2.0, 20.0]]])
    rounded = encode_int8(latents)
    assert rounded.centre_JD.tolist() == [[1.0, 20.0]]
    torch.testing.assert_close(rounded.unit_JD, 1.4826 * torch.tensor([[1.0, 10.0]]))
    assert rounded.q_NJD.tolist() == [[[-127, -127]], [[0, 127]], [[127, 0]]]
    torch.testing.assert_close(rounded.decode(), latents)


def test_every_channel_keeps_a_hundredth_of_its_deviation() -> None:
    assert float(errors_in_deviations(latents_with_massive_channels()).max()) < 0.015


def test_massive_tokens_do_not_coarsen_the_others() -> None:
    latents = latents_with_massive_channels()
    clean = encode_int8(latents).decode()
    latents[::200, :, 3] = 4000.0
    rows = torch.arange(len(latents)) % 200 != 0
    off = (encode_int8(latents).decode() - latents)[rows].square().mean(0).sqrt()
    assert bool((off < 1.1 * (clean - latents)[rows].square().mean(0).sqrt()).all())


def test_a_channel_that_does_not_move_is_exact() -> None:
    latents = latents_with_massive_channels(40)
    latents[..., 0] = 3.25
    latents[..., 1] = 0.0
    latents[5:, :, 2] = -1.0  # most tokens agree
    restored = encode_int8(latents).decode()
    assert bool((restored[..., 0] == 3.25).all())
    assert bool((restored[..., 1] == 0).all())
    torch.testing.assert_close(restored[..., 2], latents[..., 2], atol=0.05, rtol=0.05)
    assert torch.equal(encode_int8(latents[:1]).decode(), latents[:1]), "a single token is its own centre"


@pytest.mark.parametrize("num_tokens", [0, 1, SAMPLED_TOKENS + 1, TOKENS_AT_ONCE + 3])
def test_any_number_of_tokens(num_tokens: int) -> None:
    latents = torch.randn(num_tokens, 2, 8, generator=torch.Generator().manual_seed(1))
    restored = encode_int8(latents).decode()
    assert restored.shape == latents.shape
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored, latents, atol=0.05, rtol=0)


def test_bfloat16_is_rounded_as_its_own_float32() -> None:
    latents = latents_with_massive_channels().bfloat16()
    assert torch.equal(encode_int8(latents).decode(), encode_int8(latents.float()).decode())
    assert latents.dtype == torch.bfloat16
    before = latents.clone()
    encode_int8(latents.float())
    assert torch.equal(latents, before)


def test_bytes_by_hand() -> None:
    # 10 tokens of 3 states: 8 numbers of 1 byte and a scale of 4; 2 shards of 3 × 8 centres and units of 4 bytes.
    assert int8_bytes(10, 3, 8, 2) == 10 * 3 * (8 + 4) + 2 * 3 * 8 * 2 * 4
