"""Metrics of a rollout batch, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.rl.correction import CorrectionOptions
from rlfr_cli.rl.measuring import Measurement
from rlfr_cli.rl.metrics import advantage_metrics, flow_metrics, measurement_metrics, rollout_metrics
from tiny_policies import rollout_row

NAN = math.nan


def row(length: int, **facts: object):  # type: ignore[no-untyped-def]
    return rollout_row(TokenSequence((1,), tuple(range(length))), **facts)


def test_rollouts_by_hand() -> None:
    rows = [
        row(4, reward=1.0),
        row(2, reward=0.5, grade="wrong"),
        row(6, reward=0.0, finish_reason="length"),  # correct, but cut off: not accuracy
        row(8, reward=0.0, grade="no_answer"),
        row(4, reward=0.5, grade="unparseable"),
        row(6, reward=0.5, grade="timeout"),
    ]
    assert rollout_metrics(rows, group_size=2) == pytest.approx(
        {
            "rollout/reward": 2.5 / 6,
            "rollout/accuracy": 1 / 6,
            "rollout/response_tokens": 5.0,
            "rollout/cut_off_fraction": 1 / 6,
            "rollout/zero_variance_group_fraction": 2 / 3,
            "grader/no_answer_fraction": 1 / 6,
            "grader/unparseable_fraction": 1 / 6,
            "grader/timeout_fraction": 1 / 6,
        }
    )


def test_gap_between_engine_and_trainer_by_hand() -> None:
    """Tokens were drawn from the engine, so exp(trainer - engine) - 1 + engine - trainer estimates its KL."""
    rows = [row(2, response_logprobs=[-1.0, -2.0]), row(1, response_logprobs=[-3.0])]
    measured = Measurement(
        [torch.tensor([-1.0, -2.5]), torch.tensor([-2.0])], [torch.tensor([1.0, 2.0]), torch.ones(1)]
    )
    metrics = measurement_metrics(rows, measured, (0.8, 1.2), CorrectionOptions())
    assert metrics["policy/entropy"] == pytest.approx(4 / 3)
    assert metrics["engine/logprob_gap_max"] == pytest.approx(1.0)
    wanted = (math.exp(-0.5) - 1 + 0.5 + math.exp(1.0) - 1 - 1.0) / 3
    assert metrics["engine/kl_to_trainer"] == pytest.approx(wanted, rel=1e-5)


def test_advantages_by_hand() -> None:
    metrics = advantage_metrics([torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 0.0])])
    assert metrics == pytest.approx(
        {
            "advantage/mean": -0.75,
            "advantage/std": math.sqrt((1.75**2 + 0.25**2 + 2.25**2 + 0.75**2) / 3),
            "advantage/min": -3.0,
            "advantage/max": 1.0,
            "advantage/negative_fraction": 0.5,
        }
    )
    assert advantage_metrics([torch.tensor([2.0])])["advantage/std"] == 0


def measured_flow(deviations: list[list[float]], rewards: list[list[float]]) -> Measurement:
    tensors = [torch.tensor(values) for values in deviations]
    return Measurement(
        logprobs=[torch.zeros_like(t) for t in tensors],
        entropies=[torch.zeros_like(t) for t in tensors],
        deviations=tensors,
        scores=tensors,
        flow_rewards=[torch.tensor(values) for values in rewards],
    )


def test_flow_by_hand() -> None:
    """Three correct responses deviate by 1, 2 and 5, two wrong ones by 4 and 6: 5 of 6 pairs the right way."""
    rows = [row(2), row(2), row(2), row(2, grade="wrong"), row(3, finish_reason="length")]
    measured = measured_flow(
        [[1.0, NAN], [2.0, NAN], [5.0, NAN], [4.0, NAN], [5.0, 7.0, NAN]],
        [[0.0, 0.0], [-0.01, 0.0], [0.0, 0.0], [-0.02, 0.0], [-0.01, -0.03, 0.0]],
    )
    assert flow_metrics(rows, measured) == pytest.approx(
        {
            "flow/deviation": 18 / 5,
            "flow/deviation_correct": 8 / 3,
            "flow/deviation_wrong": 5.0,
            "flow/auc": 5 / 6,
            "flow/rewarded_fraction": 4 / 6,
            "flow/reward_sum_correct": -0.01 / 3,
            "flow/reward_sum_wrong": -0.03,
        }
    )


def test_without_a_class_or_a_valid_token_there_is_no_number() -> None:
    rows = [row(1), row(2)]
    metrics = flow_metrics(rows, measured_flow([[NAN], [3.0, NAN]], [[0.0], [0.0, 0.0]]))
    assert metrics["flow/auc"] is None
    assert metrics["flow/deviation_wrong"] is None
    assert metrics["flow/reward_sum_wrong"] is None
    assert metrics["flow/deviation"] == metrics["flow/deviation_correct"] == 3.0
    nothing = flow_metrics(rows[:1], measured_flow([[NAN]], [[0.0]]))
    assert nothing["flow/deviation"] is None
    assert nothing["flow/rewarded_fraction"] == 0
