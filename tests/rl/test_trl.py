"""Our policy loss against the loss of TRL's GRPOTrainer, recorded by ``record_trl.py`` (which says how).

TRL's ``loss_type`` is what the mean is over, and so the ``token_weights`` of a micro-batch:

    grpo     RESPONSE_MEAN    num_responses: every response of the optimiser batch
    dr_grpo  CONSTANT_LENGTH  the same, and constant_length: max_completion_length
    dapo     TOKEN_MEAN       num_tokens: of the optimiser batch
    bnpo     TOKEN_MEAN       num_tokens: of the micro-batch, times the number of micro-batches

Its other options: epsilon is clip_low, epsilon_high clip_high, delta ratio_cap, importance_sampling_level
ratio_level, beta the weight of ``kl_estimate`` by k3 with the same token weights. A response that
mask_truncated_completions masks has no tokens here, and still counts in the mean over responses.

Shapes: B responses, T the longest's tokens, K tokens packed in order, M micro-batches.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from recorded import assert_matches
from rlfr_cli.rl.choices import Aggregation, KLEstimator, RatioLevel
from rlfr_cli.rl.policy_loss import (
    PolicyLossOptions,
    PolicyLossSums,
    combine_sums,
    kl_estimate,
    policy_loss,
    probability_ratios,
    token_weights,
)

TOLERANCE = 1e-6
AGGREGATIONS = {
    "grpo": Aggregation.RESPONSE_MEAN,
    "dr_grpo": Aggregation.CONSTANT_LENGTH,
    "dapo": Aggregation.TOKEN_MEAN,
    "bnpo": Aggregation.TOKEN_MEAN,
}


def read_recorded() -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    path = Path(__file__).with_name("trl_recorded.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["rlfr"])
    return load_file(path), header["cases"]


RECORDED, SETTINGS = read_recorded()
DIFFERING = ("kl_times_ratio", "delta_within_the_clip", "two_optimiser_steps", "huge_ratio_float32")
EQUAL = [case for case in SETTINGS if not case.endswith(DIFFERING)]


def loss_options(trl: dict[str, Any]) -> PolicyLossOptions:
    return PolicyLossOptions(
        clip_low=trl["epsilon"],
        clip_high=trl["epsilon_high"],
        ratio_cap=trl["delta"],
        ratio_level=RatioLevel(trl["importance_sampling_level"]),
    )


def mean_over(trl: dict[str, Any], mask_BT: Tensor, rows_B: Tensor) -> dict[str, Any]:
    """What TRL's mean is over, as arguments of ``token_weights`` for the micro-batch of these rows."""
    return {
        "grpo": {"num_responses": len(mask_BT)},
        "dr_grpo": {"num_responses": len(mask_BT), "constant_length": trl["max_completion_length"]},
        "dapo": {"num_tokens": int(mask_BT.sum())},
        "bnpo": {"num_tokens": int(mask_BT[rows_B].sum()) * trl["gradient_accumulation_steps"]},
    }[trl["loss_type"]]


def given(case: str, name: str) -> Tensor:
    """An input [B, T], as the recording case had it."""
    values_BT = RECORDED[name].clone()
    if name == "old_logprobs":
        values_BT[0, 0] = SETTINGS[case]["given"].get("first_old_logprob", values_BT[0, 0])
    return values_BT


def ours(
    case: str,
    options: PolicyLossOptions | None = None,
    mean: dict[str, Any] | None = None,
    *,
    at_once: bool = False,
    kl_times_ratio: bool = False,
) -> tuple[Tensor, Tensor, list[PolicyLossSums]]:
    """Our losses [M], the gradient [B, T] of their sum, and the sums, of TRL's micro-batches or the whole at once.

    Options and what the mean is over are those that equal the case's, unless others are given.
    """
    trl = SETTINGS[case]
    options = options or loss_options(trl)
    mask_BT, micro_batch_B = RECORDED[f"{case}/mask"], RECORDED[f"{case}/micro_batch"] * (not at_once)
    logprobs_BT, old_BT = given(case, "logprobs").requires_grad_(), given(case, "old_logprobs")
    advantages_BT = RECORDED[f"{case}/advantages"].reshape(len(mask_BT), -1).expand_as(old_BT)
    losses, sums = [], []
    for number in range(int(micro_batch_B.max()) + 1):
        rows_B = micro_batch_B == number
        mask_RT = mask_BT[rows_B]
        weights_K = token_weights(
            AGGREGATIONS[trl["loss_type"]],
            mask_RT.sum(dim=1),
            **(mean_over(trl, mask_BT, rows_B) if mean is None else mean),
        )
        logprobs_K, old_K = logprobs_BT[rows_B][mask_RT], old_BT[rows_B][mask_RT]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask_RT.sum(dim=1).cumsum(0)])
        loss, part = policy_loss(logprobs_K, old_K, advantages_BT[rows_B][mask_RT], weights_K, options, offsets)
        kl_K = kl_estimate(logprobs_K, RECORDED["reference_logprobs"][rows_B][mask_RT], KLEstimator.K3)
        if kl_times_ratio:
            kl_K = kl_K * probability_ratios(logprobs_K - old_K, options.ratio_level, offsets)
        losses.append(loss + trl["beta"] * (kl_K * weights_K).sum())
        sums.append(part)
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), logprobs_BT.grad, sums


def assert_same(case: str, losses_M: Tensor, gradient_BT: Tensor) -> None:
    assert_matches(losses_M, RECORDED[f"{case}/loss"], TOLERANCE)
    assert_matches(gradient_BT, RECORDED[f"{case}/gradient"], TOLERANCE)


@pytest.mark.parametrize("case", EQUAL)
def test_loss_and_gradient_are_trls(case: str) -> None:
    """Each micro-batch's loss, and the gradient that they accumulate; padding has none in either."""
    losses_M, gradient_BT, _ = ours(case)
    assert_same(case, losses_M, gradient_BT)
    assert not RECORDED[f"{case}/gradient"][~RECORDED[f"{case}/mask"]].any()


@pytest.mark.parametrize("case", ["grpo/one_micro_batch", "grpo/sequence_ratio_one_micro_batch"])
def test_the_recorded_inputs_clip_on_both_sides(case: str) -> None:
    """Ratios out of the clip, and past delta, meet advantages of either sign."""
    mask_BT = RECORDED[f"{case}/mask"]
    log_ratio_BT = (RECORDED["logprobs"] - RECORDED["old_logprobs"]) * mask_BT
    if "sequence" in case:
        log_ratio_BT = (log_ratio_BT.sum(dim=1) / mask_BT.sum(dim=1))[:, None].expand_as(mask_BT)
    ratio_BT, positive_BT = log_ratio_BT.exp(), (RECORDED[f"{case}/advantages"] > 0)[:, None]
    for outside_BT in (ratio_BT < 0.8, ratio_BT > 1.28, ratio_BT > 1.5):
        assert (outside_BT & mask_BT & positive_BT).any()
        assert (outside_BT & mask_BT & ~positive_BT).any()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("variant", ["two_micro_batches", "truncated_masked", "together"])
def test_the_whole_batch_at_once_is_trls_accumulation(loss_type: str, variant: str) -> None:
    """With tokens weighted once for the whole optimiser batch, as train-rl does; bnpo has no such weights."""
    case = f"{loss_type}/{variant}"
    loss_M, gradient_BT, _ = ours(case, mean={"num_responses": 8, "constant_length": 10}, at_once=True)
    assert_matches(loss_M, RECORDED[f"{case}/loss"].sum(0, keepdim=True), TOLERANCE)
    assert_matches(gradient_BT, RECORDED[f"{case}/gradient"], TOLERANCE)


def test_bnpo_is_dapo_for_one_micro_batch_only() -> None:
    """Differs on purpose: train-rl has no mean over a micro-batch, whose size is there to save memory only."""
    assert_same("bnpo/one_micro_batch", *ours("dapo/one_micro_batch")[:2])
    theirs = float(RECORDED["bnpo/two_micro_batches/loss"].sum())
    assert abs(float(ours("dapo/two_micro_batches")[0].sum()) / theirs - 1) > 0.01


@pytest.mark.parametrize("case", [case for case in SETTINGS if case.endswith(("/delta", "/together"))])
def test_delta_is_the_ratio_cap_and_the_dual_clip(case: str) -> None:
    """Above 1 + epsilon_high all three bound negative advantages alike; positive ones are clipped before."""
    unbounded = replace(loss_options(SETTINGS[case]), ratio_cap=None)
    assert_same(case, *ours(case, replace(unbounded, ratio_cap=1.5))[:2])
    assert_same(case, *ours(case, replace(unbounded, dual_clip=1.5))[:2])
    unbounded_M, _, _ = ours(case, unbounded)
    assert (unbounded_M - RECORDED[f"{case}/loss"]).abs().max() > 1e-3


def test_a_delta_within_the_clip_bounds_positive_advantages_only() -> None:
    """Differs: below 1 + epsilon_high, delta is TRL's upper clip for A > 0, and 1 + epsilon_high its cap for A < 0.

    So it is another clip_high and a dual_clip; our ratio_cap holds for both signs.
    """
    case = "grpo/delta_within_the_clip"
    options = replace(loss_options(SETTINGS[case]), clip_high=0.1, dual_clip=1.28, ratio_cap=None)
    assert_same(case, *ours(case, options)[:2])
    capped_M, _, _ = ours(case)
    assert (capped_M < RECORDED[f"{case}/loss"] - 1e-3).any()


@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
def test_trls_default_kl_is_ours_with_kl_ratio(loss_type: str) -> None:
    """TRL's default, use_bias_correction_kl, multiplies k3 by the unclipped ratio, gradient included: --kl-ratio."""
    case = f"{loss_type}/kl_times_ratio"
    assert_same(case, *ours(case, kl_times_ratio=True)[:2])
    assert_same(f"{loss_type}/kl", *ours(case)[:2])


@pytest.mark.parametrize(("loss_type", "mean"), [("grpo", {}), ("dr_grpo", {"constant_length": 10})])
def test_trls_mean_over_responses_counts_masked_ones(loss_type: str, mean: dict[str, int]) -> None:
    """Two of eight responses are masked. ``token_weights`` by itself counts the six with tokens, TRL all eight."""
    case = f"{loss_type}/truncated_masked"
    mask_BT, rows_B = RECORDED[f"{case}/mask"], RECORDED[f"{case}/micro_batch"] == 0
    lengths = mask_BT.sum(dim=1)
    assert lengths.tolist() == [6, 2, 4, 0, 3, 0, 6, 2]
    counting_six = token_weights(AGGREGATIONS[loss_type], lengths, **mean)
    counting_all = token_weights(AGGREGATIONS[loss_type], lengths, **mean_over(SETTINGS[case], mask_BT, rows_B))
    torch.testing.assert_close(counting_all, counting_six * 6 / 8)
    losses_M, gradient_BT, _ = ours(case, mean={**mean, "num_responses": 6})
    assert_matches(losses_M * 6 / 8, RECORDED[f"{case}/loss"], TOLERANCE)
    assert_matches(gradient_BT * 6 / 8, RECORDED[f"{case}/gradient"], TOLERANCE)


def test_trls_dapo_divides_by_the_mean_tokens_of_its_optimiser_steps() -> None:
    """Differs on purpose: with several optimiser steps a generation, TRL divides each by their mean tokens.

    The 29 tokens of two steps give 14.5 for both. Ours divides a step by its own tokens: a mean over that step.
    """
    case = "dapo/two_optimiser_steps"
    mask_BT, micro_batch_B = RECORDED[f"{case}/mask"], RECORDED[f"{case}/micro_batch"]
    for micro_batches in ([0, 1], [2, 3]):
        rows_B = torch.isin(micro_batch_B, torch.tensor(micro_batches))
        num_tokens = int(mask_BT[rows_B].sum())
        assert num_tokens != 14.5
        losses_M, gradient_BT, _ = ours(case, mean={"num_tokens": num_tokens})
        theirs = num_tokens / 14.5
        assert_matches(losses_M[micro_batches] * theirs, RECORDED[f"{case}/loss"][micro_batches], TOLERANCE)
        assert_matches(gradient_BT[rows_B] * theirs, RECORDED[f"{case}/gradient"][rows_B], TOLERANCE)


def test_a_ratio_past_float32_leaves_the_gradient_finite() -> None:
    """Differs on purpose: TRL's gradient of that token is NaN in float32. Ours is TRL's in float64."""
    case = "grpo/huge_ratio_float32"
    assert RECORDED[f"{case}/gradient"].isnan().sum() == 1
    assert_same("grpo/huge_ratio_float64", *ours(case)[:2])


@pytest.mark.parametrize("case", [case for case in EQUAL if SETTINGS[case]["loss_type"] == "grpo"])
def test_clip_fraction(case: str) -> None:
    """TRL's clip_ratio/region_mean is our clip_fraction in each micro-batch; ours is the fraction of tokens always.

    Differs on purpose, twice. TRL logs the plain mean over micro-batches, whatever their tokens; our sums add up.
    And with one advantage a response, its sequence ratio counts responses, masked ones too.
    """
    _, _, sums = ours(case)
    theirs_M, tokens_M = RECORDED[f"{case}/clip_ratio"], torch.stack([part.num_tokens for part in sums])
    fractions_M = torch.tensor([part.metrics()["clip_fraction"] for part in sums])
    if RECORDED[f"{case}/advantages"].dim() == 1 and SETTINGS[case]["importance_sampling_level"] == "sequence":
        assert not torch.allclose(fractions_M, theirs_M)
    else:
        torch.testing.assert_close(fractions_M, theirs_M)
    whole = float((fractions_M * tokens_M).sum() / tokens_M.sum())
    assert combine_sums(sums).metrics()["clip_fraction"] == pytest.approx(whole)


def test_clip_fraction_of_sequence_ratios_by_hand() -> None:
    """The first three of eight responses are clipped, with 12 of the 29 tokens: 3 / 8 in TRL, 12 / 29 here."""
    case = "grpo/sequence_ratio_one_micro_batch"
    assert RECORDED[f"{case}/mask"].sum(dim=1).tolist() == [6, 2, 4, 1, 3, 5, 6, 2]
    assert RECORDED[f"{case}/clip_ratio"].tolist() == [3 / 8]
    assert ours(case)[2][0].metrics()["clip_fraction"] == pytest.approx(12 / 29)


@pytest.mark.parametrize("variant", ["kl", "together"])
def test_trls_kl_metric_is_the_token_mean_of_k3(variant: str) -> None:
    case = f"grpo/{variant}"
    for number, theirs in enumerate(RECORDED[f"{case}/kl"]):
        rows_B = RECORDED[f"{case}/micro_batch"] == number
        mask_RT = RECORDED[f"{case}/mask"][rows_B]
        kl_K = kl_estimate(
            RECORDED["logprobs"][rows_B][mask_RT], RECORDED["reference_logprobs"][rows_B][mask_RT], KLEstimator.K3
        )
        torch.testing.assert_close(kl_K.mean(), theirs)
