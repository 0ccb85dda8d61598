"""From measured rollouts to a batch: which groups stay, which responses are masked, what their tokens are paid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.rl import PolicyLossConfig
from rlfr_cli.rl.choices import Estimator, KLEstimator, KLPlace, UniformGroups
from rlfr_cli.rl.correction import CorrectionOptions
from rlfr_cli.rl.measuring import Measurement
from rlfr_cli.rl.training_batch import BuiltBatch, build_training_batch, uniform_groups
from tiny_policies import rollout_rows

REFERENCE = "reference"  # named only, so that a config may speak of its KL


def rows_of(rewards: list[float], length: int = 3) -> list[RolloutRow]:
    rows = rollout_rows([(4, length)] * len(rewards))
    for row, reward in zip(rows, rewards, strict=True):
        row.reward = reward
    return rows


def measurement(rows: list[RolloutRow], flow_reward: float = 0.0) -> Measurement:
    """Log-probabilities -1, entropies 1 and flow rewards that are all alike."""
    lengths = [len(row.response_token_ids) for row in rows]
    return Measurement(
        logprobs=[torch.full((length,), -1.0) for length in lengths],
        entropies=[torch.full((length,), 1.0) for length in lengths],
        flow_rewards=[torch.full((length,), flow_reward) for length in lengths],
    )


def build(
    rows: list[RolloutRow],
    measured: Measurement,
    reference: list[torch.Tensor] | None = None,
    uniform: UniformGroups = UniformGroups.KEEP,
    correction: CorrectionOptions | None = None,
    **options: Any,
) -> BuiltBatch:
    config = PolicyLossConfig(**{"estimator": Estimator.MEAN_ONLY, **options})
    return build_training_batch(
        rows,
        measured,
        reference,
        config,
        group_size=2,
        uniform=uniform,
        correction=correction,
        temperature=1.0,
        max_new_tokens=8,
    )


def test_a_group_of_equal_rewards_is_uniform_whatever_its_place() -> None:
    assert uniform_groups([1, 1, 0, 1, 0.5, 0.5], 2) == [True, True, False, False, True, True]


def test_uniform_groups_that_stay_are_trained_by_token_rewards_alone() -> None:
    rows = rows_of([1, 1, 0, 1])
    built = build(rows, measurement(rows, flow_reward=-0.1))
    assert len(built.batch.sequences) == 4
    assert built.advantages[0].tolist() == pytest.approx([-0.3, -0.2, -0.1])
    assert built.advantages[3].tolist() == pytest.approx([0.2, 0.3, 0.4])


def test_uniform_groups_that_go_leave_the_batch_and_its_mean() -> None:
    rows = rows_of([1, 1, 0, 1])
    built = build(rows, measurement(rows, flow_reward=-0.1), uniform=UniformGroups.DROP)
    assert [list(s.response) for s in built.batch.sequences] == [row.response_token_ids for row in rows[2:]]
    assert [a.tolist() for a in built.advantages[:2]] == [[0, 0, 0]] * 2
    assert built.batch.advantages[1].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert len(built.batch.in_loss) == len(built.batch.old_logprobs) == 2


def test_nothing_is_left_where_all_groups_are_uniform() -> None:
    rows = rows_of([1, 1, 0, 0])
    built = build(rows, measurement(rows), uniform=UniformGroups.DROP)
    assert built.batch.sequences == built.batch.advantages == []
    assert all(not bool(a.any()) for a in built.advantages)


def test_whitening_is_over_the_responses_that_stay() -> None:
    rows = rows_of([1, 1, 0, 1])
    built = build(rows, measurement(rows), uniform=UniformGroups.DROP, estimator=Estimator.REINFORCE_BASELINE)
    kept = torch.cat(built.batch.advantages)
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.square().mean()) == pytest.approx(1, rel=1e-5)


def test_cut_off_responses_are_masked_and_still_compared_with() -> None:
    rows = rows_of([0, 1, 0, 1])
    rows[0].finish_reason = "length"
    plain, masked = build(rows, measurement(rows)), build(rows, measurement(rows), mask_cut_off=True)
    assert plain.batch.in_loss == [True] * 4
    assert masked.batch.in_loss == [False, True, True, True]
    assert masked.advantages[1].tolist() == plain.advantages[1].tolist() == [0.5, 0.5, 0.5]


def test_kl_in_the_reward_is_a_penalty_on_what_moved_away() -> None:
    """d = logprob - reference = 0.5 on the second token; k1 pays -0.1 d there, and returns carry it to the first."""
    rows = rows_of([1, 1])
    reference = [torch.tensor([-1.0, -1.5, -1.0]), torch.full((3,), -1.0)]
    built = build(
        rows,
        measurement(rows),
        reference,
        kl_coef=0.1,
        kl_in=KLPlace.REWARD,
        kl_estimator=KLEstimator.K1,
        reference_model=REFERENCE,
    )
    assert built.advantages[0].tolist() == pytest.approx([-0.05, -0.05, 0])
    assert built.advantages[1].tolist() == [0, 0, 0]
    assert built.batch.reference_logprobs is None  # not paid for a second time


def test_kl_in_the_loss_goes_to_the_loss() -> None:
    rows = rows_of([1, 1])
    reference = [torch.full((3,), -1.5), torch.full((3,), -1.0)]
    built = build(rows, measurement(rows), reference, kl_coef=0.1, reference_model=REFERENCE)
    assert built.advantages[0].tolist() == [0, 0, 0]
    assert built.batch.reference_logprobs is not None
    assert torch.equal(built.batch.reference_logprobs[0], reference[0])


def test_kl_to_the_reference_is_measured_without_being_paid_for() -> None:
    """k3 of d = 0.5 on half the tokens: exp(-0.5) - 1 + 0.5."""
    rows = rows_of([0, 1])
    reference = [torch.full((3,), -1.5), torch.full((3,), -1.0)]
    built = build(rows, measurement(rows), reference, reference_model=REFERENCE)
    assert built.kl_to_reference == pytest.approx(0.10653 / 2, abs=1e-5)
    assert built.batch.reference_logprobs is None
    assert build(rows, measurement(rows)).kl_to_reference is None


def test_the_entropy_advantage_is_added_and_capped() -> None:
    """A = ±0.5; 0.1 × H = 0.1 is below |A| / 2 = 0.25, and 0.4 × H = 0.4 above it."""
    rows = rows_of([0, 1])
    small = build(rows, measurement(rows), entropy_advantage=0.1)
    large = build(rows, measurement(rows), entropy_advantage=0.4)
    assert [a.tolist() for a in small.advantages] == [pytest.approx([-0.4] * 3), pytest.approx([0.6] * 3)]
    assert [a.tolist() for a in large.advantages] == [pytest.approx([-0.25] * 3), pytest.approx([0.75] * 3)]
    # No outcome, no bonus: it follows advantages and makes none.
    uniform = rows_of([1, 1])
    assert build(uniform, measurement(uniform), entropy_advantage=0.4).advantages[0].tolist() == [0, 0, 0]


def test_the_gap_to_the_engine_weights_the_responses_that_stay() -> None:
    """Trainer e^-1; the engine drew the second group's first token at e^-1.5: ratio e^0.5, truncated at 1.2."""
    rows = rows_of([1, 1, 0, 1])
    rows[2].response_logprobs = [-1.5, -1.0, -0.5]
    built = build(rows, measurement(rows), uniform=UniformGroups.DROP, correction=CorrectionOptions(cap=1.2))
    assert built.batch.corrections is not None
    assert [w.tolist() for w in built.batch.corrections] == [pytest.approx([1.2, 1, 0.6065], abs=1e-4), [1, 1, 1]]
    assert build(rows, measurement(rows)).batch.corrections is None
