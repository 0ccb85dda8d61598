"""Families 06 and 07 of the recorded vectors: rewards, returns and the policy loss of the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recorded import assert_matches, load_recorded
from rlfr_cli.flow.choices import Normalise
from rlfr_cli.flow.shaping import ShapedScores, ShapingOptions, shape_scores
from rlfr_cli.rl.advantages import normalise_outcomes, returns, token_rewards
from rlfr_cli.rl.choices import Aggregation, Estimator, KLEstimator
from rlfr_cli.rl.policy_loss import PolicyLossOptions, kl_estimate, policy_loss, token_weights

PUBLISHED = {
    "group_norm": Estimator.GROUP_NORM,
    "rloo": Estimator.LEAVE_ONE_OUT,
    "reinforce_baseline": Estimator.MEAN_ONLY,  # recorded without the whitening
}


def offsets_of(mask_RT: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), mask_RT.bool().sum(dim=1).cumsum(0)])


def shape_recorded(scores_RT: Tensor, mask_RT: Tensor, hyper: dict, normalise: Normalise) -> ShapedScores:
    options = ShapingOptions(
        normalise=normalise,
        threshold=hyper["flow_score_threshold"],
        top_k=hyper["flow_score_topk"],
        coefficient=hyper["flow_coef"],
    )
    scores_K = scores_RT[mask_RT.bool()]
    return shape_scores(scores_K, torch.ones_like(scores_K, dtype=torch.bool), offsets_of(mask_RT), options)


@pytest.mark.parametrize("name", ["s61", "s62"])
@pytest.mark.parametrize("published", PUBLISHED)
def test_rewards_and_returns(shared: Path, name: str, published: str) -> None:
    """From their normalised score on: all rows agree."""
    recorded, info = load_recorded(shared, f"06_returns_{name}")
    hyper, mask_RT = info["hyper"], recorded["in/mask"]
    offsets = offsets_of(mask_RT)
    group_R = torch.arange(hyper["n_prompts"]).repeat_interleave(hyper["n_samples_per_prompt"])
    relative_R = normalise_outcomes(recorded["in/reward"], group_R, PUBLISHED[published])
    normalised_RT = recorded[f"{published}/score_normalised"]
    flow_reward_K = shape_recorded(normalised_RT, mask_RT, hyper, Normalise.NONE).flow_reward_K
    penalty_K = -hyper["kl_coef"] * recorded["in/kl"][mask_RT.bool()]
    rewards_K = token_rewards(relative_R, flow_reward_K + penalty_K, offsets)
    advantages_K = returns(rewards_K, offsets, hyper["gamma"])
    assert_matches(relative_R, recorded[f"{published}/shaped_reward"])
    assert_matches(rewards_K, recorded[f"{published}/token_reward"][mask_RT.bool()])
    assert_matches(advantages_K, recorded[f"{published}/advantages"][mask_RT.bool()])


@pytest.mark.parametrize("name", ["s61", "s62"])
def test_shaping_from_the_raw_score(shared: Path, name: str) -> None:
    """Differs on purpose: in a row without padding their minimum is the second smallest value."""
    recorded, info = load_recorded(shared, f"06_returns_{name}")
    hyper, mask_RT = info["hyper"], recorded["in/mask"].bool()
    raw_RT, theirs_RT = recorded["in/raw_score"], recorded["group_norm/score_normalised"]
    shaped = shape_recorded(raw_RT, mask_RT, hyper, Normalise.MINMAX).shaped_K.split(mask_RT.sum(1).tolist())
    num_agreeing = 0
    for row, ours in enumerate(shaped):
        values, theirs = raw_RT[row][mask_RT[row]], theirs_RT[row][mask_RT[row]]
        share = (values - values.min()) / (values.max() - values.min())
        kept = sorted(range(len(share)), key=lambda k: -share[k])[: hyper["flow_score_topk"]]
        wanted = torch.zeros_like(share)
        wanted[kept] = torch.where(share[kept] > hyper["flow_score_threshold"], share[kept], 0.0)
        assert_matches(ours, wanted)
        if theirs.min() >= 0:
            num_agreeing += 1
            assert_matches(ours[ours > 0], theirs[ours > 0])
    assert 0 < num_agreeing < len(shaped)


@pytest.mark.parametrize(
    ("case", "options", "aggregation"),
    [
        ("ppo", {}, Aggregation.RESPONSE_MEAN),
        ("as_trainer_use_dapo_false", {}, Aggregation.RESPONSE_MEAN),
        ("ppo_wide", {"clip_low": 0.3, "clip_high": 0.3}, Aggregation.RESPONSE_MEAN),
        ("dapo", {"clip_high": 0.28}, Aggregation.TOKEN_MEAN),
    ],
)
def test_policy_loss(shared: Path, case: str, options: dict, aggregation: Aggregation) -> None:
    recorded, info = load_recorded(shared, "07_policy_loss_s71")
    mask_RT = recorded["mask"].bool()
    logprobs_K = recorded["log_probs"][mask_RT].requires_grad_()
    loss, _ = policy_loss(
        logprobs_K,
        recorded["old_log_probs"][mask_RT],
        recorded["advantages"][mask_RT],
        token_weights(aggregation, mask_RT.sum(dim=1)),
        PolicyLossOptions(ratio_cap=info["hyper"]["ratio_cap"], **options),
    )
    loss.backward()
    assert_matches(loss.detach()[None], recorded[f"{case}/loss"])
    assert_matches(logprobs_K.grad, recorded[f"{case}/grad"][mask_RT], 1e-4)


def test_use_dapo_changes_the_loss(shared: Path) -> None:
    """Differs on purpose: --use_dapo gives the plain loss there; the bound and the token mean act here."""
    recorded, _ = load_recorded(shared, "07_policy_loss_s71")
    assert torch.equal(recorded["as_trainer_use_dapo_true/loss"], recorded["ppo/loss"])
    assert not torch.allclose(recorded["dapo/loss"], recorded["ppo/loss"])


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_kl_estimators(shared: Path, estimator: KLEstimator) -> None:
    recorded, _ = load_recorded(shared, "07_policy_loss_s71")
    mask_RT = recorded["mask"].bool()
    ours_K = kl_estimate(recorded["log_probs"][mask_RT], recorded["old_log_probs"][mask_RT], estimator)
    assert_matches(ours_K, recorded[f"kl/{estimator.value}"][mask_RT])
