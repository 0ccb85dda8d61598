"""Advantages: worked by hand, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.advantages import advantages, normalise_outcomes, returns, token_rewards, whiten
from rlfr_cli.rl.choices import Estimator


def relative(rewards: list[float], estimator: Estimator, groups: list[int] | None = None) -> list[float]:
    group_R = torch.tensor(groups if groups is not None else [0] * len(rewards))
    return normalise_outcomes(torch.tensor(rewards), group_R, estimator).tolist()


def test_estimators_by_hand() -> None:
    """Rewards 1, 0, 0.5, 0.5: mean 0.5, unbiased variance (0.25 + 0.25) / 3."""
    rewards, std = [1.0, 0.0, 0.5, 0.5], math.sqrt(0.5 / 3)
    assert relative(rewards, Estimator.GROUP_NORM) == pytest.approx([0.5 / std, -0.5 / std, 0, 0])
    assert relative(rewards, Estimator.MEAN_ONLY) == pytest.approx([0.5, -0.5, 0, 0])
    assert relative(rewards, Estimator.LEAVE_ONE_OUT) == pytest.approx([1 - 1 / 3, -2 / 3, 0, 0])
    assert relative(rewards, Estimator.REINFORCE_BASELINE) == pytest.approx([0.5, -0.5, 0, 0])


@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_a_group_of_equal_rewards_gets_exactly_zero(estimator: Estimator, reward: float) -> None:
    """In float64 too, where the mean of seven times 0.1 is not 0.1."""
    assert relative([reward] * 7, estimator) == [0.0] * 7
    doubles, group_R = torch.full((7,), reward, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    assert normalise_outcomes(doubles, group_R, estimator).tolist() == [0.0] * 7


@pytest.mark.parametrize("estimator", list(Estimator))
def test_a_group_of_one_is_refused(estimator: Estimator) -> None:
    with pytest.raises(ConfigError, match="group of 1 response") as refused:
        relative([1.0, 0.0, 1.0], estimator, groups=[4, 4, 9])
    assert "--group-size" in str(refused.value)


rewards_and_groups = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=8), min_size=1, max_size=4
)


@given(rewards_and_groups, st.randoms())
def test_groups_sum_to_zero_in_any_order(groups: list[list[float]], random) -> None:
    rows = [(group, reward) for group, rewards in enumerate(groups) for reward in rewards]
    random.shuffle(rows)
    ours = relative([reward for _, reward in rows], Estimator.GROUP_NORM, [group for group, _ in rows])
    for group, rewards in enumerate(groups):
        mine = [(value, row[1]) for value, row in zip(ours, rows, strict=True) if row[0] == group]
        assert sum(value for value, _ in mine) == pytest.approx(0, abs=1e-5)
        if len(set(rewards)) > 1:
            assert torch.tensor([value for value, _ in mine]).std().item() == pytest.approx(1, abs=1e-5)
            best = max(mine, key=lambda pair: pair[1])
            assert best[0] > 0


def test_outcome_sits_on_the_last_token() -> None:
    offsets = torch.tensor([0, 3, 3, 5])
    flow = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    rewards = token_rewards(torch.tensor([10.0, 99.0, 20.0]), flow, offsets)
    assert rewards.tolist() == pytest.approx([0.1, 0.2, 10.3, 0.4, 20.5])
    assert flow[2] == pytest.approx(0.3)


def test_returns_by_hand() -> None:
    """Discount 0.5 on 1, 2, 4 | 8: 1 + 0.5 * (2 + 0.5 * 4) = 3, 4, 4 | 8."""
    offsets, rewards = torch.tensor([0, 3, 3, 4]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert returns(rewards, offsets, 0.5).tolist() == [3, 4, 4, 8]
    assert returns(rewards, offsets, 1.0).tolist() == [7, 6, 4, 8]
    assert returns(rewards, offsets, 0.0).tolist() == rewards.tolist()
    assert returns(torch.zeros(0), torch.tensor([0])).tolist() == []


@given(st.lists(st.lists(st.floats(-2, 2), max_size=7), min_size=1, max_size=4), st.floats(0, 1))
def test_returns_against_the_sum(rewards: list[list[float]], discount: float) -> None:
    offsets = torch.tensor([0, *(len(response) for response in rewards)]).cumsum(0)
    packed = torch.tensor([reward for response in rewards for reward in response])
    wanted = [
        sum(discount ** (j - k) * response[j] for j in range(k, len(response)))
        for response in rewards
        for k in range(len(response))
    ]
    assert returns(packed, offsets, discount).tolist() == pytest.approx(wanted, abs=1e-5)


def test_whitening_by_hand() -> None:
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])
    assert whiten(torch.full((3,), 0.1)).tolist() == [0, 0, 0]
    assert whiten(torch.zeros(0)).tolist() == []


def test_advantages_of_a_batch() -> None:
    """Two responses of a group, one right; a penalty of 0.1 on the first token of each."""
    offsets, flow = torch.tensor([0, 2, 4]), torch.tensor([-0.1, 0.0, -0.1, 0.0])
    outcomes, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    plain = advantages(outcomes, group, flow, offsets, estimator=Estimator.MEAN_ONLY)
    assert plain.tolist() == pytest.approx([0.4, 0.5, -0.6, -0.5])
    whitened = advantages(outcomes, group, flow, offsets, estimator=Estimator.REINFORCE_BASELINE)
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened.std(correction=0)) == pytest.approx(1)
    assert whitened.argsort().tolist() == plain.argsort().tolist()


def test_without_flow_reward_an_equal_group_has_no_advantage() -> None:
    outcomes, group = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64)
    ours = advantages(outcomes, group, torch.zeros(9), torch.tensor([0, 3, 5, 9]))
    assert ours.tolist() == [0.0] * 9
