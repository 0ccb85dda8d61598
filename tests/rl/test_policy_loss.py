"""The policy loss: worked by hand, its gradients, and that micro-batches change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.choices import Aggregation, KLEstimator, RatioLevel
from rlfr_cli.rl.policy_loss import (
    PolicyLossOptions,
    combine_sums,
    kl_estimate,
    policy_loss,
    token_weights,
)

PLAIN = PolicyLossOptions()


def loss_and_gradient(ratio: float, advantage: float, options: PolicyLossOptions) -> tuple[float, float]:
    """Of one token of weight 1; the gradient is with respect to its log-probability."""
    old = torch.tensor([-1.5])
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss, _ = policy_loss(logprobs, old, torch.tensor([advantage]), torch.ones(1), options)
    loss.backward()
    return loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # never clipped from below for a positive advantage
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert loss_and_gradient(ratio, advantage, PLAIN) == pytest.approx((loss, gradient))


def test_separate_bounds() -> None:
    options = PolicyLossOptions(clip_low=0.1, clip_high=0.4)
    assert loss_and_gradient(2.0, 1.0, options)[0] == pytest.approx(-1.4)
    assert loss_and_gradient(0.5, -1.0, options)[0] == pytest.approx(0.9)


def test_ratio_cap_and_dual_clip_bound_a_negative_advantage() -> None:
    assert loss_and_gradient(5.0, -2.0, PLAIN) == pytest.approx((10, 10))
    assert loss_and_gradient(5.0, -2.0, PolicyLossOptions(ratio_cap=3)) == pytest.approx((6, 0))
    assert loss_and_gradient(5.0, -2.0, PolicyLossOptions(dual_clip=4)) == pytest.approx((8, 0))
    assert loss_and_gradient(3.5, -2.0, PolicyLossOptions(dual_clip=4)) == pytest.approx((7, 7))
    assert loss_and_gradient(5.0, 2.0, PolicyLossOptions(dual_clip=4)) == pytest.approx((-2.4, 0))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_huge_ratio_gives_no_nan(advantage: float) -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss, sums = policy_loss(logprobs, torch.tensor([-500.0]), torch.tensor([advantage]), torch.ones(1), PLAIN)
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert all(math.isfinite(value) for value in sums.metrics().values())


def test_weights_by_hand() -> None:
    lengths = torch.tensor([1, 3, 0])
    response = token_weights(Aggregation.RESPONSE_MEAN, lengths)
    assert response.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert token_weights(Aggregation.TOKEN_MEAN, lengths).tolist() == pytest.approx([1 / 4] * 4)
    constant = token_weights(Aggregation.CONSTANT_LENGTH, lengths, constant_length=10)
    assert constant.tolist() == pytest.approx([1 / 20] * 4)
    of_more = token_weights(Aggregation.RESPONSE_MEAN, lengths, num_responses=8)
    assert of_more.tolist() == pytest.approx([1 / 8, 1 / 24, 1 / 24, 1 / 24])
    assert token_weights(Aggregation.TOKEN_MEAN, lengths, num_tokens=16).tolist() == [1 / 16] * 4
    with pytest.raises(ConfigError, match="constant length"):
        token_weights(Aggregation.CONSTANT_LENGTH, lengths)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_weights_of_a_mean_sum_to_one(lengths: list[int]) -> None:
    for aggregation in (Aggregation.RESPONSE_MEAN, Aggregation.TOKEN_MEAN):
        total = float(token_weights(aggregation, torch.tensor(lengths)).sum())
        assert total == pytest.approx(1, abs=1e-5)


def random_tokens(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    old = -torch.rand(num_tokens)
    return old + 0.4 * torch.randn(num_tokens), old, torch.randn(num_tokens)


@pytest.mark.parametrize("level", list(RatioLevel))
@pytest.mark.parametrize("aggregation", [Aggregation.RESPONSE_MEAN, Aggregation.TOKEN_MEAN])
def test_micro_batches_add_up(aggregation: Aggregation, level: RatioLevel) -> None:
    """Loss, gradient and metrics of two unequal micro-batches equal those of the whole."""
    lengths, options = [2, 5, 1, 4], PolicyLossOptions(ratio_level=level)
    logprobs, old, advantage = random_tokens(sum(lengths))
    weights = token_weights(aggregation, torch.tensor(lengths))

    def run(first: int, last: int) -> tuple[Tensor, Tensor, object]:
        at = slice(sum(lengths[:first]), sum(lengths[:last]))
        inputs = logprobs[at].clone().requires_grad_()
        offsets = torch.tensor([0, *lengths[first:last]]).cumsum(0)
        loss, sums = policy_loss(inputs, old[at], advantage[at], weights[at], options, offsets)
        loss.backward()
        return loss.detach(), inputs.grad, sums

    whole, parts = run(0, 4), [run(0, 1), run(1, 4)]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])
    assert combine_sums([part[2] for part in parts]).metrics() == pytest.approx(whole[2].metrics())


def test_sequence_ratio_by_hand() -> None:
    """Log-ratios 0.3 and -0.1 have the mean 0.1, which both tokens take; the other has its own."""
    logprobs = torch.tensor([0.3, -0.1, 0.15], requires_grad=True)
    advantage, weights = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.25, 0.25, 0.5])
    options = PolicyLossOptions(ratio_level=RatioLevel.SEQUENCE)
    loss, sums = policy_loss(logprobs, torch.zeros(3), advantage, weights, options, torch.tensor([0, 2, 3]))
    loss.backward()
    first, second = math.exp(0.1), math.exp(0.15)
    assert loss.item() == pytest.approx(-0.5 * first + 0.5 * second)
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * first, -0.25 * first, 0.5 * second])
    assert sums.metrics()["ratio_max"] == pytest.approx(second)


def test_metrics_by_hand() -> None:
    """Ratios 1, 1.5, 1.3 and 0.5 with advantages of 1: the second and third are clipped."""
    logprobs = torch.log(torch.tensor([1.0, 1.5, 1.3, 0.5]))
    _, sums = policy_loss(logprobs, torch.zeros(4), torch.ones(4), torch.ones(4) / 4, PLAIN)
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in (1.0, 1.5, 1.3, 0.5)) / 4
    assert sums.metrics() == pytest.approx(
        {"clip_fraction": 0.5, "approximate_kl": k3, "ratio_mean": 4.3 / 4, "ratio_max": 1.5}
    )


def test_no_tokens() -> None:
    empty = torch.zeros(0)
    loss, sums = policy_loss(empty, empty, empty, empty, PLAIN)
    assert float(loss) == 0
    assert sums.metrics()["clip_fraction"] == 0


def test_kl_estimators_by_hand_and_on_average() -> None:
    """p = 0.5, q = 0.25: d = log 2. Drawn from p, the means of k1 and k3 are the true KL."""
    p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    d = math.log(2)
    assert float(kl_estimate(p, q, KLEstimator.K1)) == pytest.approx(d)
    assert float(kl_estimate(p, q, KLEstimator.K2)) == pytest.approx(d * d / 2)
    assert float(kl_estimate(p, q, KLEstimator.K3)) == pytest.approx(0.5 - 1 + d)
    policy, other = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    true_kl = float((policy * (policy / other).log()).sum())
    for estimator in (KLEstimator.K1, KLEstimator.K3):
        expected = float((policy * kl_estimate(policy.log(), other.log(), estimator)).sum())
        assert expected == pytest.approx(true_kl, abs=1e-6)
