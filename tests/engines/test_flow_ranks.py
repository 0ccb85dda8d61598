"""What the processes of one flow compute together: shares, sums of gradients, and one flow on all."""

from __future__ import annotations

import pytest
import torch

from engines.threaded_ranks import on_threads
from rlfr_cli.engines import flow_ranks
from rlfr_cli.engines.flow_ranks import (
    accumulate_over_ranks,
    check_same_flow,
    sum_gradients,
    take_weights_of_first,
)
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.errors import WorkError
from rlfr_cli.flow.noise import keyed_generator
from tiny_policies import HIDDEN, tiny_flow

LATENTS = [torch.randn(3 + n, 2, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.mark.parametrize(("count", "world_size"), [(7, 2), (7, 4), (2, 4), (0, 3), (8, 1)])
def test_shares_keep_the_order_and_differ_by_one_at_most(count: int, world_size: int) -> None:
    shares = on_threads(world_size, lambda ranks: ranks.share(range(count)))
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_of_a_batch_are_those_of_one_process(world_size: int) -> None:
    """Three responses; with four ranks one has none."""

    flows = [tiny_flow() for _ in range(world_size + 1)]

    def accumulate(ranks: Ranks) -> tuple[list[float], list[torch.Tensor]]:
        flow, mine = flows.pop(), ranks.share(LATENTS)
        pairs = flow.pair(mine) if mine else None
        result = accumulate_over_ranks(flow.network, pairs, keyed_generator("cpu", 1), ranks, noise_repeats=2)
        gradients = [parameter.grad for parameter in flow.network.parameters() if parameter.grad is not None]
        return [float(result.loss), float(result.error_sum), float(result.weight_sum)], gradients

    sums, gradients = accumulate(ALONE)
    assert sums[2] == sum(len(latents) - 2 for latents in LATENTS)  # less a prompt token, and one without a next one
    for ours, summed in on_threads(world_size, accumulate):
        assert ours == pytest.approx(sums, rel=1e-6)
        torch.testing.assert_close(summed, gradients)


def test_where_no_rank_has_a_token_no_gradient_appears() -> None:
    """Zeros would still decay the weights."""

    flows = [tiny_flow(), tiny_flow()]

    def accumulate(ranks: Ranks) -> list[bool]:
        flow = flows[ranks.rank]
        result = accumulate_over_ranks(flow.network, None, keyed_generator("cpu", 1), ranks)
        assert (float(result.loss), float(result.weight_sum)) == (0.0, 0.0)
        return [parameter.grad is None for parameter in flow.network.parameters()]

    assert all(all(missing) for missing in on_threads(2, accumulate))


def test_buckets_change_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_ranks, "BUCKET_ELEMENTS", 5)

    def add(ranks: Ranks) -> list[list[float]]:
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 1, 6)]
        for parameter in parameters[: 3 + ranks.rank]:
            parameter.grad = torch.full_like(parameter, 10.0 + ranks.rank)
        sum_gradients(parameters, ranks)
        return [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None]

    assert on_threads(2, add) == [[[21.0] * 3, [21.0] * 4, [21.0], [11.0] * 6]] * 2


def test_ranks_whose_flows_differ_are_found_and_can_be_made_alike() -> None:
    flows = [tiny_flow() for _ in range(3)]

    def compare(ranks: Ranks) -> torch.Tensor:
        flow = flows[ranks.rank]
        check_same_flow(flow, ranks)
        weight = flow.network.final_layer.linear.weight
        with torch.no_grad():
            weight[0, 0] += ranks.rank
        with pytest.raises(WorkError, match="the flows of the processes differ"):
            check_same_flow(flow, ranks)
        take_weights_of_first(flow, ranks)
        check_same_flow(flow, ranks)
        return weight.detach()

    for weight in on_threads(3, compare):
        assert torch.equal(weight, tiny_flow().network.final_layer.linear.weight)
