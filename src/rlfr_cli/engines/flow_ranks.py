"""One flow that several processes fit together: what each computes of a batch, and what they tell each other.

Every process holds the whole flow with its moments and takes the same step on the sum of all gradients, so weights stay
alike without being sent. Nothing is spread over the processes, since nothing needs it: the flow of a 7B policy (width
3584, depth 6) is 0.95 billion parameters, 15 GB with gradients and moments.

A batch's sequences are shared out in order, and its noise and times are those that one process would have drawn, so the
number of processes changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.errors import WorkError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import MatchingResult, TokenShare, accumulate_matching_gradients
from rlfr_cli.flow.pairing import PairedLatents
from rlfr_cli.flow.velocity import VelocityNetwork

BUCKET_ELEMENTS = 2**26  # gradients summed at once: 256 MiB


def accumulate_over_ranks(
    network: VelocityNetwork,
    pairs: PairedLatents | None,
    generator: torch.Generator,
    ranks: Ranks,
    *,
    weights_M: torch.Tensor | None = None,
    backward: bool = True,
    **options: Any,
) -> MatchingResult:
    """``accumulate_matching_gradients`` on a batch that the ranks have shared out: its gradients and sums, on each.

    Args:
        pairs: this rank's tokens, which follow those of the ranks before it; None where it has none.
        generator: the same on every rank.
        weights_M: of this rank's tokens.
        **options: those of ``accumulate_matching_gradients``.

    Returns:
        Sums over all ranks; the errors by token are those of this rank.
    """
    count, weight = 0, 0.0
    if pairs is not None:
        count = pairs.paired.num_valid if weights_M is None else int((weights_M > 0).sum())
        weight = count if weights_M is None else float(weights_M.sum())
    counts, weights = zip(*ranks.all_gather((count, weight)), strict=True)
    if pairs is None:
        nothing = torch.zeros((), device=generator.device)
        result = MatchingResult(nothing, nothing, nothing.new_zeros(0, 0))
    else:
        result = accumulate_matching_gradients(
            network,
            pairs,
            generator,
            weights_M=weights_M,
            total_weight=None if ranks.alone else sum(weights),
            share=TokenShare.of(counts, ranks.rank),
            backward=backward,
            **options,
        )
    # Where no rank has a token there is no gradient, as in one process: zeros would still decay the weights.
    if backward and any(counts):
        sum_gradients(network.parameters(), ranks)
    return replace(result, error_sum=ranks.sum(result.error_sum), weight_sum=ranks.sum(result.weight_sum))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Give each rank the sum of all ranks' gradients; one without tokens has none of its own."""
    if ranks.alone:
        return
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket, ranks)
            bucket = []
    if bucket:
        _sum_bucket(bucket, ranks)


def _sum_bucket(bucket: list[torch.Tensor], ranks: Ranks) -> None:
    totals = _unflatten_dense_tensors(ranks.sum(_flatten_dense_tensors(bucket)), bucket)
    for gradient, total in zip(bucket, totals, strict=True):
        gradient.copy_(total)


@torch.no_grad()
def take_weights_of_first(flow: Flow, ranks: Ranks) -> None:
    """Give every rank the weights that rank 0 holds."""
    if ranks.alone:
        return
    for parameter in flow.network.parameters():
        parameter.copy_(ranks.sum(parameter if ranks.is_first else torch.zeros_like(parameter)))


def check_same_flow(flow: Flow, ranks: Ranks) -> None:
    """Check that every rank holds the same flow.

    Raises:
        WorkError: they differ.
    """
    if ranks.alone:
        return
    digest = [float(parameter.detach().double().sum()) for parameter in flow.network.parameters()]
    if any(other != digest for other in ranks.all_gather(digest)):
        raise WorkError("the flows of the processes differ after steps that they took together", hint="report it")
