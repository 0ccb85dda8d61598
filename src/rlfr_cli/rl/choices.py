"""The named choices of the reinforcement learning mathematics. Standard library only, so that configs can use them."""

from __future__ import annotations

from enum import StrEnum


class Estimator(StrEnum):
    """How an outcome reward becomes relative to its group."""

    GROUP_NORM = "group-norm"  # (r - mean) / (std + 1e-9), std unbiased
    MEAN_ONLY = "mean-only"  # r - mean
    LEAVE_ONE_OUT = "leave-one-out"  # r - mean of the others
    REINFORCE_BASELINE = "reinforce-baseline"  # r - mean; advantages then whitened over the batch


class Aggregation(StrEnum):
    """What the loss is a mean over."""

    RESPONSE_MEAN = "response-mean"  # mean over a response's tokens, then over responses (published)
    TOKEN_MEAN = "token-mean"  # mean over all tokens of the optimiser batch
    CONSTANT_LENGTH = "constant-length"  # sum over tokens / (responses * a constant length)


class RatioLevel(StrEnum):
    """What a probability ratio is of."""

    TOKEN = "token"
    SEQUENCE = "sequence"  # the geometric mean over a response's tokens, for each of them


class KLEstimator(StrEnum):
    """Per-token estimates of KL(policy, other) from tokens that the policy drew; d = logprob - other's."""

    K1 = "k1"  # d
    K2 = "k2"  # d^2 / 2
    K3 = "k3"  # exp(-d) - 1 + d


class KLPlace(StrEnum):
    """Where the KL to the reference policy is paid for."""

    LOSS = "loss"
    REWARD = "reward"  # each token's reward, before returns


class UniformGroups(StrEnum):
    """What becomes of a group whose outcome rewards are all equal."""

    KEEP = "keep"  # its outcome advantage is 0; token rewards still train it
    DROP = "drop"  # left out of the loss and of its mean


class Correction(StrEnum):
    """What is done about tokens that the generation engine drew from another distribution than the trainer's."""

    TRUNCATE = "truncate"  # weight their loss by the ratio of trainer to engine, at most the cap
    MASK = "mask"  # leave out what has a ratio above the cap or below 1 / cap; weight the rest by it
    NONE = "none"
