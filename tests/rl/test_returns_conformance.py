"""What is left of families 06 and 07 of the recorded vectors: estimators without a group, and entropies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recorded import assert_matches, load_recorded
from rlfr_cli.flow.choices import Normalise
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores
from rlfr_cli.policy.logprobs import token_logprobs
from rlfr_cli.rl.advantages import returns, token_rewards
from rlfr_cli.rl.choices import Aggregation, Estimator
from rlfr_cli.rl.policy_loss import token_weights

RECORDED = ["group_norm", "rloo", "reinforce_baseline", "reinforce", "gae"]


def recorded_rewards(shared: Path, name: str, estimator: str) -> tuple[dict[str, Tensor], dict, Tensor, Tensor]:
    """Tensors, settings, offsets, and our token rewards [K] from the recorded outcomes and normalised scores."""
    recorded, info = load_recorded(shared, f"06_returns_{name}")
    hyper, mask_RT = info["hyper"], recorded["in/mask"].bool()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask_RT.sum(dim=1).cumsum(0)])
    options = ShapingOptions(
        normalise=Normalise.NONE,
        threshold=hyper["flow_score_threshold"],
        top_k=hyper["flow_score_topk"],
        coefficient=hyper["flow_coef"],
    )
    scores_K = recorded[f"{estimator}/score_normalised"][mask_RT]
    flow_K = shape_scores(scores_K, torch.ones_like(scores_K, dtype=torch.bool), offsets, options).flow_reward_K
    penalty_K = -hyper["kl_coef"] * recorded["in/kl"][mask_RT]
    rewards_K = token_rewards(recorded[f"{estimator}/shaped_reward"], flow_K + penalty_K, offsets)
    return recorded, hyper, offsets, rewards_K


@pytest.mark.parametrize("name", ["s61", "s62"])
@pytest.mark.parametrize("estimator", RECORDED)
def test_token_rewards_of_every_estimator(shared: Path, name: str, estimator: str) -> None:
    """Without a group (`reinforce`, `gae`) the outcome itself stands on the last token."""
    recorded, _, offsets, rewards_K = recorded_rewards(shared, name, estimator)
    mask_RT = recorded["in/mask"].bool()
    if estimator in ("reinforce", "gae"):
        assert torch.equal(recorded[f"{estimator}/shaped_reward"], recorded["in/reward"])
    assert_matches(rewards_K, recorded[f"{estimator}/token_reward"][mask_RT])
    # Theirs adds up the KL of padding too; ours has no padding.
    padding_R = torch.where(mask_RT, 0.0, recorded[f"{estimator}/token_reward"]).sum(dim=1)
    sums_R = torch.stack([row.sum() for row in rewards_K.split(offsets.diff().tolist())])
    assert_matches(sums_R, recorded[f"{estimator}/info_return"] - padding_R)


@pytest.mark.parametrize("name", ["s61", "s62"])
@pytest.mark.parametrize("estimator", RECORDED[:-1])
def test_returns_of_every_estimator_without_a_critic(shared: Path, name: str, estimator: str) -> None:
    recorded, hyper, offsets, rewards_K = recorded_rewards(shared, name, estimator)
    mask_RT = recorded["in/mask"].bool()
    ours_K = returns(rewards_K, offsets, hyper["gamma"])
    assert_matches(ours_K, recorded[f"{estimator}/returns"][mask_RT])
    assert_matches(ours_K, recorded[f"{estimator}/advantages"][mask_RT])
    assert (hyper["gamma"] < 1) == (name == "s62")


def test_a_critic_is_no_choice() -> None:
    """Differs on purpose: no value network, so neither `gae` nor its value loss."""
    assert {estimator.value for estimator in Estimator}.isdisjoint({"gae", "reinforce"})


def test_entropies(shared: Path) -> None:
    recorded, _ = load_recorded(shared, "07_policy_loss_s71")
    logits = recorded["logits"]
    ids = torch.zeros(logits[..., 0].numel(), dtype=torch.int64)
    _, ours = token_logprobs(
        lambda hidden: hidden, logits.flatten(0, 1), ids, temperature=1.0, vocab_size=logits.shape[-1]
    )
    assert_matches(ours.unflatten(0, logits.shape[:2]), recorded["entropy"])


def test_the_mean_over_the_tokens_of_a_response(shared: Path) -> None:
    """Our weights are those of the mean over responses too; a response's share is one in as many as there are."""
    recorded, _ = load_recorded(shared, "07_policy_loss_s71")
    mask_RT = recorded["mask"].bool()
    lengths_R = mask_RT.sum(dim=1)
    weighted_K = token_weights(Aggregation.RESPONSE_MEAN, lengths_R) * recorded["advantages"][mask_RT]
    means_R = torch.stack([row.sum() for row in weighted_K.split(lengths_R.tolist())]) * len(lengths_R)
    assert_matches(means_R, recorded["masked_mean_rows"])
