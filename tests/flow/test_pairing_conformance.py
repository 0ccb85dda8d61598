"""What is left of family 04 of the recorded vectors: every layer alone, and tokens that lack one of two neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flow.test_flow_conformance import CONTEXTS, score_recorded
from recorded import assert_matches, load_recorded
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.policy.logprobs import token_logprobs

NAMES = [
    "identity_1_d32_s45",
    "token_post_1_d32_s42",
    "token_post_2_d32_s44",
    "token_pre+token_post_1+1_d32_s46",
    "token_pre_1_d32_s41",
    "token_pre_2_d32_s43",
]


def settings_of(recorded: dict[str, Tensor], hyper: dict[str, Any]) -> tuple[list[Pairing], TappedLayers, list[Any]]:
    pairings = [Pairing(CONTEXTS[m], s) for m, s in zip(hyper["modes"], hyper["shifts"], strict=True)]
    layers = TappedLayers(tuple(hyper["hook_layers"]), hyper["num_hidden_layers"])
    noise_of = [[recorded[f"noise.{hook}.{p}"] for p in range(len(pairings))] for hook in range(len(layers.indices))]
    return pairings, layers, noise_of


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_alone(shared: Path, name: str) -> None:
    """The mean over layers could hide two that are exchanged; their score is 4 times the error at t = 0.8."""
    recorded, info = load_recorded(shared, f"04_pairing_{name}")
    hyper = info["hyper"]
    pairings, layers, noise_of = settings_of(recorded, hyper)
    num_actions = hyper["num_actions"]
    result, valid_K = score_recorded(recorded, pairings, noise_of, layers, torch.full((hyper["B"],), num_actions))
    valid_BA = valid_K.unflatten(0, (hyper["B"], num_actions))
    assert 0 < int(valid_BA.sum()) <= valid_BA.numel()
    for hook in range(len(layers.indices)):
        errors = recorded["hook_loss"][hook, :, -num_actions:][valid_BA]
        assert_matches(result.errors_MJK[:, hook, 0], errors)
        assert_matches(4 * result.errors_MJK[:, hook, 0], recorded["hook_score"][hook, :, -num_actions:][valid_BA])


def test_a_token_that_lacks_one_of_two_neighbours_is_left_out(shared: Path) -> None:
    """Differs on purpose: without a next token theirs is half of the other pairing's score, the half of a 0."""
    recorded, info = load_recorded(shared, "04_pairing_token_pre+token_post_1+1_d32_s46")
    hyper = info["hyper"]
    pairings, layers, noise_of = settings_of(recorded, hyper)
    num_responses_K = torch.full((hyper["B"],), hyper["num_actions"])
    _, valid_K = score_recorded(recorded, pairings, noise_of, layers, num_responses_K)
    valid_BA = valid_K.unflatten(0, (hyper["B"], hyper["num_actions"]))
    assert valid_BA[:, :-1].all()
    assert not valid_BA[:, -1].any()

    of_previous = [[noise[1]] for noise in noise_of]
    alone, all_valid_K = score_recorded(recorded, pairings[1:], of_previous, layers, num_responses_K)
    assert all_valid_K.all()
    last_B = alone.score_M.unflatten(0, valid_BA.shape)[:, -1]
    assert_matches(last_B / 2, recorded["action_flow_score"][:, -1])


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_of_the_actions(shared: Path, name: str) -> None:
    recorded, info = load_recorded(shared, f"04_pairing_{name}")
    num_actions = info["hyper"]["num_actions"]
    logits = recorded["logits"][:, -num_actions - 1 : -1]
    ours, _ = token_logprobs(
        lambda hidden: hidden,
        logits.flatten(0, 1),
        recorded["sequences"][:, -num_actions:].flatten().long(),
        temperature=1.0,
        vocab_size=logits.shape[-1],
    )
    assert_matches(ours.unflatten(0, logits.shape[:2]), recorded["action_log_probs"])
