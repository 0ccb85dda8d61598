"""Import and export of published state dicts."""

from __future__ import annotations

import pytest
import torch

from rlfr_cli.errors import MismatchError
from rlfr_cli.flow.published import from_published, to_published
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes

SIZES = VelocitySizes(latent_size=5, condition_size=4, width=8, depth=3, num_frequencies=16, rms_epsilon=1e-5)


def published() -> dict[str, torch.Tensor]:
    return to_published(VelocityNetwork(SIZES).state_dict(), SIZES)


def test_round_trip() -> None:
    state = published()
    sizes, ours = from_published(state, rms_epsilon=1e-5)
    assert sizes == SIZES
    VelocityNetwork(sizes).load_state_dict(ours, strict=True)
    again = to_published(ours, sizes)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert state["model.time_embed.freqs"].shape == (1, 8)


def test_what_does_not_fit_is_refused_by_name() -> None:
    def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
        state = published() | {key.replace("__", "."): value for key, value in changes.items()}
        return {key: value for key, value in state.items() if value is not None}

    cases = {
        r"no tensor model\.input_proj\.weight": changed(model__input_proj__weight=None),
        r"missing \['res_blocks\.1\.mlp\.0\.bias'\]": changed(model__res_blocks__1__mlp__0__bias=None),
        r"left over \['extra'\]": changed(model__extra=torch.zeros(1)),
        r"model\.input_proj\.bias has shape \[9\].*\[8\]": changed(model__input_proj__bias=torch.zeros(9)),
        r"time_embed\.freqs holds 8": changed(model__time_embed__freqs=torch.ones(1, 8)),
    }
    for message, state in cases.items():
        with pytest.raises(MismatchError, match=message) as refused:
            from_published(state, rms_epsilon=1e-5)
        assert refused.value.hint


def test_frequencies_rounded_to_bfloat16_are_accepted() -> None:
    state = {key: value.bfloat16() for key, value in published().items()}
    sizes, ours = from_published(state, rms_epsilon=1e-5)
    assert sizes == SIZES
    assert "time_embed.freqs" not in ours


def test_a_time_scale_cannot_be_exported() -> None:
    scaled = VelocitySizes(latent_size=5, condition_size=4, width=8, depth=3, time_scale=1000.0)
    with pytest.raises(MismatchError, match="time scale 1000"):
        to_published(VelocityNetwork(scaled).state_dict(), scaled)
