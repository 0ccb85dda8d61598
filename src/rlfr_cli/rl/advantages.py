"""From outcome rewards and flow rewards to an advantage for every response token.

The outcome reward is normalised within its group (``Estimator``) and sits on a response's last token; flow
rewards sit on theirs; A[k] = sum over j >= k of discount^(j - k) * reward[j].

Sources: group-norm, GRPO (Shao et al., 2024); mean-only, Dr. GRPO (Liu et al., 2025); leave-one-out, RLOO
(Ahmadian et al., 2024); reinforce-baseline, REINFORCE++ (Hu, 2025); ``entropy_shaped``, Cheng et al. (2025).

Shapes: R responses, K response tokens packed in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlfr_cli.errors import ConfigError
from rlfr_cli.rl.choices import Estimator

STD_EPSILON = 1e-9


def normalise_outcomes(rewards_R: Tensor, group_R: Tensor, estimator: Estimator) -> Tensor:
    """Outcome rewards [R] relative to their group, float32; a group of equal rewards gets exactly 0.

    Args:
        rewards_R: outcome rewards.
        group_R: int64, which group each response belongs to; any numbers, in any order.

    Raises:
        ConfigError: a group of one response, which has nothing to be compared with.
    """
    rewards = rewards_R.double()
    _, of_group_R, sizes = torch.unique(group_R, return_inverse=True, return_counts=True)
    if rewards.numel() and int(sizes.min()) < 2:
        raise ConfigError(
            f"a group of 1 response was given to the estimator {estimator.value}; a group needs 2 or more",
            hint="draw more responses for each problem with --group-size",
        )
    means = rewards.new_zeros(sizes.numel()).index_add_(0, of_group_R, rewards) / sizes
    centred_R = rewards - means[of_group_R]
    if estimator is Estimator.GROUP_NORM:
        squares = torch.zeros_like(means).index_add_(0, of_group_R, centred_R.square())
        stds = (squares / (sizes - 1)).sqrt()
        relative_R = centred_R / (stds + STD_EPSILON)[of_group_R]
    elif estimator is Estimator.LEAVE_ONE_OUT:
        relative_R = centred_R * (sizes / (sizes - 1))[of_group_R]
    else:
        relative_R = centred_R
    # Rounding of the mean would otherwise be divided by the epsilon.
    highest = torch.zeros_like(means).scatter_reduce(0, of_group_R, rewards, "amax", include_self=False)
    lowest = torch.zeros_like(means).scatter_reduce(0, of_group_R, rewards, "amin", include_self=False)
    return torch.where((highest == lowest)[of_group_R], 0.0, relative_R).float()


def token_rewards(outcomes_R: Tensor, flow_rewards_K: Tensor, response_offsets: Tensor) -> Tensor:
    """Rewards [K]: each token's flow reward, and on a response's last token its outcome too."""
    rewards_K = flow_rewards_K.clone()
    filled_R = response_offsets.diff() > 0
    rewards_K[response_offsets[1:][filled_R] - 1] += outcomes_R[filled_R].to(rewards_K)
    return rewards_K


def returns(rewards_K: Tensor, response_offsets: Tensor, discount: float = 1.0) -> Tensor:
    """A[k] = sum over j >= k of discount^(j - k) * reward[j] within each response: float32 [K]."""
    lengths_R = response_offsets.diff()
    out_K = rewards_K.double().clone()
    # Backwards from every response's last token at once; running is the return one token later.
    running_R = out_K.new_zeros(lengths_R.numel())
    for steps_back in range(1, int(lengths_R.max()) + 1 if lengths_R.numel() else 1):
        active_R = lengths_R >= steps_back
        at = response_offsets[1:][active_R] - steps_back
        running_R[active_R] = out_K[at] + discount * running_R[active_R]
        out_K[at] = running_R[active_R]
    return out_K.float()


def whiten(advantages_K: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """Advantages of a whole batch with mean 0 and standard deviation 1 over its tokens; all equal gives 0.

    Args:
        total: sums a tensor over the processes that hold parts of the batch; each calls this, with no tokens too.
    """
    values_K = advantages_K.double()
    count, value_sum = total(torch.stack([values_K.new_tensor(float(values_K.numel())), values_K.sum()])).unbind()
    centred_K = values_K - value_sum / count.clamp(min=1)
    variance = total(centred_K.square().sum()) / count.clamp(min=1)
    # Equal values leave no more than the rounding of their mean.
    if float(variance.sqrt()) <= 1e-12 * max(1.0, abs(float(value_sum))):
        return torch.zeros_like(advantages_K)
    return (centred_K / (variance.sqrt() + STD_EPSILON)).float()


def entropy_shaped(advantages_K: Tensor, entropies_K: Tensor, *, scale: float, cap: float) -> Tensor:
    """A + min(scale * H, |A| / cap) [K], of entropies H in nats: it never changes a sign, as ``cap`` is above 1.

    Source: Cheng et al., "Reasoning with Exploration: An Entropy Perspective" (2025), scale 0.4, cap 2.
    """
    return advantages_K + torch.minimum(scale * entropies_K, advantages_K.abs() / cap)


def advantages(
    outcomes_R: Tensor,
    group_R: Tensor,
    flow_rewards_K: Tensor,
    response_offsets: Tensor,
    *,
    estimator: Estimator = Estimator.GROUP_NORM,
    discount: float = 1.0,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    """Advantage [K] of every token of a rollout batch (``reinforce-baseline`` whitens over all of it).

    ``total`` sums a tensor over the processes that hold parts of the batch.
    """
    relative_R = normalise_outcomes(outcomes_R, group_R, estimator)
    rewards_K = token_rewards(relative_R, flow_rewards_K, response_offsets)
    advantages_K = returns(rewards_K, response_offsets, discount)
    return whiten(advantages_K, total) if estimator is Estimator.REINFORCE_BASELINE else advantages_K
